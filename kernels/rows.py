"""What a decode step knows of its rows, in device memory.

A row is one node of one sequence's draft tree; plain decoding has one row a sequence. Rows come in tiles of 16; those
that are not live are padding: nothing of theirs is read or stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PATH = 16  # nodes on a root-to-leaf path at most


@dataclass(frozen=True)
class Rows:
    """int32 tensors `[R]`, R a multiple of 16, at addresses that never change.

    Attributes:
        live: 1 for a real row, 0 for padding.
        sequence: the row's sequence in the cache.
        position: absolute position of the row's token.
        slot: where its key and value go.
        base: committed length of its sequence, the position of the tree's root.
        path: `[R, 16]`, slot less `base` of the token that stands at position base + i on the row's own path.
    """

    live: Tensor
    sequence: Tensor
    position: Tensor
    slot: Tensor
    base: Tensor
    path: Tensor

    def __len__(self) -> int:
        return self.live.shape[0]

    @classmethod
    def empty(cls, num_rows: int, device: torch.device | str) -> Rows:
        """Padding only."""
        if num_rows < 1 or num_rows % 16:
            raise ValueError(f"num_rows is {num_rows}, expected a positive multiple of 16")

        def whole(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        n = num_rows
        return cls(whole(n), whole(n), whole(n), whole(n), whole(n), whole(n, PATH))
