"""How many rows a projection of one shape needs beside a row for equal bits (`PackedLinear.find_least_rows`).

For the many shapes of reduced projections it is measured once a shape. Random rows missed one, before products that
cancel were compared: 1,152 neurons of SmolLM2, where a single row is summed in another order, and 4 of 14 answers
differed.
"""

from __future__ import annotations

from ...kernels.linear import PackedLinear


class RowsDiffer(RuntimeError):
    """A row's bits depend on its place among others."""


def least_rows(projection: PackedLinear, most: int) -> int:
    """Set and return the smallest count from which on, up to `most`, a row has the same bits as among `most`, for
    projections of this shape and dtype; `most` on a GPU, where other counts take other kernels.

    Raises:
        RowsDiffer: a row's place among `most` rows matters.
    """
    if not projection.find_least_rows(most):
        raise RowsDiffer(
            f"rows of a projection {projection.in_features} -> {projection.out_features} in {projection.dtype} differ "
            "in their bits by their place: skipping neurons would not be lossless on this machine. Load with "
            "verify='dense', or with deterministic=False and accept near-ties"
        )
    if projection.weight.device.type != "cpu":
        projection.least_rows = most
    return projection.least_rows
