"""Attention of a few decode rows, reduced in position order (design rules 3 and 4).

Keys and values of one sequence lie by slot: `k, v [KV, S, d]`. A row's scores are put in position order and masked to
its own root-to-leaf path; weights are their softmax, and

    o = sum_g P_g V_g

one product of fixed shape `[rows, group] x [group, d]` after the other over groups of absolute positions. A key that a
row must not see has weight zero, and whole groups of such keys add exact zeros to the softmax's sum (over a multiple of
the vector's width) and to o. So the bits depend on the row's own tokens and positions and on nothing else: not on cache
length, round start, tree shape, or other rows.

The one place where a tree differs from a chain: siblings share a position, so the groups that hold uncommitted
positions (at most two) are multiplied once per root-to-leaf path, with that path's keys gathered into their
positions' places.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

PLANLESS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class RowKeys:
    """Which keys each of M rows sees, in slots of one sequence. All borders are multiples of `group`.

    Attributes:
        group: positions in one product.
        first, stop: the slots to read; no row sees one outside.
        open_slot: start of the first group that holds an uncommitted position.
        hidden: bool `[M, 1, n]`: keys that a row must not see, among the last n read, in position order; every row sees
            all that come before.
        order: None when slot == position for every row (a chain); else long `[M, stop - open_slot]`: the slot, relative
            to open_slot, that holds each position from there on.
        path_slots: with `order`, long `[P, stop - open_slot]`: the same for each root-to-leaf path; positions past the
            path's end name any finite slot (their weight is zero).
        path_of_row: with `order`, long `[M]`.
    """

    group: int
    first: int
    stop: int
    open_slot: int
    hidden: Tensor
    order: Tensor | None = None
    path_slots: Tensor | None = None
    path_of_row: Tensor | None = None


def decode_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, slots: list[list[int]], scale: float, softcap: float | None = None
) -> Tensor:
    """The same attention in fp64, one row at a time. `slots[r]` lists row r's visible slots in position order.

    Args: `q [M, H, d]`, `k, v [S, KV, d]` by slot. Returns `[M, H, d]` fp64.
    """
    rows = []
    repeat = q.shape[1] // k.shape[1]
    for r, row_slots in enumerate(slots):
        keys = k[row_slots].double().repeat_interleave(repeat, dim=1)
        values = v[row_slots].double().repeat_interleave(repeat, dim=1)
        scores = torch.einsum("hd,shd->hs", q[r].double(), keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        rows.append(torch.einsum("hs,shd->hd", scores.softmax(-1), values))
    return torch.stack(rows)


def read_views(k: Tensor, v: Tensor, keys: RowKeys) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    """What `decode_attention` reads of each layer, made for all layers at once: slicing costs more than multiplying.

    Args:
        k, v: `[L, KV, S, d]`, one sequence's cache.

    Returns:
        For each layer, keys `[KV, d, n]` and the values of each group `[KV, group, d]` of the n slots in `keys`.
    """
    keys_read = k[:, :, keys.first : keys.stop].transpose(2, 3).unbind()
    values_read = v[:, :, keys.first : keys.stop].unflatten(2, (-1, keys.group)).unbind()
    return [(one, layer.unbind(1)) for one, layer in zip(keys_read, values_read, strict=True)]


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Sequence[Tensor],
    keys: RowKeys,
    scale: float | Tensor,
    softcap: float | None = None,
) -> Tensor:
    """Attention of M rows of one sequence, for devices where a product's bits do not depend on M x H / KV from some
    small number on (CPU, measured by `engine/selftest.py`).

    Args:
        q: `[M, H, d]` fp32, rotated.
        k, v: of `read_views`, fp32; unseen slots of v are finite.
        keys: what each row sees.
        scale: factor on q . k; as a tensor `[1]` it need not be converted at each call.
        softcap: cap * tanh(score / cap) when given (Gemma 2).

    Returns:
        `[M, H, d]` fp32.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv, num_keys = len(k), k.shape[2]
    q = (q * scale).view(num_rows, num_kv, -1, head_dim).transpose(0, 1).reshape(num_kv, -1, head_dim)

    scores = torch.bmm(q, k)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    per_row = scores.view(num_kv, num_rows, -1, num_keys)
    if keys.order is not None:
        open_scores = per_row[..., keys.open_slot - keys.first :]
        open_scores.copy_(open_scores.gather(3, keys.order.unsqueeze(1).expand_as(open_scores)))
    per_row[..., num_keys - keys.hidden.shape[-1] :].masked_fill_(keys.hidden, float("-inf"))

    weights = scores.softmax(-1).view(num_kv, -1, len(v), keys.group).unbind(2)
    out = _add_groups(None, weights, v) if keys.order is None else _with_paths(weights, v, keys, num_rows)
    return out.view(num_kv, num_rows, -1, head_dim).transpose(0, 1).reshape(num_rows, num_heads, head_dim)


def _add_groups(out: Tensor | None, weights: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
    """`out + weights [KV, M, group] @ v [KV, group, d]`, one group after the other; `out` [KV, M, d] is overwritten."""
    for part, values in zip(weights, v, strict=True):
        out = torch.bmm(part, values) if out is None else out.baddbmm_(part, values)
    assert out is not None
    return out


def _with_paths(weights: Sequence[Tensor], v: Sequence[Tensor], keys: RowKeys, num_rows: int) -> Tensor:
    """The same for a tree: open groups once per root-to-leaf path, and every row keeps its own path's sum."""
    assert keys.path_slots is not None and keys.path_of_row is not None
    closed = (keys.open_slot - keys.first) // keys.group
    before = _add_groups(None, weights[:closed], v[:closed]) if closed else None
    open_values = torch.cat(tuple(v[closed:]), 1)
    sums = []
    for path in keys.path_slots:
        start = None if before is None else before.clone()
        sums.append(_add_groups(start, weights[closed:], open_values[:, path].split(keys.group, 1)))
    rows = weights[0].shape[1]
    path_of = keys.path_of_row.repeat_interleave(rows // num_rows)
    return torch.stack(sums)[path_of, :, torch.arange(rows, device=path_of.device)].transpose(0, 1).contiguous()


GATHER_CHUNK = 512  # positions in one product of `gathered_attention`; boundaries are absolute


def gathered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Tensor,
    slots: Tensor,
    hidden: Tensor,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """The same attention for rows of any sequences, each row with its own keys gathered into position order.

    Every product has the fixed shape of one chunk of positions whatever the context, the tree and the sequences in
    the tile, which is what keeps a row's bits on a GPU as long as M is fixed; it reads more memory than
    `decode_attention`.

    Args:
        q: `[M, H, d]` fp32, rotated.
        k, v: `[B, KV, S, d]`, one layer of the cache.
        sequences: long `[M]`, each row's place in the cache.
        slots: long `[M, S]`, the slot that holds each position for this row, S a multiple of `GATHER_CHUNK`; hidden
            positions name any finite slot.
        hidden: bool `[M, S]`, positions the row must not see.
        scale, softcap: as in `decode_attention`.

    Returns:
        `[M, H, d]` fp32.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv = k.shape[1]
    q = (q * scale).view(num_rows * num_kv, -1, head_dim)
    owner = sequences.unsqueeze(1)

    def gather(store: Tensor, chunk: Tensor) -> Tensor:
        rows = store[owner, :, chunk]  # [M, chunk, KV, d]
        return rows.transpose(1, 2).float().reshape(num_rows * num_kv, -1, head_dim)

    chunks = slots.split(GATHER_CHUNK, 1)
    scores = []
    for chunk, unseen in zip(chunks, hidden.split(GATHER_CHUNK, 1), strict=True):
        part = torch.bmm(q, gather(k, chunk).transpose(1, 2))
        if softcap is not None:
            part = part.div_(softcap).tanh_().mul_(softcap)
        scores.append(part.view(num_rows, num_kv, -1, GATHER_CHUNK).masked_fill_(unseen[:, None, None], float("-inf")))
    largest = scores[0].amax(-1, keepdim=True)
    for part in scores[1:]:
        largest = torch.maximum(largest, part.amax(-1, keepdim=True))
    total, out = torch.zeros_like(largest), torch.zeros_like(q)
    for chunk, part in zip(chunks, scores, strict=True):
        weights = part.sub_(largest).exp_()
        total = total + weights.sum(-1, keepdim=True)
        out = out + torch.bmm(weights.view(*q.shape[:2], GATHER_CHUNK), gather(v, chunk))
    return out.view(num_rows, num_heads, head_dim) / total.view(num_rows, num_heads, 1)


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    first: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """Causal attention of T consecutive rows over S keys: prefill chunks and training.

    Args:
        q: `[B, H, T, d]`; row t stands at position first + t.
        k, v: `[B, KV, S, d]`, keys at positions 0..S-1, S >= first + T.
        scale, window, softcap: as in `decode_attention`; a row at p sees p - window + 1 .. p.
        visible: `visible_keys(...)` of these rows, where several layers share it; made here if it is needed.

    Returns:
        `[B, H, T, d]` of q's dtype.
    """
    num_rows, num_keys = q.shape[2], k.shape[2]
    if softcap is None and window is None and first == 0 and num_rows == num_keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    if visible is None:
        visible = visible_keys(first, num_rows, num_keys, window, q.device)
    if softcap is None:
        return fused_attention(q, k, v, visible, scale)
    repeat = q.shape[1] // k.shape[1]
    scores = (q * scale) @ k.repeat_interleave(repeat, 1).transpose(2, 3)
    scores = (softcap * torch.tanh(scores.float() / softcap)).masked_fill(~visible, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v.repeat_interleave(repeat, 1)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float | None = None) -> Tensor:
    """torch's attention of q `[B, H, T, d]` over k, v `[B, KV, S, d]` under a bool mask `[T, S]` (None: all)."""
    repeat = q.shape[1] // k.shape[1]
    if q.is_cuda and repeat > 1 and visible is not None:  # not every fused kernel takes a mask and groups of heads
        k, v, repeat = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1), 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=repeat > 1)


def without_plans(device: torch.device) -> AbstractContextManager[None]:
    """torch's attention without cuDNN's, which torch prefers on Hopper and which builds a plan for every shape that it
    has not met: 70 ms at each new prompt length, measured (docs/log.md). A setting of the whole process, put back
    afterwards."""
    return sdpa_kernel(PLANLESS) if device.type == "cuda" else nullcontext()


def visible_keys(first: int, num_rows: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """bool `[T, S]`: the keys that `full_attention` lets each row see."""
    at = torch.arange(first, first + num_rows, device=device).unsqueeze(1)
    key_at = torch.arange(num_keys, device=device).unsqueeze(0)
    visible = key_at <= at
    if window is not None:
        visible &= key_at > at - window
    return visible
