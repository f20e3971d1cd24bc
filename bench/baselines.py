"""Other ways to decode the same weights: `transformers` generate, its prompt lookup and its early exit, and a loop
through torch.compile (`compiled.py`).

They compute in another order, so near-ties may fall differently: their tokens are compared with ours for information
and never fail a benchmark.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.config import ModelConfig
from ..engine.engine import Engine
from ..engine.pretrained import PACKAGED, Pretrained, load_pretrained
from ..engine.recipes import hf_recipes
from .arms import PLAIN_ARM, Arm, Outcome
from .compiled import CompiledArm

TRANSFORMERS = ("hf", "hf-lookup", "hf-early-exit")
BASELINES = (*TRANSFORMERS, CompiledArm.name)
LOOKUP_TOKENS = 10  # as the transformers documentation uses it


def load_reference(model: str, dtype: torch.dtype, device: torch.device, loaded: Pretrained | None = None) -> Any:
    """The `transformers` model with the same weights.

    Args:
        model: as given to `skipstone.load`. Hub ids and transformers' folders are read by transformers itself;
            what it cannot read (packaged models, .gguf files, converted folders) is put into its own Llama or Qwen2.
        loaded: that model, where it was read already.

    Raises:
        ValueError: a model that cannot be brought over.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = Path(model)
    if model in PACKAGED or path.suffix == ".gguf" or (path / "skipstone.json").is_file():
        loaded = loaded or load_pretrained(model, dtype, progress=False)
        reference: Any = as_transformers(loaded.config, loaded.weights, dtype, loaded.model_id)
    else:
        reference = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, trust_remote_code=False)
    return reference.to(device).eval()


def as_transformers(config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype, name: str) -> Any:
    """Canonical weights in transformers' Llama or Qwen2, by the recipes read backwards.

    Raises:
        ValueError: a model, called `name`, that is neither.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    biases = {"llama": {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}, "qwen2": {}}
    if config.family not in biases or (config.family == "llama" and config.qkv_bias != config.o_bias):
        raise ValueError(f"{name} ({config.family}) is neither a plain Llama nor a Qwen2, the kinds brought over here")
    if any(config.windows):
        raise ValueError(f"{name} has sliding windows, which are not brought over from here")
    settings = AutoConfig.for_model(
        config.family,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_context,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": _rope_base(config, name)},
        tie_word_embeddings=config.tied_head,
        bos_token_id=None,
        eos_token_id=None,
        **biases[config.family],
    )
    state = {}
    for target, parts in hf_recipes(config).items():
        pieces = weights[target].split([part.shape[0] for part in parts])
        for part, piece in zip(parts, pieces, strict=True):
            state[part.name if part.name.startswith("lm_head") else f"model.{part.name}"] = piece
    if config.tied_head:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = AutoModelForCausalLM.from_config(settings, dtype=dtype)
    expected = set(model.state_dict())
    if expected != set(state):
        raise ValueError(f"transformers' {config.family} has other tensors: {sorted(expected ^ set(state))[:5]}")
    model.load_state_dict(state)
    return model


def _rope_base(config: ModelConfig, name: str) -> float:
    """The base whose powers are the rotary frequencies.

    Raises:
        ValueError: scaled or per-layer frequencies.
    """
    (spec, *others) = set(config.ropes)
    count = len(spec.inv_freq)
    base = float(round(spec.inv_freq[1] ** -count)) if count > 1 else 10_000.0
    plain = all(math.isclose(f, base ** (-i / count), rel_tol=1e-5) for i, f in enumerate(spec.inv_freq))
    if others or spec.attention_factor != 1.0 or not plain:
        raise ValueError(f"{name} scales its rotary frequencies, which is not brought over from here")
    return base


class TransformersArm:
    """`transformers` generate as an arm.

    Args:
        name: one of `TRANSFORMERS`.
        model: from `load_reference`.
        engine: whose tokenizer and stop ids are used.
        exit_layer: of early exit.
    """

    lossless, plain = False, PLAIN_ARM

    def __init__(self, name: str, model: Any, engine: Engine, exit_layer: int) -> None:
        if name not in TRANSFORMERS:
            raise ValueError(f"unknown baseline {name!r}; expected one of {', '.join(TRANSFORMERS)}")
        self.name, self.model, self.engine = name, model, engine
        self.options: dict[str, Any] = {
            "hf": {},
            "hf-lookup": {"prompt_lookup_num_tokens": LOOKUP_TOKENS},
            "hf-early-exit": {"assistant_early_exit": exit_layer},
        }[name]

    def run(self, prompt_ids: list[int], sampling: Mapping[str, Any]) -> Outcome:
        from transformers import StoppingCriteriaList

        ids = torch.tensor([prompt_ids], device=self.model.device)
        clock = _FirstTokens(len(prompt_ids))
        tokenizer = self.engine.tokenizer
        stop_ids = list(tokenizer.stop_ids) if tokenizer is not None else []
        options = dict(self.options) | _translated(sampling)
        if stop_ids:
            options |= {"eos_token_id": stop_ids, "pad_token_id": stop_ids[0]}
        torch.manual_seed(int(sampling.get("seed", 0)) % 2**63)
        start = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                stopping_criteria=StoppingCriteriaList([clock]),
                **options,
            )
        token_ids = out[0, len(prompt_ids) :].tolist()
        end = time.perf_counter()
        return Outcome(
            text="" if tokenizer is None else tokenizer.decode(token_ids),
            token_ids=token_ids,
            wall_ms=1e3 * (end - start),
            decode_ms=1e3 * (end - (clock.first or end)),
            decode_tokens=max(0, len(token_ids) - clock.count),
        )

    def describe(self) -> dict[str, Any]:
        return {"program": "transformers", **self.options}


class _FirstTokens:
    """A stopping criterion that stops nothing: it notes when the first tokens stood, which is where prefill ended."""

    def __init__(self, prompt_len: int) -> None:
        self.prompt_len, self.count, self.first = prompt_len, 0, 0.0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if not self.first:
            self.first, self.count = time.perf_counter(), input_ids.shape[1] - self.prompt_len
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _translated(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Our sampling options in transformers' words.

    Raises:
        ValueError: one that has no counterpart there.
    """
    options: dict[str, Any] = {"max_new_tokens": sampling.get("max_new_tokens", 128), "use_cache": True}
    temperature = sampling.get("temperature", 0.0)
    options |= {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    unknown = set(sampling) - {"max_new_tokens", "temperature", "seed"}
    if unknown:
        raise ValueError(f"options {sorted(unknown)} are not passed on to transformers")
    return options


def baseline_arms(names: Sequence[str], model: str, engine: Engine) -> list[Arm]:
    """The baselines by name, over one model.

    Raises:
        ValueError: an unknown name, weights that the baseline cannot load, or a device that it is not for.
    """
    device = engine.decoder.device
    wrong = [name for name in names if name not in BASELINES]
    if wrong:
        raise ValueError(f"unknown baselines {wrong}; expected some of {', '.join(BASELINES)}")
    if CompiledArm.name in names and device.type != "cuda":
        raise ValueError(f"baseline 'compile' is a CUDA graph, and the model is on {device}: leave it out")
    arms: list[Arm] = []
    loaded = None
    if CompiledArm.name in names:
        loaded = load_pretrained(model, engine.decoder.dtype, progress=False)
        arms = [CompiledArm(loaded, engine)]
    own = [name for name in dict.fromkeys(names) if name in TRANSFORMERS]
    if not own:
        return arms
    reference = load_reference(model, engine.decoder.dtype, device, loaded)
    exit_layer = max(1, engine.decoder.config.num_layers // 2)
    trained = [layer for layer in engine.heads.exits if layer] if engine.heads is not None else []
    if trained:
        exit_layer = min(trained, key=lambda layer: abs(layer - exit_layer))
    return [*(TransformersArm(name, reference, engine, exit_layer) for name in own), *arms]
