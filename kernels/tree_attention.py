"""Attention of decode rows over the cache, each along its own root-to-leaf path, reduced in position order.

    o = sum_p softmax_p(cap(scale * q . k_p)) v_p,    p over the positions that the row sees

One program takes one row and the query heads of one KV head (the 16 rows of its products), and keys by absolute
position: position p lies in slot p if it is committed (p < base), else in slot base + path[p - base]. Keys are read in
blocks at fixed absolute positions, with a running maximum over the row's own keys, and contexts are cut into splits
at fixed absolute positions, whose partial results are put together one after the other. So a row's bits depend on
its own tokens and positions only: not on the tree, the place in it, the round's start, other rows or the cache
(design rule 3), because its keys stand at the same place of the same products whatever tree they came from. Weights
are rounded to the cache's dtype before their product with v, and the denominator is the product of the same weights
with ones.

A split's program that finishes last (an integer counter tells) puts the parts together; no number depends on which one
it was. Keys that a row must not see are not read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layer_shape import LayerShape
from .rows import PATH, Rows
from .tile import precision

try:
    import triton
    import triton.language as tl

    from .tile import pdl_next, pdl_wait
except ImportError:
    triton = None

SPLIT_LEN = 256  # positions a program; boundaries are absolute
NO_WINDOW = 1 << 30
LOG2_E = 1.4426950408889634


def tree_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Rows, shape: LayerShape, window: int | None = None
) -> Tensor:
    """fp64 `[R, H d]`, one row at a time; rows that are not live give zeros."""
    out = torch.zeros(len(rows), shape.num_heads, shape.head_dim, dtype=torch.float64)
    live, sequences, positions = rows.live.tolist(), rows.sequence.tolist(), rows.position.tolist()
    bases, paths = rows.base.tolist(), rows.path.tolist()
    for r in range(len(rows)):
        if not live[r]:
            continue
        first = 0 if window is None else max(0, positions[r] - window + 1)
        slots = [p if p < bases[r] else bases[r] + paths[r][p - bases[r]] for p in range(first, positions[r] + 1)]
        keys, values = (c[sequences[r]][:, slots].cpu().double() for c in (k_cache, v_cache))
        own = q[r].cpu().double().view(shape.num_kv_heads, -1, shape.head_dim)
        scores = own @ keys.transpose(1, 2) * shape.attention_scale
        if shape.softcap is not None:
            scores = shape.softcap * torch.tanh(scores / shape.softcap)
        out[r] = (scores.softmax(-1) @ values).reshape(shape.num_heads, shape.head_dim)
    return out.flatten(1)


if triton is not None:

    @triton.jit(do_not_specialize=["num_splits"])  # one kernel for caches of all sizes
    def _tree_attention_kernel(  # type: ignore[no-untyped-def]
        q, k_cache, v_cache, out, part_acc, part_max, part_sum, arrived,
        live_of, sequence_of, position_of, base_of, path_of,
        cache_sequence, cache_head, cache_slot, scale, softcap, window, num_splits,
        NUM_KV: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, PATH: tl.constexpr, SPLIT_LEN: tl.constexpr,
        BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        pdl_wait(PDL)
        row = tl.program_id(0)
        kv_head = tl.program_id(1)
        live = tl.load(live_of + row)
        position = tl.load(position_of + row)
        base = tl.load(base_of + row)
        sequence = tl.load(sequence_of + row).to(tl.int64)
        g = tl.arange(0, BLOCK_G)
        d = tl.arange(0, BLOCK_D)
        of_head = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
        q_at = row * (NUM_KV * GROUP * HEAD_DIM) + (kv_head * GROUP + g)[:, None] * HEAD_DIM + d[None, :]
        queries = tl.load(q + q_at, mask=of_head, other=0.0)
        first_key = tl.maximum(position - window + 1, 0)
        first_split = first_key // SPLIT_LEN
        num_parts = position // SPLIT_LEN - first_split + 1
        if (live == 0) | (tl.program_id(2) >= num_parts):
            return
        keys_of = k_cache + sequence * cache_sequence + kv_head * cache_head
        values_of = v_cache + sequence * cache_sequence + kv_head * cache_head

        start = (first_split + tl.program_id(2)) * SPLIT_LEN
        stop = tl.minimum(start + SPLIT_LEN, position + 1)
        largest = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_G, 16], tl.float32)
        acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        for first in range(start, stop, BLOCK):
            p = first + tl.arange(0, BLOCK)
            seen = (p <= position) & (p >= first_key)
            drafted = seen & (p > base)  # the root stands at base itself; so a plain row waits for no load here
            node = tl.load(path_of + row * PATH + (p - base), mask=drafted, other=0)
            slot = tl.where(drafted, base + node, p).to(tl.int64) * cache_slot
            keys = tl.load(
                keys_of + slot[None, :] + d[:, None], mask=seen[None, :] & (d < HEAD_DIM)[:, None], other=0.0
            )
            values = tl.load(
                values_of + slot[:, None] + d[None, :], mask=seen[:, None] & (d < HEAD_DIM)[None, :], other=0.0
            )
            scores = tl.dot(queries, keys, input_precision=PRECISION) * scale
            if HAS_SOFTCAP:
                # tanh(x) = 1 - 2 / (exp(2x) + 1)
                scores = softcap - 2.0 * softcap / (tl.exp(scores * (2.0 / softcap)) + 1.0)
            scores = tl.where(seen[None, :], scores * 1.4426950408889634, float("-inf"))
            highest = tl.maximum(largest, tl.max(scores, 1))
            finite = tl.where(highest == float("-inf"), 0.0, highest)  # no key seen yet: windows begin inside a block
            shrink = tl.exp2(largest - finite)
            weights = tl.exp2(scores - finite[:, None]).to(v_cache.dtype.element_ty)
            ones = tl.full([BLOCK, 16], 1.0, v_cache.dtype.element_ty)
            total = total * shrink[:, None] + tl.dot(weights, ones, input_precision=PRECISION)
            acc = acc * shrink[:, None] + tl.dot(weights, values, input_precision=PRECISION)
            largest = highest
        pdl_next(PDL)
        denominator = tl.max(total, 1)  # sixteen equal columns
        if num_parts == 1:
            tl.store(out + q_at, (acc / denominator[:, None]).to(out.dtype.element_ty), mask=of_head)
        else:
            own = (row * NUM_KV + kv_head) * num_splits
            at = (own + tl.program_id(2)).to(tl.int64)
            tl.store(part_max + at * BLOCK_G + g, largest)
            tl.store(part_sum + at * BLOCK_G + g, denominator)
            tl.store(part_acc + (at * BLOCK_G + g[:, None]) * BLOCK_D + d[None, :], acc)
            tl.debug_barrier()
            counter = arrived + row * NUM_KV + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel") == num_parts - 1:
                tl.debug_barrier()
                tl.store(counter, 0)
                largest = tl.load(part_max + own * BLOCK_G + g, cache_modifier=".cg")
                denominator = tl.load(part_sum + own * BLOCK_G + g, cache_modifier=".cg")
                to = (own.to(tl.int64) * BLOCK_G + g[:, None]) * BLOCK_D + d[None, :]
                acc = tl.load(part_acc + to, cache_modifier=".cg")
                for i in range(1, num_parts):
                    m = tl.load(part_max + (own + i) * BLOCK_G + g, cache_modifier=".cg")
                    highest = tl.maximum(largest, m)
                    old, new = tl.exp2(largest - highest), tl.exp2(m - highest)
                    s = tl.load(part_sum + (own + i) * BLOCK_G + g, cache_modifier=".cg")
                    denominator = denominator * old + s * new
                    to = ((own + i).to(tl.int64) * BLOCK_G + g[:, None]) * BLOCK_D + d[None, :]
                    acc = acc * old[:, None] + tl.load(part_acc + to, cache_modifier=".cg") * new[:, None]
                    largest = highest
                tl.store(out + q_at, (acc / denominator[:, None]).to(out.dtype.element_ty), mask=of_head)


class AttentionScratch:
    """Partial results of splits, for R rows of at most `context` positions; counters are zero between launches."""

    def __init__(self, num_rows: int, context: int, shape: LayerShape, device: torch.device | str) -> None:
        self.num_splits = -(-context // SPLIT_LEN)
        block_g, block_d = _blocks(shape)
        size = num_rows * shape.num_kv_heads
        parts = size * self.num_splits if self.num_splits > 1 else 1
        self.acc = torch.empty(parts, block_g, block_d, device=device)
        self.largest, self.total = torch.empty(2, parts, block_g, device=device).unbind()
        self.arrived = torch.zeros(size, dtype=torch.int32, device=device)


def _blocks(shape: LayerShape) -> tuple[int, int]:
    def padded(size: int) -> int:
        return max(16, 1 << (size - 1).bit_length())

    return padded(shape.group_size), padded(shape.head_dim)


# Half types, by width of a head; tuned offline on an H100 over whole steps (docs/kernels.md).
_TABLE: dict[int, dict[str, int]] = {
    64: {"BLOCK": 256, "num_warps": 8, "num_stages": 1},
    128: {"BLOCK": 256, "num_warps": 8, "num_stages": 1},
}


def _settings(shape: LayerShape, dtype: torch.dtype) -> dict[str, int]:
    """Keys a product, warps, stages."""
    if dtype != torch.float32 and shape.head_dim in _TABLE:
        return _TABLE[shape.head_dim]
    if dtype == torch.float32:
        return {"BLOCK": 32, "num_warps": 4, "num_stages": 2}
    if shape.head_dim <= 128:
        return {"BLOCK": 256, "num_warps": 8, "num_stages": 1}
    return {"BLOCK": 64, "num_warps": 8, "num_stages": 2}


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    scratch: AttentionScratch,
    rows: Rows,
    shape: LayerShape,
    window: int | None = None,
    *,
    pdl: bool = False,
    settings: dict[str, int] | None = None,
) -> None:
    """Attend from every live row; its own key must be in the cache.

    Args:
        q: `[R, H d]`, rotated, in the model's dtype.
        k_cache, v_cache: `[B, KV, S, d]` of one layer, equal strides.
        out: `[R, H d]`, overwritten.
        scratch: for at least as many rows, and contexts beyond every row's position.
        rows: where each row stands.
        shape: of the layer.
        window: a row at p sees p - window + 1 .. p; None all.
        pdl, settings: as in `qkv`.
    """
    if k_cache.stride() != v_cache.stride() or k_cache.stride(3) != 1:
        raise ValueError("expected caches of equal strides and a last axis without gaps")
    chosen = _settings(shape, q.dtype) if settings is None else settings
    block_g, block_d = _blocks(shape)
    splits = scratch.num_splits
    if window is not None:
        splits = min(splits, -(-(window - 1) // SPLIT_LEN) + 1)
    _tree_attention_kernel[(len(rows), shape.num_kv_heads, splits)](
        q, k_cache, v_cache, out, scratch.acc, scratch.largest, scratch.total, scratch.arrived,
        rows.live, rows.sequence, rows.position, rows.base, rows.path,
        *k_cache.stride()[:3], shape.attention_scale, shape.softcap or 1.0, window or NO_WINDOW,
        scratch.num_splits, NUM_KV=shape.num_kv_heads, GROUP=shape.group_size, HEAD_DIM=shape.head_dim,
        HAS_SOFTCAP=shape.softcap is not None, PRECISION=precision(q.dtype), PATH=PATH, SPLIT_LEN=SPLIT_LEN,
        BLOCK_G=block_g, BLOCK_D=block_d, PDL=pdl, **chosen, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
