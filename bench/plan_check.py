"""A plan against the clock: what was expected of some policies, and what they did on questions, interleaved."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..engine.engine import Engine
from ..engine.planner import Choice, Plan, rank
from ..engine.workspace import MOST_ROUNDS
from .arms import Arm, EngineArm
from .intervals import interval, rate, rate_ratio
from .measure import Record, measure
from .questions import Question
from .report import OVERALL, question_tables, summarise

NUM_ARMS = 3
PLANNED = "planned"  # the arm that follows the plan
SWEEP_SHARE = 0.6  # of a bounded check's time; the rest is for the best of the sweep
NUM_RETIMED, LEAST_REPEATS = 5, 3  # the best of a sweep, timed again in turns: the fastest of many was lucky, too


def check(
    engine: Engine,
    made: Plan,
    questions: Sequence[Question],
    *,
    arms: int | None = NUM_ARMS,
    max_new_tokens: int = 64,
    repeats: int = 3,
    seconds: float = math.inf,
    on_step: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Measure plain decoding, the chosen policy and some others, every answer compared with plain decoding's.

    Args:
        arms: the best so many of the plan's choices beside those two; None sweeps every policy that was considered, and
            times the `NUM_RETIMED` best, plain decoding and the chosen policy again.
        seconds: after which no further question is begun, in a sweep `SWEEP_SHARE` of it before the best are timed
            again; every policy answers one at least.

    Returns:
        `arms`: name, expected and measured tokens a second, tokens per verification, ms a round and speed-up, `error` =
        expected / measured - 1, its interval that of the measured speed over questions, `chosen_share` and
        `planned_share`: the chosen policy's measured speed over this one's, and that of the plan as users follow it
        (`PLANNED`: pauses, lengths that move), with intervals;
        `retimed`: likewise, after a sweep; `best`: the fastest fixed policy of those that were timed last;
        `chosen_share`, `planned_share`: over its speed, and the intervals; `num_answered`: questions of each timing;
        `different`: answers that were not plain decoding's.

    Raises:
        ValueError: the engine has no tokenizer.
    """
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise ValueError("this engine has no tokenizer, so it cannot read questions")
    everything = engine.heads.calibration if engine.heads is not None and arms is None else None
    others = made.choices[:arms] if everything is None else rank(everything, made.costs)
    start, compared = time.monotonic(), 0
    answered: list[int] = []
    different: list[str] = []

    def timed(others: Sequence[Choice], repeats: int, seconds: float) -> list[dict[str, Any]]:
        nonlocal compared
        choices = list({choice.name: choice for choice in (made.plain, made.chosen, *others)}.values())
        run: list[Arm] = [
            EngineArm(own.name, engine, "always" if own.policy.drafts else False, own.policy) for own in choices
        ]
        run.append(EngineArm(PLANNED, engine))
        engine._paces = {}
        engine.workspace.most_rounds = len(run) * MOST_ROUNDS
        found = measure(
            run, questions, tokenizer, {"max_new_tokens": max_new_tokens, "temperature": 0.0}, repeats=repeats,
            max_context=engine.decoder.config.max_context, deadline=start + seconds, on_step=on_step,
        )  # fmt: skip
        answered.append(len({record.question.question_id for record in found.records}))
        compared += found.num_compared
        different.extend(map(str, found.divergences))
        measured = summarise(found.records, run, engine.decoder.config.num_layers)[OVERALL]
        records = {own.name: [r for r in found.records if r.arm == own.name] for own in run}

        def row(name: str, choice: Choice) -> dict[str, Any]:
            shares = _share("chosen", records[made.chosen.name], records[name])
            own = _row(name, choice, made, measured[name]) | {"error_interval": _errors(choice, records[name])}
            return own | shares | _share(PLANNED, records[PLANNED], records[name])

        return [row(own.name, own) for own in choices] + [row(PLANNED, made.chosen)]

    retimed = []
    before = engine.plan, engine._policy, engine._paces
    engine.plan, engine._policy = made, None
    try:
        rows = timed(others, repeats, seconds if everything is None else SWEEP_SHARE * seconds)
        if everything is not None:
            fastest = sorted(rows, key=lambda row: -row["measured_tokens_per_second"])
            names = [row["name"] for row in fastest if row["name"] != PLANNED][:NUM_RETIMED]
            again = [choice for choice in others if choice.name in names]
            retimed = timed(again, max(repeats, LEAST_REPEATS), seconds)
    finally:
        engine.plan, engine._policy, engine._paces = before
        engine.workspace.most_rounds = MOST_ROUNDS
    fixed = [row for row in retimed or rows if row["name"] != PLANNED]
    best = min(fixed, key=lambda row: row["chosen_share"])
    return {
        "arms": rows,
        "retimed": retimed,
        "best": best["name"],
        **{
            f"{name}_share{end}": best[f"{name}_share{end}"]
            for name in ("chosen", PLANNED)
            for end in ("", "_interval")
        },
        "num_answered": answered,
        "seconds": time.monotonic() - start,
        "num_questions": len(questions),
        "max_new_tokens": max_new_tokens,
        "repeats": repeats,
        "num_compared": compared,
        "different": different,
    }


def _share(name: str, one: Sequence[Record], other: Sequence[Record]) -> dict[str, Any]:
    """One arm's speed over another's, and its interval over questions."""
    own, base = question_tables(one, other), question_tables(other, one)
    tables = [own["decode_tokens"], own["decode_ms"], base["decode_tokens"], base["decode_ms"]]
    (share,) = rate_ratio(*(table.sum(1, keepdims=True) for table in tables))
    return {f"{name}_share": float(share), f"{name}_share_interval": interval(tables, rate_ratio)}


def _errors(choice: Choice, records: Sequence[Record]) -> list[float] | None:
    """Between which errors the expected speed is off, by the measured one's interval over questions."""
    own = question_tables(records)
    speeds = interval([own["decode_tokens"], own["decode_ms"] / 1e3], rate)
    return None if speeds is None else sorted(choice.tokens_per_second / speed - 1 for speed in speeds)


def _row(name: str, choice: Choice, made: Plan, measured: dict[str, Any]) -> dict[str, Any]:
    speed = measured["decode_tokens_per_second"]
    return {
        "name": name,
        "expected_tokens_per_second": choice.tokens_per_second,
        "measured_tokens_per_second": speed,
        "error": choice.tokens_per_second / speed - 1,
        "expected_round_ms": choice.expected.ms,
        "measured_round_ms": 1e3 * measured["tokens_per_verification"] / speed,
        "expected_tokens_per_verification": choice.expected.tokens,
        "measured_tokens_per_verification": measured["tokens_per_verification"],
        "expected_speedup": choice.tokens_per_second / made.plain.tokens_per_second,
        "measured_speedup": measured["speedup"],
        "speedup_range": measured["speedup_range"],
    }
