"""Shared fixtures: tiny random models of every family, with the features of that family's real checkpoints.

`family` runs a test once per model; `tiny_hf(family)` is the transformers model (the parity reference) and
`tiny(family)` the same weights as this engine reads them. Both are made once per process from a fixed seed.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network; read when huggingface_hub is imported

import pytest
import torch
from skipstone.engine.config import ModelConfig, from_hf
from skipstone.engine.recipes import from_hf_state_dict
from torch import Tensor

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers share the cores

_SIZES: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
_GEMMA3_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}
_NEOX = {k: v for k, v in _SIZES.items() if k != "num_key_value_heads"} | {"hidden_size": 64}
_NEOX |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}}

# name -> (transformers' model_type, what differs from the sizes above)
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", _SIZES | {"num_key_value_heads": 4}),
    "llama3": ("llama", _SIZES | {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama_linear": (
        "llama",
        _SIZES
        | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}
        | {"attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("mistral", _SIZES | {"sliding_window": 8, "head_dim": 20}),
    "qwen2": ("qwen2", _SIZES | {"tie_word_embeddings": True}),
    "qwen2_window": (
        "qwen2",
        _SIZES
        | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
        | {"rope_parameters": _YARN_ROPE},
    ),
    "qwen3": ("qwen3", _SIZES | {"head_dim": 24}),
    "gemma": ("gemma", _SIZES | {"num_key_value_heads": 1, "head_dim": 20}),
    "gemma2": (
        "gemma2",
        _SIZES
        | {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8}
        | {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 6.0},
    ),
    "gemma3": (
        "gemma3_text",
        _SIZES
        | {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8, "sliding_window_pattern": 3}
        | {"rope_parameters": _GEMMA3_ROPES},
    ),
    "gpt_neox": ("gpt_neox", _NEOX),
    "gpt_neox_sequential": ("gpt_neox", _NEOX | {"use_parallel_residual": False, "tie_word_embeddings": True}),
}


@functools.cache
def _tiny_hf(family: str) -> Any:
    """A transformers model, fp32, eval, eager attention, weights drawn so that every part matters to the logits."""
    import copy

    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings = _MODELS[family]
    settings = copy.deepcopy(settings) | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(1234)
    is_tied, is_gemma = config.tie_word_embeddings, "gemma" in model_type
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif parameter.ndim == 1:  # norms; Gemma stores weight - 1 and its small embeddings want a large last one
                centre = 5.0 if name == "model.norm.weight" and is_gemma else 0.0
                parameter.copy_(0.3 * noise + (centre if is_gemma else 1.0))
            elif "embed" in name:
                parameter.copy_(noise * (1.0 if not is_tied else 0.05 if is_gemma else 0.3))
            else:
                gain = 2.5 if "lm_head" in name else 2.0 if model_type == "gpt_neox" else 1.4
                parameter.copy_(noise * gain / math.sqrt(parameter.shape[1]))
    return model.requires_grad_(False)


@functools.cache
def _tiny(family: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    model = _tiny_hf(family)
    config = from_hf(model.config)
    return config, from_hf_state_dict(config, model.state_dict())


@pytest.fixture(params=list(_MODELS))
def family(request: pytest.FixtureRequest) -> str:
    """Each tiny model in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def families() -> list[str]:
    """The names of all tiny models."""
    return list(_MODELS)


@pytest.fixture(scope="session")
def tiny_hf() -> Callable[[str], Any]:
    """`tiny_hf(family)` -> the transformers model; shared, so do not change it."""
    return _tiny_hf


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], tuple[ModelConfig, dict[str, Tensor]]]:
    """`tiny(family)` -> configuration and canonical fp32 weights; the tensors are shared, the dict is a copy."""

    def build(family: str) -> tuple[ModelConfig, dict[str, Tensor]]:
        config, weights = _tiny(family)
        return config, dict(weights)

    return build


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is no CUDA device, and say so."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch sees none here")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
