"""Finished answers of a benchmark in a file, so that one that was stopped goes on where it was.

JSON lines. A line with `settings` opens a session: a file is only continued under the same settings, for answers
measured otherwise must not stand in one table. All others are answers, written as soon as they are measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..engine.statistics import Statistics
from .arms import Outcome

Key = tuple[str, str, int, int, str]


class Journal:
    """The answers of one file.

    Args:
        path: it need not exist. A last line that was cut by a kill is dropped.
        settings: how answers are measured, in types that JSON holds.

    Attributes:
        session: how often the file was opened, this time included.
        num_found: answers that `find` gave.

    Raises:
        ValueError: the file holds answers that were measured under other settings, or is no journal.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path, self.session, self.num_found = Path(path), 1, 0
        self._known: dict[Key, tuple[Outcome, int]] = {}
        settings = json.loads(json.dumps(settings))
        whole = 0
        if self.path.is_file():
            for line in self.path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                self._read(line, settings)
            with open(self.path, "r+b") as file:
                file.truncate(whole)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - open while answers come
        self._write({"session": self.session, "settings": settings})

    def _read(self, line: bytes, settings: Mapping[str, Any]) -> None:
        try:
            entry = json.loads(line)
            if "settings" in entry:
                self.session = entry["session"] + 1
                kept = entry["settings"]
            else:
                self._known[tuple(entry["key"])] = outcome_of(entry["outcome"]), entry["session"]
                return
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is no journal of a benchmark ({error!r}); give another folder") from error
        differing = sorted(k for k in kept.keys() | settings.keys() if kept.get(k) != settings.get(k))
        if differing:
            words = ", ".join(f"{k} {kept.get(k)!r}, now {settings.get(k)!r}" for k in differing)
            raise ValueError(
                f"{self.path} holds answers measured otherwise ({words}): give another folder, or remove the file"
            )

    def find(
        self, arm: str, question_id: int | str, turn: int, repeat: int, prompt: Sequence[int]
    ) -> tuple[Outcome, int] | None:
        """A finished answer to this very prompt, and the session it was measured in."""
        found = self.find_all([(arm, question_id, turn, repeat, prompt)])
        return None if found is None else found[0]

    def find_all(
        self, places: Sequence[tuple[str, int | str, int, int, Sequence[int]]]
    ) -> list[tuple[Outcome, int]] | None:
        """`find` for several answers that are worth something only together; None if one is missing."""
        known = [self._known[key] for key in (key_of(*place) for place in places) if key in self._known]
        if len(known) < len(places):
            return None
        self.num_found += len(known)
        return known

    def add(
        self, arm: str, question_id: int | str, turn: int, repeat: int, prompt: Sequence[int], outcome: Outcome
    ) -> None:
        """Keep an answer."""
        key = key_of(arm, question_id, turn, repeat, prompt)
        self._write({"session": self.session, "key": list(key), "outcome": to_json(outcome)})

    def close(self) -> None:
        """No more answers."""
        self._file.close()

    def _write(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()


def key_of(arm: str, question_id: int | str, turn: int, repeat: int, prompt: Sequence[int]) -> Key:
    """Names an answer; the prompt is part of it, as another file of questions may use the same ids."""
    digest = hashlib.sha256(",".join(map(str, prompt)).encode()).hexdigest()[:16]
    return arm, json.dumps(question_id), turn, repeat, digest


def to_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome in types that JSON holds."""
    return asdict(outcome) | {"stats": None if outcome.stats is None else outcome.stats.to_dict()}


def outcome_of(values: Mapping[str, Any]) -> Outcome:
    """What `to_json` wrote, read back."""
    stats = values["stats"]
    known = dict(values) | {
        "stats": None if stats is None else Statistics.from_dict(stats),
        "blocks": tuple((float(ms), int(count)) for ms, count in values["blocks"]),
        "exit_layers": tuple(values["exit_layers"]),
    }
    return Outcome(**known)
