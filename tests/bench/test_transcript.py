"""Text for people: plain in pipes, marked in terminals, whole in both."""

from __future__ import annotations

import io
import re

import pytest
from skipstone.bench.transcript import Transcript, is_tinted
from skipstone.engine.generation import Event

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
EVENTS = [
    Event(" A", 1, False, None, None, None),
    Event(" stone", 2, True, 6, 0.1, None),
    Event("", 3, True, 6, 0.1, None),
    Event(" skips\n", 4, True, 12, 0.2, None),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def write(stream: io.StringIO, whole: str = " A stone skips\nfar") -> Transcript:
    transcript = Transcript(stream, (6, 12))
    for event in EVENTS:
        transcript.event(event)
    transcript.finish(whole)
    return transcript


@pytest.fixture(autouse=True)
def _colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def test_a_pipe_gets_the_text_alone() -> None:
    stream = io.StringIO()
    assert not write(stream).tinted
    assert stream.getvalue() == " A stone skips\nfar\n"


def test_a_terminal_gets_marks_that_need_no_colour() -> None:
    """Planted bugs: the full model's own tokens marked too; a mark of colour alone."""
    stream = Terminal()
    transcript = write(stream)
    shown = stream.getvalue()
    assert ESCAPE.sub("", shown) == " A stone skips\nfar\n"
    assert transcript.text == " A stone skips\nfar"
    marked = re.findall(r"\x1b\[([0-9;]+)m([^\x1b]*)\x1b\[0m", shown)
    assert [text for _, text in marked] == ["stone", "skips"]
    assert all("4" in style.split(";") for style, _ in marked), "underlined"
    assert marked[0][0] != marked[1][0], "tinted by exit"
    legend = transcript.legend()
    assert "underlined" in legend.plain and "exit layer 6 12" in legend.plain


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_may_ask_for_plain_text(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    stream = Terminal()
    assert not is_tinted(stream)
    write(stream)
    assert stream.getvalue() == " A stone skips\nfar\n"


def test_a_terminal_does_not_obey_escape_sequences_of_the_model() -> None:
    stream, pipe = Terminal(), io.StringIO()
    for target in (stream, pipe):
        transcript = Transcript(target)
        transcript.event(Event("\x1b[2Jx", 1, False, None, None, None))
        transcript.finish("\x1b[2Jx")
    assert stream.getvalue() == "[2Jx\n"
    assert pipe.getvalue() == "\x1b[2Jx\n", "a pipe gets exactly what was written"
