"""A whole benchmark: arms, measurement, document."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..engine.engine import Engine
from .arms import Arm, default_arms, parse_arms
from .baselines import baseline_arms
from .early_exit import judged
from .environment import describe_device, versions
from .measure import measure
from .questions import Question
from .replay import replayed
from .report import document, strict


@dataclass(frozen=True)
class Settings:
    """How to measure; also recorded.

    Args:
        model, heads, prompts, command: for the record; model is also what baselines load.
        arms: see `arms.parse_arms`; None takes what the engine's heads allow.
        baselines: see `baselines.BASELINES`.
        repeats: how often every answer is written.
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


def run(engine: Engine, questions: Sequence[Question], settings: Settings, progress: bool = True) -> dict[str, Any]:
    """Measure and report; the document's `problems` is empty if every answer was right.

    Raises:
        ValueError: arms, baselines or settings that this engine cannot serve.
    """
    if engine.tokenizer is None:
        raise ValueError("this engine has no tokenizer, so it cannot read questions")
    if settings.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {settings.max_new_tokens}, expected at least 1: nothing would be measured")
    arms: list[Arm] = parse_arms(default_arms(engine) if settings.arms is None else settings.arms, engine)
    if settings.replay:
        if settings.temperature != 0.0:
            raise ValueError(f"--replay counts greedy decoding, temperature is {settings.temperature}: leave one out")
        arms = replayed(arms, engine)
    arms += baseline_arms(settings.baselines, settings.model, engine)
    sampling = {
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "seed": settings.seed,
    }
    total = settings.repeats * len(arms) * sum(len(question.turns) for question in questions)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True)
    shown: AbstractContextManager[Any] = bar if progress and console.is_terminal else nullcontext()
    with shown:
        task = bar.add_task("warming up", total=total)
        found = measure(
            arms,
            questions,
            engine.tokenizer,
            sampling,
            repeats=settings.repeats,
            max_context=engine.decoder.config.max_context,
            on_step=lambda step: bar.update(task, advance=1, description=step),
        )
    if not found.records and not found.interrupted:
        raise ValueError(
            f"no question fits: with max_new_tokens {settings.max_new_tokens}, prompts may have at most "
            f"{engine.decoder.config.max_context - settings.max_new_tokens} tokens"
        )
    about = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **asdict(settings),
        "baselines": list(settings.baselines),
        "num_questions": len(questions),
        "dtype": str(engine.decoder.dtype).removeprefix("torch."),
        "device": describe_device(engine.decoder.device),
        "threads": torch.get_num_threads(),
        "deterministic": engine.deterministic,
        "verify": engine.verify,
        "draft": engine.draft,
        "versions": versions(),
    }
    early_exit = judged(engine, found, arms, questions, engine.tokenizer, sampling)
    return document(found, arms, engine.decoder.config.num_layers, about) | strict({"early_exit": early_exit})
