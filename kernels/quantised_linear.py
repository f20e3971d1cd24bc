"""One row through a projection of 8- or 4-bit weights, all channels or those above a threshold.

    y[n] = sum over groups g of s[g, n] (sum over kept k of g of x[k] q[k, n])

Weights are GGUF's Q8_0 and Q4_0: symmetric, one fp16 scale for 32 channels of a column, made by the `gguf` package and
laid out anew by input channel, 4 bytes of neighbouring columns together, so that a dropped channel is still a row that
no load touches. Arithmetic is what bounds these products, so runs never leave their group: a scale is multiplied once a
run, where each channel's own look-up cost more than its weight. With a threshold runs come from a list
(`kept_list.py`), a group's last one seldom full; without one they are consecutive channels.
Programs, steps and parts are as in `sparse_linear.py`: a fixed order, no float atomics.

A value stays at its bits: or-ed into the mantissa of 2^23 it is the float 2^23 + v 2^i, from which the rest is taken
off exactly, and 2^-i goes into the scale. Converting integers runs at a sixteenth of the speed of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kept_list import RUN, KeptList, list_kept
from .sparse_linear import PROGRAMS, Settings, Shares, keep_reference, launched_with, shared_evenly

try:
    import triton
    import triton.language as tl

    from .kept_list import run_at, run_entries, runs_of
    from .sparse_linear import CONTINUOUS, parts_added, tile_of
    from .tile import pdl_next, pdl_wait
except ImportError:
    triton = None

GROUP = 32
ELEMENTS = 16  # columns of a thread
MAGIC = 0x4B000000  # 2^23 as fp32; an argument, so that masking and or-ing are one instruction


@dataclass(frozen=True)
class QuantisedWeight:
    """Attributes:
    values: 8 bits: int8 `[K, M]`. 4 bits: uint8 `[K, M / 2]`, column 2j in the low half, 2j + 1 in the high one, both
        with 8 added.
    scales: fp16 `[K / 32, P, M / P]`, P = 32 / bits columns of 4 bytes: column P j + i at `[:, i, j]`.
    bits: 8 or 4.
    """

    values: Tensor
    scales: Tensor
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        """Channels and columns."""
        return self.values.shape[0], self.scales[0].numel()

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def dense(self) -> Tensor:
        """fp32 `[K, M]`."""
        values = self.values.float()
        if self.bits == 4:
            values = torch.stack([self.values & 15, self.values >> 4], -1).flatten(1).float() - 8
        return values * self.scales.float().transpose(1, 2).flatten(1).repeat_interleave(GROUP, 0)


def quantise(weight: Tensor, bits: int) -> QuantisedWeight:
    """Round a weight `[M, K]` as GGUF's Q8_0 or Q4_0 do.

    Raises:
        ValueError: other bits, or sizes that are no multiple of a group (K) or of the columns of 4 bytes (M).
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    width, k = weight.shape
    if bits not in (4, 8) or k % GROUP or width % (32 // bits):
        raise ValueError(
            f"{bits} bits for a weight {width} x {k}: expected 8 or 4, {GROUP} | {k}, and 4 | {width}, 8 of 4 bits"
        )
    kind = GGMLQuantizationType.Q8_0 if bits == 8 else GGMLQuantizationType.Q4_0
    blocks = torch.from_numpy(quantize(weight.float().cpu().numpy(), kind)).view(width, k // GROUP, -1)
    scales = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1).T.contiguous()
    body = blocks[..., 2:]
    if bits == 8:
        values = body.contiguous().view(torch.int8).reshape(width, k).T.contiguous()
    else:
        halves = torch.cat([body & 15, body >> 4], -1).reshape(width, k).T
        values = (halves[:, 0::2] | halves[:, 1::2] << 4).contiguous()
    scales = scales.view(k // GROUP, -1, 32 // bits).transpose(1, 2).contiguous()
    return QuantisedWeight(values.to(weight.device), scales.to(weight.device), bits)


def quantised_linear_reference(
    x: Tensor, weight: QuantisedWeight, limits: Tensor | None, ends: Sequence[int]
) -> Tensor:
    """fp32 `[M]` from the arguments of `quantised_linear`."""
    kept = torch.where(keep_reference(x, limits, ends), weight.dense(), 0.0)
    return (x.float().unsqueeze(1) * kept).sum(0)


if triton is not None:
    SIGNS = tl.constexpr(-0x7F7F7F80)  # the top bit of each byte

    @triton.constexpr_function
    def bit_of(i: int, bits: int) -> int:
        """Where value i of 4 bytes lies when it is taken out; those beyond the 23 bits of a mantissa are first moved
        12 down (not to 0: ptxas then makes two instructions of it)."""
        return bits * i - (12 if bits * (i + 1) > 23 else 0)

    @triton.jit
    def _field(word, magic, i: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
        """Value i of 4 bytes that have 2^(BITS - 1) added to each: fp32, times 2^bit_of(i)."""
        BIT: tl.constexpr = bit_of(i, BITS)
        if BITS * i > BIT:
            word = word >> 12
        field = (word & ((2**BITS - 1) << BIT)) | magic
        return field.to(tl.float32, bitcast=True) - (8388608.0 + 2.0 ** (BITS - 1 + BIT))

    @triton.jit
    def _words_of(  # type: ignore[no-untyped-def]
        at, stride, channels, keep, inside, LISTED: tl.constexpr, BITS: tl.constexpr, RUN: tl.constexpr
    ):  # fmt: skip
        """The words `[S, BW]` of a run's channels, as far as they are to be kept."""
        first = at + channels[0][:, None] * stride.to(tl.int64)
        words = tl.tuple([])
        for i in tl.static_range(RUN):
            own = first + i * stride.to(tl.int64)
            if LISTED:
                own = at + channels[i][:, None] * stride.to(tl.int64)
            words = words + (tl.load(own, mask=keep[i][:, None] & inside[None, :], other=0),)
        return words

    @triton.jit
    def _scales_of(at, width, stride, channel, keep, inside, GROUP: tl.constexpr, PER: tl.constexpr):  # type: ignore[no-untyped-def]
        """A run's scales `[S, BW]` for each column of the words."""
        mask = keep[:, None] & inside[None, :]
        at += (channel // GROUP)[:, None] * width.to(tl.int64)
        scales = tl.tuple([])
        for i in tl.static_range(PER):
            scales = scales + (tl.load(at + i * stride, mask=mask, other=0.0),)
        return scales

    @triton.jit
    def _next_run(  # type: ignore[no-untyped-def]
        x, entries, number, stop, ends, gaps, LISTED: tl.constexpr, CHUNKS: tl.constexpr, RUN: tl.constexpr
    ):  # fmt: skip
        """Channels, values and which of them are to be kept, RUN of each: of a list, or consecutive ones."""
        real = number < stop
        keep = tl.tuple([])
        if LISTED:
            channels, values = run_entries(entries + run_at(number, ends, gaps, CHUNKS) * RUN, real, RUN)
            for i in tl.static_range(RUN):
                keep = keep + (channels[i] >= 0,)
        else:
            channels = tl.tuple([])
            values = tl.tuple([])
            for i in tl.static_range(RUN):
                channels = channels + (number * RUN + i,)
                values = values + (tl.load(x + number * RUN + i, mask=real, other=0.0),)
                keep = keep + (real,)
        return channels, values, keep

    @triton.jit(do_not_specialize=[*CONTINUOUS, "magic"])
    def _quantised_kernel(  # type: ignore[no-untyped-def]
        x, entries, runs, words, scales, out, parts, arrived, K, magic,
        width, tiles_0, tiles_1, end_0, end_1, end_2, columns, parts_n,
        LISTED: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
        RUN: tl.constexpr, S: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, PLACES: tl.constexpr,
        PDL: tl.constexpr,
    ):  # fmt: skip
        PER: tl.constexpr = 32 // BITS
        segment, first, end = tile_of(tl.program_id(0), tiles_0, tiles_1, end_0, end_1, end_2, columns)
        word = first // PER + tl.arange(0, BN // PER)
        inside = word < end // PER
        stored = width // PER
        pdl_wait(PDL)
        ends = tl.tuple([])
        gaps = tl.tuple([])
        count = K // RUN
        if LISTED:
            ends, gaps = runs_of(runs, segment, CHUNKS, CHUNK, RUN)
            count = ends[CHUNKS - 1]
            entries += segment * (CHUNKS * CHUNK)
        begin = tl.program_id(1) * count // parts_n
        stop = (tl.program_id(1) + 1) * count // parts_n
        number = begin + tl.arange(0, S)
        w_at = words + word[None, :]
        s_at = scales + word[None, :]
        totals = tl.tuple([])
        for _ in tl.static_range(PER):
            totals = totals + (tl.zeros([S, BN // PER], tl.float32),)
        ks, vs, keep = _next_run(x, entries, number, stop, ends, gaps, LISTED, CHUNKS, RUN)
        number += S
        ks_1, vs_1, keep_1 = _next_run(x, entries, number, stop, ends, gaps, LISTED, CHUNKS, RUN)
        ws = _words_of(w_at, stored, ks, keep, inside, LISTED, BITS, RUN)
        ss = _scales_of(s_at, width, stored, ks[0], keep[0], inside, GROUP, PER)
        for _ in tl.range(begin, stop, S):
            number += S
            ws_1 = _words_of(w_at, stored, ks_1, keep_1, inside, LISTED, BITS, RUN)
            ss_1 = _scales_of(s_at, width, stored, ks_1[0], keep_1[0], inside, GROUP, PER)
            ks_1, vs_2, keep_1 = _next_run(x, entries, number, stop, ends, gaps, LISTED, CHUNKS, RUN)
            if BITS == 8:  # two's complement: with the sign turned over it is the value and 128
                signed = tl.tuple([])
                for i in tl.static_range(RUN):
                    signed = signed + (ws[i] ^ SIGNS,)
                ws = signed
            more = tl.tuple([])
            for i in tl.static_range(PER):
                one = vs[0].to(tl.float32)[:, None] * _field(ws[0], magic, i, BITS)
                for j in tl.static_range(1, RUN):
                    one += vs[j].to(tl.float32)[:, None] * _field(ws[j], magic, i, BITS)
                more = more + (totals[i] + ss[i].to(tl.float32) * one,)
            totals = more
            ws = ws_1
            ss = ss_1
            vs = vs_1
            vs_1 = vs_2
        pdl_next(PDL)
        t = tl.tuple([])
        for i in tl.static_range(PER):
            t = t + (totals[i] * 2.0 ** -bit_of(i, BITS),)
        if BITS == 4:
            even = tl.interleave(tl.interleave(t[0], t[4]), tl.interleave(t[2], t[6]))
            odd = tl.interleave(tl.interleave(t[1], t[5]), tl.interleave(t[3], t[7]))
        else:
            even, odd = tl.interleave(t[0], t[2]), tl.interleave(t[1], t[3])
        y = tl.sum(tl.interleave(even, odd), 0)
        cols = first + tl.arange(0, BN)
        last = True
        if PARTS:
            last, y = parts_added(y, cols, cols < end, width, parts, arrived, parts_n, PLACES)
        if last:
            tl.store(out + cols, y.to(out.dtype.element_ty), mask=cols < end)


def quantised_shares(k: int, width: int, device: torch.device | str) -> Shares:
    """Scratch whose lists keep runs inside groups."""
    return Shares(k, width, device, GROUP)


def _settings(k: int, ends: Sequence[int], listed: bool) -> Settings:
    """As in `sparse_linear`; a program that walks a list has 160 to 180 registers a thread, and three find room."""
    columns, parts, warps = shared_evenly(k, tuple(ends), PROGRAMS // 4 * 3 if listed else PROGRAMS)
    return {"COLUMNS": columns, "PARTS": parts, "num_warps": warps}


def listed_quantised_linear(
    lists: KeptList | None,
    x: Tensor,
    weight: QuantisedWeight,
    ends: Sequence[int],
    out: Tensor,
    shares: Shares,
    settings: Settings | None = None,
    *,
    pdl: bool = False,
) -> None:
    """Project one row that is listed, by whoever made it.

    Args:
        lists: one for each segment, their runs inside groups; None reads every channel of x.
        x, weight, ends, out, shares, settings, pdl: as in `quantised_linear`.

    Raises:
        ValueError: segments that do not fill the columns or cut 4 bytes, lists whose runs may leave a group, of other
            channels or of fewer segments.
    """
    (k, width), bits = weight.shape, weight.bits
    if any(end % (32 // bits) for end in ends):
        raise ValueError(f"segments end at {list(ends)}, inside 4 bytes of {32 // bits} columns")
    if lists is not None:
        lists.check_room(k, len(ends))
        if GROUP % lists.group:
            raise ValueError(f"the runs of lists go through {lists.group} channels, a scale is that of {GROUP}")
    grid, numbers, sizes = launched_with(ends, width, settings or _settings(k, ends, lists is not None), ELEMENTS)
    own = shares.lists if lists is None else lists
    _quantised_kernel[grid](
        x, own.entries, own.runs, weight.values.view(torch.int32), weight.scales, out, shares.sums, shares.arrived, k,
        MAGIC, width, *numbers, LISTED=lists is not None, BITS=bits, GROUP=GROUP, CHUNKS=own.runs.shape[1],
        CHUNK=own.chunk, RUN=RUN, PDL=pdl, **sizes,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def quantised_linear(
    x: Tensor,
    weight: QuantisedWeight,
    limits: Tensor | None,
    ends: Sequence[int],
    out: Tensor,
    shares: Shares,
    settings: Settings | None = None,
    *,
    pdl: bool = False,
) -> None:
    """Project one row.

    Args:
        limits: fp32 `[S]`, a threshold for each segment of columns; None reads every channel.
        shares: of `quantised_shares`.
        x, ends, out, settings, pdl: as in `sparse_linear`.
    """
    if limits is not None:
        list_kept(x, limits, shares.lists, pdl=pdl)
    listed_quantised_linear(None if limits is None else shares.lists, x, weight, ends, out, shares, settings, pdl=pdl)
