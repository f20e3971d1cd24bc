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

from .sparse_linear import Shares, checked_ends, keep_reference, parts_of, share_of

try:
    import triton
    import triton.language as tl

    from .sparse_linear import is_kept, limit_of, parts_added
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
    def _quantised_kernel(  # type: ignore[no-untyped-def]
        x, values, scales, limits, out, parts, arrived,
        K: tl.constexpr, M: tl.constexpr, END_0: tl.constexpr, END_1: tl.constexpr,
        SPARSE: tl.constexpr, BITS: tl.constexpr, SHARE: tl.constexpr,
        BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, PLACES: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """BN columns; of 4 bits their bytes are BN / 2, and the even and the odd ones are summed apart."""
        EACH: tl.constexpr = BN if BITS == 8 else BN // 2
        STORED: tl.constexpr = M if BITS == 8 else M // 2
        GROUPS: tl.constexpr = BK // GROUP
        place = tl.program_id(0) * EACH + tl.arange(0, EACH)
        inside = place < STORED
        first = tl.program_id(1) * SHARE
        if SPARSE:
            limit = limit_of(limits, tl.program_id(0) * BN, END_0, END_1)
        low = tl.zeros([GROUPS, GROUP, EACH], tl.float32)
        high = low
        for start in range(0, SHARE, BK):
            group = (first + start) // GROUP + tl.arange(0, GROUPS)
            k = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            real = k < K
            value = tl.load(x + k, mask=real, other=0.0).to(tl.float32)
            if SPARSE:
                real = real & is_kept(value, limit)
                value = tl.where(real, value, 0.0)
            q = tl.load(
                values + k[:, :, None].to(tl.int64) * STORED + place[None, None, :],
                mask=real[:, :, None] & inside[None, None, :], other=0,
            )  # fmt: skip
            of_group = scales + group[:, None] * M + place[None, :]
            scaled = (group < K // GROUP)[:, None] & inside[None, :]
            s = tl.load(of_group, mask=scaled, other=0.0).to(tl.float32)
            if BITS == 8:
                low += value[:, :, None] * (q.to(tl.float32) * s[:, None, :])
            else:
                t = tl.load(of_group + STORED, mask=scaled, other=0.0).to(tl.float32)
                low += value[:, :, None] * (((q & 15).to(tl.float32) - 8.0) * s[:, None, :])
                high += value[:, :, None] * (((q >> 4).to(tl.float32) - 8.0) * t[:, None, :])
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


def _settings(k: int, width: int, bits: int) -> dict[str, int]:
    """As in `sparse_linear`; of 4 bits with as many accumulators for even and odd columns, so with more warps."""
    columns = (256 if bits == 8 else 512) * (2 if width >= 16384 else 1) if width >= 1024 else 64
    return {"BN": columns, "BK": 32, "PARTS": parts_of(k, width, columns), "num_warps": 8, "num_stages": 2}


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
    chosen = settings or _settings(k, width, bits)
    if chosen["BK"] % GROUP:
        raise ValueError(f"blocks of {chosen['BK']} channels are no whole groups of {GROUP}")
    first, second = checked_ends(ends, width, chosen["BN"])
    parts = chosen["PARTS"]
    _quantised_kernel[(triton.cdiv(width, chosen["BN"]), parts)](
        x, weight.values, weight.scales, x if limits is None else limits, out, shares.sums, shares.arrived,
        K=k, M=width, END_0=first, END_1=second, SPARSE=limits is not None, BITS=bits,
        SHARE=share_of(k, parts, chosen["BK"]), PLACES=triton.next_power_of_2(parts), GROUP=GROUP, **chosen,
    )  # fmt: skip
