"""From answers to numbers: per task and overall, as one JSON document.

Every formula is in docs/benchmarks.md under the name that it has here.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..engine.statistics import ENTROPY_BIN, Statistics
from .arms import PLAIN_ARM, Arm
from .intervals import interval, rate, rate_ratio, tabled
from .measure import Measurements, Record, agreement

SCHEMA_VERSION = 2  # 2: blocks and their times, intervals, histograms, contexts
OVERALL = "overall"
SMALLEST_CONTEXT = 256  # `contexts` doubles from here


def summarise(records: Sequence[Record], arms: Sequence[Arm], num_layers: int) -> dict[str, dict[str, Any]]:
    """task -> arm -> metrics, in the order of the records' tasks, `overall` last."""
    tasks = list(dict.fromkeys(record.question.task for record in records))
    summary: dict[str, dict[str, Any]] = {}
    for task in [*tasks, OVERALL]:
        summary[task] = _by_arm([r for r in records if task in (OVERALL, r.question.task)], arms, num_layers)
    return summary


def _by_arm(records: Sequence[Record], arms: Sequence[Arm], num_layers: int) -> dict[str, Any]:
    """Metrics of each arm that answered anything, beside plain decoding of the same turns."""
    by_arm = {arm.name: [r for r in records if r.arm == arm.name] for arm in arms}
    found = {}
    for arm in arms:
        if not (own := by_arm[arm.name]):
            continue
        found[arm.name] = _metrics(own, by_arm[PLAIN_ARM], num_layers)
        if arm.plain != PLAIN_ARM:
            found[arm.name]["target_speedup"] = _speedups(own, by_arm[arm.plain])[0]
    return found


def by_context(records: Sequence[Record], arms: Sequence[Arm], num_layers: int) -> dict[str, dict[str, Any]]:
    """Most prompt tokens of a group -> arm -> metrics; groups double in size."""
    groups: dict[int, list[Record]] = {}
    for record in records:
        groups.setdefault(max(SMALLEST_CONTEXT, 1 << max(0, record.prompt_tokens - 1).bit_length()), []).append(record)
    found: dict[str, dict[str, Any]] = {}
    for most, own in sorted(groups.items()):
        found[str(most)] = _by_arm(own, arms, num_layers)
    return found


def _metrics(records: Sequence[Record], plain: Sequence[Record], num_layers: int) -> dict[str, Any]:
    rates = _rates(records).values()
    speedup, end_to_end_speedup, spread = _speedups(records, plain)
    per_question = [1e3 * len(r.outcome.token_ids) / r.outcome.wall_ms for r in records if r.outcome.wall_ms]
    metrics: dict[str, Any] = {
        "num_answers": len(records),
        "num_questions": len({r.question.question_id for r in records}),
        "num_tokens": sum(len(r.outcome.token_ids) for r in records),
        "num_errors": sum(r.outcome.error is not None for r in records),
        "decode_tokens_per_second": _median([decode for decode, _ in rates]),
        "end_to_end_tokens_per_second": _median([end_to_end for _, end_to_end in rates]),
        "mean_question_tokens_per_second": statistics.fmean(per_question) if per_question else None,
        "speedup": speedup,
        "speedup_range": spread,
        "end_to_end_speedup": end_to_end_speedup,
        "worst_question_time_ratio": _worst_ratio(records, plain),
    }
    metrics |= _waits(records) | _intervals(records, plain) | {"joules_per_token": _joules(records)}
    counted = [r.outcome.stats for r in records if r.outcome.stats is not None]
    return metrics | (_drafting(Statistics.merge(counted), num_layers) if counted else {})


def _speedups(
    records: Sequence[Record], plain: Sequence[Record]
) -> tuple[float | None, float | None, list[float] | None]:
    """Decode-only and end to end, medians over the repeats, and the range of the first; over turns that both have."""
    both = {_place(r) for r in records} & {_place(r) for r in plain}
    own, base = (_rates([r for r in part if _place(r) in both]) for part in (records, plain))
    decode = [own[i][0] / base[i][0] for i in own if i in base and base[i][0]]
    end_to_end = [own[i][1] / base[i][1] for i in own if i in base and base[i][1]]
    return _median(decode), _median(end_to_end), [min(decode), max(decode)] if decode else None


def _place(record: Record) -> tuple[int | str, int, int]:
    return record.question.question_id, record.turn, record.repeat


def _waits(records: Sequence[Record]) -> dict[str, float | None]:
    """Time to first token; time of a token, those of one block sharing it evenly; waits for the next block. Ms."""
    firsts: list[float] = []
    tokens: list[float] = []
    waits: list[float] = []
    for blocks in (r.outcome.blocks for r in records if r.outcome.blocks):
        firsts.append(blocks[0][0])
        for (before, _), (now, count) in zip(blocks, blocks[1:], strict=False):
            waits.append(now - before)
            tokens += [(now - before) / count] * count
    return {
        "first_token_ms_p50": _quantile(firsts, 0.5),
        "first_token_ms_p99": _quantile(firsts, 0.99),
        "token_ms_p50": _quantile(tokens, 0.5),
        "token_ms_p99": _quantile(tokens, 0.99),
        "wait_ms_p99": _quantile(waits, 0.99),
    }


def _quantile(values: Sequence[float], share: float) -> float | None:
    return float(np.quantile(values, share)) if values else None


def _joules(records: Sequence[Record]) -> float | None:
    known = [r.outcome for r in records if r.outcome.joules is not None]
    tokens = sum(len(o.token_ids) for o in known)
    return sum(o.joules or 0.0 for o in known) / tokens if tokens else None


_COLUMNS: dict[str, Callable[[Record], float]] = {
    "tokens": lambda r: len(r.outcome.token_ids),
    "wall_ms": lambda r: r.outcome.wall_ms,
    "decode_tokens": lambda r: r.outcome.decode_tokens,
    "decode_ms": lambda r: r.outcome.decode_ms,
    "drafted": lambda r: r.outcome.stats.num_drafted if r.outcome.stats else 0,
    "accepted": lambda r: r.outcome.stats.num_accepted if r.outcome.stats else 0,
    "verifications": lambda r: r.outcome.stats.num_verifications if r.outcome.stats else 0,
}


def question_tables(records: Sequence[Record], others: Sequence[Record] = ()) -> dict[str, Any]:
    """Column -> `[repeats, questions]` sums over turns, for the questions and repeats that both have whole."""
    places = {(r.repeat, r.question.question_id) for r in records}
    if others:
        places &= {(r.repeat, r.question.question_id) for r in others}
    repeats = sorted({repeat for repeat, _ in places})
    # the same order for any two arms: columns of one question stand side by side
    questions = [q for q in sorted({q for _, q in places}, key=str) if all((r, q) in places for r in repeats)]
    questions.sort(key=str)
    tables = {}
    for name, column in _COLUMNS.items():
        sums: list[dict[Any, float]] = [defaultdict(float) for _ in repeats]
        for record in records:
            if record.repeat in repeats:
                sums[repeats.index(record.repeat)][record.question.question_id] += column(record)
        tables[name] = tabled(sums, questions)
    return tables


def _intervals(records: Sequence[Record], plain: Sequence[Record]) -> dict[str, list[float] | None]:
    """95 % intervals of the main numbers, by bootstrap over questions."""
    own, base = question_tables(records, plain), question_tables(plain, records)
    decode = own["decode_tokens"], own["decode_ms"] / 1e3
    plain_decode = base["decode_tokens"], base["decode_ms"] / 1e3
    return {
        "decode_tokens_per_second_interval": interval(decode, rate),
        "speedup_interval": interval([*decode, *plain_decode], rate_ratio),
        "end_to_end_speedup_interval": interval(
            [own["tokens"], own["wall_ms"], base["tokens"], base["wall_ms"]], rate_ratio
        ),
        "acceptance_rate_interval": interval([own["accepted"], own["drafted"]], rate),
        "tokens_per_verification_interval": interval([own["tokens"], own["verifications"]], rate),
    }


def _drafting(total: Statistics, num_layers: int) -> dict[str, Any]:
    """What drafting did; with nothing drafted the rates are None."""
    drafts = total.drafted_by_position[0] if total.drafted_by_position else 0
    checks, tokens = total.num_verifications, total.num_committed
    exits = total.tokens_by_exit
    # Each node of a tree runs each layer once, since verification goes on from where its draft ended.
    row_layers = total.num_row_layers or num_layers * (checks + total.num_drafted)
    return {
        "num_drafted": total.num_drafted,
        "num_accepted": total.num_accepted,
        "num_wasted": total.num_drafted - total.num_accepted,
        "wasted_per_token": (total.num_drafted - total.num_accepted) / tokens if tokens else None,
        "num_verifications": checks,
        "acceptance_rate": total.acceptance_rate if total.num_drafted else None,
        "tokens_per_verification": tokens / checks if checks else None,
        "tokens_per_verification_without_bonus": total.num_accepted / checks if checks else None,
        "draft_length": total.num_drafted / drafts if drafts else None,
        "acceptance_by_position": list(total.acceptance_by_position),
        "cumulative_acceptance_by_position": [n / drafts for n in total.accepted_by_position] if drafts else [],
        "tokens_by_exit": {str(layer): count for layer, count in exits.items()},
        "share_by_exit": {str(layer): count / tokens for layer, count in exits.items()} if tokens else {},
        "mean_exit_layer": _mean_exit(exits),
        "row_layers_per_token": row_layers / tokens if tokens else None,
        "gate_stops": total.gate_stops,
        "fallbacks": dict(total.fallbacks),
        "rounds_by_drafted": _named(total.rounds_by_drafted),
        "rounds_by_accepted": _named(total.rounds_by_accepted),
        "rounds_by_stops": _named(total.rounds_by_stops),
        "acceptance_by_entropy": [
            {"nats": bin * ENTROPY_BIN, "drafted": n, "accepted": total.accepted_by_entropy.get(bin, 0)}
            for bin, n in total.drafted_by_entropy.items()
        ],
    }


def _named(counts: Mapping[int, int]) -> dict[str, int]:
    return {str(key): count for key, count in counts.items()}


def matched(arms: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Gated drafting beside every fixed exit and length: DSSD's comparison (arXiv 2407.21082) at equal work verified.

    Args:
        arms: metrics by arm, of one task.

    Returns:
        For each `bare:` and `fixed:` arm, the `accuracy:` or `likely:` arm of the highest acceptance rate among those
        with at least as many tokens per verification (None where there is none), and the quotient of the acceptance
        rates.
        `frontier`: no other arm of its kind is as good in both.
    """
    drafted = {name: m for name, m in arms.items() if m.get("num_drafted")}
    gated = {name: m for name, m in drafted.items() if name.startswith(("accuracy:", "likely:"))}
    rows = []
    for name, own in drafted.items():
        kind = name.partition(":")[0]
        if kind not in ("bare", "fixed") or not gated:
            continue
        rivals = [m for other, m in drafted.items() if other.startswith(f"{kind}:") and other != name]
        enough = {g: m for g, m in gated.items() if _tau(m) >= _tau(own)}
        best = max(enough, key=lambda g: enough[g]["acceptance_rate"], default=None)
        rows.append(
            {
                "reference": name,
                "frontier": not any(_beats(rival, own) for rival in rivals),
                **_work(own),
                "gated": best,
                "gated_metrics": None if best is None else _work(gated[best]),
                "acceptance_ratio": None
                if best is None or not own["acceptance_rate"]
                else gated[best]["acceptance_rate"] / own["acceptance_rate"],
            }
        )
    return rows


def _tau(m: Mapping[str, Any]) -> float:
    return float(m["tokens_per_verification"])


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    pairs = [(_tau(one), _tau(other)), (one["acceptance_rate"], other["acceptance_rate"])]
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def _work(m: Mapping[str, Any]) -> dict[str, float]:
    return {
        "tokens_per_verification": _tau(m),
        "acceptance_rate": m["acceptance_rate"],
        "wasted_per_token": m["num_wasted"] / m["num_tokens"],
    }


def _mean_exit(exits: Mapping[int, int]) -> float | None:
    count = sum(exits.values())
    # Tokens from the text itself have executed no layer (exit -1).
    return sum(max(layer, 0) * n for layer, n in exits.items()) / count if count else None


def _rates(records: Sequence[Record]) -> dict[int, tuple[float, float]]:
    """repeat -> tokens per second of all its answers together, decode-only and end to end; none for untimed ones."""
    rates = {}
    for repeat in sorted({r.repeat for r in records if r.outcome.wall_ms}):
        own = [r.outcome for r in records if r.repeat == repeat]
        decode_ms, wall_ms = sum(o.decode_ms for o in own), sum(o.wall_ms for o in own)
        tokens, decode_tokens = sum(len(o.token_ids) for o in own), sum(o.decode_tokens for o in own)
        rates[repeat] = (
            1e3 * decode_tokens / decode_ms if decode_ms else 0.0,
            1e3 * tokens / wall_ms if wall_ms else 0.0,
        )
    return rates


def _worst_ratio(records: Sequence[Record], plain: Sequence[Record]) -> float | None:
    """The largest wall time of one answer over plain's, medians over the repeats."""
    worst = []
    for key in {(r.question.question_id, r.turn) for r in records}:
        own, base = (
            [r.outcome.wall_ms for r in part if (r.question.question_id, r.turn) == key] for part in (records, plain)
        )
        if any(own) and any(base):
            worst.append(statistics.median(own) / statistics.median(base))
    return max(worst) if worst else None


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def document(found: Measurements, arms: Sequence[Arm], num_layers: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, raw answers included, in types that strict JSON holds. `settings` says how it was measured."""
    others = [arm.name for arm in arms if not arm.lossless]
    summary = summarise(found.records, arms, num_layers)
    floor_ms = (settings.get("roofline") or {}).get("floor_ms")
    for by_arm in summary.values():
        for own in by_arm.values():
            speed = own["decode_tokens_per_second"]
            own["roofline_ratio"] = speed * floor_ms / 1e3 if speed and floor_ms else None
    whole = {
        "schema_version": SCHEMA_VERSION,
        **settings,
        "arms": {arm.name: arm.describe() for arm in arms},
        "interrupted": found.interrupted,
        "skipped_questions": found.skipped,
        "lossless": {
            "num_compared": found.num_compared,
            "num_different": len(found.divergences),
            "divergences": [vars(d) for d in found.divergences],
        },
        "problems": [
            *map(str, found.divergences),
            *_errors(found.records),
            *(f"arm {name} was left out: {error}" for name, error in found.failed.items()),
        ],
        "equal_to_plain": {name: list(agreement(found.records, name)) for name in others},
        "summary": summary,
        "contexts": by_context(found.records, arms, num_layers),
        "matched": {task: matched(by_arm) for task, by_arm in summary.items()},
        "answers": [_raw(record) for record in found.records],
    }
    return dict(strict(whole))


def _errors(records: Sequence[Record]) -> list[str]:
    """Requests that failed, in words."""
    return [
        f"arm {r.arm}, question {r.question.question_id}, turn {r.turn + 1}: the request failed: {r.outcome.error}"
        for r in records
        if r.outcome.error is not None
    ]


def _raw(record: Record) -> dict[str, Any]:
    outcome = record.outcome
    return {
        "arm": record.arm,
        "question_id": record.question.question_id,
        "category": record.question.category,
        "task": record.question.task,
        "turn": record.turn,
        "repeat": record.repeat,
        "prompt_tokens": record.prompt_tokens,
        "token_ids": outcome.token_ids,
        "wall_ms": outcome.wall_ms,
        "decode_ms": outcome.decode_ms,
        "decode_tokens": outcome.decode_tokens,
        "error": outcome.error,
        "session": record.session,
        "block_ms": [round(ms, 3) for ms, _ in outcome.blocks],
        "block_tokens": [count for _, count in outcome.blocks],
        "exit_layers": list(outcome.exit_layers),
        "joules": outcome.joules,
        "stats": None if outcome.stats is None else outcome.stats.to_dict(),
    }


def strict(value: Any) -> Any:
    """The same with every NaN and infinity replaced by None: JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return value
