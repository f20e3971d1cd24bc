"""The step's start: from draft trees to rows, and their embeddings.

`lay_rows` says which row is which node (`rows.Rows`); `embed_rows` gives each row

    h = embedding[token] * scale,    x = h * norm_weight * x_scale,    stats = (sum h^2, sum h)

the residual stream with what the first layer's deferred norm needs (see `tile.py`). One program a sequence, one a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import PATH, Rows
from .tile import x_scale

try:
    import triton
    import triton.language as tl

    from .tile import pdl_next, pdl_wait
except ImportError:
    triton = None


def lay_rows_reference(
    tokens: Tensor, depths: Tensor, paths: Tensor, count: Tensor, base: Tensor, width: int
) -> tuple[Rows, Tensor]:
    """The same, row by row: rows and their tokens."""
    num_sequences = len(tokens)
    rows = Rows.empty(-(-num_sequences * width // 16) * 16, tokens.device)
    ids = torch.zeros_like(rows.live)
    for b in range(num_sequences):
        for node in range(min(width, int(count[b]))):
            r = b * width + node
            rows.live[r], rows.sequence[r], rows.base[r] = 1, b, base[b]
            rows.position[r], rows.slot[r] = base[b] + depths[b, node], base[b] + node
            rows.path[r], ids[r] = paths[b, node], tokens[b, node]
    return rows, ids


def embed_rows_reference(
    ids: Tensor, live: Tensor, embedding: Tensor, scale: float, norms: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """`(h, x of each norm before rounding and scaling)` fp32; rows that are not live are zero."""
    h = embedding[ids.long()].float() * scale * live.unsqueeze(1)
    return (h, *(h * norm for norm in norms))


if triton is not None:

    @triton.jit(do_not_specialize=["num_sequences"])
    def _lay_rows_kernel(  # type: ignore[no-untyped-def]
        tokens, depths, paths, count, base, num_sequences,
        live_of, sequence_of, position_of, slot_of, base_of, path_of, ids,
        WIDTH: tl.constexpr, PATH: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        pdl_wait(PDL)
        pdl_next(PDL)
        rows = tl.program_id(0) * 16 + tl.arange(0, 16)
        b = rows // WIDTH
        node = rows % WIDTH
        real = b < num_sequences
        live = real & (node < tl.load(count + b, mask=real, other=0))
        start = tl.load(base + b, mask=live, other=0)
        tl.store(live_of + rows, live.to(tl.int32))
        tl.store(sequence_of + rows, tl.where(live, b, 0))
        tl.store(position_of + rows, start + tl.load(depths + b * PATH + node, mask=live, other=0))
        tl.store(slot_of + rows, start + tl.where(live, node, 0))
        tl.store(base_of + rows, start)
        tl.store(ids + rows, tl.load(tokens + b * PATH + node, mask=live, other=0))
        i = tl.arange(0, PATH)
        at = (b * PATH + node)[:, None] * PATH + i[None, :]
        tl.store(path_of + rows[:, None] * PATH + i[None, :], tl.load(paths + at, mask=live[:, None], other=0))

    @triton.jit
    def _embed_rows_kernel(  # type: ignore[no-untyped-def]
        ids, live_of, embedding, hidden, first_weight, x_first, second_weight, x_second, stats, scale,
        D: tl.constexpr, BLOCK_D: tl.constexpr, SECOND: tl.constexpr, X_SCALE: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        pdl_wait(PDL)
        pdl_next(PDL)
        row = tl.program_id(0).to(tl.int64)
        if tl.load(live_of + row) == 0:
            return
        d = tl.arange(0, BLOCK_D)
        token = tl.load(ids + row).to(tl.int64)
        h = tl.load(embedding + token * D + d, mask=d < D, other=0.0).to(tl.float32) * scale
        tl.store(hidden + row * D + d, h, mask=d < D)
        w = tl.load(first_weight + d, mask=d < D, other=0.0)
        tl.store(x_first + row * D + d, (h * w * X_SCALE).to(x_first.dtype.element_ty), mask=d < D)
        if SECOND:
            w = tl.load(second_weight + d, mask=d < D, other=0.0)
            tl.store(x_second + row * D + d, (h * w * X_SCALE).to(x_second.dtype.element_ty), mask=d < D)
        tl.store(stats + row * 2, tl.sum(h * h, 0))
        tl.store(stats + row * 2 + 1, tl.sum(h, 0))


def lay_rows(
    tokens: Tensor,
    depths: Tensor,
    paths: Tensor,
    count: Tensor,
    base: Tensor,
    rows: Rows,
    ids: Tensor,
    width: int,
    *,
    pdl: bool = False,
) -> None:
    """Make rows of the first `width` nodes of each tree.

    Args:
        tokens, depths: int32 `[B, 16]`, by node.
        paths: int32 `[B, 16, 16]`, `paths[b, i, d]` the node at depth d on the path to node i.
        count: int32 `[B]`, nodes of each tree; 0 for none.
        base: int32 `[B]`, position of each root.
        rows: overwritten; at least B * width of them. Node i of sequence b is row b * width + i.
        ids: int32 `[R]`, the rows' tokens, overwritten.
        width: 1, 2, 4, 8 or 16.
    """
    if width not in (1, 2, 4, 8, 16) or len(rows) < len(tokens) * width:
        raise ValueError(f"width {width} for {len(tokens)} sequences does not go into {len(rows)} rows")
    _lay_rows_kernel[(len(rows) // 16,)](
        tokens, depths, paths, count, base, len(tokens),
        rows.live, rows.sequence, rows.position, rows.slot, rows.base, rows.path, ids,
        WIDTH=width, PATH=PATH, PDL=pdl, num_warps=1, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def embed_rows(
    ids: Tensor,
    rows: Rows,
    embedding: Tensor,
    scale: float,
    hidden: Tensor,
    next_norms: tuple[tuple[Tensor, Tensor], ...],
    stats: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Start every live row's residual stream.

    Args:
        ids: int32 `[R]`.
        rows: which are live.
        embedding: `[V, D]`.
        scale: Gemma's factor, 1 elsewhere.
        hidden: `[R, D]` fp32, overwritten.
        next_norms, stats: as in `residual_linear`, stats `[R, 2, 1]`; one or two norms.
    """
    if stats.shape[2] != 1 or not 1 <= len(next_norms) <= 2:
        raise ValueError(f"stats have {stats.shape[2]} tiles for {len(next_norms)} norms, expected 1 for 1 or 2")
    width = embedding.shape[1]
    _embed_rows_kernel[(len(rows),)](
        ids, rows.live, embedding, hidden, *next_norms[0], *next_norms[-1], stats, scale,
        D=width, BLOCK_D=triton.next_power_of_2(width), SECOND=len(next_norms) == 2,
        X_SCALE=x_scale(next_norms[0][1].dtype), PDL=pdl, num_warps=4, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
