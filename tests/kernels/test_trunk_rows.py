"""Row operations of the frozen forward against their references: odd widths and counts, bf16 and fp32.

Catches: sine of the wrong half, rows of the second text at positions that go on, value heads rotated.
"""

from __future__ import annotations

import pytest
import torch
from skipstone.kernels import trunk_rows as op

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32  # the interpreter truncates bf16
TOLERANCE = 1e-2 if ON_GPU else 1e-5  # one rounding to bf16; fp32 exp
pytestmark = pytest.mark.triton


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


@pytest.mark.parametrize("width", [1, 63, 576, 896])
def test_rms_norm(width: int) -> None:
    x, weight = random(5, width) * 30, random(width)
    found = op.launch_rms_norm(x, weight, 1e-5, DTYPE)
    torch.testing.assert_close(found, op.rms_norm_reference(x, weight, 1e-5, DTYPE), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("heads", [(12, 3), (4, 1), (16, 2)])
def test_rotate(heads: tuple[int, int]) -> None:
    """Two texts of 7 positions."""
    rotated, values = heads
    qkv, angles = random(14, rotated + values, 64).to(DTYPE), random(7, 32) * 3
    cos, sin = angles.cos(), angles.sin()
    tables = torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)
    wanted = op.rotate_reference(qkv, *tables, rotated)
    found = op.launch_rotate(qkv.clone(), *tables, rotated)
    torch.testing.assert_close(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.equal(found[:, rotated:], qkv[:, rotated:])


@pytest.mark.parametrize("width", [1, 65, 1536, 4864])
def test_silu_mul(width: int) -> None:
    x = (random(3, 2 * width) * 4).to(DTYPE)
    torch.testing.assert_close(op.launch_silu_mul(x), op.silu_mul_reference(x), rtol=TOLERANCE, atol=TOLERANCE)
