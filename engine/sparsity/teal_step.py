"""A decode step whose rows drop small inputs (TEAL): each row by itself through weights stored by input channel.

Rows that drop different channels share no reads, so nothing is gained by tiles: the products of row after row are
launches of their own (`kernels/sparse_linear.py`), in front of and behind them small kernels do what is elementwise or
of a whole row, and attention is the fused step's. Thresholds sit on a projection's real input, so norms are not
deferred. Thresholds are data in device memory, as is the position from which they hold: one captured step serves all.

    ChannelWeights   what the kernels read, and the thresholds, once a model
    TealStep         buffers for a number of rows, and the step itself
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.kept_list import KeptList, Listing
from ...kernels.linear import PackedLinear
from ...kernels.qkv import place_qkv
from ...kernels.residual_norm import residual_norm
from ...kernels.sparse_linear import LEAST_COLUMNS, Shares, listed_linear, sparse_linear
from ...kernels.tile import BLOCK_ROWS
from ...kernels.tree_attention import tree_attention
from ...kernels.up_linear import activate
from ..cache import KVCache
from ..config import ModelConfig
from ..fused import FusedStep, FusedWeights
from ..model import Decoder
from .neurons import dense_weight
from .thresholded import INPUTS, projections, second_copy


@dataclass(frozen=True)
class Channels:
    """One stored projection by input channel. Columns of q, k and v (gate and up) are segments with thresholds of their
    own; zeros fill a segment up to a multiple of a block's least columns.

    Attributes:
        weight: `[K, M]`, zeros included.
        bias: `[M]` or None.
        ends: where the segments end.
        places: of its thresholds among a layer's (`thresholded.projections`).
    """

    weight: Tensor
    bias: Tensor | None
    ends: tuple[int, ...]
    places: slice

    @classmethod
    def of(cls, linear: PackedLinear, config: ModelConfig, name: str) -> Channels:
        own = [(i, rows) for i, (stored, rows) in enumerate(projections(config).values()) if stored == name]
        ends = [0]
        for _, rows in own:
            ends.append(ends[-1] + -(-(rows.stop - rows.start) // LEAST_COLUMNS) * LEAST_COLUMNS)
        dense = dense_weight(linear)
        weight = dense.new_zeros(linear.in_features, ends[-1])
        bias = None if linear.bias is None else linear.bias.new_zeros(ends[-1])
        for start, (_, rows) in zip(ends, own, strict=False):
            columns = slice(start, start + rows.stop - rows.start)
            weight[:, columns] = dense[rows].T
            if bias is not None and linear.bias is not None:
                bias[columns] = linear.bias[rows]
        return cls(weight, bias, tuple(ends[1:]), slice(own[0][0], own[-1][0] + 1))


class ChannelWeights(FusedWeights):
    """A decoder's weights, those of its layers by input channel (a second copy), and what its rows drop.

    Args:
        thresholds: of |x|, fp32 `[L, P]`, by layer and `thresholded.projections`.
        dense_tokens: rows at positions below drop nothing.
        num_layers: the first layers, which are stored so; None: all.
    """

    def __init__(
        self, decoder: Decoder, thresholds: Tensor, dense_tokens: int = 0, num_layers: int | None = None
    ) -> None:
        super().__init__(decoder)
        self.channels = [
            {name: Channels.of(getattr(layer, name), decoder.config, name) for name in INPUTS}
            for layer in decoder.layers[:num_layers]
        ]
        self.thresholds = torch.empty(thresholds.shape, device=decoder.device)
        self.dense_tokens = torch.empty(1, dtype=torch.int32, device=decoder.device)
        self.drop(thresholds, dense_tokens)

    def drop(self, thresholds: Tensor, dense_tokens: int) -> None:
        """Other thresholds, for the steps to come."""
        self.thresholds.copy_(thresholds)
        self.dense_tokens.fill_(dense_tokens)

    @property
    def num_bytes(self) -> int:
        """Of the second copy."""
        return sum(own.weight.nbytes for layer in self.channels for own in layer.values())

    def arithmetic(self) -> str:
        """What the second copy takes, in words."""
        return second_copy(self.num_bytes)


class TealStep(FusedStep):
    """Buffers for rows that drop inputs, and the layers over them; the calls are those of `FusedStep`.

    Args:
        weights: of the model.
        cache: the KV cache that rows read and write.
        count: N, rows 0..N-1 may be live; each takes its own products.
        reach, pdl: as in `FusedStep`.
    """

    weights: ChannelWeights

    def __init__(
        self, weights: ChannelWeights, cache: KVCache, count: int, *, reach: int | None = None, pdl: bool = False
    ) -> None:
        super().__init__(weights, cache, -(-count // BLOCK_ROWS) * BLOCK_ROWS, reach=reach, pdl=pdl)
        self.count, device = count, cache.device
        self._limits = weights.thresholds.repeat(count, 1, 1)
        sizes = {name: own.weight.shape for name, own in weights.channels[0].items()}
        self._products = {name: torch.zeros(count, width, device=device) for name, (_, width) in sizes.items()}
        self._shares = {name: Shares(k, width, device) for name, (k, width) in sizes.items()}
        self._lists = {
            name: KeptList.empty(own.weight.shape[0], len(own.ends), device, rows=count)
            for name, own in weights.channels[0].items()
            if name != "o"  # attention's programs hold parts of a row that are no chunks
        }

    def embed(self) -> None:
        super().embed()
        drops = self.rows.position[: self.count] >= self.weights.dense_tokens
        torch.mul(self.weights.thresholds, drops.view(-1, 1, 1), out=self._limits)

    def run(
        self, start: int, stop: int, taps: Mapping[int, Tensor] | None = None, *, just_laid: bool = False
    ) -> Tensor:
        """Run layers start..stop-1, after `embed` or `resume(start)`; returns the residual stream after them.

        Raises:
            ValueError: states on the way are asked for; these steps keep none.
        """
        if taps:
            raise ValueError(f"states after layers {sorted(taps)} were asked for, a step that drops inputs keeps none")
        weights, config, shape, rows, pdl = self.weights, self.weights.config, self.weights.shape, self.rows, self.pdl
        first = ("qkv", "up") if config.parallel_residual else ("qkv",)
        self._add((), None, start, first)
        for index in range(start, stop):
            layer = weights.layers[index]
            keys, values = self.cache.k[index], self.cache.v[index]
            self.product(index, "qkv", self.x)
            q_end, k_end, _ = weights.channels[index]["qkv"].ends
            place_qkv(
                self._products["qkv"], (q_end, k_end), layer.qk_norm, *weights.rotary[index],
                self._q, keys, values, rows, shape, pdl=pdl,
            )  # fmt: skip
            tree_attention(
                self._q, keys, values, self._attended, self._scratch, rows, shape, config.windows[index], pdl=pdl
            )
            self.product(index, "o", self._attended)
            after = first if index + 1 < stop else ()
            if config.parallel_residual:
                self._mlp(index, self._x_mlp)
                self._add(("o", "down"), None, index + 1, after)
            else:
                self._add(("o",), layer.attn_post, index, ("up",))
                self._mlp(index, self.x)
                self._add(("down",), layer.mlp_post, index + 1, after)
        self.resume(stop)  # the norm behind, deferred, as the LM head takes it
        return self.hidden

    def product(self, index: int, name: str, x: Tensor) -> None:
        """Multiply every row by a projection of layer `index`, by the channels that the row keeps of x `[R, K]`: those
        that the kernel that wrote x has listed, or else that are listed now."""
        own, out, shares = self.weights.channels[index][name], self._products[name], self._shares[name]
        limits = self._limits[:, index, own.places]
        for row in range(self.count):
            if name in self._lists:
                lists = self._lists[name].row(row)
                listed_linear(lists, own.weight, own.ends, out[row], shares, own.bias, pdl=self.pdl)
            else:
                sparse_linear(x[row], own.weight, limits[row], own.ends, out[row], shares, own.bias, pdl=self.pdl)

    def _listing(self, index: int, name: str) -> Listing:
        """For who makes the input of a projection of layer `index`."""
        return Listing(self._limits[:, index, self.weights.channels[index][name].places], self._lists[name])

    def _mlp(self, index: int, x: Tensor) -> None:
        """The products of an MLP, from its normed input."""
        self.product(index, "up", x)
        activate(
            self._products["up"], self.weights.channels[index]["up"].ends[0], self._act, self.rows, self.weights.shape,
            listing=self._listing(index, "down"), pdl=self.pdl,
        )  # fmt: skip
        self.product(index, "down", self._act)

    def _add(self, names: tuple[str, ...], post: Tensor | None, index: int, readers: tuple[str, ...]) -> None:
        """Products into the residual stream, and on to the norms in front of `readers`, some of layer `index`."""
        shape, norms = self.weights.shape, []
        for name in readers:
            layer = self.weights.decoder.layers[index]
            norm = layer.attn_norm if name == "qkv" else layer.mlp_norm
            assert norm is not None
            norms.append((norm.weight, norm.bias, self.x if name == readers[0] else self._x_mlp))
        residual_norm(
            self.hidden, self.hidden, [self._products[name] for name in names], self.rows, self.count, shape.norm_eps,
            norms=norms, listings=[self._listing(index, name) for name in readers], post=post,
            layer_norm=shape.layer_norm, pdl=self.pdl,
        )  # fmt: skip
