"""Attention's way in: norm scale, QKV projection, bias, norms of q and k, rotary embedding, keys and values stored.

    y = norm(h) W^T + b          (the norm deferred, see `tile.py`)
    q, k: RMSNorm over each head where the family has it, then with pairs (i, j = i + rotary_dim / 2)
        y_i' = y_i cos - y_j sin,    y_j' = y_j cos + y_i sin

One program makes some pairs of one head for 16 rows, so both places of a pair are at hand; with norms over heads it
makes the whole head. Keys and values go to each row's own slot, rounded to the cache's dtype. One pass. `place_qkv` is
what follows the product alone, for products that are made elsewhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layer_shape import LayerShape
from .rows import Rows
from .tile import BLOCK_ROWS, asked, precision, x_scale

try:
    import triton
    import triton.language as tl

    from .tile import ask_later, normed_rows_product, pdl_next, pdl_wait, weights_ahead
except ImportError:
    triton = None


def qkv_reference(
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    qk_norm: tuple[Tensor, Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    shape: LayerShape,
) -> tuple[Tensor, Tensor, Tensor]:
    """q `[R, H, d]`, k and v `[R, KV, d]` in fp32, from the arguments of `qkv` and the rows' positions."""
    return placed_reference(normed_product(x, stats, weight, bias, shift, shape), qk_norm, cos, sin, positions, shape)


def placed_reference(
    y: Tensor, qk_norm: tuple[Tensor, Tensor] | None, cos: Tensor, sin: Tensor, positions: Tensor, shape: LayerShape
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from products y `[R, (H + 2 KV) d]` fp32: what `place_qkv` does."""
    y = y.view(len(y), -1, shape.head_dim)
    q, k, v = y.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], 1)
    if qk_norm is not None:
        q, k = (
            F.rms_norm(t, (shape.head_dim,), w.float(), shape.norm_eps) for t, w in zip((q, k), qk_norm, strict=True)
        )
    cos, sin = cos[positions.long()].unsqueeze(1), sin[positions.long()].unsqueeze(1)

    def turn(t: Tensor) -> Tensor:
        head, rest = t[..., : shape.rotary_dim], t[..., shape.rotary_dim :]
        return torch.cat([head * cos + head.roll(shape.rotary_dim // 2, -1) * sin, rest], -1)

    return turn(q), turn(k), v


def normed_product(
    x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, shape: LayerShape
) -> Tensor:
    """`norm(h) W^T + b` `[R, N]` fp32 from stored x and stats, as `tile.py` defines them."""
    square = stats[:, 0].float().sum(-1) / shape.hidden_size
    y = x.float() @ weight.float().T / x_scale(x.dtype)
    if shape.layer_norm:
        mean = stats[:, 1].float().sum(-1) / shape.hidden_size
        square = square - mean * mean
        assert shift is not None
        y = y - mean.unsqueeze(1) * shift
    y = y * (square + shape.norm_eps).rsqrt().unsqueeze(1)
    return y if bias is None else y + bias.float()


if triton is not None:

    @triton.jit
    def _places(pair, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
        """Both places of pairs in a head; those that are not rotated come behind, paired up as they are left."""
        ROTARY_HALF: tl.constexpr = ROTARY_DIM // 2
        rotated = pair < ROTARY_HALF
        place_a = tl.where(rotated, pair, pair + ROTARY_HALF)
        place_b = tl.where(rotated, pair + ROTARY_HALF, pair + ROTARY_HALF + (HEAD_DIM - ROTARY_DIM) // 2)
        return place_a, place_b

    @triton.jit
    def _angles(cos, sin, position, pair, live, ROTARY_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
        """Cosines and sines `[rows, pairs]`; 1 and 0 where nothing is rotated."""
        turned = live[:, None] & (pair < ROTARY_DIM // 2)[None, :]
        angle = position[:, None].to(tl.int64) * ROTARY_DIM + pair[None, :]
        c = tl.load(cos + angle, mask=turned, other=1.0)
        s = tl.load(sin + angle + ROTARY_DIM // 2, mask=turned, other=0.0)  # the second half is the positive one
        return c, s

    @triton.jit
    def _place(  # type: ignore[no-untyped-def]
        a, b, head, pair, c, s, rows, live, sequence, slot, q_norm, k_norm, q_out, k_cache, v_cache,
        cache_sequence, cache_head, cache_slot, eps,
        NUM_HEADS: tl.constexpr, NUM_KV: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
        QK_NORM: tl.constexpr,
    ):  # fmt: skip
        """Norm, rotate and store the pairs (a, b) `[rows, pairs]` of one head."""
        held = pair < HEAD_DIM // 2
        place_a, place_b = _places(pair, HEAD_DIM, ROTARY_DIM)
        if head < NUM_HEADS + NUM_KV:
            if QK_NORM:
                norm = q_norm if head < NUM_HEADS else k_norm
                spread = 1.0 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / HEAD_DIM + eps)
                a = a * spread[:, None] * tl.load(norm + place_a, mask=held, other=0.0)[None, :]
                b = b * spread[:, None] * tl.load(norm + place_b, mask=held, other=0.0)[None, :]
            a, b = a * c - b * s, b * c + a * s
        stored = live[:, None] & held[None, :]
        if head < NUM_HEADS:
            q_at = q_out + rows[:, None].to(tl.int64) * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM
            tl.store(q_at + place_a[None, :], a.to(q_out.dtype.element_ty), mask=stored)
            tl.store(q_at + place_b[None, :], b.to(q_out.dtype.element_ty), mask=stored)
        else:
            cache = k_cache if head < NUM_HEADS + NUM_KV else v_cache
            kv_head = (head - NUM_HEADS) % NUM_KV
            kv_at = (
                cache + sequence.to(tl.int64) * cache_sequence + kv_head * cache_head + slot.to(tl.int64) * cache_slot
            )[:, None]
            tl.store(kv_at + place_a[None, :], a.to(k_cache.dtype.element_ty), mask=stored)
            tl.store(kv_at + place_b[None, :], b.to(k_cache.dtype.element_ty), mask=stored)

    @triton.jit
    def _qkv_kernel(  # type: ignore[no-untyped-def]
        x, stats, weight, bias, shift, q_norm, k_norm, cos, sin, q_out, k_cache, v_cache,
        live_of, sequence_of, position_of, slot_of,
        cache_sequence, cache_head, cache_slot, eps, later, later_bytes, later_share,
        D: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV: tl.constexpr, HEAD_DIM: tl.constexpr,
        ROTARY_DIM: tl.constexpr, NUM_STATS: tl.constexpr, BLOCK_S: tl.constexpr,
        HAS_BIAS: tl.constexpr, LAYER_NORM: tl.constexpr, QK_NORM: tl.constexpr, X_SCALE: tl.constexpr,
        PRECISION: tl.constexpr, PDL: tl.constexpr,
        BM: tl.constexpr, BLOCK_P: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, TAIL: tl.constexpr = 0,
        EARLY: tl.constexpr = 0,
    ):  # fmt: skip
        HALF: tl.constexpr = HEAD_DIM // 2
        ROTARY_HALF: tl.constexpr = ROTARY_DIM // 2
        TILES: tl.constexpr = (HALF + BLOCK_P - 1) // BLOCK_P
        rows = tl.program_id(0) * BM + tl.arange(0, BM)
        head = tl.program_id(1) // TILES
        first_pair = (tl.program_id(1) % TILES) * BLOCK_P

        # both places of every pair, the first ones in front
        both = tl.arange(0, 2 * BLOCK_P)
        pair = first_pair + both % BLOCK_P
        second = both // BLOCK_P
        rotated = pair < ROTARY_HALF
        place = tl.where(
            rotated,
            pair + second * ROTARY_HALF,
            pair + ROTARY_HALF + second * ((HEAD_DIM - ROTARY_DIM) // 2),
        )
        cols = head * HEAD_DIM + (place if HALF % BLOCK_P == 0 else tl.where(pair < HALF, place, 0))
        ahead = weights_ahead(weight, cols, D, D, 0, BK, SPLIT, TAIL)
        if HAS_BIAS:
            offset = tl.load(bias + cols)
        if LAYER_NORM:
            off_mean = tl.load(shift + cols)
        live = tl.load(live_of + rows) != 0
        position = tl.load(position_of + rows)
        sequence = tl.load(sequence_of + rows)
        slot = tl.load(slot_of + rows)
        pair = first_pair + tl.arange(0, BLOCK_P)
        c, s = _angles(cos, sin, position, pair, live, ROTARY_DIM)
        pdl_wait(PDL)

        pdl_next(PDL and EARLY)
        y, scale, mean = normed_rows_product(
            x, stats, weight, ahead, rows, cols, eps, D, NUM_STATS, BLOCK_S, LAYER_NORM, X_SCALE, BK, SPLIT, PRECISION,
            TAIL,
        )  # fmt: skip
        pdl_next(PDL and not EARLY)
        ask_later(later, later_bytes, later_share)

        y = y * scale[:, None]
        if LAYER_NORM:
            y -= (mean * scale * X_SCALE)[:, None] * off_mean[None, :]
        if HAS_BIAS:
            y += offset.to(tl.float32)[None, :]
        if HALF % BLOCK_P > 0:  # a head's norm reads all of a block
            y = tl.where((first_pair + both % BLOCK_P < HALF)[None, :], y, 0.0)
        a, b = tl.split(tl.permute(tl.reshape(y, [BM, 2, BLOCK_P]), [0, 2, 1]))
        _place(
            a, b, head, pair, c, s, rows, live, sequence, slot, q_norm, k_norm, q_out, k_cache, v_cache,
            cache_sequence, cache_head, cache_slot, eps, NUM_HEADS, NUM_KV, HEAD_DIM, ROTARY_DIM, QK_NORM,
        )  # fmt: skip

    @triton.jit
    def _place_kernel(  # type: ignore[no-untyped-def]
        y, q_norm, k_norm, cos, sin, q_out, k_cache, v_cache, live_of, sequence_of, position_of, slot_of,
        cache_sequence, cache_head, cache_slot, eps,
        WIDTH: tl.constexpr, K_AT: tl.constexpr, V_AT: tl.constexpr,
        NUM_HEADS: tl.constexpr, NUM_KV: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
        QK_NORM: tl.constexpr, PDL: tl.constexpr, BLOCK_P: tl.constexpr,
    ):  # fmt: skip
        pdl_wait(PDL)
        row = tl.program_id(0) + tl.arange(0, 1)
        head = tl.program_id(1)
        pair = tl.arange(0, BLOCK_P)
        live = tl.load(live_of + row) != 0
        position, sequence, slot = tl.load(position_of + row), tl.load(sequence_of + row), tl.load(slot_of + row)
        place_a, place_b = _places(pair, HEAD_DIM, ROTARY_DIM)
        start = head * HEAD_DIM
        if head >= NUM_HEADS + NUM_KV:
            start = V_AT + (head - NUM_HEADS - NUM_KV) * HEAD_DIM
        elif head >= NUM_HEADS:
            start = K_AT + (head - NUM_HEADS) * HEAD_DIM
        real = live[:, None] & (pair < HEAD_DIM // 2)[None, :]
        y += row[:, None].to(tl.int64) * WIDTH + start
        a = tl.load(y + place_a[None, :], mask=real, other=0.0)
        b = tl.load(y + place_b[None, :], mask=real, other=0.0)
        c, s = _angles(cos, sin, position, pair, live, ROTARY_DIM)
        pdl_next(PDL)
        _place(
            a, b, head, pair, c, s, row, live, sequence, slot, q_norm, k_norm, q_out, k_cache, v_cache,
            cache_sequence, cache_head, cache_slot, eps, NUM_HEADS, NUM_KV, HEAD_DIM, ROTARY_DIM, QK_NORM,
        )  # fmt: skip


# Half types, by hidden size and rows of the weight; tuned offline on an H200 over whole steps (docs/kernels.md).
_TABLE: dict[tuple[int, ...], dict[str, int]] = {
    (576, 960): {"BLOCK_P": 8, "BK": 128, "TAIL": 16, "SPLIT": 4, "num_warps": 2, "num_stages": 1, "EARLY": 1},
    (896, 1152): {"BLOCK_P": 4, "BK": 64, "SPLIT": 2, "num_warps": 2, "num_stages": 5, "EARLY": 1},
    (1536, 2048): {"BLOCK_P": 8, "BK": 64, "SPLIT": 4, "num_warps": 4, "num_stages": 6, "EARLY": 1},
}


def _settings(shape: LayerShape, dtype: torch.dtype) -> dict[str, int]:
    """Pairs a program, depth of a product (and its tail), partial products, warps, stages, whether
    attention is let go at the wait."""
    size = shape.hidden_size, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    if dtype != torch.float32 and not shape.qk_norm and size in _TABLE:
        return _TABLE[size]
    pairs = triton.next_power_of_2(max(8, shape.head_dim // 2)) if shape.qk_norm else 8
    if dtype == torch.float32 or pairs > 32:
        return {"BLOCK_P": pairs, "BK": 32, "SPLIT": 1, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_P": pairs, "BK": 64, "SPLIT": 4, "num_warps": 4, "num_stages": 4, "EARLY": 1}


def qkv(
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    qk_norm: tuple[Tensor, Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    q_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Rows,
    shape: LayerShape,
    *,
    later: Tensor | None = None,
    pdl: bool = False,
    settings: dict[str, int] | None = None,
) -> None:
    """Make q, and store k and v, of every live row.

    Args:
        x: `[R, D]`, h times norm weight, times `x_scale(dtype)`.
        stats: `[R, 2, S]` fp32, see `tile.row_scale`.
        weight: `[(H + 2 KV) d, D]`, all q heads, then k, then v.
        bias: `[(H + 2 KV) d]` or None; for LayerNorm with the norm's own bias multiplied in.
        shift: `[(H + 2 KV) d]` fp32, W times norm weight; LayerNorm only.
        qk_norm: weights of the norms over heads `[d]` fp32 each.
        cos, sin: tables `[P, rotary_dim]` fp32 by position; the first half of sin is negated.
        q_out: `[R, H d]`, overwritten.
        k_cache, v_cache: `[B, KV, S, d]` of one layer, equal strides.
        rows: where each row stands.
        shape: of the layer.
        later: what a later kernel reads next, to be brought nearer (`tile.asked`).
        pdl: programmatic dependent launch.
        settings: in place of the table's.
    """
    bm = BLOCK_ROWS
    chosen = _settings(shape, x.dtype) if settings is None else settings
    if k_cache.stride() != v_cache.stride() or k_cache.stride(3) != 1:
        raise ValueError("expected caches of equal strides and a last axis without gaps")
    heads = shape.num_heads + 2 * shape.num_kv_heads
    tiles = triton.cdiv(shape.head_dim // 2, chosen["BLOCK_P"])
    if shape.qk_norm and tiles > 1:
        raise ValueError(f"a norm over heads of {shape.head_dim} needs BLOCK_P >= {shape.head_dim // 2}")
    grid = (len(rows) // bm, heads * tiles)
    _qkv_kernel[grid](
        x, stats, weight, bias, shift, *(qk_norm or (None, None)), cos, sin, q_out, k_cache, v_cache,
        rows.live, rows.sequence, rows.position, rows.slot,
        *k_cache.stride()[:3], shape.norm_eps, *asked(later, pdl, grid),
        D=shape.hidden_size, NUM_HEADS=shape.num_heads, NUM_KV=shape.num_kv_heads, HEAD_DIM=shape.head_dim,
        ROTARY_DIM=shape.rotary_dim, NUM_STATS=stats.shape[2], BLOCK_S=triton.next_power_of_2(stats.shape[2]),
        HAS_BIAS=bias is not None, LAYER_NORM=shape.layer_norm, QK_NORM=qk_norm is not None,
        X_SCALE=x_scale(x.dtype), PRECISION=precision(x.dtype), PDL=pdl, BM=bm, **chosen,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def place_qkv(
    y: Tensor,
    starts: tuple[int, int],
    qk_norm: tuple[Tensor, Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    q_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Rows,
    shape: LayerShape,
    *,
    pdl: bool = False,
) -> None:
    """Norm, rotate and store what was multiplied: the first rows' q, and k and v, as far as they are live.

    Args:
        y: `[N, M]` fp32, the products of rows 0..N-1 with their bias: q from column 0 on.
        starts: the columns that k and v start at.
        qk_norm, cos, sin, q_out, k_cache, v_cache, rows, shape, pdl: as in `qkv`.
    """
    if k_cache.stride() != v_cache.stride() or k_cache.stride(3) != 1:
        raise ValueError("expected caches of equal strides and a last axis without gaps")
    _place_kernel[(len(y), shape.num_heads + 2 * shape.num_kv_heads)](
        y, *(qk_norm or (None, None)), cos, sin, q_out, k_cache, v_cache,
        rows.live, rows.sequence, rows.position, rows.slot, *k_cache.stride()[:3], shape.norm_eps,
        WIDTH=y.shape[1], K_AT=starts[0], V_AT=starts[1], NUM_HEADS=shape.num_heads, NUM_KV=shape.num_kv_heads,
        HEAD_DIM=shape.head_dim, ROTARY_DIM=shape.rotary_dim, QK_NORM=qk_norm is not None, PDL=pdl,
        BLOCK_P=triton.next_power_of_2(shape.head_dim // 2), num_warps=1, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
