"""The LM head of a decode step: norm scale, product, bias, soft-cap, and of each tile of columns what a draw needs.

    l[r, c] = cap(norm(h_r) . W_c + b_c)           cap(l) = softcap tanh(l / softcap) where the family has one
    token_r = argmax_c (l[r, c] / T + g(seed, position + 1, id_c)),   or argmax_c l[r, c] at T = 0

with the norm deferred (see `tile.py`) and g the noise of `noise.py`. A program multiplies 16 rows by a tile of columns
and leaves per row and tile

    best_value, best_id    the tile's best score and its id, the lowest on ties; (+inf, -1) where a logit is NaN or +inf
    tile_stats             m = max l, sum exp(l - m), sum exp(l - m) l: for log-sum-exp and entropy
    logits                 l itself, where something else is to be made of it

each of them optional; `draw.pick` finishes the argmax. One pass: no logits in memory for greedy or plain temperature.

With `ids` (a draft vocabulary, ascending) column c means token ids[c], which keys its noise. Programs of one tile of
columns run side by side, so more row tiles read the weight from L2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .noise import MASK_32, gumbel_noise_at
from .rows import Rows
from .tile import BLOCK_ROWS, precision, x_scale

try:
    import triton
    import triton.language as tl

    from .device_noise import gumbel_at, gumbel_run
    from .tile import normed_rows_product, pdl_next, pdl_wait, weights_ahead
except ImportError:
    triton = None


def lm_head_reference(
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    *,
    ids: Tensor | None = None,
    temperature: float = 0.0,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    softcap: float | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """fp32 logits and scores `[R, V]`, all rows, from the arguments of `lm_head`; seeds and positions `[R]` are the
    rows' own, those of the tokens to be drawn."""
    hidden_size = weight.shape[1]
    square = stats[:, 0].float().sum(-1) / hidden_size
    logits = x.float() @ weight.float().T / x_scale(x.dtype)
    if shift is not None:
        mean = stats[:, 1].float().sum(-1) / hidden_size
        square = square - mean * mean
        logits = logits - mean.unsqueeze(1) * shift.float()
    logits = logits * (square + eps).rsqrt().unsqueeze(1)
    if bias is not None:
        logits = logits + bias.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if not temperature or seeds is None or positions is None:
        return logits, logits
    known = torch.arange(weight.shape[0], device=x.device) if ids is None else ids.long()
    noise = [
        gumbel_noise_at(int(seed) & (MASK_32 << 32 | MASK_32), int(position), known)
        for seed, position in zip(seeds, positions, strict=True)
    ]
    return logits, logits / temperature + torch.stack(noise)


if triton is not None:

    @triton.jit
    def _lm_head_kernel(  # type: ignore[no-untyped-def]
        x, stats, weight, bias, shift, ids_of, live_of, sequence_of, position_of, options_of, seeds,
        logits, best_value, best_id, tile_stats,
        vocab_size, num_tiles, eps, softcap,
        D: tl.constexpr, NUM_STATS: tl.constexpr, BLOCK_S: tl.constexpr,
        HAS_BIAS: tl.constexpr, LAYER_NORM: tl.constexpr, HAS_IDS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
        STORE_LOGITS: tl.constexpr, STORE_BEST: tl.constexpr, STORE_STATS: tl.constexpr,
        X_SCALE: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, TAIL: tl.constexpr = 0,
    ):  # fmt: skip
        rows = tl.program_id(0) * BM + tl.arange(0, BM)
        tile = tl.program_id(1)
        cols = tile * BN + tl.arange(0, BN)
        inside = cols < vocab_size
        named = tl.minimum(cols, vocab_size - 1)
        ahead = weights_ahead(weight, named, D, D, 0, BK, SPLIT, TAIL)
        # nothing of these is written by another kernel
        ids = cols
        if HAS_IDS:
            ids = tl.load(ids_of + cols, mask=inside, other=2147483647)
        if HAS_BIAS:
            offset = tl.load(bias + cols, mask=inside, other=0.0)
        if LAYER_NORM:
            off_mean = tl.load(shift + cols, mask=inside, other=0.0)
        live = tl.load(live_of + rows) != 0
        if STORE_BEST:
            sequence = tl.load(sequence_of + rows)
            position = tl.load(position_of + rows)
        pdl_wait(PDL)

        if STORE_BEST:
            temperature = tl.load(options_of)
        y, scale, mean = normed_rows_product(
            x, stats, weight, ahead, rows, named, eps, D, NUM_STATS, BLOCK_S, LAYER_NORM, X_SCALE, BK, SPLIT, PRECISION,
            TAIL,
        )  # fmt: skip
        pdl_next(PDL)
        if STORE_BEST:
            seed = tl.load(seeds + sequence, mask=live, other=0)[:, None]
            position = position[:, None] + 1
        y = y * scale[:, None]
        if LAYER_NORM:
            y -= (mean * scale * X_SCALE)[:, None] * off_mean.to(tl.float32)[None, :]
        if HAS_BIAS:
            y += offset.to(tl.float32)[None, :]
        if HAS_SOFTCAP:
            y = softcap * (2.0 * tl.sigmoid(2.0 * y / softcap) - 1.0)  # tanh
        y = tl.where(inside[None, :], y, float("-inf"))

        if STORE_LOGITS:
            to = logits + rows[:, None].to(tl.int64) * vocab_size + cols[None, :]
            tl.store(to, y, mask=live[:, None] & inside[None, :])
        place = rows.to(tl.int64) * num_tiles + tile
        if STORE_STATS:
            top = tl.max(y, 1)
            finite = y > float("-inf")
            weights = tl.where(finite, tl.exp(y - top[:, None]), 0.0)
            # [R, 3, NT]
            to = tile_stats + rows.to(tl.int64) * (3 * num_tiles) + tile
            tl.store(to, top, mask=live)
            tl.store(to + num_tiles, tl.sum(weights, 1), mask=live)
            tl.store(to + 2 * num_tiles, tl.sum(weights * tl.where(finite, y, 0.0), 1), mask=live)
        if STORE_BEST:
            wrong = tl.max(((y != y) | (y == float("inf"))).to(tl.int32), 1) != 0
            score = y
            if temperature > 0.0:
                if HAS_IDS:
                    noise = gumbel_at(seed, position, tl.broadcast_to(ids[None, :], [BM, BN]))
                else:
                    group = tile * (BN // 4) + tl.arange(0, BN // 4)
                    noise = gumbel_run(seed, position, tl.broadcast_to(group[None, :], [BM, BN // 4]))
                score = tl.div_rn(y, tl.zeros_like(y) + temperature) + noise
            best = tl.max(score, 1)
            winner = tl.min(tl.where((score == best[:, None]) & inside[None, :], ids[None, :], 2147483647), 1)
            tl.store(best_value + place, tl.where(wrong, float("inf"), best), mask=live)
            tl.store(best_id + place, tl.where(wrong, -1, winner), mask=live)


# Half types, by rows of the weight; tuned offline on an H100 over whole steps (docs/kernels.md).
_TABLE: dict[int, dict[str, int]] = {
    49152: {"BN": 128, "BK": 64, "SPLIT": 1, "num_warps": 4, "num_stages": 5},
    151936: {"BN": 64, "BK": 128, "SPLIT": 1, "num_warps": 4, "num_stages": 4},
}


def _settings(vocab_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Columns a program, depth of a product, partial products, warps, stages.

    384 programs for V = 49152, three of them on each of an H100's 132 multiprocessors with 48 KiB each under way.
    """
    if dtype != torch.float32 and vocab_size in _TABLE:
        return _TABLE[vocab_size]
    if vocab_size < 4096:
        return {"BN": 32, "BK": 32, "SPLIT": 1, "num_warps": 4, "num_stages": 2}
    if dtype == torch.float32:
        return {"BN": 64, "BK": 32, "SPLIT": 1, "num_warps": 4, "num_stages": 3}
    return {"BN": 128, "BK": 64, "SPLIT": 1, "num_warps": 4, "num_stages": 4}


def num_tiles(vocab_size: int, dtype: torch.dtype, settings: dict[str, int] | None = None) -> int:
    """NT, the tiles of columns of a head with V columns and weights of `dtype`: sizes of what `lm_head` writes."""
    block = (_settings(vocab_size, dtype) if settings is None else settings)["BN"]
    return -(-vocab_size // block)


def lm_head(
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    rows: Rows,
    *,
    eps: float,
    softcap: float | None = None,
    ids: Tensor | None = None,
    options: Tensor | None = None,
    seeds: Tensor | None = None,
    logits: Tensor | None = None,
    best_value: Tensor | None = None,
    best_id: Tensor | None = None,
    tile_stats: Tensor | None = None,
    pdl: bool = False,
    settings: dict[str, int] | None = None,
) -> None:
    """Make what is asked for of every live row; other rows' places are left alone.

    Args:
        x: `[R, D]`, the last hidden state times the final norm's weight in the model's dtype, unnormalised.
        stats: fp32 `[R, 2, S]`, sums of h^2 and of h by the producer's tiles.
        weight: `[V, D]` of the same dtype, or `[Vd, D]` of a draft vocabulary.
        bias: `[V]`, or None; for LayerNorm with the norm's own bias multiplied in.
        shift: `[V]`, the weight times the norm's weight, for LayerNorm; None for RMSNorm.
        rows: of the step; a row's `position` is its own token's, so the token drawn stands one further.
        eps, softcap: the norm's, the logits'.
        ids: int32 `[V]`, ascending: token id of each column; None for the whole vocabulary.
        options: fp32 `[8]` on the device, of which [0] is the temperature; needed for best_value.
        seeds: int64 `[B]`, needed for best_value.
        logits: fp32 `[R, V]`, or None.
        best_value, best_id: fp32 and int32 `[R, NT]`, or None.
        tile_stats: fp32 `[R, 3, NT]`, or None.
        pdl: start before the kernel before has ended (programmatic dependent launch).
        settings: instead of the table's; NT is then `num_tiles` of the same.

    Raises:
        ValueError: tensors that do not fit each other.
    """
    chosen = _settings(weight.shape[0], weight.dtype) if settings is None else settings
    vocab_size, hidden_size = weight.shape
    tiles = num_tiles(vocab_size, weight.dtype, chosen)
    num_rows = len(rows)
    for name, tensor, shape in (
        ("x", x, (num_rows, hidden_size)),
        ("stats", stats, (num_rows, 2, stats.shape[-1])),
        ("logits", logits, (num_rows, vocab_size)),
        ("best_value", best_value, (num_rows, tiles)),
        ("best_id", best_id, (num_rows, tiles)),
        ("tile_stats", tile_stats, (num_rows, 3, tiles)),
        ("ids", ids, (vocab_size,)),
    ):
        if tensor is not None and (tensor.shape != shape or not tensor.is_contiguous()):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape} without gaps")
    if x.dtype != weight.dtype or not weight.is_contiguous():
        raise ValueError(f"x is {x.dtype} and the weight {weight.dtype}, expected one dtype and a weight without gaps")
    if (best_value is None) != (best_id is None) or (best_value is not None and (options is None or seeds is None)):
        raise ValueError("best_value, best_id, options and seeds go together, expected all of them or no best_value")
    _lm_head_kernel[(num_rows // BLOCK_ROWS, tiles)](
        x, stats, weight, bias, shift, ids, rows.live, rows.sequence, rows.position, options, seeds,
        logits, best_value, best_id, tile_stats,
        vocab_size, tiles, eps, softcap or 0.0,
        D=hidden_size, NUM_STATS=stats.shape[2], BLOCK_S=triton.next_power_of_2(stats.shape[2]),
        HAS_BIAS=bias is not None, LAYER_NORM=shift is not None, HAS_IDS=ids is not None,
        HAS_SOFTCAP=softcap is not None, STORE_LOGITS=logits is not None, STORE_BEST=best_value is not None,
        STORE_STATS=tile_stats is not None,
        X_SCALE=x_scale(x.dtype), PRECISION=precision(x.dtype), PDL=pdl, BM=BLOCK_ROWS, **chosen,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
