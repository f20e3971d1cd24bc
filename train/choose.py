"""Which heads a run trains: given exits and options, filled up with what fits the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..engine.config import ModelConfig
from ..heads import HeadSpec
from .config import TrainConfig
from .measure import layer_options_of

# Shares of the model's depth. Early exits know little in small models (see docs/training.md), so late ones are closer.
EXITS_AT = (0.2, 0.4, 0.6, 0.7, 0.8)
TAPS_AT = (0.2, 0.6, 1.0)


def choose_heads(config: TrainConfig, sizes: ModelConfig) -> tuple[HeadSpec, ...]:
    """One spec an exit, ascending.

    Raises:
        ValueError: exits outside the model.
    """
    exits = default_exits(config.kind, sizes.num_layers) if config.exits is None else tuple(sorted(config.exits))
    if exits[-1] >= sizes.num_layers:
        raise ValueError(f"exits are {list(exits)}, expected below the model's {sizes.num_layers} layers")
    return tuple(
        HeadSpec(config.kind, layer, {**default_options(config.kind, layer, sizes), **config.options})
        for layer in exits
    )


def default_exits(kind: str, num_layers: int) -> tuple[int, ...]:
    """Exits by depth; a recurrent head drafts without trunk layers."""
    if kind == "recurrent":
        return (0,)
    return tuple(sorted({min(num_layers - 1, max(1, round(share * num_layers))) for share in EXITS_AT}))


def default_options(kind: str, layer: int, sizes: ModelConfig) -> Mapping[str, Any]:
    """Options of a head at one exit: layers of the base's sizes for those that have layers."""
    if kind not in ("block", "recurrent"):
        return {}
    like_base = layer_options_of(sizes)
    if kind == "block":
        return {**like_base, "source": layer}
    taps = sorted({max(1, round(share * sizes.num_layers)) for share in TAPS_AT})
    return {**like_base, "source": sizes.num_layers - 1, "taps": taps}
