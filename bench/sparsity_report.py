"""`skipstone sparsity report`: the whole model against settings that skip weights, in one JSON document.

Every setting reads the same windows of text (a prompt, read densely, then a continuation whose loss counts), answers
the same checkable questions and decodes the same prompt in turns with the others, so differences are paired; intervals
are bootstraps over windows or questions. GRIFFIN and a fixed pruning keep as many neurons as TDA was found to keep, the
same share in all layers. On long texts loss is reported by position, together with what a mask would be if the text so
far were read again.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.engine import Engine
from ..engine.generation import Generation
from ..engine.sparsity.quality import Quality
from ..engine.sparsity.tda import CettCurves, Tda, cut, measure_curves
from ..engine.sparsity.teal import Teal, TealLevel
from .early_exit import first_difference
from .environment import describe_device, versions
from .intervals import interval
from .sparsity import Windows, compare, decode_ms, inertia, uncertainty
from .sparsity_long import long_texts, rounded
from .sparsity_predictor import TokenTarget, about_tokens
from .sparsity_settings import (
    CALIBRATION_LENGTH,
    DENSE,
    TEAL_SHARE,
    WHOLE,
    Options,
    Setting,
    measure_settings,
    those_that_write,
)
from .tasks import Item, functions, maths

CLAIM_WINDOWS = 6  # their neurons are kept in memory, of every layer
MOST_NEURONS = 384  # of a layer, in the heat map
DECODED = 24  # tokens of a timed run
BATCH = 8  # questions answered side by side


def report(
    engine: Engine,
    text: Path,
    options: Options,
    teal: Teal | None = None,
    on_step: Callable[[str], None] = lambda note: None,
) -> dict[str, Any]:
    """Measure everything.

    Args:
        engine: plain: without heads, its target the whole model.
        text: a plain text file.
        teal: thresholds to compare beside uniform ones.

    Returns:
        The document, in JSON types, without its command.

    Raises:
        FileNotFoundError, ValueError: no such text, too short a text, or settings to write that are not measured.
    """
    start = time.perf_counter()
    decoder = engine.decoder
    if engine.tokenizer is None:
        raise ValueError("this model has no tokenizer, so it cannot read text")
    if not text.is_file():
        raise FileNotFoundError(f"no text at {text}; expected a plain text file")
    if decoder.device.type != "cpu" and (options.questions or options.repeats or options.long):
        raise ValueError(
            f"the model is on {decoder.device}, and settings decode on the CPU here: take device cpu, or read alone "
            "(--questions 0 --repeats 0 --long 0)"
        )
    content = text.read_text(encoding="utf-8")
    ids, begin = engine.tokenizer.encode(content, add_special_tokens=False), engine.tokenizer.encode("")
    front, back = ids[: len(ids) // 2], ids[len(ids) // 2 :]

    def texts(of: list[int], length: int, most: int) -> Tensor:
        return cut(of, length, most, begin).to(decoder.device)

    windows = Windows(texts(back, options.length, options.windows), options.prompt_len)
    on_step("calibrating")
    curves = measure_curves(decoder, texts(front, CALIBRATION_LENGTH, options.calibration_texts), levels=0)
    quantile_texts = texts(front, CALIBRATION_LENGTH, TEAL_SHARE * options.calibration_texts)
    predictor_texts = texts(front, CALIBRATION_LENGTH, options.predictor_texts)
    found = measure_settings(decoder, windows, options, curves, quantile_texts, predictor_texts, teal, on_step)
    dense = found[DENSE][1]
    if not math.isfinite(dense.perplexity):
        raise ValueError(f"the whole model's perplexity is {dense.perplexity}: nothing here means anything")
    rows = {name: _quality_row(setting, quality, dense) for name, (setting, quality) in found.items()}
    settings = [setting for setting, _ in found.values() if setting.decodes]
    writing = those_that_write(settings, options)
    if options.repeats:
        on_step("speed")
        _add_speed(rows, engine, settings, windows.texts[0, : options.prompt_len].tolist(), options.repeats)
    if options.questions:
        _add_tasks(rows, engine, writing, [*maths(options.questions), *functions(options.questions)], on_step)
    document: dict[str, Any] = {
        "kind": "skipstone sparsity report",
        "model": Path(engine.model_id).name if Path(engine.model_id).exists() else engine.model_id,
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "device": describe_device(decoder.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "text": {"name": text.name, "sha256": hashlib.sha256(content.encode()).hexdigest(), "tokens": len(ids)},
        "options": asdict(options),
        "scored_tokens": dense.losses.numel(),
        "settings": rows,
        "chosen": choose(rows, options.max_perplexity_increase),
    }
    by_token = {name: own.target for name, (own, _) in found.items() if isinstance(own.target, TokenTarget)}
    if by_token:
        on_step("masks of single tokens")
        document["tokens"] = about_tokens(decoder, windows, by_token, curves.fixed_strengths())
    middle = _middle(found)
    if options.claims and middle is not None:
        on_step("claims")
        setting, quality = middle
        some = Windows(windows.texts[:CLAIM_WINDOWS], windows.prompt_len)
        assert isinstance(setting.selection, Tda)
        document["heat_map"] = heat_map(setting.name, curves, quality)
        document["uncertainty"] = {
            "setting": setting.name,
            "masks": uncertainty(decoder, some, setting.selection, curves, WHOLE.read(decoder, some)),
        }
        document["inertia"] = inertia(decoder, some)
    if options.long:
        long = Windows(texts(back, options.prompt_len + options.long, options.long_texts), options.prompt_len)
        document["long"] = long_texts(engine, writing, long, on_step)
    document["seconds"] = round(time.perf_counter() - start)
    return document


def _quality_row(setting: Setting, quality: Quality, dense: Quality) -> dict[str, Any]:
    row = compare(quality, dense)
    if isinstance(setting.target, TealLevel):
        row["density"], row["density_by_layer"] = 1 - setting.target.level, None  # of weights, by construction
    agree = (quality.choices == dense.choices).double()
    return {
        "method": setting.method,
        "level": setting.level,
        **row,
        "greedy_agreement_95": _mean_interval(agree.mean(1).tolist()),
        "windows": {
            "nats": [round(float(own), 5) for own in quality.losses.double().mean(1)],
            "agreement": [round(float(own), 5) for own in agree.mean(1)],
        },
    }


def _mean_interval(values: Sequence[float], others: Sequence[float] | None = None) -> list[float] | None:
    """Of the mean of paired differences, or of the values alone."""
    own = np.array([values], dtype=float) - (0 if others is None else np.array([others], dtype=float))
    return interval([own], lambda sums: np.asarray(sums.mean(0) / own.shape[1]))


def _add_speed(
    rows: Mapping[str, dict[str, Any]], engine: Engine, settings: Sequence[Setting], prompt: list[int], repeats: int
) -> None:
    times: dict[str, list[float]] = {setting.name: [] for setting in settings}
    for repeat in range(repeats + 1):
        for setting in settings:
            setting.use(engine)
            ms = decode_ms(engine, prompt, DECODED)
            if repeat:  # the first warms up
                times[setting.name].append(round(ms, 3))
    WHOLE.use(engine)
    for name, own in times.items():
        ms = statistics.median(own)
        ratios = [base / mine for base, mine in zip(times[DENSE], own, strict=True)]
        rows[name] |= {
            "ms_per_token": own,
            "tokens_per_second": 1e3 / ms,
            "speedup": statistics.median(ratios),
            "speedup_range": [min(ratios), max(ratios)],
        }


def _add_tasks(
    rows: Mapping[str, dict[str, Any]],
    engine: Engine,
    settings: Sequence[Setting],
    items: Sequence[Item],
    on_step: Callable[[str], None],
) -> None:
    plain: list[Generation] = []
    for setting in settings:
        on_step(f"answering with {setting.name}")
        setting.use(engine)
        outs = _answers(engine, items)
        plain = plain or outs
        rows[setting.name]["tasks"] = {
            task: _task_row([pair for pair in zip(items, outs, plain, strict=True) if pair[0].task == task])
            for task in dict.fromkeys(item.task for item in items)
        }
    WHOLE.use(engine)


def _answers(engine: Engine, items: Sequence[Item]) -> list[Generation]:
    """One answer an item, in their order."""
    outs: dict[str, Generation] = {}
    for task in dict.fromkeys(item.task for item in items):
        own = [item for item in items if item.task == task]
        for first in range(0, len(own), BATCH):
            some = own[first : first + BATCH]
            found = engine.generate(
                [item.prompt for item in some], speculation=False, max_new_tokens=some[0].max_new_tokens,
                stop=some[0].stop,
            )  # fmt: skip
            outs |= {item.name: out for item, out in zip(some, found, strict=True)}
    return [outs[item.name] for item in items]


def _task_row(answers: Sequence[tuple[Item, Generation, Generation]]) -> dict[str, Any]:
    right, plain = (
        [item.right(outs[of].text, outs[of].finish_reason == "stop") for item, *outs in answers] for of in (0, 1)
    )
    firsts = [first_difference(out.token_ids, base.token_ids) for _, out, base in answers]
    places = [
        len(base.token_ids) if first is None else first for first, (_, _, base) in zip(firsts, answers, strict=True)
    ]
    return {
        "accuracy": statistics.fmean(right),
        "accuracy_95": _mean_interval(right),
        "difference": statistics.fmean(right) - statistics.fmean(plain),
        "difference_95": _mean_interval(right, plain),
        "same_answers": sum(first is None for first in firsts),
        "median_first_difference": statistics.median(places),  # of equal answers, their length
        "items": {
            "name": [item.name for item, _, _ in answers],
            "right": [int(one) for one in right],
            "first_difference": firsts,
            "num_tokens": [len(out.token_ids) for _, out, _ in answers],
        },
    }


def choose(rows: Mapping[str, Mapping[str, Any]], most: float) -> str | None:
    """The fastest setting whose perplexity is at most the share `most` above dense; None: nothing was timed."""
    timed = {name: row["speedup"] for name, row in rows.items() if "speedup" in row}
    within = {name: speed for name, speed in timed.items() if rows[name]["perplexity_increase"] <= most}
    return max(within, key=lambda name: within[name]) if within else None


def _middle(found: Mapping[str, tuple[Setting, Quality]]) -> tuple[Setting, Quality] | None:
    """TDA at its middle density."""
    own = sorted((pair for pair in found.values() if pair[0].method == "tda"), key=lambda pair: pair[0].level or 0)
    return own[len(own) // 2] if own else None


def heat_map(setting: str, curves: CettCurves, quality: Quality) -> dict[str, Any]:
    """Of at most `MOST_NEURONS` of each layer, evenly chosen: strength on the calibration text, as a multiple of the
    layer's mean, and the share of windows whose prompts keep the neuron."""
    strengths, kept = curves.fixed_strengths().cpu(), quality.kept
    size = strengths.shape[1]
    at = torch.arange(min(size, MOST_NEURONS)) * size // min(size, MOST_NEURONS)
    shares = [
        kept[layer].double().mean(0).cpu()[at] if layer in kept else torch.ones(len(at))
        for layer in range(quality.num_layers)
    ]
    return {
        "setting": setting,
        "neurons": at.tolist(),
        "strength": rounded((strengths / strengths.mean(1, keepdim=True))[:, at], 3),
        "kept": rounded(torch.stack(shares), 3),
    }
