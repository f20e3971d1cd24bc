"""One decode step's attention for many sequences, each at its own position, over a cache of fixed slots.

Row r stands at position p_r. The step appends its key and value at p_r and attends to positions
max(0, p_r - window + 1) .. p_r:

    o = sum_j softmax_j(cap(scale * q . k_j)) v_j,    cap(s) = c tanh(s / c) where the family soft-caps, else s

in one pass with a running maximum. The row's own key comes from registers, where the running sums start with it (so
they are never empty); the others are read from the cache in blocks, up to the length found in device memory: no
length is known to the host, so the launch can be captured in a CUDA graph. The query heads of one KV head are the rows
of one product, so each key is read once.

For writing training text: throughput matters, and bits are not promised to be those of `attention.decode_attention`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the PyTorch path below runs
    triton = None

NO_WINDOW = 1 << 30


def ragged_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The same in fp32 PyTorch; arguments as `ragged_attention`."""
    num_rows, num_heads, head_dim = q.shape
    rows = torch.arange(num_rows, device=q.device)
    k_cache[rows, :, positions], v_cache[rows, :, positions] = k.to(k_cache.dtype), v.to(v_cache.dtype)
    visible = _visible(positions, k_cache.shape[2], window)
    keys, values = (c.float().masked_fill(~visible[:, None, :, None], 0.0) for c in (k_cache, v_cache))
    grouped = q.to(k_cache.dtype).float().view(num_rows, k.shape[1], -1, head_dim)
    scores = grouped @ keys.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~visible[:, None, None, :], float("-inf")).softmax(-1)
    return (weights @ values).view(num_rows, num_heads, head_dim)


if triton is not None:

    @triton.jit
    def _ragged_attention_kernel(  # type: ignore[no-untyped-def]
        q, k, v, k_cache, v_cache, positions, out,
        scale, softcap, window,
        q_row, q_head, k_row, k_head, v_row, v_head, cache_row, cache_head, cache_at, out_row, out_head,
        GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        kv = tl.program_id(1)
        position = tl.load(positions + row).to(tl.int32)
        dims, heads = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_G)
        in_dims, in_heads = dims < HEAD_DIM, heads < GROUP
        tile = in_heads[:, None] & in_dims[None, :]
        dtype = k_cache.dtype.element_ty

        own_key = tl.load(k + row * k_row + kv * k_head + dims, mask=in_dims, other=0.0).to(dtype)
        own_value = tl.load(v + row * v_row + kv * v_head + dims, mask=in_dims, other=0.0).to(dtype)
        cached = row * cache_row + kv * cache_head
        tl.store(k_cache + cached + position * cache_at + dims, own_key, mask=in_dims)
        tl.store(v_cache + cached + position * cache_at + dims, own_value, mask=in_dims)

        places = (kv * GROUP + heads)[:, None]
        query = tl.load(q + row * q_row + places * q_head + dims[None, :], mask=tile, other=0.0).to(dtype)
        top = tl.sum(query.to(tl.float32) * own_key.to(tl.float32)[None, :], 1) * scale
        if HAS_SOFTCAP:
            top = softcap * (2.0 * tl.sigmoid(2.0 * top / softcap) - 1.0)  # tanh
        total = tl.full([BLOCK_G], 1.0, tl.float32)
        sums = tl.zeros([BLOCK_G, BLOCK_D], tl.float32) + own_value.to(tl.float32)[None, :]

        oldest = tl.maximum(position - window + 1, 0)
        for start in range(oldest, position, BLOCK_N):
            at = start + tl.arange(0, BLOCK_N)
            seen = at < position
            where = cached + at.to(tl.int64) * cache_at
            keys = tl.load(k_cache + where[None, :] + dims[:, None], mask=seen[None, :] & in_dims[:, None], other=0.0)
            values = tl.load(v_cache + where[:, None] + dims[None, :], mask=seen[:, None] & in_dims[None, :], other=0.0)
            scores = tl.dot(query, keys, input_precision=PRECISION) * scale
            if HAS_SOFTCAP:
                scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
            scores = tl.where(seen[None, :], scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            fade = tl.exp(top - higher)
            weights = tl.exp(scores - higher[:, None])
            total = total * fade + tl.sum(weights, 1)
            sums = sums * fade[:, None] + tl.dot(weights.to(dtype), values, input_precision=PRECISION)
            top = higher
        tl.store(out + row * out_row + places * out_head + dims[None, :], sums / total[:, None], mask=tile)


def _settings(block_d: int, itemsize: int) -> dict[str, int]:
    """Keys a block, warps and pipeline stages. A block of keys and values stays within 32 KiB a stage."""
    return {
        "BLOCK_N": max(16, min(64, 16384 // (block_d * itemsize))),
        "num_warps": 4 if block_d > 64 else 2,
        "num_stages": 2,
    }


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Append each row's key and value to its cache, then attend.

    Args:
        q: `[R, H, d]`, rotated; k, v: `[R, KV, d]`; any float dtype, last axis contiguous.
        k_cache, v_cache: `[R, KV, C, d]`, same strides; written at the rows' positions. What stands beyond a row's
            position is never used, NaN included.
        positions: integer `[R]`, 0 <= position < C. Not checked: that would wait for the device.
        scale: factor on q . k.
        window: positions a row sees, its own included; None for all.
        softcap: cap * tanh(score / cap) when given.

    Returns:
        `[R, H, d]` fp32.
    """
    if k_cache.is_cuda and triton is not None:
        return launch(q, k, v, k_cache, v_cache, positions, scale, window, softcap)
    if softcap is not None:
        return ragged_attention_reference(q, k, v, k_cache, v_cache, positions, scale, window, softcap)
    rows = torch.arange(len(q), device=q.device)
    k_cache[rows, :, positions], v_cache[rows, :, positions] = k.to(k_cache.dtype), v.to(v_cache.dtype)
    length = int(positions.max()) + 1
    visible = _visible(positions, length, window)
    grouped = q.to(k_cache.dtype).view(len(q), k.shape[1], -1, q.shape[2])
    keys, values = k_cache[:, :, :length], v_cache[:, :, :length]
    out = F.scaled_dot_product_attention(grouped, keys, values, visible[:, None, None, :], scale=scale)
    return out.reshape(q.shape).float()


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The Triton kernel of `ragged_attention`, one program a row and KV head.

    Raises:
        ValueError: shapes or strides that the kernel does not read.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv = k.shape[1]
    if num_heads % num_kv or k_cache.shape[:2] != (num_rows, num_kv) or k_cache.shape[3] != head_dim:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} do not fit a cache of {tuple(k_cache.shape)}")
    if k_cache.stride() != v_cache.stride() or any(t.stride(-1) != 1 for t in (q, k, v, k_cache)):
        raise ValueError("expected caches of equal strides and a last axis without gaps in q, k, v and the caches")
    out = torch.empty(num_rows, num_heads, head_dim, dtype=torch.float32, device=q.device)
    block_d = max(16, triton.next_power_of_2(head_dim))
    _ragged_attention_kernel[(num_rows, num_kv)](
        q, k, v, k_cache, v_cache, positions, out,
        scale, softcap or 0.0, window or NO_WINDOW,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *out.stride()[:2],
        GROUP=num_heads // num_kv, HEAD_DIM=head_dim, HAS_SOFTCAP=softcap is not None,
        PRECISION="ieee" if k_cache.dtype == torch.float32 else "tf32",
        BLOCK_G=max(16, triton.next_power_of_2(num_heads // num_kv)), BLOCK_D=block_d,
        **_settings(block_d, k_cache.element_size()),
    )  # fmt: skip
    return out


def _visible(positions: Tensor, length: int, window: int | None) -> Tensor:
    """bool `[R, length]`: which positions each row sees."""
    at, own = torch.arange(length, device=positions.device), positions.unsqueeze(1)
    visible = at <= own
    return visible if window is None else visible & (at > own - window)
