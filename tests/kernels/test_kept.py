"""MLPs of which each tile of rows uses the neurons of its own list, against their references.

Regimes: 1 to 16 live rows in two tiles with different lists; counts 1, odd, block edge +-1, all; gated and plain MLPs,
biases, LayerNorm, one and two readers, shared tiles, neurons that are no multiple of a block. What no list names is
NaN: weights, ids beyond a count, activations beyond the zeros. Without a GPU the kernels run in Triton's interpreter
(`TRITON_INTERPRET=1`), which proves their logic only.

Planted bugs that these tests were seen to catch: the up rows of a gated MLP by place and not by neuron, the other
tile's list, a share that ends in the middle of a block.
"""

from __future__ import annotations

import pytest
import torch
from skipstone.kernels import tile as core
from skipstone.kernels.kept import ZEROS, Kept, KeptNeurons
from skipstone.kernels.kept_down import kept_down, kept_down_reference, kept_parts, kept_tiles
from skipstone.kernels.layer_shape import LayerShape
from skipstone.kernels.residual_linear import Parts
from skipstone.kernels.rows import Rows
from skipstone.kernels.up_linear import up_linear, up_linear_reference
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.triton
# the interpreter's bf16 arithmetic is wrong, so bf16 is for GPUs only
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else [])
# Sums in another order (fp32); inputs, weights and results rounded to the dtype (half types).
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LLAMA = LayerShape(96, 80, 6, 2, 16, 16, 1e-5, 0.25)
NEOX = LayerShape(64, 100, 4, 4, 16, 4, 1e-5, 0.25, layer_norm=True, gated=False, activation="gelu")
LIVE = [0, 5, 16, 31]


def near(given: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert torch.isfinite(given.float()).all()
    error = (given.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-9)
    assert error < TOLERANCES[dtype], f"relative error {error:.2e}"


def drawn(*size: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def lists(counts: tuple[int, int], num_neurons: int) -> Kept:
    """Random rising neurons, other ones for each tile; behind the counts one that is on no list, if there is one."""
    ids = torch.full((2, num_neurons), -1, dtype=torch.int32)
    for tile, count in enumerate(counts):
        order = torch.randperm(num_neurons, generator=torch.Generator().manual_seed(tile))
        ids[tile, :count] = order[:count].sort().values
    free = sorted(set(range(num_neurons)) - set(ids.flatten().tolist()))
    ids[ids < 0] = free[0] if free else 0
    return Kept(ids.to(DEVICE), torch.tensor(counts, dtype=torch.int32, device=DEVICE))


def live_rows(live: list[int]) -> Rows:
    rows = Rows.empty(32, DEVICE)
    rows.live[live] = 1
    return rows


def named(kept: Kept, num_neurons: int) -> Tensor:
    """Neurons on any list, bool `[FF]`."""
    found = torch.zeros(num_neurons, dtype=torch.bool, device=DEVICE)
    for ids, count in zip(kept.ids, kept.count.tolist(), strict=True):
        found[ids[:count].long()] = True
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [LLAMA, NEOX], ids=lambda s: s.activation)
@pytest.mark.parametrize("counts", [(1, 33), (80, 17), (31, 64)])
def test_up(shape: LayerShape, dtype: torch.dtype, counts: tuple[int, int]) -> None:
    hidden, norm = drawn(32, shape.hidden_size, seed=1) + 0.5, drawn(shape.hidden_size, seed=2) + 1.0
    stats = torch.stack([(hidden * hidden).sum(1), hidden.sum(1)], 1).unsqueeze(2).contiguous()
    x = (hidden * norm * core.x_scale(dtype)).to(dtype)
    num_neurons, ways = shape.intermediate_size, 2 if shape.gated else 1
    weight = drawn(ways * num_neurons, shape.hidden_size, seed=3, scale=0.1).to(dtype)
    bias = None if shape is LLAMA else drawn(ways * num_neurons, seed=4).to(dtype)
    shift = drawn(ways * num_neurons, seed=5) if shape.layer_norm else None
    kept = lists(counts, num_neurons)
    expected = up_linear_reference(x, stats, weight, bias, shift, shape)
    weight[~named(kept, num_neurons).repeat(ways)] = float("nan")
    out = torch.full((32, num_neurons), float("nan"), dtype=dtype, device=DEVICE)
    up_linear(x, stats, weight, bias, shift, out, live_rows(LIVE), shape, kept=kept)
    for row in LIVE:
        count = counts[row // 16]
        near(out[row, :count], expected[row, kept.ids[row // 16, :count].long()], dtype)
        assert (out[row, count : -(-count // ZEROS) * ZEROS] == 0).all()
    assert int(out.isfinite().any(1).sum()) == len(LIVE)


def compact(counts: tuple[int, int], num_neurons: int, dtype: torch.dtype) -> Tensor:
    a = drawn(32, num_neurons, seed=1).to(dtype)
    for tile, count in enumerate(counts):
        a[16 * tile : 16 * (tile + 1), count:] = 0
        a[16 * tile : 16 * (tile + 1), -(-count // ZEROS) * ZEROS :] = float("nan")
    return a


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [(1, 200), (63, 65), (128, 3)])
@pytest.mark.parametrize(("parts", "split", "hold"), [(1, 1, 0), (3, 2, 0), (1, 1, 1), (3, 2, 1)])
@pytest.mark.parametrize(("num_norms", "num_neurons"), [(0, 208), (1, 203), (2, 208)])
def test_down(
    dtype: torch.dtype, counts: tuple[int, int], parts: int, split: int, hold: int, num_norms: int, num_neurons: int
) -> None:
    width, kept = 72, lists(counts, num_neurons)
    a = compact(counts, num_neurons, dtype)
    weight = drawn(num_neurons, width, seed=2, scale=0.1).to(dtype)
    weight[~named(kept, num_neurons)] = float("nan")
    bias = drawn(width, seed=3).to(dtype) if num_norms else None
    hidden, norms = drawn(32, width, seed=4), [drawn(width, seed=5 + i) + 1 for i in range(num_norms)]
    xs = [torch.full((32, width), float("nan"), dtype=dtype, device=DEVICE) for _ in norms]
    settings = {"BN": 16, "BK": 32, "SPLIT": split, "PARTS": parts, "HOLD": hold, "num_warps": 2, "num_stages": 2}
    stats, before = torch.full((32, 2, 5), float("nan"), device=DEVICE), None if num_norms == 0 else hidden
    scratch = Parts(32, width, 3, DEVICE)
    scratch.sums.fill_(float("nan"))
    for _ in range(2):  # the counters are ready for the next launch
        out = torch.full((32, width), float("nan"), device=DEVICE)
        kept_down(
            a, weight, bias, before, out, live_rows(LIVE), kept, parts=scratch, stats=stats, settings=settings,
            next_norms=tuple(zip(norms, xs, strict=True)),
        )  # fmt: skip
        y, sums, _ = kept_down_reference(a, weight, bias, before, None, kept)
        near(out[LIVE], y[LIVE], dtype)
        near(stats[LIVE].sum(-1), sums[LIVE], dtype)
        for norm, x in zip(norms, xs, strict=True):
            near(x[LIVE] / core.x_scale(dtype), (y * norm)[LIVE], dtype)
        assert int(out.isfinite().all(1).sum()) == len(LIVE)
    assert not scratch.arrived.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_beside_any_list(dtype: torch.dtype) -> None:
    """Alone in the first tile, and among others in the second beside another list; its own settings."""
    width, num_neurons = 72, 208
    weight = drawn(num_neurons, width, seed=2, scale=0.1).to(dtype)
    stats = torch.empty(32, 2, kept_tiles(width, num_neurons, dtype), device=DEVICE)
    scratch = Parts(32, width, kept_parts(width, num_neurons, dtype), DEVICE)
    found = []
    for tile, other, live in ((0, 200, [3]), (1, 20, [0, 16, 19, 27])):
        counts = (90, other) if tile == 0 else (other, 90)
        kept, a = lists(counts, num_neurons), compact(counts, num_neurons, dtype)
        kept.ids[tile, :90] = torch.arange(5, 185, 2, dtype=torch.int32, device=DEVICE)
        a[16 * tile + 3, :90] = drawn(90, seed=9).to(dtype)
        out = torch.empty(32, width, device=DEVICE)
        kept_down(a, weight, None, None, out, live_rows(live), kept, parts=scratch, stats=stats)
        found.append(out[16 * tile + 3])
    assert torch.equal(*found) and bool(found[0].any())


def test_lists_in_place() -> None:
    """Every neuron until told otherwise; layers that are left out keep all again; other tiles stay."""
    own = KeptNeurons(3, 2, 10, DEVICE)
    address = own.layers[1].ids.data_ptr(), own.layers[1].count.data_ptr()
    own.keep(1, {1: torch.tensor([2, 7, 9], device=DEVICE)})
    assert own.count.tolist() == [[10, 10], [10, 3], [10, 10]]
    assert own.layers[1].ids[1, :3].tolist() == [2, 7, 9] and own.layers[1].ids[0].tolist() == list(range(10))
    own.keep(1, {0: torch.tensor([4], device=DEVICE)})
    assert own.count.tolist() == [[10, 1], [10, 10], [10, 10]] and own.ids[1, 1].tolist() == list(range(10))
    assert address == (own.layers[1].ids.data_ptr(), own.layers[1].count.data_ptr())
    ids = torch.arange(9, -1, -1, dtype=torch.int32, device=DEVICE).repeat(3, 1)
    own.copy(0, Kept(ids, torch.tensor([1, 10, 2], dtype=torch.int32, device=DEVICE)))
    assert own.count.tolist() == [[1, 1], [10, 10], [2, 10]] and own.layers[2].ids[0, :2].tolist() == [9, 8]
    assert address == (own.layers[1].ids.data_ptr(), own.layers[1].count.data_ptr())
    with pytest.raises(ValueError, match="keeps 0 neurons, expected 1 to 10"):
        own.keep(0, {2: torch.tensor([], dtype=torch.int32)})
