"""The residual stream of single rows, and the norms that read it, not deferred.

    h' = h + sum of y,  or  h' = h + RMSNorm(y) * w_post,    x' = norm(h') * w (+ b)

For steps whose projections look at their real inputs (TEAL compares |x| with a threshold): x is what the norm gives,
rounded to the model's dtype, where tiles of 16 rows defer their norms and launch nothing (`tile.py`). One program has a
whole row in registers, so it is one pass; LayerNorm's variance is of what is left when the mean is off.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .kept_list import RUN, Listing
from .rows import Rows

try:
    import triton
    import triton.language as tl

    from .kept_list import store_kept
    from .tile import pdl_next, pdl_wait
except ImportError:  # no wheel for this platform: the PyTorch paths run
    triton = None

Reader = tuple[Tensor, Tensor | None, Tensor]  # a norm's weight [D], bias [D] or None, and the x that it makes


def residual_norm_reference(
    hidden: Tensor,
    added: Sequence[Tensor],
    post: Tensor | None,
    norms: Sequence[tuple[Tensor, Tensor | None]],
    eps: float,
    layer_norm: bool,
) -> tuple[Tensor, list[Tensor]]:
    """`(h', x' of each norm)` fp32 from hidden `[N, D]`, what is added `[N, D]` each, and the norms' weights."""
    for y in added:
        hidden = hidden + (y if post is None else F.rms_norm(y, y.shape[-1:], post, eps))
    if layer_norm:
        return hidden, [F.layer_norm(hidden, hidden.shape[-1:], w, b, eps) for w, b in norms]
    return hidden, [F.rms_norm(hidden, hidden.shape[-1:], w, eps) for w, _ in norms]


if triton is not None:

    @triton.jit
    def _limits_of(limits, LISTS: tl.constexpr):  # type: ignore[no-untyped-def]
        found = tl.tuple([])
        for i in tl.static_range(LISTS):
            found = found + (tl.load(limits + i),)
        return found

    @triton.jit
    def _list_row(  # type: ignore[no-untyped-def]
        x, channel, real, limits, entries, runs, row,
        LISTS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, RUN: tl.constexpr,
    ):  # fmt: skip
        for i in tl.static_range(LISTS):
            place = (row * LISTS + i) * CHUNKS
            to = entries + place * CHUNK
            store_kept(x.to(tl.float32), channel, real, limits[i], to, runs + place, CHUNKS, CHUNK, CHUNK, RUN)

    @triton.jit
    def _residual_norm_kernel(  # type: ignore[no-untyped-def]
        hidden, out, y, second_y, post, first_weight, first_bias, x_first, second_weight, second_bias, x_second,
        limits, limits_stride, entries, runs, second_limits, second_limits_stride, second_entries, second_runs,
        live_of, eps,
        D: tl.constexpr, BLOCK_D: tl.constexpr, ADDED: tl.constexpr, POST: tl.constexpr, NORMS: tl.constexpr,
        LISTS: tl.constexpr, SECOND_LISTS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, RUN: tl.constexpr,
        LAYER_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        d = tl.arange(0, BLOCK_D)
        real = d < D
        if POST:
            post_weight = tl.load(post + d, mask=real, other=0.0)
        if NORMS > 0:
            w_first = tl.load(first_weight + d, mask=real, other=0.0)
        pdl_wait(PDL)
        row = tl.program_id(0).to(tl.int64)
        if tl.load(live_of + row) == 0:
            return
        at = row * D + d
        h = tl.load(hidden + at, mask=real, other=0.0)
        drops = _limits_of(limits + row * limits_stride, LISTS)
        second_drops = _limits_of(second_limits + row * second_limits_stride, SECOND_LISTS)
        if ADDED > 0:
            add = tl.load(y + at, mask=real, other=0.0)
            if POST:
                add = add / tl.sqrt(tl.sum(add * add, 0) / D + eps) * post_weight
            h += add
        if ADDED > 1:
            h += tl.load(second_y + at, mask=real, other=0.0)
        pdl_next(PDL)
        if ADDED > 0:
            tl.store(out + at, h, mask=real)
        if NORMS > 0:
            if LAYER_NORM:
                h = tl.where(real, h - tl.sum(h, 0) / D, 0.0)
            h = h / tl.sqrt(tl.sum(h * h, 0) / D + eps)
            x = h * w_first
            if HAS_BIAS:
                x += tl.load(first_bias + d, mask=real, other=0.0)
            x = x.to(x_first.dtype.element_ty)
            tl.store(x_first + at, x, mask=real)
            _list_row(x, d, real, drops, entries, runs, row, LISTS, CHUNKS, CHUNK, RUN)
        if NORMS > 1:
            x = h * tl.load(second_weight + d, mask=real, other=0.0)
            if HAS_BIAS:
                x += tl.load(second_bias + d, mask=real, other=0.0)
            x = x.to(x_second.dtype.element_ty)
            tl.store(x_second + at, x, mask=real)
            _list_row(x, d, real, second_drops, second_entries, second_runs, row, SECOND_LISTS, CHUNKS, CHUNK, RUN)


def residual_norm(
    hidden: Tensor,
    out: Tensor,
    added: Sequence[Tensor],
    rows: Rows,
    count: int,
    eps: float,
    *,
    norms: Sequence[Reader] = (),
    listings: Sequence[Listing] = (),
    post: Tensor | None = None,
    layer_norm: bool = False,
    pdl: bool = False,
) -> None:
    """Add to the residual stream of the first `count` rows, as far as they are live, and norm it.

    Args:
        hidden: `[R, D]` fp32, the stream before.
        out: `[R, D]` fp32, the stream after, overwritten where anything is added; may be `hidden`.
        added: none, one or two `[., D]` fp32, the rows' projections with their bias.
        rows: which rows are live.
        count: N.
        eps: of all norms.
        norms: none, one or two, `x [R, D]` of the model's dtype overwritten; all of them with a bias or none.
        listings: none, or one for each norm: what each row keeps of its x is listed as well, chunks in one group.
        post: weight `[D]` fp32 of an RMSNorm of the one that is added; None: it has none.
        layer_norm: LayerNorm, else RMSNorm.
        pdl: programmatic dependent launch.

    Raises:
        ValueError: more of anything than that.
    """
    if len(added) > 2 or len(norms) > 2 or (post is not None and len(added) != 1):
        raise ValueError(f"{len(added)} projections (post norm: {post is not None}) for {len(norms)} norms were given")
    biases = {bias is not None for _, bias, _ in norms}
    if len(biases) > 1:
        raise ValueError("one norm has a bias and the other has none")
    if listings and len(listings) != len(norms):
        raise ValueError(f"{len(listings)} listings for {len(norms)} norms")
    width, chunk = hidden.shape[1], listings[0].lists.chunk if listings else 1
    block = triton.next_power_of_2(max(width, chunk))
    first = norms[0] if norms else (hidden, None, hidden)
    second = norms[-1] if norms else first
    lists = [(own.limits, own.limits.stride(0), own.lists.entries, own.lists.runs) for own in listings]
    lists += [(hidden, 0, hidden, hidden)] * (2 - len(lists))
    segments = [own.limits.shape[1] for own in listings] + [0, 0]
    _residual_norm_kernel[(count,)](
        hidden, out, *(*added, hidden, hidden)[:2], post, *first, *second, *lists[0], *lists[1],
        rows.live, eps, D=width, BLOCK_D=block, ADDED=len(added), POST=post is not None, NORMS=len(norms),
        LISTS=segments[0], SECOND_LISTS=segments[1], CHUNKS=triton.cdiv(width, chunk), CHUNK=chunk, RUN=RUN,
        LAYER_NORM=layer_norm,
        HAS_BIAS=biases == {True}, PDL=pdl, num_warps=max(1, min(16, block // 256)),
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
