"""Gumbel noise as a function of (seed, absolute position, token id), and of nothing else.

A token is `argmax(log p + g)` (the Gumbel-max trick), so sampling is lossless under speculation when `g` is the
same number whoever asks for it: plain decoding, verification of a tree at any width, a draft head with a reduced
vocabulary, a batch mate. Hence a counter-based generator, Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel
random numbers: as easy as 1, 2, 3", SC 2011, section 3), with

    key     = (seed mod 2**32, seed >> 32)
    counter = (token_id // 4, position, 0, 0),  lane token_id % 4 of the four words r32

which is what Triton's `tl.philox(seed, token_id // 4, position, 0, 0)` returns. From a word to the noise, in fp32:

    v = min((r32 + 0.5) * 2**-32, 1 - 2**-24)        uniform on (0, 1)
    g = -log(-log1p(-v))                             standard Gumbel: -log1p(-v) is a standard exponential

Why this form and why fp32 is enough. Large noise, the end that decides an argmax, comes from small v, where floating
point is fine-grained: r32 + 0.5 is exact below 2**23, so the right tail keeps its law down to v = 2**-33
(g = 22.87) with no two steps merged. Above 2**24 the integer rounds to 24 bits, a relative error of 2**-24. Words
within 2**7 of 2**32 would round to v = 1 and log1p(-1) = -inf; the clamp puts them at the largest float below one
(g = -2.81), where they lose every argmax anyway. The usual `-log(-log(u))` has it the other way round: u rounds to 1
once in 2**25 draws, that is every few hundred tokens at V = 100k, and the token it falls on wins with +inf.

v is bit-equal on every device: integer to float conversion and the sum are correctly rounded and the product by a power
of two is exact (so a fused multiply-add gives the same). The logarithms may differ by an ulp between devices.
Within a device they are elementwise and do not depend on where in a tensor an id stands, so noise for a list of
ids equals the full row's entries bit for bit (`tests/kernels/test_noise.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

MULTIPLIER_0 = 0xD2511F53  # of counter word 0
MULTIPLIER_1 = 0xCD9E8D57  # of counter word 2
WEYL_0 = 0x9E3779B9  # added to the key after each round
WEYL_1 = 0xBB67AE85
NUM_ROUNDS = 10
MASK_32 = 0xFFFFFFFF
LARGEST_V = 1.0 - 2.0**-24
# Counter words 2 and 3 are 0 for noise, so a tag there keeps derived seeds apart from every noise word.
DERIVE_TAG = 0x534B4950


def philox_reference(
    counter: Sequence[Tensor | int], key: tuple[Tensor | int, Tensor | int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10, one round after the other as the paper writes it.

    Args:
        counter: four words, each an int64 tensor or an int in [0, 2**32); they broadcast.
        key: two words likewise; a tensor must broadcast to the counter's shape.

    Returns:
        The four output words, int64 tensors of the broadcast shape with values in [0, 2**32).
    """
    device = next((word.device for word in counter if isinstance(word, Tensor)), None)
    words = (torch.as_tensor(word, dtype=torch.int64, device=device) for word in counter)
    c0, c1, c2, c3 = torch.broadcast_tensors(*words)
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        # An int64 product of two 32-bit words wraps, but its 64 bits are right: an arithmetic shift and a mask
        # give the high word.
        product_0, product_1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0 = ((product_1 >> 32) & MASK_32) ^ c1 ^ k0
        c1 = product_1 & MASK_32
        c2 = ((product_0 >> 32) & MASK_32) ^ c3 ^ k1
        c3 = product_0 & MASK_32
        k0, k1 = (k0 + WEYL_0) & MASK_32, (k1 + WEYL_1) & MASK_32
    return c0, c1, c2, c3


def gumbel_noise_reference(seed: int, position: int, ids: Tensor) -> Tensor:
    """Noise of the given token ids at one position.

    Args:
        seed: the row's seed, in [0, 2**64).
        position: absolute position of the token to be drawn, in [0, 2**32).
        ids: token ids, int64, any shape and order.

    Returns:
        fp32 tensor of the shape of `ids`, on its device.
    """
    words = torch.stack(philox_reference((ids >> 2, position, 0, 0), (seed & MASK_32, seed >> 32)), dim=-1)
    return _gumbel_from_words_(words.gather(-1, (ids & 3).unsqueeze(-1)).squeeze(-1).to(torch.float32))


def gumbel_noise(seed: int, position: int, vocab_size: int, device: torch.device | str | None = None) -> Tensor:
    """Noise of the whole vocabulary at one position.

    Args:
        seed: the row's seed, in [0, 2**64).
        position: absolute position of the token to be drawn (its index in the sequence), in [0, 2**32).
        vocab_size: V.
        device: where to compute; the CPU by default.

    Returns:
        [V] fp32, finite.

    Raises:
        ValueError: seed, position or vocab_size out of range.
    """
    _check(seed, position)
    if vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size}, expected at least 1")
    if device is not None and torch.device(device).type != "cpu":
        return gumbel_noise_reference(seed, position, torch.arange(vocab_size, device=device))
    words = torch.from_numpy(_words_cpu(seed, position, _first_products(-(-vocab_size // 4))))
    return _gumbel_from_words_(words.view(-1)[:vocab_size].to(torch.float32))


def gumbel_noise_at(seed: int, position: int, ids: Tensor) -> Tensor:
    """Noise of some token ids: equals `gumbel_noise(seed, position, V)[ids]` bit for bit, at a cost by `len(ids)`.

    Args:
        seed: the row's seed, in [0, 2**64).
        position: absolute position of the token to be drawn, in [0, 2**32).
        ids: token ids, int64, any shape and order.

    Returns:
        fp32 tensor of the shape of `ids`, on its device.

    Raises:
        ValueError: seed or position out of range, or ids of another dtype.
    """
    _check(seed, position)
    if ids.dtype != torch.int64:
        raise ValueError(f"ids have dtype {ids.dtype}, expected torch.int64")
    if ids.device.type != "cpu":
        return gumbel_noise_reference(seed, position, ids)
    flat = ids.reshape(-1)
    words = _words_cpu(seed, position, (flat.numpy() >> 2).astype(np.uint64) * np.uint64(MULTIPLIER_0))
    lanes = torch.from_numpy(words).to(torch.float32).gather(-1, (flat & 3).unsqueeze(-1))
    return _gumbel_from_words_(lanes.view(ids.shape))


def gumbel_noise_rows(
    seeds: Sequence[int],
    positions: Sequence[int],
    ids: int | Tensor,
    device: torch.device | str | None = None,
) -> Tensor:
    """Noise of N rows, each with its own seed and position; row i is what the one-row call gives, bit for bit.

    Args:
        seeds: N seeds.
        positions: N absolute positions.
        ids: V for the whole vocabulary, or token ids [n] shared by the rows, or [N, n].
        device: for an int `ids`; ids given as a tensor stay where they are.

    Returns:
        [N, V] or [N, n] fp32.

    Raises:
        ValueError: lengths differ, or an entry is out of range.
    """
    if len(seeds) != len(positions):
        raise ValueError(f"{len(seeds)} seeds and {len(positions)} positions given, expected as many of each")
    if isinstance(ids, int):
        rows = [gumbel_noise(seed, position, ids, device) for seed, position in zip(seeds, positions, strict=True)]
        return torch.stack(rows) if rows else torch.empty(0, ids, device=device)
    shared = ids.dim() == 1
    if not shared and (ids.dim() != 2 or ids.shape[0] != len(seeds)):
        raise ValueError(f"ids have shape {tuple(ids.shape)}, expected [n] or [{len(seeds)}, n]")
    rows = [
        gumbel_noise_at(seed, position, ids if shared else ids[row])
        for row, (seed, position) in enumerate(zip(seeds, positions, strict=True))
    ]
    return torch.stack(rows) if rows else torch.empty(0, ids.shape[-1], device=ids.device)


def derive_seed(seed: int, index: int) -> int:
    """Seed of row `index` of a batch (or of returned sequence `index`) that was given one `seed`.

    Row 0 keeps `seed`, so a batch of one equals the call without a batch. Row i > 0 gets words 0 and 1 of
    Philox4x32-10 with key `seed` and counter (i mod 2**32, i >> 32, DERIVE_TAG, 1), low word first: 64 bits that
    share no counter with the noise. Alone with that seed the row gives the same tokens.

    Raises:
        ValueError: seed outside [0, 2**64) or a negative index.
    """
    _check(seed, 0)
    if index < 0 or index >= 2**64:
        raise ValueError(f"index is {index}, expected 0 <= index < 2**64")
    if index == 0:
        return seed
    counter = (index & MASK_32, index >> 32, DERIVE_TAG, 1)
    low, high, _, _ = philox_reference(counter, (seed & MASK_32, seed >> 32))
    return int(low) | int(high) << 32


def derive_seeds(seed: int, count: int) -> Tensor:
    """`derive_seed(seed, 0 .. count - 1)` as the 64 bits of int64 `[count]` (a seed of 2**63 or more is negative)."""
    _check(seed, 0)
    index = torch.arange(count)
    counter = (index & MASK_32, index >> 32, DERIVE_TAG, 1)
    low, high, _, _ = philox_reference(counter, (seed & MASK_32, seed >> 32))
    seeds = low | high << 32
    seeds[:1] = seed if seed < 2**63 else seed - 2**64
    return seeds


def _check(seed: int, position: int) -> None:
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}, expected 0 <= seed < 2**64")
    if not 0 <= position < 2**32:
        raise ValueError(f"position is {position}, expected 0 <= position < 2**32")


def _gumbel_from_words_(words: Tensor) -> Tensor:
    """r32 as fp32 (already rounded to nearest) to standard Gumbel, in place."""
    words.add_(0.5).mul_(2.0**-32).clamp_(max=LARGEST_V)
    return words.neg_().log1p_().neg_().log_().neg_()


@lru_cache(maxsize=8)
def _first_products(num_groups: int) -> np.ndarray:
    """MULTIPLIER_0 * (0 .. num_groups - 1), uint64 [G]: where every full row starts, whatever its seed and position."""
    return np.arange(num_groups, dtype=np.uint64) * np.uint64(MULTIPLIER_0)


def _words_cpu(seed: int, position: int, first_products: np.ndarray) -> np.ndarray:
    """The four words of counters (group, position, 0, 0) for G groups, given as MULTIPLIER_0 * group: uint32 [G, 4].

    The rounds of `philox_reference`, arranged for few passes over memory (a full row at V = 49152 in 0.35 ms on one
    thread where int64 tensor operations took 0.55): words 0 and 2 are the rows of one [2, G] array, words 1 and 3 stay
    the low halves of the products they came from, and the first two rounds use that half of the counter is constant.
    NumPy because it multiplies uint64 twice as fast as torch multiplies int64, and needs no mask after its shifts.
    """
    keys = [((seed & MASK_32) + r * WEYL_0 & MASK_32, (seed >> 32) + r * WEYL_1 & MASK_32) for r in range(NUM_ROUNDS)]
    swapped_keys = np.array([(k1, k0) for k0, k1 in keys], dtype=np.uint64)[:, :, None]
    multipliers = np.array([[MULTIPLIER_0], [MULTIPLIER_1]], dtype=np.uint64)
    mask, half = np.uint64(MASK_32), np.uint64(32)
    state, products, previous, shifted = np.empty((4, 2, len(first_products)), dtype=np.uint64)

    # Round 1: words 1 to 3 are constants, so word 0 becomes one number, word 1 zero and word 3 the product's low half.
    np.right_shift(first_products, half, out=state[1])
    np.bitwise_xor(state[1], np.uint64(keys[0][1]), out=state[1])
    # Round 2: the product of that one number is one number, too.
    scalar_product = MULTIPLIER_0 * (position ^ keys[0][0])
    np.multiply(state[1], np.uint64(MULTIPLIER_1), out=previous[1])
    previous[0] = scalar_product & MASK_32
    np.right_shift(previous[1], half, out=state[0])
    np.bitwise_xor(state[0], np.uint64(keys[1][0]), out=state[0])
    np.bitwise_and(first_products, mask, out=state[1])
    np.bitwise_xor(state[1], np.uint64((scalar_product >> 32) ^ keys[1][1]), out=state[1])

    for key in swapped_keys[2:]:
        np.multiply(state, multipliers, out=products)
        np.right_shift(products, half, out=shifted)
        np.bitwise_and(previous, mask, out=previous)
        np.bitwise_xor(previous, key, out=previous)
        np.bitwise_xor(shifted[1], previous[1], out=state[0])
        np.bitwise_xor(shifted[0], previous[0], out=state[1])
        products, previous = previous, products

    words = np.empty((len(first_products), 4), dtype=np.uint32)
    words[:, 0], words[:, 1], words[:, 2], words[:, 3] = state[0], previous[1], state[1], previous[0]
    return words
