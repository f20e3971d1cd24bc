"""The transformer layers of a head with memory (`heads/stateful.py`) as fused kernels over rows: the recurrent head's
on what it joins, the block head's on the residual stream at its exit. Keys and values go to the head's own cache, at
the rows' slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..heads.stateful import HeadCache, StatefulHead
from ..kernels.head_rows import EPS
from ..kernels.layer_shape import LayerShape
from ..kernels.qkv import qkv
from ..kernels.residual_linear import Parts, column_tiles, most_parts, residual_linear
from ..kernels.rows import Rows
from ..kernels.tree_attention import AttentionScratch, tree_attention
from ..kernels.up_linear import up_linear


@dataclass(frozen=True)
class _Layer:
    attn_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    o: Tensor
    mlp_norm: Tensor
    up: Tensor
    down: Tensor


class HeadWeights:
    """The parameters that heads with memory share, in the model's dtype, norms in fp32, and rotary tables.

    Args:
        head: attached.
        positions: that the tables hold.
    """

    def __init__(self, head: StatefulHead, positions: int) -> None:
        weight = head.attached().head_weight
        self._device, self.dtype = weight.device, weight.dtype
        self.gain = self.wide(head.gain)
        self.layers = [
            _Layer(
                self.wide(layer.attn_norm.weight),
                self.cast(layer.qkv.weight),
                None if layer.qkv.bias is None else self.cast(layer.qkv.bias),
                self.cast(layer.o.weight),
                self.wide(layer.mlp_norm.weight),
                self.cast(layer.up.weight),
                self.cast(layer.down.weight),
            )
            for layer in head._layers()
        ]
        sizes = head._sizes
        self.shape = LayerShape(
            hidden_size=head.hidden_size,
            intermediate_size=sizes.ff,
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
            rotary_dim=sizes.head_dim,
            norm_eps=EPS,
            attention_scale=sizes.head_dim**-0.5,
        )
        cos, sin = head._rotary(torch.arange(positions, device=weight.device))
        self.cos, self.sin = cos.squeeze(1).contiguous(), sin.squeeze(1).contiguous()

    def cast(self, parameter: Tensor) -> Tensor:
        """A parameter in the model's dtype."""
        return parameter.detach().to(self._device, self.dtype).contiguous()

    def wide(self, parameter: Tensor) -> Tensor:
        """A parameter in fp32."""
        return parameter.detach().to(self._device, torch.float32).contiguous()


class LayerRows:
    """Buffers of R rows, and the layers over them.

    Args:
        weights: the head's.
        num_rows: R, a multiple of 16.
        capacity: positions that attention may see.
        device: theirs.
        inner: widths of the caller's own products into `hidden`, by `parts`.

    Attributes:
        x: `[R, D]` in the model's dtype, for the caller to fill with what the first norm leaves (`tile.py`).
        hidden: fp32 `[R, D]`, for the caller to fill with the residual stream; the outputs then.
        parts: scratch of products.
    """

    def __init__(
        self, weights: HeadWeights, num_rows: int, capacity: int, device: torch.device, inner: Sequence[int] = ()
    ) -> None:
        shape, dtype = weights.shape, weights.dtype
        width, wide, ff = shape.hidden_size, shape.num_heads * shape.head_dim, shape.intermediate_size

        def empty(size: int) -> Tensor:
            return torch.zeros(num_rows, size, dtype=dtype, device=device)

        self.x, self._q, self._attended, self._act = (empty(n) for n in (width, wide, wide, ff))
        self.hidden = torch.zeros(num_rows, width, device=device)
        self._stats = [torch.zeros(num_rows, 2, column_tiles(width, k, dtype), device=device) for k in (wide, ff)]
        self._scratch = AttentionScratch(num_rows, capacity, shape, device)
        self.parts = Parts(num_rows, width, max(most_parts(width, k, dtype) for k in (wide, ff, *inner)), device)

    def run(self, weights: HeadWeights, cache: HeadCache, rows: Rows, stats: Tensor, *, pdl: bool = False) -> None:
        """Make the rows' entries; `hidden` holds their outputs then.

        Args:
            weights: the head's.
            cache: where keys and values go.
            rows: all R.
            stats: fp32 `[R, 2, S]`, of the first norm.
            pdl: programmatic dependent launch.
        """
        shape, layers, (attn_stats, mlp_stats) = weights.shape, weights.layers, self._stats
        for index, layer in enumerate(layers):
            keys, values = cache.k[index], cache.v[index]
            qkv(
                self.x, stats, layer.qkv, layer.qkv_bias, None, None, weights.cos, weights.sin, self._q, keys, values,
                rows, shape, pdl=pdl,
            )  # fmt: skip
            tree_attention(self._q, keys, values, self._attended, self._scratch, rows, shape, pdl=pdl)
            residual_linear(
                self._attended, layer.o, None, self.hidden, self.hidden, rows, next_norms=((layer.mlp_norm, self.x),),
                stats=attn_stats, means=False, parts=self.parts, pdl=pdl,
            )  # fmt: skip
            up_linear(self.x, attn_stats, layer.up, None, None, self._act, rows, shape, pdl=pdl)
            last = index + 1 == len(layers)
            residual_linear(
                self._act, layer.down, None, self.hidden, self.hidden, rows,
                next_norms=() if last else ((layers[index + 1].attn_norm, self.x),), stats=None if last else mlp_stats,
                means=False, parts=self.parts, pdl=pdl,
            )  # fmt: skip
            stats = mlp_stats
