"""What a draft head says after rows on the device: the LM head over its vocabulary, and the best few tokens of each
row."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.lm_head import lm_head, num_tiles
from ..kernels.rows import Rows
from ..kernels.top_candidates import top_candidates
from .fused import NormedLinear


class Speech:
    """Buffers of R rows, at addresses that never change.

    Args:
        num_rows: R, a multiple of 16.
        branch: tokens wanted of each row.
        head_weight: `[Vd, D]`, the LM head's.

    Attributes:
        x, stats: `[R, D]` and fp32 `[R, 2, 1]`, what the LM head reads (`lm_head`), for the caller to fill.
        ids, log_probs: int32 and fp32 `[R, branch]`, the best tokens (`top_candidates`).
        entropies, surprisals: fp32 `[R]`, nats.
    """

    def __init__(self, num_rows: int, branch: int, head_weight: Tensor) -> None:
        vocab_size, width = head_weight.shape
        device, tiles = head_weight.device, num_tiles(vocab_size, head_weight.dtype)

        def real(*size: int) -> Tensor:
            return torch.zeros(num_rows, *size, device=device)

        def whole(*size: int) -> Tensor:
            return torch.zeros(num_rows, *size, dtype=torch.int32, device=device)

        self.x = torch.zeros(num_rows, width, dtype=head_weight.dtype, device=device)
        self.stats, self.logits, self.best_value, self.best_id = real(2, 1), real(vocab_size), real(tiles), whole(tiles)
        self.tile_stats, self.entropies, self.surprisals = real(3, tiles), real(), real()
        self.ids, self.log_probs = whole(branch), real(branch)

    def speak(
        self,
        speaker: NormedLinear,
        rows: Rows,
        draft_ids: Tensor | None,
        options: Tensor,
        seeds: Tensor,
        *,
        eps: float,
        softcap: float | None,
        stats: Tensor | None = None,
        pdl: bool = False,
    ) -> None:
        """The best tokens after each live row, from its `x`.

        Args:
            speaker: the projection with its norm.
            rows: `position` is that of the token before.
            draft_ids: int32 `[Vd]`, rising: token ids of the outputs; None for all.
            options: fp32, the temperature first.
            seeds: int64 `[B]`.
            eps, softcap: the norm's and the logits'.
            stats: of the norm, in place of this one's.
            pdl: programmatic dependent launch.
        """
        lm_head(
            self.x, self.stats if stats is None else stats, speaker.weight, speaker.bias, speaker.shift, rows, eps=eps,
            softcap=softcap, ids=draft_ids, options=options, seeds=seeds, logits=self.logits,
            best_value=self.best_value, best_id=self.best_id, tile_stats=self.tile_stats, pdl=pdl,
        )  # fmt: skip
        top_candidates(
            self.logits, self.tile_stats, self.best_value, options, seeds, rows, self.ids, self.log_probs,
            self.entropies, draft_ids, surprisals=self.surprisals, pdl=pdl,
        )  # fmt: skip
