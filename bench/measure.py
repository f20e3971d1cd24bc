"""Running the arms: interleaved, repeated, every answer compared with plain decoding's.

One record is one answer: arm, question, turn, repeat. Arms take turns question by question, starting with another one
each time, so that a host that slows down slows all of them. A second turn is conditioned on the arm's own first answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engine.cache import ContextTooLong
from ..engine.tokenizer import Tokenizer
from ..kernels.noise import derive_seed
from .arms import Arm, Outcome
from .journal import Journal
from .questions import Question

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
    """All answers so far, whole or interrupted. `skipped` are questions whose prompt does not fit the context."""

    records: list[Record] = field(default_factory=list)
    divergences: list[Divergence] = field(default_factory=list)
    num_compared: int = 0
    skipped: list[int | str] = field(default_factory=list)
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


def measure(
    arms: Sequence[Arm],
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    sampling: Mapping[str, Any],
    *,
    repeats: int = 1,
    max_context: int,
    journal: Journal | None = None,
    on_step: Callable[[str], None] = lambda note: None,
) -> Measurements:
    """Answer every question with every arm, `repeats` times. Ctrl-C ends it early; what was measured is returned.

    Args:
        arms: the first is plain decoding.
        sampling: fields of `SamplingParams`; question i uses `derive_seed(seed, i)`.
        max_context: of the model; longer questions are left out for all arms.
        journal: keeps every answer; those that it has are not measured again.
        on_step: called after each answer with what was done.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}, expected at least 1")
    found = Measurements()
    seeds, budget = question_seeds(questions, sampling), int(sampling.get("max_new_tokens", 128))
    try:
        warm = prompt_ids(tokenizer, questions[0].turns[:1], ())[: max(1, max_context - WARM_UP_TOKENS)]
        for arm in arms:
            arm.run(warm, {**sampling, "max_new_tokens": min(WARM_UP_TOKENS, budget)})
        for repeat in range(repeats):
            for i, question in enumerate(questions):
                first = (repeat + i) % len(arms)
                order = [*arms[first:], *arms[:first]]
                own = {**sampling, "seed": seeds[question.question_id]}
                try:
                    _ask(found, order, question, tokenizer, own, repeat, max_context - budget, journal, on_step)
                except ContextTooLong:
                    if question.question_id not in found.skipped:
                        found.skipped.append(question.question_id)
    except KeyboardInterrupt:
        found.interrupted = True
    return found


def _ask(
    found: Measurements,
    arms: Sequence[Arm],
    question: Question,
    tokenizer: Tokenizer,
    sampling: Mapping[str, Any],
    repeat: int,
    room: int,
    journal: Journal | None,
    on_step: Callable[[str], None],
) -> None:
    """All turns of one question with all arms. Only whole questions are kept, so all arms count the same ones."""
    answers: dict[str, list[str]] = {arm.name: [] for arm in arms}
    records = []
    for turn in range(len(question.turns)):
        for arm in arms:
            ids = prompt_ids(tokenizer, question.turns[: turn + 1], answers[arm.name])
            if len(ids) > room:
                raise ContextTooLong(f"question {question.question_id} has {len(ids)} tokens, {room} fit")
            place = arm.name, question.question_id, turn, repeat, ids
            known = None if journal is None else journal.find(*place)
            if known is None:
                outcome, session = arm.run(ids, sampling), 1 if journal is None else journal.session
                if journal is not None:
                    journal.add(*place, outcome)
            else:
                outcome, session = known
            answers[arm.name].append(outcome.text)
            records.append(Record(arm.name, question, turn, repeat, len(ids), outcome, session))
            on_step(f"{arm.name}: question {question.question_id}")
    found.records += records
    lossless = {arm.name for arm in arms if arm.lossless}
    plain = {r.turn: r.outcome for r in records if r.arm == "plain"}
    for record in records:
        if record.arm == "plain" or record.arm not in lossless:
            continue
        found.num_compared += 1
        divergence = _divergence(record, plain[record.turn])
        if divergence is not None:
            found.divergences.append(divergence)


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
