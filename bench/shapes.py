"""Models by their shapes, for measurements that need no trained weights: bytes and times are those of real ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..engine.config import ModelConfig, from_hf
from ..engine.recipes import canonical_shapes

_QWEN = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768}
_DOCUMENTS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
        "rope_theta": 1e5, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": _QWEN | {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": _QWEN | {
        "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip
_TINY = {"vocab_size": 1027, "hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 4,
         "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
         "max_position_embeddings": 1024}  # fmt: skip
_GEMMA = {"query_pre_attn_scalar": 48, "sliding_window": 40}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 40},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 64},
    "gemma": {"num_key_value_heads": 1, "head_dim": 64},
    "gemma2": _GEMMA | {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA | {"sliding_window_pattern": 3},
    "gpt_neox": {"rotary_pct": 0.25},
}
SHAPES = tuple(_DOCUMENTS)
FAMILIES = tuple(_FAMILIES)


def shape_config(name: str, num_layers: int | None = None) -> ModelConfig:
    """The configuration of a real model's shape, optionally with fewer layers.

    Raises:
        ValueError: a name that is not in `SHAPES`.
    """
    if name not in _DOCUMENTS:
        raise ValueError(f"no shape {name!r}; expected one of {', '.join(SHAPES)}")
    config = from_hf(_DOCUMENTS[name])
    if num_layers is None:
        return config
    return replace(config, num_layers=num_layers, ropes=config.ropes[:num_layers], windows=config.windows[:num_layers])


def tiny_config(family: str) -> ModelConfig:
    """A small model of a family, with the features of its real checkpoints.

    Raises:
        ValueError: a name that is not in `FAMILIES`.
    """
    if family not in _FAMILIES:
        raise ValueError(f"no family {family!r}; expected one of {', '.join(FAMILIES)}")
    sizes = dict(_TINY)
    if family == "gpt_neox":  # its configurations have no names for these
        del sizes["num_key_value_heads"], sizes["head_dim"]
    return from_hf(sizes | _FAMILIES[family] | {"model_type": family})


def random_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> dict[str, Tensor]:
    """Canonical weights, normal, of such a size that every layer matters to the logits."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, shape in canonical_shapes(config).items():
        noise = torch.randn(shape, generator=generator, device=device)
        if len(shape) == 2:
            noise *= shape[1] ** -0.5
        else:
            noise = 0.1 * noise + (1.0 - config.norm_offset if name.endswith("norm.weight") else 0.0)
        weights[name] = noise.to(dtype)
    return weights


def weight_bytes(config: ModelConfig, itemsize: int = 2) -> int:
    """Bytes of weights that a decode step reads: all, but of an embedding that is not the LM head as well only rows."""
    read = [shape for name, shape in canonical_shapes(config).items() if config.tied_head or name != "embed.weight"]
    return itemsize * sum(torch.Size(shape).numel() for shape in read)
