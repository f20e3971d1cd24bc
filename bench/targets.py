"""Engines over the same weights that skip some of them: what stands behind % in an arm's name.

| target | what it is |
|---|---|
| `tda` | each sequence skips neurons by its prompt: shipped thresholds, or a folder's (lossy) |
| `tda:SHARE` | the same strengths, this share of every layer's neurons kept, no thresholds needed (lossy) |
| `teal[:LEVEL]` | every row drops small inputs (lossy) |
| `teal-draft[:LEVEL]` | only rows that draft do; verification runs these layers again, so the output does not change |
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from ..engine.engine import Engine
from ..engine.model import Decoder
from ..engine.sparsity.selection import Selection
from ..engine.sparsity.teal import Teal, TealLevel
from ..heads.head_set import HeadSet
from .sparsity import Strongest

FORMS = "tda[:SHARE], teal[:LEVEL], teal-draft[:LEVEL]"
LOSSY = ("tda", "teal")  # their text is not the whole model's
ThresholdsOf = Callable[[str], Any]  # "tda" -> Tda, "teal" -> Teal


def kind_of(target: str) -> str:
    """The kind of a target: "tda", "teal" or "teal-draft"; "" of the whole model."""
    return target.partition(":")[0]


def with_target(engine: Engine, heads: HeadSet | None, target: str, thresholds_of: ThresholdsOf) -> Engine:
    """A second engine over the same weights, with these heads and another target model or drafter.

    Args:
        engine: of the whole model.
        thresholds_of: reads the thresholds of "tda" or "teal".

    Raises:
        ValueError: a target that is unknown, or that this engine cannot have.
    """
    kind, _, number = target.partition(":")
    try:
        share = float(number) if number else None
    except ValueError:
        raise ValueError(f"target {target!r}: expected {FORMS}, e.g. tda:0.75") from None
    if kind not in (*LOSSY, "teal-draft"):
        raise ValueError(f"unknown target {target!r}; expected {FORMS}")
    if (engine.verify, engine.draft) != ("dense", "dense"):
        raise ValueError(f"target {target!r}: this engine's is {engine.verify!r} (drafts {engine.draft!r}) already")
    sparsity: Selection | TealLevel | None = None
    draft: TealLevel | None = None
    if kind == "tda":
        sparsity = thresholds_of("tda") if share is None else Strongest(share, name=f"tda {share:g}")
    else:
        teal: Teal = thresholds_of("teal")
        sparsity, draft = (teal.at(share), None) if kind == "teal" else (None, teal.at(share))
    return Engine(
        own_downs(engine.decoder) if kind == "tda" else engine.decoder, engine.tokenizer, heads,
        deterministic=engine.deterministic, model_id=engine.model_id, fused=engine.fused is not None,
        prefill="auto" if engine.prefill_option == "fused" else engine.prefill_option, sparsity=sparsity, draft=draft,
    )  # fmt: skip


def own_downs(decoder: Decoder) -> Decoder:
    """The same decoder with down projections of its own: fused TDA stores them another way, and the whole model's
    prompts, which a decoder reads, must keep their bits."""
    twin = copy.copy(decoder)
    twin.layers = [copy.copy(layer) for layer in decoder.layers]
    for layer in twin.layers:
        layer.down = copy.copy(layer.down)
    return twin
