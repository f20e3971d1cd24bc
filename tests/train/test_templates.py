"""Prompts from templates: as many as asked for, the same each time, held-out tasks apart."""

from __future__ import annotations

import json
import sys

import pytest
from skipstone.train import templates

PASSAGE = "The bridge was opened in 1901. It was rebuilt twice. " * 6
PROMPTS = [f"Read this.\n{PASSAGE}\nQuestion: When was the bridge opened?", "Hello. What is a bridge made of?"]


def test_code_prompts_are_distinct_and_held_out_tasks_are_apart() -> None:
    found, kept = templates.code(300), templates.code(30, held_out=True)
    assert len(set(found)) == 300 and len(set(kept)) == 30
    assert templates.code(300) == found != templates.code(300, seed=1)
    held = [task for place, task in enumerate(templates.CODE_TASKS) if place % 8 == 7]
    assert not any(task in prompt for task in held for prompt in found if "{" not in prompt)
    assert sum(any(task in prompt for task in held) for prompt in kept) > 20


def test_text_prompts_take_passages_and_questions() -> None:
    found = templates.text(200, PROMPTS)
    assert len(set(found)) == len(found) > 100
    assert any(p.startswith("Summarize: The bridge") for p in found)
    assert "When was the bridge opened?" in found and "What is a bridge made of?" in found
    assert any(p.startswith("Translate German to English: ") for p in found)
    with pytest.raises(ValueError, match="0 passages"):
        templates.text(3, ["Hello."])


def test_the_command_writes_json_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["templates", "code", "5", "--held-out"])
    assert templates.main() == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 5 and all(line["source"] == "template-code" for line in lines)
