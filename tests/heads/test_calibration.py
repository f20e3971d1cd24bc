"""Gate thresholds: DSSD's cumulative rule, on the tokens that reach an exit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skipstone.heads import Calibration, HeadSet, fit_calibration, store_calibration
from skipstone.heads.calibration import CURVE_LEVEL, JOINT_LEVELS, LEVELS
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


def make_full() -> Calibration:
    entropy, rank = make_measurements()
    max_prob = {layer: np.exp(-h / 2) for layer, h in entropy.items()}
    noise = np.random.default_rng(1).random(4000)
    margin = {layer: p * noise for layer, p in max_prob.items()}
    depth = np.arange(4000) % 3
    return fit_calibration(
        entropy, rank, "here", max_prob=max_prob, margin=margin, depth=depth, true_prefix=depth < 2
    )  # fmt: skip


def test_json_round_trip_and_strictness() -> None:
    calibration = make_full()
    text = calibration.to_json()
    assert Calibration.from_json(text) == calibration
    assert len(text) < 40_000  # 2 exits; a set has a handful
    document = json.loads(text)
    with pytest.raises(ValueError, match="version is 1, expected 2; .*skipstone calibrate"):
        Calibration.from_json(json.dumps({**document, "version": 1}))
    del document["exits"]["2"]["bins"]
    with pytest.raises(ValueError, match="incomplete"):
        Calibration.from_json(json.dumps(document))


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40))
def test_auroc_counts_pairs(tokens: list[tuple[int, bool]]) -> None:
    """Catches: ties counted as wins, ranks from zero."""
    score, right = np.array([float(s) for s, _ in tokens]), np.array([r for _, r in tokens])
    pairs = [(a > b) + 0.5 * (a == b) for a in score[right] for b in score[~right]]
    assert auroc(score, right) == pytest.approx(np.mean(pairs) if pairs else 0.5)


def test_confidence_is_compared_on_what_earlier_exits_refused() -> None:
    """Catches: curves over all tokens; a sign that takes the least sure first."""
    entropy, rank = make_measurements()
    calibration = make_full()
    refused = entropy[2] >= calibration.exits[2].gates[CURVE_LEVEL].low
    found = calibration.exits[4].separation
    assert list(found) == ["entropy", "max_prob", "margin"]
    assert found["entropy"].auroc_reached == pytest.approx(auroc(-entropy[4][refused], rank[4][refused] == 0), abs=1e-5)
    assert found["entropy"].auroc == pytest.approx(auroc(-entropy[4], rank[4] == 0), abs=1e-5)
    assert found["entropy"].auroc == found["max_prob"].auroc > found["margin"].auroc  # the margin here is half noise
    curve = found["entropy"].curve
    assert curve.coverage[-1] == 1.0 and list(curve.coverage) == sorted(curve.coverage)
    assert curve.agreement[-1] == pytest.approx((rank[4][refused] == 0).mean(), abs=1e-5)
    assert curve.agreement[0] > curve.agreement[-1] + 0.2
    taken = entropy[4][refused] <= curve.threshold[10] + 1e-5
    assert curve.coverage[10] == pytest.approx(taken.mean(), abs=2e-3)
    assert curve.coverage_at(0.9) == max(c for c, a in zip(curve.coverage, curve.agreement, strict=True) if a >= 0.9)


def test_first_sure_follows_any_choice_of_exits() -> None:
    """Catches: shares of a later exit that include what an earlier one took, or shares of the refused only."""
    entropy, rank = make_measurements()
    calibration = make_full()
    assert tuple(calibration.joint) == JOINT_LEVELS
    sure = {layer: entropy[layer] < calibration.exits[layer].gates[0.80].low for layer in (2, 4)}
    second = sure[4] & ~sure[2]
    found = calibration.first_sure((2, 4), 0.78)
    assert found[2] == (pytest.approx(sure[2].mean()), pytest.approx((rank[2][sure[2]] == 0).mean()))
    assert found[4] == (pytest.approx(second.mean()), pytest.approx((rank[4][second] == 0).mean()))
    alone = calibration.first_sure((4,), 0.80)
    assert alone == {4: (pytest.approx(sure[4].mean()), pytest.approx((rank[4][sure[4]] == 0).mean()))}
    with pytest.raises(ValueError, match=r"layers \[3\]"):
        calibration.first_sure((3, 4), 0.8)


def test_prefixes_and_confidence_are_reported() -> None:
    entropy, rank = make_measurements()
    calibration = make_full()
    true = np.arange(4000) % 3 < 2
    assert calibration.num_drafted == 2666 and calibration.num_off_path == (~true).sum()
    first = calibration.exits[2]
    assert first.true_prefix_agreement == pytest.approx((rank[2][true] == 0).mean(), abs=1e-5)
    assert first.reliability is not None and sum(first.reliability.counts) == 4000
    in_bin = (np.exp(-entropy[2] / 2) >= 0.9).sum()
    assert first.reliability.counts[-1] == in_bin
    gap = np.abs(np.array(first.reliability.confidence) - np.array(first.reliability.agreement))
    assert first.reliability.error == pytest.approx((gap * first.reliability.counts).sum() / 4000)


def test_heads_that_say_nan_are_refused() -> None:
    entropy, rank = make_measurements()
    entropy[4][7] = np.nan
    with pytest.raises(ValueError, match=r"entropy is NaN or Inf at exits \[4\]"):
        fit_calibration(entropy, rank)


def test_storing_a_calibration_leaves_everything_else(tiny_heads_folder: Path, tmp_path: Path) -> None:
    """An old version refuses to load, can be measured again, and weights and card stay as they are."""
    before = HeadSet.load(tiny_heads_folder)
    assert before.calibration is not None
    old = tmp_path / "old"
    store_calibration(tiny_heads_folder, before.calibration, old)
    text = (old / "calibration.json").read_text().replace('"version":2', '"version":1')
    (old / "calibration.json").write_text(text)
    manifest = json.loads((old / "manifest.json").read_text())
    manifest["files"]["calibration.json"] = hashlib.sha256(text.encode()).hexdigest()
    (old / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="skipstone calibrate"):
        HeadSet.load(old)
    assert HeadSet.load(old, calibrated=False).calibration is None
    (old / "README.md").write_text("by hand")
    store_calibration(old, before.calibration)
    assert HeadSet.load(old).calibration == before.calibration
    assert (old / "README.md").read_text() == "by hand"
    for name in ("heads.safetensors", "config.json"):
        assert (old / name).read_bytes() == (tiny_heads_folder / name).read_bytes()
    with pytest.raises(FileExistsError, match="exists"):
        store_calibration(tiny_heads_folder, before.calibration, old)


def test_measurements_of_unlike_length_are_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        fit_calibration({1: np.zeros(5), 2: np.zeros(6)}, {1: np.zeros(5), 2: np.zeros(6)})
    with pytest.raises(ValueError, match="same"):
        fit_calibration({1: np.zeros(5)}, {2: np.zeros(5)})
