"""Rotary frequencies, computed once from the configuration.

Every scheme here gives each position its own angle: `position * inv_freq`, with `inv_freq` a function of the
configuration alone (design rule 7). Schemes whose frequencies follow the length of a forward pass (dynamic NTK,
LongRoPE past its short range) would let a row's keys depend on its batch mates or on the round, and are refused.

Sources: RoFormer, arXiv:2104.09864, equation 15 (default); position interpolation, arXiv:2306.15595 (linear); YaRN,
arXiv:2309.00071, section 3.2 "NTK-by-parts" and section 3.3 (yarn); LongRoPE, arXiv:2402.13753 (longrope); Llama 3.1's
published reference code, `apply_scaling` (llama3). The arithmetic is fp32 as in the code the models were trained with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding of one layer: `inv_freq` and the factor on cos and sin.

    `inv_freq` holds rotary_dim / 2 angular frequencies (radians per position), scaling already applied, so a
    row's angle is a function of its own position only (design rule 7).
    """

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        if not self.inv_freq:
            raise ValueError("inv_freq is empty: rotary embedding needs at least one frequency")
        if not all(math.isfinite(f) and f >= 0 for f in self.inv_freq):
            raise ValueError(f"inv_freq must be finite and not negative, got {self.inv_freq}")
        if not (math.isfinite(self.attention_factor) and self.attention_factor > 0):
            raise ValueError(f"attention_factor must be finite and positive, got {self.attention_factor}")


# What each scheme reads beside the keys every scheme has; anything else in the dict is refused by name.
_BASE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_SCHEME_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
    "longrope": {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"},
}


def rope_spec(
    parameters: Mapping[str, Any], head_dim: int, max_context: int, where: str = "rope_parameters"
) -> RopeSpec:
    """The frequencies of one rope dictionary, in the form transformers 5 keeps it.

    Args:
        parameters: `rope_theta`, `rope_type` and that scheme's keys; a null value counts as absent.
        head_dim: width of a head; `partial_rotary_factor` of it is rotated.
        max_context: positions the model is configured for.
        where: what the dictionary is called in messages.

    Returns:
        A RopeSpec with ceil(int(head_dim * partial_rotary_factor) / 2) frequencies.

    Raises:
        ValueError: naming the key, when a scheme is unknown, refused by design rule 7, or a key is missing or unread.
    """
    given = {key: value for key, value in parameters.items() if value is not None}
    scheme = given.get("rope_type", given.get("type", "default"))
    if scheme == "dynamic":
        raise ValueError(
            f"{where}.rope_type is 'dynamic': its frequencies follow the longest sequence of a forward pass, so a "
            "token's result would depend on what runs beside it; use a checkpoint with linear, llama3 or yarn scaling"
        )
    if scheme not in _SCHEME_KEYS:
        raise ValueError(f"{where}.rope_type is {scheme!r}, expected one of {sorted(_SCHEME_KEYS)}")
    for key in sorted(given.keys() - _BASE_KEYS - _SCHEME_KEYS[scheme]):
        raise ValueError(f"{where}.{key} = {given[key]!r} is not understood for rope_type {scheme!r}")

    reader = _Reader(given, where)
    base, fraction = reader.positive("rope_theta"), reader.positive("partial_rotary_factor", 1.0)
    rotary_dim = int(head_dim * fraction)
    if not 1 <= rotary_dim <= head_dim:
        raise ValueError(
            f"{where}.partial_rotary_factor = {fraction} rotates {rotary_dim} of {head_dim} head places; "
            "expected at least 1 and no more than all"
        )
    inv_freq = _plain(base, rotary_dim)
    attention_factor = 1.0
    if scheme == "linear":
        inv_freq = inv_freq / reader.positive("factor")
    elif scheme == "llama3":
        inv_freq = _llama3(inv_freq, reader, max_context)
    elif scheme == "yarn":
        inv_freq, attention_factor = _yarn(base, rotary_dim, reader, max_context)
    elif scheme == "longrope":
        inv_freq, attention_factor = _longrope(base, rotary_dim, reader, max_context)
    return RopeSpec(tuple(inv_freq.tolist()), attention_factor)


class _Reader:
    """Typed access to a rope dictionary with messages that name the key."""

    def __init__(self, given: Mapping[str, Any], where: str) -> None:
        self.given, self.where = given, where

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.given.get(key, default)
        if value is None:
            raise ValueError(f"{self.where}.{key} is missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            raise ValueError(f"{self.where}.{key} = {value!r}, expected a positive number")
        return float(value)

    def numbers(self, key: str, length: int) -> Tensor:
        values = self.given.get(key)
        if not isinstance(values, list | tuple) or len(values) != length:
            size = len(values) if isinstance(values, list | tuple) else repr(values)
            raise ValueError(f"{self.where}.{key} must be a list of {length} numbers, got {size}")
        return torch.tensor(values, dtype=torch.float32)


def _plain(base: float, rotary_dim: int) -> Tensor:
    """base ** (-2i / rotary_dim), fp32 `[ceil(rotary_dim / 2)]`."""
    return 1.0 / (base ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim))


def _llama3(inv_freq: Tensor, reader: _Reader, max_context: int) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor = reader.positive("factor")
    low, high = reader.positive("low_freq_factor"), reader.positive("high_freq_factor")
    if high <= low:
        raise ValueError(
            f"{reader.where}.high_freq_factor = {high} must be greater than {reader.where}.low_freq_factor = {low}"
        )
    trained = reader.positive("original_max_position_embeddings", max_context)
    wavelength = 2 * math.pi / inv_freq
    blend = (trained / wavelength - low) / (high - low)
    between = (1 - blend) * inv_freq / factor + blend * inv_freq
    scaled = torch.where(wavelength > trained / low, inv_freq / factor, between)
    return torch.where(wavelength < trained / high, inv_freq, scaled)


def _yarn(base: float, rotary_dim: int, reader: _Reader, max_context: int) -> tuple[Tensor, float]:
    """Interpolate slow dimensions, keep fast ones, a linear ramp between; and the temperature on cos and sin."""
    trained = reader.positive("original_max_position_embeddings", max_context)
    factor = reader.positive("factor", max_context / trained)
    fast, slow = reader.positive("beta_fast", 32), reader.positive("beta_slow", 1)

    def dimension(rotations: float) -> float:
        """The place whose frequency turns `rotations` times over the trained context."""
        return rotary_dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))

    first, last = dimension(fast), dimension(slow)
    if reader.given.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    if first == last:
        last += 0.001
    powers = base ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    places = torch.arange(len(powers), dtype=torch.float32)
    keep = 1 - ((places - first) / (last - first)).clamp(0, 1)
    inv_freq = 1.0 / (factor * powers) * (1 - keep) + 1.0 / powers * keep

    def temperature(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if "attention_factor" in reader.given:
        return inv_freq, reader.positive("attention_factor")
    mscale, over_all = reader.given.get("mscale"), reader.given.get("mscale_all_dim")
    if mscale and over_all:
        return inv_freq, temperature(float(mscale)) / temperature(float(over_all))
    return inv_freq, temperature(1.0)


def _longrope(base: float, rotary_dim: int, reader: _Reader, max_context: int) -> tuple[Tensor, float]:
    """The short list, if the context never leaves its range or both lists agree; otherwise refused."""
    trained = reader.positive("original_max_position_embeddings", max_context)
    factor = reader.positive("factor", max_context / trained)
    num_freqs = (rotary_dim + 1) // 2
    short, long = reader.numbers("short_factor", num_freqs), reader.numbers("long_factor", num_freqs)
    if max_context > trained and not torch.equal(short, long):
        raise ValueError(
            f"{reader.where}.rope_type is 'longrope' with a context of {max_context} beyond "
            f"{reader.where}.original_max_position_embeddings = {trained:.0f}: its frequencies switch with the "
            f"sequence length, which a cached key cannot follow; set max_position_embeddings to {trained:.0f}"
        )
    default = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    powers = base ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    return 1.0 / (short * powers), reader.positive("attention_factor", default)
