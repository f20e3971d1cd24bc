"""A whole benchmark: arms, measurement, document."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..engine.engine import Engine
from ..engine.load import load_heads, load_tda, load_teal, shipped_kinds
from ..engine.workspace import MOST_ROUNDS
from ..heads.head_set import HeadSet
from .all_arms import all_arms, is_slow
from .arms import Arm, EngineArm, default_arms, parse_arms
from .baselines import baseline_arms
from .contexts import at_contexts
from .device_time import read_bandwidth
from .early_exit import judged
from .environment import describe_device, versions
from .journal import Journal
from .measure import measure, now_and_then
from .questions import Question, choose
from .replay import replayed
from .report import document, strict
from .sample import sample
from .shapes import weight_bytes

ALL = "all"


@dataclass(frozen=True)
class Settings:
    """How to measure; also recorded.

    Args:
        model, heads, prompts, command: for the record; model is also what baselines load.
        arms: see `arms.parse_arms`; None takes what the engine's heads allow, "all" everything that makes sense
            (`all_arms.all_arms`).
        baselines: see `baselines.BASELINES`.
        baseline_limit: questions, evenly over the tasks, that slow arms answer (`all_arms.is_slow`); None: all.
        batch: questions that arms of our engine answer side by side.
        sparsity, teal: folders of thresholds, for arms with %tda (None: the shipped ones) and %teal.
        repeats: how often every answer is written.
        context: prompt lengths in tokens, in place of the questions' own (`contexts.at_contexts`).
        minutes: after which no further question is begun; None: no limit.
        note: on the circumstances, for the record.
        replay: count `fixed:` and `bare:` arms from one plain run (see `replay`) in place of running them.
    """

    model: str
    heads: str = "default"
    prompts: str = "built-in"
    command: str = ""
    arms: str | None = None
    baselines: tuple[str, ...] = ()
    baseline_limit: int | None = None
    batch: int = 1
    sparsity: str | None = None
    teal: str | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    repeats: int = 3
    replay: bool = False
    context: tuple[int, ...] = ()
    minutes: float | None = None
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
    if settings.batch < 1 or (settings.batch > 1 and (settings.baselines or settings.replay)):
        raise ValueError(
            f"batch is {settings.batch}: expected at least 1, and no baselines or replay beside more, which answer one "
            "question at a time"
        )
    arms, thresholds = _arms(engine, settings)
    if progress and _names_all(settings.arms or ""):
        Console(stderr=True, highlight=False).print(f"arms: {', '.join(arm.name for arm in arms)}", markup=False)
    for arm in arms:
        if isinstance(arm, EngineArm):
            arm.batch = settings.batch
    if settings.batch > 1:
        arms.insert(1, EngineArm("solo", engine, speculation=False, alone=True))
    if settings.replay:
        if settings.temperature != 0.0:
            raise ValueError(f"--replay counts greedy decoding, temperature is {settings.temperature}: leave one out")
        arms = replayed(arms, engine)
    arms += baseline_arms(settings.baselines, settings.model, engine)
    for own in {id(arm.engine): arm.engine for arm in arms if isinstance(arm, EngineArm)}.values():
        own.workspace.most_rounds = len(arms) * MOST_ROUNDS  # captured again at each turn otherwise
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
    slow = frozenset(q.question_id for q in choose(questions, limit=settings.baseline_limit))
    only = {} if settings.baseline_limit is None else {arm.name: slow for arm in arms if is_slow(arm)}
    about = {
        **asdict(settings),
        "baselines": list(settings.baselines),
        "context": list(settings.context),
        "sparsity": _name(settings.sparsity),
        "teal": _name(settings.teal),
        "thresholds": thresholds,
        "limited_arms": sorted(only),
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
    turns = {question.question_id: len(question.turns) for question in questions}
    deadline = math.inf if settings.minutes is None else time.monotonic() + 60 * settings.minutes
    total = len(arms) + settings.repeats * sum(turns[one] for arm in arms for one in only.get(arm.name, turns))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True)
    warm_up_s = None if engine.fused is None else round(engine.warm_up(settings.batch, **sampling), 2)
    shown: AbstractContextManager[Any] = bar if progress and console.is_terminal else nullcontext()
    line = now_and_then(total)

    def on_step(step: str) -> None:
        bar.update(task, advance=1, description=step)
        if progress and not console.is_terminal:
            line(step)

    with shown:
        task = bar.add_task("warming up", total=total)
        found = measure(
            arms,
            questions,
            engine.tokenizer,
            sampling,
            repeats=settings.repeats,
            max_context=max_context,
            batch=settings.batch,
            only=only,
            journal=kept,
            deadline=deadline,
            on_step=on_step,
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
    if progress:
        print("measured; lossy texts are judged, one answer of each arm is drawn", file=sys.stderr, flush=True)
    lossy = judged(engine, found, arms, questions, engine.tokenizer, sampling)
    example = (
        {}
        if found.interrupted
        else sample([arm for arm in arms if arm.name not in found.failed], questions[0], engine.tokenizer, sampling)
    )
    whole = document(found, arms, engine.decoder.config.num_layers, about)
    failed = [f"arm {name} has no sample: {error}" for name, error in example.get("failed", {}).items()]
    whole["problems"] += failed
    return whole | strict({"lossy": lossy, "sample": example})


def _arms(engine: Engine, settings: Settings) -> tuple[list[Arm], dict[str, str]]:
    """The arms, and digests of the thresholds that they use by kind."""
    model, dtype = settings.model, engine.decoder.dtype
    digests: dict[str, str] = {}

    @cache
    def heads_of(name: str) -> HeadSet:
        return load_heads(model, name, dtype)

    @cache
    def thresholds_of(kind: str) -> Any:
        found: Any
        if kind == "tda":
            found = load_tda(model, settings.sparsity, dtype)
        elif settings.teal is not None:
            found = load_teal(model, settings.teal, dtype)
        else:
            raise ValueError("arms with %teal need thresholds: give --teal, a folder of calibrate --sparsity teal")
        digests[kind] = sha256(found.thresholds.numpy().tobytes()).hexdigest()[:16]
        return found

    wanted = default_arms(engine) if settings.arms is None else settings.arms
    if _names_all(wanted):
        own = set() if engine.heads is None else {spec.kind for spec in engine.heads.config.heads}
        shipped = shipped_kinds(model, dtype)
        others = {kind: heads_of(kind) for kind in shipped if kind not in (*own, "tda")}
        given = {"tda": settings.sparsity is not None or "tda" in shipped, "teal": settings.teal is not None}
        every = all_arms(engine, others, [kind for kind, known in given.items() if known])
        wanted = ",".join(every if part.strip() == ALL else part for part in wanted.split(","))
    arms = parse_arms(wanted, engine, heads_of, thresholds_of)
    used = {"sparsity": "tda", "teal": "teal"}
    unused = [name for name, kind in used.items() if getattr(settings, name) is not None and kind not in digests]
    if unused:
        raise ValueError(f"no arm uses --{unused[0]}: name one, e.g. plain%{used[unused[0]]}")
    return arms, digests


def _names_all(arms: str) -> bool:
    return ALL in map(str.strip, arms.split(","))


def _name(path: str | None) -> str | None:
    """Of a folder, without this machine's way to it."""
    return None if path is None else Path(path).name


def _conditions(about: Mapping[str, Any], questions: Sequence[Question]) -> dict[str, Any]:
    """What must be the same for answers to stand in one table."""
    names = ("model", "heads", "dtype", "threads", "deterministic", "verify", "draft", "versions", "max_new_tokens")
    asked = sha256(repr([(q.question_id, q.turns) for q in questions]).encode()).hexdigest()[:16]
    kept = {name: about[name] for name in (*names, "temperature", "seed", "replay", "batch", "thresholds")}
    return kept | {"device": about["device"]["name"], "questions": asked}
