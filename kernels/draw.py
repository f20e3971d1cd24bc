"""The last step of a draw: a row's winner over tiles of columns, or the whole row processed, filtered and drawn.

`pick` ends what `lm_head` began, for greedy and plain temperature: the largest score of all tiles, the lowest id on
ties.

`process_and_draw` does to a row of logits what `engine/sampling.py` does, in its order and by its definitions: logit
bias, repetition, presence and frequency penalties over prompt, output and the row's own path, stop ids banned before
`min_end`, temperature, top-k (ties with the k-th stay), top-p (a token stays if the mass strictly before it, by falling
score and rising id, is below top_p), min-p, Gumbel noise, argmax. Bad words and a caller's own processor need the host.

One program a row, so a row's bits depend on the row alone. With s = (l - max l) / T <= 0 the order of scores is the
opposite of the order of the bits of |s| as integers, so top-k and top-p are bisections on those bits: the smallest key
whose count, or mass, suffices. Counts and masses are sums in one fixed order, in which more terms never give less, so
each bisection is well defined. To make them cheap the ids at most `depth` below the maximum are listed first, `depth`
the first of 4, 8, 16, inf that holds what is asked for. Passes over V: one, and for filters about four more.

Where it differs from `sampling.py`: masses are fp32 sums of fp32 exponentials (there fp64 sums), top_p and min_p are
rounded to fp32, a penalty may be a fused multiply-add. These move last bits, and a token only where it stands on the
very edge of top-p or min-p.

`count_tokens` keeps the tables that the penalties read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .rows import PATH, Rows

try:
    import triton
    import triton.language as tl

    from .device_noise import gumbel_at, gumbel_run
    from .tile import pdl_next, pdl_wait
except ImportError:
    triton = None

RECORD_TOKENS = 4  # where a record of `accept.py` has the committed tokens


@dataclass(frozen=True)
class Penalties:
    """What processors add to logits and what they know of each sequence, in device memory at fixed addresses.

    Attributes:
        bias: fp32 `[V]`, added; -inf bans.
        counts: int32 `[B, V]`, how often each token was generated and committed, the pending one included.
        seen: int8 `[B, V]`, 1 for tokens of prompt and output.
    """

    bias: Tensor
    counts: Tensor
    seen: Tensor

    @classmethod
    def empty(cls, batch: int, vocab_size: int, device: torch.device | str) -> Penalties:
        counts = torch.zeros(batch, vocab_size, dtype=torch.int32, device=device)
        return cls(torch.zeros(vocab_size, device=device), counts, torch.zeros_like(counts, dtype=torch.int8))

    def start(self, sequences: Sequence[tuple[int, Sequence[int], int]], bias: Mapping[int, float]) -> None:
        """Take over sequences, each with its place, its prompt and output, and the prompt's length; forget others."""
        for tensor in (self.bias, self.counts, self.seen):
            tensor.zero_()
        if bias:
            self.bias[torch.tensor(list(bias), device=self.bias.device)] = torch.tensor(
                list(bias.values()), dtype=torch.float32, device=self.bias.device
            )
        vocab_size = self.bias.shape[0]
        for sequence, token_ids, prompt_len in sequences:
            ids = torch.tensor(token_ids, dtype=torch.int64)
            counted = torch.bincount(ids[prompt_len:], minlength=vocab_size)
            self.counts[sequence].copy_(counted)
            self.seen[sequence].copy_(torch.bincount(ids, minlength=vocab_size) > 0)


def pick_reference(best_value: Tensor, best_id: Tensor, live: Tensor) -> Tensor:
    """int32 `[R]` from the arguments of `pick`."""
    top = best_value.amax(1, keepdim=True)
    tokens = best_id.masked_fill(best_value != top, torch.iinfo(torch.int32).max).amin(1)
    tokens = torch.where((best_id == -1).any(1) | (top.squeeze(1) == float("-inf")), -1, tokens)
    return torch.where(live != 0, tokens, 0).to(torch.int32)


def process_reference(
    logits: Tensor,
    *,
    bias: Tensor | None = None,
    counts: Tensor | None = None,
    seen: Tensor | None = None,
    path: list[int] | None = None,
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
    banned: list[int] | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """Scores `[V]` of one row before its noise, -inf where filtered; None of the checks for faults. `counts` and `seen`
    are the row's sequence's, `path` the drafted tokens before it, `banned` the stop ids banned at its position."""
    scores = logits.float() if bias is None else logits.float() + bias
    if counts is not None and seen is not None:
        on_path = torch.bincount(torch.tensor(path or [], dtype=torch.int64), minlength=len(logits)).to(counts.device)
        count, here = counts + on_path, (seen != 0) | (on_path > 0)
        scores = torch.where(here, torch.where(scores < 0, scores * repetition, scores / repetition), scores)
        scores = torch.where(count > 0, scores - (count * frequency + presence), scores)
    if banned:
        scores[banned] = float("-inf")
    if not temperature:
        return scores
    scores = (scores - scores.max()) / temperature
    kept = torch.ones_like(scores, dtype=torch.bool)
    if 0 < top_k < len(scores):
        kept = scores >= scores.topk(top_k).values[-1]
    if top_p < 1:
        ranked = scores.masked_fill(~kept, float("-inf")).sort(descending=True, stable=True)
        weights = ranked.values.exp().double()
        before = weights.cumsum(0) - weights
        kept[ranked.indices[before >= top_p * weights.sum()]] = False
    if min_p > 0:
        kept &= scores >= torch.tensor(min_p).log()
    return scores.masked_fill(~kept, float("-inf"))


if triton is not None:

    @triton.jit
    def _pick_kernel(best_value, best_id, live_of, out, num_tiles, PDL: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
        pdl_wait(PDL)
        pdl_next(PDL)
        row = tl.program_id(0).to(tl.int64)
        live = tl.load(live_of + row) != 0
        tile = tl.arange(0, BLOCK)
        mask = (tile < num_tiles) & live
        value = tl.load(best_value + row * num_tiles + tile, mask=mask, other=float("-inf"))
        ids = tl.load(best_id + row * num_tiles + tile, mask=mask, other=2147483647)
        top = tl.max(value, 0)  # a fault is (+inf, -1), so it wins and is the lowest
        token = tl.min(tl.where(value == top, ids, 2147483647), 0)
        token = tl.where(top == float("-inf"), -1, token)
        tl.store(out + row, tl.where(live, token, 0))

    @triton.jit
    def _listed(scores, kept_ids, start, size, top, temperature, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """(ids, s, key) of a block of the list; key 2**31 - 1 beyond it."""
        at = start + tl.arange(0, BLOCK)
        inside = at < size
        ids = tl.load(kept_ids + at, mask=inside, other=0)
        score = tl.load(scores + ids, mask=inside, other=float("-inf"))
        score = tl.div_rn(score - top, tl.zeros_like(score) + temperature)
        key = score.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        return ids, score, tl.where(inside, key, 0x7FFFFFFF)

    @triton.jit
    def _up_to(scores, kept_ids, bound, size, top, temperature, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """(number, mass) of the listed ids with a key of at most `bound`."""
        number = tl.zeros([BLOCK], tl.int32)
        mass = tl.zeros([BLOCK], tl.float32)
        for start in range(0, size, BLOCK):
            _, score, key = _listed(scores, kept_ids, start, size, top, temperature, BLOCK)
            number += (key <= bound).to(tl.int32)
            mass += tl.where(key <= bound, tl.exp(score), 0.0)
        return tl.sum(number, 0), tl.sum(mass, 0)

    @triton.jit
    def _process_and_draw_kernel(  # type: ignore[no-untyped-def]
        logits, live_of, sequence_of, position_of, base_of, path_of, options_of, top_k_of, seeds,
        bias, counts, seen, tree_tokens, stop_ids, min_end, kept_ids, out, vocab_size, num_stops,
        PATH: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        pdl_wait(PDL)
        pdl_next(PDL)
        row = tl.program_id(0).to(tl.int64)
        if tl.load(live_of + row) == 0:
            tl.store(out + row, 0)
            return
        sequence = tl.load(sequence_of + row).to(tl.int64)
        position = tl.load(position_of + row)
        temperature = tl.load(options_of)
        top_p, min_p = tl.load(options_of + 1), tl.load(options_of + 2)
        repetition, presence, frequency = tl.load(options_of + 3), tl.load(options_of + 4), tl.load(options_of + 5)
        top_k = tl.load(top_k_of)
        logits += row * vocab_size
        kept_ids += row * vocab_size
        num_drafted = position - tl.load(base_of + row)
        num_banned = tl.where(position + 1 < tl.load(min_end + sequence), num_stops, 0)
        penalised = (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0)

        wrong = tl.zeros([BLOCK], tl.int32)
        raw = tl.full([BLOCK], float("-inf"), tl.float32)
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        best_id = tl.zeros([BLOCK], tl.int32)
        for start in range(0, vocab_size, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            mask = ids < vocab_size
            score = tl.load(logits + ids, mask=mask, other=float("-inf"))
            raw = tl.maximum(raw, score)
            wrong |= ((score != score) | (score == float("inf"))).to(tl.int32)
            score += tl.load(bias + ids, mask=mask, other=0.0)
            if penalised:
                count = tl.load(counts + sequence * vocab_size + ids, mask=mask, other=0)
                here = tl.load(seen + sequence * vocab_size + ids, mask=mask, other=0).to(tl.int32)
                for depth in range(1, num_drafted + 1):
                    node = tl.load(path_of + row * PATH + depth)
                    same = (ids == tl.load(tree_tokens + sequence * PATH + node)).to(tl.int32)
                    count += same
                    here |= same
                divided = tl.div_rn(score, tl.zeros_like(score) + repetition)
                repeated = tl.where(score < 0.0, score * repetition, divided)
                score = tl.where(here != 0, repeated, score)
                score = tl.where(count > 0, score - (count.to(tl.float32) * frequency + presence), score)
            for stop in range(0, num_banned):
                score = tl.where(ids == tl.load(stop_ids + stop), float("-inf"), score)
            wrong |= ((score != score) | (score == float("inf"))).to(tl.int32)
            tl.store(logits + ids, score, mask=mask)
            better = score > best
            best = tl.where(better, score, best)
            best_id = tl.where(better, ids, best_id)
        top = tl.max(best, 0)
        fault = (tl.max(wrong, 0) != 0) | (tl.max(raw, 0) == float("-inf")) | (top == float("-inf"))
        if fault | (temperature == 0.0):
            winner = tl.min(tl.where(best == top, best_id, 2147483647), 0)
            tl.store(out + row, tl.where(fault, -1, winner))
            return

        tl.debug_barrier()  # the scores, stored by other threads than read them below
        seed = tl.load(seeds + sequence)
        by_number = (top_k > 0) & (top_k < vocab_size)
        by_mass = top_p < 1.0
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        if (by_number | by_mass | (min_p > 0.0)) == 0:
            for start in range(0, vocab_size, BLOCK):
                ids = start + tl.arange(0, BLOCK)
                score = tl.load(logits + ids, mask=ids < vocab_size, other=float("-inf"))
                score = tl.div_rn(score - top, tl.zeros_like(score) + temperature)
                score += gumbel_run(seed, position + 1, start // 4 + tl.arange(0, BLOCK // 4))
                better = score > best
                best = tl.where(better, score, best)
                best_id = tl.where(better, ids, best_id)
            highest = tl.max(best, 0)
            tl.store(out + row, tl.min(tl.where(best == highest, best_id, 2147483647), 0))
            return

        # How far below the maximum the list has to reach.
        floor = tl.log(min_p)
        depth = tl.where(by_number | by_mass, 4.0, -floor)
        total = 0.0
        settled = 0
        while settled == 0:
            numbers = tl.zeros([BLOCK], tl.int32)
            masses = tl.zeros([BLOCK], tl.float32)
            totals = tl.zeros([BLOCK], tl.float32)
            for start in range(0, vocab_size, BLOCK):
                ids = start + tl.arange(0, BLOCK)
                score = tl.load(logits + ids, mask=ids < vocab_size, other=float("-inf"))
                score = tl.div_rn(score - top, tl.zeros_like(score) + temperature)
                weight = tl.exp(score)
                upper = (score >= -depth) & (ids < vocab_size)
                numbers += upper.to(tl.int32)
                masses += tl.where(upper, weight, 0.0)
                totals += weight
            total = tl.sum(totals, 0)
            holds_number = tl.sum(numbers, 0) >= top_k
            holds_mass = tl.sum(masses, 0) >= top_p * total
            holds = tl.where(by_number, holds_number, holds_mass | (by_mass == 0))
            settled = (holds | (depth == float("inf"))).to(tl.int32)
            deeper = tl.where(depth < 16.0, 2.0 * depth, float("inf"))
            depth = tl.where(settled != 0, depth, deeper)

        size = 0
        for start in range(0, vocab_size, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            score = tl.load(logits + ids, mask=ids < vocab_size, other=float("-inf"))
            score = tl.div_rn(score - top, tl.zeros_like(score) + temperature)
            upper = ((score >= -depth) & (ids < vocab_size)).to(tl.int32)
            tl.store(kept_ids + size + tl.cumsum(upper, 0) - 1, ids, mask=upper != 0)
            size += tl.sum(upper, 0)
        tl.debug_barrier()

        # Keys of at most `low` stay; of those above it up to `high`, all equal, as many as `needed` has room for.
        high = depth.to(tl.int32, bitcast=True)
        if by_number:
            low = -1
            while high - low > 1:
                middle = low + (high - low) // 2
                number, _ = _up_to(logits, kept_ids, middle, size, top, temperature, BLOCK)
                high = tl.where(number >= top_k, middle, high)
                low = tl.where(number == top_k, middle - 1, tl.where(number > top_k, low, middle))
        low = high
        needed = 0.0
        mass_low = 0.0
        if by_mass:
            number_high, mass = _up_to(logits, kept_ids, high, size, top, temperature, BLOCK)
            needed = top_p * tl.where(by_number, mass, total)
            low = high * 0 - 1
            number_low = number_high * 0
            while (high - low > 1) & (number_high - number_low > 1):
                middle = low + (high - low) // 2
                number, mass = _up_to(logits, kept_ids, middle, size, top, temperature, BLOCK)
                reached = mass >= needed
                high = tl.where(reached, middle, high)
                number_high = tl.where(reached, number, number_high)
                low = tl.where(reached, low, middle)
                number_low = tl.where(reached, number_low, number)
                mass_low = tl.where(reached, mass_low, mass)

        num_edge = 0
        for start in range(0, size, BLOCK):
            ids, score, key = _listed(logits, kept_ids, start, size, top, temperature, BLOCK)
            edge = ((key > low) & (key <= high)).to(tl.int32)
            before = mass_low + (num_edge + tl.cumsum(edge, 0) - 1).to(tl.float32) * tl.exp(score)
            num_edge += tl.sum(edge, 0)
            kept = ((key <= low) | ((edge != 0) & (before < needed))) & (score >= floor)
            score = tl.where(kept, score + gumbel_at(seed, position + 1, ids), float("-inf"))
            better = score > best
            best = tl.where(better, score, best)
            best_id = tl.where(better, ids, best_id)
        highest = tl.max(best, 0)
        tl.store(out + row, tl.min(tl.where(best == highest, best_id, 2147483647), 0))

    @triton.jit
    def _count_kernel(record, counts, seen, vocab_size, RECORD: tl.constexpr, FIRST: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
        pdl_wait(PDL)
        pdl_next(PDL)
        sequence = tl.program_id(0).to(tl.int64)
        place = tl.arange(0, 16)
        num_accepted = tl.load(record + sequence * RECORD)
        token = tl.load(record + sequence * RECORD + FIRST + place, mask=place <= num_accepted, other=-1)
        at = sequence * vocab_size + token
        tl.atomic_add(counts + at, 1, mask=token >= 0)
        tl.store(seen + at, tl.full([16], 1, seen.dtype.element_ty), mask=token >= 0)


def _settings(vocab_size: int) -> dict[str, int]:
    """Ids a block, and warps."""
    return {"BLOCK": 4096, "num_warps": 16} if vocab_size >= 4096 else {"BLOCK": 256, "num_warps": 4}


def pick(best_value: Tensor, best_id: Tensor, rows: Rows, out: Tensor, *, pdl: bool = False) -> None:
    """The token of every row from its tiles' best.

    Args:
        best_value, best_id: fp32 and int32 `[R, NT]` of `lm_head`.
        rows: of the step.
        out: int32 `[R]`: the id with the largest score, the lowest on ties; -1 where a tile has -1 or every score is
            -inf; 0 for rows that are not live.
        pdl: start before the kernel before has ended.

    Raises:
        ValueError: shapes that do not fit.
    """
    if best_value.shape != best_id.shape or best_value.shape[0] != len(rows) or out.shape != (len(rows),):
        raise ValueError(
            f"best_value {tuple(best_value.shape)}, best_id {tuple(best_id.shape)} and out {tuple(out.shape)} do not "
            f"fit {len(rows)} rows"
        )
    num_tiles = best_value.shape[1]
    _pick_kernel[(len(rows),)](
        best_value, best_id, rows.live, out, num_tiles,
        PDL=pdl, BLOCK=max(16, triton.next_power_of_2(num_tiles)), num_warps=4,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def process_and_draw(
    logits: Tensor,
    rows: Rows,
    penalties: Penalties,
    tree_tokens: Tensor,
    options: Tensor,
    top_k: Tensor,
    seeds: Tensor,
    stop_ids: Tensor,
    min_end: Tensor,
    out: Tensor,
    *,
    kept_ids: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """The token of every row from its logits, with all processors and filters that need no host.

    Args:
        logits: fp32 `[R, V]`, overwritten with the processed ones.
        rows: of the step; `path` names nodes of `tree_tokens`.
        penalties: of the batch; the tokens on a row's own path are added to its tables.
        tree_tokens: int32 `[B, 16]`, by node.
        options: fp32 `[8]`: temperature (0 is greedy), top_p, min_p, repetition, presence, frequency.
        top_k: int32 `[1]`, 0 is off.
        seeds: int64 `[B]`.
        stop_ids: int32 `[S]`, padded with -1.
        min_end: int32 `[B]`: stop ids are banned for tokens at positions below.
        out: int32 `[R]`, overwritten: the token; -1 where the logits or what the processors left hold NaN, +inf or
            nothing but -inf; 0 for rows that are not live.
        kept_ids: int32 `[R, V]` to work in; None allocates it (in a graph's own memory under capture).
        pdl: start before the kernel before has ended.

    Raises:
        ValueError: tensors that do not fit.
    """
    num_rows, vocab_size = logits.shape
    if kept_ids is None:
        kept_ids = torch.empty_like(logits, dtype=torch.int32)
    if num_rows != len(rows) or out.shape != (num_rows,):
        raise ValueError(f"logits have {num_rows} rows and out {tuple(out.shape)}, expected {len(rows)}")
    batch = len(seeds)
    for name, tensor, shape in (
        ("logits", logits, (num_rows, vocab_size)),
        ("kept_ids", kept_ids, (num_rows, vocab_size)),
        ("bias", penalties.bias, (vocab_size,)),
        ("counts", penalties.counts, (batch, vocab_size)),
        ("seen", penalties.seen, (batch, vocab_size)),
        ("tree_tokens", tree_tokens, (batch, PATH)),
    ):
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape} without gaps")
    _process_and_draw_kernel[(num_rows,)](
        logits, rows.live, rows.sequence, rows.position, rows.base, rows.path, options, top_k, seeds,
        penalties.bias, penalties.counts, penalties.seen, tree_tokens, stop_ids, min_end, kept_ids, out,
        vocab_size, len(stop_ids), PATH=PATH, PDL=pdl,
        **_settings(vocab_size), **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def count_tokens(record: Tensor, penalties: Penalties, *, pdl: bool = False) -> None:
    """Take a round's committed tokens into the tables.

    Args:
        record: int32 `[B, 96]` of `accept`.
        penalties: `counts` and `seen` are updated.
        pdl: start before the kernel before has ended.
    """
    batch, size = record.shape
    if penalties.counts.shape[0] != batch:
        raise ValueError(f"the record has {batch} sequences, the tables {penalties.counts.shape[0]}")
    _count_kernel[(batch,)](
        record, penalties.counts, penalties.seen, penalties.counts.shape[1], RECORD=size, FIRST=RECORD_TOKENS, PDL=pdl,
        num_warps=1, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
