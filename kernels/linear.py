"""Projection of a few rows, the same bits whatever stands beside a row.

`y = x @ W.T + b` for `x [N, K]`, `W [M, K]`. On the CPU the weight is repacked once into oneDNN's blocked layout:
besides being faster, a packed weight makes a row's bits independent of how many rows run with it, from some small
count on (measured on AVX-512: mostly from 1 in bf16 and from 2 in fp32; with many inputs a single row takes another
summation order). `find_least_rows` measures that count for a weight's shape on the machine at hand, and calls with
fewer rows are padded to it. Elsewhere the caller keeps the row count fixed. Plain `F.linear` is the reference.

Rounding to bf16 hides another order of summation in all but a few outputs of ten thousand, in shorter sums of a
million: random rows missed it where oneDNN has no bf16 instructions (48 inputs; docs/log.md). So the order is measured
on products that cancel in pairs: what is left of them is rounding error, and differs in most outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PACK_ROWS = 16  # the row count that oneDNN picks its blocking for
CANCELLED = 4096  # outputs compared with products that cancel, at least
LARGEST_PROBE = 1 << 26  # weights of a probe; larger weights are measured themselves, on random rows
OUTPUTS_COMPARED = 400_000  # of those
DISTINCT = 1024  # of a probe; the others repeat them


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x [N, K] @ weight [M, K].T + bias [M]` in fp32."""
    y = x.float() @ weight.float().T
    return y if bias is None else y + bias.float()


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can hold this weight in its own layout on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return weight.dtype == torch.float32


class PackedLinear:
    """A projection with its weight in the layout that the device reads fastest.

    Args:
        weight: `[M, K]`, any float dtype; kept only in packed form where packing is possible.
        bias: `[M]` or None, same dtype.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.bias = bias
        self.least_rows = 1
        self.packed = can_pack(weight)
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS)
        else:
            self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """`x [N, K]` of the weight's dtype -> `[N, M]` of the same dtype."""
        count = x.shape[0]
        if count < self.least_rows:
            return self._product(torch.cat([x, x[-1:].expand(self.least_rows - count, -1)]))[:count]
        return self._product(x)

    def find_least_rows(self, most: int) -> bool:
        """Set `least_rows` to the smallest count from which on, up to `most`, a row has the same bits as among `most`.

        Returns:
            Whether a row's place among `most` rows is without effect, too.
        """
        generator = torch.Generator().manual_seed(self.in_features)
        if self.out_features * self.in_features <= LARGEST_PROBE:
            num_trials = -(-CANCELLED // (most * self.out_features))
            x, weight = cancelling(num_trials * most, min(self.out_features, DISTINCT), self.in_features, generator)
            weight = weight.to(self.weight.device, self.dtype).repeat(-(-self.out_features // len(weight)), 1)
            bias = None if self.bias is None else torch.zeros_like(self.bias)
            probe = PackedLinear(weight[: self.out_features], bias)
        else:
            num_trials = -(-OUTPUTS_COMPARED // (most * self.out_features))
            x, probe = torch.randn(num_trials * most, self.in_features, generator=generator), self
        self.least_rows = 1
        for rows in x.to(self.weight.device, self.dtype).split(most):
            full = probe._product(rows)
            for count in range(self.least_rows, most):
                if not torch.equal(probe._product(rows[-count:].contiguous()), full[-count:]):
                    self.least_rows = count + 1
            if not torch.equal(probe._product(rows.flip(0)).flip(0), full):
                return False
        return True

    def _product(self, x: Tensor) -> Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


def cancelling(rows: int, outputs: int, inputs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows `[rows, inputs]` and a weight `[outputs, inputs]` whose products cancel in pairs, at random places: every
    product has a partner of opposite sign, so the exact result is 0."""
    half = inputs // 2
    order = torch.randperm(inputs, generator=generator)
    values = torch.randn(rows, half, generator=generator)
    weights = torch.randn(outputs, half, generator=generator)
    x, weight = torch.zeros(rows, inputs), torch.zeros(outputs, inputs)
    x[:, order[:half]], x[:, order[half : 2 * half]] = values, values
    weight[:, order[:half]], weight[:, order[half : 2 * half]] = weights, -weights
    return x, weight
