"""Drafting: exit heads grow a tree of guesses below the pending token.

Frontier by frontier: the newest nodes run to the first exit, its head speaks, the gate answers; nodes that it refuses
go on to the next exit, and a node refused everywhere is a leaf. The work stays with the nodes: verification goes on
from the layer that each has reached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from .cache import KVCache
from .forward import RowTiles, Working, advance
from .gate import DraftPolicy
from .head_memory import HeadMemory
from .model import Decoder
from .tree import DraftTree

Head = Callable[[Tensor], Tensor]
Choose = Callable[[Tensor, int, int], list[int]]


@dataclass(frozen=True)
class DraftRow:
    """One sequence of a drafting pass.

    Attributes:
        work: its nodes; the root is already there.
        max_depth: most tokens that may be drafted in a row here (budget, context).
        choose: `(head logits [Vd] fp32, node, count) -> at most count token ids`, best first: the target's own
            rule and noise, applied to the head's guess.
    """

    work: Working
    max_depth: int
    choose: Choose


def draft(
    decoder: Decoder,
    cache: KVCache,
    rows: Sequence[DraftRow],
    heads: Mapping[int, Head],
    policy: DraftPolicy,
    tiles: RowTiles,
    memories: Mapping[int, HeadMemory] = MappingProxyType({}),
) -> list[int]:
    """Grow every row's tree as far as the gates allow.

    Args:
        memories: of the stateful heads, by exit layer; the others are in `heads`.

    Returns:
        Per row, how many nodes every gate refused.
    """
    stops = [0] * len(rows)
    frontier: list[list[int]] = [[0] if row.max_depth > 0 and policy.max_nodes > 0 else [] for row in rows]
    for depth in range(policy.max_depth):
        asked = [nodes if depth < row.max_depth else [] for row, nodes in zip(rows, frontier, strict=True)]
        frontier = [[] for _ in rows]
        if not any(asked):
            break
        for exit_layer in policy.exits:
            if not any(asked):
                break
            todo = [(row.work, nodes) for row, nodes in zip(rows, asked, strict=True) if nodes]
            # A parent may have stopped at a shallower exit; the keys of its deeper layers are needed now.
            paths = [(work, _with_ancestors(work.tree, nodes)) for work, nodes in todo]
            advance(decoder, cache, paths, exit_layer, tiles)
            if exit_layer in memories:
                logits = memories[exit_layer].speak(todo).float()
            else:
                logits = heads[exit_layer](torch.cat([work.hidden[nodes] for work, nodes in todo])).float()
            entropies = entropy(logits).tolist()
            at = 0
            for i, row in enumerate(rows):
                refused = []
                for node in asked[i]:
                    width = policy.gates[exit_layer].width(entropies[at], policy.branch)
                    room = policy.max_nodes + 1 - len(row.work.tree)
                    if width == 0:
                        refused.append(node)
                    elif room > 0:
                        for token in row.choose(logits[at], node, min(width, room)):
                            child = row.work.tree.add(node, token, exit_layer=exit_layer, entropy=entropies[at])
                            frontier[i].append(child)
                    at += 1
                asked[i] = refused
        stops = [n + len(nodes) for n, nodes in zip(stops, asked, strict=True)]
        for row in rows:
            row.work.embed_new(decoder)
    return stops


def _with_ancestors(tree: DraftTree, nodes: Sequence[int]) -> list[int]:
    return sorted({ancestor for node in nodes for ancestor in tree.path(node)})


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits), `[N, V]` fp32 -> `[N]`; NaN where a row holds NaN."""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs.clamp_min(torch.finfo(torch.float32).min)).sum(-1)
