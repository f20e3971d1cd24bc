"""What a head set knows about its own reliability, and the gate thresholds that follow.

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

import numpy as np

CALIBRATION_VERSION = 1
LEVELS = tuple(round(0.60 + 0.01 * i, 2) for i in range(40))  # 0.60 .. 0.99
BIN_EDGES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 20.0)
MIN_TOKENS = 32  # fewer tokens than this say nothing about a 0.99 level
TOP_K = 4


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
class ExitCalibration:
    """One exit's measurements over all held-out tokens, and its gates by accuracy level.

    Args:
        top_k: share of tokens whose target is among the head's best 1, 2, 3, 4.
        bin_edges: entropies in nats, one more than bins. bin_agreement is 0 where bin_counts is 0.
    """

    num_tokens: int
    agreement: float
    top_k: tuple[float, ...]
    bin_edges: tuple[float, ...]
    bin_counts: tuple[int, ...]
    bin_agreement: tuple[float, ...]
    gates: Mapping[float, Gate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bins = len(self.bin_edges) - 1
        if len(self.bin_counts) != bins or len(self.bin_agreement) != bins:
            raise ValueError(
                f"{len(self.bin_edges)} bin edges need {bins} counts and agreements, "
                f"got {len(self.bin_counts)} and {len(self.bin_agreement)}"
            )


@dataclass(frozen=True)
class Calibration:
    """Exit layer -> measurements. `source` says in words what they were measured on."""

    exits: Mapping[int, ExitCalibration]
    source: str = ""

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

    def _at(self, exit_layer: int, accuracy: float) -> Gate:
        if exit_layer not in self.exits:
            raise ValueError(f"no calibration for exit layer {exit_layer}; calibrated: {sorted(self.exits)}")
        gates = self.exits[exit_layer].gates
        levels = sorted(gates)
        if not levels or not levels[0] - 1e-9 <= accuracy <= levels[-1] + 1e-9:
            raise ValueError(f"accuracy is {accuracy}, expected within {levels[:1]}..{levels[-1:]}")
        return gates[next(x for x in levels if x >= accuracy - 1e-9)]

    def to_json(self) -> str:
        exits = {
            str(layer): {
                "num_tokens": e.num_tokens,
                "agreement": e.agreement,
                "top_k": list(e.top_k),
                "bins": {
                    "entropy_edges": list(e.bin_edges),
                    "counts": list(e.bin_counts),
                    "agreement": list(e.bin_agreement),
                },
                "gates": {f"{level:.2f}": vars(gate) for level, gate in sorted(e.gates.items())},
            }
            for layer, e in sorted(self.exits.items())
        }
        document = {"version": CALIBRATION_VERSION, "source": self.source, "entropy_unit": "nats", "exits": exits}
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Parse `calibration.json`.

        Raises:
            ValueError: another version, a missing key, or a number that is not finite.
        """
        document = json.loads(text, parse_constant=_refuse_constant)
        version = document.get("version")
        if version != CALIBRATION_VERSION:
            raise ValueError(f"calibration version is {version!r}, expected {CALIBRATION_VERSION}; calibrate again")
        try:
            exits = {int(layer): _exit_from(entry) for layer, entry in document["exits"].items()}
            return cls(exits, document["source"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"calibration.json is incomplete: {error!r}; calibrate again") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"calibration.json holds {name}, expected finite numbers only")


def _exit_from(entry: Mapping[str, Any]) -> ExitCalibration:
    bins = entry["bins"]
    return ExitCalibration(
        num_tokens=int(entry["num_tokens"]),
        agreement=float(entry["agreement"]),
        top_k=tuple(float(x) for x in entry["top_k"]),
        bin_edges=tuple(float(x) for x in bins["entropy_edges"]),
        bin_counts=tuple(int(x) for x in bins["counts"]),
        bin_agreement=tuple(float(x) for x in bins["agreement"]),
        gates={round(float(level), 2): Gate(**gate) for level, gate in entry["gates"].items()},
    )


def fit_calibration(
    entropy: Mapping[int, np.ndarray],
    rank: Mapping[int, np.ndarray],
    source: str = "",
    levels: Sequence[float] = LEVELS,
) -> Calibration:
    """Calibration from measurements on the same tokens at every exit.

    Args:
        entropy: exit layer -> nats `[N]` of the head's distribution.
        rank: exit layer -> int `[N]`, place of the full model's token among the head's logits (0 is the argmax;
            anything >= 4 is a miss of the top four, also a token outside the draft vocabulary).
    """
    if set(entropy) != set(rank) or not entropy:
        raise ValueError(f"entropy has exits {sorted(entropy)}, rank {sorted(rank)}: expected the same, at least one")
    sizes = {len(a) for a in (*entropy.values(), *rank.values())}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"measurements have lengths {sorted(sizes)}: expected one length above 0 for all exits")
    layers = sorted(entropy)
    gates: dict[int, dict[float, Gate]] = {layer: {} for layer in layers}
    for level in levels:
        left = np.ones(len(entropy[layers[0]]), dtype=bool)
        for layer in layers:
            # An exit that almost nothing reaches is still used alone: then all tokens are its own.
            own = left if left.sum() >= MIN_TOKENS else np.ones_like(left)
            gate = _fit_gate(entropy[layer][own], rank[layer][own], level)
            gates[layer][level] = gate
            left &= entropy[layer] >= gate.low
    exits = {layer: _measure_exit(entropy[layer], rank[layer], gates[layer]) for layer in layers}
    return Calibration(exits, source)


def _measure_exit(entropy: np.ndarray, rank: np.ndarray, gates: Mapping[float, Gate]) -> ExitCalibration:
    edges = np.asarray(BIN_EDGES)
    which = np.clip(np.searchsorted(edges, entropy, side="right") - 1, 0, len(edges) - 2)
    counts = np.bincount(which, minlength=len(edges) - 1)
    right = np.bincount(which, weights=rank == 0, minlength=len(edges) - 1)
    return ExitCalibration(
        num_tokens=len(entropy),
        agreement=float((rank == 0).mean()),
        top_k=tuple(float((rank < k).mean()) for k in range(1, TOP_K + 1)),
        bin_edges=BIN_EDGES,
        bin_counts=tuple(int(c) for c in counts),
        bin_agreement=tuple(float(r / c) if c else 0.0 for r, c in zip(right, counts, strict=True)),
        gates=dict(gates),
    )


def _fit_gate(entropy: np.ndarray, rank: np.ndarray, level: float) -> Gate:
    """`low` from the argmax, `high` from the top four among what `low` leaves: branching there is as safe."""
    if len(entropy) < MIN_TOKENS:
        return Gate(0.0, 0.0, 0.0, 0.0, len(entropy))
    low = largest_entropy(entropy, rank == 0, level)
    refused = entropy >= low
    high = low
    if refused.sum() >= MIN_TOKENS:
        high = max(low, largest_entropy(entropy[refused], rank[refused] < TOP_K, level))
    taken = ~refused
    agreement = float((rank[taken] == 0).mean()) if taken.any() else 0.0
    return Gate(low, high, float(taken.mean()), agreement, len(entropy))


def largest_entropy(entropy: np.ndarray, right: np.ndarray, level: float) -> float:
    """The threshold t in nats such that tokens with H < t are right with at least `level`, t as large as possible.

    Tokens of equal entropy stand or fall together. 0.0 (nothing passes) if no threshold holds at least
    `MIN_TOKENS` tokens at the level.
    """
    order = np.argsort(entropy, kind="stable")
    h = entropy[order].astype(np.float32)
    cumulative = np.cumsum(right[order]) / np.arange(1, len(h) + 1)
    last_of_tie = np.append(h[1:] > h[:-1], True)
    enough = np.arange(1, len(h) + 1) >= MIN_TOKENS
    good = np.flatnonzero((cumulative >= level) & last_of_tie & enough)
    # the next fp32 number: entropies are fp32 wherever they are compared
    return float(np.nextafter(h[good[-1]], np.float32(np.inf))) if len(good) else 0.0
