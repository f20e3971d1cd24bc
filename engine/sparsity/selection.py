"""Which neurons a text keeps: TDA's thresholds, and GRIFFIN's and fixed pruning's top k beside them.

A selection sees the neurons of the text's tokens once, layer by layer, adds up one number a neuron, and ranks by it.
Everything is a function of the text's own tokens, so a sequence keeps the same neurons alone and in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ...kernels.kept import Kept

Layers = int | slice
Count = int | Tensor  # int `[]` or `[L]`
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


def sum_of_squares(neurons: Tensor) -> Tensor:
    """A `Selection.weigh`, and the only one that the fused kernels add up as they read a text
    (`kernels/neuron_squares.py`)."""
    return (neurons * neurons).sum(0)


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

    def rank(self, layers: Layers, weights: Tensor, num_tokens: int, norms: Tensor) -> tuple[Tensor, Count]:
        """A text's weights `[F]` and the neurons' `||W_down[:, i]||` `[F]` in one layer -> strengths `[F]`, how many to
        keep; or of a slice of layers, each with a dimension for them in front. A count may be one for all of them."""


def on_device(selection: Selection, device: torch.device) -> Selection:
    """The same selection with its tensors there, so that nobody who ranks by it waits for a copy."""
    own: Any = selection
    there = {name: value.to(device) for name, value in vars(own).items() if isinstance(value, Tensor)}
    return replace(own, **there) if any(there[name] is not vars(own)[name] for name in there) else selection


def keep_lists(selection: Selection, weights: Tensor, num_tokens: int, norms: Tensor) -> Kept:
    """What a text keeps in each layer, rising: a multiple of `round_to` neurons, or all, as layers below `first_dense`
    and texts below `min_tokens` do. The host does not wait for the device (see `on_device`).

    Args:
        weights: `[L, F]`, what `weigh` said of the text's tokens.
        num_tokens: how many these are.
        norms: fp32 `[L, F]`, ||W_down[:, i]||.
    """
    options, (num_layers, size) = selection.options, weights.shape
    strengths, count = selection.rank(slice(num_layers), weights, num_tokens, norms)
    dense = num_layers if num_tokens < options.min_tokens else options.first_dense
    if isinstance(count, Tensor):
        counts = count.to(weights.device).expand(num_layers)
    else:
        counts = torch.full((num_layers,), count, device=weights.device)
    return _lists(strengths, counts.index_fill(0, torch.arange(dense, device=weights.device), size), options.round_to)


def keep(selection: Selection, layer: int, weights: Tensor, num_tokens: int, norms: Tensor) -> Tensor:
    """The neurons to keep in one layer, long `[k]`, rising; from `[F]`, whatever `options` say of layers and texts."""
    strengths, count = selection.rank(layer, weights, num_tokens, norms)
    lists = _lists(strengths[None], torch.as_tensor(count, device=weights.device).view(1), selection.options.round_to)
    return lists.ids[0, : int(lists.count)].long()


def _lists(strengths: Tensor, counts: Tensor, step: int) -> Kept:
    """The strongest of each layer: `counts` `[L]`, rounded up to multiples of `step`; NaN first, ties to the lower."""
    size = strengths.shape[1]
    counts = (-(-counts.clamp(min=1) // step) * step).clamp(max=size)
    order = strengths.nan_to_num(torch.inf).argsort(descending=True, stable=True)
    beyond = torch.arange(size, device=counts.device) >= counts.unsqueeze(1)
    dropped = torch.empty_like(beyond).scatter_(1, order, beyond)
    return Kept(dropped.argsort(stable=True).int(), counts.int())


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

    def rank(self, layers: Layers, weights: Tensor, num_tokens: int, norms: Tensor) -> tuple[Tensor, Count]:
        return weights, _count(self.density, layers, weights.shape[-1])


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

    def rank(self, layers: Layers, weights: Tensor, num_tokens: int, norms: Tensor) -> tuple[Tensor, Count]:
        return self.strengths[layers].to(weights.device), _count(self.density, layers, weights.shape[-1])


def _check_density(density: float | Sequence[float]) -> None:
    values = [density] if isinstance(density, (int, float)) else list(density)
    wrong = [value for value in values if not 0 < value <= 1]
    if wrong or not values:
        raise ValueError(f"density is {wrong or values}, expected shares above 0 and at most 1")


def _num_layers(density: float | Sequence[float]) -> int | None:
    return None if isinstance(density, (int, float)) else len(density)


def _count(density: float | Sequence[float], layers: Layers, size: int) -> Count:
    share = density if isinstance(density, (int, float)) else density[layers]
    return round(share * size) if isinstance(share, (int, float)) else torch.tensor([round(s * size) for s in share])
