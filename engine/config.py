"""The decoder's configuration: every family difference as data.

`ModelConfig` is what `engine/model.py` reads; `from_hf` translates a `transformers` configuration and refuses
what it does not understand. Nothing here touches weights or devices.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .rope import RopeSpec, rope_spec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NORMS = ("rms", "layer")
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer. Sizes count elements; `windows` and `ropes` have one entry a layer."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_context: int
    ropes: tuple[RopeSpec, ...]
    windows: tuple[int | None, ...]  # a row at p sees keys p - window + 1 .. p; None sees all
    attention_scale: float
    norm: str = "rms"  # or "layer"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # Gemma stores weight - 1
    activation: str = "silu"  # or "gelu_tanh", "gelu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k, before rotary
    post_norms: bool = False  # Gemma 2/3: norms on the outputs of attention and MLP too
    parallel_residual: bool = False  # GPT-NeoX: attention and MLP read the same input
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: float = 1.0  # before rounding to the model's dtype, which the Decoder does as transformers does
    tied_head: bool = False

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
                 "intermediate_size", "max_context")  # fmt: skip
        for name in sizes:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} = {value!r}, expected a positive integer")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}")
        for name in ("ropes", "windows"):
            if len(getattr(self, name)) != self.num_layers:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for num_layers = {self.num_layers}")
        if len({len(rope.inv_freq) for rope in self.ropes}) > 1:
            raise ValueError("ropes differ in rotary_dim between layers; the decoder rotates the same places in all")
        if self.rotary_dim > self.head_dim:
            raise ValueError(f"rotary_dim = {self.rotary_dim} is more than head_dim = {self.head_dim}")
        for window in self.windows:
            if window is not None and window < 1:
                raise ValueError(f"windows has {window}, expected a positive number of keys or None")
        if self.norm not in NORMS:
            raise ValueError(f"norm = {self.norm!r}, expected one of {NORMS}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation = {self.activation!r}, expected one of {ACTIVATIONS}")
        for name in ("attention_scale", "norm_eps", "embed_scale", "attention_softcap", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} = {value!r}, expected a positive number")

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.ropes[0].inv_freq)

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads

    def to_json(self) -> dict[str, Any]:
        """A JSON document that `from_json` turns back into an equal configuration."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_json`.

        Raises:
            ValueError: naming a key that is missing or not a field of this version.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in sorted(document.keys() - fields.keys()):
            raise ValueError(f"configuration key {key!r} is not known to this version of skipstone")
        for name, field in fields.items():
            if field.default is dataclasses.MISSING and name not in document:
                raise ValueError(f"configuration key {name!r} is missing")
        values = dict(document)
        values["ropes"] = tuple(
            RopeSpec(tuple(rope["inv_freq"]), rope["attention_factor"]) for rope in document["ropes"]
        )
        values["windows"] = tuple(document["windows"])
        return cls(**values)


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Keys of a transformers configuration that no forward pass reads: identity, ids, training, bookkeeping, generation
# defaults. Dropout acts in training only.
_HARMLESS = _keys(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _experts_implementation _name_or_path architectures attention_dropout attn_implementation bos_token_id
    cache_implementation chunk_size_feed_forward classifier_dropout classifier_dropout_prob dtype embd_pdrop
    eos_token_id finetuning_task gradient_checkpointing hidden_dropout hidden_dropout_prob id2label
    initializer_range is_decoder is_llama_config label2id max_sequence_length model_type name_or_path num_labels
    output_attentions output_hidden_states output_past pad_token_id prefix problem_type resid_pdrop return_dict
    sep_token_id task_specific_params tf_legacy_loss tokenizer_class torch_dtype torchscript transformers.js_config
    transformers_version unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache
    decoder_start_token_id begin_suppress_tokens bad_words_ids diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_scores remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature top_k
    top_p typical_p
    """
)

# Keys whose other values would change the maths in a way that this decoder does not compute (or that transformers
# ignores, so that the author's intention is unknown). A family's own keys below come first.
_ONLY: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "is_encoder_decoder": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "pretraining_tp": (1,),
    "pruned_heads": ({},),
    "rope_interleaved": (False,),
    "tie_encoder_decoder": (False,),
    "trust_remote_code": (False,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
}

_SHARED = _keys(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    max_position_embeddings rms_norm_eps tie_word_embeddings rope_parameters rope_scaling rope_theta
    """
)
_QWEN = _SHARED | {"hidden_act", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
_GEMMA2 = _SHARED | {
    "hidden_activation", "attention_bias", "query_pre_attn_scalar", "sliding_window", "layer_types",
    "final_logit_softcapping",
}  # fmt: skip
_UNDERSTOOD: dict[str, frozenset[str]] = {
    "llama": _SHARED | {"hidden_act", "attention_bias", "mlp_bias"},
    "mistral": _SHARED | {"hidden_act", "sliding_window"},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"attention_bias"},
    "gemma": _SHARED | {"hidden_act", "attention_bias"},
    "gemma2": _GEMMA2 | {"attn_logit_softcapping"},
    # transformers stores attn_logit_softcapping for gemma3 but never applies it, so only null is accepted.
    "gemma3_text": _GEMMA2 | {"sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq"},
    "gpt_neox": _keys(
        """
        vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings
        layer_norm_eps tie_word_embeddings rope_parameters rope_scaling rotary_pct rotary_emb_base hidden_act
        use_parallel_residual attention_bias
        """
    ),
}
_ONLY_FOR: dict[str, dict[str, tuple[Any, ...]]] = {
    "gemma": {"hidden_activation": ("gelu_pytorch_tanh",)},
    "gemma2": {"hidden_act": ("gelu_pytorch_tanh",)},
    "gemma3_text": {"hidden_act": ("gelu_pytorch_tanh",)},
}
# Old names that transformers 4 saved beside the ones it read: accepted when they say the same.
_NEOX_ECHOES = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
_GEMMA3_WRAPPER = _keys(
    """
    text_config vision_config mm_tokens_per_image boi_token_index eoi_token_index image_token_index boi_token_id
    eoi_token_id image_token_id tie_word_embeddings
    """
)
FAMILIES = (*_UNDERSTOOD, "gemma3")

_ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",  # the same formula under its older names
    "gelu_fast": "gelu_tanh",
}


def from_hf(config: PretrainedConfig | Mapping[str, Any]) -> ModelConfig:
    """Translate a `transformers` configuration.

    Args:
        config: a configuration object, or the dictionary of a `config.json`, in the form of transformers 4 or 5.
            `gemma3` (with a vision part) gives its text decoder.

    Returns:
        The decoder's configuration.

    Raises:
        ValueError: naming the key, for a family that is not supported, code of its own (`auto_map`), a key that is
            not understood, or a value that this decoder does not compute.
    """
    is_document = isinstance(config, Mapping)
    given = copy.deepcopy(dict(config)) if isinstance(config, Mapping) else config.to_dict()
    if given.get("auto_map") is not None:
        raise ValueError(
            f"auto_map = {given['auto_map']!r}: this model wants to run Python code from its own repository, which "
            f"skipstone never does; use a checkpoint of one of the families {', '.join(FAMILIES)}"
        )
    family = given.get("model_type")
    if family == "gemma3":
        return _gemma3_text(given)
    if family not in _UNDERSTOOD:
        raise ValueError(f"model_type = {family!r} is not supported, expected one of {', '.join(FAMILIES)}")
    _refuse_unknown(given, family)
    if is_document:
        config = _standardise(given, family)
    return _translate(config, given, family)


def _gemma3_text(given: dict[str, Any]) -> ModelConfig:
    """The text decoder of a Gemma 3 with vision; whether its head is tied is said outside `text_config`."""
    for key in sorted(given.keys() - _GEMMA3_WRAPPER - _HARMLESS):
        _check_only(key, given[key], "gemma3", _ONLY)
    text = given.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError(f"text_config = {text!r}, expected the configuration of gemma3's text decoder")
    return from_hf({**text, "model_type": "gemma3_text", "tie_word_embeddings": given.get("tie_word_embeddings", True)})


def _refuse_unknown(given: Mapping[str, Any], family: str) -> None:
    """Every key must be read, harmless, or at the only value that is computed; a null that nobody reads is absent."""
    only = {**_ONLY, **_ONLY_FOR.get(family, {})}
    echoes = _NEOX_ECHOES.keys() if family == "gpt_neox" else set()
    for key in sorted(given.keys() - _UNDERSTOOD[family] - _HARMLESS - echoes):
        _check_only(key, given[key], family, only)


def _check_only(key: str, value: Any, family: str, only: Mapping[str, tuple[Any, ...]]) -> None:
    if value is None:
        return
    if key == "quantization_config":
        raise ValueError(
            "quantization_config: this checkpoint stores quantised weights, which need their own kernels; load the "
            "unquantised checkpoint, or a GGUF file of it"
        )
    if key not in only:
        raise ValueError(
            f"configuration key {key!r} (= {value!r}) of model_type {family!r} is not understood; it may change what "
            "the model computes, so loading stops here. Remove it if you know that it does not"
        )
    if value not in only[key]:
        accepted = " or ".join(repr(choice) for choice in only[key])
        raise ValueError(f"{key} = {value!r} is not supported for model_type {family!r}, expected {accepted}")


def _standardise(given: Mapping[str, Any], family: str) -> PretrainedConfig:
    """Let transformers fill defaults and bring rope keys of any age into `rope_parameters`.

    Nulls are passed on: for keys such as `sliding_window` a null says "none", where absence says the family's default.
    """
    from transformers import AutoConfig

    read = {key: value for key, value in given.items() if key in _UNDERSTOOD[family]}
    return AutoConfig.for_model(family, **read)


def _translate(hf: Any, given: Mapping[str, Any], family: str) -> ModelConfig:
    num_layers, hidden_size, num_heads = hf.num_hidden_layers, hf.hidden_size, hf.num_attention_heads
    head_dim = getattr(hf, "head_dim", None) or hidden_size // num_heads
    is_gemma, is_late_gemma, is_neox = "gemma" in family, family in ("gemma2", "gemma3_text"), family == "gpt_neox"
    bias = bool(getattr(hf, "attention_bias", False))
    return ModelConfig(
        family="gemma3" if family == "gemma3_text" else family,
        vocab_size=hf.vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads if is_neox else hf.num_key_value_heads,
        head_dim=head_dim,
        intermediate_size=hf.intermediate_size,
        max_context=hf.max_position_embeddings,
        ropes=_ropes(hf, given, family, head_dim),
        windows=_windows(hf, family),
        attention_scale=(hf.query_pre_attn_scalar if is_late_gemma else head_dim) ** -0.5,
        norm="layer" if is_neox else "rms",
        norm_eps=hf.layer_norm_eps if is_neox else hf.rms_norm_eps,
        norm_offset=1.0 if is_gemma else 0.0,
        activation=_activation(hf, family),
        gated_mlp=not is_neox,
        qkv_bias=bias or family == "qwen2",
        o_bias=bias,
        mlp_bias=is_neox or bool(getattr(hf, "mlp_bias", False)),
        qk_norm=family in ("qwen3", "gemma3_text"),
        post_norms=is_late_gemma,
        parallel_residual=is_neox and hf.use_parallel_residual,
        attention_softcap=hf.attn_logit_softcapping if family == "gemma2" else None,
        logit_softcap=hf.final_logit_softcapping if is_late_gemma else None,
        embed_scale=hidden_size**0.5 if is_gemma else 1.0,
        tied_head=bool(hf.tie_word_embeddings),
    )


def _activation(hf: Any, family: str) -> str:
    key = "hidden_activation" if family in ("gemma2", "gemma3_text") else "hidden_act"
    name = getattr(hf, key)
    if name not in _ACTIVATION_NAMES:
        raise ValueError(f"{key} = {name!r} is not supported, expected one of {sorted(_ACTIVATION_NAMES)}")
    # Gemma 1's published files say "gelu" and mean the tanh form (transformers #29402).
    return "gelu_tanh" if family == "gemma" and name == "gelu" else _ACTIVATION_NAMES[name]


def _layer_types(hf: Any) -> list[str]:
    kinds = list(hf.layer_types)
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"layer_types has {kind!r}, expected 'full_attention' or 'sliding_attention'")
    if len(kinds) != hf.num_hidden_layers:
        raise ValueError(f"layer_types has {len(kinds)} entries for num_hidden_layers = {hf.num_hidden_layers}")
    return kinds


def _windows(hf: Any, family: str) -> tuple[int | None, ...]:
    """Keys that each layer sees, as the family's own code reads its keys."""
    if family == "mistral":
        return (hf.sliding_window,) * hf.num_hidden_layers
    if family not in ("qwen2", "qwen3", "gemma2", "gemma3_text"):
        return (None,) * hf.num_hidden_layers
    kinds = _layer_types(hf)
    if "sliding_attention" in kinds and hf.sliding_window is None:
        raise ValueError("sliding_window is null (or use_sliding_window false), but layer_types has sliding layers")
    return tuple(hf.sliding_window if kind == "sliding_attention" else None for kind in kinds)


def _ropes(hf: Any, given: Mapping[str, Any], family: str, head_dim: int) -> tuple[RopeSpec, ...]:
    parameters, context = hf.rope_parameters, hf.max_position_embeddings
    if family == "gemma3_text":
        for key in sorted(parameters.keys() - {"full_attention", "sliding_attention"}):
            raise ValueError(f"rope_parameters.{key} is not understood beside the entries of gemma3's layer types")
        kinds = _layer_types(hf)
        specs = {}
        for kind in set(kinds):
            where = f"rope_parameters.{kind}"
            if parameters.get(kind) is None:
                raise ValueError(f"{where} is null: layers without rotary embedding are not supported")
            _refuse_partial(parameters[kind], where)
            specs[kind] = rope_spec(parameters[kind], head_dim, context, where)
        return tuple(specs[kind] for kind in kinds)
    if family == "gpt_neox":
        for old, new in _NEOX_ECHOES.items():
            if given.get(old) is not None and given[old] != parameters.get(new):
                raise ValueError(
                    f"{old} = {given[old]!r} contradicts {parameters.get(new)!r}, which rotary_pct, rotary_emb_base or "
                    "rope_parameters say; gpt_neox reads those, so correct the configuration"
                )
    else:
        _refuse_partial(parameters, "rope_parameters")
    return (rope_spec(parameters, head_dim, context),) * hf.num_hidden_layers


def _refuse_partial(parameters: Mapping[str, Any], where: str) -> None:
    """Only GPT-NeoX rotates part of a head; transformers ignores or misapplies the key elsewhere."""
    if parameters.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise ValueError(f"{where}.partial_rotary_factor = {parameters['partial_rotary_factor']!r}, expected 1.0")
