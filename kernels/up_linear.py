"""The MLP's way in: norm scale, gate and up projections, activation.

    gated:  a = act(g) * u,  g = norm(h) W_gate^T + b,  u = norm(h) W_up^T + b
    plain:  a = act(norm(h) W_up^T + b)

with the norm deferred (see `tile.py`). One program makes some neurons of 16 rows, gate and up of the same ones. One
pass. Where each tile of rows has a list of neurons (`kept.py`), place i of `a` holds the i-th of them, and programs
whose places lie beyond the list leave at once: before they wait, for they write nothing, and the first ones do wait.
`activate` is what follows the product alone, for products that are made elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .kept import ZEROS, Kept
from .kept_list import RUN, Listing
from .layer_shape import LayerShape
from .qkv import normed_product
from .rows import Rows
from .tile import BLOCK_ROWS, asked, precision, x_scale

try:
    import triton
    import triton.language as tl

    from .kept_list import store_kept
    from .tile import ask_later, normed_rows_product, pdl_next, pdl_wait, weights_ahead
except ImportError:
    triton = None


def up_linear_reference(
    x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, shape: LayerShape
) -> Tensor:
    """fp32 `[R, FF]` from the arguments of `up_linear`."""
    return activated_reference(normed_product(x, stats, weight, bias, shift, shape), shape)


def activated_reference(y: Tensor, shape: LayerShape) -> Tensor:
    """fp32 `[R, FF]` from products `[R, 2 FF]`, gate first, or `[R, FF]`."""
    act: Callable[[Tensor], Tensor] = F.silu
    if shape.activation != "silu":
        act = partial(F.gelu, approximate="tanh" if shape.activation == "gelu_tanh" else "none")
    if not shape.gated:
        return act(y)
    gate, up = y.chunk(2, -1)
    return act(gate) * up


if triton is not None:

    @triton.jit
    def _activate(y, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
        if ACTIVATION == "silu":
            return y / (1.0 + tl.exp(-y))
        elif ACTIVATION == "gelu_tanh":
            inner = 0.7978845608028654 * (y + 0.044715 * y * y * y)
            return y - y / (tl.exp(2.0 * inner) + 1.0)  # y/2 (1 + tanh(inner))
        else:
            return 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))

    @triton.jit
    def _up_kernel(  # type: ignore[no-untyped-def]
        x, stats, weight, bias, shift, out, live_of, kept, count_of, eps, later, later_bytes, later_share,
        D: tl.constexpr, FF: tl.constexpr, NUM_STATS: tl.constexpr, BLOCK_S: tl.constexpr,
        GATED: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, LAYER_NORM: tl.constexpr,
        ZEROS: tl.constexpr, X_SCALE: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, TAIL: tl.constexpr = 0,
        EARLY: tl.constexpr = 0, HOLD: tl.constexpr = 0,
    ):  # fmt: skip
        WAYS: tl.constexpr = 2 if GATED else 1
        rows = tl.program_id(0) * BM + tl.arange(0, BM)
        both = tl.arange(0, WAYS * BN)
        neuron = tl.program_id(1) * BN + both % BN
        if ZEROS > 0:  # each tile has a list
            count = tl.load(count_of + tl.program_id(0))
            if tl.program_id(1) * BN >= tl.cdiv(count, ZEROS) * ZEROS:
                return
            neuron = tl.load(kept + tl.program_id(0) * FF + neuron, mask=neuron < count, other=0)
        elif FF % BN > 0:
            neuron = tl.minimum(neuron, FF - 1)
        cols = neuron + (both // BN) * FF
        ahead = weights_ahead(weight, cols, D, D, 0, BK, SPLIT, TAIL, HOLD)
        if HAS_BIAS:
            offset = tl.load(bias + cols)
        if LAYER_NORM:
            off_mean = tl.load(shift + cols)
        live = tl.load(live_of + rows)
        pdl_wait(PDL)

        pdl_next(PDL and EARLY)
        y, scale, mean = normed_rows_product(
            x, stats, weight, ahead, rows, cols, eps, D, NUM_STATS, BLOCK_S, LAYER_NORM, X_SCALE, BK, SPLIT, PRECISION,
            TAIL, HOLD,
        )  # fmt: skip
        pdl_next(PDL and not EARLY)
        ask_later(later, later_bytes, later_share)
        y = y * scale[:, None]
        if LAYER_NORM:
            y -= (mean * scale * X_SCALE)[:, None] * off_mean[None, :]
        if HAS_BIAS:
            y += offset.to(tl.float32)[None, :]
        if GATED:
            gate, up = tl.split(tl.permute(tl.reshape(y, [BM, 2, BN]), [0, 2, 1]))
            y = _activate(gate, ACTIVATION) * up
        else:
            y = _activate(y, ACTIVATION)
        neuron = tl.program_id(1) * BN + tl.arange(0, BN)
        if ZEROS > 0:
            y = tl.where((neuron < count)[None, :], y, 0.0)
        to = out + rows[:, None].to(tl.int64) * FF + neuron[None, :]
        tl.store(to, y.to(out.dtype.element_ty), mask=(live != 0)[:, None] & (neuron < FF)[None, :])

    @triton.jit
    def _activate_kernel(  # type: ignore[no-untyped-def]
        y, out, live_of, limits, limits_stride, entries, runs,
        WIDTH: tl.constexpr, UP_AT: tl.constexpr, FF: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
        LISTED: tl.constexpr, RUN: tl.constexpr, PDL: tl.constexpr, BN: tl.constexpr,
    ):  # fmt: skip
        """With lists BN is a chunk of theirs, and all of it one group."""
        pdl_wait(PDL)
        row = tl.program_id(0).to(tl.int64)
        if LISTED:
            limit = tl.load(limits + row * limits_stride)
        neuron = tl.program_id(1) * BN + tl.arange(0, BN)
        real = (neuron < FF) & (tl.load(live_of + row) != 0)
        a = tl.load(y + row * WIDTH + neuron, mask=real, other=0.0)
        up = a
        if GATED:
            up = tl.load(y + row * WIDTH + UP_AT + neuron, mask=real, other=0.0)
        pdl_next(PDL)
        a = _activate(a, ACTIVATION)
        if GATED:
            a = a * up
        x = a.to(out.dtype.element_ty)
        tl.store(out + row * FF + neuron, x, mask=real)
        if LISTED:
            place = row * tl.num_programs(1) + tl.program_id(1)
            store_kept(x.to(tl.float32), neuron, real, limit, entries + place * BN, runs + place, 1, BN, BN, RUN)


# Half types, by hidden size and neurons; tuned offline on an H200 over whole steps (docs/kernels.md).
_TABLE: dict[tuple[int, ...], dict[str, int]] = {
    (576, 1536): {"BN": 16, "BK": 64, "HOLD": 128, "SPLIT": 1, "num_warps": 4, "num_stages": 5, "EARLY": 1},
    (896, 4864): {"BN": 16, "BK": 64, "SPLIT": 1, "num_warps": 2, "num_stages": 5},
    (1536, 8960): {"BN": 16, "BK": 64, "SPLIT": 1, "num_warps": 2, "num_stages": 4},
}
_LISTED: dict[tuple[int, ...], dict[str, int]] = {  # in front of `kept_down`
    (576, 1536): {"BN": 16, "BK": 64, "HOLD": 256, "SPLIT": 1, "num_warps": 4, "num_stages": 5, "EARLY": 1},
    (896, 4864): {"BN": 16, "BK": 64, "SPLIT": 1, "num_warps": 2, "num_stages": 6, "EARLY": 1},
    (1536, 8960): {"BN": 16, "BK": 64, "SPLIT": 1, "num_warps": 2, "num_stages": 5, "EARLY": 1},
}


def _settings(shape: LayerShape, dtype: torch.dtype, listed: bool = False) -> dict[str, int]:
    """Neurons a program, depth of a product (and its tail), how much of k is held before the wait, partial products,
    warps, stages, whether `down` is let go at the wait."""
    size = shape.hidden_size, shape.intermediate_size
    table = _LISTED if listed else _TABLE
    if dtype != torch.float32 and size in table:
        return table[size]
    if dtype == torch.float32:
        return {"BN": 16, "BK": 32, "SPLIT": 1, "num_warps": 4, "num_stages": 2}
    return {"BN": 16, "BK": 64, "SPLIT": 1, "num_warps": 2, "num_stages": 5}


def up_linear(
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    rows: Rows,
    shape: LayerShape,
    *,
    kept: Kept | None = None,
    later: Tensor | None = None,
    pdl: bool = False,
    settings: dict[str, int] | None = None,
) -> None:
    """Make the MLP's inner activations of every live row.

    Args:
        x, stats, shift: as in `qkv`.
        weight: `[2 FF, D]`, gate rows first, or `[FF, D]` for a plain MLP.
        bias: of the same length, or None; for LayerNorm with the norm's own bias multiplied in.
        out: `[R, FF]` in the model's dtype, overwritten; with `kept` the places in front of each tile's count, and
            zeros behind it up to a multiple of `ZEROS`.
        kept: the neurons of each tile of rows; None: all.
        rows, shape, later, pdl, settings: as in `qkv`.
    """
    chosen = _settings(shape, x.dtype, kept is not None) if settings is None else settings
    grid = (len(rows) // BLOCK_ROWS, triton.cdiv(shape.intermediate_size, chosen["BN"]))
    _up_kernel[grid](
        x, stats, weight, bias, shift, out, rows.live, None if kept is None else kept.ids,
        None if kept is None else kept.count, shape.norm_eps, *asked(later, pdl, grid),
        D=shape.hidden_size, FF=shape.intermediate_size,
        NUM_STATS=stats.shape[2], BLOCK_S=triton.next_power_of_2(stats.shape[2]),
        GATED=shape.gated, ACTIVATION=shape.activation, HAS_BIAS=bias is not None, LAYER_NORM=shape.layer_norm,
        ZEROS=0 if kept is None else ZEROS, X_SCALE=x_scale(x.dtype), PRECISION=precision(x.dtype), PDL=pdl,
        BM=BLOCK_ROWS, **chosen,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def activate(
    y: Tensor,
    up_at: int,
    out: Tensor,
    rows: Rows,
    shape: LayerShape,
    *,
    listing: Listing | None = None,
    pdl: bool = False,
) -> None:
    """The inner activations of what was multiplied: the first rows', as far as they are live.

    Args:
        y: `[N, M]` fp32, the products of rows 0..N-1 with their bias: gate, or up in a plain MLP, from column 0 on.
        up_at: the column that up starts at behind a gate.
        out, rows, shape, pdl: as in `up_linear`.
        listing: for the product behind, one threshold a row, chunks in one group; the rows' lists are made as well.
    """
    wide = shape.intermediate_size
    block = min(512, triton.next_power_of_2(wide)) if listing is None else listing.lists.chunk
    own = (y, 0, y, y)
    if listing is not None:
        own = listing.limits, listing.limits.stride(0), listing.lists.entries, listing.lists.runs
    _activate_kernel[(len(y), triton.cdiv(wide, block))](
        y, out, rows.live, *own, WIDTH=y.shape[1], UP_AT=up_at, FF=wide, GATED=shape.gated,
        ACTIVATION=shape.activation, LISTED=listing is not None, RUN=RUN, PDL=pdl, BN=block,
        num_warps=max(4, block // 256), **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
