"""Rehearsing: held-out prompts decoded plainly while every head is asked what it would have drafted.

Trunk exits are asked at every token. A head at exit 0 grows two things from every token: its greedy chain, and a pool
of candidates wide enough to hold the best-first trees of every depth and budget; which of them are right shows when the
text is there. So does what the text itself would have drafted.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from ..engine.best_first import Pool, grow_pools
from ..engine.draft import DraftRow, entropy
from ..engine.engine import Engine
from ..engine.forward import Working
from ..engine.gate import ALWAYS, NEVER, DraftPolicy
from ..engine.lookup import TextIndex
from ..engine.loop import Machinery
from ..engine.tree import MAX_NODES
from ..heads import StatefulHead
from ..heads.rehearsal import Rehearsal, TreeCounts
from .data import evenly
from .measure import head_logits

NUM_PROMPTS, NEW_TOKENS = 32, 64
CHAIN = 8  # tokens of a chain
BEAM, BRANCH = 4, 4  # of the trees that are counted
WIDE = DraftPolicy((0,), {0: ALWAYS}, max_depth=6, branch=6, beam=6)  # of the pools that they are taken from
DEPTHS, BUDGETS = (2, 3, 4, 5, 6), (3, 4, 5, 6, 7, 9, 11, 15)


@dataclass(frozen=True)
class Candidates:
    """A pool after its text is known: in lists by candidate, the root first, a parent before its children.

    `log_probs` are of a candidate after its parent, `right` says whether it is on the path that the full model took.
    `children` come best first and are empty where the pool expanded nothing.
    """

    parents: list[int]
    depths: list[int]
    ranks: list[int]
    log_probs: list[float]
    entropies: list[float]
    right: list[bool]
    children: list[list[int]]


@dataclass
class Rehearsed:
    """Everything recorded: the stored part, and the pools of all positions (none without a head at exit 0)."""

    lengths: list[int] = field(default_factory=list)
    entropy: dict[int, list[float]] = field(default_factory=dict)
    right: dict[int, list[bool]] = field(default_factory=dict)
    chain_entropy: list[list[float]] = field(default_factory=list)
    chain_right: list[int] = field(default_factory=list)
    text: list[tuple[int, int, int]] = field(default_factory=list)
    pools: list[Candidates] = field(default_factory=list)

    def rehearsal(self) -> Rehearsal:
        """What is stored with the heads."""
        by_exit = {e: np.array(values, dtype=np.float32) for e, values in self.entropy.items()}
        right = {e: np.array(values, dtype=bool) for e, values in self.right.items()}
        nats = np.array(self.chain_entropy, dtype=np.float32).T if self.chain_right else None
        count = np.array(self.chain_right) if self.chain_right else None
        text = np.array(self.text).T
        if not self.pools:
            return Rehearsal(tuple(self.lengths), by_exit, right, nats, count, text)
        trees = {(d, n): play_trees(self, d, n) for d in DEPTHS for n in BUDGETS if n > d}
        return Rehearsal(tuple(self.lengths), by_exit, right, nats, count, text, BEAM, BRANCH, trees)


def rehearse(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = NEW_TOKENS,
    stop_ids: Sequence[int] = (),
    batch: int | None = None,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Rehearsed:
    """Decode prompts plainly and greedily, and ask every head at every token.

    Args:
        engine: with heads; busy until this returns.
        prompts: token ids that training never saw; `NUM_PROMPTS` of them, evenly spread, are used.
        batch: prompts decoded side by side; None takes what suits the engine.
        on_tokens: told how many tokens each batch wrote.

    Raises:
        ValueError: no prompts, or no heads.
    """
    if not prompts or engine.heads is None:
        raise ValueError(f"{len(prompts)} prompts and heads {engine.heads}: both are needed to rehearse")
    if batch is None:
        batch = 8 if engine.deterministic else 32
    found, prompts = Rehearsed(), evenly(prompts, NUM_PROMPTS)
    before = engine.observer
    try:
        for first in range(0, len(prompts), batch):
            chosen = [list(prompt) for prompt in prompts[first : first + batch]]
            observer = _Observer(len(chosen))
            engine.observer = observer
            written = engine.generate(
                chosen, speculation="always", policy=_silent(engine), max_new_tokens=max_new_tokens,
                stop_ids=tuple(stop_ids),
            )  # fmt: skip
            for sequence, own in enumerate(written):
                observer.resolve(sequence, own.token_ids, found)
                found.text += look_up(own.prompt_ids, own.token_ids)
            on_tokens(sum(len(own.token_ids) for own in written))
    finally:
        engine.observer = before
    return found


def _silent(engine: Engine) -> DraftPolicy:
    """Drafts nothing, and keeps the memories of stateful heads up with room for the pools."""
    heads = {} if engine.heads is None else engine.heads.heads
    stateful = tuple(e for e, head in heads.items() if isinstance(head, StatefulHead))
    size: dict[str, Any] = (
        {"max_depth": WIDE.max_depth, "branch": WIDE.branch, "beam": WIDE.beam} if stateful == (0,) else {}
    )
    return DraftPolicy(stateful, dict.fromkeys(stateful, NEVER), **size)


class _Observer:
    """What heads say at the pending token of every round, until the texts are known."""

    def __init__(self, batch: int) -> None:
        self._said: list[list[dict[int, tuple[float, int]]]] = [[] for _ in range(batch)]  # exit -> entropy, token
        self._chains: list[list[Pool]] = [[] for _ in range(batch)]
        self._pools: list[list[Pool]] = [[] for _ in range(batch)]

    def __call__(self, on: Machinery, works: Sequence[Working], logits: Sequence[Tensor]) -> None:
        for work in works:
            self._said[work.sequence].append({})
        for layer, spoken in head_logits(on, works).items():
            if layer == 0:
                continue
            own = spoken.float()
            best = own.argmax(-1) if on.draft_ids is None else on.draft_ids[own.argmax(-1)]
            for work, nats, token in zip(works, entropy(own).tolist(), best.tolist(), strict=True):
                self._said[work.sequence][-1][layer] = (nats, token)
        if 0 in on.memories:
            rows = [DraftRow(work, 10**6, _rank) for work in works]
            chain = DraftPolicy((0,), {0: ALWAYS}, max_depth=CHAIN, max_nodes=CHAIN, branch=1, beam=1)
            shapes = [(self._chains, chain)]
            shapes += [(self._pools, WIDE)] if len(on.memories) == 1 else []
            for kept, policy in shapes:
                for pool in grow_pools(on.decoder, rows, on.memories[0], policy, on.draft_ids):
                    kept[pool.row.work.sequence].append(pool)

    def resolve(self, sequence: int, tokens: Sequence[int], found: Rehearsed) -> None:
        """Judge one text's positions by its tokens."""
        found.lengths.append(len(tokens))
        for token, said in zip(tokens, self._said[sequence], strict=True):
            for layer, (nats, guess) in said.items():
                found.entropy.setdefault(layer, []).append(nats)
                found.right.setdefault(layer, []).append(guess == token)
        for i, pool in enumerate(self._chains[sequence]):
            judged = _judge(pool, tokens[i:])
            found.chain_entropy.append([judged.entropies[step + 1] for step in range(CHAIN)])
            found.chain_right.append(sum(judged.right) - 1)
        found.pools += [_judge(pool, tokens[i:]) for i, pool in enumerate(self._pools[sequence])]


def look_up(prompt: Sequence[int], tokens: Sequence[int]) -> list[tuple[int, int, int]]:
    """Of each new token: the longest match of what stands before it, how many tokens follow the newest such place, and
    how many of them are right (`Rehearsal.text`)."""
    index, found = TextIndex(1), []
    for i in range(len(tokens)):
        index.follow([*prompt, *tokens[:i]])
        matched, places = index.longest()
        drafted = index.following(places[0], MAX_NODES - 1) if places else []
        pairs = enumerate(zip(drafted, tokens[i:], strict=False))
        wrong = next((at for at, (own, token) in pairs if own != token), min(len(drafted), len(tokens) - i))
        found.append((matched, len(drafted), wrong))
    return found


def _rank(guesses: object, at: int, path: tuple[int, ...], count: int) -> list[tuple[int, float]]:
    return guesses.best[at][:count]  # type: ignore[attr-defined]


def _judge(pool: Pool, following: Sequence[int]) -> Candidates:
    """A pool whose root is followed by these tokens."""
    size = len(pool.tokens)
    children: list[list[int]] = [[] for _ in range(size)]
    ranks, right, own = [0] * size, [True] + [False] * (size - 1), [0.0] * size
    for one in range(1, size):
        parent, depth = pool.parents[one], pool.depths[one]
        ranks[one] = len(children[parent])
        children[parent].append(one)
        own[one] = pool.log_probs[one] - pool.log_probs[parent]
        right[one] = right[parent] and depth <= len(following) and pool.tokens[one] == following[depth - 1]
    nats = [0.0 if x is None else x for x in pool.entropies]
    return Candidates(list(pool.parents), list(pool.depths), ranks, own, nats, right, children)


Score = Callable[[Candidates], Sequence[float]]


def own_log_probs(pool: Candidates) -> Sequence[float]:
    """The head's own log-probabilities, each after its parent."""
    return pool.log_probs


def play_trees(
    found: Rehearsed,
    depth: int,
    nodes: int,
    *,
    beam: int = BEAM,
    branch: int = BRANCH,
    score: Score = own_log_probs,
) -> TreeCounts:
    """Decode the rehearsed texts with best-first trees (`engine/best_first.py`), as far as the pools reach.

    Args:
        score: log-probabilities of candidates after their parents, at most 0; the likeliest paths are kept.
    """
    start = rounds = drafted = steps = 0
    for length in found.lengths:
        at = 0
        while at < length:
            room = min(depth, length - at - 1)
            kept, passes = _tree(found.pools[start + at], score, room, nodes, beam, branch)
            accepted = max(
                (found.pools[start + at].depths[one] for one in kept if found.pools[start + at].right[one]), default=0
            )
            at, rounds, drafted, steps = at + accepted + 1, rounds + 1, drafted + len(kept), steps + passes
        start += length
    return TreeCounts(start / rounds, drafted / rounds, steps / rounds)


def _tree(pool: Candidates, score: Score, depth: int, nodes: int, beam: int, branch: int) -> tuple[list[int], int]:
    """The candidates that such a tree would hold, and in how many passes of the head they were found."""
    own = score(pool)
    value, waiting, passes = {0: 0.0}, [0], 0
    known: list[int] = []
    for _ in range(depth):
        least = heapq.nlargest(nodes, (value[one] for one in known))[-1] if len(known) >= nodes else -math.inf
        waiting = [one for one in waiting if value[one] > least and pool.depths[one] < depth]
        chosen = heapq.nlargest(beam, waiting, key=lambda one: value[one])
        if not chosen:
            break
        passes += 1
        waiting = [one for one in waiting if one not in chosen]
        for one in chosen:
            for child in pool.children[one][:branch]:
                value[child] = value[one] + min(own[child], 0.0)
                known.append(child)
                waiting.append(child)
    return sorted(known, key=lambda one: -value[one])[:nodes], passes
