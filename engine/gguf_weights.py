"""GGUF files as a source of weights: metadata to a configuration, quantised tensors to fp32 ones.

What a key or a tensor means per architecture is llama.cpp's: its converter stores Llama's q and k with rotary pairs
interleaved, Gemma's norm weights with 1 added, and Llama 3's rope scaling as a tensor of divisors. All that is undone
here, so that the rest of the engine never knows where weights came from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor

from .config import ModelConfig
from .recipes import Part, Source, hf_recipes
from .rope import RopeSpec, rope_spec

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")

_METADATA = ("GGUF.", "general.", "tokenizer.", "quantize.", "split.")
_SHARED = {
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon",
    "attention.value_length", "block_count", "context_length", "embedding_length", "feed_forward_length",
    "rope.dimension_count", "rope.freq_base", "rope.scaling.factor", "rope.scaling.finetuned",
    "rope.scaling.original_context_length", "rope.scaling.type", "vocab_size",
}  # fmt: skip
_OWN = {
    "gemma2": {"attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"},
    "gemma3": {
        "attention.sliding_window", "attention.sliding_window_pattern", "final_logit_softcapping", "rope.freq_base_swa",
    },
}  # fmt: skip
_WIDE_SCALE_LAYERS = {"gemma2": 46, "gemma3": 62}  # the 27B models scale by hidden_size / num_heads
_ROPE_DIVISORS = "rope_freqs.weight"

# transformers' part of a name -> llama.cpp's; the norms after attention and before the MLP differ by family.
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_OUTER_NAMES = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight",
                "lm_head.weight": "output.weight"}  # fmt: skip


def read_gguf(path: Path) -> GGUFReader:
    """A GGUF file's fields and tensors, read once for weights and tokenizer: a vocabulary of 150,000 takes gguf six
    seconds. `forget_gguf` lets go of them.

    Raises:
        ValueError: not a GGUF file.
    """
    about = path.stat()
    try:
        return _reader(path, about.st_mtime_ns, about.st_size)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ValueError(f"{path} is not a readable GGUF file: {error}") from error


@lru_cache(maxsize=1)
def _reader(path: Path, changed: int, size: int) -> GGUFReader:
    return GGUFReader(path)


forget_gguf = _reader.cache_clear


def open_gguf(path: Path) -> tuple[ModelConfig, dict[str, list[Part]], Source]:
    """Read a GGUF file's metadata.

    Args:
        path: the file.

    Returns:
        The configuration, the recipes of the canonical tensors, and the source that dequantises on reading.

    Raises:
        ValueError: not a GGUF file, an architecture or a metadata key that is not understood.
    """
    reader = read_gguf(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in tensors.items()}

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        try:
            return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).reshape(shapes[name])
        except NotImplementedError as error:
            raise ValueError(
                f"{path}: tensor {name} is quantised as {tensor.tensor_type.name}, which the gguf package cannot undo; "
                "use a file in another quantisation such as Q8_0, Q4_K or Q4_0"
            ) from error

    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    config = gguf_config(metadata, shapes, str(path))
    if _ROPE_DIVISORS in shapes:
        config = _divide_ropes(config, read(_ROPE_DIVISORS), str(path))
        del shapes[_ROPE_DIVISORS]
    return config, _recipes(config, metadata["general.architecture"]), Source(str(path), shapes, read)


def gguf_config(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> ModelConfig:
    """A GGUF file's configuration.

    Args:
        metadata: key -> value, without the tokenizer's.
        shapes: tensor name -> shape, from which vocabulary, biases and tying are seen.
        where: the file, for messages.

    Raises:
        ValueError: naming the key that is missing, not understood or not supported.
    """
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ValueError(f"{where}: general.architecture = {arch!r}, expected one of {', '.join(ARCHITECTURES)}")
    if metadata.get("split.count", 0) > 1:
        raise ValueError(
            f"{where}: split.count = {metadata['split.count']}; join the parts with llama-gguf-split first"
        )
    known = {f"{arch}.{key}" for key in _SHARED | _OWN.get(arch, set())}
    for key in sorted(metadata.keys() - known):
        if not key.startswith(_METADATA):
            raise ValueError(f"{where}: metadata key {key} = {metadata[key]!r} is not understood for {arch}")
    if "token_embd.weight" not in shapes:
        raise ValueError(f"{where}: tensor token_embd.weight is missing; the file is incomplete")

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{arch}.{key}", default)
        if value is None:
            raise ValueError(f"{where}: metadata key {arch}.{key} is missing")
        return value

    width, num_heads, num_layers = get("embedding_length"), get("attention.head_count"), get("block_count")
    num_kv_heads = get("attention.head_count_kv", num_heads)
    for key, value in (("head_count", num_heads), ("head_count_kv", num_kv_heads), ("feed_forward_length", 0)):
        if isinstance(value, list):
            raise ValueError(f"{where}: {arch}.attention.{key} differs between layers, which is not supported")
    head_dim = get("attention.key_length", width // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, head_dim) != head_dim:
            raise ValueError(f"{where}: {arch}.{key} = {get(key)}, expected the head's width {head_dim}")
    windows = _windows(arch, num_layers, get)
    is_gemma, is_late_gemma = arch.startswith("gemma"), arch in ("gemma2", "gemma3")
    wide = num_layers == _WIDE_SCALE_LAYERS.get(arch)
    return ModelConfig(
        family=arch,
        vocab_size=shapes["token_embd.weight"][0],
        hidden_size=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=get("feed_forward_length"),
        max_context=get("context_length"),
        ropes=_ropes(arch, windows, head_dim, get, where),
        windows=windows,
        attention_scale=(width / num_heads if wide else head_dim) ** -0.5,
        norm_eps=get("attention.layer_norm_rms_epsilon"),
        norm_offset=1.0 if is_gemma else 0.0,
        activation="gelu_tanh" if is_gemma else "silu",
        qkv_bias="blk.0.attn_q.bias" in shapes,
        o_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_up.bias" in shapes,
        qk_norm=arch in ("qwen3", "gemma3"),
        post_norms=is_late_gemma,
        attention_softcap=get("attn_logit_softcapping", 50.0) if arch == "gemma2" else None,
        logit_softcap=metadata.get(f"{arch}.final_logit_softcapping", 30.0 if arch == "gemma2" else None),
        embed_scale=width**0.5 if is_gemma else 1.0,
        tied_head="output.weight" not in shapes,
    )


def _windows(arch: str, num_layers: int, get: Any) -> tuple[int | None, ...]:
    if arch not in ("gemma2", "gemma3"):
        return (None,) * num_layers
    window = get("attention.sliding_window", 4096 if arch == "gemma2" else None)
    pattern = get("attention.sliding_window_pattern", 6) if arch == "gemma3" else 2
    if isinstance(pattern, list):
        return tuple(window if slides else None for slides in pattern)
    return tuple(window if (i + 1) % pattern else None for i in range(num_layers))


def _ropes(arch: str, windows: tuple[int | None, ...], head_dim: int, get: Any, where: str) -> tuple[RopeSpec, ...]:
    scaling = get("rope.scaling.type", "none")
    parameters: dict[str, Any] = {"rope_theta": get("rope.freq_base", 10000.0)}
    if scaling != "none":
        parameters |= {"rope_type": scaling, "factor": get("rope.scaling.factor")}
        if scaling == "yarn":
            parameters["original_max_position_embeddings"] = get("rope.scaling.original_context_length")
    full = rope_spec(parameters, head_dim, get("context_length"), f"{where}: {arch}.rope.scaling")
    if arch != "gemma3":
        return (full,) * len(windows)
    local = rope_spec({"rope_theta": get("rope.freq_base_swa", 10000.0)}, head_dim, get("context_length"), where)
    return tuple(full if window is None else local for window in windows)


def _divide_ropes(config: ModelConfig, divisors: Tensor, where: str) -> ModelConfig:
    """Llama 3's scaling, which GGUF stores as one divisor for each frequency."""
    inv_freq = torch.tensor(config.ropes[0].inv_freq)
    if divisors.shape != inv_freq.shape or not bool((divisors > 0).all()):
        raise ValueError(f"{where}: tensor {_ROPE_DIVISORS} must hold {len(inv_freq)} positive numbers")
    spec = RopeSpec(tuple((inv_freq / divisors).tolist()), config.ropes[0].attention_factor)
    return dataclasses.replace(config, ropes=(spec,) * config.num_layers)


def _recipes(config: ModelConfig, arch: str) -> dict[str, list[Part]]:
    """transformers' recipes with llama.cpp's names and what its converter did undone."""
    names = {**_NAMES, "post_attention_layernorm": "post_attention_norm" if config.post_norms else "ffn_norm"}

    def part(source: Part) -> Part:
        if source.name in _OUTER_NAMES:
            name = _OUTER_NAMES[source.name]
        else:
            _, layer, rest = source.name.split(".", 2)
            middle, kind = rest.rsplit(".", 1)
            name = f"blk.{layer}.{names[middle]}.{kind}"
        fix = None
        if config.norm_offset and name.endswith("norm.weight"):
            fix = _minus_one
        if arch == "llama" and ".attn_q." in name:
            fix = _unpermute(config.num_heads)
        if arch == "llama" and ".attn_k." in name:
            fix = _unpermute(config.num_kv_heads)
        return Part(name, source.shape, fix)

    return {target: [part(source) for source in made_of] for target, made_of in hf_recipes(config).items()}


def _minus_one(weight: Tensor) -> Tensor:
    return weight - 1.0


def _unpermute(num_heads: int) -> Any:
    """Rotary pairs from neighbours (0, 1), (2, 3), ... back to halves (0, d/2), (1, d/2 + 1), ..."""
    return lambda rows: rows.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
