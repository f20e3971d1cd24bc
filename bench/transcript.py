"""A stream of events as text for people: plain, or in a terminal with accepted drafts marked by their exit layer.

Drafted tokens are underlined, so that the mark needs no colour, and tinted by exit. The full model's own are plain.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.style import Style
from rich.text import Text

from ..engine.engine import Engine
from ..engine.generation import Event, Generation
from ..engine.loop import Mode
from ..engine.tree import FROM_TEXT

TINTS = ("green", "cyan", "blue", "magenta", "yellow", "red")  # shallow exits first


def is_tinted(stream: TextIO) -> bool:
    """Whether marks belong on this stream: a terminal that can show them and no NO_COLOR (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Transcript:
    """Writes events as they come.

    Args:
        stream: text goes there, flushed after every event.
        exits: the exit layers that may draft, `FROM_TEXT` for the text, for the choice of tints.
        tinted: None asks `is_tinted`.
    """

    def __init__(self, stream: TextIO, exits: Sequence[int] = (), tinted: bool | None = None) -> None:
        self.tinted = is_tinted(stream) if tinted is None else tinted
        self._stream, self._is_terminal = stream, stream.isatty()
        self._exits = sorted(exits)
        self._console = Console(file=stream, force_terminal=True, highlight=False, markup=False, emoji=False)
        self._written: list[str] = []

    @property
    def text(self) -> str:
        """What was written so far, without marks."""
        return "".join(self._written)

    def event(self, event: Event) -> None:
        """One token."""
        self._write(event.text, event.exit_layer if event.drafted else None)

    def finish(self, whole: str) -> None:
        """The rest of the whole text, and a line's end."""
        self._write(whole.removeprefix(self.text), None)
        if not whole.endswith("\n"):
            self._stream.write("\n")
        self._stream.flush()

    def style(self, exit_layer: int) -> Style:
        """The mark of an exit."""
        place = self._exits.index(exit_layer) if exit_layer in self._exits else 0
        return Style(color=TINTS[place % len(TINTS)], underline=True)

    def legend(self, mode: Mode = "lossless") -> Text:
        """What the marks mean."""
        how = "drafted and accepted" if mode == "lossless" else "written by an exit head, unverified"
        legend = Text(f"underlined: {how}; exit layer")
        for exit_layer in self._exits:
            name = "(from the text)" if exit_layer == FROM_TEXT else str(exit_layer)
            legend.append(" ").append(name, self.style(exit_layer))
        return legend.append("; the rest is the full model's own")

    def _write(self, text: str, exit_layer: int | None) -> None:
        self._written.append(text)
        if self._is_terminal:
            text = "".join(c for c in text if c.isprintable() or c in "\n\t")  # a model may write escape sequences
        if self.tinted and exit_layer is not None:
            bare = text.lstrip()  # a mark that starts after the space lets neighbouring tokens be told apart
            self._stream.write(text[: len(text) - len(bare)])
            self._console.print(Text(bare, self.style(exit_layer)), end="", soft_wrap=True)
        else:
            self._stream.write(text)
        self._stream.flush()


def trace_record(index: int, event: Event) -> dict[str, Any]:
    """One event in types that JSON holds."""
    return {
        "index": index,
        "text": event.text,
        "token_id": event.token_id,
        "drafted": event.drafted,
        "exit_layer": event.exit_layer,
        "entropy": event.entropy,
        "logprob": event.logprob,
    }


def speed(out: Generation, engine: Engine, paced: bool) -> dict[str, Any]:
    """Rates of one answer. `speedup` compares with the plain steps that the engine timed among its rounds, if it did.

    Args:
        paced: whether the engine decided round by round, and so timed plain steps.
    """
    stats = out.stats
    rate = 1e3 * stats.num_committed / stats.decode_ms if stats.decode_ms else None
    pace = engine.pace() if paced else None
    plain_ms = None if pace is None else pace.plain_ms
    measured = rate is not None and plain_ms is not None and stats.num_drafted > 0
    return {
        "tokens_per_second": rate,
        "speedup": rate * plain_ms / 1e3 if measured and rate is not None and plain_ms is not None else None,
        "paused": pace is not None and pace.resting,
    }


def last_line(out: Generation, engine: Engine, paced: bool) -> str:
    """Tokens, rate, acceptance, and speed against plain, in one line."""
    stats, found = out.stats, speed(out, engine, paced)
    parts = [f"{stats.num_committed} tokens"]
    if found["tokens_per_second"] is not None:
        parts.append(f"{found['tokens_per_second']:.1f} tokens/s")
    if out.mode == "early_exit":
        num_layers = engine.decoder.config.num_layers
        share = sum(stats.tokens_by_exit.values()) / max(1, stats.num_committed)
        parts.append(f"early exit (lossy): {share:.0%} of them by exits")
        parts.append(f"depth {stats.mean_depth(num_layers):.1f} of {num_layers} layers")
        parts.append(f"{stats.layers_per_token:.1f} layers a token with those made up for later")
    elif stats.num_drafted:
        parts.append(f"acceptance rate {stats.acceptance_rate:.0%}")
        parts.append(f"{stats.tokens_per_verification:.2f} tokens per verification")
    else:
        parts.append("nothing drafted")
    if out.verify != "dense":
        parts.append(f"target {out.verify} (lossy: not the whole model)")
    if found["speedup"] is None:
        parts.append("speed against plain not measured")
    else:
        parts.append(f"{found['speedup']:.2f}x plain")
    if found["paused"]:
        parts.append("drafting paused: it does not pay here")
    elif stats.fallbacks:
        parts.append("fell back to less drafting: " + ", ".join(sorted(stats.fallbacks)))
    if out.finish_reason not in ("stop", "length"):
        parts.append(f"ended by {out.finish_reason}")
    return ", ".join(parts)
