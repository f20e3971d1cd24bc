"""A plan against the clock: what was expected of some policies, and what they did on questions, interleaved."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..engine.engine import Engine
from ..engine.planner import Choice, Plan, lookups_of, rank
from ..engine.workspace import MOST_ROUNDS
from .arms import Arm, EngineArm
from .intervals import interval, rate_ratio
from .measure import Record, measure
from .questions import Question
from .report import OVERALL, question_tables, summarise

NUM_ARMS = 3
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
        expected / measured - 1, `chosen_share`: the chosen policy's measured speed over this one's, and its interval;
        `retimed`: likewise, after a sweep; `best`: the fastest of those that were timed last; `chosen_share`: over its
        speed, and the interval; `num_answered`: questions of each timing; `different`: answers that were not plain
        decoding's.

    Raises:
        ValueError: the engine has no tokenizer.
    """
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise ValueError("this engine has no tokenizer, so it cannot read questions")
    everything = engine.heads.calibration if engine.heads is not None and arms is None else None
    others = made.choices[:arms] if everything is None else rank(everything, made.costs, lookups_of(engine))
    start, compared = time.monotonic(), 0
    answered: list[int] = []
    different: list[str] = []

    def timed(others: Sequence[Choice], repeats: int, seconds: float) -> list[dict[str, Any]]:
        nonlocal compared
        choices = list({choice.name: choice for choice in (made.plain, made.chosen, *others)}.values())
        run: list[Arm] = [
            EngineArm(own.name, engine, "always" if own.policy.drafts else False, own.policy) for own in choices
        ]
        engine.workspace.most_rounds = len(run) * MOST_ROUNDS
        found = measure(
            run, questions, tokenizer, {"max_new_tokens": max_new_tokens, "temperature": 0.0}, repeats=repeats,
            max_context=engine.decoder.config.max_context, deadline=start + seconds, on_step=on_step,
        )  # fmt: skip
        answered.append(len({record.question.question_id for record in found.records}))
        compared += found.num_compared
        different.extend(map(str, found.divergences))
        measured = summarise(found.records, run, engine.decoder.config.num_layers)[OVERALL]
        records = {own.name: [r for r in found.records if r.arm == own.name] for own in choices}
        return [
            _row(own, made, measured[own.name]) | _share(records[made.chosen.name], records[own.name])
            for own in choices
        ]

    rows = timed(others, repeats, seconds if everything is None else SWEEP_SHARE * seconds)
    retimed = []
    if everything is not None:
        fastest = sorted(rows, key=lambda row: -row["measured_tokens_per_second"])[:NUM_RETIMED]
        names = {row["name"] for row in fastest}
        again = [choice for choice in others if choice.name in names]
        retimed = timed(again, max(repeats, LEAST_REPEATS), seconds)
    engine.workspace.most_rounds = MOST_ROUNDS
    best = min(retimed or rows, key=lambda row: row["chosen_share"])
    return {
        "arms": rows,
        "retimed": retimed,
        "best": best["name"],
        "chosen_share": best["chosen_share"],
        "chosen_share_interval": best["chosen_share_interval"],
        "num_answered": answered,
        "seconds": time.monotonic() - start,
        "num_questions": len(questions),
        "max_new_tokens": max_new_tokens,
        "repeats": repeats,
        "num_compared": compared,
        "different": different,
    }


def _share(chosen: Sequence[Record], other: Sequence[Record]) -> dict[str, Any]:
    """The chosen policy's speed over another's, and its interval over questions."""
    own, base = question_tables(chosen, other), question_tables(other, chosen)
    tables = [own["decode_tokens"], own["decode_ms"], base["decode_tokens"], base["decode_ms"]]
    (share,) = rate_ratio(*(table.sum(1, keepdims=True) for table in tables))
    return {"chosen_share": float(share), "chosen_share_interval": interval(tables, rate_ratio)}


def _row(choice: Choice, made: Plan, measured: dict[str, Any]) -> dict[str, Any]:
    speed = measured["decode_tokens_per_second"]
    return {
        "name": choice.name,
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
