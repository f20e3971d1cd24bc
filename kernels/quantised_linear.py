"""One row through a projection of 8- or 4-bit weights, all channels or those above a threshold.

    y[n] = sum over kept k of x[k] q[k, n] s[k // 32, n]

Weights are GGUF's Q8_0 and Q4_0: symmetric, one fp16 scale for 32 channels of a column, made by the `gguf` package and
laid out anew by input channel: 8 bits `[K, M]`; 4 bits two neighbouring columns in a byte, so that a dropped channel is
still a row that no load touches. Scales are read whether channels are dropped or not: 1/17 of the bytes at 8 bits, 1/9
at 4. The sum over k and the parts are as in `sparse_linear.py`: a fixed order, no float atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .sparse_linear import Shares, checked_ends, fitting_columns, keep_reference, launched_with, parts_of

try:
    import triton
    import triton.language as tl

    from .sparse_linear import kept_channels, limit_of, parts_added
except ImportError:
    triton = None

GROUP = 32


@dataclass(frozen=True)
class QuantisedWeight:
    """Attributes:
    values: 8 bits: int8 `[K, M]`. 4 bits: uint8 `[K, M / 2]`, column 2j in the low half, 2j + 1 in the high one, both
        with 8 added.
    scales: fp16 `[K / 32, M]`; of 4 bits the even columns' first, then the odd ones'.
    bits: 8 or 4.
    """

    values: Tensor
    scales: Tensor
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        """Channels and columns."""
        return self.values.shape[0], self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def dense(self) -> Tensor:
        """fp32 `[K, M]`."""
        if self.bits == 8:
            values, scales = self.values.float(), self.scales.float()
        else:
            values = torch.stack([self.values & 15, self.values >> 4], -1).flatten(1).float() - 8
            scales = torch.stack(self.scales.float().chunk(2, 1), -1).flatten(1)
        return values * scales.repeat_interleave(GROUP, 0)


def quantise(weight: Tensor, bits: int) -> QuantisedWeight:
    """Round a weight `[M, K]` as GGUF's Q8_0 or Q4_0 do.

    Raises:
        ValueError: other bits, or sizes that are no multiple of a group (K) or of 2 (M, 4 bits).
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    width, k = weight.shape
    if bits not in (4, 8) or k % GROUP or (bits == 4 and width % 2):
        raise ValueError(
            f"{bits} bits for a weight {width} x {k}: expected 8 or 4, {GROUP} | {k}, and 2 | {width} for 4"
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
        scales = torch.cat([scales[:, 0::2], scales[:, 1::2]], 1)
    return QuantisedWeight(values.to(weight.device), scales.to(weight.device), bits)


def quantised_linear_reference(
    x: Tensor, weight: QuantisedWeight, limits: Tensor | None, ends: Sequence[int]
) -> Tensor:
    """fp32 `[M]` from the arguments of `quantised_linear`."""
    kept = torch.where(keep_reference(x, limits, ends), weight.dense(), 0.0)
    return (x.float().unsqueeze(1) * kept).sum(0)


if triton is not None:

    @triton.jit
    def _halves(q, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
        """fp32 values of stored ones: (even columns, odd columns) of 4 bits, the same twice of 8."""
        if BITS == 8:
            return q.to(tl.float32), q.to(tl.float32)
        else:
            return (q & 15).to(tl.float32) - 8.0, (q >> 4).to(tl.float32) - 8.0

    @triton.jit
    def _quantised_kernel(  # type: ignore[no-untyped-def]
        x, values, scales, limits, out, parts, arrived, lists,
        K: tl.constexpr, M: tl.constexpr, END_0: tl.constexpr, END_1: tl.constexpr,
        SPARSE: tl.constexpr, BITS: tl.constexpr, SHARE: tl.constexpr, SHARE_PLACES: tl.constexpr,
        BN: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr, PARTS: tl.constexpr, PLACES: tl.constexpr,
        GROUP: tl.constexpr,
    ):  # fmt: skip
        """BN columns; of 4 bits their bytes are BN / 2, and the even and the odd ones are summed apart. Without a
        threshold a block is whole groups, each with its scale; with one, each kept channel looks its group's up."""
        EACH: tl.constexpr = BN if BITS == 8 else BN // 2
        STORED: tl.constexpr = M if BITS == 8 else M // 2
        GROUPS: tl.constexpr = 1 if SPARSE else BK // GROUP
        place = tl.program_id(0) * EACH + tl.arange(0, EACH)
        inside = (place < STORED)[None, None, :]
        first = tl.program_id(1) * SHARE
        count = tl.minimum(SHARE, tl.maximum(K - first, 0))
        kept = lists + (tl.program_id(0) * PARTS + tl.program_id(1)) * SHARE
        if SPARSE:
            limit = limit_of(limits, tl.program_id(0) * BN, END_0, END_1)
            count = kept_channels(x, limit, first, K, SHARE, SHARE_PLACES, kept)
        low = tl.zeros([GROUPS, BK // GROUPS, EACH], tl.float32)
        high = low
        for start in range(0, count, BK * UNROLL):
            for step in tl.static_range(UNROLL):
                begin = start + step * BK
                at = begin + tl.reshape(tl.arange(0, BK), [GROUPS, BK // GROUPS])
                real = at < count
                k = first + at
                group = (first + begin) // GROUP + tl.arange(0, GROUPS)[:, None]
                scaled = group * GROUP < K
                if SPARSE:
                    k = tl.load(kept + at, mask=real, other=0)
                    group, scaled = k // GROUP, real
                value = tl.load(x + k, mask=real, other=0.0).to(tl.float32)[:, :, None]
                q_at = values + k[:, :, None].to(tl.int64) * STORED + place[None, None, :]
                q = tl.load(q_at, mask=real[:, :, None] & inside, other=0)
                s_at = scales + group[:, :, None] * M + place[None, None, :]
                s = tl.load(s_at, mask=scaled[:, :, None] & inside, other=0.0).to(tl.float32)
                even, odd = _halves(q, BITS)
                low += value * (even * s)
                if BITS == 4:
                    t = tl.load(s_at + STORED, mask=scaled[:, :, None] & inside, other=0.0).to(tl.float32)
                    high += value * (odd * t)
        y = tl.sum(tl.sum(low, 1), 0)
        cols = place
        if BITS == 4:
            y = tl.interleave(y, tl.sum(tl.sum(high, 1), 0))
            cols = tl.program_id(0) * BN + tl.arange(0, BN)
        last = True
        if PARTS > 1:
            last, y = parts_added(y, cols, M, parts, arrived, PARTS, PLACES)
        if last:
            tl.store(out + cols, y.to(out.dtype.element_ty), mask=cols < M)


def _settings(k: int, ends: Sequence[int], bits: int) -> dict[str, int]:
    """As in `sparse_linear`; of 4 bits with as many accumulators for even and odd columns, so with more warps."""
    width = ends[-1]
    columns = fitting_columns((256 if bits == 8 else 512) if width >= 1024 else 64, ends)
    parts = parts_of(k, width, columns)
    return {"BN": columns, "BK": 32, "UNROLL": 2, "PARTS": parts, "num_warps": 8, "num_stages": 1}


def quantised_linear(
    x: Tensor,
    weight: QuantisedWeight,
    limits: Tensor | None,
    ends: Sequence[int],
    out: Tensor,
    shares: Shares,
    settings: dict[str, int] | None = None,
) -> None:
    """Project one row; arguments as in `sparse_linear`.

    Raises:
        ValueError: segments that cut a block, or blocks of channels that are no whole groups.
    """
    (k, width), bits = weight.shape, weight.bits
    chosen = settings or _settings(k, ends, bits)
    if chosen["BK"] % GROUP:
        raise ValueError(f"blocks of {chosen['BK']} channels are no whole groups of {GROUP}")
    first, second = checked_ends(ends, width, chosen["BN"])
    _quantised_kernel[(triton.cdiv(width, chosen["BN"]), chosen["PARTS"])](
        x, weight.values, weight.scales, x if limits is None else limits, out, shares.sums, shares.arrived,
        shares.lists, END_0=first, END_1=second, SPARSE=limits is not None, BITS=bits, GROUP=GROUP,
        **launched_with(k, width, chosen),
    )  # fmt: skip
