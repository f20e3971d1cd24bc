"""How good heads are on text that the base wrote: entropy, rank of the full model's token, simulated chains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.config import ModelConfig
from ..engine.forward import Working, advance
from ..engine.loop import Machinery
from ..engine.model import Decoder
from ..heads import HeadSet, Projection, layer_options
from ..kernels.linear import PackedLinear
from .data import SelfText, make_batch, plan_batches

MISS = 127  # the rank of a token that the head cannot draft at all


def layer_options_of(config: ModelConfig) -> dict[str, Any]:
    """Options of a stateful head whose layers have the base's sizes and rope (a scheme's scaling left out)."""
    spec = config.ropes[-1]
    theta = spec.inv_freq[1] ** (-config.head_dim / 2) if len(spec.inv_freq) > 1 else 10_000.0
    return layer_options(
        config.num_heads, config.num_kv_heads, config.head_dim, config.intermediate_size, theta, config.qkv_bias
    )


def training_projection(decoder: Decoder) -> Projection:
    """The decoder's norm and LM head as heads train on them: plain differentiable matmuls."""
    return Projection(decoder.final_norm, decoder.head_weight, decoder.config.logit_softcap)


def inference_projection(decoder: Decoder) -> Projection:
    """The same as heads run in decoding: packed, in the model's dtype."""
    return Projection(decoder.final_norm, decoder.head_weight, decoder.config.logit_softcap, PackedLinear)


def head_logits(on: Machinery, works: Sequence[Working]) -> dict[int, Tensor]:
    """Exit layer -> what its head says at every node of every tree, `[nodes, Vd]`.

    Drafting took a node only as far as it had to, and verification keeps no state that heads without memory read, so
    the nodes run once more; the keys that this writes are those that verification wrote.
    """
    again = [Working(w.sequence, w.base, w.tree, torch.zeros_like(w.hidden)) for w in works]
    for work in again:
        work.embed_new(on.decoder)
    spoken = {}
    for layer, head in sorted(on.heads.items()):
        if layer in on.memories:
            spoken[layer] = on.memories[layer].speak([(work, range(len(work.tree))) for work in works])
            continue
        advance(on.decoder, on.cache, [(work, range(len(work.tree))) for work in again], layer, on.tiles)
        spoken[layer] = head(torch.cat([work.hidden[: len(work.tree)] for work in again]))
    return spoken


@dataclass(frozen=True)
class Measurements:
    """One entry a drafted position (its next token was written by the model), text after text.

    Attributes:
        text: int `[N]`, which text the position is in.
        entropy: exit layer -> nats `[N]` fp32.
        rank: exit layer -> int8 `[N]`, how many outputs the head puts before the full model's argmax, at most 126;
            127 where that token is outside the draft vocabulary.
    """

    text: np.ndarray
    entropy: dict[int, np.ndarray]
    rank: dict[int, np.ndarray]


@torch.no_grad()
def measure(
    decoder: Decoder,
    heads: HeadSet,
    text: SelfText,
    members: Sequence[int] | None = None,
    batch_tokens: int = 16_384,
    chunk_tokens: int = 2_048,
    autocast: bool = False,
) -> Measurements:
    """Run attached heads over texts, each position given its true prefix.

    Args:
        members: which texts; None is all.
        batch_tokens: tokens of one forward of the base.
        chunk_tokens: tokens whose `[chunk, V]` logits are alive at once.
    """
    chosen = list(range(len(text))) if members is None else list(members)
    lens = text.lens.tolist()
    final = decoder.config.num_layers
    texts: list[Tensor] = []
    entropy: dict[int, list[Tensor]] = {layer: [] for layer in heads.exits}
    rank: dict[int, list[Tensor]] = {layer: [] for layer in heads.exits}
    place = output_places(heads.draft_ids, decoder.config.vocab_size, decoder.device)
    for group in plan_batches([lens[i] for i in chosen], max(batch_tokens, max(lens[i] for i in chosen)), None):
        members_here = [chosen[i] for i in group]
        batch = make_batch(text, members_here, decoder.device)
        states = decoder.encode(batch.ids, [*heads.exits, final])
        rows = batch.drafted.reshape(-1).nonzero().squeeze(1)
        texts.append(torch.tensor(members_here).repeat_interleave(batch.drafted.sum(1).cpu()))
        for part in rows.split(chunk_tokens):
            last = states[final].flatten(0, 1)[part]
            best = place[decoder.lm_head(decoder.final_norm(last)).argmax(-1)]
            for layer in heads.exits:
                with torch.autocast(decoder.device.type, torch.bfloat16, enabled=autocast):
                    logits = heads.logits(layer, states[layer].flatten(0, 1)[part])
                logits = logits.float()
                entropy[layer].append(torch.special.entr(logits.softmax(-1)).sum(-1).cpu())
                rank[layer].append(rank_of(logits, best).cpu())
    return Measurements(
        torch.cat(texts).numpy(),
        {layer: torch.cat(parts).numpy() for layer, parts in entropy.items()},
        {layer: torch.cat(parts).numpy() for layer, parts in rank.items()},
    )


def output_places(draft_ids: Tensor | None, vocab_size: int, device: torch.device) -> Tensor:
    """Token id -> index of the heads' output for it, long `[V]`; -1 where they have none."""
    place = torch.arange(vocab_size, device=device)
    if draft_ids is not None:
        place = torch.full_like(place, -1)
        place[draft_ids.to(device)] = torch.arange(len(draft_ids), device=device)
    return place


def rank_of(logits: Tensor, best: Tensor) -> Tensor:
    """int8 `[c]`: outputs before `best` in order of logit, ties to the lower index; MISS where best is -1."""
    index = best.clamp(min=0).unsqueeze(1)
    score = logits.gather(1, index)
    lower = torch.arange(logits.shape[1], device=logits.device) < index
    ahead = ((logits > score) | ((logits == score) & lower)).sum(1).clamp(max=MISS - 1)
    return torch.where(best < 0, MISS, ahead).to(torch.int8)


def simulate_chain(right: np.ndarray, text: np.ndarray, num_drafted: int = 5) -> float:
    """Tokens per verification (bonus included) if every round drafted `num_drafted` tokens from one exit.

    Exact for greedy decoding through the trunk: an accepted prefix is the true prefix, whose states were measured.

    Args:
        right: bool `[N]`, the head agreed at that position.
        text: int `[N]`, texts are contiguous; no round crosses from one into the next.
    """
    total = len(right)
    if total == 0:
        return 0.0
    run = np.zeros(total + 1, dtype=np.int64)  # agreements in a row from here, within the text
    left = np.ones(total, dtype=np.int64)  # tokens to the end of the text
    for i in range(total - 1, -1, -1):
        same = i + 1 < total and text[i + 1] == text[i]
        run[i] = (1 + (run[i + 1] if same else 0)) if right[i] else 0
        left[i] = 1 + (left[i + 1] if same else 0)
    at = rounds = 0
    while at < total:
        at += int(min(run[at] + 1, num_drafted + 1, left[at]))
        rounds += 1
    return total / rounds


def covered_table(
    entropy: np.ndarray, rank: np.ndarray, limits: Sequence[float] = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
) -> list[dict[str, float]]:
    """For each entropy limit in nats: share of tokens with H < limit, and agreement on them."""
    rows = []
    for limit in limits:
        taken = entropy < limit
        agreement = float((rank[taken] == 0).mean()) if taken.any() else 0.0
        rows.append({"entropy_below": limit, "coverage": float(taken.mean()), "agreement": agreement})
    return rows
