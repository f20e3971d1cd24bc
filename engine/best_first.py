"""Best-first drafting: trees of the likeliest paths, from a head whose drafts cost no trunk layers.

Step by step the likeliest candidates that have no children yet are expanded, a beam of them in one pass of the head;
their children join a pool, each with the probability of its whole path. The likeliest of the pool become the tree that
is verified. The entropy gate shapes it: a node whose entropy is too high gets no children. Drafting ends early when no
new candidate can enter the tree any more. The scheme of EAGLE-2 (arXiv 2406.16858), with the frontier taken from
all depths.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .draft import DraftRow, Guesses, read
from .gate import DraftPolicy
from .head_memory import HeadMemory, Paths
from .model import Decoder


def best_first(
    decoder: Decoder,
    rows: Sequence[DraftRow],
    memory: HeadMemory,
    policy: DraftPolicy,
    draft_ids: Tensor | None = None,
) -> list[int]:
    """Grow every row's tree.

    Args:
        memory: of the head at exit 0.
        draft_ids: token ids of the head's outputs, long `[Vd]`; None for all.

    Returns:
        Per row, how many nodes the gate refused.
    """
    pools = grow_pools(decoder, rows, memory, policy, draft_ids)
    for pool in pools:
        pool.hang()
        pool.row.work.embed_new(decoder)
    return [pool.num_refused for pool in pools]


def grow_pools(
    decoder: Decoder,
    rows: Sequence[DraftRow],
    memory: HeadMemory,
    policy: DraftPolicy,
    draft_ids: Tensor | None = None,
) -> list[Pool]:
    """Every row's candidates, from which `Pool.hang` takes the tree. Arguments as in `best_first`."""
    pools = [Pool(row, policy) for row in rows]
    for step in range(policy.max_depth):
        level = [(pool, chosen) for pool in pools if (chosen := pool.next())]
        if not level:
            break
        if step == 0:
            opened = memory.open([pool.row.work for pool, _ in level])
            for (pool, _), paths in zip(level, opened, strict=True):
                pool.paths = paths
            asked = [(paths, [0]) for paths in opened]
        else:
            tokens = [pool.tokens[one] for pool, chosen in level for one in chosen]
            hidden = decoder.embed(torch.tensor(tokens, device=decoder.device))
            memory.grow([(pool.paths, pool.place(chosen)) for pool, chosen in level], hidden)
            asked = [(pool.paths, [pool.places[one] for one in chosen]) for pool, chosen in level]
        guesses = read(memory.head.draft_logits(memory.outputs(asked)).float(), policy.branch, draft_ids)
        at = 0
        for pool, chosen in level:
            for one in chosen:
                pool.expand(one, guesses, at)
                at += 1
    return pools


class Pool:
    """Candidates of one row, in lists by index; the root is the first. A parent comes before its children."""

    def __init__(self, row: DraftRow, policy: DraftPolicy) -> None:
        self.row, self.policy, self.max_nodes = row, policy, min(policy.max_nodes, row.room)
        self.tokens = [row.work.tree.tokens[0]]
        self.parents, self.depths, self.log_probs = [-1], [0], [0.0]  # log-probability of the whole path
        self.entropies: list[float | None] = [None]  # of the distribution that it was drafted from
        self.paths = Paths(row.work.sequence, row.work.base)
        self.places: dict[int, int] = {0: 0}  # of expanded candidates, in the head's memory
        self.num_refused = 0
        self._open = [0]

    def next(self) -> list[int]:
        """The likeliest candidates without children whose children may still enter the tree."""
        least, max_nodes = -math.inf, self.max_nodes
        if max_nodes == 0:
            return []
        if len(self.tokens) > max_nodes:
            least = heapq.nlargest(max_nodes, self.log_probs[1:])[-1]
        deepest = min(self.row.max_depth, self.policy.max_depth)
        self._open = [one for one in self._open if self.log_probs[one] > least and self.depths[one] < deepest]
        chosen = heapq.nlargest(self.policy.beam, self._open, key=lambda one: self.log_probs[one])
        self._open = [one for one in self._open if one not in chosen]
        return chosen

    def place(self, chosen: Sequence[int]) -> list[int]:
        """Give candidates the next places in the head's memory. Returns their parents'."""
        for one in chosen:
            self.places[one] = len(self.places)
        return [self.places[self.parents[one]] for one in chosen]

    def expand(self, one: int, guesses: Guesses, at: int) -> None:
        """Add a candidate's children, unless the gate refuses it."""
        entropy, gate = guesses.entropies[at], self.policy.gates[0]
        if gate.width(entropy, self.policy.branch) == 0:
            self.num_refused += 1
            return
        for token, log_prob in self.row.rank(guesses, at, self._path(one), self.policy.branch):
            self._open.append(len(self.tokens))
            self.tokens.append(token)
            self.parents.append(one)
            self.depths.append(self.depths[one] + 1)
            self.log_probs.append(self.log_probs[one] + min(log_prob, 0.0))
            self.entropies.append(entropy)

    def hang(self) -> None:
        """Make the likeliest candidates the row's tree. No child is likelier than its parent, so paths stay whole."""
        order = sorted(range(1, len(self.tokens)), key=lambda one: -self.log_probs[one])  # ties: the parent first
        tree, nodes = self.row.work.tree, {0: 0}
        for one in order[: self.max_nodes]:
            parent = nodes[self.parents[one]]
            nodes[one] = tree.add(parent, self.tokens[one], exit_layer=0, entropy=self.entropies[one])

    def _path(self, one: int) -> tuple[int, ...]:
        path: list[int] = []
        while one:
            path.append(self.tokens[one])
            one = self.parents[one]
        return tuple(reversed(path))
