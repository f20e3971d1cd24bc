"""A frozen base too large for one device: its layers' matrices lie spread over the processes (FSDP2).

A process keeps its part of every layer, gathers one layer's matrices when that layer runs, and drops them when the next
one is asked for. Embedding, LM head and norms are whole everywhere. Gathering is done by all processes together, so
all must run the same layers in the same order: `encode` does, writing text, whose length differs, does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ..engine.config import ModelConfig
from ..engine.model import Decoder, Layer
from .distributed import Ranks

MATRICES = ("qkv", "o", "up", "down")


class ShardedDecoder(Decoder):
    """A decoder for `encode` whose layers are gathered one at a time.

    Args:
        config, weights, dtype, device: as for `Decoder`; the weights may lie on the CPU, whole, in every process.
        ranks: the processes among which the layers are spread.
    """

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype, device: str, ranks: Ranks
    ) -> None:
        # Everything but the layers, by way of a model of one layer.
        first = {name: t for name, t in weights.items() if not name.startswith("layers.") or _is_of(name, 0)}
        one = replace(config, num_layers=1, ropes=config.ropes[:1], windows=config.windows[:1])
        super().__init__(one, first, dtype, device)
        self.config = config
        self.layers = cast(list[Layer], ShardedLayers(config, weights, dtype, self.device, ranks))


class ShardedLayers:
    """Stands for `Decoder.layers`: indexing gathers a layer and lets go of the one before."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        mesh = init_device_mesh(device.type, (ranks.size,))
        self._layers: list[Layer] = []
        self._parts: list[_Matrices] = []
        self._nothing = torch.empty(0, dtype=dtype, device=device)
        self._open: int | None = None
        for index in range(config.num_layers):
            own = {name: t.to(device, dtype) for name, t in weights.items() if _is_of(name, index)}
            part = _Matrices({name: own[f"layers.{index}.{name}.weight"] for name in MATRICES})
            self._parts.append(cast(_Matrices, fully_shard(part, mesh=mesh)))
            self._layers.append(Layer(config, own, index))
            self._let_go(index)

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: int) -> Layer:
        if index != self._open:
            if self._open is not None:
                cast(FSDPModule, self._parts[self._open]).reshard()
                self._let_go(self._open)
            part = self._parts[index]
            cast(FSDPModule, part).unshard()
            for name in MATRICES:
                getattr(self._layers[index], name).weight = getattr(part, name)
            self._open = index
        return self._layers[index]

    def _let_go(self, index: int) -> None:
        for name in MATRICES:
            linear = getattr(self._layers[index], name)
            linear.weight, linear.packed = self._nothing, False


class _Matrices(nn.Module):
    """What FSDP spreads of one layer."""

    def __init__(self, matrices: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, matrix in matrices.items():
            self.register_parameter(name, nn.Parameter(matrix, requires_grad=False))


def _is_of(name: str, index: int) -> bool:
    return name.startswith(f"layers.{index}.")
