"""What one sequence's decoding did: counted while it runs, frozen at the end.

Drafted, accepted and committed are kept apart (hazard 4): *drafted* are all nodes of all trees but the roots;
*committed* are the tokens of the output, so their number is always the output's length, also when a stop cuts a block
or a stop string takes back tokens of earlier blocks; *accepted* are the committed tokens that a head had drafted. The
other committed tokens are the full model's own, one bonus a verification at most.

In early-exit mode (`engine/early_exit.py`) nothing is drafted or verified: `tokens_by_exit` counts the tokens that
exits wrote, and a verification is a step in which no exit did.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .tree import Acceptance, DraftTree

ENTROPY_BIN = 0.25  # nats
LAST_BIN = 39  # 9.75 nats and more


@dataclass(frozen=True)
class Statistics:
    """Counts and times (ms) of one sequence, or of several taken together.

    `accepted_by_position[i]` counts accepted tokens at depth i + 1 of their tree, `drafted_by_position[i]` the
    trees that reached that depth: their quotient is the per-position acceptance. `tokens_by_exit` counts accepted
    tokens by the layers executed when they were drafted. `gate_stops` counts drafts that the gate ended, `fallbacks`
    changes to less drafting, by their reason.
    A verification is any full-depth step, plain ones too. `num_row_layers` counts layers of rows: one row through one
    layer is 1, whatever ran beside it; drafts that were rejected count, and in early-exit mode layers that a token
    skipped count once they are made up for.
    `rounds_by_drafted`, `rounds_by_accepted` and `rounds_by_stops` count verifications by their drafted tokens, those
    of them that were accepted, and the nodes that the gate refused. `drafted_by_entropy` and `accepted_by_entropy`
    count the tokens drafted from a distribution of at least `ENTROPY_BIN` times the key in nats, up to the next key.
    """

    num_drafted: int = 0
    num_accepted: int = 0
    num_committed: int = 0
    num_verifications: int = 0
    accepted_by_position: tuple[int, ...] = ()
    drafted_by_position: tuple[int, ...] = ()
    tokens_by_exit: Mapping[int, int] = field(default_factory=dict)
    gate_stops: int = 0
    fallbacks: Mapping[str, int] = field(default_factory=dict)
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    num_row_layers: int = 0
    rounds_by_drafted: Mapping[int, int] = field(default_factory=dict)
    rounds_by_accepted: Mapping[int, int] = field(default_factory=dict)
    rounds_by_stops: Mapping[int, int] = field(default_factory=dict)
    drafted_by_entropy: Mapping[int, int] = field(default_factory=dict)
    accepted_by_entropy: Mapping[int, int] = field(default_factory=dict)

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted; 0 when nothing was drafted."""
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0

    @property
    def tokens_per_verification(self) -> float:
        """Committed / verifications, bonus tokens included; 0 before the first."""
        return self.num_committed / self.num_verifications if self.num_verifications else 0.0

    @property
    def acceptance_by_position(self) -> tuple[float, ...]:
        """Share of the drafts that reached each depth whose token there was accepted."""
        pairs = zip(self.accepted_by_position, self.drafted_by_position, strict=True)
        return tuple(accepted / drafted if drafted else 0.0 for accepted, drafted in pairs)

    @property
    def layers_per_token(self) -> float:
        """Layers of rows / committed; 0 before the first."""
        return self.num_row_layers / self.num_committed if self.num_committed else 0.0

    def mean_depth(self, num_layers: int) -> float:
        """In early-exit mode, layers run one after the other for a token: up to its exit, or all; 0 before the first.

        Layers that earlier tokens had skipped run beside them, so this is what a step's time follows.
        """
        by_exits = sum(self.tokens_by_exit.values())
        layers = sum(layer * count for layer, count in self.tokens_by_exit.items())
        layers += num_layers * (self.num_committed - by_exits)
        return layers / self.num_committed if self.num_committed else 0.0

    @classmethod
    def merge(cls, parts: Iterable[Statistics]) -> Statistics:
        """Sums over sequences. Times add up too: of rows that ran side by side they exceed the wall time."""
        parts = list(parts)
        fallbacks = Counter[str]()
        for part in parts:
            fallbacks.update(part.fallbacks)
        return cls(
            num_drafted=sum(part.num_drafted for part in parts),
            num_accepted=sum(part.num_accepted for part in parts),
            num_committed=sum(part.num_committed for part in parts),
            num_verifications=sum(part.num_verifications for part in parts),
            accepted_by_position=_sum_by_place(part.accepted_by_position for part in parts),
            drafted_by_position=_sum_by_place(part.drafted_by_position for part in parts),
            gate_stops=sum(part.gate_stops for part in parts),
            fallbacks=dict(fallbacks),
            prefill_ms=sum(part.prefill_ms for part in parts),
            decode_ms=sum(part.decode_ms for part in parts),
            num_row_layers=sum(part.num_row_layers for part in parts),
            **{name: _sum_by_key(getattr(part, name) for part in parts) for name in _BY_NUMBER},
        )

    def to_dict(self) -> dict[str, object]:
        """Everything, derived rates included, in types that JSON holds (its keys are strings, so exit layers are)."""
        values: dict[str, object] = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        for name in _BY_PLACE:
            values[name] = list(getattr(self, name))
        for name in _BY_NUMBER:
            values[name] = {str(key): count for key, count in getattr(self, name).items()}
        values["fallbacks"] = dict(self.fallbacks)
        values["acceptance_rate"] = self.acceptance_rate
        values["tokens_per_verification"] = self.tokens_per_verification
        values["layers_per_token"] = self.layers_per_token
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Statistics:
        """What `to_dict` wrote, read back; derived rates are left out, and what older files lack is empty."""
        known = {entry.name: values[entry.name] for entry in fields(cls) if entry.name in values}
        for name in _BY_PLACE:
            known[name] = tuple(known.get(name, ()))
        for name in _BY_NUMBER:
            known[name] = {int(key): count for key, count in known.get(name, {}).items()}
        return cls(**known)


_BY_PLACE = ("accepted_by_position", "drafted_by_position")
_BY_NUMBER = (
    "tokens_by_exit", "rounds_by_drafted", "rounds_by_accepted", "rounds_by_stops", "drafted_by_entropy",
    "accepted_by_entropy",
)  # fmt: skip


@dataclass(frozen=True)
class _Source:
    """Where a committed token came from: its depth in its tree (0 for what was not drafted) and its exit (None for the
    full model's own)."""

    depth: int
    exit_layer: int | None


class StatisticsRecorder:
    """Counts one sequence's rounds; `prefill_ms` (of rounds on the device the device's own time), `decode_ms` and
    `num_row_layers` are added to from outside."""

    def __init__(self) -> None:
        self.prefill_ms = 0.0
        self.decode_ms = 0.0
        self.num_row_layers = 0
        self._num_drafted = 0
        self._num_verifications = 0
        self._reached: list[int] = []  # per depth - 1, trees that deep
        self._sources: list[_Source] = []  # one a committed token, so that a stop string can take tokens back
        self._gate_stops = 0
        self._fallbacks: Counter[str] = Counter()
        self._rounds: dict[str, Counter[int]] = {name: Counter() for name in _BY_NUMBER if name != "tokens_by_exit"}

    @property
    def num_committed(self) -> int:
        return len(self._sources)

    def record_round(self, tree: DraftTree, acceptance: Acceptance, num_kept: int, gate_stops: int = 0) -> None:
        """Count one verification.

        Args:
            tree: what was verified; only its root for a plain step.
            acceptance: the verdict on it.
            num_kept: by how much the output grew. Less than the block where a stop cut it; negative where a stop
                string took back tokens of earlier blocks.
            gate_stops: drafts of this round that the gate ended.

        Raises:
            ValueError: the output cannot have grown so: more than the block, or below nothing.
        """
        block = [_Source(tree.depths[node], tree.exit_layers[node]) for node in acceptance.nodes]
        block.append(_Source(0, None))
        self._keep(block, num_kept)
        self._num_verifications += 1
        self._num_drafted += tree.num_drafted
        self._gate_stops += gate_stops
        self._reached += [0] * (tree.max_depth - len(self._reached))
        for place in range(tree.max_depth):
            self._reached[place] += 1
        kept = acceptance.nodes[: max(0, num_kept)]
        self._rounds["rounds_by_drafted"][tree.num_drafted] += 1
        self._rounds["rounds_by_accepted"][len(kept)] += 1
        self._rounds["rounds_by_stops"][gate_stops] += 1
        self._rounds["drafted_by_entropy"].update(_bins(tree, range(1, len(tree))))
        self._rounds["accepted_by_entropy"].update(_bins(tree, kept))

    def record_step(self, exit_layer: int | None, num_kept: int) -> None:
        """Count one token of early-exit mode: what wrote it, and by how much the output grew (see `record_round`)."""
        self._keep([_Source(0, exit_layer)], num_kept)
        self._num_verifications += exit_layer is None

    def _keep(self, block: list[_Source], num_kept: int) -> None:
        if not -self.num_committed <= num_kept <= len(block):
            raise ValueError(
                f"num_kept is {num_kept}, expected {-self.num_committed} to {len(block)}: "
                f"{self.num_committed} tokens stand and the block has {len(block)}"
            )
        if num_kept < 0:
            del self._sources[num_kept:]
        else:
            self._sources += block[:num_kept]

    def record_fallback(self, reason: str) -> None:
        """Count a change to less drafting, by its reason."""
        self._fallbacks[reason] += 1

    def snapshot(self) -> Statistics:
        """The counts so far."""
        drafted = [source for source in self._sources if source.depth > 0]
        depths = Counter(source.depth for source in drafted)
        exits = Counter(source.exit_layer for source in self._sources if source.exit_layer is not None)
        return Statistics(
            num_drafted=self._num_drafted,
            num_accepted=len(drafted),
            num_committed=len(self._sources),
            num_verifications=self._num_verifications,
            accepted_by_position=tuple(depths[place + 1] for place in range(len(self._reached))),
            drafted_by_position=tuple(self._reached),
            tokens_by_exit=dict(sorted(exits.items())),
            gate_stops=self._gate_stops,
            fallbacks=dict(self._fallbacks),
            prefill_ms=self.prefill_ms,
            decode_ms=self.decode_ms,
            num_row_layers=self.num_row_layers,
            **{name: dict(sorted(counts.items())) for name, counts in self._rounds.items()},
        )


def _bins(tree: DraftTree, nodes: Iterable[int]) -> list[int]:
    """Of each node that was drafted with a finite entropy, its bin."""
    entropies = [tree.entropies[node] for node in nodes]
    return [min(int(e / ENTROPY_BIN), LAST_BIN) for e in entropies if e is not None and math.isfinite(e)]


def _sum_by_key(counts: Iterable[Mapping[int, int]]) -> dict[int, int]:
    total = Counter[int]()
    for own in counts:
        total.update(own)
    return dict(sorted(total.items()))


def _sum_by_place(rows: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    rows = list(rows)
    length = max(map(len, rows), default=0)
    return tuple(sum(row[place] for row in rows if place < len(row)) for place in range(length))
