"""The gate: from a head's confidence, extend the draft, branch it or stop.

It reads heads' distributions only, never which token was drawn. One candidate a node is DSSD's gate (arXiv
2407.21082); one exit with `ALWAYS` and a fixed depth is LayerSkip's scheme (arXiv 2404.16710); no exits is plain
decoding. All are settings of one `DraftPolicy`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from ..heads.calibration import Calibration
from .tree import MAX_NODES

Source = Literal["text", "heads"]  # of drafts
Confidence = Literal["entropy", "path"]


@dataclass(frozen=True)
class Gate:
    """Thresholds in nats of what `DraftPolicy.confidence` names: H < low extends, low <= H < high branches, H >= high
    stops.

    A head that is not certain (NaN) stops.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"a gate needs low <= high, got low={self.low}, high={self.high}")

    def width(self, nats: float, branch: int) -> int:
        """How many candidates a node with this entropy, or path, gets: 1, `branch` or 0."""
        if nats < self.low:
            return 1
        return branch if nats < self.high else 0


@dataclass(frozen=True)
class Lookup:
    """Drafts copied from where the text's last tokens stood before (`engine/lookup.py`).

    Attributes:
        min_match: fewest last tokens that must stand there again.
        per_match: drafted nodes for each token that matches: short matches are seldom followed for long.
        max_nodes: most drafted nodes from the text.
        branch: 1 follows the newest of the longest matches (prompt lookup); more follows all of them as a tree, with at
            most so many different tokens after each node (suffix matching).
        beside: whether heads draft the rest of the tree where the text has a match, too: it gets 3 nodes behind one
            token that matches, 7 behind two, 11 behind four and 15 behind eight, whatever `per_match`; one branch.
    """

    min_match: int = 1
    per_match: int = 2
    max_nodes: int = 8
    branch: int = 1
    beside: bool = False

    def __post_init__(self) -> None:
        if self.beside and self.branch > 1:
            raise ValueError(f"a text that drafts beside heads has one branch, got {self.branch}")
        if min(self.min_match, self.per_match, self.max_nodes, self.branch) < 1 or self.max_nodes > MAX_NODES - 1:
            raise ValueError(f"sizes of a lookup are at least 1 and its nodes at most {MAX_NODES - 1}, got {self}")

    def most_behind(self, matched: int) -> int:
        """The most nodes that are drafted from the text behind so many tokens that match."""
        return min(self.max_nodes, 4 * min(4, matched.bit_length()) - 1 if self.beside else self.per_match * matched)


WHOLE = Lookup(per_match=MAX_NODES - 1, max_nodes=MAX_NODES - 1)  # where the rows of a tile cost what one does
BESIDE = Lookup(max_nodes=MAX_NODES - 1, beside=True)  # there, with heads
ALWAYS = Gate(math.inf, math.inf)
NEVER = Gate(-math.inf, -math.inf)


@dataclass(frozen=True)
class DraftPolicy:
    """How to draft.

    Attributes:
        exits: exit layers to ask in turn, shallow first; the first confident head speaks. Empty is plain decoding.
        gates: the gate of each exit.
        max_depth: most tokens that heads draft one after the other; the text's have their lookup's sizes.
        max_nodes: most drafted nodes of a tree, at most 15.
        branch: candidates kept where a gate says branch; in a best-first tree, children of every node.
        beam: above 0, the tree is grown best first (`engine/best_first.py`), so many nodes a step; only for a head
            at exit 0, whose drafts cost no trunk layers.
        lookup: drafts from the text. Heads are asked for sequences whose text gives none or, with `Lookup.beside`, for
            the rest of the tree.
        confidence: what gates compare: "entropy" of the head's distribution after a node, or "path": minus the
            log-probability of that head's likeliest token, plus those of the nodes above. The first says how sure a
            head is of one token, the second of the draft as a whole, which alone is accepted.
    """

    exits: tuple[int, ...] = ()
    gates: Mapping[int, Gate] = field(default_factory=dict)
    max_depth: int = 6
    max_nodes: int = MAX_NODES - 1
    branch: int = 2
    beam: int = 0
    lookup: Lookup | None = None
    confidence: Confidence = "entropy"

    def __post_init__(self) -> None:
        if list(self.exits) != sorted(set(self.exits)):
            raise ValueError(f"exits must rise, got {self.exits}")
        missing = [e for e in self.exits if e not in self.gates]
        if missing:
            raise ValueError(f"no gate for exits {missing}; gates are given for {sorted(self.gates)}")
        if not 0 <= self.max_nodes <= MAX_NODES - 1:
            raise ValueError(f"max_nodes must be 0..{MAX_NODES - 1}, got {self.max_nodes}")
        if self.max_depth < 0 or self.branch < 1:
            raise ValueError(f"max_depth >= 0 and branch >= 1 are needed, got {self.max_depth} and {self.branch}")
        if self.beam < 0 or (self.beam and self.exits != (0,)):
            raise ValueError(f"beam is {self.beam} for exits {self.exits}: expected 0, or more for exit 0 alone")

        if self.confidence not in get_args(Confidence) or (self.beam and self.confidence != "entropy"):
            raise ValueError(
                f"confidence is {self.confidence!r} with beam {self.beam}: expected one of {get_args(Confidence)}, and "
                "'entropy' in best-first trees, which rank paths already"
            )

    @property
    def drafts(self) -> bool:
        """Whether anything is drafted at all."""
        return bool(self.sources)

    @property
    def most_children(self) -> int:
        """Of one node, that heads draft."""
        return self.branch if self.beam or any(self.gates[e].low < self.gates[e].high for e in self.exits) else 1

    @property
    def most_together(self) -> int:
        """Drafted nodes of a tree that heads and the text beside them share: as many as either might need alone."""
        heads = self.max_nodes if self.most_children > 1 else min(self.max_nodes, self.max_depth)
        return max(heads, 0 if self.lookup is None else min(self.lookup.max_nodes, self.max_nodes))

    @property
    def sources(self) -> tuple[Source, ...]:
        """Where its drafts come from."""
        return (*(("text",) if self.lookup else ()), *(("heads",) if self.exits else ()))

    def without(self, sources: Collection[Source]) -> DraftPolicy:
        """The same without drafts from these sources."""
        policy = replace(self, lookup=None) if "text" in sources else self
        return replace(policy, exits=(), beam=0) if "heads" in sources else policy


PLAIN = DraftPolicy()


def from_text(min_match: int = 1, per_match: int = 2, max_nodes: int = 8, branch: int = 1) -> DraftPolicy:
    """Drafts from the text alone; see `Lookup`. No heads are needed."""
    return DraftPolicy(lookup=Lookup(min_match, per_match, max_nodes, branch))


def fixed_exit(exit_layer: int, length: int) -> DraftPolicy:
    """LayerSkip's scheme: always draft `length` tokens from one exit."""
    return DraftPolicy((exit_layer,), {exit_layer: ALWAYS}, max_depth=length)


def best_first(
    beam: int = 4, branch: int = 4, max_depth: int = 6, max_nodes: int = MAX_NODES - 1, stop: float = math.inf
) -> DraftPolicy:
    """Trees of the likeliest paths, from a head at exit 0. A node whose entropy (nats) is `stop` or more gets no
    children."""
    gates = {0: Gate(-math.inf, stop)}
    return DraftPolicy((0,), gates, max_depth=max_depth, max_nodes=max_nodes, branch=branch, beam=beam)


def every(exits: Sequence[int], gate: Gate, **options: Any) -> DraftPolicy:
    """One gate for all exits."""
    return DraftPolicy(tuple(exits), dict.fromkeys(exits, gate), **options)


def likely(exits: Sequence[int], probability: float, **options: Any) -> DraftPolicy:
    """Draft on while the heads themselves hold the draft to be right, as a whole, with more than this probability."""
    if not 0.0 < probability < 1.0:
        raise ValueError(f"probability is {probability}, expected within 0 and 1")
    nats = -math.log(probability)
    return every(exits, Gate(nats, nats), confidence="path", **options)


DEFAULT_ACCURACY = 0.90
LEAST_COVERAGE = 0.2  # an exit that is sure of fewer nodes costs more to ask than its drafts bring


def calibrated(
    calibration: Calibration,
    exits: Sequence[int] | None = None,
    accuracy: float = DEFAULT_ACCURACY,
    branch: int = 1,
    **options: Any,
) -> DraftPolicy:
    """DSSD's policy: every exit with the thresholds that its calibration gives for one accuracy level (0.60..0.99).

    Without `exits`, those that were sure of at least `LEAST_COVERAGE` of the tokens that reached them are asked.
    With `branch` above 1, nodes between an exit's two thresholds get that many siblings; with 1 they go on to the
    next exit.

    Exits whose gate is closed at that level are left out.

    Raises:
        ValueError: an exit or a level that was not calibrated.
    """
    if exits is None:
        exits = [e for e in calibration.exits if calibration.coverage(e, accuracy) >= LEAST_COVERAGE]
    wanted, gates = tuple(sorted(exits)), {}
    for exit_layer in wanted:
        low, high = calibration.gate(exit_layer, accuracy)
        gates[exit_layer] = Gate(low, high if branch > 1 else low)
    return DraftPolicy(tuple(e for e in wanted if gates[e].high > 0), gates, branch=branch, **options)
