"""Every example runs, on a tiny model; what it claims about its output is checked by the example itself."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, *args: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *args])
    code: object = 0
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    except SystemExit as end:
        code = end.code
    assert not code


def test_no_example_is_left_out() -> None:
    tested = {"quickstart.py", "stream.py", "chat.py", "custom_processor.py", "lossless.py", "demo.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


@pytest.mark.parametrize("name", ["quickstart.py", "chat.py", "custom_processor.py"])
def test_example(
    name: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(name, str(tiny_folder), monkeypatch=monkeypatch)
    assert capsys.readouterr().out.strip()


def test_stream_marks_drafted_tokens(
    tiny_folder: Path, tiny_heads_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("stream.py", str(tiny_folder), str(tiny_heads_folder), monkeypatch=monkeypatch)
    shown = capsys.readouterr().out
    assert "[" in shown and "tokens drafted at exit layer 2" in shown


def test_lossless_finds_no_difference(
    tiny_folder: Path, tiny_heads_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("lossless.py", str(tiny_folder), str(tiny_heads_folder), monkeypatch=monkeypatch)
    shown = capsys.readouterr().out
    assert shown.count(": equal; ") == 6 and "tree, temperature 0.8" in shown


def test_demo_shows_both_texts_and_that_they_are_equal(
    tiny_folder: Path, tiny_heads_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("demo.py", str(tiny_folder), str(tiny_heads_folder), monkeypatch=monkeypatch)
    shown = capsys.readouterr().out
    assert "Equal token for token: yes (96 tokens)" in shown and "Speed against plain: " in shown
    assert "tokens per verification" in shown
    assert "(tda): not shown, no thresholds are shipped" in shown


def test_demo_says_so_without_heads(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("demo.py", str(tiny_folder), monkeypatch=monkeypatch)
    shown = capsys.readouterr().out
    assert "No exit heads drafted: there are no calibrated ones for this model here" in shown
    assert "Equal token for token: yes (96 tokens)" in shown  # the text itself may draft
