"""Distillation losses: from the full model's distribution to a head's, over the head's draft vocabulary.

The full model gives p over V tokens, a head q over the Vd it can draft. Tokens outside leave a remainder
r = 1 - sum_{v in Vd} p(v). Two ways to close the gap:

    spread: p'(v) = p(v) + r / Vd         (default) where the right word cannot be drafted the head learns to be
                                          uncertain, and the entropy gate sees it
    drop:   p'(v) = p(v) / (1 - r)        the head learns the conditional distribution and stays confident

Per token, by kind:

    kl      sum_v p'(v) (log p'(v) - log q(v)), nats. With Vd = V it is DSSD's loss (arXiv 2407.21082).
    topk    the same over the TOP_K likeliest ids of p' and one bucket for all others, nats.
    ce      -log q(argmax p), nats; 0 where the argmax cannot be drafted.
    tv      1/2 sum_v |p'(v) - q(v)|: one minus the chance that a draft drawn from q would be accepted when
            sampling (arXiv 2211.17192, equation 3), in 0..1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.soft_cross_entropy import soft_cross_entropy
from .config import LOSSES, LossKind, Remainder

TOP_K = 32


@dataclass(frozen=True)
class Teacher:
    """The full model's word on `c` tokens, in one draft vocabulary.

    Attributes:
        probs: p' `[c, Vd]` fp32, rows sum to one.
        neg_entropy: sum p' log p' `[c]` nats.
        best: the full model's argmax as an index into the draft vocabulary, long `[c]`; -1 where it is outside.
    """

    probs: Tensor
    neg_entropy: Tensor
    best: Tensor

    @classmethod
    def of(
        cls, logits: Tensor, draft_ids: Tensor | None, remainder: Remainder = "spread", sharpen: float = 0.0
    ) -> Teacher:
        """From the full model's logits `[c, V]` of any float dtype; `draft_ids` long `[Vd]` or None for all.

        `sharpen` moves that share of p' to the full model's argmax, where it can be drafted: what greedy decoding
        accepts is the argmax, not a sample.
        """
        if remainder not in ("spread", "drop"):
            raise ValueError(f"remainder is {remainder!r}, expected 'spread' or 'drop'")
        best = logits.argmax(-1)
        normaliser = logits.float().logsumexp(-1, keepdim=True)
        if draft_ids is None:
            probs = (logits.float() - normaliser).exp_()
        else:
            inside = logits[:, draft_ids].float()
            if remainder == "spread":
                probs = (inside - normaliser).exp_()
                probs += (1.0 - probs.sum(-1, keepdim=True)).clamp_(min=0.0) / probs.shape[-1]
                # rounding leaves sums of 1 +- 1e-6; the gradient q - p' needs 1 to vanish at the optimum
                probs /= probs.sum(-1, keepdim=True)
            else:
                probs = inside.softmax(-1)  # p / (1 - r), without dividing two numbers that underflow
            place = torch.full((logits.shape[-1],), -1, dtype=torch.long, device=logits.device)
            place[draft_ids] = torch.arange(len(draft_ids), device=logits.device)
            best = place[best]
        if sharpen:
            share = torch.where(best < 0, 0.0, sharpen).unsqueeze(1).to(probs.dtype)
            probs.mul_(1.0 - share).scatter_add_(1, best.clamp(min=0).unsqueeze(1), share)
        neg_entropy = torch.special.entr(probs).sum(-1).neg_()
        return cls(probs, neg_entropy, best)


def kl_to_teacher(logits: Tensor, teacher: Teacher) -> Tensor:
    """KL(p' || softmax(logits)) per token.

    Args:
        logits: a head's `[c, Vd]`, any float dtype; differentiable.
        teacher: the same `c` tokens in the head's draft vocabulary.

    Returns:
        nats `[c]` fp32.
    """
    if logits.shape != teacher.probs.shape:
        raise ValueError(f"head logits are {tuple(logits.shape)}, the teacher's {tuple(teacher.probs.shape)}")
    return soft_cross_entropy(logits, teacher.probs)[0] + teacher.neg_entropy


def distill_and_choose(logits: Tensor, teacher: Teacher, kind: LossKind = "kl") -> tuple[Tensor, Tensor]:
    """`distill`, and the head's argmax long `[c]`, which the fused loss finds on its way."""
    if kind == "kl":
        loss, best = soft_cross_entropy(logits, teacher.probs)
        return loss + teacher.neg_entropy, best
    return distill(logits, teacher, kind), logits.detach().argmax(-1)


def distill(logits: Tensor, teacher: Teacher, kind: LossKind = "kl") -> Tensor:
    """A loss of the module's table per token.

    Args:
        logits: a head's `[c, Vd]`, any float dtype; differentiable.
        teacher: the same `c` tokens in the head's draft vocabulary.

    Returns:
        `[c]` fp32.
    """
    if kind == "kl":
        return kl_to_teacher(logits, teacher)
    scores = logits.float()
    if kind == "tv":
        return 0.5 * (scores.softmax(-1) - teacher.probs).abs().sum(-1)
    log_q = scores - scores.logsumexp(-1, keepdim=True)
    if kind == "ce":
        picked = log_q.gather(1, teacher.best.clamp(min=0).unsqueeze(1)).squeeze(1)
        return torch.where(teacher.best < 0, 0.0, -picked)
    if kind == "topk":
        probs, ids = teacher.probs.topk(min(TOP_K, teacher.probs.shape[-1] - 1), -1)
        inside = log_q.gather(1, ids)
        # the other ids' mass by their own sum: 1 - sum(inside) would cancel to nothing where the head is sure
        others = log_q.scatter(1, ids, float("-inf")).logsumexp(-1)
        rest = (1.0 - probs.sum(-1)).clamp(min=0.0)
        known = torch.special.entr(probs).sum(-1) + torch.special.entr(rest)
        return -(probs * inside).sum(-1) - torch.where(rest > 0, rest * others, 0.0) - known
    raise ValueError(f"loss is {kind!r}, expected one of {LOSSES}")


def distill_reference(
    logits: Tensor,
    full_logits: Tensor,
    draft_ids: Tensor | None,
    remainder: Remainder = "spread",
    kind: LossKind = "kl",
) -> Tensor:
    """The eager twin of `Teacher.of` and `distill`: fp64, one line a formula, autograd's own gradient."""
    p, q = full_logits.double().softmax(-1), logits.double().softmax(-1)
    best = p.argmax(-1)
    if draft_ids is not None:
        p = p[:, draft_ids]
        left = 1.0 - p.sum(-1, keepdim=True)
        p = p + left / p.shape[-1] if remainder == "spread" else p / p.sum(-1, keepdim=True)
    if kind == "tv":
        return 1.0 - torch.minimum(p, q).sum(-1)
    if kind == "ce":
        ids = torch.arange(full_logits.shape[-1]) if draft_ids is None else draft_ids
        return -((ids == best.unsqueeze(1)) * q.log()).sum(-1)
    if kind == "topk":
        order = p.argsort(-1, descending=True)
        p, q = p.gather(1, order), q.gather(1, order)
        cut = min(TOP_K, p.shape[-1] - 1)
        p, q = (torch.cat([x[:, :cut], x[:, cut:].sum(-1, keepdim=True)], 1) for x in (p, q))
    return F.kl_div(q.log(), p, reduction="none").sum(-1)
