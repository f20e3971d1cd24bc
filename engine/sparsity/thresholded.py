"""Decoders whose projections are other ones, and one whose projections drop small inputs.

The layers, norms, attention and cache stay those of the decoder that they were made from; only what `qkv`, `o`, `up`
and `down` do changes. So drafting, prefill, verification and `encode` run on them as on any decoder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...kernels.channel_linear import channel_linear
from ...kernels.linear import PackedLinear
from ..config import ModelConfig
from ..model import Decoder
from ..selftest import NotDeterministic
from ..tree import MAX_NODES
from .neurons import dense_weight

Projection = Callable[[Tensor], Tensor]
INPUTS = ("qkv", "o", "up", "down")  # the projections of a layer as it stores them: each reads one input


def projections(config: ModelConfig) -> dict[str, tuple[str, slice]]:
    """The projections that have thresholds of their own: where they are stored, and in which rows."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    wide, hidden = config.intermediate_size, config.hidden_size
    found = {
        "q": ("qkv", slice(0, q)),
        "k": ("qkv", slice(q, q + kv)),
        "v": ("qkv", slice(q + kv, q + 2 * kv)),
        "o": ("o", slice(0, hidden)),
    }
    if config.gated_mlp:
        found |= {"gate": ("up", slice(0, wide)), "up": ("up", slice(wide, 2 * wide))}
    else:
        found["up"] = ("up", slice(0, wide))
    return found | {"down": ("down", slice(0, hidden))}


class RewiredDecoder(Decoder):
    """A decoder with other projections in its first layers; it shares everything else with the one given.

    Args:
        make: `(layer, name of INPUTS, the projection there) -> Projection`.
        begin: told the positions, long `[N]`, of the rows that come next.
        num_layers: how many layers; None: all.
    """

    def __init__(
        self,
        decoder: Decoder,
        make: Callable[[int, str, PackedLinear], Projection],
        begin: Callable[[Tensor], None],
        num_layers: int | None = None,
    ) -> None:
        vars(self).update(vars(decoder))
        self._begin = begin
        self._tables, self._rope_rows = {}, 0  # tables grow in place, and the other decoder would not know
        self.layers = list(decoder.layers)
        for index in range(len(self.layers) if num_layers is None else num_layers):
            layer: Any = copy.copy(self.layers[index])
            for name in INPUTS:
                setattr(layer, name, make(index, name, getattr(layer, name)))
            self.layers[index] = layer

    def run_layers(
        self, hidden: Tensor, start: int, stop: int, positions: Tensor, *args: Any, **options: Any
    ) -> Tensor:
        self._begin(positions)
        return super().run_layers(hidden, start, stop, positions, *args, **options)


class TealDecoder(RewiredDecoder):
    """A decoder whose projections read the inputs with |x| above their thresholds alone (TEAL, arXiv 2408.14690, 4).

    What a row drops depends on its own inputs and position.

    Args:
        thresholds: `[L, P]` fp32, by layer and `projections`; changes in place are seen.
        dense_tokens: rows at positions below drop nothing (attention sinks).
        num_layers: how many layers are so; None: all.
        skip: keep the weights input-channel-major (a second copy) and read the kept channels' alone, each row for
            itself: for decoding on a CPU. Else inputs are zeroed: for many rows at once.

    Raises:
        ValueError: thresholds of another shape.
    """

    def __init__(
        self,
        decoder: Decoder,
        thresholds: Tensor,
        dense_tokens: int = 0,
        num_layers: int | None = None,
        skip: bool = False,
    ) -> None:
        own = projections(decoder.config)
        wanted = (decoder.config.num_layers, len(own))
        if tuple(thresholds.shape) != wanted:
            raise ValueError(f"thresholds are {list(thresholds.shape)}, expected {list(wanted)}: {', '.join(own)}")
        self.thresholds = thresholds
        self.dense: Tensor | None = None  # rows that drop nothing, bool [N, 1]; None: all do

        def make(index: int, name: str, linear: PackedLinear) -> Thresholded:
            places = [(i, rows) for i, (stored, rows) in enumerate(own.values()) if stored == name]
            limits = [thresholds[index, i] for i, _ in places]
            return Thresholded(self, linear, [rows for _, rows in places], limits, skip)

        def begin(positions: Tensor) -> None:
            early = positions < dense_tokens
            self.dense = early.unsqueeze(1) if bool(early.any()) else None

        super().__init__(decoder, make, begin, num_layers)

    @property
    def num_bytes(self) -> int:
        """Of the second copy of the weights."""
        own = [getattr(layer, name) for layer in self.layers for name in INPUTS]
        return sum(projection.num_bytes for projection in own if isinstance(projection, Thresholded))

    def arithmetic(self) -> str:
        """What the second copy of the weights takes, in words."""
        return second_copy(self.num_bytes)

    def check_rows(self) -> None:
        """Check that a row alone has the bits that it has among others, in any place, on this machine.

        Raises:
            NotDeterministic: it has not.
        """
        for name in INPUTS:
            getattr(self.layers[0], name).check_rows()


def second_copy(num_bytes: int) -> str:
    """In words."""
    return f"weights by input channel, a second copy for dropping inputs = {num_bytes / 2**20:.1f} MiB"


class Thresholded:
    """One stored projection of a `TealDecoder`; q, k and v, or gate and up, are its parts."""

    def __init__(
        self, decoder: TealDecoder, linear: PackedLinear, parts: list[slice], limits: list[Tensor], skip: bool
    ) -> None:
        self._decoder, self._linear, self._limits = decoder, linear, limits
        self._weights: list[Tensor] = []
        self._packed: list[PackedLinear] = []
        # As many sums side by side as there are threads; fixed from now on, for they decide a row's bits.
        threads = torch.get_num_threads()
        self._sums = threads if linear.in_features % threads == 0 else 1
        if skip:
            weight = dense_weight(linear)
            self._weights = [weight[rows].T.contiguous() for rows in parts]
        elif len(parts) == 1:
            self._packed = [linear]
        else:
            weight, bias = dense_weight(linear), linear.bias
            self._packed = [PackedLinear(weight[p].contiguous(), None if bias is None else bias[p]) for p in parts]

    @property
    def num_bytes(self) -> int:
        """Of the input-channel-major copy."""
        return sum(weight.nbytes for weight in self._weights)

    def __call__(self, x: Tensor) -> Tensor:
        """`[N, K]` -> `[N, M]` of the same dtype."""
        strengths, dense, outs = x.float().abs(), self._decoder.dense, []
        for i, limit in enumerate(self._limits):
            keep = (strengths <= limit).logical_not_()  # NaN stays, so that it shows
            if dense is not None:
                keep |= dense
            if self._weights:
                outs.append(channel_linear(x, self._weights[i], keep, self._sums))
            else:
                outs.append(self._packed[i](x.masked_fill(~keep, 0.0)))
        out = outs[0] if len(outs) == 1 else torch.cat(outs, -1)
        if self._weights and self._linear.bias is not None:
            out = out.float() + self._linear.bias.float()
        return out.to(x.dtype)

    def check_rows(self) -> None:
        generator = torch.Generator().manual_seed(self._linear.in_features)
        x = torch.randn(MAX_NODES, self._linear.in_features, generator=generator).to(self._linear.dtype)
        kept, self._decoder.dense = self._decoder.dense, None
        together = self(x)
        alone = torch.cat([self(row.unsqueeze(0)) for row in x])
        self._decoder.dense = kept
        if not (torch.equal(alone, together) and torch.equal(self(x.flip(0)).flip(0), together)):
            raise NotDeterministic(
                f"sums over the kept channels of a projection {self._linear.in_features} -> "
                f"{self._linear.out_features} depend on other rows on this machine: TEAL would not be reproducible. "
                "Load with verify='dense' and draft='dense'"
            )
