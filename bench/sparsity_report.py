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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.engine import Engine
from ..engine.sparsity.quality import Quality
from ..engine.sparsity.target import SparseTarget
from ..engine.sparsity.tda import CettCurves, Tda, cut, measure_curves
from ..engine.sparsity.teal import Teal, TealLevel
from ..engine.stopping import StopChecker
from .environment import describe_device, versions
from .sparsity import Windows, compare, decode_ms, inertia, uncertainty
from .sparsity_answers import against_masks, answers, mean_interval, task_rows
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
from .tasks import functions, maths

CLAIM_WINDOWS = 6  # their neurons are kept in memory, of every layer
MOST_NEURONS = 384  # of a layer, in the heat map
DECODED = {"cpu": 24, "cuda": 192}  # tokens of a timed run


def report(
    engine: Engine,
    text: Path,
    options: Options,
    teal: Teal | None = None,
    on_step: Callable[[str], None] = lambda note: None,
    save: Callable[[Mapping[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Measure everything.

    Args:
        engine: plain: without heads, its target the whole model.
        text: a plain text file.
        teal: thresholds to compare beside uniform ones.
        save: given the document as it stands, after each part.

    Returns:
        The document, in JSON types, without its command. `failed` names parts that went wrong, and how.

    Raises:
        FileNotFoundError, ValueError: no such text, too short a text, or settings to write that are not measured.
    """
    start = time.perf_counter()
    decoder, tokenizer = engine.decoder, engine.tokenizer
    if tokenizer is None:
        raise ValueError("this model has no tokenizer, so it cannot read text")
    if not text.is_file():
        raise FileNotFoundError(f"no text at {text}; expected a plain text file")
    content = text.read_text(encoding="utf-8")
    ids, begin = tokenizer.encode(content, add_special_tokens=False), tokenizer.encode("")
    front, back = ids[: len(ids) // 2], ids[len(ids) // 2 :]

    def texts(of: list[int], length: int, most: int) -> Tensor:
        return cut(of, length, most, begin).to(decoder.device)

    rows: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    document: dict[str, Any] = {
        "kind": "skipstone sparsity report",
        "model": Path(engine.model_id).name if Path(engine.model_id).exists() else engine.model_id,
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "device": describe_device(decoder.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "text": {"name": text.name, "sha256": hashlib.sha256(content.encode()).hexdigest(), "tokens": len(ids)},
        "options": asdict(options),
        "settings": rows,
        "failed": failed,
        "chosen": None,
    }

    @contextmanager
    def part(name: str) -> Iterator[None]:
        """What goes wrong in a part is written down, and the others go on."""
        on_step(name)
        try:
            yield
        except Exception as error:  # minutes of measuring must not be lost with it; the command ends with code 1
            failed[name] = f"{type(error).__name__}: {error}"
            on_step(f"{name} failed: {failed[name]}")
        document["seconds"] = round(time.perf_counter() - start)
        save(document)

    windows = Windows(texts(back, options.length, options.windows), options.prompt_len)
    on_step("calibrating")
    curves = measure_curves(decoder, texts(front, CALIBRATION_LENGTH, options.calibration_texts), levels=0)
    quantile_texts = texts(front, CALIBRATION_LENGTH, TEAL_SHARE * options.calibration_texts)
    predictor_texts = texts(front, CALIBRATION_LENGTH, options.predictor_texts)
    found: dict[str, tuple[Setting, Quality]] = {}
    with part("reading"):
        for setting, quality in measure_settings(
            decoder, windows, options, curves, quantile_texts, predictor_texts, teal, on_step
        ):
            found[setting.name] = setting, quality
            rows[setting.name] = _quality_row(setting, quality, found[DENSE][1])
            save(document)
    if DENSE not in rows or not math.isfinite(rows[DENSE]["perplexity"]):
        raise ValueError(f"the whole model cannot read this text, so nothing here means anything: {failed}")
    document["scored_tokens"] = found[DENSE][1].losses.numel()
    settings = [setting for setting, _ in found.values() if setting.decodes]
    writing = those_that_write(settings, options)
    if options.questions:
        items = [*maths(options.questions, level=options.difficulty), *functions(options.questions)]
        plain: list[StopChecker] = []
        for setting in writing:
            with part(f"answering with {setting.name}"):
                own = answers(decoder, tokenizer, setting, items)
                plain = own if setting.name == DENSE else plain
                rows[setting.name]["tasks"] = task_rows(items, own, plain)
    document["against"] = against_masks(rows)
    by_token = {name: own.target for name, (own, _) in found.items() if isinstance(own.target, TokenTarget)}
    if by_token:
        with part("masks of single tokens"):
            document["tokens"] = about_tokens(decoder, windows, by_token, curves.fixed_strengths())
    middle = _middle(found)
    if options.claims and middle is not None:
        setting, quality = middle
        with part("claims"):
            some = Windows(windows.texts[:CLAIM_WINDOWS], windows.prompt_len)
            assert isinstance(setting.selection, Tda)
            document["heat_map"] = heat_map(setting.name, curves, quality)
            document["uncertainty"] = {
                "setting": setting.name,
                "masks": uncertainty(decoder, some, setting.selection, curves, WHOLE.read(decoder, some)),
            }
            document["inertia"] = inertia(decoder, some)
    if options.long:
        with part("long texts"):
            long = Windows(texts(back, options.prompt_len + options.long, options.long_texts), options.prompt_len)
            document["long"] = long_texts(decoder, tokenizer, writing, long, on_step)
    if options.repeats:  # last: on a GPU the weights are stored another way from here on
        with part("speed"):
            _add_speed(rows, engine, settings, windows.texts[0, : options.prompt_len].tolist(), options.repeats)
            document["chosen"] = choose(rows, options.max_perplexity_increase)
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
        "greedy_agreement_95": mean_interval(agree.mean(1).tolist()),
        "windows": {
            "nats": [round(float(own), 5) for own in quality.losses.double().mean(1)],
            "agreement": [round(float(own), 5) for own in agree.mean(1)],
        },
    }


def _add_speed(
    rows: Mapping[str, dict[str, Any]], engine: Engine, settings: Sequence[Setting], prompt: list[int], repeats: int
) -> None:
    on_gpu = engine.decoder.device.type == "cuda"
    engines = {setting.name: engine for setting in settings}
    if on_gpu:  # weights by neuron and weights by channel are other copies, so each way has an engine of its own
        for kind in (SparseTarget, TealLevel):
            alike = [setting for setting in settings if isinstance(setting.target, kind)]
            if alike:
                target = alike[0].target if isinstance(alike[0].target, TealLevel) else alike[0].selection
                another = Engine(engine.decoder, engine.tokenizer, model_id=engine.model_id, sparsity=target)
                engines |= {setting.name: another for setting in alike}
    if on_gpu and any(own.fused is None for own in engines.values()):
        raise ValueError("the fused kernels are not in use here, so speeds would be those of the reference path")
    times: dict[str, list[float]] = {setting.name: [] for setting in settings}
    for repeat in range(repeats + 1):
        for setting in settings:
            setting.use(engines[setting.name])
            ms = decode_ms(engines[setting.name], prompt, DECODED[engine.decoder.device.type])
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
