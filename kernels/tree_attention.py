"""Attention of decode rows over the cache, each along its own root-to-leaf path, reduced in position order.

    o = sum_p softmax_p(cap(scale * q . k_p)) v_p,    p over the positions that the row sees

One program takes one row and the query heads of one KV head (the rows of its products), and keys by absolute
position: position p lies in slot p if it is committed (p < base), else in slot base + path[p - base]. Keys are read in
blocks at fixed absolute positions (half a block where a split holds no more of them), with a running maximum over the
row's own keys, and contexts are cut into splits at absolute positions that follow from the row's own position, whose
partial results are put together one after the other. So a row's bits depend on its own tokens and positions only: not
on the tree, the place in it, the round's start, other rows or the cache (design rule 3), because its keys stand at the
same place of the same products whatever tree they came from. Weights are rounded to the cache's dtype before their
product with v, and the denominator is the product of the same weights with ones.

Rows of one sequence with splits of one length read most of their keys together. A split is closed if all of them see
all of it: its positions are committed and in everybody's window. If a tile of 16 has more such rows than a KV head has
query heads, a program takes those rows with one query head in place of one row with all heads. It is the same code on
the same number of product rows, and what a product row holds does not depend on its place or on the others, so bits do
not tell. Which splits are closed is decided on the device; the grid is the same, and programs without work leave.

The program that adds a row's last part (an integer counter for each row and query head tells) puts the parts together;
no number depends on which one it was. Keys that a row must not see are not read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layer_shape import LayerShape
from .rows import PATH, Rows
from .tile import BLOCK_ROWS, asked, precision

try:
    import triton
    import triton.language as tl

    from .tile import ask_later, bring_near, pdl_next, pdl_wait
except ImportError:
    triton = None

SPLIT_LEN = 256  # positions a program, a power of two; boundaries are absolute
# A row at position p < 256 has one split, at 256 <= p < 1024 splits of 128, beyond of 256: one program for all keys is
# fastest while one block holds them, then many short ones are, until so many parts take their time (docs/kernels.md).
SHORT_UP_TO = 4  # splits
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


def most_splits(context: int) -> int:
    """Splits of any row at a position below `context`."""
    if context <= SPLIT_LEN:
        return 1
    short = -(-min(context, SHORT_UP_TO * SPLIT_LEN) // (SPLIT_LEN // 2))
    return max(short, -(-context // SPLIT_LEN))


if triton is not None:

    @triton.jit
    def _split_bits(position, SPLIT_BITS: tl.constexpr, SHORT_UP_TO: tl.constexpr):  # type: ignore[no-untyped-def]
        """Log2 of the length of every split of rows at these positions; divisions by it would take a while."""
        short = (position >= (1 << SPLIT_BITS)) & (position < (SHORT_UP_TO << SPLIT_BITS))
        return tl.where(short, SPLIT_BITS - 1, SPLIT_BITS)

    @triton.jit
    def _slots(path, p, seen, base):  # type: ignore[no-untyped-def]
        """Where the keys of the positions p stand that a row sees."""
        drafted = seen & (p > base)  # the root stands at base itself; so a plain row waits for no load here
        return tl.where(drafted, base + tl.load(path + (p - base), mask=drafted, other=0), p)

    @triton.jit
    def _read(keys_of, values_of, slot, seen, cache_slot, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
        """Keys [D, BLOCK] and values [BLOCK, D] of slots; zeros where they are not seen."""
        d = tl.arange(0, BLOCK_D)
        at = slot.to(tl.int64) * cache_slot
        keys = tl.load(keys_of + at[None, :] + d[:, None], mask=seen[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
        values = tl.load(values_of + at[:, None] + d[None, :], mask=seen[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        return keys, values

    @triton.jit
    def _take_in(  # type: ignore[no-untyped-def]
        queries, keys, values, seen, scale, softcap, largest, total, acc,
        HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """The running maximum, denominator and sum after these keys."""
        scores = tl.dot(queries, keys, input_precision=PRECISION) * scale
        if HAS_SOFTCAP:
            # tanh(x) = 1 - 2 / (exp(2x) + 1)
            scores = softcap - 2.0 * softcap / (tl.exp(scores * (2.0 / softcap)) + 1.0)
        scores = tl.where(seen[None, :], scores * 1.4426950408889634, float("-inf"))
        highest = tl.maximum(largest, tl.max(scores, 1))
        finite = tl.where(highest == float("-inf"), 0.0, highest)  # no key seen yet: windows begin inside a block
        shrink = tl.exp2(largest - finite)
        weights = tl.exp2(scores - finite[:, None]).to(values.dtype)
        ones = tl.full([values.shape[0], 16], 1.0, values.dtype)
        total = total * shrink[:, None] + tl.dot(weights, ones, input_precision=PRECISION)
        acc = acc * shrink[:, None] + tl.dot(weights, values, input_precision=PRECISION)
        return highest, total, acc

    @triton.jit
    def _block(  # type: ignore[no-untyped-def]
        queries, keys_of, values_of, path, first, position, first_key, base, cache_slot, scale, softcap,
        largest, total, acc,
        HEAD_DIM: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Positions first .. first + BLOCK - 1, one block of a split's several."""
        p = first + tl.arange(0, BLOCK)
        seen = (p <= position) & (p >= first_key)
        slot = _slots(path, p, seen, base)
        keys, values = _read(keys_of, values_of, slot, seen, cache_slot, HEAD_DIM, BLOCK_D)
        return _take_in(queries, keys, values, seen, scale, softcap, largest, total, acc, HAS_SOFTCAP, PRECISION)

    @triton.jit
    def _in_one_block(  # type: ignore[no-untyped-def]
        q_at, q_mask, keys_of, values_of, path, first, position, first_key, base, closed, cache_slot, scale, softcap,
        largest, total, acc,
        HEAD_DIM: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr,
        BLOCK: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        """A whole split. The keys of a closed one are on their way while the kernel in front still stores this step's;
        the two cases are written out, for one block that is partly there takes twice the registers."""
        p = first + tl.arange(0, BLOCK)
        seen = (p <= position) & (p >= first_key)
        if closed:
            keys, values = _read(keys_of, values_of, p, seen, cache_slot, HEAD_DIM, BLOCK_D)
            pdl_wait(PDL)
            pdl_next(PDL and EARLY)
            queries = tl.load(q_at, mask=q_mask, other=0.0)
            a, b, c = _take_in(queries, keys, values, seen, scale, softcap, largest, total, acc, HAS_SOFTCAP, PRECISION)
        else:
            slot = _slots(path, p, seen, base)
            pdl_wait(PDL)
            pdl_next(PDL and EARLY)
            queries = tl.load(q_at, mask=q_mask, other=0.0)
            keys, values = _read(keys_of, values_of, slot, seen, cache_slot, HEAD_DIM, BLOCK_D)
            a, b, c = _take_in(queries, keys, values, seen, scale, softcap, largest, total, acc, HAS_SOFTCAP, PRECISION)
        return a, b, c

    @triton.jit
    def _part(part_acc, part_max, part_sum, first, num_parts, i, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
        """Part i of pairs whose parts lie from `first` [G] on; if there is none, what changes nothing."""
        largest = tl.load(part_max + first + i, mask=i < num_parts, other=float("-inf"), cache_modifier=".cg")
        total = tl.load(part_sum + first + i, mask=i < num_parts, other=0.0, cache_modifier=".cg")
        at = (first.to(tl.int64)[:, None] + i) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        acc = tl.load(part_acc + at, mask=i < num_parts[:, None], other=0.0, cache_modifier=".cg")
        return largest, total, acc

    @triton.jit
    def _put_together(  # type: ignore[no-untyped-def]
        part_acc, part_max, part_sum, first, num_parts, BLOCK_D: tl.constexpr, AHEAD: tl.constexpr
    ):
        """Results [G, D] of pairs that have `num_parts` [G] parts from `first` on, one part after the other.

        Loads of AHEAD parts are issued together, so that there is one wait for all of them. Pairs that are not complete
        give something, which nobody may store."""
        largest, total, acc = _part(part_acc, part_max, part_sum, first, num_parts, 0, BLOCK_D)
        largest = tl.where(num_parts > 0, largest, 0.0)  # pairs without parts give zeros
        total = tl.where(num_parts > 0, total, 1.0)
        for i in range(1, tl.max(num_parts, 0), AHEAD):
            parts = ()
            for j in tl.static_range(AHEAD):
                parts = parts + (_part(part_acc, part_max, part_sum, first, num_parts, i + j, BLOCK_D),)  # type: ignore[assignment]
            for j in tl.static_range(AHEAD):
                m, s, a = parts[j]  # type: ignore[var-annotated]
                highest = tl.maximum(largest, m)
                old, new = tl.exp2(largest - highest), tl.exp2(m - highest)
                total = total * old + s * new
                acc = acc * old[:, None] + a * new[:, None]
                largest = highest
        return acc / total[:, None]

    @triton.jit(do_not_specialize=["num_splits"])  # one kernel for caches of all sizes
    def _tree_attention_kernel(  # type: ignore[no-untyped-def]
        q, k_cache, v_cache, out, part_acc, part_max, part_sum, arrived,
        live_of, sequence_of, position_of, base_of, path_of,
        cache_sequence, cache_head, cache_slot, scale, softcap, window, num_splits,
        later, later_bytes, later_share,
        NUM_KV: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, PATH: tl.constexpr,
        SPLIT_BITS: tl.constexpr, SHORT_UP_TO: tl.constexpr,
        SHARE: tl.constexpr, SETTLED: tl.constexpr, AHEAD: tl.constexpr,
        BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
        EARLY: tl.constexpr = 0,
    ):  # fmt: skip
        ask_later(later, later_bytes, later_share)  # idle programs too, and the memory is idle here
        # Rows come last: programs start in this order, and the first rows of a tile have the most to do.
        kv_head, row = tl.program_id(1), tl.program_id(2)
        live = tl.load(live_of + row)
        position = tl.load(position_of + row)
        base = tl.load(base_of + row)
        sequence = tl.load(sequence_of + row)
        d = tl.arange(0, BLOCK_D)
        inside = (d < HEAD_DIM)[None, :]
        # A row of the products is a pair of a row and a query head: here this row with the query heads of the KV head.
        place = tl.arange(0, BLOCK_G)
        real = place < GROUP
        pair = row * (NUM_KV * GROUP) + kv_head * GROUP + place
        first_key = tl.maximum(position - window + 1, 0)
        bits = _split_bits(position, SPLIT_BITS, SHORT_UP_TO)
        first_split = first_key >> bits
        split = (tl.maximum(base - window + 1, 0) >> bits) + tl.program_id(0)
        start, end = split << bits, (split + 1) << bits
        idle = (live == 0) | (split < first_split) | (split > position >> bits)
        pair_position = position + tl.zeros_like(place)
        if SHARE:
            tile = row // 16 * 16 + place
            mate = (tl.load(live_of + tile) != 0) & (tl.load(base_of + tile) == base)
            mate &= tl.load(sequence_of + tile) == sequence
            tile_position = tl.load(position_of + tile)
            mate &= _split_bits(tile_position, SPLIT_BITS, SHORT_UP_TO) == bits
            counted = tl.sum(tl.where(mate, tl.where(tile < row, 17, 16), 0), 0)
            num_mates, rank = counted // 16, counted % 16  # rank: of this row among its mates
            shared = (end <= base) & (start >= base + PATH - window) & (num_mates > GROUP)
            idle |= shared & (rank >= GROUP)
        if idle:
            if row % 16 == 0:  # a kernel in which none waits would let those behind it run before those in front
                pdl_wait(PDL)
            return
        if SHARE:
            # all mates with one query head; written as arithmetic, for which Triton needs no exchange between threads
            pair = tl.where(shared, tile, row) * (NUM_KV * GROUP) + kv_head * GROUP + tl.where(shared, rank, place)
            real = tl.where(shared, mate, real)
            pair_position = tl.where(shared, tile_position, pair_position)
        pair_first = tl.maximum(pair_position - window + 1, 0) >> bits
        pair_parts = tl.where(real, (pair_position >> bits) - pair_first + 1, 0)
        keys_of = k_cache + sequence.to(tl.int64) * cache_sequence + kv_head * cache_head
        values_of = v_cache + sequence.to(tl.int64) * cache_sequence + kv_head * cache_head
        path = path_of + row * PATH
        q_at, q_mask = q + pair[:, None] * HEAD_DIM + d[None, :], real[:, None] & inside

        stop = tl.minimum(end, position + 1)
        largest = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_G, 16], tl.float32)
        acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        HALF: tl.constexpr = BLOCK // 2 if BLOCK >= 32 else BLOCK
        AT_ONCE: tl.constexpr = BLOCK >= 1 << SPLIT_BITS
        closed = SETTLED & AT_ONCE & (stop <= base)
        if PDL and SETTLED:  # noqa: SIM102 (one is known when it is compiled)
            if not closed:
                at = start.to(tl.int64) * cache_slot
                each = cache_slot * (k_cache.dtype.element_ty.primitive_bitwidth // 8)
                size = (tl.minimum(stop, base) - start) * each
                bring_near((keys_of + at).to(tl.int64), size)
                bring_near((values_of + at).to(tl.int64), size)
        if AT_ONCE:
            if stop - start <= HALF:  # a row's position tells, so its bits are the same in every tree
                largest, total, acc = _in_one_block(
                    q_at, q_mask, keys_of, values_of, path, start, position, first_key, base, closed, cache_slot, scale,
                    softcap, largest, total, acc, HEAD_DIM, HAS_SOFTCAP, PRECISION, BLOCK_D, HALF, PDL, EARLY,
                )  # fmt: skip
            else:
                largest, total, acc = _in_one_block(
                    q_at, q_mask, keys_of, values_of, path, start, position, first_key, base, closed, cache_slot, scale,
                    softcap, largest, total, acc, HEAD_DIM, HAS_SOFTCAP, PRECISION, BLOCK_D, BLOCK, PDL, EARLY,
                )  # fmt: skip
        else:
            pdl_wait(PDL)
            pdl_next(PDL and EARLY)
            queries = tl.load(q_at, mask=q_mask, other=0.0)
            if stop - start <= HALF:
                largest, total, acc = _block(
                    queries, keys_of, values_of, path, start, position, first_key, base, cache_slot, scale, softcap,
                    largest, total, acc, HEAD_DIM, HAS_SOFTCAP, PRECISION, BLOCK_D, HALF,
                )  # fmt: skip
            else:
                for first in range(start, stop, BLOCK):
                    largest, total, acc = _block(
                        queries, keys_of, values_of, path, first, position, first_key, base, cache_slot, scale, softcap,
                        largest, total, acc, HEAD_DIM, HAS_SOFTCAP, PRECISION, BLOCK_D, BLOCK,
                    )  # fmt: skip
        pdl_next(PDL and not EARLY)
        denominator = tl.max(total, 1)  # sixteen equal columns
        out_at = pair[:, None] * HEAD_DIM + d[None, :]
        if position >> bits == first_split:  # the only part
            tl.store(out + out_at, (acc / denominator[:, None]).to(out.dtype.element_ty), mask=real[:, None] & inside)
        else:
            own = pair * num_splits
            at = own + split - pair_first
            tl.store(part_max + at, largest, mask=real)
            tl.store(part_sum + at, denominator, mask=real)
            tl.store(part_acc + at.to(tl.int64)[:, None] * BLOCK_D + d[None, :], acc, mask=real[:, None])
            tl.debug_barrier()
            last = real & (tl.atomic_add(arrived + pair, 1, mask=real, sem="acq_rel") == pair_parts - 1)
            if tl.max(last.to(tl.int32), 0) == 1:
                tl.debug_barrier()
                tl.store(arrived + pair, 0, mask=last)
                result = _put_together(part_acc, part_max, part_sum, own, pair_parts, BLOCK_D, AHEAD)
                tl.store(out + out_at, result.to(out.dtype.element_ty), mask=last[:, None] & inside)


class AttentionScratch:
    """Partial results of splits, for R rows of at most `context` positions; counters are zero between launches."""

    def __init__(self, num_rows: int, context: int, shape: LayerShape, device: torch.device | str) -> None:
        self.num_splits = most_splits(context)
        pairs = num_rows * shape.num_heads
        parts = pairs * self.num_splits if self.num_splits > 1 else 1
        self.acc = torch.empty(parts, _blocks(shape)[1], device=device)
        self.largest, self.total = torch.empty(2, parts, device=device).unbind()
        self.arrived = torch.zeros(pairs, dtype=torch.int32, device=device)


def _blocks(shape: LayerShape) -> tuple[int, int]:
    def padded(size: int) -> int:
        return max(16, 1 << (size - 1).bit_length())

    return padded(shape.group_size), padded(shape.head_dim)


# Half types, by width of a head; tuned offline over whole steps (docs/kernels.md).
_TABLE: dict[int, dict[str, int]] = {
    64: {"BLOCK": 256, "num_warps": 8, "num_stages": 1, "EARLY": 1},
    128: {"BLOCK": 256, "num_warps": 8, "num_stages": 1, "EARLY": 1},
}


def _settings(shape: LayerShape, dtype: torch.dtype) -> dict[str, int]:
    """Keys a product, warps, stages, whether the next kernel is let go at the wait."""
    if dtype != torch.float32 and shape.head_dim in _TABLE:
        return _TABLE[shape.head_dim]
    if dtype == torch.float32:
        return {"BLOCK": 32, "num_warps": 4, "num_stages": 2}
    if shape.head_dim <= 128:
        return {"BLOCK": 256, "num_warps": 8, "num_stages": 1, "EARLY": 1}
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
    share: bool = True,
    settled: bool = True,
    later: Tensor | None = None,
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
        share: let rows of a sequence read what they all see together; the bits are the same, only times are not.
        settled: whether keys below each row's base were stored by earlier steps, so that they may be read before the
            kernel in front is done.
        later, pdl, settings: as in `qkv`.
    """
    if k_cache.stride() != v_cache.stride() or k_cache.stride(3) != 1:
        raise ValueError("expected caches of equal strides and a last axis without gaps")
    chosen = _settings(shape, q.dtype) if settings is None else settings
    block_g, block_d = _blocks(shape)
    splits = scratch.num_splits
    # more heads than that: no tile has more rows; no whole tile: rows of other kernels (bench/one_row.py)
    share = share and shape.group_size < BLOCK_ROWS and len(rows) % BLOCK_ROWS == 0
    if window is not None:  # of all rows that may stand on one root
        splits = min(splits, -(-(window + PATH - 2) // (SPLIT_LEN // 2)) + 1)
    # parts on their way take 64 registers a thread at most
    ahead = max(1, min(16, 64 * 32 * chosen["num_warps"] // (block_g * block_d)))
    grid = (splits, shape.num_kv_heads, len(rows))
    _tree_attention_kernel[grid](
        q, k_cache, v_cache, out, scratch.acc, scratch.largest, scratch.total, scratch.arrived,
        rows.live, rows.sequence, rows.position, rows.base, rows.path,
        *k_cache.stride()[:3], shape.attention_scale, shape.softcap or 1.0, window or NO_WINDOW,
        scratch.num_splits, *asked(later, pdl, grid),
        NUM_KV=shape.num_kv_heads, GROUP=shape.group_size, HEAD_DIM=shape.head_dim,
        HAS_SOFTCAP=shape.softcap is not None, PRECISION=precision(q.dtype), PATH=PATH,
        SPLIT_BITS=SPLIT_LEN.bit_length() - 1, SHORT_UP_TO=SHORT_UP_TO,
        SHARE=share, SETTLED=settled, AHEAD=ahead, BLOCK_G=block_g, BLOCK_D=block_d, PDL=pdl,
        **chosen, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
