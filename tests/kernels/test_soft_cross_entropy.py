"""Soft cross-entropy: loss, argmax and gradient.

Regimes: vocabularies of one block, block edges, real ones; bf16 and fp32; rows with gaps between them; large logits.
Catches: a lane's first block kept at -inf, the maximum of the last block only, no upper bound on ids.
"""

from __future__ import annotations

import pytest
import torch
from skipstone.kernels import soft_cross_entropy as op

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TOLERANCE = 2e-5  # fp32 sums of up to 152k terms in another order


def given(vocab_size: int, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(rows, vocab_size, generator=generator) * 3
    logits[0] += 200.0
    probs = (torch.randn(rows, vocab_size, generator=generator) * 2).softmax(-1)
    return logits.to(DEVICE), probs.to(DEVICE)


def test_gradient_is_autograds() -> None:
    logits, probs = (t.double() for t in given(50))
    logits.requires_grad_()
    plain = -(probs * logits.log_softmax(-1)).sum(-1)
    outer = torch.tensor([1.0, -2.0, 0.5], device=DEVICE)
    (wanted,) = torch.autograd.grad((plain * outer).sum(), logits)
    leaf = logits.detach().float().requires_grad_()
    loss, best = op.soft_cross_entropy(leaf, probs.float())
    (found,) = torch.autograd.grad((loss * outer).sum(), leaf)
    torch.testing.assert_close(loss.double(), plain, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(found.double(), wanted, rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.equal(best, logits.argmax(-1))


@pytest.mark.triton
@pytest.mark.parametrize("vocab_size", [1, 63, 64, 65, 1000, 49152, 151936])
def test_kernels_are_their_references(vocab_size: int) -> None:
    logits, probs = given(vocab_size)
    outer = torch.tensor([1.0, 0.0, 0.25], device=DEVICE)
    loss, normaliser, best = op.launch_forward(logits, probs)
    wanted = op.soft_cross_entropy_reference(logits, probs)
    torch.testing.assert_close(loss, wanted[0], rtol=TOLERANCE, atol=10 * TOLERANCE)
    torch.testing.assert_close(normaliser, wanted[1], rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.equal(best, wanted[2])
    found = op.launch_backward(logits, probs, wanted[1], outer)
    torch.testing.assert_close(
        found, op.soft_cross_entropy_grad_reference(logits, probs, wanted[1], outer), rtol=TOLERANCE, atol=1e-6
    )


@pytest.mark.triton
def test_rows_with_gaps_and_bf16() -> None:
    wide, probs = given(500)
    logits = wide[:, 100:400].bfloat16().as_strided((3, 300), (300, 1)) if not ON_GPU else wide[:, 100:400].bfloat16()
    share = probs[:, 7:307] / probs[:, 7:307].sum(-1, keepdim=True)
    loss, normaliser, best = op.launch_forward(logits, share)
    wanted = op.soft_cross_entropy_reference(logits, share)
    torch.testing.assert_close(loss, wanted[0], rtol=1e-4, atol=1e-3)
    assert torch.equal(logits.float().gather(1, best.unsqueeze(1)).squeeze(1), logits.float().amax(-1))
    torch.testing.assert_close(normaliser, wanted[1], rtol=1e-4, atol=1e-3)


def test_shapes_are_checked() -> None:
    logits, probs = given(20)
    with pytest.raises(ValueError, match="expected one shape"):
        op.launch_forward(logits, probs[:, :10])
