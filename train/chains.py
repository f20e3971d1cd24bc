"""How long the chains of a recurrent or block head are right, on text that the base wrote.

Each position is a chain's start, given its true prefix; the chain's tokens are the true ones. While they are right,
that is exactly what greedy decoding drafts; after the first wrong one nothing counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..engine.model import Decoder
from ..heads import HeadSet, StatefulHead
from .data import SelfText, make_batch, plan_batches


@dataclass(frozen=True)
class Chains:
    """Arrays over drafted positions, text after text.

    Attributes:
        text: int `[N]`, which text a position is in.
        right: bool `[S, N]`: the (s + 1)-th token of a chain that started s positions earlier is the full model's.
        in_top: bool `[S, N]`: it is among the head's best TOP outputs.
        entropy: fp32 `[S, N]` nats of the head's distribution there.
        valid: bool `[S, N]`: there is such a chain (its start is a drafted position of the same text).
    """

    text: np.ndarray
    right: np.ndarray
    in_top: np.ndarray
    entropy: np.ndarray
    valid: np.ndarray

    @property
    def conditional(self) -> list[float]:
        """By position in the chain: how often it is right where all before it were."""
        reached, shares = self.valid[0].copy(), []
        for step in range(len(self.right)):
            reached &= self.valid[step]
            shares.append(float(self.right[step][reached].mean()) if reached.any() else 0.0)
            reached = _later(reached & self.right[step])
        return shares

    @property
    def cumulative(self) -> list[float]:
        """By position in the chain: how often it and all before it are right, over all starts."""
        return [float(x) for x in np.cumprod(self.conditional)]

    def tokens_per_verification(self, num_drafted: int) -> float:
        """Greedy decoding with chains of `num_drafted`: committed tokens per verification, bonus included."""
        count, total, rounds, at = len(self.text), 0, 0, 0
        left = np.append(self.text[1:] != self.text[:-1], True)
        while at < count:
            end, step = at, 0
            while step < num_drafted and not left[end] and self.right[step, end]:
                end, step = end + 1, step + 1
            total, rounds, at = total + end - at + 1, rounds + 1, end + 1
        return total / max(1, rounds)


TOP = 4


@torch.no_grad()
def measure_chains(
    decoder: Decoder,
    heads: HeadSet,
    exit_layer: int,
    text: SelfText,
    num_steps: int,
    members: Sequence[int] | None = None,
    batch_tokens: int = 8_192,
    chunk_tokens: int = 2_048,
) -> Chains:
    """Run an attached stateful head over texts.

    Args:
        exit_layer: which head of the set.
        num_steps: S, the longest chain.
        members: which texts; None is all.
    """
    head = heads.heads[exit_layer]
    if not isinstance(head, StatefulHead):
        raise ValueError(f"the head at exit {exit_layer} is of kind {head.kind!r}, expected block or recurrent")
    chosen = list(range(len(text))) if members is None else list(members)
    lens = text.lens.tolist()
    final, device = decoder.config.num_layers, decoder.device
    place = torch.arange(decoder.config.vocab_size, device=device)
    if heads.draft_ids is not None:
        place = torch.full_like(place, -1)
        place[heads.draft_ids.to(device)] = torch.arange(len(heads.draft_ids), device=device)
    texts: list[Tensor] = []
    found: list[Tensor] = []  # [4, S, n] fp32
    for group in plan_batches([lens[i] for i in chosen], max(batch_tokens, max(lens[i] for i in chosen)), None):
        members_here = [chosen[i] for i in group]
        batch = make_batch(text, members_here, device)
        states = decoder.encode(batch.ids, sorted({exit_layer, final, *head.taps}))
        rows = batch.drafted.reshape(-1).nonzero().squeeze(1)
        age = (batch.drafted.cumsum(1) - 1).reshape(-1)[rows]
        taps = torch.stack([states[layer] for layer in head.taps], 2) if head.taps else None
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            steps = head.unroll(states[exit_layer], taps, num_steps)
        steps = [out.flatten(0, 1)[rows] for out in steps]
        steps += steps[-1:] * (num_steps - len(steps))
        last = states[final].flatten(0, 1)[rows]
        texts.append(torch.tensor(members_here).repeat_interleave(batch.drafted.sum(1).cpu()))
        for first in range(0, len(rows), chunk_tokens):
            part = slice(first, first + chunk_tokens)
            best = place[decoder.lm_head(decoder.final_norm(last[part])).argmax(-1)]
            table = torch.zeros(4, num_steps, len(best))
            for step, out in enumerate(steps):
                logits = head.draft_logits(out[part]).float()
                log_q = logits.log_softmax(-1)
                top = logits.topk(min(TOP, logits.shape[-1])).indices
                table[0, step] = (top[:, 0] == best).float().cpu()
                table[1, step] = (top == best.unsqueeze(1)).any(1).float().cpu()
                table[2, step] = -(log_q.exp() * log_q).sum(-1).cpu()
                table[3, step] = (age[part] >= step).float().cpu()
            found.append(table)
    right, in_top, entropy, valid = torch.cat(found, -1).numpy()
    return Chains(torch.cat(texts).numpy(), right > 0, in_top > 0, entropy, valid > 0)


def _later(mask: np.ndarray) -> np.ndarray:
    """`[N]` moved one position later."""
    return np.append(False, mask[:-1])
