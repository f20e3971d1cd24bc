"""A decoder's layers as fused kernels over tiles of 16 rows: the decode step on a GPU.

The same arithmetic as `Decoder.run_layers` with the same weights, arranged so that a step is a few kernels a layer and
nothing in it waits for the host: everything a launch reads lies at an address that does not change, so a step can be
captured in a CUDA graph. Norms are deferred (`kernels/tile.py`): a producer of the residual stream leaves what the next
norm needs. Prompts take the same step (`engine/prompt_reader.py`), long ones of large models the decoder itself.

    FusedWeights   what the kernels read, once a model
    FusedStep      buffers for a number of rows, and the step itself

For a target that skips neurons (TDA) the down projections are stored by neuron, and each tile of rows has a list of the
neurons it uses in every layer: data in device memory, so one captured step serves every list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..kernels import tile
from ..kernels.embed_rows import embed_rows
from ..kernels.kept import Kept, KeptNeurons
from ..kernels.kept_down import kept_down, kept_parts, kept_tiles
from ..kernels.layer_shape import LayerShape
from ..kernels.linear import PackedLinear
from ..kernels.neuron_squares import neuron_squares
from ..kernels.qkv import qkv
from ..kernels.residual_linear import Parts, column_tiles, most_parts, post_norm, residual_linear
from ..kernels.rows import Rows
from ..kernels.tree_attention import AttentionScratch, tree_attention
from ..kernels.up_linear import up_linear
from .cache import KVCache
from .model import Decoder, Norm


def can_fuse(decoder: Decoder) -> bool:
    """Whether the fused kernels run this model here: a GPU with Triton."""
    return decoder.device.type == "cuda" and tile.triton is not None


def layer_shape(decoder: Decoder) -> LayerShape:
    config = decoder.config
    return LayerShape(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rotary_dim=config.rotary_dim,
        norm_eps=config.norm_eps,
        attention_scale=config.attention_scale,
        softcap=config.attention_softcap,
        layer_norm=config.norm == "layer",
        qk_norm=config.qk_norm,
        gated=config.gated_mlp,
        activation=config.activation,
    )


@dataclass(frozen=True)
class NormedLinear:
    """A projection behind a deferred norm: `shift` = W norm_weight where the norm takes a mean off; `bias` includes
    what the norm's own bias adds."""

    norm: Tensor
    weight: Tensor
    bias: Tensor | None
    shift: Tensor | None

    @classmethod
    def of(cls, norm: Norm, weight: Tensor, bias: Tensor | None) -> NormedLinear:
        shift = None
        if norm.layer_norm:
            wide = weight.float()
            shift = wide @ norm.weight
            if norm.bias is not None:
                bias = wide @ norm.bias if bias is None else bias.float() + wide @ norm.bias
        return cls(norm.weight, weight, bias, shift)


@dataclass(frozen=True)
class FusedLayer:
    """One layer's weights; post norms are None where the family has none."""

    qkv: NormedLinear
    qk_norm: tuple[Tensor, Tensor] | None
    o: tuple[Tensor, Tensor | None]
    up: NormedLinear
    down: tuple[Tensor, Tensor | None]
    attn_post: Tensor | None
    mlp_post: Tensor | None


class FusedWeights:
    """A decoder's weights as the kernels take them; they share its memory.

    Args:
        by_neuron: down projections `[FF, D]`, for steps that skip neurons; the decoder's own are views of these from
            then on, where they are not packed.
    """

    def __init__(self, decoder: Decoder, by_neuron: bool = False) -> None:
        config = decoder.config
        self.decoder, self.config, self.shape, self.by_neuron = decoder, config, layer_shape(decoder), by_neuron
        decoder.reserve_rotary(config.max_context + tile.BLOCK_ROWS)
        self.layers = []
        for layer in decoder.layers:
            if layer.attn_norm is None or layer.mlp_norm is None:
                raise ValueError(f"family {config.family!r} has layers without norms, which the fused kernels need")
            both = None
            if layer.q_norm is not None and layer.k_norm is not None:
                both = layer.q_norm.weight, layer.k_norm.weight
            self.layers.append(
                FusedLayer(
                    NormedLinear.of(layer.attn_norm, plain(layer.qkv), layer.qkv.bias),
                    both,
                    (plain(layer.o), layer.o.bias),
                    NormedLinear.of(layer.mlp_norm, plain(layer.up), layer.up.bias),
                    (neuron_rows(layer.down) if by_neuron else plain(layer.down), layer.down.bias),
                    None if layer.attn_post_norm is None else layer.attn_post_norm.weight,
                    None if layer.mlp_post_norm is None else layer.mlp_post_norm.weight,
                )
            )
        self.head = NormedLinear.of(decoder._final_norm, plain(decoder.output), decoder.output.bias)
        self.rotary = [decoder._tables[spec] for spec in config.ropes]
        self.embed_scale = decoder._embed_scale


def plain(linear: PackedLinear) -> Tensor:
    """A projection's weight `[M, K]`, row by row."""
    return (linear.weight.to_dense() if linear.packed else linear.weight).contiguous()


def neuron_rows(down: PackedLinear) -> Tensor:
    """A down projection's weight with a row for each neuron, `[FF, D]`, stored once where it is not packed."""
    rows = (down.weight.to_dense() if down.packed else down.weight).t().contiguous()
    if not down.packed:
        down.weight = rows.t()
    return rows


class FusedStep:
    """Buffers of one width, and the layers over them.

    Args:
        weights: of the model.
        cache: the KV cache that rows read and write.
        num_rows: R, a multiple of 16.
        reach: tokens that a sequence may hold; None: as many as the cache.
        pdl: programmatic dependent launch (Hopper and newer).
        share: whether attention may read keys once for several rows (`tree_attention`); bits are the same.
        settled: whether keys below a row's base are those of earlier steps; tiles of one prompt in one step are not.
        squares: fp32 `[L, FF]`, to which each layer adds its live rows' squared inner activations; for rows that use
            all neurons.

    Attributes:
        rows, ids: int32 metadata and tokens of the rows, to be filled before a step.
        hidden: `[R, D]` fp32, where the residual stream runs.
        x, stats: what the deferred norm after the last layer run needs, the LM head's after all layers.
        kept: the neurons that each tile of rows uses, all at first; None where the weights are not stored by neuron.
    """

    def __init__(
        self,
        weights: FusedWeights,
        cache: KVCache,
        num_rows: int,
        *,
        reach: int | None = None,
        pdl: bool = False,
        share: bool = True,
        settled: bool = True,
        squares: Tensor | None = None,
    ) -> None:
        self.weights, self.cache, self.num_rows, self.pdl = weights, cache, num_rows, pdl
        self._share, self._settled = share, settled
        self._squares = squares
        config, shape, device, dtype = weights.config, weights.shape, cache.device, weights.decoder.dtype
        width, wide = config.hidden_size, config.num_heads * config.head_dim
        self.rows = Rows.empty(num_rows, device)
        self.ids = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self._all = torch.arange(num_rows, dtype=torch.int32, device=device)
        self.hidden = torch.zeros(num_rows, width, device=device)
        self.x, self._x_mlp = torch.zeros(2, num_rows, width, dtype=dtype, device=device).unbind()
        self._q, self._attended = torch.zeros(2, num_rows, wide, dtype=dtype, device=device).unbind()
        self._act = torch.zeros(num_rows, config.intermediate_size, dtype=dtype, device=device)
        self._stats_embed = torch.zeros(num_rows, 2, 1, device=device)
        self.stats = self._stats_embed

        inner, skips = config.intermediate_size, weights.by_neuron
        self.kept: KeptNeurons | None = None
        if skips:
            self.kept = KeptNeurons(config.num_layers, num_rows // tile.BLOCK_ROWS, inner, device)

        def stats(tiles: int) -> Tensor:
            return torch.zeros(num_rows, 2, tiles, device=device)

        self._stats_attn = stats(column_tiles(width, wide, dtype))
        self._stats_mlp = stats((kept_tiles if skips else column_tiles)(width, inner, dtype))
        self._raw = torch.zeros(num_rows, width, device=device) if config.post_norms else None
        block = max(16, 1 << (width - 1).bit_length() >> 3)
        self._stats_post = torch.zeros(num_rows, 2, -(-width // block), device=device) if config.post_norms else None
        positions = cache.plan.num_slots if reach is None else reach + tile.BLOCK_ROWS
        self._scratch = AttentionScratch(num_rows, positions, shape, device)
        most = max(most_parts(width, wide, dtype), (kept_parts if skips else most_parts)(width, inner, dtype))
        self._parts = Parts(num_rows, width, most, device)

    def embed(self) -> None:
        """Start the rows from their tokens."""
        embed_rows(
            self.ids, self.rows, self.weights.decoder.embedding, self.weights.embed_scale, self.hidden,
            self._norms_at(0), self._stats_embed, pdl=self.pdl,
        )  # fmt: skip
        self.stats = self._stats_embed

    def resume(self, start: int, tap: Tensor | None = None) -> None:
        """Start the rows from the residual stream after `start` layers: `hidden`, or a tap of it."""
        stats, pdl, stream = self._stats_embed, self.pdl, self.hidden if tap is None else tap
        embed_rows(self._all, self.rows, stream, 1.0, self.hidden, self._norms_at(start), stats, pdl=pdl)
        self.stats = stats

    def run(
        self, start: int, stop: int, taps: Mapping[int, Tensor] | None = None, *, just_laid: bool = False
    ) -> Tensor:
        """Run layers start..stop-1, after `embed`, `resume(start)`, or where the last run stopped.

        Args:
            just_laid: whether the kernel in front of this run writes `rows`, which the first one would read too early.
            taps: exit layers in start + 1..stop -> `[R, D]` fp32, overwritten with the residual stream there.

        Returns:
            The residual stream after `stop` layers: `hidden`, or the tap there.
        """
        weights, config, shape, rows, pdl = self.weights, self.weights.config, self.weights.shape, self.rows, self.pdl
        taps = taps or {}
        stats, hidden = self.stats, self.hidden
        for index in range(start, stop):
            layer, norms = weights.layers[index], self._norms_at(index + 1)
            cos, sin = weights.rotary[index]
            keys, values = self.cache.k[index], self.cache.v[index]
            after = taps.get(index + 1, self.hidden)
            kept = None if self.kept is None else self.kept.layers[index]
            # what each kernel asks for in passing, and what a list leaves of it is not known
            up, down = (layer.up.weight, layer.down[0]) if kept is None else (None, None)
            following = weights.layers[index + 1].qkv.weight if index + 1 < stop else None
            early = pdl and not (just_laid and index == start)
            qkv(
                self.x, stats, layer.qkv.weight, layer.qkv.bias, layer.qkv.shift, layer.qk_norm, cos, sin,
                self._q, keys, values, rows, shape, pdl=early,
            )  # fmt: skip
            tree_attention(
                self._q, keys, values, self._attended, self._scratch, rows, shape, config.windows[index],
                share=self._share, settled=self._settled, later=None if up is None else tile.beginning(up), pdl=pdl,
            )  # fmt: skip
            if config.parallel_residual:
                residual_linear(self._attended, *layer.o, hidden, self.hidden, rows, parts=self._parts, pdl=pdl)
                up_linear(
                    self._x_mlp, stats, layer.up.weight, layer.up.bias, layer.up.shift, self._act, rows, shape,
                    kept=kept, later=down, pdl=pdl,
                )  # fmt: skip
                stats = self._leave(
                    self._act, layer.down, None, self.hidden, after, norms, self._stats_mlp, following, kept
                )
            else:
                stats = self._leave(
                    self._attended, layer.o, layer.attn_post, hidden, self.hidden, ((layer.up.norm, self.x),),
                    self._stats_attn, None,
                )  # fmt: skip
                up_linear(
                    self.x, stats, layer.up.weight, layer.up.bias, layer.up.shift, self._act, rows, shape,
                    kept=kept, later=down, pdl=pdl,
                )  # fmt: skip
                stats = self._leave(
                    self._act, layer.down, layer.mlp_post, self.hidden, after, norms, self._stats_mlp, following, kept
                )
            hidden = after
            if self._squares is not None:
                neuron_squares(self._act, rows, self._squares[index], pdl=pdl)
        self.stats = stats
        return hidden

    def _leave(
        self,
        a: Tensor,
        projection: tuple[Tensor, Tensor | None],
        post: Tensor | None,
        hidden: Tensor,
        after: Tensor,
        norms: tuple[tuple[Tensor, Tensor], ...],
        stats: Tensor,
        later: Tensor | None,
        kept: Kept | None = None,
    ) -> Tensor:
        """Back to the residual stream, from all of `a` or from kept neurons; returns the stats of what was written."""
        back = partial(residual_linear, later=later) if kept is None else partial(kept_down, kept=kept)
        if post is None:
            back(
                a, *projection, hidden, after, self.rows, next_norms=norms, stats=stats,
                means=self.weights.shape.layer_norm, parts=self._parts, pdl=self.pdl,
            )  # fmt: skip
            return stats
        assert self._raw is not None and self._stats_post is not None
        back(a, *projection, None, self._raw, self.rows, stats=stats, means=False, parts=self._parts, pdl=self.pdl)
        post_norm(
            self._raw, stats, post, hidden, after, self.rows, self.weights.config.norm_eps,
            next_norm=norms[0], stats=self._stats_post, pdl=self.pdl,
        )  # fmt: skip
        return self._stats_post

    def _norms_at(self, index: int) -> tuple[tuple[Tensor, Tensor], ...]:
        """The norms that read the residual stream after `index` layers, with the x that each leaves."""
        weights = self.weights
        if index == len(weights.layers):
            return ((weights.head.norm, self.x),)
        layer = weights.layers[index]
        first = (layer.qkv.norm, self.x)
        return (first, (layer.up.norm, self._x_mlp)) if weights.config.parallel_residual else (first,)
