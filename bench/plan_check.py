"""A plan against the clock: what was expected of some policies, and what they did on questions, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..engine.engine import Engine
from ..engine.planner import Choice, Plan, lookups_of, rank
from .arms import Arm, EngineArm
from .measure import measure
from .questions import Question
from .report import OVERALL, summarise

NUM_ARMS = 3


def check(
    engine: Engine,
    made: Plan,
    questions: Sequence[Question],
    *,
    arms: int | None = NUM_ARMS,
    max_new_tokens: int = 64,
    repeats: int = 3,
    on_step: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Measure plain decoding, the chosen policy and some others, every answer compared with plain decoding's.

    Args:
        arms: the best so many of the plan's choices beside those two; None sweeps every policy that was considered.

    Returns:
        `arms`: name, expected and measured tokens a second, tokens per verification, ms a round and speed-up, `error` =
        expected / measured - 1; `chosen_share`: the chosen policy's measured speed over the best measured one's;
        `different`: answers that were not plain decoding's.

    Raises:
        ValueError: the engine has no tokenizer.
    """
    if engine.tokenizer is None:
        raise ValueError("this engine has no tokenizer, so it cannot read questions")
    everything = engine.heads.calibration if engine.heads is not None and arms is None else None
    others = made.choices[:arms] if everything is None else rank(everything, made.costs, lookups_of(engine))
    chosen = list({choice.name: choice for choice in (made.plain, made.chosen, *others)}.values())
    run: list[Arm] = [
        EngineArm(choice.name, engine, "always" if choice.policy.drafts else False, choice.policy) for choice in chosen
    ]
    found = measure(
        run, questions, engine.tokenizer, {"max_new_tokens": max_new_tokens, "temperature": 0.0}, repeats=repeats,
        max_context=engine.decoder.config.max_context, on_step=on_step,
    )  # fmt: skip
    measured = summarise(found.records, run, engine.decoder.config.num_layers)[OVERALL]
    rows = [_row(choice, made, measured[choice.name]) for choice in chosen]
    best = max(row["measured_tokens_per_second"] for row in rows)
    own = next(row for row in rows if row["name"] == made.chosen.name)
    return {
        "arms": rows,
        "chosen_share": own["measured_tokens_per_second"] / best,
        "num_questions": len(questions),
        "max_new_tokens": max_new_tokens,
        "repeats": repeats,
        "num_compared": found.num_compared,
        "different": [str(divergence) for divergence in found.divergences],
    }


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
