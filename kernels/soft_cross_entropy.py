"""Soft cross-entropy of head logits against target probabilities, and the head's argmax, without `[c, V]` temporaries.

    loss_r = log sum_v exp(z_rv) - sum_v p_rv z_rv          d loss_r / d z_rv = softmax(z_r)_v - p_rv

for rows p that sum to one. PyTorch needs a dozen passes over fp32 copies of z for the pair; here the forward kernel
reads z and p once (running maximum, as in online softmax, arXiv 1805.02867), the backward kernel once more and writes
the gradient in z's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def soft_cross_entropy_reference(logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(loss [c] fp32, log normaliser [c] fp32, argmax long [c])` of logits `[c, V]` and probs `[c, V]`."""
    scores = logits.float()
    normaliser = scores.logsumexp(-1)
    return normaliser - (scores * probs).sum(-1), normaliser, scores.argmax(-1)


def soft_cross_entropy_grad_reference(logits: Tensor, probs: Tensor, normaliser: Tensor, outer: Tensor) -> Tensor:
    """`(softmax(logits) - probs) * outer[:, None]` in the logits' dtype."""
    slope = (logits.float() - normaliser.unsqueeze(-1)).exp_().sub_(probs).mul_(outer.unsqueeze(-1))
    return slope.to(logits.dtype)


if triton is not None:

    @triton.jit
    def _forward_kernel(  # type: ignore[no-untyped-def]
        logits, probs, loss, normaliser, best, logits_row, probs_row, vocab_size, BLOCK: tl.constexpr
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        lane = tl.arange(0, BLOCK)
        top = tl.full([BLOCK], float("-inf"), tl.float32)
        top_id = tl.zeros([BLOCK], tl.int32)
        total = tl.zeros([BLOCK], tl.float32)
        dot = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab_size, BLOCK):
            ids = start + lane
            inside = ids < vocab_size
            z = tl.load(logits + row * logits_row + ids, mask=inside, other=float("-inf")).to(tl.float32)
            p = tl.load(probs + row * probs_row + ids, mask=inside, other=0.0).to(tl.float32)
            dot += tl.where(inside, p * z, 0.0)
            better = z > top
            new_top = tl.where(better, z, top)
            # lanes that have seen nothing yet hold -inf: exp(-inf - -inf) must not be formed
            fresh = new_top == float("-inf")
            total = tl.where(fresh, 0.0, total * tl.exp(tl.where(fresh, 0.0, top - new_top))
                             + tl.exp(tl.where(fresh, 0.0, z - new_top)))  # fmt: skip
            top = new_top
            top_id = tl.where(better, ids, top_id)
        peak = tl.max(top, 0)
        whole = tl.sum(total * tl.exp(tl.where(top == float("-inf"), float("-inf"), top - peak)), 0)
        log_whole = peak + tl.log(whole)
        tl.store(normaliser + row, log_whole)
        tl.store(loss + row, log_whole - tl.sum(dot, 0))
        tl.store(best + row, tl.min(tl.where(top == peak, top_id, vocab_size), 0).to(tl.int64))

    @triton.jit
    def _backward_kernel(  # type: ignore[no-untyped-def]
        logits, probs, normaliser, outer, grad, logits_row, probs_row, grad_row, vocab_size, BLOCK: tl.constexpr
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = ids < vocab_size
        scale = tl.load(outer + row)
        z = tl.load(logits + row * logits_row + ids, mask=inside, other=0.0).to(tl.float32)
        p = tl.load(probs + row * probs_row + ids, mask=inside, other=0.0).to(tl.float32)
        slope = (tl.exp(z - tl.load(normaliser + row)) - p) * scale
        tl.store(grad + row * grad_row + ids, slope.to(grad.dtype.element_ty), mask=inside)


def _settings(vocab_size: int) -> dict[str, int]:
    """Ids a block, and warps."""
    return {"BLOCK": 2048 if vocab_size >= 4096 else 64, "num_warps": 8 if vocab_size >= 4096 else 1}


def launch_forward(logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel of `soft_cross_entropy_reference`, one program a row; last axes without gaps.

    Raises:
        ValueError: other shapes or strides.
    """
    _check(logits, probs)
    rows, vocab_size = logits.shape
    loss, normaliser = torch.empty(2, rows, dtype=torch.float32, device=logits.device).unbind()
    best = torch.empty(rows, dtype=torch.long, device=logits.device)
    if rows:
        _forward_kernel[(rows,)](
            logits, probs, loss, normaliser, best, logits.stride(0), probs.stride(0), vocab_size,
            **_settings(vocab_size),
        )  # fmt: skip
    return loss, normaliser, best


def launch_backward(logits: Tensor, probs: Tensor, normaliser: Tensor, outer: Tensor) -> Tensor:
    """The kernel of `soft_cross_entropy_grad_reference`."""
    _check(logits, probs)
    rows, vocab_size = logits.shape
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    settings = _settings(vocab_size)
    if rows:
        _backward_kernel[(rows, triton.cdiv(vocab_size, settings["BLOCK"]))](
            logits, probs, normaliser, outer.float().contiguous(), grad, logits.stride(0), probs.stride(0),
            grad.stride(0), vocab_size, **settings,
        )  # fmt: skip
    return grad


class _SoftCrossEntropy(torch.autograd.Function):
    """Keeps z, p and the normaliser; see the module for its gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        run = launch_forward if logits.is_cuda and triton is not None else soft_cross_entropy_reference
        loss, normaliser, best = run(logits, probs)
        ctx.save_for_backward(logits, probs, normaliser)
        ctx.mark_non_differentiable(best)
        return loss, best

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, probs, normaliser = ctx.saved_tensors
        run = launch_backward if logits.is_cuda and triton is not None else soft_cross_entropy_grad_reference
        return run(logits, probs, normaliser, grads[0]), None


def soft_cross_entropy(logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each row and the head's argmax.

    Args:
        logits: `[c, V]`, any float dtype; differentiable.
        probs: targets `[c, V]` fp32, rows sum to one; constants.

    Returns:
        loss fp32 `[c]`, argmax long `[c]` (ties to the lowest id on a GPU, to any on the CPU).
    """
    loss, best = _SoftCrossEntropy.apply(logits, probs)
    return loss, best


def _check(logits: Tensor, probs: Tensor) -> None:
    if logits.shape != probs.shape or logits.stride(-1) != 1 or probs.stride(-1) != 1:
        raise ValueError(
            f"logits {tuple(logits.shape)} with strides {logits.stride()} and probs {tuple(probs.shape)} with strides "
            f"{probs.stride()}: expected one shape and last axes without gaps"
        )
