"""The rows of a recurrent head between its products: what waits, what goes in, what comes out.

A *pair* (the full model's states s of one token, the token after it) becomes one entry of the head, at the later one's
position p. Pairs wait in a ring, that of position p at place p mod 64. By row,

    keep_states      the ring takes a verified path's states and the tokens after them
    absorb_rows      the oldest pairs of each sequence become rows, one after the other
    context_rows     rms(s_1), ..., rms(s_T), for the product that makes a context c of them
    enter_rows       rms(e) token_norm, rms(c) context_norm,  e the token's embedding
    leave_rows       h = rms(o) gain of the head's output o: x = h final_norm and its sums, as `tile.py` has it

with rms(x) = x (mean x^2 + eps)^-1/2 in fp32. One pass each; a row is one program, so no row's numbers depend on
another row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .accept import RECORD_BASE, RECORD_TOKENS
from .rows import PATH, Rows
from .tile import x_scale

try:
    import triton
    import triton.language as tl

    from .tile import pdl_next, pdl_wait
except ImportError:
    triton = None

RING = 64  # pairs that wait at most
TAPS_A_LAUNCH = 4
EPS = 1e-5


def keep_states_reference(
    states: Sequence[Tensor], record: Tensor, nodes: Tensor, count: Tensor, width: int, ring: Tensor, waiting: Tensor
) -> None:
    """The same, pair by pair; arguments as `keep_states`."""
    for b, num in enumerate(count.tolist()):
        for j in range(num):
            place = (int(record[b, RECORD_BASE]) + 1 + j) % RING
            for tap, own in enumerate(states):
                ring[b, place, tap] = own[b * width + int(nodes[b, j])]
            waiting[b, place] = max(0, int(record[b, RECORD_TOKENS + j]))


def absorb_rows_reference(
    active: Tensor, base: Tensor, lengths: Tensor, waiting: Tensor, width: int
) -> tuple[Rows, Tensor, Tensor, Tensor]:
    """Rows, their tokens, each sequence's last row (-1: none) and its new length; arguments as `absorb_rows`."""
    rows = Rows.empty(-(-len(base) * width // 16) * 16, base.device)
    ids, last, after = torch.zeros_like(rows.live), torch.full_like(base, -1), lengths.clone()
    for b in range(len(base)):
        start = int(lengths[b])
        num = min(width, int(base[b]) + 1 - start) if active[b] else 0
        for j in range(num):
            r = last[b] = b * width + j
            rows.live[r], rows.sequence[r], rows.base[r] = 1, b, start
            rows.position[r] = rows.slot[r] = start + j
            rows.path[r, : j + 1] = torch.arange(j + 1)
            ids[r] = waiting[b, (start + j) % RING]
        after[b] += num
    return rows, ids, last, after


def context_rows_reference(ring: Tensor, rows: Rows) -> Tensor:
    """fp32 `[R, T D]`; rows that are not live are zero."""
    states = ring[rows.sequence.long(), (rows.position % RING).long()]
    return (F.rms_norm(states, states.shape[-1:], eps=EPS) * rows.live.view(-1, 1, 1)).flatten(1)


def enter_rows_reference(
    ids: Tensor, places: Tensor, embedding: Tensor, scale: float, token_norm: Tensor, contexts: Tensor,
    context_norm: Tensor, rows: Rows,
) -> Tensor:  # fmt: skip
    """fp32 `[R, 2 D]`, not rounded; rows that are not live are zero."""
    e = embedding[ids.long()].float() * scale
    c = contexts[rows.sequence.long(), places.long()]
    both = [F.rms_norm(t, t.shape[-1:], w.float(), EPS) for t, w in ((e, token_norm), (c, context_norm))]
    return torch.cat(both, 1) * rows.live.unsqueeze(1)


def leave_rows_reference(out: Tensor, gain: Tensor, norm_weight: Tensor) -> tuple[Tensor, Tensor]:
    """`(x before rounding and scaling, stats [R, 2, 1])` of outputs `[R, D]`, fp32."""
    h = F.rms_norm(out, out.shape[-1:], gain.float(), EPS)
    return h * norm_weight, torch.stack([(h * h).sum(-1), h.sum(-1)], 1).unsqueeze(2)


if triton is not None:

    @triton.jit
    def _keep_states_kernel(  # type: ignore[no-untyped-def]
        states_0, states_1, states_2, states_3, record, nodes, count, ring, waiting, record_row,
        WIDTH: tl.constexpr, TAPS: tl.constexpr, FIRST_TAP: tl.constexpr, D: tl.constexpr, PATH: tl.constexpr,
        RING: tl.constexpr, BASE: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        pdl_wait(PDL)
        pdl_next(PDL)
        b = tl.program_id(0)
        j = tl.program_id(1)
        tap = tl.program_id(2)
        if j >= tl.load(count + b):
            return
        row = b * WIDTH + tl.load(nodes + b * PATH + j)
        at = b * RING + (tl.load(record + b * record_row + BASE) + 1 + j) % RING
        d = tl.arange(0, BLOCK_D)
        states = states_0
        if tap == 1:
            states = states_1
        if tap == 2:
            states = states_2
        if tap == 3:
            states = states_3
        state = tl.load(states + row.to(tl.int64) * D + d, mask=d < D, other=0.0)
        tl.store(ring + (at.to(tl.int64) * TAPS + FIRST_TAP + tap) * D + d, state, mask=d < D)
        if tap == 0:
            tl.store(waiting + at, tl.maximum(tl.load(record + b * record_row + TOKENS + j), 0))

    @triton.jit
    def _absorb_rows_kernel(  # type: ignore[no-untyped-def]
        active_of, base_of, lengths, waiting,
        live_of, sequence_of, position_of, slot_of, base_row, path_of, ids, last_row,
        root_live, root_sequence, root_position,
        WIDTH: tl.constexpr, PATH: tl.constexpr, RING: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        pdl_wait(PDL)
        pdl_next(PDL)
        b = tl.program_id(0)
        start = tl.load(lengths + b)
        active = tl.load(active_of + b) != 0
        num = tl.maximum(tl.minimum(tl.load(base_of + b) + 1 - start, WIDTH), 0)
        num = tl.where(active, num, 0)
        j = tl.arange(0, WIDTH)
        i = tl.arange(0, PATH)
        row = b * WIDTH + j
        live = j < num
        at = start + j
        tl.store(live_of + row, live.to(tl.int32))
        tl.store(sequence_of + row, b + j * 0)
        tl.store(position_of + row, at)
        tl.store(slot_of + row, at)
        tl.store(base_row + row, start + j * 0)
        path = tl.where(i[None, :] <= j[:, None], i[None, :], 0)
        tl.store(path_of + row[:, None] * PATH + i[None, :], path)
        tl.store(ids + row, tl.load(waiting + b * RING + at % RING, mask=live, other=0))
        tl.store(last_row + b, tl.where(num > 0, b * WIDTH + num - 1, -1))
        tl.store(root_live + b, active.to(tl.int32))
        tl.store(root_sequence + b, b)
        tl.store(root_position + b, start + num - 1)
        tl.store(lengths + b, start + num)

    @triton.jit
    def _context_rows_kernel(  # type: ignore[no-untyped-def]
        ring, live_of, sequence_of, position_of, out, eps,
        TAPS: tl.constexpr, D: tl.constexpr, RING: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        pdl_wait(PDL)
        pdl_next(PDL)
        row = tl.program_id(0).to(tl.int64)
        tap = tl.program_id(1)
        if tl.load(live_of + row) == 0:
            return
        at = tl.load(sequence_of + row) * RING + tl.load(position_of + row) % RING
        d = tl.arange(0, BLOCK_D)
        state = tl.load(ring + (at.to(tl.int64) * TAPS + tap) * D + d, mask=d < D, other=0.0)
        state = state / tl.sqrt(tl.sum(state * state, 0) / D + eps)
        tl.store(out + (row * TAPS + tap) * D + d, state.to(out.dtype.element_ty), mask=d < D)

    @triton.jit
    def _enter_rows_kernel(  # type: ignore[no-untyped-def]
        ids, places, embedding, token_norm, contexts, context_norm, live_of, sequence_of, out,
        scale, contexts_sequence, eps,
        D: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        pdl_wait(PDL)
        pdl_next(PDL)
        row = tl.program_id(0).to(tl.int64)
        if tl.load(live_of + row) == 0:
            return
        d = tl.arange(0, BLOCK_D)
        dtype = out.dtype.element_ty
        e = tl.load(embedding + tl.load(ids + row).to(tl.int64) * D + d, mask=d < D, other=0.0).to(tl.float32) * scale
        at = tl.load(sequence_of + row).to(tl.int64) * contexts_sequence + tl.load(places + row) * D
        c = tl.load(contexts + at + d, mask=d < D, other=0.0)
        e = e / tl.sqrt(tl.sum(e * e, 0) / D + eps) * tl.load(token_norm + d, mask=d < D, other=0.0)
        c = c / tl.sqrt(tl.sum(c * c, 0) / D + eps) * tl.load(context_norm + d, mask=d < D, other=0.0)
        tl.store(out + row * 2 * D + d, e.to(dtype), mask=d < D)
        tl.store(out + row * 2 * D + D + d, c.to(dtype), mask=d < D)

    @triton.jit
    def _leave_rows_kernel(  # type: ignore[no-untyped-def]
        hidden, gain, norm_weight, live_of, sequence_of, slot_of, base_of, last_row, outputs, x, stats,
        outputs_sequence, eps,
        D: tl.constexpr, LAST: tl.constexpr, X_SCALE: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        pdl_wait(PDL)
        pdl_next(PDL)
        to = tl.program_id(0).to(tl.int64)
        if LAST:
            row = tl.load(last_row + to).to(tl.int64)
            kept = outputs + to * outputs_sequence
            if row < 0:
                return
        else:
            row = to
            if tl.load(live_of + row) == 0:
                return
            place = tl.load(slot_of + row) - tl.load(base_of + row)
            kept = outputs + tl.load(sequence_of + row).to(tl.int64) * outputs_sequence + place * D
        d = tl.arange(0, BLOCK_D)
        out = tl.load(hidden + row * D + d, mask=d < D, other=0.0)
        tl.store(kept + d, out, mask=d < D)
        h = out / tl.sqrt(tl.sum(out * out, 0) / D + eps) * tl.load(gain + d, mask=d < D, other=0.0)
        w = tl.load(norm_weight + d, mask=d < D, other=0.0)
        tl.store(x + to * D + d, (h * w * X_SCALE).to(x.dtype.element_ty), mask=d < D)
        tl.store(stats + to * 2, tl.sum(h * h, 0))
        tl.store(stats + to * 2 + 1, tl.sum(h, 0))


def _settings(width: int) -> dict[str, int]:
    """A row as one vector, and warps."""
    block = triton.next_power_of_2(width)
    return {"BLOCK_D": block, "num_warps": 8 if block > 2048 else 4 if block > 256 else 1}


def _launch(pdl: bool) -> dict[str, bool]:
    return {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}


def keep_states(
    states: Sequence[Tensor],
    record: Tensor,
    nodes: Tensor,
    count: Tensor,
    width: int,
    ring: Tensor,
    waiting: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Let the states of an accepted path wait, with the tokens after them.

    Args:
        states: of each tap the full model's, fp32 `[R, D]`, by row of the verification: b * width + node.
        record: int32 `[B, 96]` of `accept`: the root's position, and the tokens after each node of the path.
        nodes, count: int32 `[B, 16]` and `[B]` of `accept`: the accepted path with the root, and its length; 0 for a
            sequence that took no part.
        width: rows a sequence has there.
        ring: fp32 `[B, 64, T, D]`, waiting int32 `[B, 64]`: written where these pairs' positions belong.
        pdl: programmatic dependent launch.

    Raises:
        ValueError: shapes that do not fit.
    """
    batch, places, taps, size = ring.shape
    if places != RING or waiting.shape != (batch, RING) or not ring.is_contiguous():
        raise ValueError(f"ring {tuple(ring.shape)} and tokens {tuple(waiting.shape)}, expected {RING} places of each")
    if len(states) != taps or any(t.shape[1] != size or not t.is_contiguous() for t in states):
        raise ValueError(f"states {[tuple(t.shape) for t in states]}, expected {taps} of width {size} without gaps")
    if nodes.shape != (batch, PATH) or any(len(t) < batch * width or t.dtype != torch.float32 for t in states):
        raise ValueError(f"nodes {tuple(nodes.shape)} of width {width} do not fit {batch} sequences of fp32 states")
    for first in range(0, taps, TAPS_A_LAUNCH):
        some = list(states[first : first + TAPS_A_LAUNCH])
        _keep_states_kernel[(batch, min(width, PATH), len(some))](
            *some, *some[:1] * (TAPS_A_LAUNCH - len(some)), record, nodes, count, ring, waiting, record.stride(0),
            WIDTH=width, TAPS=taps, FIRST_TAP=first, D=size, PATH=PATH, RING=RING, BASE=RECORD_BASE,
            TOKENS=RECORD_TOKENS, **_settings(size), **_launch(pdl),
        )  # fmt: skip


def absorb_rows(
    active: Tensor,
    base: Tensor,
    lengths: Tensor,
    waiting: Tensor,
    width: int,
    rows: Rows,
    ids: Tensor,
    last_row: Tensor,
    root_rows: Rows,
    *,
    pdl: bool = False,
) -> None:
    """Make rows of the `width` oldest waiting pairs of each active sequence, and count them as taken in.

    Args:
        active: int32 `[B]`.
        base: int32 `[B]`, the pending token's position: pairs wait for the positions lengths .. base.
        lengths: int32 `[B]`, entries that the head has; advanced.
        waiting: int32 `[B, 64]`, see `keep_states`.
        width: 1, 2, 4, 8 or 16.
        rows: overwritten: pair j of sequence b is row b * width + j, which sees what is before it.
        ids: int32 `[R]`, overwritten: the rows' tokens.
        last_row: int32 `[B]`, overwritten: each sequence's last row, -1 where nothing waits.
        root_rows: row b gets the place of sequence b's newest entry: live, sequence, position.
        pdl: programmatic dependent launch.
    """
    batch = len(base)
    if width not in (1, 2, 4, 8, 16) or len(rows) < batch * width or len(root_rows) < batch:
        raise ValueError(f"width {width} for {batch} sequences does not go into {len(rows)} and {len(root_rows)} rows")
    # one warp: what it writes to `lengths` is not read by another one before
    _absorb_rows_kernel[(batch,)](
        active, base, lengths, waiting,
        rows.live, rows.sequence, rows.position, rows.slot, rows.base, rows.path, ids, last_row,
        root_rows.live, root_rows.sequence, root_rows.position,
        WIDTH=width, PATH=PATH, RING=RING, num_warps=1, **_launch(pdl),
    )  # fmt: skip


def context_rows(ring: Tensor, rows: Rows, out: Tensor, *, pdl: bool = False) -> None:
    """The normed states of each live row's pair.

    Args:
        ring: fp32 `[B, 64, T, D]`.
        rows: whose `position` says which pair.
        out: `[R, T D]` in the model's dtype, overwritten.
        pdl: programmatic dependent launch.
    """
    _, _, taps, size = ring.shape
    if out.shape != (len(rows), taps * size) or not out.is_contiguous():
        raise ValueError(f"out is {tuple(out.shape)}, expected {(len(rows), taps * size)}")
    _context_rows_kernel[(len(rows), taps)](
        ring, rows.live, rows.sequence, rows.position, out, EPS, TAPS=taps, D=size, RING=RING, **_settings(size),
        **_launch(pdl),
    )  # fmt: skip


def enter_rows(
    ids: Tensor,
    places: Tensor,
    embedding: Tensor,
    scale: float,
    token_norm: Tensor,
    contexts: Tensor,
    context_norm: Tensor,
    rows: Rows,
    out: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """What goes into the head's first product, of each live row.

    Args:
        ids: int32 `[R]`, tokens.
        places: int32 `[R]`, where among its sequence's contexts a row's context stands.
        embedding: `[V, D]`; scale: Gemma's factor, 1 elsewhere.
        token_norm, context_norm: fp32 `[D]`.
        contexts: fp32 `[B, N, D]`.
        rows: which are live, and their sequences.
        out: `[R, 2 D]` in the model's dtype, overwritten.
        pdl: programmatic dependent launch.
    """
    size = embedding.shape[1]
    if out.shape != (len(rows), 2 * size) or contexts.shape[2] != size or contexts.stride()[1:] != (size, 1):
        raise ValueError(f"out {tuple(out.shape)}, contexts {tuple(contexts.shape)}: expected width {size}")
    _enter_rows_kernel[(len(rows),)](
        ids, places, embedding, token_norm, contexts, context_norm, rows.live, rows.sequence, out,
        scale, contexts.stride(0), EPS, D=size, **_settings(size), **_launch(pdl),
    )  # fmt: skip


def leave_rows(
    hidden: Tensor,
    gain: Tensor,
    norm_weight: Tensor,
    rows: Rows,
    last_row: Tensor | None,
    outputs: Tensor,
    x: Tensor,
    stats: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Remember the head's outputs, and make what the LM head reads.

    Args:
        hidden: fp32 `[R, D]`, the head's outputs.
        gain: fp32 `[D]`, the head's own norm; norm_weight: fp32 `[D]`, the model's final one.
        rows: which are live and, as slot - base, their places.
        last_row: None for all rows; int32 `[B]` for one row a sequence, its root's (-1: none).
        outputs: fp32 `[B, N, D]`: written at the rows' places, place 0 with `last_row`.
        x: `[R, D]` in the model's dtype, overwritten, by row, or by sequence with `last_row`.
        stats: fp32 `[R, 2, 1]`, likewise.
        pdl: programmatic dependent launch.
    """
    size = hidden.shape[1]
    num = len(rows) if last_row is None else len(last_row)
    if x.shape[0] < num or x.shape[1] != size or stats.shape != (x.shape[0], 2, 1):
        raise ValueError(f"x {tuple(x.shape)}, stats {tuple(stats.shape)}: expected {num} rows of {size}, one tile")
    if outputs.stride()[1:] != (size, 1):
        raise ValueError(f"outputs are {tuple(outputs.shape)}, expected width {size} without gaps")
    _leave_rows_kernel[(num,)](
        hidden, gain, norm_weight, rows.live, rows.sequence, rows.slot, rows.base, last_row, outputs, x, stats,
        outputs.stride(0), EPS, D=size, LAST=last_row is not None, X_SCALE=x_scale(x.dtype), **_settings(size),
        **_launch(pdl),
    )  # fmt: skip
