"""What a drafting policy is expected to bring on this machine: arithmetic on measured costs and a rehearsal, no clock.

Tokens per second of a policy are its mean committed tokens per round over its mean time per round (renewal-reward,
exact for long texts; the speed-up of arXiv 2211.17192, theorem 3.8, with measured in place of independent acceptance).
The rehearsal holds what the heads would have drafted at every position of plainly decoded texts; a policy is played on
it round by round: draft as the gates allow, accept as far as right, go on behind the bonus token.

Three stand-ins are not exact. Behind its first wrong token a chain from trunk exits is taken to be as sure as the heads
are at the text's own next positions, which touches its cost, never its accepted tokens. Trees are known by their means
alone: where the text drafts in front of them or beside them, they have at each place what the chain there has right,
and as much more as their mean says. Nodes that heads and the text beside them share are counted twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..heads.rehearsal import Rehearsal
from .gate import DraftPolicy
from .tree import MAX_NODES

Rounds = tuple[np.ndarray, np.ndarray, np.ndarray]  # by the position it starts at: accepted, drafted, ms


@dataclass(frozen=True)
class Costs:
    """What parts of a round take here, in ms, for one sequence; `costs.py` measures them.

    By number of rows where a mapping says so; between measured numbers they are interpolated.

    Attributes:
        num_layers: of the model.
        layer_ms: rows -> one layer of a verification whose tree is a chain.
        output_ms: rows -> final norm, LM head and target tokens.
        tree_ms: rows -> what a whole verification takes more for a tree that branches.
        step_ms: what else a plain step takes: the host.
        draft_layer_ms: one row through one layer while drafting.
        ask_ms: exit layer -> one question to a trunk head, the reading of its answer included.
        open_ms: a head at exit 0 that takes in what was verified, and its first answer.
        grow_ms: rows -> one more answer of that head.
        prefill_ms: one prompt token.
        reuse: verification goes on from the layers that drafting has run. False of captured rounds: whole rounds were
            timed, and heads draft and rows are laid before it is known whether the text suggests anything.
    """

    num_layers: int
    layer_ms: Mapping[int, float]
    output_ms: Mapping[int, float]
    tree_ms: Mapping[int, float] = field(default_factory=dict)
    step_ms: float = 0.0
    draft_layer_ms: float = 0.0
    ask_ms: Mapping[int, float] = field(default_factory=dict)
    open_ms: float = 0.0
    grow_ms: Mapping[int, float] = field(default_factory=dict)
    prefill_ms: float = 0.0
    reuse: bool = True

    @cached_property
    def layer(self) -> np.ndarray:
        """`layer_ms` for 0..16 rows; nothing costs nothing."""
        return _by_rows(self.layer_ms)

    @cached_property
    def output(self) -> np.ndarray:
        """`output_ms` for 0..16 rows."""
        return _by_rows(self.output_ms)

    @property
    def plain_ms(self) -> float:
        """A plain step."""
        return float(self.num_layers * self.layer[1] + self.output[1] + self.step_ms)

    def tree_verification(self, rows: float) -> float:
        """A verification of a branching tree of so many rows (fractions are means), the host included."""
        at = np.arange(MAX_NODES + 1)
        extra = np.interp(rows, *_points(self.tree_ms)) if self.tree_ms else 0.0
        chain = self.num_layers * np.interp(rows, at, self.layer) + np.interp(rows, at, self.output)
        return float(chain + extra + self.step_ms)

    def to_document(self) -> dict[str, Any]:
        """In types that JSON holds (its keys are strings)."""
        return {
            name: {str(k): round(v, 6) for k, v in value.items()} if isinstance(value, Mapping) else value
            for name, value in vars(self).items()
            if name in self.__dataclass_fields__
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Costs:
        values: dict[str, Any] = {
            k: {int(r): v for r, v in x.items()} if isinstance(x, dict) else x for k, x in document.items()
        }
        return cls(**values)


def _points(by_rows: Mapping[int, float]) -> tuple[list[int], list[float]]:
    rows = sorted(by_rows)
    return rows, [by_rows[row] for row in rows]


def _by_rows(by_rows: Mapping[int, float]) -> np.ndarray:
    values = np.interp(np.arange(MAX_NODES + 1), *_points(by_rows))
    values[0] = 0.0
    return values


@dataclass(frozen=True)
class Expected:
    """Of one policy, means over rounds: committed tokens (bonus included), drafted tokens, ms."""

    tokens: float
    drafted: float
    ms: float

    @property
    def tokens_per_second(self) -> float:
        return 1e3 * self.tokens / self.ms


def expect(policy: DraftPolicy, rehearsal: Rehearsal, costs: Costs) -> Expected:
    """Play a policy.

    Raises:
        ValueError: a policy that the rehearsal says nothing about (exits or trees that were not rehearsed).
    """
    if policy.beam and policy.max_depth and policy.max_nodes:
        tree = _expect_tree(policy, rehearsal, costs)
        if policy.lookup is None:
            return tree
        size = sum(rehearsal.lengths)
        rounds = _right_in_trees(policy, rehearsal), np.full(size, tree.drafted), np.full(size, tree.ms)
        return _walk(rehearsal.lengths, *_with_text(policy, rehearsal, costs, rounds))
    if policy.exits and policy.confidence != "entropy":
        raise ValueError(f"gates by {policy.confidence!r} are not played: rehearsals hold entropies")
    if any(policy.gates[e].low != policy.gates[e].high for e in policy.exits) and policy.branch > 1:
        raise ValueError("gates that branch are not played; expected chains (branch=1) or best-first trees")
    rounds = _plain(rehearsal, costs)
    if policy.exits and policy.max_depth and policy.max_nodes:
        rounds = (_chain if policy.exits == (0,) else _trunk)(policy, rehearsal, costs)
    if policy.lookup is not None:
        rounds = _with_text(policy, rehearsal, costs, rounds)
    return _walk(rehearsal.lengths, *rounds)


def _plain(rehearsal: Rehearsal, costs: Costs) -> Rounds:
    size = sum(rehearsal.lengths)
    return np.zeros(size, int), np.zeros(size, int), np.full(size, costs.plain_ms)


def _with_text(policy: DraftPolicy, rehearsal: Rehearsal, costs: Costs, others: Rounds) -> Rounds:
    """Rounds that the text drafts where it has a match, alone or beside heads, and the others. In captured ones heads
    have drafted in either case, and rows are verified."""
    lookup = policy.lookup
    assert lookup is not None
    if rehearsal.text is None or lookup.branch > 1:
        raise ValueError("lookups of one branch are played, and only where the text was rehearsed")
    if lookup.beside and costs.reuse:
        raise ValueError("trees that heads share with the text are played in captured rounds alone")
    matched, length, right = rehearsal.text
    behind = np.array(
        [lookup.most_behind(n) if n >= lookup.min_match else 0 for n in range(matched.max(initial=0) + 1)]
    )
    drafted = behind[matched]
    for most in (policy.max_nodes, length, rehearsal.left - 1):
        drafted = np.minimum(drafted, most)
    accepted, nodes, took = others
    found, at = drafted > 0, np.arange(MAX_NODES + 1)
    verified = costs.num_layers * costs.layer + costs.output + costs.step_ms  # by rows
    right = np.minimum(right, drafted)
    heads = np.zeros_like(took) if costs.reuse else np.maximum(took - np.interp(nodes + 1, at, verified), 0.0)
    if lookup.beside:
        kept = np.minimum(nodes, policy.most_together - drafted)
        right = np.maximum(
            right, _right_in_trees(policy, rehearsal, kept) if policy.beam else np.minimum(accepted, kept)
        )
        drafted = drafted + np.where(found, kept, 0)
    ms = np.interp(drafted + 1, at, verified) + heads
    if not costs.reuse:
        took = np.maximum(took, verified[2] + heads)
    return np.where(found, right, accepted), np.where(found, drafted, nodes), np.where(found, ms, took)


def _expect_tree(policy: DraftPolicy, rehearsal: Rehearsal, costs: Costs) -> Expected:
    counts = rehearsal.trees.get((policy.max_depth, policy.max_nodes))
    if counts is None or (policy.beam, policy.branch) != (rehearsal.beam, rehearsal.branch):
        raise ValueError(
            f"trees of beam {policy.beam}, branch {policy.branch}, depth {policy.max_depth} and {policy.max_nodes} "
            f"nodes were not rehearsed; known: beam {rehearsal.beam}, branch {rehearsal.branch}, "
            f"{sorted(rehearsal.trees)}"
        )
    grow = float(np.interp(policy.beam, *_points(costs.grow_ms)))
    draft = costs.open_ms + max(0.0, counts.steps - 1.0) * grow
    return Expected(counts.tokens, counts.nodes, draft + costs.tree_verification(counts.nodes + 1.0))


def _right_in_trees(policy: DraftPolicy, rehearsal: Rehearsal, kept: np.ndarray | None = None) -> np.ndarray:
    """Accepted tokens at each position of the policy's trees, or of their best `kept` nodes alone: what the chain there
    has right and, where that ends early, by a fixed draw as much more as makes their mean over rounds the rehearsed
    one."""
    counts = {nodes: own.tokens for (depth, nodes), own in rehearsal.trees.items() if depth == policy.max_depth}
    most = np.minimum(policy.max_depth, rehearsal.left - 1)
    chain = np.minimum(0 if rehearsal.chain_right is None else rehearsal.chain_right, most)
    short, draws = chain < most, np.random.default_rng(0).random(len(most))

    def right(more: float | np.ndarray) -> np.ndarray:
        return np.where(short, np.clip(chain + np.floor(more + draws), 0, most), chain).astype(int)

    low, high = -1.0, float(policy.max_depth)
    for _ in range(12):
        middle = (low + high) / 2
        accepted = right(middle)
        enough = _walk(rehearsal.lengths, accepted, accepted, accepted).tokens >= counts[policy.max_nodes]
        low, high = (low, middle) if enough else (middle, high)
    if kept is None:
        return right(high)
    sizes = sorted(counts)
    fewer = np.interp(kept, [0, *sizes], [1.0, *(counts[nodes] for nodes in sizes)]) - counts[policy.max_nodes]
    return np.minimum(right(high + fewer / max(short.mean(), 1 / len(short))), np.floor(kept).astype(int))


def _chain(policy: DraftPolicy, rehearsal: Rehearsal, costs: Costs) -> Rounds:
    if rehearsal.chain_entropy is None or rehearsal.chain_right is None:
        raise ValueError("no chain of a head at exit 0 was rehearsed")
    depth = min(policy.max_depth, policy.max_nodes, MAX_NODES - 1)
    if depth > len(rehearsal.chain_entropy):
        raise ValueError(f"chains of {depth} were not rehearsed; {len(rehearsal.chain_entropy)} is the longest")
    limit = np.minimum(depth, rehearsal.left - 1)
    sure = rehearsal.chain_entropy[:depth] < policy.gates[0].low
    drafted = np.minimum(np.cumprod(sure, 0).sum(0), limit)
    accepted = np.minimum(rehearsal.chain_right, drafted)
    asked = drafted + (drafted < limit) if costs.reuse else np.full_like(drafted, depth)  # captured: every step
    grow = costs.grow_ms[min(costs.grow_ms)]
    ms = np.where(asked > 0, costs.open_ms + np.maximum(asked - 1, 0) * grow, 0.0)
    ms = ms + costs.num_layers * costs.layer[drafted + 1] + costs.output[drafted + 1] + costs.step_ms
    return accepted, drafted, ms


def _trunk(policy: DraftPolicy, rehearsal: Rehearsal, costs: Costs) -> Rounds:
    missing = sorted(set(policy.exits) - set(rehearsal.entropy))
    if missing:
        raise ValueError(f"exits {missing} were not rehearsed; known: {sorted(rehearsal.entropy)}")
    exits = np.array(policy.exits)
    open_here = np.stack([rehearsal.entropy[e] < policy.gates[e].low for e in policy.exits])
    sure = np.asarray(open_here.any(0))
    first = np.where(sure, open_here.argmax(0), len(exits) - 1)  # the last exit asked
    right = sure & np.take_along_axis(np.stack([rehearsal.right[e] for e in policy.exits]), first[None], 0)[0]
    asks = np.cumsum([costs.ask_ms[e] for e in policy.exits])[first]

    limit = np.minimum(min(policy.max_depth, policy.max_nodes, MAX_NODES - 1), rehearsal.left - 1)
    size = len(sure)
    most = int(limit.max(initial=0))
    drafted, accepted, ms = np.zeros(size, int), np.zeros(size, int), np.full(size, costs.step_ms)
    reached = np.zeros((most + 1, size), int)
    drafting, agreed = np.ones(size, bool), np.ones(size, bool)
    for step in range(most):
        at = np.minimum(np.arange(size) + step, size - 1)
        asked = drafting & (step < limit)
        reached[step] = np.where(asked, exits[first[at]], 0)
        ms += np.where(asked, asks[at], 0.0)
        drafting = asked & sure[at]
        agreed &= drafting & right[at]
        drafted += drafting
        accepted += agreed
    # a child that is asked at a deeper exit takes its ancestors there
    reached = np.maximum.accumulate(reached[::-1])[::-1]
    ms += costs.draft_layer_ms * reached.sum(0)
    rows = drafted + 1
    real = np.arange(most + 1)[:, None] < rows
    marks = [0, *policy.exits, costs.num_layers]
    for start, end in zip(marks, marks[1:], strict=False):
        count = (real & (reached <= start)).sum(0) if costs.reuse else rows
        ms += (end - start) * costs.layer[count]
    ms += costs.output[rows]
    return accepted, drafted, ms


def _walk(lengths: Sequence[int], accepted: np.ndarray, drafted: np.ndarray, ms: np.ndarray) -> Expected:
    """Means over the rounds that decoding would come to, text by text."""
    ends = set(np.cumsum(lengths).tolist())
    jumps, visited, at, total = (accepted + 1).tolist(), [], 0, int(sum(lengths))
    while at < total:
        visited.append(at)
        at += jumps[at]
    if not ends.issubset({*(np.array(visited) + np.array(jumps)[visited]).tolist()}):
        raise ValueError("a round crossed from one text into the next: accepted more than was left")
    rounds = np.array(visited)
    return Expected(total / len(rounds), float(drafted[rounds].mean()), float(ms[rounds].mean()))
