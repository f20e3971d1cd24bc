"""Questions in Spec-Bench's format: JSON lines with `question_id`, `category` and `turns`; or a `prompt` each, as
training's files have.

Spec-Bench (arXiv 2401.07851) reports six tasks; its multi-turn task holds the eight categories of MT-bench. A file with
other categories is fine: each is then a task of its own. The built-in set was written for this project.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

TASKS = ("multi_turn", "translation", "summarization", "qa", "math_reasoning", "rag")
MULTI_TURN_CATEGORIES = frozenset(
    {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
)


@dataclass(frozen=True)
class Question:
    """One conversation: what the user says in each turn."""

    question_id: int | str
    category: str
    turns: tuple[str, ...]

    @property
    def task(self) -> str:
        """The task it is reported under."""
        return "multi_turn" if self.category in MULTI_TURN_CATEGORIES else self.category


def built_in() -> list[Question]:
    """A small set over the six tasks, two questions each."""
    text = (resources.files(__package__) / "prompts" / "built_in.jsonl").read_text(encoding="utf-8")
    return parse_questions(text, "the built-in prompts")


def read_questions(path: str | Path) -> list[Question]:
    """Questions of a file, in its order.

    Raises:
        FileNotFoundError, ValueError: no such file; a line that is not a question; two with the same id.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no prompt file at {path}; expected JSON lines with question_id, category and turns, or prompt"
        )
    return parse_questions(path.read_text(encoding="utf-8"), str(path))


def parse_questions(text: str, source: str) -> list[Question]:
    """See `read_questions`; `source` names the text in errors."""
    questions: dict[int | str, Question] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if "prompt" in record:
                record = {"question_id": number, "category": record.get("source", "all"), "turns": [record["prompt"]]}
            question = Question(record["question_id"], str(record["category"]), tuple(record["turns"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{source} line {number}: expected JSON with question_id, category and turns, or prompt ({error!r})"
            ) from error
        if not question.turns or not all(isinstance(turn, str) and turn for turn in question.turns):
            raise ValueError(f"{source} line {number}: turns is {record['turns']!r}, expected texts, at least one")
        if question.question_id in questions:
            raise ValueError(f"{source} line {number}: question_id {question.question_id!r} stands there twice")
        questions[question.question_id] = question
    if not questions:
        raise ValueError(
            f"{source} holds no questions: expected JSON lines with question_id, category and turns, or prompt"
        )
    return list(questions.values())


def choose(
    questions: Sequence[Question], tasks: Iterable[str] | None = None, limit: int | None = None
) -> list[Question]:
    """The questions of some tasks (or categories), at most `limit` in all, as evenly over the tasks as possible.

    Raises:
        ValueError: a task that no question has, or a limit below 1.
    """
    wanted = None if tasks is None else set(tasks)
    known = {q.task for q in questions} | {q.category for q in questions}
    if wanted is not None and not wanted <= known:
        raise ValueError(f"no questions of {sorted(wanted - known)}; these prompts have {sorted(known)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, expected at least 1 question")
    by_task: dict[str, list[Question]] = {}
    for question in questions:
        if wanted is None or question.task in wanted or question.category in wanted:
            by_task.setdefault(question.task, []).append(question)
    if limit is None:
        return [question for group in by_task.values() for question in group]
    taken = dict.fromkeys(by_task, 0)
    while sum(taken.values()) < limit:
        open_tasks = [task for task in by_task if taken[task] < len(by_task[task])]
        if not open_tasks:
            break
        fewest = min(open_tasks, key=lambda task: taken[task])
        taken[fewest] += 1
    return [question for task, group in by_task.items() for question in group[: taken[task]]]
