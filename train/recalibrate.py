"""Measuring a stored head set again: `skipstone calibrate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..heads import Calibration, HeadSet, head_kinds, shipped_folder_for, store_calibration
from ..heads.calibration import CURVE_LEVEL
from .calibrate import DRAFT_LEVEL, NEW_TOKENS, NUM_PROMPTS, calibrate, measuring_engine
from .data import encode_chat, evenly, is_held_out, read_prompts
from .run import device_type, load_base

SHOWN_LEVELS = (0.60, 0.75, 0.90, 0.95)
HELD_OUT_PERCENT = 3.0
SHIPPED = ("default", *head_kinds())  # names of shipped sets; their folder is not written


@dataclass(frozen=True)
class Settings:
    """What to measure and where to keep it.

    Args:
        model: as for `skipstone.load`.
        heads: a head set's folder, or "default" or a kind for the shipped one.
        prompts: see `data.read_prompts`.
        out: folder to write; None replaces `heads`, and writes nothing for "default".
        max_prompts: so many are taken, evenly over the file.
        max_prompt_tokens: longer ones are left out.
        held_out_percent: share of the prompts, by hash, that training left out; None takes what the set's own record
            says, else 3. Give 100 for a file that training never read.
        max_new_tokens, accuracy, batch: see `calibrate.calibrate`.
    """

    model: str
    heads: str
    prompts: str
    out: str | None = None
    max_prompts: int = NUM_PROMPTS
    max_prompt_tokens: int = 2048
    max_new_tokens: int = NEW_TOKENS
    held_out_percent: float | None = None
    accuracy: float = DRAFT_LEVEL
    batch: int | None = None
    device: str | None = None
    dtype: torch.dtype = torch.bfloat16
    progress: bool = True

    def __post_init__(self) -> None:
        if self.max_prompts < 1 or self.max_new_tokens < 1:
            raise ValueError(f"max_prompts {self.max_prompts} and max_new_tokens {self.max_new_tokens}: at least 1")
        if self.held_out_percent is not None and not 0 < self.held_out_percent <= 100:
            raise ValueError(f"held_out_percent is {self.held_out_percent}, expected above 0, at most 100")
        if self.out is not None and Path(self.out).exists() and Path(self.out).resolve() != Path(self.heads).resolve():
            raise FileExistsError(f"{self.out} exists; choose another folder")


@dataclass(frozen=True)
class Recalibrated:
    """What was measured. `on_true_prefixes` is fitted to the tokens whose whole prefix the full model wrote: what
    calibration on ready text would have said. `folder` is None where nothing was written."""

    calibration: Calibration
    on_true_prefixes: Calibration
    folder: Path | None

    def summary(self) -> dict[str, Any]:
        """The numbers to look at first, in types that JSON holds."""
        exits = {}
        for layer, e in sorted(self.calibration.exits.items()):
            true = self.on_true_prefixes.exits[layer]
            reached = {name: s.auroc_reached for name, s in e.separation.items()}
            exits[str(layer)] = {
                "num_tokens": e.num_tokens,
                "agreement": e.agreement,
                "true_prefix_agreement": e.true_prefix_agreement,
                "auroc": {name: s.auroc for name, s in e.separation.items()},
                "auroc_reached": reached,
                "best_measure": max(reached, key=lambda name: reached[name]),
                "coverage": {name: s.curve.coverage_at(CURVE_LEVEL) for name, s in e.separation.items()},
                "confidence_error": None if e.reliability is None else e.reliability.error,
                "thresholds": {f"{a:.2f}": e.gates[a].low for a in SHOWN_LEVELS},
                "thresholds_on_true_prefixes": {f"{a:.2f}": true.gates[a].low for a in SHOWN_LEVELS},
            }
        calibration = self.calibration
        return {
            "source": calibration.source,
            "num_drafted": calibration.num_drafted,
            "num_off_path": calibration.num_off_path,
            "folder": None if self.folder is None else str(self.folder),
            "exits": exits,
        }


def recalibrate(settings: Settings) -> Recalibrated:
    """Measure a head set on held-out prompts and store its calibration.

    Raises:
        ValueError, OSError: no held-out prompt, no such set, heads of another base.
    """
    texts = read_prompts(settings.prompts)
    base = load_base(settings.model, settings.dtype, device_type(settings.device), settings.progress)
    folder: Path | None = Path(settings.heads)
    if settings.heads in SHIPPED:
        folder = shipped_folder_for(base.identity, kind=settings.heads)
    if folder is None or not folder.is_dir():
        raise ValueError(
            f"no head set at {settings.heads!r} for {settings.model}: expected a folder with manifest.json"
        )
    heads = HeadSet.load(folder, base.identity, calibrated=False)
    percent = settings.held_out_percent or _recorded_percent(heads)
    prompts = [encode_chat(base.tokenizer, text) for text in texts if percent == 100 or is_held_out(text, percent)]
    room = min(settings.max_prompt_tokens, base.decoder.config.max_context - settings.max_new_tokens)
    prompts = evenly([ids for ids in prompts if 0 < len(ids) <= room], settings.max_prompts)
    if not prompts:
        raise ValueError(
            f"none of {len(texts)} prompts is in the held-out {percent:g} percent and has at most {room} tokens: give "
            "more, or --held-out-percent 100 if training never read this file"
        )
    engine = measuring_engine(base.decoder, heads)
    found, calibration = calibrate(
        engine, prompts, stop_ids=base.tokenizer.stop_ids, max_new_tokens=settings.max_new_tokens,
        accuracy=settings.accuracy, batch=settings.batch, progress=settings.progress,
    )  # fmt: skip
    target = _target(settings, folder)
    if target is not None:
        store_calibration(folder, calibration, target)
    return Recalibrated(calibration, found.fit(true_prefixes_only=True), target)


def _recorded_percent(heads: HeadSet) -> float:
    """The held-out share that the training command recorded."""
    config = heads.config.training.get("config")
    return float(config.get("held_out_percent", HELD_OUT_PERCENT)) if isinstance(config, dict) else HELD_OUT_PERCENT


def _target(settings: Settings, folder: Path) -> Path | None:
    if settings.out is not None:
        return Path(settings.out)
    return None if settings.heads in SHIPPED else folder
