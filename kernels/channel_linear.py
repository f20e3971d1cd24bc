"""Projection of a few rows that reads only some input channels' weights: what activation sparsity saves on a CPU.

    y[n] = sum over kept k of x[n, k] W[:, k]

The weight is stored input-channel-major (`[K, M]`), so a channel's weights are contiguous and a dropped channel's are
never read. torch's `embedding_bag` is this very sum: it reads each kept row once, multiplies, and adds in fp32, in
rising order of k, one bag after the other, so that a row's bits do not depend on other rows. Gathering the rows first
(`index_select`, then a product) writes and reads them a second time (docs/sparsity.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def channel_linear_reference(x: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """`(x where keep, else 0) [N, K] @ weight [K, M]` in fp32."""
    return torch.where(keep, x.float(), 0.0) @ weight.float()


def channel_linear(x: Tensor, weight: Tensor, keep: Tensor, parts: int = 1) -> Tensor:
    """Project rows, each by the channels that it keeps.

    Args:
        x: `[N, K]`.
        weight: `[K, M]` of the same dtype, contiguous.
        keep: bool `[N, K]`; places outside never enter arithmetic.
        parts: that K is divided into, at fixed channels; torch works on them side by side, and they are added in order.

    Returns:
        `[N, M]`, of x's dtype, with one part; else fp32 sums of parts that were rounded to it.

    Raises:
        ValueError: K is not a multiple of `parts`.
    """
    count, size = x.shape
    if size % parts:
        raise ValueError(f"{size} channels cannot be divided into {parts} equal parts")
    if count * parts == 1:  # fewer and smaller operations for the same sum: half of a small projection's time
        channels = keep[0].nonzero().squeeze(1)
        start, kept = channels.new_zeros(1), x[0].index_select(0, channels)
        return F.embedding_bag(channels, weight, start, mode="sum", per_sample_weights=kept)
    keep = keep.reshape(count * parts, -1)
    bags, channels = keep.nonzero(as_tuple=True)
    kept = x[keep.view(count, size)]
    if parts > 1:
        channels = channels + (bags % parts) * (size // parts)
    counts = keep.sum(1)
    sums = F.embedding_bag(channels, weight, counts.cumsum(0) - counts, mode="sum", per_sample_weights=kept)
    return sums if parts == 1 else sums.view(count, parts, -1).float().sum(1)
