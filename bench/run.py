"""A whole benchmark: arms, measurement, document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..engine.engine import Engine
from ..engine.load import load_heads
from .arms import Arm, default_arms, parse_arms
from .baselines import baseline_arms
from .contexts import at_contexts
from .device_time import read_bandwidth
from .early_exit import judged
from .environment import describe_device, versions
from .journal import Journal
from .measure import measure
from .questions import Question
from .replay import replayed
from .report import document, strict
from .sample import sample
from .shapes import weight_bytes


@dataclass(frozen=True)
class Settings:
    """How to measure; also recorded.

    Args:
        model, heads, prompts, command: for the record; model is also what baselines load.
        arms: see `arms.parse_arms`; None takes what the engine's heads allow.
        baselines: see `baselines.BASELINES`.
        repeats: how often every answer is written.
        context: prompt lengths in tokens, in place of the questions' own (`contexts.at_contexts`).
        note: on the circumstances, for the record.
        replay: count `fixed:` and `bare:` arms from one plain run (see `replay`) in place of running them.
    """

    model: str
    heads: str = "default"
    prompts: str = "built-in"
    command: str = ""
    arms: str | None = None
    baselines: tuple[str, ...] = ()
    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    repeats: int = 3
    replay: bool = False
    context: tuple[int, ...] = ()
    note: str = ""


def run(
    engine: Engine,
    questions: Sequence[Question],
    settings: Settings,
    progress: bool = True,
    journal: Path | None = None,
) -> dict[str, Any]:
    """Measure and report; the document's `problems` is empty if every answer was right.

    Args:
        journal: a file that keeps every answer; what it holds already is not measured again.

    Raises:
        ValueError: arms, baselines or settings that this engine cannot serve.
    """
    if engine.tokenizer is None:
        raise ValueError("this engine has no tokenizer, so it cannot read questions")
    if settings.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {settings.max_new_tokens}, expected at least 1: nothing would be measured")
    wanted = default_arms(engine) if settings.arms is None else settings.arms
    heads_of = partial(load_heads, settings.model, dtype=engine.decoder.dtype)
    arms: list[Arm] = parse_arms(wanted, engine, heads_of)
    if settings.replay:
        if settings.temperature != 0.0:
            raise ValueError(f"--replay counts greedy decoding, temperature is {settings.temperature}: leave one out")
        arms = replayed(arms, engine)
    arms += baseline_arms(settings.baselines, settings.model, engine)
    sampling: dict[str, Any] = {
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "seed": settings.seed,
    }
    max_context = engine.decoder.config.max_context
    if settings.context:
        if max(settings.context) > max_context:
            raise ValueError(f"context {max(settings.context)} is more than the {max_context} tokens of this model")
        questions = at_contexts(questions, settings.context, engine.tokenizer, max_context - settings.max_new_tokens)
        if not questions:
            raise ValueError(f"no question is short enough for a prompt of {min(settings.context)} tokens")
    about = {
        **asdict(settings),
        "baselines": list(settings.baselines),
        "context": list(settings.context),
        "num_questions": len(questions),
        "dtype": str(engine.decoder.dtype).removeprefix("torch."),
        "device": describe_device(engine.decoder.device),
        "threads": torch.get_num_threads(),
        "deterministic": engine.deterministic,
        "verify": engine.verify,
        "draft": engine.draft,
        "versions": versions(),
    }
    kept = None if journal is None else Journal(journal, _conditions(about, questions))
    total = settings.repeats * len(arms) * sum(len(question.turns) for question in questions)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True)
    warm_up_s = None if engine.fused is None else round(engine.warm_up(**sampling), 2)
    shown: AbstractContextManager[Any] = bar if progress and console.is_terminal else nullcontext()
    with shown:
        task = bar.add_task("warming up", total=total)
        found = measure(
            arms,
            questions,
            engine.tokenizer,
            sampling,
            repeats=settings.repeats,
            max_context=max_context,
            journal=kept,
            on_step=lambda step: bar.update(task, advance=1, description=step),
        )
    if not found.records and not found.interrupted:
        raise ValueError(
            f"no question fits: with max_new_tokens {settings.max_new_tokens}, prompts may have at most "
            f"{max_context - settings.max_new_tokens} tokens"
        )
    if kept is not None:
        kept.close()
    num_bytes, speed = weight_bytes(engine.decoder.config, engine.decoder.dtype.itemsize), 0.0
    if not found.interrupted:
        speed = read_bandwidth(engine.decoder.device)
    about |= {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "sessions": 1 if kept is None else kept.session,
        "num_resumed": 0 if kept is None else kept.num_found,
        "roofline": {"weight_bytes": num_bytes, "bandwidth_gb_s": speed, "floor_ms": num_bytes / speed / 1e6}
        if speed
        else None,
        "warm_up_s": warm_up_s,
    }
    early_exit = judged(engine, found, arms, questions, engine.tokenizer, sampling)
    example = {} if found.interrupted else sample(arms, questions[0], engine.tokenizer, sampling)
    whole = document(found, arms, engine.decoder.config.num_layers, about)
    return whole | strict({"early_exit": early_exit, "sample": example})


def _conditions(about: Mapping[str, Any], questions: Sequence[Question]) -> dict[str, Any]:
    """What must be the same for answers to stand in one table."""
    names = ("model", "heads", "dtype", "threads", "deterministic", "verify", "draft", "versions", "max_new_tokens")
    asked = sha256(repr([(q.question_id, q.turns) for q in questions]).encode()).hexdigest()[:16]
    kept = {name: about[name] for name in (*names, "temperature", "seed", "replay")}
    return kept | {"device": about["device"]["name"], "questions": asked}
