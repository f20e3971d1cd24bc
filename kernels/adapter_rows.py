"""What an adapter reads of the residual stream h at its exit (`heads/adapter.py`), of rows that stand anywhere:

    x = h * norm * x_scale,    stats = (sum h^2, sum h)       the deferred norm that its way up undoes (see `tile.py`)
    y = h / rms(h) * gain                                     what its way down is added to

with rms(h) = (mean h^2 + eps)^1/2 in fp32. One program a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import Rows
from .tile import x_scale

try:
    import triton
    import triton.language as tl

    from .tile import pdl_next, pdl_wait
except ImportError:
    triton = None

EPS = 1e-5  # of `heads.base.rms_normalise`


def adapter_rows_reference(hidden: Tensor, source: Tensor, norm: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(x before rounding and scaling, stats [R, 2, 1], y)`, fp32, of all rows."""
    h = hidden[source.long()]
    y = F.rms_norm(h, h.shape[-1:], gain, EPS)
    return h * norm, torch.stack([(h * h).sum(-1), h.sum(-1)], 1).unsqueeze(2), y


if triton is not None:

    @triton.jit
    def _adapter_rows_kernel(  # type: ignore[no-untyped-def]
        hidden, source, live_of, norm, gain, x, stats, y, eps,
        D: tl.constexpr, BLOCK: tl.constexpr, X_SCALE: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        d = tl.arange(0, BLOCK)
        norm_weight = tl.load(norm + d, mask=d < D, other=0.0)
        gain_weight = tl.load(gain + d, mask=d < D, other=0.0)
        pdl_wait(PDL)
        pdl_next(PDL)
        row = tl.program_id(0).to(tl.int64)
        if tl.load(live_of + row) == 0:
            return
        h = tl.load(hidden + tl.load(source + row).to(tl.int64) * D + d, mask=d < D, other=0.0)
        squares = tl.sum(h * h, 0)
        tl.store(x + row * D + d, (h * norm_weight * X_SCALE).to(x.dtype.element_ty), mask=d < D)
        tl.store(stats + row * 2, squares)
        tl.store(stats + row * 2 + 1, tl.sum(h, 0))
        tl.store(y + row * D + d, h * tl.rsqrt(squares / D + eps) * gain_weight, mask=d < D)


def adapter_rows(
    hidden: Tensor,
    source: Tensor,
    norm: Tensor,
    gain: Tensor,
    rows: Rows,
    x: Tensor,
    stats: Tensor,
    y: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Make every live row's x, stats and y.

    Args:
        hidden: fp32 `[N, D]`, the residual stream at the exit.
        source: int32 `[R]`, whose row of `hidden` each row is.
        norm, gain: fp32 `[D]`.
        rows: which are live.
        x: `[R, D]` in the model's dtype, overwritten.
        stats: fp32 `[R, 2, 1]`, overwritten.
        y: fp32 `[R, D]`, overwritten.
        pdl: programmatic dependent launch.

    Raises:
        ValueError: shapes that do not fit.
    """
    width = hidden.shape[1]
    if x.shape != (len(rows), width) or y.shape != x.shape or stats.shape != (len(rows), 2, 1):
        raise ValueError(
            f"x {tuple(x.shape)}, y {tuple(y.shape)} and stats {tuple(stats.shape)}, expected {len(rows)} rows of "
            f"{width} and one tile"
        )
    _adapter_rows_kernel[(len(rows),)](
        hidden, source, rows.live, norm, gain, x, stats, y, EPS,
        D=width, BLOCK=triton.next_power_of_2(width), X_SCALE=x_scale(x.dtype), PDL=pdl, num_warps=4,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
