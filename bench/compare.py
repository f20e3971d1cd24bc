"""Two runs beside each other: what changed beyond noise.

The questions that both runs answered are drawn anew, the same draw for both (see `intervals.py`); within a draw each
run's repeats are taken as they are. A number has changed if its interval excludes no change, and for times also
if the change is larger than the runs' own repeats lie apart: that the host was busier on one day is no change.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .intervals import Table, interval, rate, tabled

# name -> (numerator, denominator, whether it is timed): sums over an answer's fields
_RATES = {
    "decode tokens/s": ("decode_tokens", "decode_ms", True),
    "end to end tokens/s": ("tokens", "wall_ms", True),
    "acceptance rate": ("num_accepted", "num_drafted", False),
    "tokens per verification": ("num_committed", "num_verifications", False),
}
_CONDITIONS = ("model", "heads", "prompts", "dtype", "threads", "temperature", "max_new_tokens", "seed", "versions")


def read_document(path: str | Path) -> dict[str, Any]:
    """A document of `skipstone bench`.

    Raises:
        ValueError: another file, or none.
    """
    if not Path(path).is_file():
        raise ValueError(f"no run at {path}: expected a file that skipstone bench --out, or --report (run.json), wrote")
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(found["answers"], list) or not isinstance(found["arms"], dict):
            raise KeyError("answers")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no document that skipstone bench wrote ({error!r})") from error
    return dict(found)


def compare(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    """What the second run has that the first has not.

    Returns:
        `conditions`: settings that differ; `questions`: in both; `arms`: name -> metric -> `before`, `after`, `ratio`,
        `interval` of the ratio, `spread` (of a timed one: how far repeats lie apart), `changed`; and `speedup` against
        each run's own plain. `texts`: name -> answers compared and different. Arms of one run alone are left out.
    """
    conditions = {name: [one.get(name), two.get(name)] for name in _CONDITIONS if one.get(name) != two.get(name)}
    devices = [document["device"]["name"] for document in (one, two)]
    if devices[0] != devices[1]:
        conditions["device"] = devices
    arms: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    plain = [_by_place(document, "plain") for document in (one, two)]
    common: set[str] = set()
    for name in (name for name in one["arms"] if name in two["arms"]):
        before, after = _by_place(one, name), _by_place(two, name)
        both = sorted({q for _, q in before} & {q for _, q in after})
        common |= set(both)
        if not both:
            continue
        arms[name] = {}
        for metric, (above, below, timed) in _RATES.items():
            columns = [_table(own, both, column) for own in (before, after) for column in (above, below)]
            arms[name][metric] = _change(columns, timed)
        if name != "plain":
            columns = []
            for own, base in zip((before, after), plain, strict=True):
                columns += [_relative(own, base, both), _ones(own, both)]
            arms[name]["speedup"] = _change(columns, True)
        texts[name] = _texts(before, after)
    arms = {name: {m: row for m, row in rows.items() if row is not None} for name, rows in arms.items()}
    return {"conditions": conditions, "questions": len(common), "arms": arms, "texts": texts}


Places = dict[tuple[int, str], list[Mapping[str, Any]]]


def _by_place(document: Mapping[str, Any], arm: str) -> Places:
    """(repeat, question) -> its answers, turn by turn; questions that are not in all repeats are left out."""
    found: Places = {}
    for answer in document["answers"]:
        if answer["arm"] == arm:
            found.setdefault((answer["repeat"], str(answer["question_id"])), []).append(answer)
    repeats = {repeat for repeat, _ in found}
    whole = {q for _, q in found if all((repeat, q) in found for repeat in repeats)}
    return {place: answers for place, answers in found.items() if place[1] in whole}


def _value(answer: Mapping[str, Any], column: str) -> float:
    if column == "tokens":
        return len(answer["token_ids"])
    if column in ("decode_tokens", "decode_ms", "wall_ms"):
        return float(answer[column])
    return float((answer.get("stats") or {}).get(column, 0))


def _table(own: Places, questions: list[str], column: str) -> Table:
    repeats = sorted({repeat for repeat, _ in own})
    sums = [{q: sum(_value(a, column) for a in own[repeat, q]) for q in questions} for repeat in repeats]
    return tabled(sums, questions)


def _relative(own: Places, plain: Places, questions: list[str]) -> Table:
    """Of each repeat and question plain's time a token over the arm's."""
    repeats = sorted({repeat for repeat, _ in own} & {repeat for repeat, _ in plain})

    def per_token(places: Places, repeat: int, question: str) -> float:
        answers = places.get((repeat, question), [])
        tokens = sum(_value(a, "decode_tokens") for a in answers)
        return sum(_value(a, "decode_ms") for a in answers) / tokens if tokens else float("nan")

    with np.errstate(divide="ignore", invalid="ignore"):
        return tabled(
            [{q: per_token(plain, r, q) / (per_token(own, r, q) or float("nan")) for q in questions} for r in repeats],
            questions,
        )


def _ones(own: Places, questions: list[str]) -> Table:
    return np.ones((len({repeat for repeat, _ in own}), len(questions)))


def _change(columns: list[Table], timed: bool) -> dict[str, Any] | None:
    """None where a metric has no value in one of the runs."""
    above, below, above2, below2 = columns
    with np.errstate(divide="ignore", invalid="ignore"):
        firsts, seconds = above.sum(1) / below.sum(1), above2.sum(1) / below2.sum(1)
    before, after = float(np.median(firsts)), float(np.median(seconds))
    if not (np.isfinite([before, after]).all() and before > 0 and after > 0):
        return None
    bounds = interval(columns, lambda a, b, c, d: rate(c, d) / rate(a, b))
    spread = max(float(v.max() / v.min()) - 1 for v in (firsts, seconds)) if timed else 0.0
    ratio = after / before
    changed = bounds is not None and not bounds[0] <= 1 <= bounds[1] and max(ratio, 1 / ratio) - 1 > spread
    return {"before": before, "after": after, "ratio": ratio, "interval": bounds, "spread": spread, "changed": changed}


def _texts(before: Places, after: Places) -> dict[str, int]:
    places = before.keys() & after.keys()
    pairs = [pair for place in places for pair in zip(before[place], after[place], strict=False)]
    return {"compared": len(pairs), "different": sum(a["token_ids"] != b["token_ids"] for a, b in pairs)}
