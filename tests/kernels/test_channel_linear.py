"""Projections that read some input channels: against the reference, and a row's bits among others.

Regimes: 1 to 16 rows; 1, odd and many channels; rows that keep none, all, or some; NaN in what is dropped; fp32, bf16,
fp16; parts 1 and 3.

Planted bugs seen to fail here: channels of a part without the part's offset; dropped places multiplied by zero.
"""

import pytest
import torch
from skipstone.kernels.channel_linear import channel_linear, channel_linear_reference

# fp32: another order of sums. Half types: the result is rounded (once a part), sums are fp32.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("size", "width", "parts"), [(1, 1, 1), (33, 20, 3), (576, 192, 1), (576, 192, 2)])
def test_against_the_reference(size, width, parts, dtype):
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(5, size, generator=generator).to(dtype)
    weight = torch.randn(size, width, generator=generator).to(dtype)
    keep = torch.rand(5, size, generator=generator) < 0.5
    keep[0], keep[1] = False, True
    expected = channel_linear_reference(x, weight, keep)
    x = x.masked_fill(~keep, torch.nan)
    found = channel_linear(x, weight, keep, parts)
    scale = expected.abs().max().clamp_min(1e-3)
    assert ((found.float() - expected).abs().max() / scale) < TOLERANCES[dtype]
    assert (found[0] == 0).all()


@pytest.mark.hazard(23)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("parts", [1, 2])
def test_a_row_has_its_bits_among_others(dtype, parts):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 640, generator=generator).to(dtype)
    weight = torch.randn(640, 96, generator=generator).to(dtype)
    keep = x.float().abs() > 0.7
    together = channel_linear(x, weight, keep, parts)
    for count in (1, 2, 7):
        for first in range(0, 16 - count, 3):
            rows = slice(first, first + count)
            assert torch.equal(channel_linear(x[rows], weight, keep[rows], parts), together[rows])


def test_parts_must_divide():
    with pytest.raises(ValueError, match="10 channels cannot be divided into 3"):
        channel_linear(torch.ones(1, 10), torch.ones(10, 2), torch.ones(1, 10, dtype=torch.bool), 3)
