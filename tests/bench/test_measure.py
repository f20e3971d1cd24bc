"""Order, comparison and interruption of a benchmark, with arms that answer by rote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from skipstone.bench.arms import Outcome
from skipstone.bench.measure import measure, prompt_ids
from skipstone.bench.questions import Question
from skipstone.bench.report import document
from skipstone.engine.tokenizer import Tokenizer

QUESTIONS = [Question("first", "writing", ("a stone", "again")), Question("second", "qa", ("the rain",))]


class Rote:
    """Answers `reply(prompt ids)`; notes what it was asked."""

    def __init__(
        self, name: str, reply: Callable[[list[int]], list[int]], log: list[Any], lossless: bool = True
    ) -> None:
        self.name, self.reply, self.log, self.lossless, self.plain = name, reply, log, lossless, "plain"

    def run(self, prompt_ids: list[int], sampling: Mapping[str, Any]) -> Outcome:
        ids = self.reply(prompt_ids)
        self.log.append((self.name, tuple(prompt_ids), sampling.get("seed")))
        return Outcome(f"<{self.name}>", ids, 2.0, 1.0, len(ids))

    def describe(self) -> dict[str, Any]:
        return {}


def right(ids: list[int]) -> list[int]:
    return [len(ids) % 7, 3, 4]


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_folder)


def test_arms_take_turns_and_start_in_turn(tokenizer: Tokenizer) -> None:
    log: list[Any] = []
    arms = [Rote(name, right, log) for name in ("plain", "a", "b")]
    found = measure(arms, QUESTIONS, tokenizer, {"seed": 4, "max_new_tokens": 8}, repeats=2, max_context=500)
    assert [name for name, *_ in log[:3]] == ["plain", "a", "b"], "every arm is warmed up once"
    asked = [name for name, *_ in log[3:]]
    assert asked[:6] == ["plain", "a", "b"] * 2, "two turns of the first question"
    assert asked[6:9] == ["a", "b", "plain"], "the second question starts with another arm"
    assert asked[9:12] == ["a", "b", "plain"], "and so does the second repeat"
    assert len(found.records) == 2 * 3 * 3 and found.num_compared == 2 * 3 * 2


def test_the_second_turn_holds_the_arms_own_first_answer(tokenizer: Tokenizer) -> None:
    """Planted bug: plain's answer goes into every arm's conversation."""
    log: list[Any] = []
    arms = [Rote("plain", right, log), Rote("other", right, log, lossless=False)]
    measure(arms, QUESTIONS[:1], tokenizer, {"max_new_tokens": 8}, max_context=500)
    for name, ids, _ in log[4:]:
        assert list(ids) == prompt_ids(tokenizer, QUESTIONS[0].turns, [f"<{name}>"])
        assert f"<{name}>" in tokenizer.decode(ids)


def test_a_question_has_the_same_seed_in_every_arm_and_repeat(tokenizer: Tokenizer) -> None:
    log: list[Any] = []
    arms = [Rote(name, right, log) for name in ("plain", "a")]
    measure(arms, QUESTIONS, tokenizer, {"seed": 4, "max_new_tokens": 8}, repeats=2, max_context=500)
    seeds = {ids: {seed for _, own, seed in log[2:] if own == ids} for _, ids, _ in log[2:]}
    assert all(len(own) == 1 for own in seeds.values())
    assert len({seed for own in seeds.values() for seed in own}) == len(QUESTIONS)


@pytest.mark.hazard(15)
@pytest.mark.parametrize(
    ("reply", "index", "tokens"),
    [
        (lambda ids: [*right(ids)[:2], 6], 2, (4, 6)),
        (lambda ids: right(ids)[:2], 2, (4, None)),
        (lambda ids: [*right(ids), 9], 3, (None, 9)),
    ],
)
def test_a_differing_answer_is_found_where_it_differs(
    tokenizer: Tokenizer, reply: Callable[[list[int]], list[int]], index: int, tokens: tuple[int | None, int | None]
) -> None:
    """Planted bug: only the common length is compared."""
    arms = [Rote("plain", right, []), Rote("a", right, []), Rote("wrong", reply, []), Rote("hf", reply, [], False)]
    found = measure(arms, QUESTIONS[1:], tokenizer, {"max_new_tokens": 8}, max_context=500)
    (divergence,) = found.divergences
    assert (divergence.arm, divergence.question_id, divergence.index) == ("wrong", "second", index)
    assert (divergence.plain_token, divergence.arm_token) == tokens
    assert found.num_compared == 2, "baselines are not held to our tokens"


def test_ctrl_c_keeps_whole_questions(tokenizer: Tokenizer) -> None:
    calls = 0

    def stops(ids: list[int]) -> list[int]:
        nonlocal calls
        calls += 1
        if calls == 4:  # warm-up, two turns of the first question, then the second question
            raise KeyboardInterrupt
        return right(ids)

    arms = [Rote("plain", right, []), Rote("a", stops, [])]
    found = measure(arms, QUESTIONS, tokenizer, {"max_new_tokens": 8}, max_context=500)
    assert found.interrupted
    assert {r.question.question_id for r in found.records} == {"first"} and len(found.records) == 4


@pytest.mark.parametrize("error", [RuntimeError, TypeError])
def test_an_arm_that_cannot_warm_up_is_left_out_and_reported(tokenizer: Tokenizer, error: type[Exception]) -> None:
    """Planted bugs: the whole run ends (of a TypeError in a library's early exit it did); drafts of a target stay whose
    plain decoding is gone."""

    def breaks(ids: list[int]) -> list[int]:
        raise error("no kernel")

    arms = [Rote("plain", right, []), Rote("plain%x", breaks, [], False), Rote("a%x", right, []), Rote("b", right, [])]
    arms[2].plain = "plain%x"
    found = measure(arms, QUESTIONS[1:], tokenizer, {"max_new_tokens": 8}, max_context=500)
    assert found.failed == {"plain%x": f"{error.__name__}: no kernel"}
    assert {r.arm for r in found.records} == {"plain", "b"} and found.num_compared == 1
    problems = document(found, arms, 4, {})["problems"]  # type: ignore[arg-type]
    assert problems == [f"arm plain%x was left out: {error.__name__}: no kernel"]
    with pytest.raises(error, match="no kernel"):
        measure([Rote("plain", breaks, [])], QUESTIONS, tokenizer, {}, max_context=500)


def test_no_question_is_begun_after_the_deadline(tokenizer: Tokenizer) -> None:
    arms = [Rote("plain", right, []), Rote("a", right, [])]
    past = measure(arms, QUESTIONS, tokenizer, {"max_new_tokens": 8}, max_context=500, repeats=2, deadline=0.0)
    assert past.interrupted and {r.question.question_id for r in past.records} == {"first"}, "one is always answered"
    whole = measure(arms, QUESTIONS, tokenizer, {"max_new_tokens": 8}, max_context=500)
    assert not whole.interrupted


def test_a_question_too_long_is_left_out_for_all_arms(tokenizer: Tokenizer) -> None:
    long = Question("long", "rag", ("rain " * 200,))
    arms = [Rote(name, right, []) for name in ("plain", "a")]
    found = measure(arms, [*QUESTIONS, long], tokenizer, {"max_new_tokens": 8}, repeats=2, max_context=100)
    assert found.skipped == ["long"]
    assert {r.question.question_id for r in found.records} == {"first", "second"}
