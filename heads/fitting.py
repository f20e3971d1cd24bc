"""From measured tokens to a `Calibration`: thresholds, curves, reliability, who is sure of what together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .calibration import (
    CURVE_LEVEL,
    JOINT_LEVELS,
    LEVELS,
    Calibration,
    Curve,
    ExitCalibration,
    Gate,
    Pattern,
    Reliability,
    Separation,
)

BIN_EDGES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 20.0)
MIN_TOKENS = 32  # fewer tokens than this say nothing about a 0.99 level
TOP_K = 4
CURVE_POINTS = 50
CONFIDENCE_BINS = 10

ByExit = Mapping[int, np.ndarray]


def fit_calibration(
    entropy: ByExit,
    rank: ByExit,
    source: str = "",
    levels: Sequence[float] = LEVELS,
    *,
    max_prob: ByExit | None = None,
    margin: ByExit | None = None,
    depth: np.ndarray | None = None,
    true_prefix: np.ndarray | None = None,
) -> Calibration:
    """Calibration from measurements on the same tokens at every exit.

    Args:
        entropy: exit layer -> nats `[N]` of the head's distribution.
        rank: exit layer -> int `[N]`, place of the full model's token among the head's logits (0 is the argmax;
            anything >= 4 is a miss of the top four, also a token outside the draft vocabulary).
        max_prob, margin: exit layer -> `[N]`, the largest probability, and its lead over the second.
        depth: int `[N]`, drafted tokens in the token's prefix; None for none.
        true_prefix: bool `[N]`, the full model wrote the whole prefix; None where it always did.

    Raises:
        ValueError: measurements of unlike exits or length, or that are not finite.
    """
    measured = {"entropy": entropy} | {k: v for k, v in (("max_prob", max_prob), ("margin", margin)) if v is not None}
    num_tokens = _check(measured | {"rank": rank})
    on_path = np.ones(num_tokens, dtype=bool) if true_prefix is None else true_prefix
    layers = sorted(entropy)
    gates: dict[int, dict[float, Gate]] = {layer: {} for layer in layers}
    reached: dict[int, np.ndarray] = {}
    for level in sorted({*levels, CURVE_LEVEL}):
        left = np.ones(num_tokens, dtype=bool)
        for layer in layers:
            # An exit that almost nothing reaches is still used alone: then all tokens are its own.
            own = left if left.sum() >= MIN_TOKENS else np.ones_like(left)
            gate = _fit_gate(entropy[layer][own], rank[layer][own], level)
            if level == CURVE_LEVEL:
                reached[layer] = own.copy()
            if level in levels:
                gates[layer][level] = gate
            left &= entropy[layer] >= gate.low
    exits = {}
    for layer in layers:
        scores = {name: -values[layer] if name == "entropy" else values[layer] for name, values in measured.items()}
        exits[layer] = _measure_exit(scores, rank[layer], gates[layer], reached[layer], on_path)
    return Calibration(
        exits,
        source,
        num_drafted=0 if depth is None else int((depth > 0).sum()),
        num_off_path=int((~on_path).sum()),
        joint={level: _patterns(entropy, rank, gates, level) for level in JOINT_LEVELS if level in levels},
    )


def _check(measurements: Mapping[str, ByExit]) -> int:
    """The common number of tokens."""
    exits = {name: sorted(by_exit) for name, by_exit in measurements.items()}
    if len({tuple(layers) for layers in exits.values()}) != 1 or not exits["rank"]:
        raise ValueError(f"measurements have exits {exits}: expected the same for all, at least one")
    sizes = {len(values) for by_exit in measurements.values() for values in by_exit.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"measurements have lengths {sorted(sizes)}: expected one length above 0 for all exits")
    for name, by_exit in measurements.items():
        broken = [layer for layer, values in by_exit.items() if not np.isfinite(values).all()]
        if broken:
            raise ValueError(f"{name} is NaN or Inf at exits {sorted(broken)}: these heads are damaged")
    return sizes.pop()


def _measure_exit(
    scores: Mapping[str, np.ndarray],
    rank: np.ndarray,
    gates: Mapping[float, Gate],
    reached: np.ndarray,
    on_path: np.ndarray,
) -> ExitCalibration:
    edges, right = np.asarray(BIN_EDGES), rank == 0
    which = np.clip(np.searchsorted(edges, -scores["entropy"], side="right") - 1, 0, len(edges) - 2)
    counts = np.bincount(which, minlength=len(edges) - 1)
    separation = {
        name: Separation(
            _short(auroc(score, right)),
            _short(auroc(score[reached], right[reached])),
            _curve(score[reached], right[reached], -1.0 if name == "entropy" else 1.0),
        )
        for name, score in scores.items()
    }
    return ExitCalibration(
        num_tokens=len(rank),
        agreement=_short(right.mean()),
        top_k=tuple(_short((rank < k).mean()) for k in range(1, TOP_K + 1)),
        bin_edges=BIN_EDGES,
        bin_counts=_ints(counts),
        bin_agreement=_means(which, right, counts),
        gates=dict(gates),
        true_prefix_agreement=_short(right[on_path].mean()) if on_path.any() else 0.0,
        separation=separation,
        reliability=_reliability(scores["max_prob"], right) if "max_prob" in scores else None,
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
    agreement = _short((rank[taken] == 0).mean()) if taken.any() else 0.0
    return Gate(low, high, _short(taken.mean()), agreement, len(entropy))


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


def auroc(score: np.ndarray, right: np.ndarray) -> float:
    """Chance that a right token's score exceeds a wrong one's, ties half (Mann-Whitney); 0.5 without both kinds."""
    num_right = int(right.sum())
    num_wrong = len(right) - num_right
    if not num_right or not num_wrong:
        return 0.5
    _, group, counts = np.unique(score, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    above = mean_rank[group][right].sum() - num_right * (num_right + 1) / 2
    return float(above / (num_right * num_wrong))


def _curve(score: np.ndarray, right: np.ndarray, sign: float) -> Curve:
    """Some points of coverage against agreement, tokens of equal score taken together; thresholds are sign * score."""
    order = np.argsort(-score, kind="stable")
    ordered = score[order]
    agreement = np.cumsum(right[order]) / np.arange(1, len(ordered) + 1)
    ends = np.flatnonzero(np.append(ordered[1:] < ordered[:-1], True))
    wanted = np.ceil(np.arange(1, CURVE_POINTS + 1) / CURVE_POINTS * len(ordered)).astype(int) - 1
    at = np.unique(ends[np.searchsorted(ends, wanted)])
    return Curve(
        tuple(_short(sign * x) for x in ordered[at]),
        tuple(_short(x) for x in (at + 1) / len(ordered)),
        tuple(_short(x) for x in agreement[at]),
    )


def _reliability(max_prob: np.ndarray, right: np.ndarray) -> Reliability:
    which = np.minimum((max_prob * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
    counts = np.bincount(which, minlength=CONFIDENCE_BINS)
    return Reliability(_ints(counts), _means(which, max_prob, counts), _means(which, right, counts))


def _patterns(
    entropy: ByExit, rank: ByExit, gates: Mapping[int, Mapping[float, Gate]], level: float
) -> tuple[Pattern, ...]:
    layers = sorted(entropy)
    sure = np.stack([entropy[layer] < gates[layer][level].low for layer in layers], 1)
    right = np.stack([rank[layer] == 0 for layer in layers], 1)
    kinds, which = np.unique(sure, axis=0, return_inverse=True)
    found = []
    for number, kind in enumerate(kinds):
        own = which.reshape(-1) == number
        places = np.flatnonzero(kind)
        counted = tuple(int(right[own, place].sum()) for place in places)
        found.append(Pattern(tuple(layers[place] for place in places), int(own.sum()), counted))
    return tuple(found)


def _means(which: np.ndarray, values: np.ndarray, counts: np.ndarray) -> tuple[float, ...]:
    """Mean of the values in each bin, 0 for an empty one."""
    sums = np.bincount(which, weights=values, minlength=len(counts))
    return tuple(_short(s / c) if c else 0.0 for s, c in zip(sums, counts, strict=True))


def _ints(values: np.ndarray) -> tuple[int, ...]:
    return tuple(int(x) for x in values)


def _short(x: float) -> float:
    """Five digits are finer than any sample; the file stays small."""
    return round(float(x), 5)
