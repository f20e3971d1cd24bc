"""The channels of a row whose |x| is above a threshold, as lists that one-row products walk (TEAL, arXiv 2408.14690).

An entry holds a channel and its x side by side, so that a product waits for one load before it can ask for weights.
Chunks of channels are listed each by itself, by whoever has their x, and a product finds its way from one chunk's list
to the next (`run_at`): nobody waits for a prefix over all of K. Entries are in rising order and come in runs of 8,
filled up with empty ones behind each `group` of channels (a chunk, or those that share a scale), so that what a product
needs once for a chunk or a group it needs once a run. An x that is NaN is kept, so that it shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    from .tile import pdl_next, pdl_wait
except ImportError:  # no wheel for this platform: the PyTorch paths run
    triton = None

RUN = 8  # entries of a run
MOST_CHUNKS, LEAST_CHUNK = 8, 128


@dataclass(frozen=True)
class KeptList:
    """Lists of a row, one for each threshold; or of N rows.

    Attributes:
        entries: int64 `[S, C * chunk]`, channel << 32 | bits of x in fp32; a chunk's begin at a multiple of `chunk`.
            Of N rows `[N, S, C * chunk]`.
        runs: int32 `[S, C]` or `[N, S, C]`, how many a chunk has. None of a row that nobody has listed.
        chunk, group: channels, powers of two; no run has channels of two groups.
    """

    entries: Tensor
    runs: Tensor
    chunk: int
    group: int

    @classmethod
    def empty(
        cls, k: int, segments: int, device: torch.device | str, *, rows: int | None = None, group: int | None = None
    ) -> KeptList:
        """Room for k channels; `group=None` is a whole chunk."""
        chunk = max(LEAST_CHUNK, 1 << (-(-k // MOST_CHUNKS) - 1).bit_length())
        count, size = -(-k // chunk), ((segments,) if rows is None else (rows, segments))
        entries = torch.empty(*size, count * chunk, dtype=torch.int64, device=device)
        return cls(entries, torch.zeros(*size, count, dtype=torch.int32, device=device), chunk, group or chunk)

    def row(self, number: int) -> KeptList:
        """One of N rows."""
        return KeptList(self.entries[number], self.runs[number], self.chunk, self.group)

    def check_room(self, k: int, segments: int) -> None:
        """Of lists of one row.

        Raises:
            ValueError: they are not of so many channels, or of fewer segments.
        """
        room, chunks = self.runs.shape
        if segments > room or -(-k // self.chunk) != chunks:
            lists = f"the lists are {room} of {chunks} chunks of {self.chunk}"
            raise ValueError(f"{k} channels and {segments} thresholds, {lists}")


@dataclass(frozen=True)
class Listing:
    """What a kernel that writes rows needs to list them as well.

    Attributes:
        limits: fp32 `[N, S]`, each row's thresholds, next to each other.
        lists: of N rows, overwritten.
    """

    limits: Tensor
    lists: KeptList


def is_kept_reference(x: Tensor, limits: Tensor) -> Tensor:
    """bool `[S, K]` of x `[K]` and thresholds `[S]`."""
    return ~(x.float().abs() <= limits.float().unsqueeze(1))


def list_kept_reference(x: Tensor, limits: Tensor, chunk: int, group: int) -> list[list[list[int]]]:
    """The channels of each segment's chunks, -1 in place of what fills a run up."""
    found = []
    for keep in is_kept_reference(x, limits).tolist():
        chunks = []
        for first in range(0, len(keep), chunk):
            own: list[int] = []
            for start in range(first, min(first + chunk, len(keep)), group):
                own += [k for k in range(start, min(start + group, len(keep))) if keep[k]]
                own += [-1] * (-len(own) % RUN)
            chunks.append(own)
        found.append(chunks)
    return found


if triton is not None:
    EMPTY = tl.constexpr(-(1 << 32))  # channel -1, value 0

    @triton.jit
    def store_kept(  # type: ignore[no-untyped-def]
        x, channel, real, limit, entries, runs,
        CHUNKS: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr,
    ):  # fmt: skip
        """List CHUNKS chunks, whose lists begin at `entries` and `runs`: x fp32 as a product shall see it, of
        `channel`, as far as it is `real`; all `[N * CHUNK]`, a power of two."""
        N: tl.constexpr = x.shape[0] // CHUNK
        keep = real & ((tl.abs(x) <= limit) == 0)
        flags = tl.reshape(keep.to(tl.int32), [N, CHUNK // GROUP, GROUP])
        counts = tl.sum(flags, 2)
        filled = (counts + (RUN - 1)) // RUN * RUN
        chunk = tl.arange(0, N)
        ends = chunk[:, None] * CHUNK + tl.cumsum(filled, 1)
        starts = ends - filled
        places = tl.reshape(starts[:, :, None] + tl.cumsum(flags, 2) - 1, [N * CHUNK])
        entry = channel.to(tl.int64) << 32 | (x.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)
        tl.store(entries + places, entry, mask=keep)
        rest = (starts + counts)[:, :, None] + tl.arange(0, RUN)[None, None, :]
        nothing = tl.full([N, CHUNK // GROUP, RUN], EMPTY, tl.int64)
        tl.store(entries + rest, nothing, mask=rest < ends[:, :, None])
        tl.store(runs + chunk, tl.sum(filled, 1) // RUN, mask=chunk < CHUNKS)

    @triton.jit
    def _list_kernel(  # type: ignore[no-untyped-def]
        x, limits, entries, runs, K, CHUNK: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, PDL: tl.constexpr
    ):  # fmt: skip
        place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        pdl_wait(PDL)
        pdl_next(PDL)
        channel = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
        own = tl.load(x + channel, mask=channel < K, other=0.0).to(tl.float32)
        limit = tl.load(limits + tl.program_id(1))
        store_kept(own, channel, channel < K, limit, entries + place * CHUNK, runs + place, 1, CHUNK, GROUP, RUN)

    @triton.jit
    def runs_of(runs, segment, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, RUN: tl.constexpr):  # type: ignore[no-untyped-def]
        """`(ends, gaps)` of a segment's chunks, a scalar each: runs up to the end of each, and the room behind."""
        counts = tl.tuple([])
        for chunk in tl.static_range(CHUNKS):
            counts = counts + (tl.load(runs + segment * CHUNKS + chunk),)
        end = 0
        ends = tl.tuple([])
        gaps = tl.tuple([])
        for chunk in tl.static_range(CHUNKS):
            end += counts[chunk]
            ends = ends + (end,)
            gaps = gaps + (CHUNK // RUN - counts[chunk],)
        return ends, gaps

    @triton.jit
    def run_at(number, ends, gaps, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
        """Where runs of a segment lie, among all that it has room for."""
        place = number
        for chunk in tl.static_range(CHUNKS - 1):
            place += tl.where(number >= ends[chunk], gaps[chunk], 0)
        return place

    @triton.jit
    def run_entries(at, real, RUN: tl.constexpr):  # type: ignore[no-untyped-def]
        """Channels and values of the runs that begin at `at`: RUN of each, channel -1 and 0 for none. All are asked
        for before one of them is used."""
        found = tl.tuple([])
        for i in tl.static_range(RUN):
            found = found + (tl.load(at + i, mask=real, other=EMPTY),)
        channels = tl.tuple([])
        values = tl.tuple([])
        for i in tl.static_range(RUN):
            channels = channels + ((found[i] >> 32).to(tl.int32),)
            values = values + (found[i].to(tl.int32).to(tl.float32, bitcast=True),)
        return channels, values


def list_kept(x: Tensor, limits: Tensor, lists: KeptList, *, pdl: bool = False) -> None:
    """List what a row keeps.

    Args:
        x: `[K]` in the model's dtype.
        limits: fp32 `[S]`.
        lists: overwritten.
        pdl: programmatic dependent launch.

    Raises:
        ValueError: other sizes than the lists have room for.
    """
    lists.check_room(len(x), len(limits))
    _list_kernel[(lists.runs.shape[1], len(limits))](
        x, limits, lists.entries, lists.runs, len(x), CHUNK=lists.chunk, GROUP=lists.group, RUN=RUN, PDL=pdl,
        num_warps=max(1, min(8, lists.chunk // 128)), **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
