"""The rows of a recurrent head: waiting pairs, rows made of them, inputs and outputs.

Regimes: widths of no power of two and of a real model; one tap and three; rings that wrap; nothing waiting, fewer
pairs than rows and more; sequences that are not active; rows that are not live, and outputs and whatever must not be
read poisoned with NaN; fp32, fp16 whose x is stored smaller, bf16 on a GPU. Planted bugs that these tests were seen
to catch: a pair one place off, the newest pairs instead of the oldest, the pending token's pair left out, a ring that
does not wrap, paths without the row itself, pairs of inactive sequences taken, norms swapped, Gemma's factor
forgotten, sums of the output instead of the normed one, the root's row taken for its sequence, x of fp16 not scaled.
"""

from __future__ import annotations

import math

import pytest
import torch
from skipstone.kernels.head_rows import (
    absorb_rows,
    absorb_rows_reference,
    context_rows,
    context_rows_reference,
    enter_rows,
    enter_rows_reference,
    keep_states,
    keep_states_reference,
    leave_rows,
    leave_rows_reference,
)
from skipstone.kernels.rows import Rows

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.triton
# fp32: sums of 4096 squares in another order. Half types: one rounding of numbers of up to 8.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
DTYPES = list(TOLERANCES) if ON_GPU else [torch.float32, torch.float16]  # the interpreter truncates to bf16


def whole(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def poison(*shape, dtype=torch.float32):
    return torch.full(shape, math.nan, dtype=dtype, device=DEVICE)


def two_of_three(size):
    """Rows of 3 sequences, 8 each; some live, at various positions, places 0 to 9."""
    rows = Rows.empty(32, DEVICE)
    generator = torch.Generator().manual_seed(size)
    for r in range(24):
        rows.live[r] = int(torch.rand((), generator=generator) < 0.6)
        rows.sequence[r], rows.position[r], rows.base[r] = r // 8, 60 + r, 50
        rows.slot[r] = 50 + r % 8 + 2
    assert 0 < int(rows.live.sum()) < 24
    return rows


def dead(rows):
    return (rows.live == 0).nonzero().squeeze(1)


def check(found, wanted, rows, dtype):
    """Live rows near the reference, the others untouched."""
    live = rows.live != 0
    assert float((found.float()[live] - wanted[live]).abs().max()) < TOLERANCES[dtype]
    assert found[~live].isnan().all()


@pytest.mark.parametrize(("taps", "size"), [(1, 5), (3, 48), (4, 17), (6, 9), (2, 576)])
def test_a_path_waits_at_its_positions(taps, size):
    width = 4
    states = [random(16, size, seed=tap) for tap in range(taps)]
    for own in states:
        own[[1, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15]] = math.nan
    nodes = torch.full((3, 16), 99, dtype=torch.int32, device=DEVICE)
    record = torch.full((3, 96), 77, dtype=torch.int32, device=DEVICE)
    nodes[0, :3], nodes[2, :1] = whole(0, 2, 3), whole(2)
    record[0, 3:7], record[2, 3:5] = whole(62, 7, 8, 9), whole(31, -1)
    given = states, record, nodes, whole(3, 0, 1), width
    found = random(3, 64, taps, size), torch.full((3, 64), -5, dtype=torch.int32, device=DEVICE)
    wanted = [t.clone() for t in found]
    before = found[0].clone()
    keep_states_reference(*given, *wanted)
    keep_states(*given, *found)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    assert found[1][0, [63, 0, 1]].tolist() == [7, 8, 9] and found[1][2, 32] == 0  # no token could be drawn there
    assert int((found[1] >= 0).sum()) == 4 and torch.equal(found[0][1], before[1])


@pytest.mark.parametrize("width", [1, 2, 8, 16])
def test_the_oldest_pairs_become_rows(width):
    """Nothing waits, some, more than the rows hold, nobody active, a ring that wraps."""
    active, base = whole(1, 1, 1, 0, 1), whole(20, 3, 90, 9, 66)
    lengths = whole(21, 0, 58, 2, 62)
    waiting = torch.arange(5 * 64, dtype=torch.int32, device=DEVICE).view(5, 64)
    num_rows = -(-5 * width // 16) * 16
    rows, ids, last = Rows.empty(num_rows, DEVICE), whole(*[-9] * num_rows), whole(*[-9] * 5)
    root = Rows.empty(16, DEVICE)
    for name in ("live", "sequence", "position", "slot", "base", "path"):
        getattr(rows, name)[: 5 * width] = -9
    wanted, wanted_ids, wanted_last, after = absorb_rows_reference(active, base, lengths, waiting, width)
    absorb_rows(active, base, lengths, waiting, width, rows, ids, last, root)
    assert torch.equal(rows.live, wanted.live) and torch.equal(last, wanted_last) and torch.equal(lengths, after)
    live = rows.live != 0
    for name in ("sequence", "position", "slot", "base", "path"):
        assert torch.equal(getattr(rows, name)[live], getattr(wanted, name)[live]), name
    assert torch.equal(ids[live], wanted_ids[live])
    assert root.live[:5].tolist() == active.tolist() and root.sequence[:5].tolist() == [0, 1, 2, 3, 4]
    assert root.position[:5].tolist() == (after - 1).tolist() and not root.live[5:].any()
    if width == 16:
        assert last.tolist() == [-1, 19, 47, -1, 68] and root.position[:3].tolist() == [20, 3, 73]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("taps", "size"), [(1, 5), (3, 48), (3, 576), (2, 4096)])
def test_context_rows(taps, size, dtype):
    rows, ring = two_of_three(size), random(3, 64, taps, size) * 3
    held = torch.zeros(3, 64, dtype=torch.bool, device=DEVICE)
    held[rows.sequence[rows.live != 0].long(), (rows.position % 64)[rows.live != 0].long()] = True
    wanted = context_rows_reference(ring, rows)
    ring[~held] = math.nan
    found = poison(32, taps * size, dtype=dtype)
    context_rows(ring, rows, found)
    check(found, wanted, rows, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [5, 48, 576, 4096])
def test_enter_rows(size, dtype):
    rows, generator = two_of_three(size), torch.Generator().manual_seed(3)
    ids, places = (torch.randint(0, n, (32,), generator=generator).int().to(DEVICE) for n in (50, 9))
    embedding, contexts = random(50, size).to(dtype), random(3, 9, size, seed=1) * 0.2
    token_norm, context_norm = 1 + 0.1 * random(size, seed=2), 1 + 0.1 * random(size, seed=3)
    found = poison(32, 2 * size, dtype=dtype)
    given = ids, places, embedding, 1.7, token_norm, contexts, context_norm, rows
    wanted = enter_rows_reference(*given)
    contexts[:, [n for n in range(9) if n not in places[rows.live != 0].tolist()]] = math.nan
    ids[dead(rows)] = -(10**6)
    enter_rows(*given, found)
    check(found, wanted, rows, dtype)
    zeros = torch.zeros_like(contexts)  # position 0 has no context
    enter_rows(*given[:5], zeros, *given[6:], found)
    assert not found[rows.live != 0][:, size:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [5, 48, 576, 4096])
def test_leave_rows(size, dtype):
    rows, hidden = two_of_three(size), random(32, size) * 4
    gain, norm = 1 + 0.1 * random(size, seed=2), 1 + 0.1 * random(size, seed=3)
    x, sums = leave_rows_reference(hidden, gain, norm)
    scale = 1 / 16 if dtype == torch.float16 else 1.0
    hidden[dead(rows)] = math.nan
    outputs, found, stats = poison(3, 12, size), poison(32, size, dtype=dtype), poison(32, 2, 1)
    leave_rows(hidden, gain, norm, rows, None, outputs, found, stats)
    check(found.float() / scale, x, rows, dtype)
    check(stats / size, sums / size, rows, torch.float32)
    for r in range(32):
        if rows.live[r]:
            assert torch.equal(outputs[rows.sequence[r], rows.slot[r] - 50], hidden[r])
    assert int((~outputs.isnan()).all(-1).sum()) == int(rows.live.sum())

    last = whole(3, -1, int((rows.live != 0).nonzero()[-1]))
    hidden[3] = random(size, seed=9)
    x, sums = leave_rows_reference(hidden, gain, norm)
    outputs, found, stats = poison(3, 12, size), poison(16, size, dtype=dtype), poison(16, 2, 1)
    leave_rows(hidden, gain, norm, rows, last, outputs, found, stats)
    for b in (0, 2):
        assert torch.equal(outputs[b, 0], hidden[last[b]])
        assert float((found[b].float() / scale - x[last[b]]).abs().max()) < TOLERANCES[dtype]
        assert float((stats[b] - sums[last[b]]).abs().max()) / size < TOLERANCES[torch.float32]
    assert outputs[1].isnan().all() and outputs[:, 1:].isnan().all() and found[[1, *range(3, 16)]].isnan().all()


def test_shapes_are_checked():
    rows = Rows.empty(16, DEVICE)
    with pytest.raises(ValueError, match="width 3"):
        absorb_rows(*[whole(1)] * 3, whole(1).view(1, 1), 3, rows, rows.live, whole(0), rows)
    with pytest.raises(ValueError, match="expected 64 places"):
        keep_states([], rows.path, rows.path, rows.live, 16, poison(1, 32, 2, 8), rows.path)
    with pytest.raises(ValueError, match="expected 2 of width 8"):
        keep_states([poison(16, 8)], rows.path, rows.path, rows.live, 16, poison(1, 64, 2, 8), poison(1, 64))
    with pytest.raises(ValueError, match="do not fit"):
        keep_states([poison(15, 8)], rows.path, rows.path[:1], rows.live, 16, poison(1, 64, 1, 8), poison(1, 64))
    with pytest.raises(ValueError, match="one tile"):
        leave_rows(poison(16, 8), *[poison(8)] * 2, rows, None, poison(1, 2, 8), poison(16, 8), poison(16, 2, 2))
    with pytest.raises(ValueError, match="expected width 8"):
        enter_rows(
            *[rows.live] * 2, poison(4, 8), 1.0, *[poison(1)] * 1, poison(1, 2, 8), poison(1), rows, poison(16, 8)
        )
    with pytest.raises(ValueError, match=r"expected \(16, 16\)"):
        context_rows(poison(1, 64, 2, 8), rows, poison(16, 8))
