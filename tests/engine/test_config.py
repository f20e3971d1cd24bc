"""Configurations: what published files mean, what is refused, and rope frequencies against transformers' own."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from skipstone.engine.config import ModelConfig, from_hf
from skipstone.engine.rope import RopeSpec, rope_spec

# config.json as published (transformers 4 form), shortened only by keys that say nothing about the maths.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"dtype": "q4"},
    "use_cache": True,
    "vocab_size": 49152,
}
LLAMA3 = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "max_position_embeddings": 32768,
    "vocab_size": 32000,
}
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA = {
    "model_type": "gemma",
    "attention_bias": False,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
GEMMA2 = {
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 128,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 144,
    "rms_norm_eps": 1e-06,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
PYTHIA = {
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}


def expect(config: ModelConfig, **values) -> None:
    assert {name: getattr(config, name) for name in values} == values


def test_llama():
    config = from_hf(LLAMA)
    expect(config, num_kv_heads=3, head_dim=64, tied_head=True, windows=(None,) * 30, norm="rms", qkv_bias=False)
    assert config.ropes[0].inv_freq[1] == pytest.approx(100000 ** (-2 / 64))
    assert config.attention_scale == 64**-0.5


def test_llama3_scaling():
    """Fast frequencies stay, slow ones are divided by 8."""
    scaled, plain = from_hf(LLAMA3).ropes[0].inv_freq, from_hf({**LLAMA3, "rope_scaling": None}).ropes[0].inv_freq
    assert scaled[0] == plain[0]
    assert scaled[-1] == pytest.approx(plain[-1] / 8)


def test_mistral_windows():
    expect(from_hf(MISTRAL), windows=(4096,) * 32, head_dim=128)
    expect(from_hf({**MISTRAL, "sliding_window": None}), windows=(None,) * 32)  # a null is not the default of 4096


def test_qwen2():
    expect(from_hf(QWEN2), qkv_bias=True, o_bias=False, windows=(None,) * 24, tied_head=True)
    sliding = from_hf({**QWEN2, "use_sliding_window": True, "sliding_window": 4096})
    expect(sliding, windows=(None,) * 21 + (4096,) * 3)  # the first max_window_layers see everything


def test_gemma():
    expect(from_hf(GEMMA), activation="gelu_tanh", norm_offset=1.0, embed_scale=2048**0.5, tied_head=True, head_dim=256)


def test_gemma2():
    config = from_hf(GEMMA2)
    expect(config, attention_softcap=50.0, logit_softcap=30.0, post_norms=True, attention_scale=144**-0.5)
    assert config.windows == (4096, None) * 23
    expect(from_hf({**GEMMA2, "final_logit_softcapping": None}), logit_softcap=None)


def test_gemma3_with_vision_gives_its_text_decoder():
    config = from_hf(GEMMA3_4B)
    expect(config, family="gemma3", vocab_size=262208, num_heads=8, qk_norm=True, tied_head=True)
    assert config.windows == tuple(None if i % 6 == 5 else 1024 for i in range(34))
    local, everywhere = config.ropes[0], config.ropes[5]
    assert local.inv_freq[1] == pytest.approx(10000 ** (-2 / 256))
    assert everywhere.inv_freq[1] == pytest.approx(1e6 ** (-2 / 256) / 8)


def test_pythia():
    config = from_hf(PYTHIA)
    expect(config, norm="layer", parallel_residual=True, gated_mlp=False, activation="gelu", rotary_dim=16)
    expect(config, qkv_bias=True, o_bias=True, mlp_bias=True, num_kv_heads=8)
    assert from_hf({**PYTHIA, "rope_theta": 10000, "partial_rotary_factor": 0.25}) == config  # 4.43's echoes


def test_objects_and_documents_agree(family, tiny_hf):
    config = tiny_hf(family).config
    document = json.loads(config.to_json_string(use_diff=False))
    assert from_hf(config) == from_hf(document)


def test_json_round_trip(family, tiny):
    config, _ = tiny(family)
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_json_is_strict(tiny):
    document = tiny("llama2")[0].to_json()
    with pytest.raises(ValueError, match="'shiny' is not known"):
        ModelConfig.from_json({**document, "shiny": 1})
    del document["head_dim"]
    with pytest.raises(ValueError, match="'head_dim' is missing"):
        ModelConfig.from_json(document)


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (LLAMA, {"fancy_scale": 2.0}, "'fancy_scale'"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA, {"pretraining_tp": 2}, "pretraining_tp = 2"),
        (LLAMA, {"rope_interleaved": True}, "rope_interleaved"),
        (LLAMA, {"hidden_act": "relu"}, "hidden_act = 'relu'"),
        (LLAMA, {"sliding_window": 4096}, "'sliding_window'"),  # transformers' Llama would ignore it
        (LLAMA, {"model_type": "mamba"}, "model_type = 'mamba'"),
        (LLAMA, {"is_encoder_decoder": True}, "is_encoder_decoder"),
        (LLAMA, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0, "wobble": 1}}, r"rope_parameters\.wobble"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": -2.0}}, r"rope_parameters\.factor = -2.0"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (MISTRAL, {"attention_bias": True}, "attention_bias = True"),
        (MISTRAL, {"layer_types": ["full_attention"] * 32}, "'layer_types'"),
        (QWEN2, {"use_mrope": True}, "use_mrope"),
        (QWEN2, {"layer_types": ["full_attention"] * 23 + ["sliding_attention"]}, "sliding_window is null"),
        (GEMMA, {"hidden_activation": "gelu"}, "hidden_activation"),
        (GEMMA2, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA2, {"layer_types": ["chunked_attention"] * 46}, "layer_types has 'chunked_attention'"),
        (GEMMA3_4B, {"text_config": None}, "text_config"),
        (GEMMA3_4B, {"text_config": {"attn_logit_softcapping": 50.0}}, "attn_logit_softcapping"),
        (GEMMA3_4B, {"fancy_scale": 2.0}, "'fancy_scale'"),
        (PYTHIA, {"rope_theta": 5000}, "rope_theta = 5000 contradicts"),
        (PYTHIA, {"alibi": True}, "'alibi'"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(base, changes, message):
    with pytest.raises(ValueError, match=message):
        from_hf({**base, **changes})


@pytest.mark.hazard(20)
@pytest.mark.parametrize("model_type", ["llama", "internlm"])
def test_configurations_that_bring_code_are_refused(model_type):
    auto_map = {"AutoConfig": "configuration_internlm.Config"}
    with pytest.raises(ValueError, match="auto_map.*never does"):
        from_hf({**LLAMA, "model_type": model_type, "auto_map": auto_map})


def test_an_unknown_key_of_an_object_is_refused():
    from transformers import LlamaConfig

    with pytest.raises(ValueError, match="'fancy_scale'"):
        from_hf(LlamaConfig(fancy_scale=2.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads = 4 is not a multiple of num_kv_heads = 3"),
        ({"num_layers": 5}, "ropes has 4 entries"),
        ({"windows": (None,)}, "windows has 1 entries"),
        ({"windows": (0, None, None, None)}, "windows has 0"),
        ({"head_dim": 8}, "rotary_dim"),
        ({"norm": "batch"}, "norm = 'batch'"),
        ({"activation": "relu"}, "activation = 'relu'"),
        ({"attention_scale": 0.0}, "attention_scale"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"hidden_size": 48.0}, "hidden_size = 48.0"),
        ({"logit_softcap": -30.0}, "logit_softcap"),
    ],
)
def test_model_config_validates(changes, message, tiny):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny("llama2")[0], **changes)


# --- rope


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {"rope_theta": 500000.0, **LLAMA3["rope_scaling"]},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
    "yarn, every key": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 8.0,
        "original_max_position_embeddings": 16384,
        "beta_fast": 24,
        "beta_slow": 2,
        "mscale": 0.707,
        "mscale_all_dim": 1.3,
        "truncate": False,
    },
    "yarn, own temperature": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 2.0,
        "original_max_position_embeddings": 65536,
        "attention_factor": 1.25,
    },
    "longrope, short range only": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 131072,
        "short_factor": [1.0 + i / 8 for i in range(32)],
        "long_factor": [2.0 + i for i in range(32)],
    },
}


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_equal_transformers(name):
    """Bit for bit: the same fp32 arithmetic. Planted bug seen: floor and ceil of yarn's range exchanged."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = ROPES[name]
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=dict(parameters)
    )
    expected = LlamaRotaryEmbedding(config)
    spec = rope_spec(parameters, head_dim=64, max_context=131072)
    assert torch.equal(torch.tensor(spec.inv_freq), expected.inv_freq)
    assert spec.attention_factor == expected.attention_scaling


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "rope_type is 'dynamic'"),
        ({**ROPES["longrope, short range only"], "original_max_position_embeddings": 4096}, "longrope.*switch"),
        ({**ROPES["longrope, short range only"], "short_factor": [1.0]}, "short_factor must be a list of 32"),
        ({"rope_type": "spiral", "rope_theta": 1e4}, "'spiral'"),
        ({"rope_type": "default", "rope_theta": 1e4, "factor": 8.0}, r"\.factor = 8.0 is not understood"),
        ({"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2]}, "mrope_section"),
        ({"rope_type": "linear", "rope_theta": 1e4}, r"\.factor is missing"),
        ({"rope_type": "default"}, r"\.rope_theta is missing"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 1.5}, "partial_rotary_factor = 1.5"),
        ({**ROPES["llama3"], "low_freq_factor": 4.0}, "high_freq_factor = 4.0 must be greater"),
        ({"rope_theta": True}, "rope_theta = True"),
    ],
)
def test_ropes_that_are_refused(parameters, message):
    """Among them all whose angle at a position would depend on anything but that position (design rule 7)."""
    with pytest.raises(ValueError, match=message):
        rope_spec(parameters, head_dim=64, max_context=131072)


def test_longrope_with_one_list_is_static():
    factors = [1.0 + i / 8 for i in range(32)]
    spec = rope_spec({**ROPES["longrope, short range only"], "original_max_position_embeddings": 4096,
                      "short_factor": factors, "long_factor": factors}, 64, 131072)  # fmt: skip
    assert spec.attention_factor == math.sqrt(1 + math.log(4.0) / math.log(4096))


@pytest.mark.parametrize("arguments", [((),), ((1.0, float("nan")),), ((-1.0,),), ((1.0,), 0.0)])
def test_rope_spec_validates(arguments):
    with pytest.raises(ValueError):
        RopeSpec(*arguments)
