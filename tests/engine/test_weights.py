"""Checkpoints: what is read equals what was written, and everything doubtful is refused with its name."""

from __future__ import annotations

import json
import os
import struct

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file, save_file
from skipstone.engine.config import ModelConfig
from skipstone.engine.recipes import canonical_shapes, from_hf_state_dict
from skipstone.engine.rope import RopeSpec
from skipstone.engine.weights import load_checkpoint, load_converted, save_converted

FP32 = torch.float32


def assert_same(weights, expected, **tolerance):
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        if tolerance:
            torch.testing.assert_close(tensor, expected[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)
        else:
            assert torch.equal(tensor, expected[name]), name


@pytest.fixture
def llama_folder(tiny_hf, tmp_path):
    """An untied Llama as transformers saves it; tests damage it."""
    tiny_hf("llama2").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def rewrite(folder, change):
    """Apply `change` to the tensors of model.safetensors."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- transformers folders


def test_single_file(family, tiny, tiny_hf, tmp_path):
    tiny_hf(family).save_pretrained(tmp_path)
    config, weights, folder = load_checkpoint(tmp_path, FP32)
    expected_config, expected = tiny(family)
    assert config == expected_config
    assert folder == tmp_path
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == canonical_shapes(config)
    assert_same(weights, expected)


def test_shards_dtype_and_progress(tiny, tiny_hf, tmp_path):
    tiny_hf("gemma3").save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    seen = []
    _, weights, _ = load_checkpoint(tmp_path, torch.bfloat16, progress=lambda done, total: seen.append((done, total)))
    assert_same(weights, {name: tensor.bfloat16() for name, tensor in tiny("gemma3")[1].items()})
    total = sum(tensor.nbytes for tensor in weights.values())
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)


def test_names_of_other_releases(tiny, tiny_hf, tmp_path):
    """Pythia's published files: the head is `embed_out`, and masks and frequencies lie beside the weights."""
    tiny_hf("gpt_neox").save_pretrained(tmp_path)

    def age(tensors):
        head = next(name for name in ("lm_head.weight", "embed_out.weight") if name in tensors)
        tensors["embed_out.weight"] = tensors.pop(head)
        tensors["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 4, 4)
        tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
        tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(2)

    rewrite(tmp_path, age)
    assert_same(load_checkpoint(tmp_path, FP32)[1], tiny("gpt_neox")[1])


def test_gemma3_with_vision(tiny, tiny_hf, tmp_path):
    """The text decoder is taken, the vision tower left; a stray tensor elsewhere is still refused."""
    model = tiny_hf("gemma3")
    model.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))

    def wrap(tensors):
        for name in list(tensors):
            tensors[f"language_model.{name}"] = tensors.pop(name)
        tensors["vision_tower.patch.weight"] = torch.ones(2)
        tensors["multi_modal_projector.weight"] = torch.ones(2)

    rewrite(tmp_path, wrap)
    assert_same(load_checkpoint(tmp_path, FP32)[1], tiny("gemma3")[1])
    rewrite(tmp_path, lambda tensors: tensors.update({"audio_tower.weight": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"audio_tower\.weight"):
        load_checkpoint(tmp_path, FP32)


def test_a_tied_head_stored_all_the_same(tiny, tiny_hf, tmp_path):
    tiny_hf("llama3").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert_same(load_checkpoint(tmp_path, FP32)[1], tiny("llama3")[1])
    rewrite(tmp_path, lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from .*tie_word_embeddings"):
        load_checkpoint(tmp_path, FP32)


@pytest.mark.hazard(17)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"layers\.1\.mlp\.up_proj\.weight is missing"),
        (lambda t: t.pop("lm_head.weight"), r"lm_head\.weight is missing"),
        (lambda t: t.update({"model.layers.0.router.weight": torch.ones(1)}), r"router\.weight is not part"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}), r"q_proj\.bias is not part"),
        (lambda t: t.update({"model.norm.weight": torch.ones(47)}), r"norm\.weight has shape \[47\].*\[48\]"),
        (lambda t: t.update({"norm.weight": torch.ones(48)}), r"are the same weight"),
        (lambda t: t.update({"model.norm.weight": torch.ones(48).to(torch.int8)}), r"norm\.weight is stored as I8"),
    ],
)
def test_wrong_tensors_are_refused(llama_folder, change, message):
    rewrite(llama_folder, change)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(llama_folder, FP32)


@pytest.mark.hazard(18)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(llama_folder, value):
    rewrite(llama_folder, lambda t: t["model.layers.2.self_attn.k_proj.weight"].view(-1)[77].fill_(value))
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn\.k_proj\.weight holds NaN or infinity"):
        load_checkpoint(llama_folder, FP32)


def test_values_beyond_fp16_are_refused(llama_folder):
    rewrite(llama_folder, lambda t: t["model.norm.weight"][3].fill_(1e5))
    with pytest.raises(ValueError, match=r"norm\.weight has values beyond the range of torch\.float16"):
        load_checkpoint(llama_folder, torch.float16)
    load_checkpoint(llama_folder, torch.bfloat16)


@pytest.mark.hazard(19)
@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/tmp/evil.safetensors", "sub/evil.safetensors", "..\\evil.safetensors", "m.bin", 3]
)
def test_shard_index_cannot_leave_the_folder(tiny_hf, tmp_path, monkeypatch, name):
    """Refused before anything is opened; the file that the index points at exists and is valid."""
    folder = tmp_path / "model"
    tiny_hf("llama2").save_pretrained(folder, max_shard_size="100KB")
    save_file({"model.norm.weight": torch.ones(48)}, tmp_path / "evil.safetensors")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {"model.norm.weight": name})
    monkeypatch.setattr("skipstone.engine.weights.safe_open", lambda *_, **__: pytest.fail("a file was opened"))
    with pytest.raises(ValueError, match=r"model\.norm\.weight in .*nothing was loaded"):
        load_checkpoint(folder, FP32)


def test_index_and_shards_must_agree(tiny_hf, tmp_path):
    tiny_hf("llama2").save_pretrained(tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    moved = weight_map | {"model.norm.weight": weight_map["model.embed_tokens.weight"]}
    assert moved != weight_map
    edit_json(index, weight_map=moved)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is (missing|not part)"):
        load_checkpoint(tmp_path, FP32)
    (tmp_path / weight_map["model.norm.weight"]).unlink()
    with pytest.raises(ValueError, match=f"{weight_map['model.norm.weight']}, which is not in"):
        load_checkpoint(tmp_path, FP32)
    edit_json(index, weight_map={})
    with pytest.raises(ValueError, match="no weight_map"):
        load_checkpoint(tmp_path, FP32)


@pytest.mark.hazard(20)
def test_pickles_are_refused(llama_folder):
    """The planted pickle would write a file when read."""
    (llama_folder / "model.safetensors").unlink()
    witness = llama_folder / "witness"

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(witness),)

    torch.save({"model.norm.weight": Attack()}, llama_folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: pickles can run code"):
        load_checkpoint(llama_folder, FP32)
    assert not witness.exists()


@pytest.mark.hazard(20)
def test_code_of_a_checkpoint_is_refused(llama_folder):
    edit_json(llama_folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (llama_folder / "modeling_evil.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(ValueError, match="auto_map"):
        load_checkpoint(llama_folder, FP32)


def test_folders_that_hold_no_model(tmp_path, llama_folder):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_checkpoint(tmp_path, FP32)
    with pytest.raises(ValueError, match="dtype = torch.int8"):
        load_checkpoint(llama_folder, torch.int8)
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        load_checkpoint(llama_folder / "config.json", FP32)
    (llama_folder / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        load_checkpoint(llama_folder, FP32)
    (llama_folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        load_checkpoint(llama_folder, FP32)
    (llama_folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_checkpoint(llama_folder, FP32)


# --- the hub


def test_hub_ids(llama_folder, monkeypatch):
    """Only files that cannot hold code are asked for, at the revision given."""
    asked = {}

    def snapshot_download(hub_id, **arguments):
        asked.update(arguments, hub_id=hub_id)
        return str(llama_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    _, _, folder = load_checkpoint("some/llama", FP32, revision="abc")
    assert folder == llama_folder
    assert (asked["hub_id"], asked["revision"]) == ("some/llama", "abc")
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in asked["allow_patterns"])


def test_no_network_is_said(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(*_, **__):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match="some/llama is no local folder.*no connection.*network"):
        load_checkpoint("some/llama", FP32)
    for typo in ("./no/such/folder", "nofolder", "missing.gguf"):
        with pytest.raises(FileNotFoundError, match="does not exist; expected a model folder"):
            load_checkpoint(typo, FP32)


# --- converted weights


def test_converted_round_trip(family, tiny, tmp_path):
    config, weights = tiny(family)
    save_converted(tmp_path / "cache" / "model", config, weights, attach=lambda f: (f / "tokenizer").write_text("t"))
    loaded_config, loaded = load_converted(tmp_path / "cache" / "model")
    assert loaded_config == config
    assert_same(loaded, weights)
    assert (tmp_path / "cache" / "model" / "tokenizer").read_text() == "t"
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["model"]


def test_converted_again_replaces(tiny, tmp_path):
    for family in ("llama2", "gemma"):
        save_converted(tmp_path / "model", *tiny(family))
    assert load_converted(tmp_path / "model")[0] == tiny("gemma")[0]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError])
def test_an_interrupted_save_leaves_the_old_state(tiny, tmp_path, fault):
    save_converted(tmp_path / "model", *tiny("llama2"))

    def interrupt(_):
        raise fault

    with pytest.raises(fault):
        save_converted(tmp_path / "model", *tiny("gemma"), attach=interrupt)
    assert load_converted(tmp_path / "model")[0] == tiny("llama2")[0]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.hazard(18)
def test_a_flipped_bit_is_noticed(tiny, tmp_path):
    """safetensors itself loads it without a word."""
    save_converted(tmp_path / "model", *tiny("llama2"))
    file = tmp_path / "model" / "weights.safetensors"
    payload = bytearray(file.read_bytes())
    payload[-3] ^= 1
    file.write_bytes(payload)
    load_file(file)
    with pytest.raises(ValueError, match=r"weights\.safetensors does not match its recorded SHA-256"):
        load_converted(tmp_path / "model")


def test_converted_folders_that_are_refused(tiny, tmp_path):
    config, weights = tiny("llama2")
    poisoned = weights | {"final_norm.weight": torch.full((48,), torch.nan)}
    with pytest.raises(ValueError, match=r"final_norm\.weight holds NaN"):
        save_converted(tmp_path / "model", config, poisoned)
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        save_converted(tmp_path / "model", config, {k: v for k, v in weights.items() if k != "lm_head.weight"})
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape"):
        save_converted(tmp_path / "model", config, weights | {"lm_head.weight": torch.ones(198, 48)})
    with pytest.raises(ValueError, match=r"torch\.bfloat16.*torch\.float32"):
        save_converted(tmp_path / "model", config, weights | {"lm_head.weight": torch.ones(199, 48).bfloat16()})
    assert not list(tmp_path.iterdir())
    save_converted(tmp_path / "model", config, weights)
    edit_json(tmp_path / "model" / "skipstone.json", format_version=99)
    with pytest.raises(ValueError, match=r"skipstone\.json is .* version 99, expected .* version 1"):
        load_converted(tmp_path / "model")
    with pytest.raises(ValueError, match=r"has no skipstone\.json"):
        load_converted(tmp_path)


# --- GGUF, written as llama.cpp's converter does

_INNER = {
    "attn_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "attn_post_norm": "post_attention_norm",
    "mlp_post_norm": "post_ffw_norm",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "o": "attn_output",
    "down": "ffn_down",
}
_OUTER = {"embed": "token_embd", "final_norm": "output_norm", "lm_head": "output"}


def gguf_tensors(arch, config, weights):
    """Canonical weights under llama.cpp's names, q and k of Llama with rotary pairs made neighbours."""

    def permute(rows, num_heads):
        return rows.reshape(num_heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)

    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for name, tensor in weights.items():
        stem, kind = name.rsplit(".", 1)
        if stem in _OUTER:
            parts = {_OUTER[stem]: tensor}
        else:
            _, layer, inner = stem.split(".")
            if inner == "qkv":
                parts = dict(zip(("attn_q", "attn_k", "attn_v"), tensor.split([q, kv, kv]), strict=True))
                if arch == "llama":
                    parts["attn_q"] = permute(parts["attn_q"], config.num_heads)
                    parts["attn_k"] = permute(parts["attn_k"], config.num_kv_heads)
            elif inner == "up":
                parts = dict(zip(("ffn_gate", "ffn_up"), tensor.chunk(2), strict=True))
            else:
                parts = {_INNER[inner]: tensor}
            parts = {f"blk.{layer}.{part}": rows for part, rows in parts.items()}
        for part, rows in parts.items():
            shift = 1.0 if config.norm_offset and part.endswith("norm") else 0.0
            yield f"{part}.{kind}", (rows + shift).contiguous().numpy()


def write_gguf(path, arch, config, weights, extra=(), quantise=None, tensors=()):
    writer = GGUFWriter(path, arch)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    for key, value in dict(extra).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{arch}.{key}", value)
    for name, array in [*gguf_tensors(arch, config, weights), *tensors]:
        if quantise is not None and array.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(array, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GEMMA2_KEYS = {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 6.0, "attention.sliding_window": 8}
GEMMA3_KEYS = {
    "rope.freq_base": 1e6,
    "rope.scaling.type": "linear",
    "rope.scaling.factor": 8.0,
    "attention.sliding_window": 8,
    "attention.sliding_window_pattern": 3,
}
YARN_KEYS = {
    "rope.freq_base": 1e6,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}


@pytest.mark.parametrize(
    ("family", "arch", "keys", "known_difference"),
    [
        ("llama2", "llama", {"rope.freq_base": 10000.0, "rope.dimension_count": 12}, {}),
        ("llama_linear", "llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {}),
        ("qwen2", "qwen2", {"rope.freq_base": 10000.0}, {}),
        ("qwen2_window", "qwen2", YARN_KEYS, {"windows": (None,) * 4}),  # llama.cpp's files do not say windows
        ("qwen3", "qwen3", {"rope.freq_base": 10000.0}, {}),
        ("gemma", "gemma", {}, {}),
        # llama.cpp knows query_pre_attn_scalar by the model's depth only; the tiny model's 24 is not a published one
        ("gemma2", "gemma2", GEMMA2_KEYS, {"attention_scale": 16**-0.5}),
        ("gemma3", "gemma3", GEMMA3_KEYS, {"attention_scale": 16**-0.5}),
    ],
)
def test_gguf(family, arch, keys, known_difference, tiny, tmp_path):
    config, weights = tiny(family)
    write_gguf(tmp_path / "model.gguf", arch, config, weights, keys)
    loaded_config, loaded, place = load_checkpoint(tmp_path / "model.gguf", FP32)
    assert place == tmp_path / "model.gguf"
    expected = {**config.to_json(), **known_difference, "family": arch, "norm_eps": pytest.approx(config.norm_eps)}
    assert loaded_config.to_json() == expected
    # Gemma's norms went through + 1 and - 1 in fp32.
    assert_same(loaded, weights, **({"rtol": 0, "atol": 2e-7} if config.norm_offset else {}))


def test_gguf_llama3_rope_is_a_tensor_of_divisors(tiny, tmp_path):
    config, weights = tiny("llama3")
    scaled = np.array(config.ropes[0].inv_freq, dtype=np.float32)
    plain = 1 / (500000.0 ** (np.arange(0, 12, 2, dtype=np.float32) / 12))
    divisors = [("rope_freqs.weight", (plain / scaled).astype(np.float32))]
    write_gguf(tmp_path / "model.gguf", "llama", config, weights, {"rope.freq_base": 500000.0}, tensors=divisors)
    loaded, _, _ = load_checkpoint(tmp_path / "model.gguf", FP32)
    assert loaded.ropes[0].inv_freq == pytest.approx(config.ropes[0].inv_freq, rel=1e-6)
    assert divisors[0][1].max() > 7.9


def test_gguf_llama_scores_equal_ggml_rotation(tiny, tmp_path):
    """An independent statement of the permutation: ggml rotates the file's rows as neighbours (2i, 2i + 1), and
    attention scores equal those of our rows rotated as halves (i, i + d/2). Planted bug seen: q not unpermuted."""
    config, weights = tiny("llama2")
    write_gguf(tmp_path / "model.gguf", "llama", config, weights, {"rope.freq_base": 10000.0})
    loaded_config, loaded, _ = load_checkpoint(tmp_path / "model.gguf", FP32)
    stored = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    hidden = torch.randn(2, config.hidden_size, generator=torch.Generator().manual_seed(5))
    num_heads, width = config.num_heads, config.head_dim
    freqs = torch.tensor(loaded_config.ropes[0].inv_freq)

    def rotated(rows, position, pair):
        """One head's vector per row of `rows [H * d, D]`, its pairs turned as complex numbers."""
        x = (rows @ hidden[position]).view(num_heads, width)
        places = torch.arange(width // 2)
        first, second = (2 * places, 2 * places + 1) if pair == "neighbours" else (places, places + width // 2)
        return torch.complex(x[:, first], x[:, second]) * torch.polar(
            torch.ones_like(freqs), (3 + 4 * position) * freqs
        )

    def scores(q_rows, k_rows, pair):
        return (rotated(q_rows, 0, pair) * rotated(k_rows, 1, pair).conj()).sum(-1).real

    theirs = scores(stored["blk.1.attn_q.weight"], stored["blk.1.attn_k.weight"], "neighbours")
    q_rows, k_rows, _ = loaded["layers.1.qkv.weight"].chunk(3)
    torch.testing.assert_close(scores(q_rows, k_rows, "halves"), theirs)


def wide_model():
    """Rows of 64 and 96 places, as block quantisation wants multiples of 32."""
    rope = RopeSpec(tuple(1e4 ** (-i / 8) for i in range(8)))
    config = ModelConfig("llama", 64, 64, 2, 4, 2, 16, 96, 128, (rope,) * 2, (None,) * 2, 0.25, tied_head=True)
    generator = torch.Generator().manual_seed(3)
    return config, {name: torch.randn(s, generator=generator) for name, s in canonical_shapes(config).items()}


@pytest.mark.parametrize(
    ("kind", "error"), [(GGMLQuantizationType.Q8_0, 0.5 / 127 + 2**-11), (GGMLQuantizationType.F16, 2**-11)]
)
def test_gguf_dequantises(kind, error, tmp_path):
    """Each value within half a step of its row's largest; Q8_0 also rounds its block's step to fp16."""
    config, weights = wide_model()
    write_gguf(tmp_path / "model.gguf", "llama", config, weights, quantise=kind)
    _, loaded, _ = load_checkpoint(tmp_path / "model.gguf", FP32)
    for name, tensor in loaded.items():
        bound = 1.01 * error * weights[name].abs().amax(-1, keepdim=True) if tensor.ndim == 2 else 0.0
        assert bool(((tensor - weights[name]).abs() <= bound).all()), name


@pytest.mark.parametrize(
    ("arch", "keys", "message"),
    [
        ("mamba", {}, "general.architecture = 'mamba'"),
        ("llama", {"expert_count": 8}, "llama.expert_count = 8 is not understood"),
        ("llama", {"attention.sliding_window": 8}, "llama.attention.sliding_window"),
        ("llama", {"rope.dimension_count": 6}, "rope.dimension_count = 6, expected the head's width 12"),
        ("llama", {"rope.scaling.type": "dynamic", "rope.scaling.factor": 2.0}, "'dynamic'"),
        ("qwen2", {}, r"blk\.0\.attn_q\.bias.*missing|not part"),
    ],
)
def test_gguf_refusals(arch, keys, message, tiny, tmp_path):
    config, weights = tiny("llama2")
    if arch == "qwen2":
        weights |= {"layers.1.qkv.bias": torch.ones(144)}  # on one layer only
    write_gguf(tmp_path / "model.gguf", arch, config, weights, keys)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "model.gguf", FP32)


def test_gguf_damage(tiny, tmp_path):
    config, weights = tiny("llama2")
    path = tmp_path / "model.gguf"
    weights["final_norm.weight"] = torch.full((48,), torch.inf)
    write_gguf(path, "llama", config, weights)
    with pytest.raises(ValueError, match=r"output_norm\.weight holds NaN or infinity"):
        load_checkpoint(path, FP32)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"model\.gguf is not a readable GGUF file"):
        load_checkpoint(path, FP32)
    path.write_bytes(struct.pack("<I", 7) * 10)
    with pytest.raises(ValueError, match=r"model\.gguf is not a readable GGUF file"):
        load_checkpoint(path, FP32)


def test_state_dict_is_checked(tiny_hf, tiny):
    """The in-memory path refuses what files would be refused for."""
    config, _ = tiny("llama2")
    state = tiny_hf("llama2").state_dict()
    state.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"norm\.weight is missing"):
        from_hf_state_dict(config, state)
