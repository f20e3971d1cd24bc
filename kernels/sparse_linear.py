"""One row through a projection, reading only the channels whose input is above a threshold (TEAL, arXiv 2408.14690).

    y[n] = sum over k with |x[k]| > t(n) of x[k] W[k, n]

The weight is input-channel-major, `[K, M]`: a dropped channel is a row that no load touches. A program makes BN
columns from a share of k: it lists the channels of its share that it keeps, then reads and multiplies those alone, so
that neither bytes nor arithmetic are spent on the others. Columns may lie in up to three segments (q, k, v, or gate,
up), each with its own threshold. There is no second kernel. An input that is NaN is kept, so that it shows.

PARTS programs share the k of a tile; the one that finishes last (an integer counter tells) adds the parts by a fixed
tree, so no number depends on which one it was, and there are no float atomics: those of TEAL's own kernel give other
bits at each run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the PyTorch paths run
    triton = None

MOST_SEGMENTS = 3
PROGRAMS, MOST_PARTS = 528, 32  # what a launch aims at: four programs for each multiprocessor of an H100
LEAST_COLUMNS, MOST_CHANNELS = 16, 256  # of a block


def keep_reference(x: Tensor, limits: Tensor | None, ends: Sequence[int]) -> Tensor:
    """Which channels each column reads: x `[K]`, limits `[S]`, ends `[S]` -> bool `[K, M]`."""
    if limits is None:
        return torch.ones(len(x), ends[-1], dtype=torch.bool, device=x.device)
    widths = torch.tensor([end - start for start, end in zip((0, *ends), ends, strict=False)], device=x.device)
    return ~(x.float().abs().unsqueeze(1) <= limits.float().repeat_interleave(widths))


def sparse_linear_reference(
    x: Tensor, weight: Tensor, limits: Tensor | None, ends: Sequence[int], bias: Tensor | None = None
) -> Tensor:
    """fp32 `[M]` from the arguments of `sparse_linear`."""
    kept = torch.where(keep_reference(x, limits, ends), weight.float(), 0.0)
    y = (x.float().unsqueeze(1) * kept).nan_to_num(torch.nan).sum(0)
    return y if bias is None else y + bias.float()


if triton is not None:

    @triton.jit
    def limit_of(limits, column, END_0: tl.constexpr, END_1: tl.constexpr):  # type: ignore[no-untyped-def]
        """The threshold of the segment that a column is in."""
        return tl.load(limits + (column >= END_0).to(tl.int32) + (column >= END_1).to(tl.int32))

    @triton.jit
    def is_kept(x, limit):  # type: ignore[no-untyped-def]
        """Also where x is NaN."""
        return (tl.abs(x) <= limit) == 0

    @triton.jit
    def parts_added(y, cols, M: tl.constexpr, parts, arrived, PARTS: tl.constexpr, PLACES: tl.constexpr):  # type: ignore[no-untyped-def]
        """Leave this program's share y `[BN]` of a tile; `(whether all shares are here, their sum)`. All of them are
        read at once and added by a fixed tree: one after the other would be a chain of waits."""
        inside = cols < M
        mine = parts + tl.program_id(1).to(tl.int64) * M + cols
        tl.store(mine, y, mask=inside)
        tl.debug_barrier()
        counter = arrived + tl.program_id(0)
        last = tl.atomic_add(counter, 1, sem="acq_rel") == PARTS - 1
        if last:
            tl.debug_barrier()
            tl.store(counter, 0)
            part = tl.arange(0, PLACES)
            mask = (part < PARTS)[:, None] & inside[None, :]
            shares = parts + part[:, None].to(tl.int64) * M + cols[None, :]
            y = tl.sum(tl.load(shares, mask=mask, other=0.0, cache_modifier=".cg"), 0)
        return last, y

    @triton.jit
    def kept_channels(x, limit, first, K: tl.constexpr, SHARE: tl.constexpr, PLACES: tl.constexpr, kept):  # type: ignore[no-untyped-def]
        """List the kept channels of first .. first + SHARE - 1 in `kept [SHARE]`, rising; their number."""
        at = tl.arange(0, PLACES)
        real = (at < SHARE) & (first + at < K)
        value = tl.load(x + first + at, mask=real, other=0.0).to(tl.float32)
        keep = (real & is_kept(value, limit)).to(tl.int32)
        tl.store(kept + tl.cumsum(keep, 0) - 1, first + at, mask=keep != 0)
        tl.debug_barrier()
        return tl.sum(keep, 0)

    @triton.jit
    def _sparse_kernel(  # type: ignore[no-untyped-def]
        x, weight, bias, limits, out, parts, arrived, lists,
        K: tl.constexpr, M: tl.constexpr, END_0: tl.constexpr, END_1: tl.constexpr,
        SPARSE: tl.constexpr, HAS_BIAS: tl.constexpr, SHARE: tl.constexpr, SHARE_PLACES: tl.constexpr,
        BN: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr, PARTS: tl.constexpr, PLACES: tl.constexpr,
    ):  # fmt: skip
        cols = tl.program_id(0) * BN + tl.arange(0, BN)
        inside = (cols < M)[None, :]
        first = tl.program_id(1) * SHARE
        count = tl.minimum(SHARE, tl.maximum(K - first, 0))
        kept = lists + (tl.program_id(0) * PARTS + tl.program_id(1)) * SHARE
        if SPARSE:
            limit = limit_of(limits, tl.program_id(0) * BN, END_0, END_1)
            count = kept_channels(x, limit, first, K, SHARE, SHARE_PLACES, kept)
        total = tl.zeros([BK, BN], tl.float32)
        for start in range(0, count, BK * UNROLL):
            for step in tl.static_range(UNROLL):  # all their loads are on the way before one of them is used
                at = start + step * BK + tl.arange(0, BK)
                real = at < count
                k = first + at
                if SPARSE:
                    k = tl.load(kept + at, mask=real, other=0)
                value = tl.load(x + k, mask=real, other=0.0).to(tl.float32)
                w_at = weight + k[:, None].to(tl.int64) * M + cols[None, :]
                total += value[:, None] * tl.load(w_at, mask=real[:, None] & inside, other=0.0).to(tl.float32)
        y = tl.sum(total, 0)
        last = True
        if PARTS > 1:
            last, y = parts_added(y, cols, M, parts, arrived, PARTS, PLACES)
        if last:
            if HAS_BIAS:
                y += tl.load(bias + cols, mask=cols < M, other=0.0).to(tl.float32)
            tl.store(out + cols, y.to(out.dtype.element_ty), mask=cols < M)


class Shares:
    """What programs of a launch leave for each other and for themselves: the sums of those that share a tile, and lists
    of kept channels. Counters are zero between launches. One for each stream."""

    def __init__(self, k: int, width: int, most: int, device: torch.device | str) -> None:
        """Args: `k` and `width`, the most channels and columns of a launch; `most`, the largest PARTS."""
        self.sums = torch.empty(most * width, device=device)
        tiles = -(-width // LEAST_COLUMNS)
        self.arrived = torch.zeros(tiles, dtype=torch.int32, device=device)
        self.lists = torch.empty(tiles * (k + most * MOST_CHANNELS), dtype=torch.int32, device=device)


def fitting_columns(wanted: int, ends: Sequence[int]) -> int:
    """The most columns of a block, `wanted` or a half of it again and again, that cut no segment in two."""
    while wanted > LEAST_COLUMNS and any(end % wanted for end in ends[:-1]):
        wanted //= 2
    return wanted


def _settings(k: int, ends: Sequence[int]) -> dict[str, int]:
    """Columns and channels of a block, blocks on the way at once, programs a tile, warps. A rule."""
    width = ends[-1]
    columns = fitting_columns(256 if width >= 1024 else 64, ends)
    parts = parts_of(k, width, columns)
    return {"BN": columns, "BK": 32, "UNROLL": 4, "PARTS": parts, "num_warps": 8, "num_stages": 1}


def parts_of(k: int, width: int, columns: int) -> int:
    """Programs that share a tile, a power of two."""
    wanted = triton.next_power_of_2(triton.cdiv(PROGRAMS, triton.cdiv(width, columns)))
    return max(1, min(MOST_PARTS, k // 64, wanted))


def share_of(k: int, parts: int, block: int) -> int:
    """Channels of one program: whole blocks."""
    return -(-k // (parts * block)) * block


def launched_with(k: int, width: int, chosen: dict[str, int]) -> dict[str, int]:
    """The sizes that follow from the settings, and the settings.

    Raises:
        ValueError: blocks of too many channels or too few columns for `Shares`.
    """
    if chosen["BK"] > MOST_CHANNELS or chosen["BN"] < LEAST_COLUMNS:
        raise ValueError(f"settings {chosen}: BK at most {MOST_CHANNELS}, BN at least {LEAST_COLUMNS}")
    share, parts = share_of(k, chosen["PARTS"], chosen["BK"]), triton.next_power_of_2(chosen["PARTS"])
    return {
        "K": k,
        "M": width,
        "SHARE": share,
        "SHARE_PLACES": triton.next_power_of_2(share),
        "PLACES": parts,
        **chosen,
    }


def checked_ends(ends: Sequence[int], width: int, block: int) -> tuple[int, int]:
    """The first two segment ends as the kernels take them.

    Raises:
        ValueError: segments that do not fill the columns or cut a block in two.
    """
    if not 1 <= len(ends) <= MOST_SEGMENTS or list(ends) != sorted(set(ends)) or ends[-1] != width:
        raise ValueError(f"segments end at {list(ends)}, expected at most {MOST_SEGMENTS} rising ends up to {width}")
    cut = [end for end in ends[:-1] if end % block]
    if cut:
        raise ValueError(f"segments end at {cut}, inside blocks of {block} columns")
    first, second = (*ends, width, width)[:2]
    return first, second


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    limits: Tensor | None,
    ends: Sequence[int],
    out: Tensor,
    shares: Shares,
    bias: Tensor | None = None,
    settings: dict[str, int] | None = None,
) -> None:
    """Project one row.

    Args:
        x: `[K]` in the model's dtype.
        weight: `[K, M]`, contiguous.
        limits: fp32 `[S]`, a threshold for each segment of columns; None reads every channel.
        ends: where the segments end, S of them, the last M; the others at multiples of a block's columns.
        out: `[M]`, overwritten.
        shares: scratch.
        bias: `[M]` or None.
        settings: in place of the rule's.
    """
    (k, width), chosen = weight.shape, settings or _settings(weight.shape[0], ends)
    first, second = checked_ends(ends, width, chosen["BN"])
    _sparse_kernel[(triton.cdiv(width, chosen["BN"]), chosen["PARTS"])](
        x, weight, x if bias is None else bias, x if limits is None else limits, out, shares.sums, shares.arrived,
        shares.lists, END_0=first, END_1=second, SPARSE=limits is not None, HAS_BIAS=bias is not None,
        **launched_with(k, width, chosen),
    )  # fmt: skip
