"""From the host into device memory, without waiting for what the device is doing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..kernels.grow_tree import Trees
from .tree import MAX_NODES, DraftTree


def upload(target: Tensor, values: Tensor) -> None:
    """Overwrite `target` in its stream's order. A copy from memory that is not pinned would wait for all before it."""
    target.copy_(values.pin_memory() if target.is_cuda else values, non_blocking=True)


def fill(state: Trees, trees: Mapping[int, DraftTree]) -> None:
    """Overwrite `state` with these trees, by sequence; sequences without one get none."""
    batch = len(state.count)
    tokens, parents, depths = torch.zeros(3, batch, MAX_NODES, dtype=torch.int32).unbind()
    paths = torch.zeros(batch, MAX_NODES, MAX_NODES, dtype=torch.int32)
    entropies, count = torch.zeros(batch, MAX_NODES), torch.zeros(batch, dtype=torch.int32)
    for b, tree in trees.items():
        size = count[b] = len(tree)
        tokens[b, :size] = torch.tensor(tree.tokens)
        parents[b, :size] = torch.tensor(tree.parents)
        depths[b, :size] = torch.tensor(tree.depths)
        entropies[b, :size] = torch.tensor([float("nan") if e is None else e for e in tree.entropies])
        for node in range(size):
            path = tree.path(node)
            paths[b, node, : len(path)] = torch.tensor(path)
    for target, values in (
        (state.tokens, tokens), (state.parents, parents), (state.depths, depths), (state.paths, paths),
        (state.count, count), (state.entropies, entropies),
    ):  # fmt: skip
        upload(target, values)
