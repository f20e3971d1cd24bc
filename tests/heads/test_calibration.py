"""Gate thresholds: DSSD's cumulative rule, on the tokens that reach an exit."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skipstone.heads import Calibration, fit_calibration
from skipstone.heads.calibration import JOINT_LEVELS, LEVELS
from skipstone.heads.fitting import MIN_TOKENS, auroc, largest_entropy


def slow_largest_entropy(entropy: np.ndarray, right: np.ndarray, level: float) -> float:
    """Every distinct entropy as a threshold, one by one."""
    best = 0.0
    for h in np.unique(entropy):
        taken = entropy <= h
        if taken.sum() >= MIN_TOKENS and right[taken].mean() >= level:
            best = max(best, float(np.nextafter(np.float32(h), np.float32(np.inf))))
    return best


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=120),
    st.sampled_from([0.6, 0.75, 0.9, 0.99]),
)
def test_largest_entropy_equals_the_slow_search(tokens: list[tuple[int, bool]], level: float) -> None:
    """Few distinct entropies, so ties are common. Catches: a threshold that splits equal entropies."""
    entropy = np.array([h / 4 for h, _ in tokens], dtype=np.float32)
    right = np.array([r for _, r in tokens])
    assert largest_entropy(entropy, right, level) == slow_largest_entropy(entropy, right, level)


def test_known_threshold() -> None:
    """100 sure tokens that are right, then wrong ones: 0.80 admits 25 of those, and H < low keeps the last of them."""
    entropy = np.arange(200, dtype=np.float32) / 100
    right = np.arange(200) < 100
    low = largest_entropy(entropy, right, 0.80)
    assert (entropy < low).sum() == 125


def test_nothing_passes_where_the_level_is_never_reached() -> None:
    assert largest_entropy(np.ones(100, np.float32), np.arange(100) % 2 == 0, 0.9) == 0.0
    assert largest_entropy(np.zeros(MIN_TOKENS - 1, np.float32), np.ones(MIN_TOKENS - 1, bool), 0.6) == 0.0


def make_measurements() -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    rng = np.random.default_rng(0)
    entropy, rank = {}, {}
    for layer, skill in ((2, 2.0), (4, 4.0)):
        h = rng.exponential(1.5, 4000).astype(np.float32)
        wrong = rng.random(4000) < 1 - np.exp(-h / skill)
        entropy[layer], rank[layer] = h, np.where(wrong, rng.integers(1, 9, 4000), 0).astype(np.int8)
    return entropy, rank


def test_later_exits_see_only_what_earlier_ones_refused() -> None:
    """Catches: thresholds of a later exit fitted on tokens that never reach it (the public DSSD code's fault)."""
    entropy, rank = make_measurements()
    calibration = fit_calibration(entropy, rank)
    gate = calibration.exits[4].gates[0.90]
    refused = entropy[2] >= calibration.exits[2].gates[0.90].low
    assert gate.num_tokens == refused.sum() < len(refused)
    assert gate.low == largest_entropy(entropy[4][refused], rank[4][refused] == 0, 0.90)
    assert gate.agreement >= 0.90


def test_levels_are_monotone_and_branching_starts_where_extending_ends() -> None:
    entropy, rank = make_measurements()
    first = fit_calibration(entropy, rank).exits[2]
    lows = [first.gates[level].low for level in LEVELS]
    assert lows == sorted(lows, reverse=True)
    assert all(gate.low <= gate.high for gate in first.gates.values())
    assert sum(first.bin_counts) == first.num_tokens == 4000
    assert list(first.top_k) == sorted(first.top_k)
    assert first.top_k[0] == first.agreement


def test_gate_takes_the_next_level_and_refuses_others() -> None:
    calibration = fit_calibration(*make_measurements())
    assert calibration.gate(2, 0.895) == calibration.gate(2, 0.90)
    for accuracy in (0.5, 1.0):
        with pytest.raises(ValueError, match="accuracy"):
            calibration.gate(2, accuracy)
    with pytest.raises(ValueError, match="exit layer 3"):
        calibration.gate(3, 0.9)


def test_json_round_trip_and_strictness() -> None:
    calibration = fit_calibration(*make_measurements(), "here")
    text = calibration.to_json()
    assert Calibration.from_json(text) == calibration
    document = json.loads(text)
    with pytest.raises(ValueError, match="version is 9"):
        Calibration.from_json(json.dumps({**document, "version": 9}))
    del document["exits"]["2"]["bins"]
    with pytest.raises(ValueError, match="incomplete"):
        Calibration.from_json(json.dumps(document))


def test_measurements_of_unlike_length_are_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        fit_calibration({1: np.zeros(5), 2: np.zeros(6)}, {1: np.zeros(5), 2: np.zeros(6)})
    with pytest.raises(ValueError, match="same"):
        fit_calibration({1: np.zeros(5)}, {2: np.zeros(5)})
