"""One-row projections of the kept channels, with bf16, 8- and 4-bit weights, against their references.

Regimes: 1 to 3 segments with thresholds of their own, ending inside a block of columns; no threshold (quantised); K no
multiple of a chunk, several chunks, one of which nothing is kept; one part, several, and more than there are runs;
everything dropped, everything kept; NaN in the weights of dropped channels and in scratch; a NaN input; lists of the
caller's; the same launch again. Without a GPU the kernels run in Triton's interpreter, which proves their logic only.

Planted bugs seen to fail here: the first segment's list for all columns; gaps between chunks left in; a part that
overlaps the next; the last part left out; fields of a word exchanged; scales of the next group; counters left standing;
a tile that goes on into the next segment.
"""

from __future__ import annotations

import pytest
import torch
from skipstone.kernels.kept_list import KeptList, list_kept
from skipstone.kernels.quantised_linear import (
    GROUP,
    listed_quantised_linear,
    quantise,
    quantised_linear,
    quantised_linear_reference,
    quantised_shares,
)
from skipstone.kernels.quantised_linear import _settings as quantised_settings
from skipstone.kernels.sparse_linear import (
    MOST_PARTS,
    PROGRAMS,
    Shares,
    launched_with,
    listed_linear,
    sparse_linear,
    sparse_linear_reference,
    tiles_up_to,
)
from skipstone.kernels.sparse_linear import _settings as sparse_settings
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from skipstone.kernels.sparse_linear import tile_of
except ImportError:  # the tests that need it are skipped
    triton = None

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# fp32: another order of sums. Half types: the result is rounded; sums are fp32 (a bf16 load widened to fp32 is exact,
# also in the interpreter, whose way back to bf16 truncates).
TOLERANCES = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SETTINGS = {"COLUMNS": 16, "PARTS": 3, "num_warps": 1}
CASES = [((40,), 80, 3), ((32, 56, 71), 300, 1), ((32, 56), 33, 8), ((17, 64), 1100, 2)]
LIMITS = (0.4, 0.9, 1.5)


if triton is not None:

    @triton.jit
    def _tiles_kernel(found, tiles_0, tiles_1, end_0, end_1, end_2, columns):  # type: ignore[no-untyped-def]
        segment, first, end = tile_of(tl.program_id(0), tiles_0, tiles_1, end_0, end_1, end_2, columns)
        tl.store(found + 3 * tl.program_id(0), segment)
        tl.store(found + 3 * tl.program_id(0) + 1, first)
        tl.store(found + 3 * tl.program_id(0) + 2, end)


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert torch.isfinite(found.float()).all()
    assert (found.float() - expected).abs().max() < TOLERANCES[dtype] * expected.abs().max().clamp_min(1e-3)


def poisoned(shares: Shares) -> Shares:
    shares.sums.fill_(torch.nan)
    shares.lists.entries.fill_(0x7FC00000)  # channel 0, NaN
    shares.lists.runs.fill_(-(1 << 30))
    return shares


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("ends", "k", "parts"), CASES)
def test_sparse(ends: tuple[int, ...], k: int, parts: int, dtype: torch.dtype) -> None:
    width, settings = ends[-1], SETTINGS | {"PARTS": parts}
    x, weight = drawn(k, seed=1).to(dtype), drawn(k, width, seed=2).to(dtype)
    if k == 300:
        x[128:256] = 0.1
    bias = drawn(width, seed=3).to(dtype) if len(ends) > 1 else None
    limits = torch.tensor(LIMITS[: len(ends)], device=DEVICE)
    expected, shares = sparse_linear_reference(x, weight, limits, ends, bias), poisoned(Shares(k, width, DEVICE))
    weight[x.float().abs() <= 0.4] = torch.nan  # dropped in every segment
    for _ in range(2):
        out = torch.full((width,), torch.nan, dtype=dtype, device=DEVICE)
        sparse_linear(x, weight, limits, ends, out, shares, bias, settings)
        near(out, expected, dtype)
        assert (shares.arrived == 0).all()


@pytest.mark.triton
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("ends", "k", "parts"), [((40,), 96, 2), ((32, 48, 56), 320, 1), ((64,), 64, 4)])
@pytest.mark.parametrize("sparse", [True, False])
def test_quantised(sparse: bool, ends: tuple[int, ...], k: int, parts: int, bits: int) -> None:
    dtype = torch.float16
    width, settings = ends[-1], SETTINGS | {"PARTS": parts, "COLUMNS": 32}
    x, weight = drawn(k, seed=1).to(dtype), quantise(drawn(width, k, seed=2), bits)
    limits = torch.tensor(LIMITS[: len(ends)], device=DEVICE) if sparse else None
    expected = quantised_linear_reference(x, weight, limits, ends)
    shares = poisoned(quantised_shares(k, width, DEVICE))
    for _ in range(2):
        out = torch.full((width,), torch.nan, dtype=dtype, device=DEVICE)
        quantised_linear(x, weight, limits, ends, out, shares, settings)
        near(out, expected, dtype)
        assert (shares.arrived == 0).all()


@pytest.mark.triton
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_nothing_kept_all_kept_and_nothing_hidden(bits: int | None) -> None:
    """All dropped gives zeros; a NaN input is not above a threshold, and shows all the same."""
    x, weight, ends = drawn(160, seed=1), drawn(32, 160, seed=2), (32,)

    def run(limit: float) -> Tensor:
        out, limits = torch.full((32,), 7.0, device=DEVICE), torch.tensor([limit], device=DEVICE)
        if bits is None:
            shares = poisoned(Shares(160, 32, DEVICE))
            sparse_linear(x, weight.T.contiguous(), limits, ends, out, shares, settings=SETTINGS)
        else:
            shares = poisoned(quantised_shares(160, 32, DEVICE))
            quantised_linear(x, quantise(weight, bits), limits, ends, out, shares, settings=SETTINGS)
        return out

    assert (run(9.0) == 0).all()
    dense = weight if bits is None else quantise(weight, bits).dense().T
    near(run(-1.0), dense @ x, torch.float32)
    x[140] = torch.nan
    assert run(9.0).isnan().all()


@pytest.mark.triton
@pytest.mark.parametrize("bits", [None, 4])
def test_lists_of_the_callers(bits: int | None) -> None:
    """In place of x: two segments' lists, other than the scratch's own."""
    k, ends = 288, (32, 64)
    x, weight, limits = drawn(k, seed=1), drawn(64, k, seed=2), torch.tensor([0.3, 1.1], device=DEVICE)
    lists = KeptList.empty(k, 2, DEVICE, group=None if bits is None else GROUP)
    list_kept(x, limits, lists)
    out = torch.full((64,), torch.nan, device=DEVICE)
    if bits is None:
        own = weight.T.contiguous()
        listed_linear(lists, own, ends, out, poisoned(Shares(k, 64, DEVICE)), settings=SETTINGS)
        near(out, sparse_linear_reference(x, own, limits, ends), torch.float32)
    else:
        packed = quantise(weight, bits)
        shares = poisoned(quantised_shares(k, 64, DEVICE))
        listed_quantised_linear(lists, torch.full_like(x, torch.nan), packed, ends, out, shares, SETTINGS)
        near(out, quantised_linear_reference(x, packed, limits, ends), torch.float32)


@pytest.mark.triton
@pytest.mark.parametrize("ends", [(40,), (17, 64), (32, 56, 71)])
def test_no_tile_lies_in_two_segments(ends: tuple[int, ...]) -> None:
    """A column that two tiles made would be right in the interpreter, where the last one wins."""
    (tiles, _), (first, second, *limits, columns, _), _ = launched_with(ends, ends[-1], SETTINGS, 8)
    found = torch.zeros(tiles, 3, dtype=torch.int32, device=DEVICE)
    _tiles_kernel[(tiles,)](found, first, second, *limits, columns)
    made = [(segment, column) for segment, start, end in found.tolist() for column in range(start, end)]
    starts = (0, *ends)
    assert made == [(i, column) for i, end in enumerate(ends) for column in range(starts[i], end)]


@pytest.mark.parametrize(("bits", "step"), [(8, 1 / 127), (4, 1 / 8)])
def test_rounding_is_to_the_nearest_of_a_groups_steps(bits: int, step: float) -> None:
    """Within half a step of the group's largest magnitude, plus what fp16 takes off a scale (2**-11 of 127 steps); Q4_0
    has 8 steps below zero and 7 above."""
    weight = drawn(16, 128, seed=4)
    found = quantise(weight, bits)
    largest = weight.view(16, -1, GROUP).abs().amax(-1, keepdim=True)
    off = (found.dense().T - weight).view(16, -1, GROUP).abs() / largest
    assert float(off.max()) <= step * (0.5 + 127 / 2**11 if bits == 8 else 1.01) and found.shape == (128, 16)
    assert found.nbytes == 16 * 128 * bits // 8 + 16 * 4 * 2


@pytest.mark.parametrize("k", [576, 1536, 4096, 14336])
@pytest.mark.parametrize("ends", [(64,), (576, 768, 960), (4096,), (11008, 22016), (14336, 28672)])
def test_the_rule_shares_the_work_and_has_room(k: int, ends: tuple[int, ...]) -> None:
    shares = Shares(k, ends[-1], "cpu")
    for own in (sparse_settings(k, ends), quantised_settings(k, ends, True), quantised_settings(k, ends, False)):
        tiles = tiles_up_to(ends, own["COLUMNS"])[-1]
        assert tiles <= len(shares.arrived) and 1 <= own["PARTS"] <= MOST_PARTS
        assert own["PARTS"] == 1 or tiles * own["PARTS"] <= PROGRAMS


def test_what_does_not_fit_is_refused() -> None:
    x, weight, out, shares = torch.ones(64), torch.ones(64, 32), torch.ones(32), Shares(64, 32, "cpu")
    lists, packed = shares.lists, quantise(weight.T, 8)
    for ends in ((16,), (16, 8, 32), (8, 16, 24, 32)):
        with pytest.raises(ValueError, match="rising ends up to 32"):
            listed_linear(lists, weight, ends, out, shares, settings=SETTINGS)
    for wrong in ({"COLUMNS": 24}, {"PARTS": MOST_PARTS + 1}):
        with pytest.raises(ValueError, match="in steps of 16"):
            listed_linear(lists, weight, (32,), out, shares, settings=SETTINGS | wrong)
    other = KeptList.empty(200, 3, "cpu"), KeptList.empty(64, 1, "cpu")
    for own in other:
        with pytest.raises(ValueError, match="64 channels and 2 thresholds, the lists are"):
            listed_linear(own, weight, (16, 32), out, shares, settings=SETTINGS)
        with pytest.raises(ValueError, match="64 channels and 2 thresholds, the lists are"):
            listed_quantised_linear(own, x, packed, (16, 32), out, shares)
    with pytest.raises(ValueError, match="go through 128 channels"):
        listed_quantised_linear(lists, x, packed, (32,), out, shares)
    with pytest.raises(ValueError, match="inside 4 bytes"):
        listed_quantised_linear(None, x, packed, (6, 32), out, shares)
    for bits, size in ((3, (4, 64)), (8, (4, 60)), (8, (6, 64)), (4, (4, 64))):
        with pytest.raises(ValueError, match="expected 8 or 4"):
            quantise(torch.ones(size), bits)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_bits_repeat_on_a_gpu(bits: int | None, pdl: bool) -> None:
    """Real shapes, shared tiles, bf16: 50 launches of one input, back to back, give one result."""
    k, width = 4096, 6144
    x, weight = drawn(k, seed=1).bfloat16(), drawn(width, k, seed=2).bfloat16() / 64
    limits, ends = torch.tensor([0.5, 0.7, 0.3], device=DEVICE), (4096, 5120, 6144)
    settings = {"COLUMNS": 64, "PARTS": 4, "num_warps": 4}
    own = weight.T.contiguous() if bits is None else quantise(weight, bits)
    shares = Shares(k, width, DEVICE) if bits is None else quantised_shares(k, width, DEVICE)
    outs = torch.full((50, width), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    for out in outs:
        if bits is None:
            sparse_linear(x, own, limits, ends, out, shares, settings=settings, pdl=pdl)
        else:
            quantised_linear(x, own, limits, ends, out, shares, settings, pdl=pdl)
    assert all(torch.equal(out, outs[0]) for out in outs)
    reference = sparse_linear_reference if bits is None else quantised_linear_reference
    near(outs[0], reference(x, own, limits, ends), torch.bfloat16)
