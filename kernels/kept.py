"""Which neurons of an MLP each tile of 16 rows uses, in device memory at addresses that never change (TDA).

Data only: one captured step serves every list and every count. A tile's rows are of one sequence, because the order of
a row's sums follows its tile's list (design rule 9: masks are per sequence, never a union). Inner activations are
compact: place i holds the i-th kept neuron.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ZEROS = 16  # an activation is zero from its tile's count to the next multiple of this


@dataclass(frozen=True)
class Kept:
    """Of one layer, by tile of rows; or of one tile, by layer.

    Attributes:
        ids: int32 `[T, FF]`, the neurons of each; what stands beyond the count is never used.
        count: int32 `[T]`, at least 1.
    """

    ids: Tensor
    count: Tensor


class KeptNeurons:
    """Of all layers of a step: every neuron, until a tile is told otherwise."""

    def __init__(self, num_layers: int, num_tiles: int, num_neurons: int, device: torch.device | str) -> None:
        self._all = torch.arange(num_neurons, dtype=torch.int32, device=device)
        self.ids = self._all.repeat(num_layers, num_tiles, 1)
        self.count = torch.full((num_layers, num_tiles), num_neurons, dtype=torch.int32, device=device)
        self.layers = [Kept(ids, count) for ids, count in zip(self.ids, self.count, strict=True)]

    def keep(self, tile: int, kept: Mapping[int, Tensor]) -> None:
        """Set a tile's neurons for the launches to come.

        Args:
            kept: by layer, integers `[k]`; layers that are left out keep all neurons.

        Raises:
            ValueError: a layer that keeps none, or more than there are.
        """
        num_neurons = len(self._all)
        counts = [num_neurons] * len(self.layers)
        lists = self._all.repeat(len(self.layers), 1)
        for layer, own in kept.items():
            if not 1 <= len(own) <= num_neurons:
                raise ValueError(f"layer {layer} keeps {len(own)} neurons, expected 1 to {num_neurons}")
            counts[layer] = len(own)
            lists[layer, : len(own)] = own
        self.copy(tile, Kept(lists, torch.tensor(counts, dtype=torch.int32)))

    def copy(self, tile: int, kept: Kept) -> None:
        """As `keep`, from a list of every layer, without waiting for what is on the device."""
        self.ids[:, tile].copy_(kept.ids)
        self.count[:, tile].copy_(kept.count)
