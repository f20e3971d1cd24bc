"""The next token of many rows: argmax of logits plus scaled Gumbel noise, in one pass over the logits.

    token = argmax_i (logits_i + T g_i),   g = `noise.gumbel_noise(seed, position)`

draws from softmax(logits / T), and is the argmax of the logits at T = 0. The noise is a function of the row's seed, its
position and the token, so what a text says does not depend on its slot or its neighbours (their effect on the
logits' last bits aside), and nothing of size [R, V] but the logits is ever stored.

The kernel's `-log1p(-v)` is a series below 2**-7 and `-log(1 - v)` above: within 1e-6 relative of `noise`'s, which is
enough to write text and not promised to be the same bits. Ties go to the lowest id.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .noise import MASK_32, gumbel_noise

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def gumbel_argmax_reference(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """The same in PyTorch, row by row; arguments as `gumbel_argmax`."""
    scores = logits.float()
    drawn = [r for r, temperature in enumerate(temperatures.tolist()) if temperature]
    if drawn:
        scores = scores.clone()
        for r in drawn:
            seed = int(seeds[r]) & (MASK_32 << 32 | MASK_32)
            noise = gumbel_noise(seed, int(positions[r]), logits.shape[1], logits.device)
            scores[r] += float(temperatures[r]) * noise
    return scores.argmax(-1)


if triton is not None:

    @triton.jit
    def _gumbel_argmax_kernel(  # type: ignore[no-untyped-def]
        logits, temperatures, seeds, positions, out, logits_row, vocab_size, BLOCK: tl.constexpr
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        temperature = tl.load(temperatures + row)
        seed = tl.load(seeds + row)
        position = tl.load(positions + row).to(tl.int32)
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        best_id = tl.zeros([BLOCK], tl.int32)
        for start in range(0, vocab_size, 4 * BLOCK):
            group = start // 4 + tl.arange(0, BLOCK)
            zero = group * 0
            w0, w1, w2, w3 = zero.to(tl.uint32), zero.to(tl.uint32), zero.to(tl.uint32), zero.to(tl.uint32)
            if temperature > 0.0:
                w0, w1, w2, w3 = tl.philox(seed, group, zero + position, zero, zero)
            for lane in tl.static_range(4):
                ids = group * 4 + lane
                score = tl.load(logits + row * logits_row + ids, mask=ids < vocab_size, other=float("-inf"))
                score = score.to(tl.float32)
                if temperature > 0.0:
                    word = w0 if lane == 0 else w1 if lane == 1 else w2 if lane == 2 else w3
                    v = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
                    small = v * (1.0 + v * (0.5 + v * (0.33333333 + v * 0.25)))
                    score -= temperature * tl.log(tl.where(v < 0.0078125, small, -tl.log(1.0 - v)))
                better = score > best
                best = tl.where(better, score, best)
                best_id = tl.where(better, ids, best_id)
        top = tl.max(best, 0)
        tl.store(out + row, tl.min(tl.where(best == top, best_id, vocab_size - 1), 0).to(tl.int64))


def _settings(vocab_size: int) -> dict[str, int]:
    """Groups of four ids a block, and warps."""
    return {"BLOCK": 512 if vocab_size >= 4096 else 32, "num_warps": 4 if vocab_size >= 4096 else 1}


def gumbel_argmax(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """The next token of each row.

    Args:
        logits: `[R, V]`, any float dtype, last axis contiguous.
        temperatures: fp32 `[R]`, 0 is greedy.
        seeds: int64 `[R]`, the 64 bits of each row's seed.
        positions: integer `[R]`, absolute position of the token to be drawn.

    Returns:
        long `[R]`.
    """
    if logits.is_cuda and triton is not None:
        return launch(logits, temperatures, seeds, positions)
    return gumbel_argmax_reference(logits, temperatures, seeds, positions)


def launch(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """The Triton kernel of `gumbel_argmax`, one program a row.

    Raises:
        ValueError: logits with gaps along the vocabulary.
    """
    if logits.stride(-1) != 1:
        raise ValueError(f"logits have strides {logits.stride()}, expected a last axis without gaps")
    num_rows, vocab_size = logits.shape
    out = torch.empty(num_rows, dtype=torch.long, device=logits.device)
    _gumbel_argmax_kernel[(num_rows,)](
        logits, temperatures, seeds, positions, out, logits.stride(0), vocab_size, **_settings(vocab_size)
    )
    return out
