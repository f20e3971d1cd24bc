"""Attention of the newest step of every drafted chain of a text at once, for training (see `StatefulHead.unroll`).

Step s of the chain that ends at position u sees the true keys j <= u - s and, of each step m = 1..s of its own chain,
the one key at u - (s - m). The true part is causal attention of queries moved s places, which flash attention
does without ever storing scores; the chain's own s keys are s dot products a row. With the parts' log-sum-exps

    L = log(exp(L_true) + sum_m exp(q . k_m)),    o = exp(L_true - L) o_true + sum_m exp(q . k_m - L) v_m

Backward, the true part's gradient is flash attention's own, given o and L of the *whole* softmax in place of the part's
(as in ring attention, arXiv 2310.01889): its weights are then exp(q . k_j - L) and its row sum do . o is the whole's.

A mask of `[T, (s + 1) T]` says the same (`chain_attention_reference`), at (s + 1) times the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def chain_attention_reference(q: Tensor, made: Sequence[Pair]) -> Tensor:
    """The same with a mask; arguments and result as `chain_attention`."""
    step, length = len(made) - 1, q.shape[1]
    at = torch.arange(length, device=q.device)
    own = at == at.unsqueeze(1)
    visible = torch.cat([at <= (at - step).unsqueeze(1), *[own] * step], 1)
    repeat = q.shape[2] // made[0][0].shape[2]
    keys, values = (
        torch.cat([moved(pair[which], step - m if m else 0) for m, pair in enumerate(made)], 1)
        .transpose(1, 2)
        .repeat_interleave(repeat, 1)
        for which in (0, 1)
    )
    return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=visible).transpose(1, 2)


def chain_attention(q: Tensor, made: Sequence[Pair], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The newest step's queries over true keys and the chain's own; differentiable.

    Args:
        q: `[B, T, H, d]` of step s = len(made) - 1.
        made: of each step, k and v `[B, T, KV, d]`; the first step's are the true ones.
        dtype: of the products.

    Returns:
        `[B, T, H, d]` in `dtype`; positions u < s belong to no chain and mean nothing.
    """
    step, repeat = len(made) - 1, q.shape[2] // made[0][0].shape[2]
    # [B, H, T, d], a query head's key beside it
    turned = [
        [moved(x, step - m if m else 0).to(dtype).transpose(1, 2).repeat_interleave(repeat, 1) for x in pair]
        for m, pair in enumerate(made)
    ]
    queries = q.to(dtype).transpose(1, 2)
    if step == 0:
        return F.scaled_dot_product_attention(queries, turned[0][0], turned[0][1], is_causal=True).transpose(1, 2)
    if step >= q.shape[1]:
        return torch.zeros_like(q, dtype=dtype) + 0.0 * queries.transpose(1, 2)
    out: Tensor = _ChainAttention.apply(queries, *[x for pair in turned for x in pair])
    return out.transpose(1, 2)


class _ChainAttention(torch.autograd.Function):
    """Of q `[B, H, T, d]` and k, v `[B, H, T, d]` of every step, moved to where they are seen."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, *made: Tensor) -> Tensor:
        true, chain = made[:2], list(zip(made[2::2], made[3::2], strict=True))
        step, scale = len(chain), q.shape[-1] ** -0.5
        keys, values = (x[:, :, : x.shape[2] - step] for x in true)
        part, part_lse, *rest = _flash(q[:, :, step:], keys, values, scale)
        scores = torch.stack([(q.float() * k.float()).sum(-1) for k, _ in chain], -1) * scale  # [B, H, T, s]
        # rows before the first whole chain see no true key
        true_lse = F.pad(part_lse, (step, 0), value=float("-inf"))
        lse = torch.logaddexp(true_lse, scores.logsumexp(-1))
        out = F.pad(part.float() * (part_lse - lse[..., step:]).exp().unsqueeze(-1), (0, 0, step, 0))
        weights = (scores - lse.unsqueeze(-1)).exp()
        for m, (_, v) in enumerate(chain):
            out = out + weights[..., m : m + 1] * v.float()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, out, lse, weights, *made)
        ctx.rest, ctx.scale = rest, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, out, lse, weights, *made = ctx.saved_tensors
        grad, scale, step = grads[0].to(q.dtype), ctx.scale, weights.shape[-1]
        keys, values = (x[:, :, : x.shape[2] - step] for x in made[:2])
        dq, dk, dv = _flash_backward(
            grad[:, :, step:], q[:, :, step:], keys, values, out[:, :, step:], lse[..., step:], ctx.rest, scale
        )
        dq = F.pad(dq.float(), (0, 0, step, 0))
        found = [F.pad(dk, (0, 0, 0, step)), F.pad(dv, (0, 0, 0, step))]
        wide = grad.float()
        whole = (wide * out.float()).sum(-1)
        for m, (k, v) in enumerate(zip(made[2::2], made[3::2], strict=True)):
            slope = (weights[..., m] * ((wide * v.float()).sum(-1) - whole) * scale).unsqueeze(-1)
            dq = dq + slope * k.float()
            found += [(slope * q.float()).to(k.dtype), (weights[..., m : m + 1] * wide).to(v.dtype)]
        return dq.to(q.dtype), *found


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Any, ...]:
    """Causal attention: `(out, log-sum-exp [B, H, T] fp32, what backward needs beside)`."""
    aten = torch.ops.aten
    if not q.is_cuda:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        return out, lse
    # the log-sum-exp, which the public function keeps to itself, is the reason for this one
    out, lse, *rest = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
    return out, lse, *rest[:6]


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rest: Sequence[Any], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    aten = torch.ops.aten
    if not q.is_cuda:
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse.contiguous(), 0.0, True, scale=scale
        )
        return found[0], found[1], found[2]
    cum_q, cum_k, max_q, max_k, seed, offset = rest
    found = aten._scaled_dot_product_flash_attention_backward(
        grad.contiguous(), q, k, v, out.contiguous(), lse.contiguous(), cum_q, cum_k, max_q, max_k, 0.0, True,
        seed, offset, scale=scale,
    )  # fmt: skip
    return found[0], found[1], found[2]


def moved(x: Tensor, count: int) -> Tensor:
    """`[B, T, ...]` moved `count` positions later, zeros before."""
    if count == 0:
        return x
    return torch.cat([torch.zeros_like(x[:, :count]), x[:, : x.shape[1] - count]], 1) if count < x.shape[1] else x * 0
