"""Drafts from the text on the device: `draft_from_text` of one branch, without the host (`kernels/draft_text.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..kernels.draft_text import draft_text, empty_text, keep_text
from ..kernels.grow_tree import Sequences, Trees
from .device_state import upload
from .gate import Lookup
from .tree import MAX_NODES


class TextDraft:
    """Chains of B sequences from their own texts.

    Args:
        lookup: of one branch.
        batch: B.
        positions: tokens that a sequence may hold.
        trees, exits: where the drafts go, and that they are from the text.
        sequences: of the batch.
        pdl: programmatic dependent launch (Hopper and newer).
    """

    def __init__(
        self,
        lookup: Lookup,
        batch: int,
        positions: int,
        trees: Trees,
        exits: Tensor,
        sequences: Sequences,
        pdl: bool = False,
    ) -> None:
        assert lookup.branch == 1
        self._lookup, self.pdl = lookup, pdl
        self._trees, self._exits, self._sequences = trees, exits, sequences
        self._text = empty_text(batch, positions + MAX_NODES, sequences.base.device)

    def start(self, texts: Mapping[int, Sequence[int]]) -> None:
        """Take over sequences: sequence -> all token ids, the pending one last. Not to be captured."""
        for sequence, ids in texts.items():
            upload(self._text[sequence, : len(ids)], torch.tensor(ids, dtype=torch.int32))

    def draft(self, heads: int = 0) -> None:
        """Hang below each active sequence's root what its text suggests; where heads drafted trees of up to `heads`
        nodes, leave theirs where it suggests nothing, or share the rows with them (`Lookup.beside`)."""
        own = self._lookup
        draft_text(
            self._text, self._sequences, self._trees, self._exits, min_match=own.min_match, per_match=own.per_match,
            max_nodes=own.max_nodes, over=heads > 0, beside=own.beside, together=max(heads, own.max_nodes),
            pdl=self.pdl,
        )  # fmt: skip

    def keep(self, record: Tensor) -> None:
        """Take in what a round committed."""
        keep_text(record, self._text, pdl=self.pdl)
