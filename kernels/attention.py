"""Attention of a few decode rows over grouped keys, reduced in position order (design rules 3 and 4).

Keys and values lie in groups of `group` absolute positions: `k, v [G, KV, group, d]`, position p in group
p // group at place p % group. A row's scores are put in position order, masked to its own root-to-leaf path, and

    o = sum_g P_g V_g / sum_g sum(P_g),   P = exp(score - max over the row's own keys)

with one product of fixed shape `[rows, group] x [group, d]` per group and a serial sum over groups. A group that holds
only keys a row must not see adds exact zeros, so the bits depend on the row's own tokens and positions and on nothing
else: not on cache length, round start, tree shape, or other rows.

The one place where a tree differs from a chain: siblings share a position, so the groups that hold uncommitted
positions (at most two) are multiplied once per root-to-leaf path, with that path's keys gathered into their
positions' places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RowKeys:
    """Which keys each of M rows sees. Slot s of a sequence is place s % group of group s // group.

    Attributes:
        num_groups: groups to read, so that every visible slot is inside.
        first_group: groups before this one are outside every row's window.
        open_group: first group that holds an uncommitted position.
        hidden: bool `[n, 1, M, 1, group]`: keys that a row must not see, in the last n groups read, in position order;
            every row sees all of the groups before.
        order: None when slot == position for every row (a chain); else long `[M, n]`, the slot, relative to
            open_group's first, that holds each position from open_group on.
        path_slots: with `order`, long `[P, n]`: the same for each root-to-leaf path; positions past the path's end
            name any finite slot (their weight is zero).
        path_of_row: with `order`, long `[M]`.
    """

    num_groups: int
    first_group: int
    open_group: int
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


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: RowKeys,
    scale: float | Tensor,
    softcap: float | None = None,
) -> Tensor:
    """Attention of M rows of one sequence, for devices where a batched product's bits do not depend on the batch count
    and on M from some small M on (CPU, measured by `engine/selftest.py`).

    Args:
        q: `[M, H, d]` fp32, rotated.
        k, v: `[G, KV, group, d]`, G >= keys.num_groups; unseen slots of v are finite.
        keys: what each row sees.
        scale: factor on q . k; as a tensor `[1]` it need not be converted at each call.
        softcap: cap * tanh(score / cap) when given (Gemma 2).

    Returns:
        `[M, H, d]` fp32.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv, group = k.shape[1], k.shape[2]
    lo, hi = keys.first_group, keys.num_groups
    rows = num_rows * (num_heads // num_kv)
    q = (q * scale).view(num_rows, num_kv, -1, head_dim).transpose(0, 1).reshape(1, num_kv, rows, head_dim)

    scores = _by_groups(q, k[lo:hi].float().transpose(2, 3))
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    per_row = scores.view(hi - lo, num_kv, num_rows, -1, group)
    if keys.order is not None:
        open_scores = per_row[keys.open_group - lo :]
        per_row[keys.open_group - lo :] = _in_position_order(open_scores, keys.order)
    per_row[-len(keys.hidden) :].masked_fill_(keys.hidden, float("-inf"))

    weights = scores.sub_(scores.amax((0, 3), keepdim=True)).exp_()
    split = hi if keys.order is None else keys.open_group
    products = [_by_groups(weights[: split - lo], v[lo:split].float())] if split > lo else []
    if keys.order is not None:
        products.append(_per_path(weights[split - lo :], v[split:hi], keys, num_rows))
    out = _serial_sum(products) / _serial_sum([weights.sum(-1)]).unsqueeze(-1)
    return out.view(num_kv, num_rows, -1, head_dim).transpose(0, 1).reshape(num_rows, num_heads, head_dim)


def _by_groups(a: Tensor, b: Tensor) -> Tensor:
    """`a [G or 1, KV, M, x] @ b [G, KV, x, y] -> [G, KV, M, y]`."""
    num_groups, num_kv = b.shape[:2]
    a = a.expand(num_groups, -1, -1, -1)
    out = torch.bmm(a.reshape(-1, *a.shape[2:]), b.reshape(-1, *b.shape[2:]))
    return out.view(num_groups, num_kv, a.shape[2], b.shape[3])


def _in_position_order(scores: Tensor, order: Tensor) -> Tensor:
    """Scores of the open groups `[U, KV, M, g, group]`, from slot order to each row's position order."""
    num_open, num_kv, num_rows, per_kv, group = scores.shape
    flat = scores.permute(1, 2, 3, 0, 4).reshape(num_kv, num_rows, per_kv, num_open * group)
    flat = flat.gather(3, order.view(1, num_rows, 1, -1).expand(num_kv, -1, per_kv, -1))
    return flat.view(num_kv, num_rows, per_kv, num_open, group).permute(3, 0, 1, 2, 4)


def _per_path(weights: Tensor, v: Tensor, keys: RowKeys, num_rows: int) -> Tensor:
    """Products of the open groups, once per root-to-leaf path; every row keeps its own path's: `[U, KV, M*g, d]`."""
    assert keys.path_slots is not None and keys.path_of_row is not None
    num_open, num_kv, rows, group = weights.shape
    by_slot = v.float().transpose(1, 2).reshape(num_open * group, num_kv, -1)
    kept = []
    for path in keys.path_slots:
        values = by_slot[path].view(num_open, group, num_kv, -1).transpose(1, 2)
        kept.append(_by_groups(weights, values))
    stacked = torch.stack(kept)  # [P, U, KV, M*g, d]
    path_of = keys.path_of_row.repeat_interleave(rows // num_rows)
    return stacked[path_of, :, :, torch.arange(rows, device=v.device)].permute(1, 2, 0, 3)


def _serial_sum(parts: list[Tensor]) -> Tensor:
    """Sum over the leading group axis of all parts, one group after the other."""
    total: Tensor | None = None
    for part in parts:
        for group in part:
            total = group if total is None else total + group
    assert total is not None
    return total


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
        k, v: `[B, G, KV, group, d]`, one layer of the cache.
        sequences: long `[M]`, each row's place in the cache.
        slots: long `[M, S]`, the slot that holds each position for this row, S a multiple of `GATHER_CHUNK`; hidden
            positions name any finite slot.
        hidden: bool `[M, S]`, positions the row must not see.
        scale, softcap: as in `decode_attention`.

    Returns:
        `[M, H, d]` fp32.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv, group = k.shape[2], k.shape[3]
    q = (q * scale).view(num_rows * num_kv, -1, head_dim)
    owner = sequences.unsqueeze(1)

    def gather(store: Tensor, chunk: Tensor) -> Tensor:
        rows = store[owner, chunk // group, :, chunk % group]  # [M, chunk, KV, d]
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
) -> Tensor:
    """Causal attention of T consecutive rows over S keys: prefill chunks and training.

    Args:
        q: `[B, H, T, d]`; row t stands at position first + t.
        k, v: `[B, KV, S, d]`, keys at positions 0..S-1, S >= first + T.
        scale, window, softcap: as in `decode_attention`; a row at p sees p - window + 1 .. p.

    Returns:
        `[B, H, T, d]` of q's dtype.
    """
    num_rows, num_keys = q.shape[2], k.shape[2]
    if softcap is None and window is None and first == 0 and num_rows == num_keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    at = torch.arange(first, first + num_rows, device=q.device).unsqueeze(1)
    key_at = torch.arange(num_keys, device=q.device).unsqueeze(0)
    visible = key_at <= at
    if window is not None:
        visible &= key_at > at - window
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    repeat = q.shape[1] // k.shape[1]
    scores = (q * scale) @ k.repeat_interleave(repeat, 1).transpose(2, 3)
    scores = (softcap * torch.tanh(scores.float() / softcap)).masked_fill(~visible, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v.repeat_interleave(repeat, 1)
