"""Metrics from answers made by hand, against numbers worked out by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
from skipstone.bench.arms import Outcome
from skipstone.bench.measure import Measurements, Record
from skipstone.bench.questions import Question
from skipstone.bench.report import document, matched, strict, summarise
from skipstone.engine.statistics import Statistics

QA, RAG = Question(1, "qa", ("a",)), Question(2, "rag", ("b",))


class FakeArm:
    lossless, plain = True, "plain"

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, prompt_ids: list[int], sampling: Any) -> Outcome:
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        return {"threshold": float("inf")}


ARMS = [FakeArm("plain"), FakeArm("always")]


def record(arm: str, question: Question, repeat: int, decode_ms: float, wall_ms: float, stats: Statistics) -> Record:
    outcome = Outcome("x", [5] * stats.num_committed, wall_ms, decode_ms, stats.num_committed, stats)
    return Record(arm, question, 0, repeat, 9, outcome)


def plain(question: Question, repeat: int, decode_ms: float, wall_ms: float) -> Record:
    return record("plain", question, repeat, decode_ms, wall_ms, Statistics(num_committed=10, num_verifications=10))


DRAFTED = Statistics(
    num_drafted=8, num_accepted=6, num_committed=10, num_verifications=4,
    accepted_by_position=(3, 2, 1), drafted_by_position=(4, 3, 1), tokens_by_exit={2: 4, 3: 2}, gate_stops=5,
)  # fmt: skip


def records() -> list[Record]:
    made = []
    for repeat, factor in enumerate((1.0, 2.0, 4.0)):  # a host that gets slower for all arms alike
        made += [plain(QA, repeat, 100 * factor, 200 * factor), plain(RAG, repeat, 300 * factor, 400 * factor)]
        made += [record("always", QA, repeat, 50 * factor, 100 * factor, DRAFTED)]
        made += [record("always", RAG, repeat, 150 * factor, 440 * factor, DRAFTED)]
    return made


def test_rates_are_of_all_answers_together_and_medians_of_the_repeats() -> None:
    """Planted bugs: mean of the questions' rates; a speedup across repeats instead of within one."""
    summary = summarise(records(), ARMS, num_layers=4)
    assert list(summary) == ["qa", "rag", "overall"]
    overall = summary["overall"]
    assert overall["plain"]["decode_tokens_per_second"] == pytest.approx(1000 * 20 / 800)
    assert overall["always"]["decode_tokens_per_second"] == pytest.approx(1000 * 20 / 400)
    assert overall["always"]["speedup"] == pytest.approx(2.0)
    assert overall["always"]["speedup_range"] == pytest.approx([2.0, 2.0])
    assert overall["always"]["end_to_end_speedup"] == pytest.approx(600 / 540)
    assert overall["always"]["worst_question_time_ratio"] == pytest.approx(1.1)
    assert summary["rag"]["always"]["mean_question_tokens_per_second"] == pytest.approx(
        (1e4 / 440 + 1e4 / 880 + 1e4 / 1760) / 3
    )


def test_drafting_counts_are_the_documented_quotients() -> None:
    found = summarise(records(), ARMS, num_layers=4)["qa"]["always"]
    assert found["acceptance_rate"] == pytest.approx(0.75)
    assert found["tokens_per_verification"] == pytest.approx(2.5)
    assert found["tokens_per_verification_without_bonus"] == pytest.approx(1.5)
    assert found["num_wasted"] == 3 * 2
    assert found["draft_length"] == pytest.approx(2.0)
    assert found["acceptance_by_position"] == pytest.approx([3 / 4, 2 / 3, 1.0])
    assert found["cumulative_acceptance_by_position"] == pytest.approx([3 / 4, 2 / 4, 1 / 4])
    assert found["share_by_exit"] == pytest.approx({"2": 0.4, "3": 0.2})
    assert found["mean_exit_layer"] == pytest.approx((4 * 2 + 2 * 3) / 6)
    assert found["row_layers_per_token"] == pytest.approx(4 * 12 / 10)


def test_plain_decoding_has_no_acceptance_but_one_token_a_verification() -> None:
    found = summarise(records(), ARMS, num_layers=4)["overall"]["plain"]
    assert found["acceptance_rate"] is None and found["draft_length"] is None
    assert found["tokens_per_verification"] == 1.0 and found["row_layers_per_token"] == 4.0


def test_the_document_is_strict_json_and_names_failed_requests() -> None:
    failed = Record("always", QA, 1, 0, 9, Outcome("", [], 1.0, 0.0, 0, Statistics(), "no token left"))
    made = document(Measurements([*records(), failed]), ARMS, 4, {"seed": 3})
    text = json.dumps(made, allow_nan=False)
    assert json.loads(text)["arms"]["plain"]["threshold"] is None
    assert made["problems"] == ["arm always, question 1, turn 2: the request failed: no token left"]
    assert len(made["answers"]) == 13 and made["seed"] == 3


def test_strict_reaches_every_depth() -> None:
    assert strict({"a": [float("nan"), (1.0, float("-inf"))]}) == {"a": [None, [1.0, None]]}


def metrics(tau: float, acceptance: float) -> dict[str, Any]:
    return {
        "num_drafted": 100, "num_wasted": 30, "num_tokens": 60, "tokens_per_verification": tau,
        "acceptance_rate": acceptance,
    }  # fmt: skip


def test_gated_drafting_is_compared_at_no_fewer_tokens_per_verification() -> None:
    """Planted bugs: the gated arm of the best acceptance whatever its tokens per verification; a frontier across
    kinds."""
    arms = {
        "plain": {"num_drafted": 0}, "bare:8:2": metrics(1.2, 0.2), "bare:8:4": metrics(1.1, 0.1),
        "fixed:8:2": metrics(1.4, 0.4), "fixed:6:9": metrics(2.5, 0.3),
        "accuracy:0.60": metrics(1.5, 0.6), "accuracy:0.90": metrics(1.3, 0.8),
    }  # fmt: skip
    rows = {row["reference"]: row for row in matched(arms)}
    assert list(rows) == ["bare:8:2", "bare:8:4", "fixed:8:2", "fixed:6:9"]
    assert rows["bare:8:2"]["gated"] == "accuracy:0.90" and rows["bare:8:2"]["acceptance_ratio"] == pytest.approx(4.0)
    assert rows["fixed:8:2"]["gated"] == "accuracy:0.60" and rows["fixed:8:2"]["acceptance_ratio"] == pytest.approx(1.5)
    assert rows["fixed:6:9"]["gated"] is None and rows["fixed:6:9"]["acceptance_ratio"] is None
    assert [row["frontier"] for row in rows.values()] == [True, False, True, True]
    assert rows["bare:8:2"]["wasted_per_token"] == 0.5
    assert matched({"fixed:8:2": metrics(1.4, 0.4)}) == []


def test_untimed_answers_have_no_speed() -> None:
    untimed = Record("always", QA, 0, 0, 9, Outcome("x", [5] * 10, 0.0, 0.0, 0, DRAFTED))
    found = summarise([plain(QA, 0, 100, 200), untimed], ARMS, num_layers=4)["overall"]["always"]
    assert found["decode_tokens_per_second"] is None and found["speedup"] is None
    assert found["worst_question_time_ratio"] is None and found["mean_question_tokens_per_second"] is None
    assert found["acceptance_rate"] == pytest.approx(0.75)
