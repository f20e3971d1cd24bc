"""The way back from an MLP of which each tile of rows uses some neurons: `residual_linear` over a neuron-major weight.

    y = sum over i < count of a[:, i] W[ids[i], :]  + b,    h' = h + y,    and x', stats' as in `residual_linear`

The weight is `[FF, D]`, so that a neuron that no row of the tile uses is a row that no load touches; the activations
are compact (`kept.py`). A program makes BN columns of 16 rows from a share of the list. Shares are whole blocks of
SPLIT * BK places, dealt by the count alone, so that short lists give every program less to do; the program that
finishes last (an integer counter tells) adds the parts in order. So a row's order of summation depends on its own
tile's list and on nothing else. One pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kept import ZEROS, Kept
from .residual_linear import Parts, residual_linear_reference
from .rows import Rows
from .tile import BLOCK_ROWS, precision, x_scale

try:
    import triton
    import triton.language as tl

    from .residual_linear import _leave
    from .tile import pdl_next, pdl_wait
except ImportError:
    triton = None

PROGRAMS, MOST_PARTS = 256, 16  # what a launch aims at: two programs for each multiprocessor of an H100


def kept_down_reference(
    a: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor | None, next_weight: Tensor | None, kept: Kept
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `residual_linear_reference`, from the arguments of `kept_down`."""
    whole = torch.zeros(a.shape, device=a.device)
    for tile, count in enumerate(kept.count.tolist()):
        rows = slice(BLOCK_ROWS * tile, BLOCK_ROWS * (tile + 1))
        whole[rows, kept.ids[tile, :count].long()] = a[rows, :count].float()
    used = (whole != 0).any(0)  # what a list leaves out is not read, whatever stands there
    return residual_linear_reference(whole[:, used], weight[used].T, bias, hidden, next_weight)


if triton is not None:

    @triton.jit
    def _weights_at(weight, ids, at, end, cols, D: tl.constexpr):  # type: ignore[no-untyped-def]
        """`[SPLIT, BK, BN]` of the neurons at places of the list; zeros from `end` on and beyond D."""
        real = at < end
        neuron = tl.load(ids + at, mask=real, other=0)
        return tl.load(
            weight + neuron[:, :, None].to(tl.int64) * D + cols[None, None, :],
            mask=real[:, :, None] & (cols < D)[None, None, :], other=0.0,
        )  # fmt: skip

    @triton.jit
    def _kept_down_kernel(  # type: ignore[no-untyped-def]
        a, weight, bias, hidden, out, next_weight, x_next, second_norm, x_second, stats, parts, arrived, live_of,
        ids, count_of,
        FF: tl.constexpr, D: tl.constexpr, ZEROS: tl.constexpr, NUM_TILES: tl.constexpr, HAS_BIAS: tl.constexpr,
        RESIDUAL: tl.constexpr, STATS: tl.constexpr, MEANS: tl.constexpr, NORMS: tl.constexpr, X_SCALE: tl.constexpr,
        PRECISION: tl.constexpr, PDL: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, PARTS: tl.constexpr,
        HOLD: tl.constexpr = 0, EARLY: tl.constexpr = 0,
    ):  # fmt: skip
        rows = tl.program_id(0) * BM + tl.arange(0, BM)
        tile = tl.program_id(1)
        cols = tile * BN + tl.arange(0, BN)
        inside = cols < D
        count = tl.load(count_of + tl.program_id(0))
        share = tl.cdiv(tl.cdiv(count, SPLIT * BK), PARTS) * (SPLIT * BK)
        first = tl.program_id(2) * share
        end = tl.minimum(first + share, count)
        ids += tl.program_id(0) * FF
        place = tl.arange(0, SPLIT)[:, None] * BK + tl.arange(0, BK)[None, :]
        if HOLD:
            held = _weights_at(weight, ids, first + place, end, cols, D)
        if HAS_BIAS:
            offset = tl.load(bias + cols, mask=inside, other=0.0)
        first_weight = cols.to(tl.float32)
        second_weight = first_weight
        if NORMS > 0:
            first_weight = tl.load(next_weight + cols, mask=inside, other=0.0)
        if NORMS > 1:
            second_weight = tl.load(second_norm + cols, mask=inside, other=0.0)
        live = tl.load(live_of + rows)
        if RESIDUAL:
            to_before = hidden + rows[:, None].to(tl.int64) * D + cols[None, :]
            before = tl.load(to_before, mask=inside[None, :], other=0.0)
        pdl_wait(PDL)

        pdl_next(PDL and EARLY)
        # Whole vectors, up to where `up_linear` leaves zeros: a ragged mask would load value by value.
        stop = tl.cdiv(end, ZEROS) * ZEROS if FF % ZEROS == 0 else end
        a_rows = a + rows.to(tl.int64) * FF
        sums = tl.zeros([SPLIT, BM, BN], tl.float32)
        if HOLD:
            at = first + place
            x = tl.load(a_rows[None, :, None] + at[:, None, :], mask=(at < stop)[:, None, :], other=0.0)
            sums = tl.dot(x, held, sums, input_precision=PRECISION)
        for start in range(first + (SPLIT * BK if HOLD else 0), end, SPLIT * BK):
            at = start + place
            x = tl.load(a_rows[None, :, None] + at[:, None, :], mask=(at < stop)[:, None, :], other=0.0)
            w = _weights_at(weight, ids, at, end, cols, D)
            sums = tl.dot(x, w, sums, input_precision=PRECISION)
        y = tl.sum(sums, 0)
        pdl_next(PDL and not EARLY)
        finish = True
        if PARTS > 1:
            own = tl.program_id(0) * NUM_TILES + tile
            spot = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
            mine = parts + own.to(tl.int64) * (PARTS * BM * BN) + spot
            wanted = (live != 0)[:, None] & inside[None, :]
            tl.store(mine + tl.program_id(2) * (BM * BN), y, mask=wanted)
            tl.debug_barrier()
            finish = tl.atomic_add(arrived + own, 1, sem="acq_rel") == PARTS - 1
            if finish:
                tl.debug_barrier()
                tl.store(arrived + own, 0)
                y = tl.load(mine, mask=wanted, other=0.0, cache_modifier=".cg")
                for i in tl.static_range(1, PARTS):
                    y += tl.load(mine + i * (BM * BN), mask=wanted, other=0.0, cache_modifier=".cg")
        if finish:
            if HAS_BIAS:
                y += offset.to(tl.float32)[None, :]
            if RESIDUAL:
                y += before
            _leave(
                y, rows, cols, live != 0, tile, out, first_weight, x_next, second_weight, x_second, stats,
                D, NUM_TILES, STATS, NORMS, X_SCALE, MEANS,
            )  # fmt: skip


def kept_tiles(width: int, num_neurons: int, dtype: torch.dtype) -> int:
    """Tiles of columns, S of the stats that `kept_down` leaves for a weight `[num_neurons, width]`."""
    return triton.cdiv(width, _settings(width, num_neurons, dtype)["BN"])


def kept_parts(width: int, num_neurons: int, dtype: torch.dtype) -> int:
    """PARTS of such a weight."""
    return _settings(width, num_neurons, dtype)["PARTS"]


# Half types, by columns and neurons; tuned offline on an H200 over whole steps (docs/kernels.md).
_TABLE: dict[tuple[int, int], dict[str, int]] = {
    (576, 1536): {"BN": 64, "BK": 128, "SPLIT": 1, "PARTS": 14, "num_warps": 4, "num_stages": 4, "HOLD": 1},
    (896, 4864): {"BN": 64, "BK": 32, "SPLIT": 1, "PARTS": 16, "num_warps": 4, "num_stages": 8, "EARLY": 1},
    (1536, 8960): {"BN": 64, "BK": 64, "SPLIT": 1, "PARTS": 11, "num_warps": 4, "num_stages": 8, "HOLD": 1, "EARLY": 1},
}


def _settings(width: int, num_neurons: int, dtype: torch.dtype) -> dict[str, int]:
    """Columns a program, depth of a product, partial products, programs a tile, warps, stages, whether a share's first
    block is held before the wait, and the next kernel let go there. Where nothing was tuned, a program's part of a
    weight's row is a whole line of 128 bytes. The weights in flight are of half the stages, for the list is read so far
    ahead of them."""
    if dtype != torch.float32 and (width, num_neurons) in _TABLE:
        return _TABLE[width, num_neurons]
    if dtype == torch.float32:
        return {"BN": 16, "BK": 32, "SPLIT": 1, "PARTS": 2, "num_warps": 4, "num_stages": 2}
    wanted = triton.next_power_of_2(triton.cdiv(PROGRAMS, triton.cdiv(width, 64)))
    parts = max(1, min(MOST_PARTS, wanted, num_neurons // 64))
    return {"BN": 64, "BK": 64, "SPLIT": 1, "PARTS": parts, "num_warps": 4, "num_stages": 8}


def kept_down(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor | None,
    out: Tensor,
    rows: Rows,
    kept: Kept,
    *,
    parts: Parts,
    next_norms: tuple[tuple[Tensor, Tensor], ...] = (),
    stats: Tensor | None = None,
    means: bool = True,
    pdl: bool = False,
    settings: dict[str, int] | None = None,
) -> None:
    """Project every live row's kept neurons back to the residual stream.

    Args:
        a: `[R, FF]` in the model's dtype, compact.
        weight: `[FF, D]`, contiguous.
        bias, hidden, out, rows, next_norms, means, pdl, settings: as in `residual_linear`.
        kept: of each tile of rows.
        parts: scratch.
        stats: `[R, 2, kept_tiles(...)]` fp32, overwritten; needed with `next_norms`.
    """
    num_neurons, width = weight.shape
    chosen = _settings(width, num_neurons, a.dtype) if settings is None else settings
    tiles = triton.cdiv(width, chosen["BN"])
    if not weight.is_contiguous():
        raise ValueError("the weight has to be neuron-major, [FF, D] contiguous")
    if stats is not None and stats.shape[2] != tiles:
        raise ValueError(f"stats have {stats.shape[2]} tiles, expected {tiles}")
    if len(next_norms) > 2 or (next_norms and stats is None):
        raise ValueError(f"{len(next_norms)} next norms, stats {'not ' if stats is None else ''}given")
    first = next_norms[0] if next_norms else (out, out)
    second = next_norms[1] if len(next_norms) == 2 else first
    _kept_down_kernel[(len(rows) // BLOCK_ROWS, tiles, chosen["PARTS"])](
        a, weight, bias, hidden, out, *first, *second, out if stats is None else stats, parts.sums, parts.arrived,
        rows.live, kept.ids, kept.count,
        FF=num_neurons, D=width, ZEROS=ZEROS, NUM_TILES=tiles, HAS_BIAS=bias is not None, RESIDUAL=hidden is not None,
        STATS=stats is not None, MEANS=means, NORMS=len(next_norms), X_SCALE=x_scale(a.dtype),
        PRECISION=precision(a.dtype), PDL=pdl, BM=BLOCK_ROWS, **chosen,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
