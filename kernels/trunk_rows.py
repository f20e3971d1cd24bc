"""Row operations of a frozen forward over many rows, each one pass over memory where PyTorch makes three to six.

    rms_norm    y = x / sqrt(mean(x^2) + eps) * w, fp32 in, the matmuls' dtype out
    rotate      rotary embedding of the q and k heads of a qkv projection, in place
    silu_mul    y = silu(gate) * up of a joint projection [gate; up]

Arithmetic is fp32, results are rounded once: the numbers of the decoder's own chain of operations up to the last bit of
exp. No gradients: for training heads on a base that is not trained.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """`x [N, D]` fp32, `weight [D]` fp32 -> `[N, D]` of `dtype`."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps).to(dtype)


def rotate_reference(qkv: Tensor, cos: Tensor, sin: Tensor, num_rotated: int) -> Tensor:
    """The first `num_rotated` heads of `qkv [N, heads, d]` turned by their row's angle: `cos`, `sin [T, d]` of
    positions N % T, the sine's first half negated. A new tensor."""
    rows = torch.arange(qkv.shape[0], device=qkv.device) % cos.shape[0]
    head = qkv[:, :num_rotated].float()
    turned = head * cos[rows].unsqueeze(1) + head.roll(qkv.shape[-1] // 2, -1) * sin[rows].unsqueeze(1)
    return torch.cat([turned.to(qkv.dtype), qkv[:, num_rotated:]], 1)


def silu_mul_reference(x: Tensor) -> Tensor:
    """`[N, 2 F]` -> `[N, F]` of the same dtype."""
    gate, up = x.float().chunk(2, -1)
    return (F.silu(gate) * up).to(x.dtype)


if triton is not None:

    @triton.jit
    def _rms_norm_kernel(x, weight, out, eps, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < width
        value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + eps)
        value = value * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _rotate_kernel(  # type: ignore[no-untyped-def]
        qkv, cos, sin, row_stride, length, num_rotated, HALF: tl.constexpr, HEADS: tl.constexpr
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        at = row % length
        lane = tl.arange(0, HALF)
        head = tl.arange(0, HEADS)
        low_place = qkv + row * row_stride + head[:, None] * (2 * HALF) + lane[None, :]
        inside = (head < num_rotated)[:, None] & (lane >= 0)[None, :]
        low = tl.load(low_place, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(low_place + HALF, mask=inside, other=0.0).to(tl.float32)
        cos_low = tl.load(cos + at * (2 * HALF) + lane)[None, :]
        cos_high = tl.load(cos + at * (2 * HALF) + HALF + lane)[None, :]
        sin_low = tl.load(sin + at * (2 * HALF) + lane)[None, :]
        sin_high = tl.load(sin + at * (2 * HALF) + HALF + lane)[None, :]
        tl.store(low_place, (low * cos_low + high * sin_low).to(qkv.dtype.element_ty), mask=inside)
        tl.store(low_place + HALF, (high * cos_high + low * sin_high).to(qkv.dtype.element_ty), mask=inside)

    @triton.jit
    def _silu_mul_kernel(x, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(x + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(x + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
        value = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """See `rms_norm_reference`; `x` contiguous."""
    if not x.is_cuda or triton is None:
        return rms_norm_reference(x, weight, eps, dtype)
    return launch_rms_norm(x, weight, eps, dtype)


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, num_rotated: int) -> Tensor:
    """See `rotate_reference`; in place on a GPU. `qkv` contiguous, d a power of two there."""
    if not qkv.is_cuda or triton is None or qkv.shape[-1] & (qkv.shape[-1] - 1):
        return rotate_reference(qkv, cos, sin, num_rotated)
    return launch_rotate(qkv, cos, sin, num_rotated)


def silu_mul(x: Tensor) -> Tensor:
    """See `silu_mul_reference`; `x` contiguous."""
    return launch_silu_mul(x) if x.is_cuda and triton is not None else silu_mul_reference(x)


def launch_rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The kernel, one program a row."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    _rms_norm_kernel[(x.shape[0],)](
        x.contiguous(), weight, out, eps, width, BLOCK=block, num_warps=4 if block >= 512 else 1
    )
    return out


def launch_rotate(qkv: Tensor, cos: Tensor, sin: Tensor, num_rotated: int) -> Tensor:
    """The kernel, one program a row, in place.

    Raises:
        ValueError: `qkv` has gaps.
    """
    if not qkv.is_contiguous():
        raise ValueError(f"qkv {tuple(qkv.shape)} has strides {qkv.stride()}, expected none without gaps")
    heads = triton.next_power_of_2(num_rotated)
    _rotate_kernel[(qkv.shape[0],)](
        qkv, cos.contiguous(), sin.contiguous(), qkv.stride(0), cos.shape[0], num_rotated,
        HALF=qkv.shape[-1] // 2, HEADS=heads, num_warps=4 if heads >= 8 else 1,
    )  # fmt: skip
    return qkv


def launch_silu_mul(x: Tensor) -> Tensor:
    """The kernel, a program a row and block."""
    width = x.shape[-1] // 2
    out = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)
    block = min(2048, triton.next_power_of_2(width))
    _silu_mul_kernel[(x.shape[0], triton.cdiv(width, block))](
        x.contiguous(), out, width, BLOCK=block, num_warps=4 if block >= 512 else 1
    )
    return out
