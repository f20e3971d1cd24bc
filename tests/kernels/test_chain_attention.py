"""Attention of drafted chains against its masked form: results and gradients, for chains up to longer than the text.

Catches: the part's own log-sum-exp given to flash attention's backward, queries moved one place less.
"""

from __future__ import annotations

import pytest
import torch
from skipstone.kernels.chain_attention import chain_attention, chain_attention_reference

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
TOLERANCE = 3e-2 if ON_GPU else 2e-5  # bf16 products; fp32 sums in another order


@pytest.mark.parametrize("step", [0, 1, 2, 5])
@pytest.mark.parametrize("length", [3, 37])
@pytest.mark.parametrize("groups", [1, 3])
def test_it_is_the_masked_attention(step: int, length: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(step)

    def random(heads: int) -> torch.Tensor:
        return torch.randn(2, length, heads, 16, generator=generator).to(DEVICE).requires_grad_()

    q, made = random(2 * groups), [(random(2), random(2)) for _ in range(step + 1)]
    weight = torch.randn(2, length, 2 * groups, 16, generator=generator).to(DEVICE)
    weight[:, :step] = 0.0  # positions of no chain
    leaves = [q, *(x for pair in made for x in pair)]
    found = chain_attention(q, made, DTYPE)
    wanted = chain_attention_reference(q, made)
    torch.testing.assert_close(found[:, step:].float(), wanted[:, step:], rtol=TOLERANCE, atol=TOLERANCE)
    gradients = torch.autograd.grad((found.float() * weight).sum(), leaves, allow_unused=True)
    for mine, other in zip(gradients, torch.autograd.grad((wanted * weight).sum(), leaves), strict=True):
        mine = torch.zeros_like(other) if mine is None else mine
        torch.testing.assert_close(mine, other, rtol=TOLERANCE, atol=TOLERANCE)
