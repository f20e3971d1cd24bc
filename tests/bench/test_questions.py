"""Questions in Spec-Bench's format, and which of them are asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from skipstone.bench.questions import TASKS, Question, built_in, choose, parse_questions, read_questions


def test_built_in_questions_cover_every_task_twice() -> None:
    questions = built_in()
    assert [q.task for q in questions] == [task for task in TASKS for _ in range(2)]
    assert {len(q.turns) for q in questions if q.task == "multi_turn"} == {2}


def test_mt_bench_categories_are_one_task_and_others_their_own() -> None:
    assert Question(1, "coding", ("x",)).task == "multi_turn"
    assert Question(2, "rag", ("x",)).task == "rag"
    assert Question(3, "poems", ("x",)).task == "poems"


def test_a_file_is_read_in_order(tmp_path: Path) -> None:
    rows = [{"question_id": i, "category": "qa", "turns": [f"q{i}", "more"]} for i in (7, 3)]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    assert [(q.question_id, q.turns) for q in read_questions(path)] == [(7, ("q7", "more")), (3, ("q3", "more"))]


def test_prompts_of_a_training_file_are_questions_of_one_turn() -> None:
    found = parse_questions('{"source": "code", "prompt": "a"}\n\n{"prompt": "b"}', "prompts")
    assert found == [Question(1, "code", ("a",)), Question(3, "all", ("b",))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": 3}', "expected texts"),
        ('{"question_id": 1, "category": "qa"}', "line 1: expected JSON"),
        ("not json", "line 1: expected JSON"),
        ('{"question_id": 1, "category": "qa", "turns": []}', "at least one"),
        ('{"question_id": 1, "category": "qa", "turns": [3]}', "expected texts"),
        ('{"question_id": 1, "category": "qa", "turns": ["a"]}\n' * 2, "stands there twice"),
        ("", "no questions"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_questions(line, "prompts")


def test_a_limit_is_spread_over_the_tasks() -> None:
    """Planted bug: the first `limit` questions, which are all of the first tasks."""
    questions = built_in()
    chosen = choose(questions, limit=7)
    counts = [sum(q.task == task for q in chosen) for task in TASKS]
    assert sum(counts) == 7 and sorted(counts) == [1, 1, 1, 1, 1, 2]
    assert choose(questions, limit=1000) == questions


def test_tasks_and_categories_both_select() -> None:
    assert {q.task for q in choose(built_in(), ["qa", "rag"])} == {"qa", "rag"}
    assert [q.category for q in choose(built_in(), ["writing"])] == ["writing"]
    with pytest.raises(ValueError, match="no questions of \\['cooking'\\]"):
        choose(built_in(), ["cooking"])
    with pytest.raises(ValueError, match="limit is 0"):
        choose(built_in(), limit=0)
