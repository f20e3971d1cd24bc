"""Accepted keys and values into place: in every layer, slot base + path[i] moves to base + i.

One program a layer, sequence and KV head reads its up to 16 rows before it writes any, so a path may overlap its own
destination (`engine/cache.py: KVCache.commit`). A path that is 0, 1, 2, ... moves nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .accept import RECORD_BASE
from .rows import PATH

try:
    import triton
    import triton.language as tl

    from .tile import pdl_next, pdl_wait
except ImportError:
    triton = None


def commit_reference(cache: Tensor, sequence: int, base: int, path: list[int]) -> None:
    """One sequence of `[L, B, KV, S, d]`, in place."""
    source = torch.tensor([base + node for node in path], device=cache.device)
    cache[:, sequence, :, base : base + len(path)] = cache[:, sequence][:, :, source]


if triton is not None:

    @triton.jit
    def _commit_kernel(  # type: ignore[no-untyped-def]
        k_cache, v_cache, record, path_nodes, num_path,
        cache_layer, cache_sequence, cache_head, cache_slot,
        HEAD_DIM: tl.constexpr, RECORD: tl.constexpr, BASE: tl.constexpr, N: tl.constexpr, PDL: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        pdl_wait(PDL)
        pdl_next(PDL)
        head, sequence, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        place, dims = tl.arange(0, N), tl.arange(0, BLOCK_D)
        count = tl.load(num_path + sequence)
        base = tl.load(record + sequence * RECORD + BASE)
        node = tl.load(path_nodes + sequence * N + place, mask=place < count, other=0)
        moves = (place < count) & (node != place)
        if tl.max(moves.to(tl.int32), 0) == 0:
            return
        start = (
            layer.to(tl.int64) * cache_layer + sequence.to(tl.int64) * cache_sequence + head.to(tl.int64) * cache_head
        )
        source = start + (base + node).to(tl.int64)[:, None] * cache_slot + dims[None, :]
        target = start + (base + place).to(tl.int64)[:, None] * cache_slot + dims[None, :]
        mask = moves[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(k_cache + source, mask=mask, other=0.0)
        values = tl.load(v_cache + source, mask=mask, other=0.0)
        tl.debug_barrier()  # every thread has read before one writes
        tl.store(k_cache + target, keys, mask=mask)
        tl.store(v_cache + target, values, mask=mask)


def _settings(head_dim: int) -> dict[str, int]:
    """Warps: four rows of a head each."""
    return {"num_warps": 2 if head_dim <= 64 else 4}


def commit(
    k_cache: Tensor, v_cache: Tensor, record: Tensor, path_nodes: Tensor, num_path: Tensor, *, pdl: bool = False
) -> None:
    """Move the accepted path of every sequence.

    Args:
        k_cache, v_cache: `[L, B', KV, S, d]`, equal strides, last axis contiguous; sequences 0 .. B - 1 of B' >= B.
        record: int32 `[B, 96]` of `accept`, for the committed length before the round.
        path_nodes, num_path: int32 `[B, 16]`, `[B]` of `accept`.
        pdl: start before the kernel before has ended.

    Raises:
        ValueError: caches that differ, or of fewer sequences than the record.
    """
    num_layers, num_sequences, num_kv, _, head_dim = k_cache.shape
    batch, size = record.shape
    if k_cache.shape != v_cache.shape or k_cache.stride() != v_cache.stride() or k_cache.stride(-1) != 1:
        raise ValueError("expected caches of equal shapes and strides with a last axis without gaps")
    if batch > num_sequences or path_nodes.shape != (batch, PATH) or num_path.shape != (batch,):
        raise ValueError(
            f"a record of {batch} sequences, path_nodes {tuple(path_nodes.shape)} and num_path {tuple(num_path.shape)} "
            f"do not fit a cache of {num_sequences}"
        )
    _commit_kernel[(num_kv, batch, num_layers)](
        k_cache, v_cache, record, path_nodes, num_path, *k_cache.stride()[:4],
        HEAD_DIM=head_dim, RECORD=size, BASE=RECORD_BASE, N=PATH, PDL=pdl,
        BLOCK_D=triton.next_power_of_2(head_dim), **_settings(head_dim), **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
