"""Which model a head set belongs to.

The fingerprint is a SHA-256 over evenly spread numbers of the embedding and of the first and last layer, rounded to
bfloat16. A bf16 and an fp32 load of one checkpoint agree. Magnitudes under 2**-13 count as zero because float16
cannot hold them all exactly: so a float16 load of a bf16 checkpoint agrees too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SAMPLES_PER_TENSOR = 65_536
SMALLEST_MAGNITUDE = 2.0**-13


@dataclass(frozen=True)
class BaseIdentity:
    """The base model as a head set names it.

    Args:
        model_id: name or hub id, for people and for finding shipped sets.
        fingerprint: `base_fingerprint` of its weights, hex.
        tokenizer_sha256: `tokenizer_sha256` of its tokenizer, hex, or None where there is none.
        revision: the hub revision or package version, or None.
    """

    model_id: str
    fingerprint: str
    tokenizer_sha256: str | None = None
    revision: str | None = None


def base_fingerprint(weights: Mapping[str, Tensor], num_layers: int) -> str:
    """SHA-256 hex of a base's weights.

    Args:
        weights: canonical names -> tensors of any float dtype, before any packing (`embed.weight`,
            `layers.{i}.*`, ...).
        num_layers: L; layers 0 and L - 1 are read.

    Raises:
        ValueError: the embedding, the first or the last layer is absent.
    """
    prefixes = ("layers.0.", f"layers.{num_layers - 1}.")
    names = sorted(name for name in weights if name == "embed.weight" or name.startswith(prefixes))
    missing = [p for p in ("embed.weight", *prefixes) if not any(n.startswith(p) for n in names)]
    if missing:
        raise ValueError(f"no tensors named {missing} among {len(weights)}: expected the decoder's canonical names")
    digest = hashlib.sha256()
    for name in names:
        flat = weights[name].detach().reshape(-1)
        # Spread by integer arithmetic: a float step would pick other places at other sizes of float.
        count = min(SAMPLES_PER_TENSOR, flat.numel())
        places = torch.arange(count, device=flat.device) * flat.numel() // count
        sample = flat[places].to(torch.bfloat16)
        sample = sample.masked_fill(sample.float().abs() < SMALLEST_MAGNITUDE, 0.0).cpu()
        digest.update(f"{name}{list(weights[name].shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """SHA-256 hex of a tokenizer's vocabulary: token strings and their ids (`get_vocab()`), sorted."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary, ensure_ascii=True).encode()).hexdigest()
