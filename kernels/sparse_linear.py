"""One row through a projection, reading only the channels whose input is above a threshold (TEAL, arXiv 2408.14690).

    y[n] = sum over k with |x[k]| > t(n) of x[k] W[k, n]

The weight is input-channel-major, `[K, M]`: a dropped channel is a row that no load touches. What is kept comes as a
list (`kept_list.py`), so that neither bytes nor arithmetic are spent on the rest. Columns may lie in up to three
segments (q, k, v, or gate, up), each with its own threshold.

A program makes some columns from a share of the runs; a step multiplies one run in each of S slots, as many as give
every thread 16 bytes of each channel. The next step's weights and the list of the one after it are asked for before
this step is multiplied: ptxas otherwise mixes multiplications between the loads, and two or three are on the way.

PARTS programs share a tile of columns; the one that finishes last (an integer counter tells) adds the parts by a fixed
tree, so no number depends on which one it was, and there are no float atomics: those of TEAL's own kernel give other
bits at each run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .kept_list import RUN, KeptList, is_kept_reference, list_kept

try:
    import triton
    import triton.language as tl

    from .kept_list import run_at, run_entries, runs_of
    from .tile import pdl_next, pdl_wait
except ImportError:  # no wheel for this platform: the PyTorch paths run
    triton = None

MOST_SEGMENTS, MOST_PARTS = 3, 8
LEAST_COLUMNS = 16  # of a program, and what segments are best aligned to: 32 bytes
PROGRAMS = 528  # what there is room for at once: four programs of 4 warps for each multiprocessor of an H100


def keep_reference(x: Tensor, limits: Tensor | None, ends: Sequence[int]) -> Tensor:
    """Which channels each column reads: x `[K]`, limits `[S]`, ends `[S]` -> bool `[K, M]`."""
    if limits is None:
        return torch.ones(len(x), ends[-1], dtype=torch.bool, device=x.device)
    widths = torch.tensor([end - start for start, end in zip((0, *ends), ends, strict=False)], device=x.device)
    return is_kept_reference(x, limits).T.repeat_interleave(widths, 1)


def sparse_linear_reference(
    x: Tensor, weight: Tensor, limits: Tensor | None, ends: Sequence[int], bias: Tensor | None = None
) -> Tensor:
    """fp32 `[M]` from the arguments of `sparse_linear`; `limits=None` drops nothing."""
    kept = torch.where(keep_reference(x, limits, ends), weight.float(), 0.0)
    y = (x.float().unsqueeze(1) * kept).nan_to_num(torch.nan).sum(0)
    return y if bias is None else y + bias.float()


if triton is not None:
    CONTINUOUS = ["tiles_0", "tiles_1", "parts_n"]  # arguments whose divisibility makes no other kernel

    @triton.jit
    def tile_of(tile, tiles_0, tiles_1, end_0, end_1, end_2, columns):  # type: ignore[no-untyped-def]
        """`(segment, first column, end of the columns)` of a tile; none lies in two segments."""
        segment = (tile >= tiles_0).to(tl.int32) + (tile >= tiles_1).to(tl.int32)
        start = tl.where(segment == 0, 0, tl.where(segment == 1, end_0, end_1))
        before = tl.where(segment == 0, 0, tl.where(segment == 1, tiles_0, tiles_1))
        end = tl.where(segment == 0, end_0, tl.where(segment == 1, end_1, end_2))
        first = start + (tile - before) * columns
        return segment, first, tl.minimum(end, first + columns)

    @triton.jit
    def parts_added(y, cols, inside, width, parts, arrived, parts_n, PLACES: tl.constexpr):  # type: ignore[no-untyped-def]
        """Leave this program's share y `[BN]` of a tile; `(whether all shares are here, their sum)`. All of them are
        read at once and added by a fixed tree: one after the other would be a chain of waits."""
        mine = parts + tl.program_id(1).to(tl.int64) * width + cols
        tl.store(mine, y, mask=inside)
        tl.debug_barrier()
        counter = arrived + tl.program_id(0)
        last = tl.atomic_add(counter, 1, sem="acq_rel") == parts_n - 1
        if last:
            tl.debug_barrier()
            tl.store(counter, 0)
            part = tl.arange(0, PLACES)
            mask = (part < parts_n)[:, None] & inside[None, :]
            shares = parts + part[:, None].to(tl.int64) * width + cols[None, :]
            y = tl.sum(tl.load(shares, mask=mask, other=0.0, cache_modifier=".cg"), 0)
        return last, y

    @triton.jit
    def _rows_of(at, stride, channels, inside, RUN: tl.constexpr):  # type: ignore[no-untyped-def]
        """The weights `[S, BN]` of a run's channels; none for channel -1."""
        rows = tl.tuple([])
        for i in tl.static_range(RUN):
            mask = (channels[i] >= 0)[:, None] & inside[None, :]
            rows = rows + (tl.load(at + channels[i][:, None] * stride.to(tl.int64), mask=mask, other=0.0),)
        return rows

    @triton.jit(do_not_specialize=CONTINUOUS)
    def _sparse_kernel(  # type: ignore[no-untyped-def]
        entries, runs, weight, bias, out, parts, arrived,
        width, tiles_0, tiles_1, end_0, end_1, end_2, columns, parts_n,
        CHUNKS: tl.constexpr, CHUNK: tl.constexpr, RUN: tl.constexpr, S: tl.constexpr, BN: tl.constexpr,
        PARTS: tl.constexpr, PLACES: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        segment, first, end = tile_of(tl.program_id(0), tiles_0, tiles_1, end_0, end_1, end_2, columns)
        cols = first + tl.arange(0, BN)
        inside = cols < end
        if HAS_BIAS:
            offset = tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
        pdl_wait(PDL)
        ends, gaps = runs_of(runs, segment, CHUNKS, CHUNK, RUN)
        begin = tl.program_id(1) * ends[CHUNKS - 1] // parts_n
        stop = (tl.program_id(1) + 1) * ends[CHUNKS - 1] // parts_n
        entries += segment * (CHUNKS * CHUNK)
        number = begin + tl.arange(0, S)
        w_at = weight + cols[None, :]
        total = tl.zeros([S, BN], tl.float32)
        ks, vs = run_entries(entries + run_at(number, ends, gaps, CHUNKS) * RUN, number < stop, RUN)
        number += S
        ks_1, vs_1 = run_entries(entries + run_at(number, ends, gaps, CHUNKS) * RUN, number < stop, RUN)
        ws = _rows_of(w_at, width, ks, inside, RUN)
        for _ in tl.range(begin, stop, S):
            number += S
            ws_1 = _rows_of(w_at, width, ks_1, inside, RUN)
            ks_1, vs_2 = run_entries(entries + run_at(number, ends, gaps, CHUNKS) * RUN, number < stop, RUN)
            for i in tl.static_range(RUN):
                total += vs[i][:, None] * ws[i].to(tl.float32)
            ws = ws_1
            vs = vs_1
            vs_1 = vs_2
        pdl_next(PDL)
        y = tl.sum(total, 0)
        last = True
        if PARTS:
            last, y = parts_added(y, cols, inside, width, parts, arrived, parts_n, PLACES)
        if last:
            if HAS_BIAS:
                y += offset
            tl.store(out + cols, y.to(out.dtype.element_ty), mask=inside)


class Shares:
    """What programs of a launch leave for each other: the sums of those that share a tile, and lists of what is kept.
    Counters are zero between launches. One for each stream."""

    def __init__(self, k: int, width: int, device: torch.device | str, group: int | None = None) -> None:
        """Args: `k` and `width`, channels and the most columns of a launch; `group` of its lists."""
        self.sums = torch.empty(MOST_PARTS * width, device=device)
        self.arrived = torch.zeros(width // LEAST_COLUMNS + MOST_SEGMENTS, dtype=torch.int32, device=device)
        self.lists = KeptList.empty(k, MOST_SEGMENTS, device, group=group)


Settings = dict[str, int]

# Half types, by channels and segments; tuned offline on an H200 at 50 % (docs/kernels.md).
_TABLE: dict[tuple[int, tuple[int, ...]], tuple[int, int, int]] = {
    (4096, (4096, 5120, 6144)): (48, 1, 16),
    (4096, (4096,)): (32, 1, 16),
    (4096, (14336, 28672)): (128, 1, 8),
    (14336, (4096,)): (64, 4, 8),
    (4096, (4096, 8192, 12288)): (64, 1, 8),
    (4096, (11008, 22016)): (64, 1, 4),
    (11008, (4096,)): (64, 8, 4),
}


def _settings(k: int, ends: Sequence[int]) -> Settings:
    """Columns of a program, programs a tile, warps."""
    columns, parts, warps = _TABLE.get((k, tuple(ends))) or shared_evenly(k, tuple(ends), PROGRAMS)
    return {"COLUMNS": columns, "PARTS": parts, "num_warps": warps}


@lru_cache(None)
def shared_evenly(k: int, ends: tuple[int, ...], programs: int) -> tuple[int, int, int]:
    """A rule for other shapes: as many as there is room for on the chip at once, of 4 warps, the fewest parts that keep
    the most of their threads at work, each of 256 channels at least."""
    columns = range(64, 513, 16) if ends[-1] >= 4096 else range(32, 65, 16)
    fitting = [(c, p) for c in columns for p in range(1, MOST_PARTS + 1) if tiles_up_to(ends, c)[-1] * p <= programs]
    found = [(p / block_of(c), -p, -c) for c, p in fitting if p == 1 or k >= 256 * p]
    _, parts, narrow = max(found, default=(0, -1, -512))
    return -narrow, -parts, 4


def block_of(columns: int) -> int:
    """Columns that a program has threads for."""
    return max(32, 1 << (columns - 1).bit_length())


def tiles_up_to(ends: Sequence[int], columns: int) -> tuple[int, int, int]:
    """Tiles up to the end of each of three segments; those that there are not have none."""
    tiles = [0]
    for start, end in zip((0, *ends), ends, strict=False):
        tiles.append(tiles[-1] - (start - end) // columns)
    tiles += tiles[-1:] * (MOST_SEGMENTS - len(ends))
    return tiles[1], tiles[2], tiles[3]


def launched_with(
    ends: Sequence[int], width: int, chosen: Settings, elements: int
) -> tuple[tuple[int, int], tuple[int, ...], dict[str, int]]:
    """The grid, the integers and the sizes of a product whose threads take `elements` columns each.

    Raises:
        ValueError: segments that do not fill the columns, or settings that `Shares` has no room for.
    """
    if not 1 <= len(ends) <= MOST_SEGMENTS or list(ends) != sorted(set(ends)) or ends[-1] != width:
        raise ValueError(f"segments end at {list(ends)}, expected at most {MOST_SEGMENTS} rising ends up to {width}")
    columns, parts, warps = chosen["COLUMNS"], chosen["PARTS"], chosen["num_warps"]
    if columns % LEAST_COLUMNS or not 1 <= parts <= MOST_PARTS:
        raise ValueError(f"settings {chosen}: COLUMNS in steps of {LEAST_COLUMNS}, PARTS up to {MOST_PARTS}")
    first, second, tiles = tiles_up_to(ends, columns)
    block = block_of(columns)
    sizes = {"BN": block, "S": max(1, warps * 32 * elements // block), "PARTS": parts > 1, "PLACES": MOST_PARTS}
    limits = (*ends, width, width)[:MOST_SEGMENTS]
    return (tiles, parts), (first, second, *limits, columns, parts), sizes | {"num_warps": warps, "num_stages": 1}


def listed_linear(
    lists: KeptList,
    weight: Tensor,
    ends: Sequence[int],
    out: Tensor,
    shares: Shares,
    bias: Tensor | None = None,
    settings: Settings | None = None,
    *,
    pdl: bool = False,
) -> None:
    """Project one row that is listed, by whoever made it.

    Args:
        lists: one for each segment.
        weight, ends, out, shares, bias, settings, pdl: as in `sparse_linear`.

    Raises:
        ValueError: lists of other channels or of fewer segments, or segments that do not fill the columns.
    """
    k, width = weight.shape
    grid, numbers, sizes = launched_with(ends, width, settings or _settings(k, ends), 8)
    lists.check_room(k, len(ends))
    _sparse_kernel[grid](
        lists.entries, lists.runs, weight, weight if bias is None else bias, out, shares.sums, shares.arrived,
        width, *numbers, CHUNKS=lists.runs.shape[1], CHUNK=lists.chunk, RUN=RUN, HAS_BIAS=bias is not None,
        PDL=pdl, **sizes, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    limits: Tensor,
    ends: Sequence[int],
    out: Tensor,
    shares: Shares,
    bias: Tensor | None = None,
    settings: Settings | None = None,
    *,
    pdl: bool = False,
) -> None:
    """Project one row: list it, and multiply.

    Args:
        x: `[K]` in the model's dtype.
        weight: `[K, M]`, contiguous.
        limits: fp32 `[S]`, a threshold for each segment of columns.
        ends: where the segments end, S of them, the last M.
        out: `[M]`, overwritten.
        shares: scratch.
        bias: `[M]` or None.
        settings: in place of the rule's.
        pdl: programmatic dependent launch.
    """
    list_kept(x, limits, shares.lists, pdl=pdl)
    listed_linear(shares.lists, weight, ends, out, shares, bias, settings, pdl=pdl)
