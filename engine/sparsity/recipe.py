"""From a text file to a folder of thresholds: what `skipstone calibrate --sparsity tda` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...heads.fingerprint import BaseIdentity
from ..load import identity
from ..model import Decoder
from ..pretrained import load_pretrained
from .selection import MaskOptions
from .tda import Allocation, Budget, Tda, calibrate_tda, cut

TEXT_LENGTH = 256  # tokens of a calibration text; under a budget the first half of a text is its prompt
CALIBRATION_TEXTS, BUDGET_TEXTS = 8, 16


@dataclass(frozen=True)
class Recipe:
    """How to calibrate.

    Args:
        model: as `skipstone.load` takes it.
        text: a plain text file; thresholds are found on its first half, a budget is measured on its second.
        out: the folder to write; must not exist.
        cett, density, budget: the target, at most one; see `calibrate_tda`.
        allocation: what is the same in all layers under a budget.
        prior_tokens: how many tokens of a prompt the text's own strengths count for; 0: no prior.
        options: when neurons are skipped.
    """

    model: str
    text: Path
    out: Path
    cett: float | None = None
    density: float | None = None
    budget: Budget | None = None
    allocation: Allocation = "cett"
    prior_tokens: int = 0
    options: MaskOptions = field(default_factory=MaskOptions)


def follow(recipe: Recipe, dtype: torch.dtype, on_step: Callable[[str], None] = lambda note: None) -> dict[str, Any]:
    """Calibrate and write the folder.

    Returns:
        What was found, in JSON types.

    Raises:
        FileExistsError, FileNotFoundError: `out` exists, or the text does not.
        ValueError: the text is too short or the target cannot be kept.
    """
    decoder, base, first, second, start = read_halves(recipe.model, recipe.text, recipe.out, dtype)
    found = calibrate_tda(
        decoder,
        cut(first, TEXT_LENGTH, CALIBRATION_TEXTS, start),
        cett=recipe.cett,
        density=recipe.density,
        budget=recipe.budget,
        budget_texts=None if recipe.budget is None else cut(second, TEXT_LENGTH, BUDGET_TEXTS, start),
        allocation=recipe.allocation,
        prior_tokens=recipe.prior_tokens,
        options=recipe.options,
        base=base,
        on_step=on_step,
    )
    found.save(recipe.out)
    return {"folder": str(recipe.out), "model": recipe.model, **summary(found)}


def read_halves(
    model: str, text: Path, out: Path, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Decoder, BaseIdentity, list[int], list[int], list[int]]:
    """The model, who it is, the token ids of the text's two halves (to find thresholds on, and to judge them), and what
    every text begins with (BOS, or nothing).

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: there is no such text.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another folder")
    if not text.is_file():
        raise FileNotFoundError(f"no text at {text}; expected a plain text file")
    pretrained = load_pretrained(model, dtype)
    ids = pretrained.tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False)
    half = len(ids) // 2
    decoder = Decoder(pretrained.config, pretrained.weights, dtype, device)
    return decoder, identity(pretrained), ids[:half], ids[half:], pretrained.tokenizer.encode("")


def summary(tda: Tda) -> dict[str, Any]:
    """Thresholds in JSON types."""
    return {
        "cett": tda.cett,
        "density": tda.density,
        "prior_tokens": tda.prior_tokens,
        "options": vars(tda.options),
        "thresholds": [float(threshold) for threshold in tda.thresholds],
        "calibration": dict(tda.calibration),
    }
