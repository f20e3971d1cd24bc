"""Several processes train one head set: each runs the frozen base on its share of every batch's texts.

Started by `torchrun` or `accelerate launch`, which say in the environment who is who. Heads and optimiser are the same
in every process: gradients are sums over drafted tokens divided by the global batch's count before they are added up,
so any number of processes takes the same steps up to the order of the additions. Process 0 measures, saves and speaks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(hours=3)  # the others wait while process 0 loads, measures or calibrates


@dataclass(frozen=True)
class Ranks:
    """This process among `size`. Alone (the default) every method does nothing or returns what it was given."""

    rank: int = 0
    size: int = 1
    local: int = 0

    def place(self, device: str) -> str:
        """This process's own device of the type "cpu" or "cuda"."""
        return device if device == "cpu" or self.size == 1 else f"{device}:{self.local}"

    def share(self, items: Sequence[T]) -> list[T]:
        """Every `size`-th item: neighbours in a sorted batch, which are alike in length, go to different processes."""
        return list(items[self.rank :: self.size])

    def unite(self, parts: Sequence[T]) -> list[T]:
        """Everybody's `share`s put back in the order of the whole."""
        if self.size == 1:
            return list(parts)
        gathered: list[Sequence[T]] = [[]] * self.size
        dist.all_gather_object(gathered, list(parts))
        return [part[i] for i in range(max(map(len, gathered))) for part in gathered if i < len(part)]

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in place; equal on all of them to the bit."""
        if self.size == 1:
            return
        for tensor in tensors:
            dist.all_reduce(tensor)

    def total(self, count: int) -> int:
        """The sum of everybody's count."""
        tensor = torch.tensor(count)
        self.add([tensor])
        return int(tensor)

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum gradients over the processes; a process without rows adds zeros."""
        if self.size == 1:
            return
        owners = list(parameters)
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in owners])
        self.add([flat])
        for parameter, part in zip(owners, flat.split([p.numel() for p in owners]), strict=True):
            parameter.grad = part.view_as(parameter)

    def first(self, make: Callable[[], T]) -> T:
        """`make()` in process 0, then in the others: for what the first leaves in a cache on the disk."""
        if self.rank == 0:
            made = make()
            self.wait()
            return made
        self.wait()
        return make()

    def wait(self) -> None:
        """Until all are here."""
        self.total(0)


ALONE = Ranks()


@contextmanager
def processes(device: str) -> Iterator[Ranks]:
    """The processes that a launcher started, connected; alone without one.

    Args:
        device: "cuda" gives each process of a host its own GPU.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    joined_here = not dist.is_initialized()
    if device == "cuda":
        torch.cuda.set_device(local)
    if joined_here:
        # counts and flags live on the CPU, so that agreeing on them never waits for a GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), local)
    finally:
        if joined_here:
            dist.destroy_process_group()
