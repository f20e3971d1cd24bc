"""What a head set knows about its own reliability: the stored form. `fitting.py` makes it from measurements.

For each exit and accuracy level, DSSD's rule (arXiv 2407.21082, section 3.3): sort tokens by the head's entropy and
take the largest entropy at which the cumulative agreement with the full model is still at least the level. Only
tokens that every earlier exit refused at the same level count, because only those reach this exit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .rehearsal import Rehearsal

CALIBRATION_VERSION = 2
LEVELS = tuple(round(0.60 + 0.01 * i, 2) for i in range(40))  # 0.60 .. 0.99
JOINT_LEVELS = (0.60, 0.65, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95, 0.99)
CURVE_LEVEL = 0.90  # curves are of the tokens that earlier exits refused at this level
MEASURES = ("entropy", "max_prob", "margin")


@dataclass(frozen=True)
class Gate:
    """Entropies in nats: H < low extends, low <= H < high branches, H >= high stops.

    `coverage` and `agreement` are measured on the tokens that reached this exit: the share with H < low, and how
    often the head was right on them.
    """

    low: float
    high: float
    coverage: float
    agreement: float
    num_tokens: int

    def __post_init__(self) -> None:
        numbers = (self.low, self.high, self.coverage, self.agreement)
        if not all(math.isfinite(x) for x in numbers) or not 0.0 <= self.low <= self.high:
            raise ValueError(f"gate thresholds are {numbers}, expected finite with 0 <= low <= high")


@dataclass(frozen=True)
class Curve:
    """Coverage against agreement when tokens are taken surest first by one measure of confidence.

    Point i takes the share `coverage[i]` of the tokens, those at least as sure as `threshold[i]` (nats for entropy,
    else a probability), and the head is right on `agreement[i]` of them. Coverage rises.
    """

    threshold: tuple[float, ...]
    coverage: tuple[float, ...]
    agreement: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.threshold) == len(self.coverage) == len(self.agreement):
            raise ValueError(
                f"a curve has {len(self.threshold)}, {len(self.coverage)} and {len(self.agreement)} points"
            )

    def coverage_at(self, level: float) -> float:
        """The largest coverage whose agreement is at least `level`; 0 where there is none."""
        pairs = zip(self.coverage, self.agreement, strict=True)
        return max((coverage for coverage, agreement in pairs if agreement >= level), default=0.0)


@dataclass(frozen=True)
class Separation:
    """How well one measure of confidence tells right from wrong.

    Args:
        auroc: chance that a right token looks surer than a wrong one, over all tokens; 0.5 also where all were right or
            all wrong.
        auroc_reached, curve: over the tokens that earlier exits refused at `CURVE_LEVEL` by entropy.
    """

    auroc: float
    auroc_reached: float
    curve: Curve


@dataclass(frozen=True)
class Reliability:
    """Predicted confidence (the head's largest probability) against agreement, in equal bins of 0..1.

    `confidence` and `agreement` are means over a bin's tokens, 0 where it has none.
    """

    counts: tuple[int, ...]
    confidence: tuple[float, ...]
    agreement: tuple[float, ...]

    @property
    def error(self) -> float:
        """Expected calibration error: |confidence - agreement|, averaged over tokens."""
        gaps = zip(self.counts, self.confidence, self.agreement, strict=True)
        return sum(n * abs(c - a) for n, c, a in gaps) / max(1, sum(self.counts))


@dataclass(frozen=True)
class ExitCalibration:
    """One exit's measurements over all tokens, and its gates by accuracy level.

    Args:
        top_k: share of tokens whose target is among the head's best 1, 2, 3, 4.
        bin_edges: entropies in nats, one more than bins. bin_agreement is 0 where bin_counts is 0.
        true_prefix_agreement: over the tokens whose whole prefix the full model wrote.
        separation: by measure of confidence, see `MEASURES`; those that were measured.
        reliability: None where probabilities were not measured.
    """

    num_tokens: int
    agreement: float
    top_k: tuple[float, ...]
    bin_edges: tuple[float, ...]
    bin_counts: tuple[int, ...]
    bin_agreement: tuple[float, ...]
    gates: Mapping[float, Gate] = field(default_factory=dict)
    true_prefix_agreement: float = 0.0
    separation: Mapping[str, Separation] = field(default_factory=dict)
    reliability: Reliability | None = None

    def __post_init__(self) -> None:
        bins = len(self.bin_edges) - 1
        if len(self.bin_counts) != bins or len(self.bin_agreement) != bins:
            raise ValueError(
                f"{len(self.bin_edges)} bin edges need {bins} counts and agreements, "
                f"got {len(self.bin_counts)} and {len(self.bin_agreement)}"
            )


@dataclass(frozen=True)
class Pattern:
    """Tokens of which exactly these exits were sure; `right[i]` counts those on which the head of `exits[i]` was
    right."""

    exits: tuple[int, ...]
    count: int
    right: tuple[int, ...]


@dataclass(frozen=True)
class Calibration:
    """Exit layer -> measurements. `source` says in words what they were measured on.

    Args:
        num_drafted: of the tokens, those whose prefix ends in drafted tokens; the others follow a verified one.
        num_off_path: of these, those whose prefix holds a draft that the full model rejects.
        joint: accuracy level (of `JOINT_LEVELS`) -> which exits were sure of how many tokens together, at the gates of
            that level.
        rehearsal: what the planner plays policies on; None where it was not measured.
    """

    exits: Mapping[int, ExitCalibration]
    source: str = ""
    num_drafted: int = 0
    num_off_path: int = 0
    joint: Mapping[float, tuple[Pattern, ...]] = field(default_factory=dict)
    rehearsal: Rehearsal | None = None

    def gate(self, exit_layer: int, accuracy: float) -> tuple[float, float]:
        """Thresholds `(low, high)` in nats of an exit, at the next level not under `accuracy`.

        Raises:
            ValueError: an exit without calibration, or an accuracy outside 0.60..0.99.
        """
        found = self._at(exit_layer, accuracy)
        return found.low, found.high

    def coverage(self, exit_layer: int, accuracy: float) -> float:
        """Share of the tokens that reached an exit of which it was sure at this level. Raises as `gate` does."""
        return self._at(exit_layer, accuracy).coverage

    def first_sure(self, exits: Sequence[int], accuracy: float) -> dict[int, tuple[float, float]]:
        """What happens when these exits are asked in turn, shallow first, at the next joint level not under `accuracy`.

        Returns:
            Exit layer -> share of all tokens whose first sure exit it is, and its agreement on them (0 for none).

        Raises:
            ValueError: an exit without calibration, or an accuracy that was not measured.
        """
        unknown = sorted(set(exits) - set(self.exits))
        if unknown:
            raise ValueError(f"no calibration for exit layers {unknown}; calibrated: {sorted(self.exits)}")
        patterns = self.joint[_next_level(self.joint, accuracy)]
        total = sum(pattern.count for pattern in patterns)
        shares = dict.fromkeys(sorted(exits), (0, 0))
        for pattern in patterns:
            first = min(set(pattern.exits) & set(exits), default=None)
            if first is not None:
                count, right = shares[first]
                shares[first] = count + pattern.count, right + pattern.right[pattern.exits.index(first)]
        return {layer: (count / total, right / count if count else 0.0) for layer, (count, right) in shares.items()}

    def _at(self, exit_layer: int, accuracy: float) -> Gate:
        if exit_layer not in self.exits:
            raise ValueError(f"no calibration for exit layer {exit_layer}; calibrated: {sorted(self.exits)}")
        gates = self.exits[exit_layer].gates
        return gates[_next_level(gates, accuracy)]

    def to_json(self) -> str:
        document: dict[str, Any] = {
            "version": CALIBRATION_VERSION,
            "source": self.source,
            "entropy_unit": "nats",
            "num_drafted": self.num_drafted,
            "num_off_path": self.num_off_path,
            "exits": {str(layer): _exit_to(e) for layer, e in sorted(self.exits.items())},
            "joint": {
                f"{level:.2f}": [[list(p.exits), p.count, list(p.right)] for p in patterns]
                for level, patterns in sorted(self.joint.items())
            },
        }
        if self.rehearsal is not None:
            document["rehearsal"] = self.rehearsal.to_document()
        return json.dumps(document, separators=(",", ":"), allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Parse `calibration.json`.

        Raises:
            ValueError: another version, a missing key, or a number that is not finite.
        """
        document = json.loads(text, parse_constant=_refuse_constant)
        version = document.get("version")
        if version != CALIBRATION_VERSION:
            raise ValueError(
                f"calibration version is {version!r}, expected {CALIBRATION_VERSION}; measure the heads again with "
                "`skipstone calibrate`"
            )
        try:
            exits = {int(layer): _exit_from(entry) for layer, entry in document["exits"].items()}
            joint = {
                round(float(level), 2): tuple(Pattern(tuple(e), int(n), tuple(r)) for e, n, r in patterns)
                for level, patterns in document["joint"].items()
            }
            played = document.get("rehearsal")
            rehearsal = None if played is None else Rehearsal.from_document(played)
            return cls(exits, document["source"], document["num_drafted"], document["num_off_path"], joint, rehearsal)
        except (KeyError, TypeError) as error:
            raise ValueError(f"calibration.json is incomplete: {error!r}; calibrate again") from error


def _next_level(known: Mapping[float, Any], accuracy: float) -> float:
    """The lowest of the known levels not under `accuracy`."""
    levels = sorted(known)
    if not levels or not levels[0] - 1e-9 <= accuracy <= levels[-1] + 1e-9:
        raise ValueError(f"accuracy is {accuracy}, expected within {levels[:1]}..{levels[-1:]}")
    return next(x for x in levels if x >= accuracy - 1e-9)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"calibration.json holds {name}, expected finite numbers only")


_GATE_COLUMNS = ("low", "high", "coverage", "agreement", "num_tokens")


def _exit_to(e: ExitCalibration) -> dict[str, Any]:
    """Gates are written column by column, a third of the size."""
    gates = [gate for _, gate in sorted(e.gates.items())]
    entry: dict[str, Any] = {
        "num_tokens": e.num_tokens,
        "agreement": e.agreement,
        "true_prefix_agreement": e.true_prefix_agreement,
        "top_k": e.top_k,
        "bins": {"entropy_edges": e.bin_edges, "counts": e.bin_counts, "agreement": e.bin_agreement},
        "gates": {"levels": sorted(e.gates)} | {name: [getattr(g, name) for g in gates] for name in _GATE_COLUMNS},
        "separation": {name: {**vars(s), "curve": vars(s.curve)} for name, s in e.separation.items()},
    }
    return entry if e.reliability is None else entry | {"reliability": vars(e.reliability)}


def _exit_from(entry: Mapping[str, Any]) -> ExitCalibration:
    bins, gates = entry["bins"], entry["gates"]
    rows = zip(*(gates[name] for name in _GATE_COLUMNS), strict=True)
    reliability = entry.get("reliability")
    return ExitCalibration(
        num_tokens=int(entry["num_tokens"]),
        agreement=float(entry["agreement"]),
        top_k=_floats(entry["top_k"]),
        bin_edges=_floats(bins["entropy_edges"]),
        bin_counts=tuple(int(x) for x in bins["counts"]),
        bin_agreement=_floats(bins["agreement"]),
        gates={round(float(x), 2): Gate(*row) for x, row in zip(gates["levels"], rows, strict=True)},
        true_prefix_agreement=float(entry["true_prefix_agreement"]),
        separation={
            name: Separation(s["auroc"], s["auroc_reached"], Curve(**{k: _floats(v) for k, v in s["curve"].items()}))
            for name, s in entry["separation"].items()
        },
        reliability=None if reliability is None else Reliability(**{k: tuple(v) for k, v in reliability.items()}),
    )


def _floats(values: Sequence[Any]) -> tuple[float, ...]:
    return tuple(float(x) for x in values)
