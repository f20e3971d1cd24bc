"""Which neurons a text keeps: TDA's thresholds, and GRIFFIN's and fixed pruning's top k beside them.

A selection sees the neurons of the text's tokens once, layer by layer, adds up one number a neuron, and ranks by it.
Everything is a function of the text's own tokens, so a sequence keeps the same neurons alone and in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

ROUND_TO = 32  # kept neurons, so that reduced projections have few shapes and rows of whole vectors


@dataclass(frozen=True)
class MaskOptions:
    """When neurons are skipped, whatever selects them.

    Args:
        first_dense: layers at the bottom that keep all neurons.
        min_tokens: fewest tokens that a mask is read from (a prompt without its last token); shorter texts are dense.
        refresh: masks are read anew, from all tokens so far, when a multiple of this many tokens is committed; 0 keeps
            the prompt's to the end.
        round_to: kept neurons are rounded up to a multiple of this with the next strongest.
    """

    first_dense: int = 1
    min_tokens: int = 16
    refresh: int = 0
    round_to: int = ROUND_TO

    def __post_init__(self) -> None:
        for name, least in (("first_dense", 0), ("min_tokens", 1), ("refresh", 0), ("round_to", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}, expected an integer of at least {least}")


class Selection(Protocol):
    """How neurons are chosen. `name` is what `Engine.verify` reports; `num_layers` is None where any will do."""

    @property
    def name(self) -> str: ...

    @property
    def options(self) -> MaskOptions: ...

    @property
    def num_layers(self) -> int | None: ...

    def weigh(self, neurons: Tensor) -> Tensor:
        """Neurons `[n, F]` fp32 of n tokens -> `[F]`, a sum over the tokens: sums of parts of a text add up."""

    def rank(self, layer: int, weights: Tensor, num_tokens: int, norms: Tensor) -> tuple[Tensor, int]:
        """A text's weights `[F]` and the neurons' `||W_down[:, i]||` `[F]` -> strengths `[F]`, how many to keep."""


def keep(selection: Selection, layer: int, weights: Tensor, num_tokens: int, norms: Tensor) -> Tensor:
    """The neurons to keep, long `[k]`, rising; k is a multiple of `round_to`, or all neurons."""
    strengths, count = selection.rank(layer, weights, num_tokens, norms)
    step = selection.options.round_to
    count = min(len(strengths), -(-max(count, 1) // step) * step)
    order = strengths.nan_to_num(torch.inf).argsort(descending=True, stable=True)
    return order[:count].sort().values


@dataclass(frozen=True)
class Griffin:
    """GRIFFIN (arXiv 2404.01365, section 4): each token's neurons scaled to length 1, a neuron's strength is the norm
    over the prompt's tokens, the strongest `density` of them are kept.

    Args:
        density: kept share, of all layers or one for each.
    """

    density: float | Sequence[float]
    options: MaskOptions = MaskOptions()
    name: str = "griffin"

    def __post_init__(self) -> None:
        _check_density(self.density)

    @property
    def num_layers(self) -> int | None:
        return _num_layers(self.density)

    def weigh(self, neurons: Tensor) -> Tensor:
        squares = neurons * neurons
        return (squares / squares.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)).sum(0)

    def rank(self, layer: int, weights: Tensor, num_tokens: int, norms: Tensor) -> tuple[Tensor, int]:
        return weights, _count(self.density, layer, len(weights))


@dataclass(frozen=True, eq=False)
class Fixed:
    """One pruning for all texts: the strongest neurons of a calibration text.

    Args:
        strengths: `[L, F]`, larger is kept first.
        density: kept share, of all layers or one for each.
    """

    strengths: Tensor
    density: float | Sequence[float]
    options: MaskOptions = MaskOptions()
    name: str = "fixed"

    def __post_init__(self) -> None:
        _check_density(self.density)
        if _num_layers(self.density) not in (None, len(self.strengths)):
            raise ValueError(f"density has {_num_layers(self.density)} layers, strengths have {len(self.strengths)}")

    @property
    def num_layers(self) -> int | None:
        return len(self.strengths)

    def weigh(self, neurons: Tensor) -> Tensor:
        return neurons.new_zeros(neurons.shape[-1])

    def rank(self, layer: int, weights: Tensor, num_tokens: int, norms: Tensor) -> tuple[Tensor, int]:
        return self.strengths[layer], _count(self.density, layer, len(weights))


def _check_density(density: float | Sequence[float]) -> None:
    values = [density] if isinstance(density, (int, float)) else list(density)
    wrong = [value for value in values if not 0 < value <= 1]
    if wrong or not values:
        raise ValueError(f"density is {wrong or values}, expected shares above 0 and at most 1")


def _num_layers(density: float | Sequence[float]) -> int | None:
    return None if isinstance(density, (int, float)) else len(density)


def _count(density: float | Sequence[float], layer: int, size: int) -> int:
    share = density if isinstance(density, (int, float)) else density[layer]
    return round(share * size)
