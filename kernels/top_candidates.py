"""A draft head's best few tokens per row, their log-probabilities and the entropy, after one look at a few tiles.

The LM head (`lm_head`) leaves logits l and, per tile of columns, what these need:

    entropy      H = log Z - A / Z,  Z = sum exp(l), A = sum exp(l) l      (of the raw distribution, in nats)
    score        s = l                            greedy
                 s = l / T + g                    sampled; g is `noise.gumbel_noise(seed, position)` of the token
    log-prob.    s - log sum exp(s)
    surprisal    log Z - max l, of the likeliest token                    (raw, too)

The best C elements lie in the best C tiles by tile maximum: an element that precedes one tile's maximum precedes all of
that tile, so were a best element in another tile, the C maxima would precede it. Ties go to the lowest id in both
choices (ids rise with the place in the vocabulary, so the lower tile holds the lower ids).

Greedily the normaliser is exact, from the tiles' sums. Of scores with noise it is taken from all scores of the best C
tiles and the maxima of the others: exp(s) has so heavy a tail that maxima make up most of it (log-probabilities of a
row come out too large by one number, up to half a nat where the row is flat). It shapes trees and is never part of the
output.

A row with NaN or +inf has NaN entropy and surprisal; its candidates mean nothing. Keys of a choice pack the score's
bits, made monotone, above the bits of the place, so one integer maximum decides both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .noise import MASK_32, gumbel_noise_at
from .rows import Rows

try:
    import triton
    import triton.language as tl

    from .device_noise import gumbel_at
    from .tile import pdl_next, pdl_wait
except ImportError:
    triton = None

MOST_CANDIDATES = 8


def top_candidates_reference(
    logits: Tensor, temperature: float, seeds: Tensor, rows: Rows, count: int, draft_ids: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(ids [R, count], log-probabilities, entropies and surprisals [R])` with exact normalisers; rows that are not
    live are zero."""
    num_rows, vocab_size = logits.shape
    ids = torch.zeros(num_rows, count, dtype=torch.int32)
    best = torch.zeros(num_rows, count)
    entropies, surprisals = torch.zeros(2, num_rows).unbind()
    names = torch.arange(vocab_size) if draft_ids is None else draft_ids.cpu().long()
    for r in range(num_rows):
        if not rows.live[r]:
            continue
        raw = logits[r].cpu().float().log_softmax(-1)
        entropies[r] = -(raw.exp() * raw.clamp_min(torch.finfo(torch.float32).min)).sum()
        surprisals[r] = -raw.max()
        scores = logits[r].cpu().float()
        if temperature:
            seed = int(seeds[rows.sequence[r].long()]) & (MASK_32 << 32 | MASK_32)
            scores = scores / temperature + gumbel_noise_at(seed, int(rows.position[r]) + 1, names)
        order = scores.sort(descending=True, stable=True).indices[:count]
        ids[r, : len(order)], best[r, : len(order)] = names[order].int(), scores.log_softmax(-1)[order]
    return ids, best, entropies, surprisals


if triton is not None:

    @triton.jit
    def _rank_key(score, place):  # type: ignore[no-untyped-def]
        """int64 that orders by score, then by the lower place."""
        bits = (score + 0.0).to(tl.int32, bitcast=True)  # + 0: both zeros have one key
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64)

    @triton.jit
    def _top_candidates_kernel(  # type: ignore[no-untyped-def]
        logits, partials, best_value, options_of, seeds, draft_ids, live_of, sequence_of, position_of,
        ids_out, log_probs_out, entropies_out, surprisals_out, vocab_size, num_tiles,
        C: tl.constexpr, TILE: tl.constexpr, HAS_IDS: tl.constexpr, SURPRISALS: tl.constexpr,
        BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        pdl_wait(PDL)
        pdl_next(PDL)
        row = tl.program_id(0)
        if tl.load(live_of + row) == 0:
            return
        temperature = tl.load(options_of)
        at_row = row.to(tl.int64)
        # below every key: -inf has bits 0xff800000, a key far above this
        lowest = tl.full([1], -0x7FFFFFFF, tl.int64) << 32

        t = tl.arange(0, BLOCK_T)
        parts = partials + at_row * 3 * num_tiles + t
        top = tl.load(parts, mask=t < num_tiles, other=float("-inf"))
        sums = tl.load(parts + num_tiles, mask=t < num_tiles, other=0.0)
        weighted = tl.load(parts + 2 * num_tiles, mask=t < num_tiles, other=0.0)
        best = tl.load(best_value + at_row * num_tiles + t, mask=t < num_tiles, other=float("-inf"))
        largest = tl.max(top, 0)
        scale = tl.exp(top - largest)
        z = tl.sum(sums * scale, 0)
        a = tl.sum(weighted * scale, 0)
        log_z = tl.log(z) + largest
        # a tile with NaN or +inf has +inf as its best
        wrong = tl.max(best, 0) == float("inf")
        tl.store(entropies_out + row, tl.where(wrong, float("nan"), log_z - a / z))
        if SURPRISALS:
            tl.store(surprisals_out + row, tl.where(wrong, float("nan"), tl.log(z)))

        lane = tl.arange(0, BLOCK_C)
        tiles = tl.full([BLOCK_C], -1, tl.int32)
        keys = tl.where(t < num_tiles, _rank_key(best, t), lowest)
        for c in tl.static_range(C):
            key = tl.max(keys, 0)
            found = (0x7FFFFFFF - (key & 0x7FFFFFFF)).to(tl.int32)
            tiles = tl.where((lane == c) & (c < num_tiles), found, tiles)
            keys = tl.where(keys == key, lowest, keys)
        others = (t < num_tiles) & (keys > lowest)

        column = tl.arange(0, TILE)
        place = tiles[:, None] * TILE + column[None, :]
        inside = (tiles >= 0)[:, None] & (place < vocab_size)
        score = tl.load(logits + at_row * vocab_size + place, mask=inside, other=float("-inf"))
        place = tl.where(inside, place, 0)
        if HAS_IDS:
            token = tl.load(draft_ids + place, mask=inside, other=0).to(tl.int32)
        else:
            token = place
        if temperature > 0.0:
            seed = tl.load(seeds + tl.load(sequence_of + row))
            position = tl.load(position_of + row) + 1
            noise = gumbel_at(seed, position, token)
            score = tl.where(inside, score / temperature + noise, float("-inf"))
            highest = tl.max(tl.max(score, 1), 0)
            mass = tl.sum(tl.sum(tl.where(inside, tl.exp(score - highest), 0.0), 1), 0)
            mass += tl.sum(tl.where(others, tl.exp(best - highest), 0.0), 0)
            log_z = tl.log(mass) + highest
        keys = tl.reshape(tl.where(inside, _rank_key(score, place), lowest[:, None]), [BLOCK_C * TILE])
        found = tl.zeros([BLOCK_C], tl.int64) + lowest
        for c in tl.static_range(C):
            key = tl.max(keys, 0)
            found = tl.where(lane == c, key, found)
            keys = tl.where(keys == key, lowest, keys)
        bits = (found >> 32).to(tl.int32)
        value = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        there = (found > lowest) & (value > float("-inf"))
        one = (0x7FFFFFFF - (found & 0x7FFFFFFF)).to(tl.int32)
        if HAS_IDS:
            one = tl.load(draft_ids + one, mask=there, other=0).to(tl.int32)
        to = row * C + lane
        tl.store(ids_out + to, tl.where(there, one, -1), mask=lane < C)
        tl.store(log_probs_out + to, tl.where(there, value - log_z, float("-inf")), mask=lane < C)


def tile_width(vocab_size: int, num_tiles: int) -> int:
    """The power of two that cuts so many columns into so many tiles (one tile: any that holds them)."""
    for width in (1 << i for i in range(4, 32)):
        if -(-vocab_size // width) == num_tiles:
            return width
    raise ValueError(f"no tiles of 16, 32, 64, ... columns cut {vocab_size} columns into {num_tiles}")


def _settings(num_tiles: int) -> dict[str, int]:
    """Warps of a row's program; one needs no barriers between its many small reductions."""
    return {"num_warps": 1 if num_tiles <= 512 else 4 if num_tiles <= 1024 else 8}


def top_candidates(
    logits: Tensor,
    partials: Tensor,
    best_value: Tensor,
    options: Tensor,
    seeds: Tensor,
    rows: Rows,
    ids: Tensor,
    log_probs: Tensor,
    entropies: Tensor,
    draft_ids: Tensor | None = None,
    *,
    surprisals: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """The best C tokens of every live row, best first.

    Args:
        logits: fp32 `[R, Vd]`, of `lm_head`.
        partials: fp32 `[R, 3, NT]`, `lm_head`'s tile_stats: per tile its largest logit m, sum exp(l - m),
            sum exp(l - m) l.
        best_value: fp32 `[R, NT]`, the tile's best score, noise included.
        options: fp32, temperature first; 0 is greedy.
        seeds: int64 `[B]` by sequence.
        rows: `position` is that of the token before the one to be drawn.
        ids: int32 `[R, C]`, overwritten; token ids, -1 where there is no token.
        log_probs: fp32 `[R, C]`, overwritten; nats.
        entropies: fp32 `[R]`, overwritten; nats, NaN where a row is not finite.
        draft_ids: `[Vd]` int32 or int64, rising: token ids of the columns; None for the columns themselves.
        surprisals: fp32 `[R]`, overwritten; nats, likewise; or None.
        pdl: programmatic dependent launch.

    Raises:
        ValueError: shapes that do not fit.
    """
    num_rows, vocab_size = logits.shape
    count, num_tiles = ids.shape[1], best_value.shape[1]
    tile = tile_width(vocab_size, num_tiles)
    if not 1 <= count <= MOST_CANDIDATES or ids.shape != log_probs.shape:
        raise ValueError(f"{count} candidates wanted, expected 1 to {MOST_CANDIDATES}")
    if partials.shape != (num_rows, 3, num_tiles) or best_value.shape[0] != num_rows:
        raise ValueError(
            f"partials are {tuple(partials.shape)} and maxima {tuple(best_value.shape)}, expected as many tiles of "
            f"{num_rows} rows in both"
        )
    if not all(t.is_contiguous() for t in (logits, partials, best_value, ids, log_probs)):
        raise ValueError("expected tensors without gaps")
    _top_candidates_kernel[(num_rows,)](
        logits, partials, best_value, options, seeds, draft_ids, rows.live, rows.sequence, rows.position,
        ids, log_probs, entropies, surprisals, vocab_size, num_tiles,
        C=count, TILE=tile, HAS_IDS=draft_ids is not None, SURPRISALS=surprisals is not None,
        BLOCK_C=triton.next_power_of_2(count), BLOCK_T=triton.next_power_of_2(num_tiles), PDL=pdl,
        **_settings(num_tiles), **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
