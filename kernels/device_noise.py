"""The Gumbel noise of `noise.py` inside Triton kernels: device functions, imported by the operations that draw.

The same words and the same v, bit for bit; of -log1p(-v) a series below 2**-7 and `-log(1 - v)` above, within 1e-5 of
`noise`'s g. Both functions work out each number from (seed, position, id) alone, so they agree with each other.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the PyTorch paths run
    triton = None

if triton is not None:

    @triton.jit
    def gumbel_of_words(words):  # type: ignore[no-untyped-def]
        """fp32 g of uint32 words."""
        v = tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
        small = v * (1.0 + v * (0.5 + v * (0.33333333 + v * 0.25)))
        return -tl.log(tl.where(v < 0.0078125, small, -tl.log(1.0 - v)))

    @triton.jit
    def gumbel_at(seeds, positions, ids):  # type: ignore[no-untyped-def]
        """Noise of any ids. `ids` int32 of the full shape; `seeds` (int64) and `positions` (int32) broadcast to it."""
        zero = ids * 0
        w0, w1, w2, w3 = tl.philox(seeds, ids // 4, zero + positions, zero, zero)
        lane = ids % 4
        return gumbel_of_words(tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3)))

    @triton.jit
    def gumbel_run(seeds, positions, groups):  # type: ignore[no-untyped-def]
        """Noise of four ids a group, 4 g to 4 g + 3, side by side: `groups` [.., N] gives [.., 4 N] at a quarter of the
        cost. The groups stand on the last axis in full shape; `seeds` and `positions` broadcast to them."""
        zero = groups * 0
        w0, w1, w2, w3 = tl.philox(seeds, groups, zero + positions, zero, zero)
        return gumbel_of_words(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)))
