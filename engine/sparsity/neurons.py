"""Neurons of an MLP: how much each contributes, and an MLP of some of them only.

Neuron i of a layer adds `a_i * W_down[:, i]` to the MLP's output, with `a = act(gate x) * (up x)` in a gated MLP and
`a = act(up x)` in a plain one; the norm of that, `|a_i| * ||W_down[:, i]||`, is its output norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.linear import PackedLinear
from ..model import Decoder


def dense_weight(projection: PackedLinear) -> Tensor:
    """A projection's weight `[M, K]`, unpacked where it is packed."""
    return projection.weight.to_dense() if projection.packed else projection.weight


def down_norms(decoder: Decoder) -> list[Tensor]:
    """||W_down[:, i]|| of every neuron: for each layer `[F]` fp32."""
    return [dense_weight(layer.down).float().norm(dim=0) for layer in decoder.layers]


class ReducedMlp:
    """A layer's MLP with some of its neurons: their rows of gate and up, their columns of down, packed like any other
    projection, so that the others' weights are not read.

    Args:
        kept: neurons to keep, long `[k]`, rising.
    """

    def __init__(self, decoder: Decoder, index: int, kept: Tensor) -> None:
        layer, size = decoder.layers[index], decoder.config.intermediate_size
        rows = torch.cat([kept, kept + size]) if decoder.config.gated_mlp else kept
        self.num_neurons = len(kept)
        self._decoder = decoder
        bias = None if layer.up.bias is None else layer.up.bias[rows]
        self.up = PackedLinear(dense_weight(layer.up)[rows], bias)
        self.down = PackedLinear(dense_weight(layer.down)[:, kept].contiguous(), layer.down.bias)

    def __call__(self, normed: Tensor) -> Tensor:
        """Normed rows `[N, D]` fp32 -> `[N, D]`."""
        return self._decoder.from_neurons(self.down, self._decoder.neurons(self.up, normed))
