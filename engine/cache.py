"""KV cache of a batch: preallocated, committed by length, whole groups of positions.

Committed tokens stand at slot == position. The nodes of a draft tree write at base + node, beyond the committed
length; commit moves the accepted path into position order and everything else is overwritten later. Nothing here
decides what may be seen: `engine/forward.py` builds the masks. What else a sequence's rows run through, MLPs of its own
where neurons are skipped, stands here beside its keys, so that no pass over its rows can miss them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import ModelConfig
from .tree import MAX_NODES


class ContextTooLong(ValueError):
    """The requested context does not fit the model or the memory; the message shows the arithmetic."""


@dataclass(frozen=True)
class CachePlan:
    """Sizes of a KV cache, known before a byte is allocated.

    `context` is tokens a sequence may hold; slots adds the room for one draft, rounded up to whole groups.
    """

    num_layers: int
    batch: int
    context: int
    num_kv_heads: int
    head_dim: int
    group: int
    dtype: torch.dtype

    @property
    def num_slots(self) -> int:
        return -(-(self.context + MAX_NODES) // self.group) * self.group

    @property
    def num_bytes(self) -> int:
        slots = self.num_layers * self.batch * self.num_slots
        return 2 * slots * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def arithmetic(self) -> str:
        """The size in words and factors, for reports and errors."""
        size = f"{self.num_bytes / 2**20:.1f} MiB"
        return (
            f"KV cache 2 x {self.num_layers} layers x {self.batch} sequences x {self.num_slots} slots x "
            f"{self.num_kv_heads} heads x {self.head_dim} x {self.dtype.itemsize} bytes = {size}"
        )


def plan_cache(
    config: ModelConfig, batch: int, context: int, device: torch.device, dtype: torch.dtype, check_free: bool = True
) -> CachePlan:
    """Size a cache.

    On the CPU keys and values are kept in fp32 whatever the model's dtype, because bf16 attention there costs more in
    conversions than it saves in bytes; on a GPU they have the model's dtype.

    Raises:
        ContextTooLong: `context` exceeds the model's, or the free memory.
    """
    if context > config.max_context:
        raise ContextTooLong(
            f"{context} tokens were asked for (prompt + max_new_tokens), but the model's context is "
            f"{config.max_context}; shorten the prompt or lower max_new_tokens"
        )
    on_cpu = device.type == "cpu"
    plan = CachePlan(
        num_layers=config.num_layers,
        batch=batch,
        context=context,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        group=64,
        dtype=torch.float32 if on_cpu else dtype,
    )
    free = free_memory(device) if check_free else None
    if free is not None and plan.num_bytes > free:
        raise ContextTooLong(
            f"a context of {context} tokens does not fit: {plan.arithmetic()}, but {free / 2**20:.1f} MiB are free on "
            f"{device}; lower max_new_tokens, shorten the prompt or use fewer sequences at once"
        )
    return plan


def free_memory(device: torch.device) -> int | None:
    """Bytes free on a device, with those that torch's allocator holds and nobody uses; None where the system does not
    say."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


class KVCache:
    """Keys and values `[L, B, KV, S, d]` of S slots, and the committed length of each sequence."""

    def __init__(self, plan: CachePlan, device: torch.device) -> None:
        shape = (plan.num_layers, plan.batch, plan.num_kv_heads, plan.num_slots, plan.head_dim)
        self.plan, self.device = plan, device
        self.k = torch.zeros(shape, dtype=plan.dtype, device=device)
        self.v = torch.zeros(shape, dtype=plan.dtype, device=device)
        self.lens = [0] * plan.batch
        self._cleared = [0] * plan.batch  # slots from the committed length up to here hold finite values
        self.mlps: list[Mapping[int, Callable[[Tensor], Tensor]]] = [{}] * plan.batch  # by layer; absent: the model's

    @property
    def group(self) -> int:
        return self.plan.group

    def of_sequence(self, sequence: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one sequence, `[L, KV, S, d]` each (views)."""
        return self.k[:, sequence], self.v[:, sequence]

    def writer(self, sequence: int, slots: list[int]) -> Writer:
        """What stores rows of one sequence at these slots, in any layer."""
        return Writer(self, sequence, slots)

    def write_rows(self, layer: int, sequences: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """`Writer` for rows of several sequences: row i goes to slot `slots[i]` of `sequences[i]` (long `[w]` each)."""
        self.k[layer][sequences, :, slots] = k.to(self.k.dtype)
        self.v[layer][sequences, :, slots] = v.nan_to_num(0.0, 0.0, 0.0).to(self.v.dtype)

    def clear_open(self, sequence: int) -> None:
        """Zero the values that a round can read beyond the committed length, to the end of its last group (rule 4),
        unless that was done in an earlier round: rejected rows leave finite values (`Writer`), and a finite value times
        zero is zero."""
        base = self.lens[sequence]
        end = -(-(base + MAX_NODES) // self.group) * self.group
        start = max(base, self._cleared[sequence])
        if start < end:
            self.v[:, sequence, :, start:end].zero_()
        self._cleared[sequence] = end

    def restart(self, sequence: int) -> None:
        """Forget a sequence. What its slots hold is not trusted any more."""
        self.lens[sequence] = self._cleared[sequence] = 0
        self.mlps[sequence] = {}

    def commit(self, sequence: int, path: list[int]) -> None:
        """Accept the nodes `path` (root first): their rows move to slots base, base + 1, ... and the length grows.

        All reads happen before any write, so a path may overlap its own destination.
        """
        base = self.lens[sequence]
        if path != list(range(len(path))):
            source = torch.tensor([base + node for node in path], device=self.device)
            target = torch.arange(base, base + len(path), device=self.device)
            for store in (self.k[:, sequence], self.v[:, sequence]):
                store[:, :, target] = store[:, :, source]
        self.lens[sequence] = base + len(path)

    def read(self, layer: int, sequence: int, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` slots of a layer, `[KV, length, d]` each (views)."""
        return self.k[layer, sequence, :, :length], self.v[layer, sequence, :, :length]


class Writer:
    """Stores `[w, KV, d]` keys and values of w rows at fixed slots; views of all layers are made once.

    Values that are not finite are stored as zero: such a row shows in its own logits, and a NaN times a zero weight
    would otherwise reach rows that must not see it.
    """

    def __init__(self, cache: KVCache, sequence: int, slots: list[int]) -> None:
        self._dtype = cache.v.dtype
        self._parts = []
        for slot, first, count in runs(slots):
            views = [
                store[:, sequence, :, slot : slot + count].transpose(1, 2).unbind() for store in (cache.k, cache.v)
            ]
            self._parts.append((views[0], views[1], slice(first, first + count)))

    def __call__(self, layer: int, k: Tensor, v: Tensor) -> None:
        v = v.to(self._dtype)
        whole = len(self._parts) == 1
        for keys, values, rows in self._parts:
            keys[layer].copy_(k if whole else k[rows])
            torch.nan_to_num(v if whole else v[rows], 0.0, 0.0, 0.0, out=values[layer])


def runs(slots: list[int]) -> list[tuple[int, int, int]]:
    """Slots as `(first slot, first row, count)` of stretches without a break."""
    found: list[tuple[int, int, int]] = []
    for row, slot in enumerate(slots):
        if found:
            start, first, count = found[-1]
            if slot == start + count:
                found[-1] = (start, first, count + 1)
                continue
        found.append((slot, row, 1))
    return found
