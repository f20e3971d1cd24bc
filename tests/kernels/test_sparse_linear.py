"""One-row projections of the kept channels, with bf16, 8- and 4-bit weights, against their references.

Regimes: 1 to 3 segments with thresholds of their own; no threshold; K and M no multiple of a block; one part, several,
and more than there are blocks of k; everything dropped; NaN in the weights of dropped channels and in scratch; a NaN
input; the same launch again. Without a GPU the kernels run in Triton's interpreter, which proves their logic only.

Planted bugs seen to fail here: the first segment's threshold for all columns; a share of k that overlaps the next; the
last part left out; halves of a byte exchanged; scales of the next group; counters left standing.
"""

from __future__ import annotations

import pytest
import torch
from skipstone.kernels.quantised_linear import GROUP, quantise, quantised_linear, quantised_linear_reference
from skipstone.kernels.quantised_linear import _settings as quantised_settings
from skipstone.kernels.sparse_linear import (
    Shares,
    checked_ends,
    fitting_columns,
    sparse_linear,
    sparse_linear_reference,
)
from skipstone.kernels.sparse_linear import _settings as sparse_settings
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# fp32: another order of sums. Half types: the result is rounded; sums are fp32 (a bf16 load widened to fp32 is exact,
# also in the interpreter, whose way back to bf16 truncates).
TOLERANCES = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SETTINGS = {"BN": 16, "BK": 32, "UNROLL": 2, "PARTS": 3, "num_warps": 4, "num_stages": 2}
CASES = [((40,), 80, 3), ((32, 48, 64), 160, 1), ((32, 56), 33, 4)]


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert torch.isfinite(found.float()).all()
    assert (found.float() - expected).abs().max() < TOLERANCES[dtype] * expected.abs().max().clamp_min(1e-3)


def poisoned(k: int, width: int, parts: int) -> Shares:
    shares = Shares(k, width, parts, DEVICE)
    shares.sums.fill_(torch.nan)
    shares.lists.fill_(-(1 << 30))
    return shares


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("ends", "k", "parts"), CASES)
@pytest.mark.parametrize("sparse", [True, False])
def test_sparse(sparse: bool, ends: tuple[int, ...], k: int, parts: int, dtype: torch.dtype) -> None:
    if not sparse and dtype != torch.float32 and not ON_GPU:
        pytest.skip("without a threshold the interpreter shows nothing more than in fp32")
    width, settings = ends[-1], SETTINGS | {"PARTS": parts}
    x, weight = drawn(k, seed=1).to(dtype), drawn(k, width, seed=2).to(dtype)
    bias = drawn(width, seed=3).to(dtype) if len(ends) > 1 else None
    limits = torch.tensor([0.4, 0.9, 1.5], device=DEVICE)[: len(ends)] if sparse else None
    expected, shares = sparse_linear_reference(x, weight, limits, ends, bias), poisoned(k, width, parts)
    if sparse:
        weight[x.float().abs() <= 0.4] = torch.nan  # dropped in every segment
    for _ in range(2):
        out = torch.full((width,), torch.nan, dtype=dtype, device=DEVICE)
        sparse_linear(x, weight, limits, ends, out, shares, bias, settings)
        near(out, expected, dtype)
        assert (shares.arrived == 0).all()


@pytest.mark.triton
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("ends", "k", "parts"), [((40,), 96, 2), ((32, 48, 58), 64, 4)])
@pytest.mark.parametrize("sparse", [True, False])
def test_quantised(sparse: bool, ends: tuple[int, ...], k: int, parts: int, bits: int) -> None:
    dtype = torch.float16
    width, settings = ends[-1], SETTINGS | {"PARTS": parts, "BK": 32 * (1 + parts % 2)}
    x, weight = drawn(k, seed=1).to(dtype), quantise(drawn(width, k, seed=2), bits)
    limits = torch.tensor([0.4, 0.9, 1.5], device=DEVICE)[: len(ends)] if sparse else None
    expected, shares = quantised_linear_reference(x, weight, limits, ends), poisoned(k, width, parts)
    for _ in range(2):
        out = torch.full((width,), torch.nan, dtype=dtype, device=DEVICE)
        quantised_linear(x, weight, limits, ends, out, shares, settings)
        near(out, expected, dtype)
        assert (shares.arrived == 0).all()


@pytest.mark.triton
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_nothing_kept_and_nothing_hidden(bits: int | None) -> None:
    """All dropped gives zeros; a NaN input is not above a threshold, and shows all the same."""
    x, weight, ends, limits = drawn(64, seed=1), drawn(32, 64, seed=2), (32,), torch.tensor([9.0], device=DEVICE)

    def run() -> Tensor:
        out = torch.full((32,), 7.0, device=DEVICE)
        if bits is None:
            sparse_linear(x, weight.T.contiguous(), limits, ends, out, Shares(64, 32, 3, DEVICE), settings=SETTINGS)
        else:
            quantised_linear(x, quantise(weight, bits), limits, ends, out, Shares(64, 32, 3, DEVICE), settings=SETTINGS)
        return out

    assert (run() == 0).all()
    x[40] = torch.nan
    assert run().isnan().all()


@pytest.mark.parametrize(("bits", "step"), [(8, 1 / 127), (4, 1 / 8)])
def test_rounding_is_to_the_nearest_of_a_groups_steps(bits: int, step: float) -> None:
    """Within half a step of the group's largest magnitude, plus what fp16 takes off a scale (2**-11 of 127 steps); Q4_0
    has 8 steps below zero and 7 above."""
    weight = drawn(6, 128, seed=4)
    found = quantise(weight, bits)
    largest = weight.view(6, -1, GROUP).abs().amax(-1, keepdim=True)
    off = (found.dense().T - weight).view(6, -1, GROUP).abs() / largest
    assert float(off.max()) <= step * (0.5 + 127 / 2**11 if bits == 8 else 1.01) and found.shape == (128, 6)
    assert found.nbytes == 6 * 128 * bits // 8 + 6 * 4 * 2


def test_the_rule_cuts_no_segment_in_two() -> None:
    """Llama-2-7B's gate and up end at no multiple of 512."""
    assert [fitting_columns(512, ends) for ends in ((11008, 22016), (4096, 5120, 6144), (576, 768, 960))] == [
        256,
        512,
        64,
    ]
    for bits in (8, 4):
        checked_ends((11008, 22016), 22016, quantised_settings(4096, (11008, 22016), bits)["BN"])
    checked_ends((11008, 22016), 22016, sparse_settings(4096, (11008, 22016))["BN"])


def test_what_does_not_fit_is_refused() -> None:
    x, weight, out, shares = torch.ones(64), torch.ones(64, 32), torch.ones(32), Shares(64, 32, 3, "cpu")
    for ends in ((16,), (16, 8, 32), (8, 16, 24, 32)):
        with pytest.raises(ValueError, match="rising ends up to 32"):
            sparse_linear(x, weight, None, ends, out, shares, settings=SETTINGS)
    with pytest.raises(ValueError, match="inside blocks of 16"):
        sparse_linear(x, weight, None, (8, 32), out, shares, settings=SETTINGS)
    with pytest.raises(ValueError, match="no whole groups"):
        quantised_linear(x, quantise(weight.T, 8), None, (32,), out, shares, settings=SETTINGS | {"BK": 16})
    for bits, size in ((3, (4, 64)), (8, (4, 60)), (4, (5, 64))):
        with pytest.raises(ValueError, match="expected 8 or 4"):
            quantise(torch.ones(size), bits)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_bits_repeat_on_a_gpu(bits: int | None) -> None:
    """Real shapes, shared tiles, bf16: 50 launches of one input give one result."""
    k, width = 4096, 6144
    x, weight = drawn(k, seed=1).bfloat16(), drawn(width, k, seed=2).bfloat16() / 64
    limits, ends = torch.tensor([0.5, 0.7, 0.3], device=DEVICE), (4096, 5120, 6144)
    shares = Shares(k, width, 64, DEVICE)
    own = weight.T.contiguous() if bits is None else quantise(weight, bits)
    outs = []
    for _ in range(50):
        out = torch.full((width,), torch.nan, dtype=torch.bfloat16, device=DEVICE)
        if bits is None:
            sparse_linear(x, own, limits, ends, out, shares)
        else:
            quantised_linear(x, own, limits, ends, out, shares)
        outs.append(out)
    assert all(torch.equal(out, outs[0]) for out in outs)
    reference = sparse_linear_reference if bits is None else quantised_linear_reference
    near(outs[0], reference(x, own, limits, ends), torch.bfloat16)
