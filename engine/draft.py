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
from .tree import MAX_NODES, DraftTree

Head = Callable[[Tensor], Tensor]
Rank = Callable[["Guesses", int, tuple[int, ...], int], list[tuple[int, float]]]
BLOCK = 64  # of a vocabulary, for its largest entries


@dataclass(frozen=True)
class Guesses:
    """What a head says after n nodes, read from the device at once.

    Attributes:
        logits: `[n, Vd]` fp32.
        entropies: nats; NaN where a row is not finite.
        best: of each node the likeliest tokens with their log-probabilities, best first.
    """

    logits: Tensor
    entropies: list[float]
    best: list[list[tuple[int, float]]]


@dataclass(frozen=True)
class DraftRow:
    """One sequence of a drafting pass.

    Attributes:
        work: its nodes; the root is already there.
        max_depth: most tokens that may be drafted in a row here (budget, context).
        rank: `(guesses, which of them, drafted tokens before it, count) -> at most count token ids` with
            log-probabilities, best first: the target's own rule and noise, applied to the head's guess.
        room: drafted nodes that heads may have here, besides the policy's own limit.
    """

    work: Working
    max_depth: int
    rank: Rank
    room: int = MAX_NODES - 1


def draft(
    decoder: Decoder,
    cache: KVCache,
    rows: Sequence[DraftRow],
    heads: Mapping[int, Head],
    policy: DraftPolicy,
    tiles: RowTiles,
    memories: Mapping[int, HeadMemory] = MappingProxyType({}),
    draft_ids: Tensor | None = None,
) -> list[int]:
    """Grow every row's tree as far as the gates allow.

    Args:
        memories: of the stateful heads, by exit layer; the others are in `heads`.
        draft_ids: token ids of the heads' outputs, long `[Vd]`; None for all.

    Returns:
        Per row, how many nodes every gate refused.
    """
    stops = [0] * len(rows)
    paths = [{0: 0.0} for _ in rows]  # node -> minus the log-probabilities of the likeliest tokens on its way, in nats
    rooms = [min(policy.max_nodes, row.room) for row in rows]
    frontier: list[list[int]] = [
        [0] if row.max_depth > 0 and most > 0 else [] for row, most in zip(rows, rooms, strict=True)
    ]
    for depth in range(policy.max_depth):
        asked = [nodes if depth < row.max_depth else [] for row, nodes in zip(rows, frontier, strict=True)]
        frontier = [[] for _ in rows]
        if not any(asked):
            break
        for exit_layer in policy.exits:
            # what has no room for an answer is not asked
            asked = [n if len(row.work.tree) <= most else [] for row, n, most in zip(rows, asked, rooms, strict=True)]
            if not any(asked):
                break
            todo = [(row.work, nodes) for row, nodes in zip(rows, asked, strict=True) if nodes]
            # A parent may have stopped at a shallower exit; the keys of its deeper layers are needed now.
            needed = [(work, _with_ancestors(work.tree, nodes)) for work, nodes in todo]
            advance(decoder, cache, needed, exit_layer, tiles)
            if exit_layer in memories:
                logits = memories[exit_layer].speak(todo).float()
            else:
                logits = heads[exit_layer](torch.cat([work.hidden[nodes] for work, nodes in todo])).float()
            guesses = read(logits, policy.branch, draft_ids)
            at = 0
            for i, row in enumerate(rows):
                refused = []
                for node in asked[i]:
                    nats, tree = guesses.entropies[at], row.work.tree
                    path = paths[i][node] - guesses.best[at][0][1]
                    sure = nats if policy.confidence == "entropy" else path
                    width = policy.gates[exit_layer].width(sure, policy.branch)
                    room = rooms[i] + 1 - len(tree)
                    if width == 0:
                        refused.append(node)
                    elif room > 0:
                        for token, _ in row.rank(guesses, at, tuple(tree.path_tokens(node)), min(width, room)):
                            child = tree.add(node, token, exit_layer=exit_layer, entropy=nats)
                            frontier[i].append(child)
                            paths[i][child] = path
                    at += 1
                asked[i] = refused
        stops = [n + len(nodes) for n, nodes in zip(stops, asked, strict=True)]
        for row in rows:
            row.work.embed_new(decoder)
    return stops


def _with_ancestors(tree: DraftTree, nodes: Sequence[int]) -> list[int]:
    return sorted({ancestor for node in nodes for ancestor in tree.path(node)})


def read(logits: Tensor, count: int, draft_ids: Tensor | None = None) -> Guesses:
    """Entropies and the `count` likeliest tokens of logits `[n, Vd]`, with one transfer from the device."""
    log_probs = logits.log_softmax(-1)
    values, places = largest(log_probs, min(count, logits.shape[1]))
    tokens = places if draft_ids is None else draft_ids[places]
    # as fp32 numbers, which hold every token id exactly
    table = torch.cat([_entropy(log_probs).unsqueeze(1), values, tokens.float()], 1).tolist()
    width = values.shape[1]
    best = [[(int(row[1 + width + i]), row[1 + i]) for i in range(width)] for row in table]
    return Guesses(logits, [row[0] for row in table], best)


def largest(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and indices `[n, count]` of the largest entries of `x [n, V]`, largest first.

    On the CPU in two stages, block maxima and then the winning blocks: `topk` of a whole vocabulary takes several times
    as long there.
    """
    num_rows, size = x.shape
    if x.device.type != "cpu" or size % BLOCK or size < BLOCK * count:
        found = x.topk(count)
        return found.values, found.indices
    blocks = x.view(num_rows, -1, BLOCK)
    at = blocks.amax(-1).topk(count).indices
    found = blocks.gather(1, at.unsqueeze(-1).expand(-1, -1, BLOCK)).flatten(1).topk(count)
    return found.values, at.gather(1, found.indices // BLOCK) * BLOCK + found.indices % BLOCK


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits), `[N, V]` fp32 -> `[N]`; NaN where a row holds NaN."""
    return _entropy(logits.log_softmax(-1))


def _entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs.clamp_min(torch.finfo(torch.float32).min)).sum(-1)
