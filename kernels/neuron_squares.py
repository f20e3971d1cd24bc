"""What each neuron of an MLP did over the rows of a step: the squares of its inner activations, added up (TDA).

    out[f] += sum over live rows r of a[r, f]^2

A program has some neurons and goes over the tiles of 16 rows in order: the squares of a tile are added up, then the
tile to what is there. So the sums of a text do not depend on how many tiles a step has, nor on rows that are not live.
No other program adds to them. One pass.
"""

from __future__ import annotations

from torch import Tensor

from .rows import Rows
from .tile import BLOCK_ROWS

try:
    import triton
    import triton.language as tl

    from .tile import pdl_next, pdl_wait
except ImportError:
    triton = None


def neuron_squares_reference(a: Tensor, rows: Rows, out: Tensor) -> Tensor:
    """What `out` holds afterwards, from the arguments of `neuron_squares`."""
    live = a[rows.live != 0].float()
    return out + (live * live).sum(0)


if triton is not None:

    @triton.jit
    def _neuron_squares_kernel(  # type: ignore[no-untyped-def]
        a, live_of, out, R: tl.constexpr, FF: tl.constexpr, PDL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
    ):
        neuron = tl.program_id(0) * BN + tl.arange(0, BN)
        inside = neuron < FF
        pdl_wait(PDL)
        sums = tl.load(out + neuron, mask=inside, other=0.0)
        for first in tl.static_range(0, R, BM):  # unrolled, so that loads run ahead
            rows = first + tl.arange(0, BM)
            live = tl.load(live_of + rows)
            # read whether live or not, so that it does not wait for `live`; left out before it is multiplied
            x = tl.load(a + rows[:, None].to(tl.int64) * FF + neuron[None, :], mask=inside[None, :], other=0.0)
            x = tl.where((live != 0)[:, None], x.to(tl.float32), 0.0)
            sums += tl.sum(x * x, 0)
        pdl_next(PDL)
        tl.store(out + neuron, sums, mask=inside)


def neuron_squares(a: Tensor, rows: Rows, out: Tensor, *, pdl: bool = False) -> None:
    """Add every live row's squares.

    Args:
        a: `[R, FF]` inner activations in the model's dtype, of all neurons.
        rows: as in `qkv`.
        out: fp32 `[FF]`, added to in place.
        pdl: as in `qkv`.
    """
    count, width = a.shape
    if out.shape != (width,) or not (a.is_contiguous() and out.is_contiguous()):
        raise ValueError(f"activations are {list(a.shape)}, sums {list(out.shape)}: expected [R, FF], [FF], contiguous")
    block = 32
    _neuron_squares_kernel[(triton.cdiv(width, block),)](
        a, rows.live, out, R=count, FF=width, PDL=pdl, BM=BLOCK_ROWS, BN=block, num_warps=1,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
