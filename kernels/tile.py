"""The product of a decode step: 16 rows by some columns of a weight, always in the same order.

    y[r, n] = sum_k x[r, k] w[n, k]

A row's result depends on its own x and on nothing else: every launch multiplies tiles of exactly 16 rows with one
instruction, in one order of k, whatever number of the rows is real (design rule 2). Rows that are not live are
multiplied like the others, and nobody stores what comes of it. With SPLIT above 1 the k of a tile is dealt to SPLIT
partial products in turn, BK at a time, which the warps of a program work on side by side; they are added at the end by
a fixed tree. Where all of k is dealt out at once, a part may have two pieces, of BK and of TAIL.

A decode step is bound by latency: a chain of 36 dependent products (K = 576) takes half a microsecond, so dealing k
out pays although the arithmetic is negligible, and what a program can do before it waits for the kernel in front costs
next to nothing (`pdl_wait`).

Norms are deferred to the consumer. A producer of the residual stream h stores x = h * norm_weight, unnormalised, and
per tile of columns the sum (and for LayerNorm the plain sum) of h, so that

    RMSNorm(h) W^T   = r (x W^T),                       r = (sum h^2 / D + eps)^-1/2
    LayerNorm(h) W^T = r (x W^T - m u) + c,             m = sum h / D,  r = (sum h^2 / D - m^2 + eps)^-1/2

with u = W norm_weight and c = W norm_bias made once. So no step waits for a whole row before it can multiply.

These are device functions: the operations that use them have launchers, references and tests.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the PyTorch paths run
    triton = None

BLOCK_ROWS = 16
FLOAT16_SCALE = 2.0**-4  # x of fp16 models is stored so much smaller: h * norm_weight outgrows fp16 in some models


def x_scale(dtype: torch.dtype) -> float:
    """Factor (a power of two) on stored x, for `row_scale` to take out again."""
    return FLOAT16_SCALE if dtype == torch.float16 else 1.0


ASK_UP_TO = 5 << 20  # bytes


def asked(later: Tensor | None, pdl: bool, grid: tuple[int, ...]) -> tuple[Tensor | None, int, int]:
    """The arguments of `ask_later` for weights that a later kernel reads: they, their bytes, and a program's share of
    them. Nothing where there is no such instruction (`pdl` says that there is), and for larger ones: they keep the
    memory busy by themselves."""
    if later is None or not pdl or later.nbytes > ASK_UP_TO:
        return None, 0, 0
    return later, later.nbytes // 16 * 16, -(-later.nbytes // (16 * math.prod(grid))) * 16


def beginning(weight: Tensor) -> Tensor:
    """As many of its rows as may be asked for."""
    return weight[: max(1, ASK_UP_TO // (weight.shape[1] * weight.itemsize))]


def precision(dtype: torch.dtype) -> str:
    """`tl.dot`'s input_precision: fp32 models multiply in fp32."""
    return "ieee" if dtype == torch.float32 else "tf32"


if triton is not None:

    @triton.jit
    def pdl_wait(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
        """Wait until all kernels before this one are done and their stores visible."""
        if PDL:
            tl.extra.cuda.gdc_wait()

    @triton.jit
    def pdl_next(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
        """Let the next kernel start once all programs are here. It waits before it touches anything that this one
        stores; what kernels before this one stored is there, if this one has waited for them. So: after the wait."""
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()

    @triton.jit
    def bring_near(at, size):  # type: ignore[no-untyped-def]
        """Ask for `size` bytes from address `at` on, both multiples of 16, to be brought into L2. A hint: nothing waits
        for it, and no number depends on it."""
        tl.inline_asm_elementwise(  # one thread of the program asks
            """
            {
                .reg .pred asks;
                .reg .u32 thread;
                mov.u32 thread, %tid.x;
                setp.eq.u32 asks, thread, 0;
                setp.gt.and.s32 asks, $2, 0, asks;
                @asks cp.async.bulk.prefetch.L2.global [$1], $2;
                mov.u32 $0, 0;
            }
            """,
            "=r,l,r",
            [at, size],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def ask_later(later, later_bytes, share):  # type: ignore[no-untyped-def]
        """Ask for this program's share of what a later kernel reads."""
        if later is not None:
            program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
            start = tl.minimum(program * share, later_bytes)
            bring_near(later.to(tl.int64) + start, tl.minimum(share, later_bytes - start))

    @triton.jit
    def _dealt(FROM: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr):  # type: ignore[no-untyped-def]
        """Places in a share, from FROM on, of BK k for each of SPLIT parts: `[SPLIT, BK]`."""
        return FROM + tl.arange(0, SPLIT)[:, None] * BK + tl.arange(0, BK)[None, :]

    @triton.jit
    def _weights(  # type: ignore[no-untyped-def]
        w, cols, K: tl.constexpr, SHARE: tl.constexpr, first, FROM: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr
    ):
        at = _dealt(FROM, BK, SPLIT)
        pointers = (w + first + cols.to(tl.int64) * K)[None, None, :] + at[:, :, None]
        if FROM + SPLIT * BK <= SHARE and K % SHARE == 0:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=((at < SHARE) & (first + at < K))[:, :, None], other=0.0)

    @triton.jit
    def _inputs(  # type: ignore[no-untyped-def]
        x, rows, live, K: tl.constexpr, SHARE: tl.constexpr, first, FROM: tl.constexpr, BK: tl.constexpr,
        SPLIT: tl.constexpr,
    ):  # fmt: skip
        at = _dealt(FROM, BK, SPLIT)
        pointers = (x + first + rows.to(tl.int64) * K)[None, :, None] + at[:, None, :]
        if FROM + SPLIT * BK <= SHARE and K % SHARE == 0:
            if live is None:
                return tl.load(pointers)
            else:
                return tl.load(pointers, mask=(live != 0)[None, :, None], other=0.0)
        else:
            real = ((at < SHARE) & (first + at < K))[:, None, :]
            if live is not None:
                real &= (live != 0)[None, :, None]
            return tl.load(pointers, mask=real, other=0.0)

    @triton.jit
    def weights_ahead(  # type: ignore[no-untyped-def]
        w, cols, K: tl.constexpr, SHARE: tl.constexpr, first, BK: tl.constexpr, SPLIT: tl.constexpr,
        TAIL: tl.constexpr = 0, HOLD: tl.constexpr = 0,
    ):  # fmt: skip
        """The weights of a product that deals all k out at once (SPLIT * (BK + TAIL) >= SHARE, SPLIT > 1): nothing that
        another kernel writes, so they are asked for before the wait. In two pieces, `[SPLIT, BK, BN]` and
        `[SPLIT, TAIL, BN]`, for blocks are powers of two and 576 is 4 * (128 + 16); with TAIL = 0 the first one twice.
        Of other products the last HOLD of k, `[1, HOLD, BN]`, which takes SPLIT = 1; 0 with HOLD = 0."""
        if SPLIT > 1 and SPLIT * (BK + TAIL) >= SHARE:
            piece = _weights(w, cols, K, SHARE, first, 0, BK, SPLIT)
            if TAIL > 0:
                return piece, _weights(w, cols, K, SHARE, first, SPLIT * BK, TAIL, SPLIT)
            else:
                return piece, piece
        elif HOLD > 0:
            tl.static_assert(SPLIT == 1)
            return _weights(w, cols, K, SHARE, first, SHARE - HOLD, HOLD, 1)
        else:
            return 0

    @triton.jit
    def _inputs_of(  # type: ignore[no-untyped-def]
        x, rows, live, K: tl.constexpr, SHARE: tl.constexpr, first, BK: tl.constexpr, SPLIT: tl.constexpr,
        TAIL: tl.constexpr,
    ):  # fmt: skip
        """x for `weights_ahead`, `[SPLIT, 16, BK]` and `[SPLIT, 16, TAIL]`."""
        piece = _inputs(x, rows, live, K, SHARE, first, 0, BK, SPLIT)
        if TAIL > 0:
            return piece, _inputs(x, rows, live, K, SHARE, first, SPLIT * BK, TAIL, SPLIT)
        else:
            return piece, piece

    @triton.jit
    def _product_of(inputs, ahead, TAIL: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
        """fp32 [16, BN] of `_inputs_of` and `weights_ahead`."""
        parts = tl.dot(inputs[0], ahead[0], input_precision=PRECISION)
        if TAIL > 0:
            parts = tl.dot(inputs[1], ahead[1], parts, input_precision=PRECISION)
        return tl.sum(parts, 0)

    @triton.jit
    def rows_product(  # type: ignore[no-untyped-def]
        x, w, ahead, rows, cols, K: tl.constexpr, SHARE: tl.constexpr, first, BK: tl.constexpr, SPLIT: tl.constexpr,
        PRECISION: tl.constexpr, TAIL: tl.constexpr = 0, HOLD: tl.constexpr = 0, live=None,
    ):  # fmt: skip
        """fp32 [16, BN]: sum over k in first .. first + SHARE - 1 of x[rows, k] w[cols, k], both `[., K]`; all of them
        with SHARE = K, first = 0. `ahead` is `weights_ahead` of the same arguments. All cols must be the weight's:
        callers name another one in place of one that is not there, and forget what comes of it. k is compared with
        nothing where blocks end as it does. With `live` [16], x of other rows is left alone where all k is dealt out at
        once; in a loop a predicate costs more than it saves (docs/kernels.md)."""
        LOOPED: tl.constexpr = SHARE - HOLD
        WHOLE: tl.constexpr = LOOPED % (SPLIT * BK) == 0 and K % SHARE == 0
        k = tl.arange(0, BK)
        x_rows = x + first + rows.to(tl.int64) * K
        w_rows = w + first + cols.to(tl.int64) * K
        if SPLIT == 1:  # the warps share the columns
            if HOLD > 0:
                held = _inputs(x, rows, None, K, SHARE, first, LOOPED, HOLD, 1)
            total = tl.zeros([rows.shape[0], cols.shape[0]], tl.float32)
            for start in range(0, LOOPED, BK):
                at = start + k
                if WHOLE:
                    a = tl.load(x_rows[:, None] + at[None, :])
                    b = tl.load(w_rows[None, :] + at[:, None])
                else:
                    real = (at < LOOPED) & (first + at < K)
                    a = tl.load(x_rows[:, None] + at[None, :], mask=real[None, :], other=0.0)
                    b = tl.load(w_rows[None, :] + at[:, None], mask=real[:, None], other=0.0)
                total = tl.dot(a, b, total, input_precision=PRECISION)
            if HOLD > 0:
                held, ahead = tl.reshape(held, [rows.shape[0], HOLD]), tl.reshape(ahead, [HOLD, cols.shape[0]])
                total = tl.dot(held, ahead, total, input_precision=PRECISION)
            return total
        else:  # each warp has a part of k
            part = tl.arange(0, SPLIT)
            if SPLIT * (BK + TAIL) >= SHARE:
                return _product_of(_inputs_of(x, rows, live, K, SHARE, first, BK, SPLIT, TAIL), ahead, TAIL, PRECISION)
            else:
                parts = tl.zeros([SPLIT, rows.shape[0], cols.shape[0]], tl.float32)
                for start in range(0, LOOPED, SPLIT * BK):
                    at = start + part[:, None] * BK + k[None, :]
                    if WHOLE:
                        a = tl.load(x_rows[None, :, None] + at[:, None, :])
                        b = tl.load(w_rows[None, None, :] + at[:, :, None])
                    else:
                        real = (at < LOOPED) & (first + at < K)
                        a = tl.load(x_rows[None, :, None] + at[:, None, :], mask=real[:, None, :], other=0.0)
                        b = tl.load(w_rows[None, None, :] + at[:, :, None], mask=real[:, :, None], other=0.0)
                    parts = tl.dot(a, b, parts, input_precision=PRECISION)
                return tl.sum(parts, 0)

    @triton.jit
    def load_stats(stats, rows, NUM_STATS: tl.constexpr, BLOCK_S: tl.constexpr, LAYER_NORM: tl.constexpr):  # type: ignore[no-untyped-def]
        """Parts of the sums of h^2, and of h for LayerNorm (else the same again): `[16, BLOCK_S]` each of rows, from
        stats [R, 2, NUM_STATS]. Asked for before a product and used after it, as all that its end needs: what is
        computed before the product's own loads are issued would hold them up."""
        part = tl.arange(0, BLOCK_S)
        mask = (part < NUM_STATS)[None, :]
        pointers = stats + rows[:, None].to(tl.int64) * (2 * NUM_STATS) + part[None, :]
        squares = tl.load(pointers, mask=mask, other=0.0)
        if LAYER_NORM:
            return squares, tl.load(pointers + NUM_STATS, mask=mask, other=0.0)
        else:
            return squares, squares

    @triton.jit
    def row_scale(squares, sums, D: tl.constexpr, eps, X_SCALE: tl.constexpr, LAYER_NORM: tl.constexpr):  # type: ignore[no-untyped-def]
        """(r / X_SCALE, m) fp32 [16] of the rows' `load_stats`."""
        square = tl.sum(squares, 1) / D
        mean = tl.zeros_like(square)
        if LAYER_NORM:
            mean = tl.sum(sums, 1) / D
            square -= mean * mean
        return tl.rsqrt(square + eps) * (1.0 / X_SCALE), mean

    @triton.jit
    def normed_rows_product(  # type: ignore[no-untyped-def]
        x, stats, w, ahead, rows, cols, eps,
        D: tl.constexpr, NUM_STATS: tl.constexpr, BLOCK_S: tl.constexpr, LAYER_NORM: tl.constexpr,
        X_SCALE: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, TAIL: tl.constexpr = 0,
        HOLD: tl.constexpr = 0,
    ):  # fmt: skip
        """`rows_product` of all k and the `row_scale` that belongs to it: (y, r / X_SCALE, m)."""
        squares, sums = load_stats(stats, rows, NUM_STATS, BLOCK_S, LAYER_NORM)
        if SPLIT > 1 and SPLIT * (BK + TAIL) >= D:  # the sums are added up while x is on its way
            inputs = _inputs_of(x, rows, None, D, D, 0, BK, SPLIT, TAIL)
            scale, mean = row_scale(squares, sums, D, eps, X_SCALE, LAYER_NORM)
            y = _product_of(inputs, ahead, TAIL, PRECISION)
        else:
            y = rows_product(x, w, ahead, rows, cols, D, D, 0, BK, SPLIT, PRECISION, TAIL, HOLD)
            scale, mean = row_scale(squares, sums, D, eps, X_SCALE, LAYER_NORM)
        return y, scale, mean
