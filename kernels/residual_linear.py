"""The ways back to the residual stream: a projection, its bias, the residual, and what the next norm needs.

    y = a W^T + b,    h' = h + y,    x' = h' * next_weight * x_scale,    stats' = per tile: sum h'^2, sum h'

`x'` and `stats'` are the deferred norm of the next consumer (see `tile.py`). Families that normalise y itself before it
is added (Gemma 2, 3) store y and its stats instead, and `post_norm` does the rest in a second kernel.

A program makes BN columns of 16 rows. With PARTS above 1 the k of a tile is shared by so many programs; the one that
finishes last (an integer counter tells) adds the parts in order, so no number depends on which one it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import Rows
from .tile import BLOCK_ROWS, asked, precision, x_scale

try:
    import triton
    import triton.language as tl

    from .tile import ask_later, load_stats, pdl_next, pdl_wait, row_scale, rows_product, weights_ahead
except ImportError:
    triton = None


def residual_linear_reference(
    a: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor | None, next_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(h', sums [R, 2], x')` in fp32 from the arguments of `residual_linear`; the sums are over all columns, x' is
    not yet rounded or scaled."""
    y = a.float() @ weight.float().T
    if bias is not None:
        y = y + bias.float()
    if hidden is not None:
        y = y + hidden
    return y, torch.stack([(y * y).sum(-1), y.sum(-1)], 1), None if next_weight is None else y * next_weight


def post_norm_reference(y: Tensor, weight: Tensor, hidden: Tensor, eps: float) -> Tensor:
    """`hidden + RMSNorm(y) * weight`, fp32."""
    return hidden + torch.nn.functional.rms_norm(y, y.shape[-1:], weight, eps)


if triton is not None:

    @triton.jit
    def _leave(  # type: ignore[no-untyped-def]
        h, rows, cols, live, tile, out, first_weight, x_first, second_weight, x_second, stats,
        D: tl.constexpr, NUM_TILES: tl.constexpr, STATS: tl.constexpr, NORMS: tl.constexpr, X_SCALE: tl.constexpr,
        MEANS: tl.constexpr,
    ):  # fmt: skip
        """Store h [16, BN], its stats (sums of h only with MEANS), and x of the NORMS that read it (their weights [BN]
        are given); columns beyond D hold zeros."""
        inside = live[:, None] & (cols < D)[None, :]
        at = rows[:, None].to(tl.int64) * D + cols[None, :]
        tl.store(out + at, h, mask=inside)
        if NORMS > 0:
            x = h * first_weight[None, :] * X_SCALE
            tl.store(x_first + at, x.to(x_first.dtype.element_ty), mask=inside)
        if NORMS > 1:
            x = h * second_weight[None, :] * X_SCALE
            tl.store(x_second + at, x.to(x_second.dtype.element_ty), mask=inside)
        if STATS:
            to = stats + rows.to(tl.int64) * (2 * NUM_TILES) + tile
            tl.store(to, tl.sum(h * h, 1), mask=live)
            if MEANS:
                tl.store(to + NUM_TILES, tl.sum(h, 1), mask=live)

    @triton.jit
    def _residual_kernel(  # type: ignore[no-untyped-def]
        a, weight, bias, hidden, out, next_weight, x_next, second_norm, x_second, stats, parts, arrived, live_of,
        later, later_bytes, later_share,
        K: tl.constexpr, D: tl.constexpr, NUM_TILES: tl.constexpr, HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
        STATS: tl.constexpr, MEANS: tl.constexpr, NORMS: tl.constexpr, X_SCALE: tl.constexpr,
        PRECISION: tl.constexpr, PDL: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, PARTS: tl.constexpr,
        TAIL: tl.constexpr = 0, EARLY: tl.constexpr = 0, MASK: tl.constexpr = 0,
    ):  # fmt: skip
        rows = tl.program_id(0) * BM + tl.arange(0, BM)
        tile = tl.program_id(1)
        cols = tile * BN + tl.arange(0, BN)
        SHARE: tl.constexpr = K if PARTS == 1 else ((K + PARTS - 1) // PARTS + 63) // 64 * 64
        first = 0
        if PARTS > 1:
            first = tl.program_id(2) * SHARE
        named = cols if D % BN == 0 else tl.minimum(cols, D - 1)
        ahead = weights_ahead(weight, named, K, SHARE, first, BK, SPLIT, TAIL)
        if HAS_BIAS:
            offset = tl.load(bias + cols, mask=cols < D, other=0.0)
        first_weight = cols.to(tl.float32)
        second_weight = first_weight
        if NORMS > 0:
            first_weight = tl.load(next_weight + cols, mask=cols < D, other=0.0)
        if NORMS > 1:
            second_weight = tl.load(second_norm + cols, mask=cols < D, other=0.0)
        live = tl.load(live_of + rows)
        if RESIDUAL:
            inside = (cols < D)[None, :]
            before = tl.load(hidden + rows[:, None].to(tl.int64) * D + cols[None, :], mask=inside, other=0.0)
        pdl_wait(PDL)

        pdl_next(PDL and EARLY)
        y = rows_product(
            a, weight, ahead, rows, named, K, SHARE, first, BK, SPLIT, PRECISION, TAIL, 0, live if MASK else None
        )
        if D % BN > 0:
            y = tl.where((cols < D)[None, :], y, 0.0)
        pdl_next(PDL and not EARLY)
        ask_later(later, later_bytes, later_share)
        finish = True
        if PARTS > 1:
            own = tl.program_id(0) * NUM_TILES + tile
            place = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
            mine = parts + own.to(tl.int64) * (PARTS * BM * BN) + place
            tl.store(mine + tl.program_id(2) * (BM * BN), y)
            tl.debug_barrier()
            finish = tl.atomic_add(arrived + own, 1, sem="acq_rel") == PARTS - 1
            if finish:
                tl.debug_barrier()
                tl.store(arrived + own, 0)
                y = tl.load(mine, cache_modifier=".cg")
                for i in tl.static_range(1, PARTS):
                    y += tl.load(mine + i * (BM * BN), cache_modifier=".cg")
        if finish:
            if HAS_BIAS:
                y += offset.to(tl.float32)[None, :]
            if RESIDUAL:
                y += before
            _leave(
                y, rows, cols, live != 0, tile, out, first_weight, x_next, second_weight, x_second, stats,
                D, NUM_TILES, STATS, NORMS, X_SCALE, MEANS,
            )  # fmt: skip

    @triton.jit
    def _post_norm_kernel(  # type: ignore[no-untyped-def]
        y, y_stats, weight, hidden, out, next_weight, x_next, stats, live_of, eps,
        D: tl.constexpr, NUM_STATS: tl.constexpr, BLOCK_S: tl.constexpr, NUM_TILES: tl.constexpr,
        X_SCALE: tl.constexpr, PDL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0) * BM + tl.arange(0, BM)
        cols = tl.program_id(1) * BN + tl.arange(0, BN)
        live = tl.load(live_of + rows) != 0
        inside = (cols < D)[None, :]
        at = rows[:, None].to(tl.int64) * D + cols[None, :]
        w = tl.load(weight + cols, mask=cols < D, other=0.0)
        following = tl.load(next_weight + cols, mask=cols < D, other=0.0)
        before = tl.load(hidden + at, mask=inside, other=0.0)
        pdl_wait(PDL)
        pdl_next(PDL)
        squares, sums = load_stats(y_stats, rows, NUM_STATS, BLOCK_S, False)
        h = tl.load(y + at, mask=inside, other=0.0)
        scale, _ = row_scale(squares, sums, D, eps, 1.0, False)
        h = before + h * scale[:, None] * w[None, :]
        _leave(
            h, rows, cols, live, tl.program_id(1), out, following, x_next, following, x_next, stats,
            D, NUM_TILES, True, 1, X_SCALE, False,
        )  # fmt: skip


class Parts:
    """Where programs that share a tile leave their sums; counters are zero between launches."""

    def __init__(self, num_rows: int, width: int, most: int, device: torch.device | str) -> None:
        """Args: `most`, the largest PARTS; room for any tile of at least 8 columns."""
        tiles = num_rows // BLOCK_ROWS * -(-width // 8)
        self.sums = torch.empty(tiles * most * BLOCK_ROWS * 8 * 2 if most > 1 else 1, device=device)
        self.arrived = torch.zeros(tiles, dtype=torch.int32, device=device)


def column_tiles(width: int, k: int, dtype: torch.dtype) -> int:
    """Tiles of columns, S of the stats that `residual_linear` leaves for a weight `[width, k]`."""
    return triton.cdiv(width, _settings(width, k, dtype)["BN"])


def most_parts(width: int, k: int, dtype: torch.dtype) -> int:
    """PARTS of a weight `[width, k]`."""
    return _settings(width, k, dtype)["PARTS"]


# Half types, by columns and k; tuned offline on an H200 over whole steps (docs/kernels.md).
_K_1536 = {"BN": 16, "BK": 256, "TAIL": 128, "SPLIT": 4, "num_warps": 4, "num_stages": 1, "PARTS": 1, "MASK": 1}
_TABLE: dict[tuple[int, ...], dict[str, int]] = {
    (576, 576): {"BN": 16, "BK": 256, "TAIL": 32, "SPLIT": 2, "num_warps": 2, "num_stages": 1, "PARTS": 1, "EARLY": 1},
    (576, 1536): {**_K_1536, "EARLY": 1},
    (896, 896): {"BN": 8, "BK": 256, "SPLIT": 4, "num_warps": 4, "num_stages": 1, "PARTS": 1, "MASK": 1},
    (896, 4864): {"BN": 8, "BK": 128, "SPLIT": 4, "num_warps": 2, "num_stages": 5, "PARTS": 1},
    (1536, 1536): _K_1536,
    (1536, 8960): {"BN": 16, "BK": 64, "SPLIT": 8, "num_warps": 4, "num_stages": 5, "PARTS": 1, "EARLY": 1},
}


def _settings(width: int, k: int, dtype: torch.dtype) -> dict[str, int]:
    """Columns a program, depth of a product (and its tail), partial products, programs a tile, warps, stages,
    whether the next kernel is let go at the wait, whether rows that are not live are left alone where all k is dealt
    out at once."""
    if dtype != torch.float32 and (width, k) in _TABLE:
        return _TABLE[width, k]
    if dtype == torch.float32:
        return {"BN": 16, "BK": 32, "SPLIT": 1, "PARTS": 1, "num_warps": 4, "num_stages": 2}
    return {"BN": 8, "BK": 128, "SPLIT": 4, "PARTS": 1, "num_warps": 2, "num_stages": 5}


def residual_linear(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor | None,
    out: Tensor,
    rows: Rows,
    *,
    next_norms: tuple[tuple[Tensor, Tensor], ...] = (),
    stats: Tensor | None = None,
    means: bool = True,
    parts: Parts | None = None,
    later: Tensor | None = None,
    pdl: bool = False,
    settings: dict[str, int] | None = None,
) -> None:
    """Project every live row back to the residual stream.

    Args:
        a: `[R, K]` in the model's dtype.
        weight: `[D, K]`.
        bias: `[D]` or None.
        hidden: `[R, D]` fp32, the stream before; None stores the projection itself, for `post_norm`.
        out: `[R, D]` fp32, the stream after; may be `hidden`.
        rows: which rows are live.
        next_norms: `(norm weight [D] fp32, x [R, D] to be overwritten)` of the one or two norms that read the stream
            next. None of them: only `out` is written.
        stats: `[R, 2, column_tiles(...)]` fp32, overwritten; needed with `next_norms`.
        means: whether the next norms take a mean off; else the stats' second half is left as it is.
        parts: scratch, needed where the settings share a tile's k.
        later, pdl, settings: as in `qkv`.
    """
    width, k = weight.shape
    chosen = _settings(width, k, a.dtype) if settings is None else settings
    tiles = triton.cdiv(width, chosen["BN"])
    if stats is not None and stats.shape[2] != tiles:
        raise ValueError(f"stats have {stats.shape[2]} tiles, expected {tiles}")
    if chosen["PARTS"] > 1 and parts is None:
        raise ValueError("settings with PARTS above 1 need scratch: Parts(...)")
    if len(next_norms) > 2 or (next_norms and stats is None):
        raise ValueError(f"{len(next_norms)} next norms, stats {'not ' if stats is None else ''}given")
    first = next_norms[0] if next_norms else (out, out)
    second = next_norms[1] if len(next_norms) == 2 else first
    grid = (len(rows) // BLOCK_ROWS, tiles, chosen["PARTS"])
    _residual_kernel[grid](
        a, weight, bias, hidden, out, *first, *second, out if stats is None else stats,
        out if parts is None else parts.sums, rows.live if parts is None else parts.arrived, rows.live,
        *asked(later, pdl, grid),
        K=k, D=width, NUM_TILES=tiles, HAS_BIAS=bias is not None, RESIDUAL=hidden is not None,
        STATS=stats is not None, MEANS=means, NORMS=len(next_norms), X_SCALE=x_scale(a.dtype),
        PRECISION=precision(a.dtype), PDL=pdl, BM=BLOCK_ROWS, **chosen,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def post_norm(
    y: Tensor,
    y_stats: Tensor,
    weight: Tensor,
    hidden: Tensor,
    out: Tensor,
    rows: Rows,
    eps: float,
    *,
    next_norm: tuple[Tensor, Tensor],
    stats: Tensor,
    pdl: bool = False,
) -> None:
    """`out = hidden + RMSNorm(y) * weight`, with what the next norm needs.

    Args:
        y, y_stats: of `residual_linear` without `hidden`.
        weight: `[D]` fp32.
        hidden, out: `[R, D]` fp32.
        next_norm, stats: as in `residual_linear`; `stats [R, 2, S]` for any S that divides the columns into tiles of a
            power of two.
    """
    width = y.shape[1]
    block = max(16, triton.next_power_of_2(triton.cdiv(width, stats.shape[2])))
    tiles = triton.cdiv(width, block)
    if tiles != stats.shape[2]:
        raise ValueError(f"stats have {stats.shape[2]} tiles, expected {tiles} of {block} columns")
    _post_norm_kernel[(len(rows) // BLOCK_ROWS, tiles)](
        y, y_stats, weight, hidden, out, *next_norm, stats, rows.live, eps,
        D=width, NUM_STATS=y_stats.shape[2], BLOCK_S=triton.next_power_of_2(y_stats.shape[2]), NUM_TILES=tiles,
        X_SCALE=x_scale(next_norm[1].dtype), PDL=pdl, BM=BLOCK_ROWS, BN=block,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
