"""Running the arms: interleaved, repeated, every answer compared with plain decoding's.

One record is one answer: arm, question, turn, repeat. Arms take turns question by question, starting with another one
each time, so that a host that slows down slows all of them. A second turn is conditioned on the arm's own first answer.
With a batch, a group of questions takes the place of one: arms of our engine answer its turns side by side.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engine.tokenizer import Tokenizer
from ..kernels.noise import derive_seed
from .arms import Arm, EngineArm, Outcome
from .journal import Journal
from .questions import Question

SECONDS_A_LINE = 15  # of progress, where no bar can be drawn
WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Record:
    """One answer of one arm. `session` counts restarts of a journaled run."""

    arm: str
    question: Question
    turn: int
    repeat: int
    prompt_tokens: int
    outcome: Outcome
    session: int = 1


@dataclass(frozen=True)
class Divergence:
    """Where an arm's tokens left plain decoding's: new token `index`; None for a sequence that had ended."""

    arm: str
    question_id: int | str
    turn: int
    repeat: int
    index: int
    plain_token: int | None
    arm_token: int | None

    def __str__(self) -> str:
        return (
            f"arm {self.arm}, question {self.question_id}, turn {self.turn + 1}, repeat {self.repeat + 1}: new token "
            f"{self.index} is {self.arm_token}, plain decoding wrote {self.plain_token}"
        )


@dataclass
class Measurements:
    """All answers so far, whole or interrupted. `skipped` are questions whose prompt does not fit the context, `failed`
    arms that could not even warm up, and why."""

    records: list[Record] = field(default_factory=list)
    divergences: list[Divergence] = field(default_factory=list)
    num_compared: int = 0
    skipped: list[int | str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


def prompt_ids(tokenizer: Tokenizer, turns: Sequence[str], answers: Sequence[str]) -> list[int]:
    """The conversation up to the next answer: through the chat template, or plainly one after the other."""
    if tokenizer.has_chat_template:
        messages = [{"role": "user", "content": turns[0]}]
        for turn, answer in zip(turns[1:], answers, strict=True):
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
        return tokenizer.encode_chat(messages)
    text = turns[0] + "\n"
    for turn, answer in zip(turns[1:], answers, strict=True):
        text += f"{answer}\n\n{turn}\n"
    return tokenizer.encode(text)


def question_seeds(questions: Sequence[Question], sampling: Mapping[str, Any]) -> dict[int | str, int]:
    """Each question's own seed, by its id."""
    seed = int(sampling.get("seed", 0))
    return {question.question_id: derive_seed(seed, i) for i, question in enumerate(questions)}


def now_and_then(total: int | None = None) -> Callable[[str], None]:
    """An `on_step` for where no bar can be drawn: a line on stderr, of this step and how many there were, every
    `SECONDS_A_LINE`."""
    printed, count = time.monotonic(), 0

    def on_step(step: str) -> None:
        nonlocal printed, count
        count += 1
        if time.monotonic() - printed >= SECONDS_A_LINE:
            printed = time.monotonic()
            print(f"{count}{'' if total is None else f' of {total}'}, {step}", file=sys.stderr, flush=True)

    return on_step


def measure(
    arms: Sequence[Arm],
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    sampling: Mapping[str, Any],
    *,
    repeats: int = 1,
    max_context: int,
    batch: int = 1,
    only: Mapping[str, Collection[int | str]] | None = None,
    deadline: float = math.inf,
    journal: Journal | None = None,
    on_step: Callable[[str], None] = lambda note: None,
) -> Measurements:
    """Answer every question with every arm, `repeats` times. Ctrl-C ends it early; what was measured is returned.

    Args:
        arms: the first is plain decoding. Another one that fails in its warm-up is left out, and reported.
        sampling: fields of `SamplingParams`; question i uses `derive_seed(seed, i)`.
        max_context: of the model; longer questions are left out for all arms.
        batch: questions that are answered side by side.
        only: arm -> the questions (by id) that it answers; an arm that is not there answers all.
        deadline: of `time.monotonic()`: but for the first, no question is begun after it; what is returned
            then is interrupted.
        journal: keeps every answer; those that it has are not measured again.
        on_step: called before each warm-up and after each answer with what is, or was, done.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}, expected at least 1")
    found = Measurements()
    seeds, budget = question_seeds(questions, sampling), int(sampling.get("max_new_tokens", 128))
    groups = [list(questions[i : i + batch]) for i in range(0, len(questions), batch)]
    try:
        warm = prompt_ids(tokenizer, questions[0].turns[:1], ())[: max(1, max_context - WARM_UP_TOKENS)]
        own = {**sampling, "max_new_tokens": min(WARM_UP_TOKENS, budget)}
        for arm in arms:
            on_step(f"{arm.name}: warming up")
            try:
                for size in sorted({len(group) for group in groups}):
                    _answers(arm, [warm] * size, own, [int(sampling.get("seed", 0))] * size)
            except Exception as error:  # of a library that is a baseline, any; the command ends with code 1
                if arm is arms[0]:
                    raise
                found.failed[arm.name] = f"{type(error).__name__}: {error}"
        arms = [arm for arm in arms if not {arm.name, arm.plain} & set(found.failed)]
        for repeat in range(repeats):
            for i, group in enumerate(groups):
                if time.monotonic() > deadline and found.records:
                    found.interrupted = True
                    return found
                first = (repeat + i) % len(arms)
                order = [*arms[first:], *arms[:first]]
                room = max_context - budget
                _ask(found, order, group, tokenizer, sampling, seeds, repeat, room, only or {}, journal, on_step)
    except KeyboardInterrupt:
        found.interrupted = True
    return found


def _answers(
    arm: Arm, prompts: Sequence[list[int]], sampling: Mapping[str, Any], seeds: Sequence[int]
) -> list[Outcome]:
    """Side by side where the arm can."""
    if len(prompts) > 1 and isinstance(arm, EngineArm) and not arm.alone:
        return arm.run_together(prompts, sampling, seeds)
    return [arm.run(ids, {**sampling, "seed": seed}) for ids, seed in zip(prompts, seeds, strict=True)]


def _ask(
    found: Measurements,
    arms: Sequence[Arm],
    group: Sequence[Question],
    tokenizer: Tokenizer,
    sampling: Mapping[str, Any],
    seeds: Mapping[int | str, int],
    repeat: int,
    room: int,
    only: Mapping[str, Collection[int | str]],
    journal: Journal | None,
    on_step: Callable[[str], None],
) -> None:
    """All turns of a group of questions with all arms. Only whole questions are kept, so arms count the same ones."""
    answers: dict[tuple[str, int | str], list[str]] = {}
    records: list[Record] = []
    for turn in range(max(len(question.turns) for question in group)):
        prompts: dict[tuple[str, int | str], list[int]] = {}
        for arm in arms:
            for q in group:
                if turn < len(q.turns) and q.question_id in only.get(arm.name, (q.question_id,)):
                    place = arm.name, q.question_id
                    prompts[place] = prompt_ids(tokenizer, q.turns[: turn + 1], answers.setdefault(place, []))
        long = {question_id for (_, question_id), ids in prompts.items() if len(ids) > room}
        found.skipped += [question_id for question_id in long if question_id not in found.skipped]
        group = [q for q in group if q.question_id not in long]
        records = [r for r in records if r.question.question_id not in long]
        for arm in arms:
            asked = [q for q in group if (arm.name, q.question_id) in prompts]
            own = [prompts[arm.name, q.question_id] for q in asked]
            if not asked:
                continue
            for q, ids, (outcome, session) in zip(
                asked, own, _found_or_measured(arm, asked, own, turn, repeat, sampling, seeds, journal), strict=True
            ):
                answers[arm.name, q.question_id].append(outcome.text)
                records.append(Record(arm.name, q, turn, repeat, len(ids), outcome, session))
                on_step(f"{arm.name}: question {q.question_id}")
    found.records += records
    plains = {arm.name: arm.plain for arm in arms if arm.lossless and arm.plain != arm.name}
    expected = {(r.arm, r.question.question_id, r.turn): r.outcome for r in records}
    for record in records:
        if record.arm in plains:
            found.num_compared += 1
            plain = expected[plains[record.arm], record.question.question_id, record.turn]
            divergence = _divergence(record, plain)
            if divergence is not None:
                found.divergences.append(divergence)


def _found_or_measured(
    arm: Arm,
    questions: Sequence[Question],
    prompts: Sequence[list[int]],
    turn: int,
    repeat: int,
    sampling: Mapping[str, Any],
    seeds: Mapping[int | str, int],
    journal: Journal | None,
) -> list[tuple[Outcome, int]]:
    """Outcomes and their sessions. A batch of which the journal lacks an answer is measured again as a whole, since its
    answers share its time."""
    places = [(arm.name, q.question_id, turn, repeat, ids) for q, ids in zip(questions, prompts, strict=True)]
    known = None if journal is None else journal.find_all(places)
    if known is not None:
        return known
    outcomes = _answers(arm, prompts, sampling, [seeds[q.question_id] for q in questions])
    if journal is not None:
        for place, outcome in zip(places, outcomes, strict=True):
            journal.add(*place, outcome)
    return [(outcome, 1 if journal is None else journal.session) for outcome in outcomes]


def _divergence(record: Record, plain: Outcome) -> Divergence | None:
    own, expected = record.outcome.token_ids, plain.token_ids
    if own == expected:
        return None
    pairs = zip(own, expected, strict=False)
    index = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(own), len(expected)))
    return Divergence(
        record.arm,
        record.question.question_id,
        record.turn,
        record.repeat,
        index,
        expected[index] if index < len(expected) else None,
        own[index] if index < len(own) else None,
    )


def agreement(records: Sequence[Record], arm: str) -> tuple[int, int]:
    """How many answers of an arm equal plain decoding's, and of how many."""
    plain = {_key(r): r.outcome.token_ids for r in records if r.arm == "plain"}
    own = [r for r in records if r.arm == arm and _key(r) in plain]
    return sum(r.outcome.token_ids == plain[_key(r)] for r in own), len(own)


def _key(record: Record) -> tuple[int | str, int, int]:
    return record.question.question_id, record.turn, record.repeat
