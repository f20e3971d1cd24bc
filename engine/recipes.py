"""Recipes: how canonical weights are made from a checkpoint's tensors.

A recipe maps a canonical name to the source tensors stacked to make it. Names and shapes are compared before a byte of
data is read, so a checkpoint is refused whole or loaded whole. Where the tensors come from (a state dict, safetensors,
GGUF) is the `Source`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import ModelConfig

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Part:
    """One source tensor of a canonical one: its name, the shape it must have, and how its rows are put right."""

    name: str
    shape: tuple[int, ...]
    fix: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Source:
    """What a checkpoint offers: shapes by name, a reader, and where it lies (for messages)."""

    where: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def from_hf_state_dict(
    config: ModelConfig, state_dict: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Canonical weights of a `transformers` model in memory.

    Args:
        config: its configuration, from `from_hf`.
        state_dict: `model.state_dict()`.
        dtype: of the result.

    Raises:
        ValueError: missing, unexpected or mis-shaped tensors, or values that are not finite.
    """
    named = {plain_name(name): tensor for name, tensor in state_dict.items() if not is_buffer(name)}
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    return assemble(hf_recipes(config), Source("state_dict", shapes, lambda name: named[name]), dtype)


def canonical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every canonical tensor of a model."""
    shapes = {}
    for name, parts in hf_recipes(config).items():
        shapes[name] = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return shapes


# --- recipes for transformers' names (without the `model.` or `gpt_neox.` in front)


def hf_recipes(config: ModelConfig) -> dict[str, list[Part]]:
    """How the canonical tensors are made from a transformers checkpoint."""
    is_neox = config.family == "gpt_neox"
    vocab, width = config.vocab_size, config.hidden_size
    recipes = {"embed.weight": [Part("embed_in.weight" if is_neox else "embed_tokens.weight", (vocab, width))]}

    def add(target: str, *sources: tuple[str, int], columns: int | None = None, bias: bool = False) -> None:
        tail = () if columns is None else (columns,)
        recipes[f"{target}.weight"] = [Part(f"{name}.weight", (rows, *tail)) for name, rows in sources]
        if bias:
            recipes[f"{target}.bias"] = [Part(f"{name}.bias", (rows,)) for name, rows in sources]

    for i in range(config.num_layers):
        (_neox_layer if is_neox else _llama_layer)(config, f"layers.{i}.", add)
        if is_neox:
            for name in (f"layers.{i}.qkv.weight", f"layers.{i}.qkv.bias"):
                if name in recipes:
                    (part,) = recipes[name]
                    recipes[name] = [Part(part.name, part.shape, lambda t: _split_heads(t, config.num_heads))]
    add("final_norm", ("final_layer_norm" if is_neox else "norm", width), bias=is_neox)
    if not config.tied_head:
        add("lm_head", ("lm_head", vocab), columns=width)
    return recipes


def _llama_layer(config: ModelConfig, at: str, add: Callable[..., None]) -> None:
    width, wide, head = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * head, config.num_kv_heads * head
    add(f"{at}attn_norm", (f"{at}input_layernorm", width))
    attention = f"{at}self_attn."
    add(
        f"{at}qkv", (f"{attention}q_proj", q), (f"{attention}k_proj", kv), (f"{attention}v_proj", kv),
        columns=width, bias=config.qkv_bias,
    )  # fmt: skip
    add(f"{at}o", (f"{attention}o_proj", width), columns=q, bias=config.o_bias)
    if config.qk_norm:
        add(f"{at}q_norm", (f"{attention}q_norm", head))
        add(f"{at}k_norm", (f"{attention}k_norm", head))
    if config.post_norms:
        add(f"{at}attn_post_norm", (f"{at}post_attention_layernorm", width))
        add(f"{at}mlp_norm", (f"{at}pre_feedforward_layernorm", width))
        add(f"{at}mlp_post_norm", (f"{at}post_feedforward_layernorm", width))
    else:
        add(f"{at}mlp_norm", (f"{at}post_attention_layernorm", width))
    bias = config.mlp_bias
    add(f"{at}up", (f"{at}mlp.gate_proj", wide), (f"{at}mlp.up_proj", wide), columns=width, bias=bias)
    add(f"{at}down", (f"{at}mlp.down_proj", width), columns=wide, bias=bias)


def _neox_layer(config: ModelConfig, at: str, add: Callable[..., None]) -> None:
    width, wide, all_heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    add(f"{at}attn_norm", (f"{at}input_layernorm", width), bias=True)
    add(f"{at}mlp_norm", (f"{at}post_attention_layernorm", width), bias=True)
    attention, mlp = f"{at}attention.", f"{at}mlp."
    add(f"{at}qkv", (f"{attention}query_key_value", 3 * all_heads), columns=width, bias=config.qkv_bias)
    add(f"{at}o", (f"{attention}dense", width), columns=all_heads, bias=config.o_bias)
    add(f"{at}up", (f"{mlp}dense_h_to_4h", wide), columns=width, bias=config.mlp_bias)
    add(f"{at}down", (f"{mlp}dense_4h_to_h", width), columns=wide, bias=config.mlp_bias)


def _split_heads(fused: Tensor, num_heads: int) -> Tensor:
    """GPT-NeoX stores q, k, v of head 0, then of head 1, ...; canonical is all q, all k, all v."""
    return fused.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def plain_name(name: str) -> str:
    """A transformers name without the wrappers that differ between releases and classes."""
    for wrapper in ("language_model.model.", "model.language_model.", "model.", "gpt_neox."):
        if name.startswith(wrapper):
            return name[len(wrapper) :]
    name = name.removeprefix("language_model.")
    return "lm_head.weight" if name == "embed_out.weight" else name


def is_buffer(name: str) -> bool:
    """Constants that old checkpoints stored beside the weights: rotary frequencies and causal masks."""
    return name.endswith((".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"))


def is_vision(name: str) -> bool:
    return name.removeprefix("model.").startswith(("vision_tower.", "multi_modal_projector."))


# --- putting a checkpoint together


def assemble(
    recipes: Mapping[str, list[Part]], source: Source, dtype: torch.dtype, progress: Progress | None = None
) -> dict[str, Tensor]:
    """Check a checkpoint against its recipes, then read it.

    Args:
        recipes: canonical name -> parts stacked along the first axis.
        source: the checkpoint.
        dtype: of the result.
        progress: called with (bytes done, bytes in all), counted in `dtype`.

    Returns:
        Canonical weights, contiguous, on the CPU.

    Raises:
        ValueError: a tensor is missing, unexpected, mis-shaped, or holds values that are not finite in `dtype`.
    """
    parts = {part.name: part for made_of in recipes.values() for part in made_of}
    (embedding,) = recipes["embed.weight"]
    head = embedding.name.replace("embed_tokens", "lm_head").replace("embed_in", "lm_head")
    head = head.replace("token_embd", "output")
    is_doubled = head not in parts and head in source.shapes  # a tied head that was stored all the same
    check_names(parts.keys(), source.shapes.keys() - ({head} if is_doubled else set()), source.where)
    for name, part in parts.items():
        if source.shapes[name] != part.shape:
            raise ValueError(
                f"{source.where}: tensor {name} has shape {list(source.shapes[name])}, the configuration says "
                f"{list(part.shape)}; weights and configuration are not of the same model"
            )
    if is_doubled and not torch.equal(source.read(head), source.read(embedding.name)):
        raise ValueError(
            f"{source.where}: tensor {head} differs from {embedding.name}, but the configuration ties them "
            "(tie_word_embeddings); set it to false if the head is its own"
        )

    total = sum(torch.Size(part.shape).numel() for part in parts.values()) * dtype.itemsize
    done, weights = 0, {}
    for target, made_of in recipes.items():
        rows = sum(part.shape[0] for part in made_of)
        whole = torch.empty((rows, *made_of[0].shape[1:]), dtype=dtype)
        first = 0
        for part in made_of:
            piece = whole[first : first + part.shape[0]]
            tensor = source.read(part.name)
            piece.copy_(tensor if part.fix is None else part.fix(tensor))
            if not is_finite(piece):
                raise ValueError(_not_finite(tensor, part.name, source.where, dtype))
            first += part.shape[0]
            done += piece.numel() * dtype.itemsize
            if progress is not None:
                progress(done, total)
        weights[target] = whole
    return weights


def check_names(expected: Iterable[str], given: Iterable[str], where: str) -> None:
    missing, unexpected = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    if missing:
        raise ValueError(f"{where}: {_several('tensor', missing)} missing; the checkpoint is incomplete")
    if unexpected:
        raise ValueError(
            f"{where}: {_several('tensor', unexpected)} not part of this model as its configuration describes it; "
            "nothing is dropped silently, so loading stops here"
        )


def _several(noun: str, names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{noun}{'s' if len(names) > 1 else ''} {', '.join(names[:5])}{more} {'are' if len(names) > 1 else 'is'}"


def is_finite(tensor: Tensor) -> bool:
    """One pass without a mask: a NaN propagates through min and max, an infinity is one of them."""
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def _not_finite(tensor: Tensor, name: str, where: str, dtype: torch.dtype) -> str:
    if is_finite(tensor):
        return f"{where}: tensor {name} has values beyond the range of {dtype}; load it in torch.bfloat16 or float32"
    return f"{where}: tensor {name} holds NaN or infinity; the file is damaged, fetch it again"
