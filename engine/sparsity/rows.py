"""How many rows a projection of one shape needs beside a row for equal bits, by data that shows every difference.

`PackedLinear.find_least_rows` compares a weight's own outputs on random rows. Of most weights rounding hides another
order of summation in all but a few outputs of ten thousand, so for the many shapes of reduced projections it missed
one: 1,152 neurons of SmolLM2, where a single row is summed in another order, and 4 of 14 answers differed. Here every
product has a partner of opposite sign somewhere else in the sum: the exact result is 0 and what is left is rounding
error, which differs in most outputs as soon as the order does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.linear import PackedLinear

TRIALS = 2


class RowsDiffer(RuntimeError):
    """A row's bits depend on its place among others."""


def least_rows(like: PackedLinear, most: int) -> int:
    """The smallest count from which on, up to `most`, a row has the same bits as among `most`, for projections of this
    shape and dtype; `most` on a GPU, where other counts take other kernels.

    Raises:
        RowsDiffer: a row's place among `most` rows matters.
    """
    generator = torch.Generator().manual_seed(like.in_features)
    device = like.weight.device
    found = 1 if device.type == "cpu" else most
    for _ in range(TRIALS):
        x, weight = cancelling(most, like.out_features, like.in_features, generator)
        bias = None if like.bias is None else torch.zeros_like(like.bias)
        probe = PackedLinear(weight.to(device, like.dtype), bias)
        x = x.to(device, like.dtype)
        whole = probe(x)
        if not torch.equal(probe(x.flip(0)).flip(0), whole):
            raise RowsDiffer(
                f"rows of a projection {like.in_features} -> {like.out_features} in {like.dtype} differ in their bits "
                "by their place: skipping neurons would not be lossless on this machine. Load with verify='dense', or "
                "with deterministic=False and accept near-ties"
            )
        for count in range(found, most):
            if not torch.equal(probe(x[-count:].contiguous()), whole[-count:]):
                found = count + 1
    return found


def cancelling(rows: int, outputs: int, inputs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows `[rows, inputs]` and a weight `[outputs, inputs]` whose products cancel in pairs, at random places."""
    half = inputs // 2
    order = torch.randperm(inputs, generator=generator)
    values = torch.randn(rows, half, generator=generator)
    weights = torch.randn(outputs, half, generator=generator)
    x, weight = torch.zeros(rows, inputs), torch.zeros(outputs, inputs)
    x[:, order[:half]], x[:, order[half : 2 * half]] = values, values
    weight[:, order[:half]], weight[:, order[half : 2 * half]] = weights, -weights
    return x, weight
