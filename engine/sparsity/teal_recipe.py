"""From a text file to a folder of thresholds: what `skipstone calibrate --sparsity teal` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .recipe import BUDGET_TEXTS, TEXT_LENGTH, read_halves
from .tda import Budget, cut
from .teal import DENSE_TOKENS, LEVELS, Allocation, Teal, calibrate_teal

QUANTILE_TEXTS = 32  # of TEXT_LENGTH tokens
ERROR_TEXTS, ERROR_LENGTH = 4, 128  # what the greedy allocation runs a layer on, some 150 times


@dataclass(frozen=True)
class TealRecipe:
    """How to calibrate.

    Args:
        model: as `skipstone.load` takes it.
        text: a plain text file; thresholds are found on its first half, each level's loss is measured on its second.
        out: the folder to write; must not exist.
        levels, allocation, dense_tokens, budget: see `calibrate_teal`.
        device: where the model runs.
    """

    model: str
    text: Path
    out: Path
    levels: Sequence[float] = LEVELS
    allocation: Allocation = "greedy"
    dense_tokens: int = DENSE_TOKENS
    budget: Budget | None = None
    device: str = "cpu"


def follow(recipe: TealRecipe, dtype: torch.dtype, on_step: Callable[[str], None] = lambda note: None) -> Teal:
    """Calibrate and write the folder.

    Raises:
        FileExistsError, FileNotFoundError: `out` exists, or the text does not.
        ValueError: the text is too short or the budget cannot be kept.
    """
    decoder, base, first, second, start = read_halves(recipe.model, recipe.text, recipe.out, dtype, recipe.device)

    def texts(part: list[int], length: int, most: int) -> Tensor:
        return cut(part, length, most, start).to(decoder.device)

    found = calibrate_teal(
        decoder,
        texts(first, TEXT_LENGTH, QUANTILE_TEXTS),
        levels=recipe.levels,
        allocation=recipe.allocation,
        error_texts=texts(first, ERROR_LENGTH, ERROR_TEXTS),
        budget=recipe.budget,
        budget_texts=texts(second, TEXT_LENGTH, BUDGET_TEXTS),
        dense_tokens=recipe.dense_tokens,
        base=base,
        on_step=on_step,
    )
    found.save(recipe.out)
    return found


def summary(teal: Teal) -> dict[str, Any]:
    """What was found, in JSON types: by level the mean sparsity of each projection, and its loss."""
    names = teal.calibration["projections"]
    return {
        "levels": list(teal.levels),
        "allocation": teal.allocation,
        "dense_tokens": teal.dense_tokens,
        "default": teal.default,
        "sparsities": [
            dict(zip(names, (round(float(s), 4) for s in own.mean(0)), strict=True)) for own in teal.sparsities
        ],
        "calibration": dict(teal.calibration),
    }
