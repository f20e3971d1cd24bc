"""Shared fixtures: tiny random models of every family, with the features of that family's real checkpoints.

`family` runs a test once per model; `tiny_hf(family)` is the transformers model (the parity reference) and
`tiny(family)` the same weights as this engine reads them. Both are made once per process from a fixed seed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
@torch.inference_mode(False)  # kept for later tests, which may train with it
def _tiny_hf(family: str) -> Any:
    """A transformers model, fp32, eval, eager attention, weights drawn so that every part matters to the logits."""
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
@torch.inference_mode(False)  # kept for later tests, which may train with it
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


# ---- engines whose drafts are planned

Plan = Callable[["Place"], "dict[int, float] | None"]


@dataclass(frozen=True)
class Place:
    """Where a planned head is asked: the next new token's index and id, or None for both on a path that is wrong.

    `salt` is a fixed number of this place, for plans that vary without being random.
    """

    exit_layer: int
    index: int | None
    truth: int | None
    salt: int
    vocab_size: int

    @property
    def wrong(self) -> int:
        """A token that plain decoding does not write here."""
        guess = self.salt % self.vocab_size
        return (guess + 1) % self.vocab_size if guess == self.truth else guess

    @property
    def guess(self) -> int:
        """The right token, or any where nothing is right."""
        return self.wrong if self.truth is None else self.truth


class PlannedHeads:
    """Stands in for a head set: its heads know what plain decoding writes, and a plan says what they make of it.

    `learn` decodes plainly and keeps each step's hidden state at each exit beside the token that follows. A drafted
    node whose whole path is right has that hidden state bit for bit (design rules 2 and 3), so a head looks its place
    up; on a wrong path it finds nothing.
    """

    draft_ids = None
    calibration = None

    def __init__(self, engine: Any, exits: tuple[int, ...], plan: Plan) -> None:
        self.engine, self.exits, self.plan = engine, exits, plan
        self.heads = {exit_layer: functools.partial(self._speak, exit_layer) for exit_layer in exits}
        self.known: dict[tuple[int, bytes], tuple[int, int]] = {}
        self.asked: list[Place] = []
        self._heard: dict[int, list[bytes]] | None = None

    def attach(self, projection: Any) -> None:
        pass

    def learn(self, prompt: Any, **options: Any) -> Any:
        """Decode one prompt plainly and remember it. Returns its `Generation`."""
        from skipstone.engine.gate import NEVER, every

        self.engine.heads, self._heard = self, {}
        silent = self.engine.generate(prompt, policy=every(self.exits, NEVER), **options)
        heard, self._heard = self._heard, None
        assert silent.stats.num_drafted == 0
        for exit_layer, states in heard.items():
            for index, (state, token) in enumerate(zip(states, silent.token_ids, strict=False)):
                self.known[exit_layer, state] = index, token
        return silent

    def _speak(self, exit_layer: int, hidden: Tensor) -> Tensor:
        vocab_size = self.engine.decoder.config.vocab_size
        states = [row.contiguous().numpy().tobytes() for row in hidden]
        if self._heard is not None:
            self._heard.setdefault(exit_layer, []).extend(states)
            return torch.zeros(len(states), vocab_size)
        logits = torch.full((len(states), vocab_size), -50.0)
        for row, state in zip(logits, states, strict=True):
            index, truth = self.known.get((exit_layer, state), (None, None))
            # Not of the state's bits where the place is known: what the plan covers would differ between machines.
            salt = zlib.crc32(state if index is None else f"{index} {truth}".encode(), exit_layer)
            place = Place(exit_layer, index, truth, salt, vocab_size)
            self.asked.append(place)
            wanted = self.plan(place)
            if wanted is None:
                row.fill_(math.nan)
            else:
                row[list(wanted)] = torch.tensor(list(wanted.values()))
        return logits


def right(place: Place) -> dict[int, float]:
    """Always sure, right wherever anything is right."""
    return {place.guess: 50.0}


def mixed(place: Place) -> dict[int, float] | None:
    """Mostly right; sometimes wrong, of two or three minds (entropies ln 2, ln 3), at a loss (ln 9) or NaN."""
    other = (place.guess + 1 + place.salt // 7 % 5) % place.vocab_size
    third = (place.guess + 7) % place.vocab_size
    return [
        {place.guess: 50.0},
        {place.guess: 50.0},
        {place.guess: 50.0},
        {place.guess: 50.0},
        {place.guess: 50.0, other: 50.0},
        {place.guess: 50.0, other: 50.0, third: 50.0},
        {place.guess: 50.0, other: 50.0},
        {place.wrong: 50.0},
        {(place.guess + i) % place.vocab_size: 50.0 for i in range(9)},
        None,
    ][place.salt // 13 % 10]


@functools.cache
@torch.inference_mode(False)  # kept for later tests, which may train with it
def _engine(
    family: str,
    dtype: torch.dtype,
    vocab_size: int | None,
    deterministic: bool,
    device: str = "cpu",
    num_layers: int | None = None,
) -> Any:
    from skipstone.engine.engine import Engine
    from skipstone.engine.model import Decoder

    config, weights = _tiny(family)
    weights = dict(weights)
    if vocab_size is not None:
        repeats = -(-vocab_size // config.vocab_size)
        for seed, name in enumerate(("embed.weight", "lm_head.weight", "lm_head.bias")):
            if name in weights:
                rows = weights[name].repeat(repeats, *[1] * (weights[name].ndim - 1))[:vocab_size]
                generator = torch.Generator().manual_seed(seed)
                weights[name] = rows + 0.3 * rows.std() * torch.randn(rows.shape, generator=generator)
        config = dataclasses.replace(config, vocab_size=vocab_size)
    if num_layers is not None:
        windows, ropes = config.windows[:num_layers], config.ropes[:num_layers]
        config = dataclasses.replace(config, num_layers=num_layers, windows=windows, ropes=ropes)
        kept = tuple(f"layers.{layer}." for layer in range(num_layers))
        weights = {k: v for k, v in weights.items() if not k.startswith("layers.") or k.startswith(kept)}
    return Engine(Decoder(config, weights, dtype, device), deterministic=deterministic, fused=False)


@pytest.fixture(scope="session")
def engine_of() -> Callable[..., Any]:
    """`engine_of(family, dtype=float32, vocab_size=None, max_context=None, deterministic=True, device="cpu",
    num_layers=None)` -> an engine of its own on a shared decoder, without fused kernels; heads, tokenizer and cache may
    be changed."""

    def build(
        family: str = "llama2",
        dtype: torch.dtype = torch.float32,
        vocab_size: int | None = None,
        max_context: int | None = None,
        deterministic: bool = True,
        device: str = "cpu",
        num_layers: int | None = None,
    ) -> Any:
        from skipstone.engine.workspace import Workspace

        engine = copy.copy(_engine(family, dtype, vocab_size, deterministic, device, num_layers))
        engine._paces = {}
        engine._lock = threading.Lock()
        engine.decoder = copy.copy(engine.decoder)
        engine.decoder._tables, engine.decoder._rope_rows = {}, 0
        if max_context is not None:
            engine.decoder.config = dataclasses.replace(engine.decoder.config, max_context=max_context)
        engine.workspace = Workspace(engine.decoder)
        return engine

    return build


@pytest.fixture(scope="session")
def planned() -> Callable[..., PlannedHeads]:
    """`planned(engine, plan="mixed" | "right" | function of a Place, exits=(1, 2, 3))` -> heads, set on the engine."""

    def build(engine: Any, plan: str | Plan = "mixed", exits: tuple[int, ...] = (1, 2, 3)) -> PlannedHeads:
        heads = PlannedHeads(engine, exits, {"mixed": mixed, "right": right}[plan] if isinstance(plan, str) else plan)
        engine.heads = heads
        return heads

    return build


_STATEFUL = {"recurrent": (0, {"taps": (2, 4)}), "block": (2, {})}


@pytest.fixture(autouse=True, scope="session")
def interpreter_products() -> Iterator[None]:
    """Triton's interpreter multiplies by numpy's BLAS, whose rows have other bits in other places, more or less by
    processor. Tests of bits ask what a tensor core guarantees, so each row is a product of its own here."""
    from skipstone.kernels import tile

    if tile.triton is None:
        yield
        return
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        x, y = (t.data.astype(d.data.dtype) for t in (a, b))
        product = np.matmul(x[..., None, :], y[..., None, :, :])[..., 0, :]
        return TensorHandle(product + d.data, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield


@pytest.fixture(autouse=True, scope="session")
def interpreter_tables() -> Iterator[None]:
    """Triton's interpreter exchanges all of `triton.language` again at every call of a device function, and makes its
    table of types again for every load and constant: half of a kernel's time. What a launch has exchanged stays
    exchanged until it ends, and a type is looked up once."""
    from skipstone.kernels import tile

    if tile.triton is None or os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    exchange, look_up, types = interpreter._patch_lang, interpreter._get_np_dtype, {}

    @functools.cache
    def seen_by(fn: Any) -> list[Any]:
        return [lang for lang in (tl, tl.core) if any(value is lang for value in fn.__globals__.values())]

    def patch_lang(fn: Any) -> Any:
        # Triton's own functions see `tl.core`, which a launch of ours does not exchange.
        return exchange(fn) if any(tl.core.is_builtin(lang.load) for lang in seen_by(fn)) else None

    def get_np_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in types:
            types[name] = look_up(dtype)
        return types[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_lang)
        patch.setattr(interpreter, "_get_np_dtype", get_np_dtype)
        yield


@pytest.fixture(autouse=True, scope="module")
def interpreter_checks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Triton's interpreter asserts after every integer operation that it did not overflow, a third of an engine test's
    time: only `tests/kernels` pays for it, whose shapes reach further."""
    from skipstone.kernels import tile

    if tile.triton is None or "kernels" in request.path.parts:
        yield
        return
    from triton.runtime.interpreter import interpreter_builder as builder

    kept = builder.options
    builder.options = dataclasses.replace(kept, sanitize_overflow=False)
    yield
    builder.options = kept


@functools.cache
@torch.inference_mode(False)
def _studied(kind: str, prompts: tuple[tuple[int, ...], ...]) -> dict[str, Tensor]:
    """Parameters of a stateful head of the tiny Llama after a short study of what the model writes to these prompts:
    right on much of it, not on all."""
    import torch.nn.functional as F
    from skipstone.heads import Projection, build_head

    engine = _engine("llama2", torch.float32, None, True)
    decoder, spec = engine.decoder, _stateful_spec(kind, engine.decoder.config)
    texts = [g.prompt_ids + g.token_ids for g in engine.generate([list(p) for p in prompts], max_new_tokens=60)]
    torch.manual_seed(1)
    head = build_head(spec, decoder.config.hidden_size, decoder.config.vocab_size)
    head.attach(Projection(decoder.final_norm, decoder.head_weight))
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    layers = (spec.exit_layer, *head.taps)
    for step in range(26):
        ids = torch.tensor([texts[step % len(texts)]])
        with torch.no_grad():
            states = decoder.encode(ids, layers)
        taps = torch.stack([states[layer] for layer in head.taps], 2) if head.taps else None
        loss = torch.zeros(())
        for lag, out in enumerate(head.unroll(states[spec.exit_layer], taps, 3)):
            loss = loss + F.cross_entropy(head.draft_logits(out[0, lag:-1]), ids[0, lag + 1 :])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in head.named_parameters()}


def _stateful_spec(kind: str, config: ModelConfig) -> Any:
    from skipstone.heads import HeadSpec, layer_options

    exit_layer, options = _STATEFUL[kind]
    sizes = layer_options(config.num_heads, config.num_kv_heads, config.head_dim, 64, 1e4, False)
    return HeadSpec(kind, exit_layer, {**sizes, **options})


@pytest.fixture(scope="session")
def stateful() -> Callable[..., Any]:
    """`stateful(engine, "recurrent", "block", prompts=None)` -> these heads, at exits 0 and 2, set on the engine.
    Random ones, or, on the tiny Llama, such as have studied what it writes to `prompts`."""

    def build(engine: Any, *kinds: str, prompts: Any = None) -> Any:
        from skipstone.heads import HeadSet, HeadSetConfig, Projection
        from skipstone.kernels.linear import PackedLinear

        decoder, config = engine.decoder, engine.decoder.config
        specs = tuple(_stateful_spec(kind, config) for kind in kinds)
        torch.manual_seed(0)
        heads = HeadSet(HeadSetConfig(config.hidden_size, config.vocab_size, config.num_layers, specs))
        for kind in kinds:
            if prompts is not None:
                head = heads.heads[_STATEFUL[kind][0]]
                head.load_state_dict(_studied(kind, tuple(map(tuple, prompts))))
        with torch.inference_mode():
            projection = Projection(decoder.final_norm, decoder.head_weight, config.logit_softcap, PackedLinear)
            engine.heads = heads.attach(projection)
        return heads

    return build


@pytest.fixture(scope="session")
def assert_same_output() -> Callable[[Any, Any], None]:
    """`assert_same_output(generation, plain)`: everything that a user sees, logprobs bit for bit."""

    def check(generation: Any, plain: Any) -> None:
        for name in ("token_ids", "text", "finish_reason", "logprobs", "error"):
            assert getattr(generation, name) == getattr(plain, name), name
        assert generation.stats.num_committed == len(generation.token_ids)

    return check


# ---- folders, for what loads a model by path

_CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model folder as transformers writes it: a random Llama of four layers with a byte-level tokenizer and a chat
    template. Layers 3 and 4 add little, so that bare exits below them are right often, not always."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["a stone skips over the water and the rain falls on the stones"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", chat_template=_CHAT_TEMPLATE)
    config = LlamaConfig(
        **_SIZES | {"vocab_size": 320, "num_key_value_heads": 2, "max_position_embeddings": 512},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                gain = 1.0 if "embed" in name else 2.5 / math.sqrt(parameter.shape[1])
                late = any(f"layers.{i}." in name for i in (2, 3)) and ("o_proj" in name or "down_proj" in name)
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain * (0.1 if late else 1.0))
    folder = tmp_path_factory.mktemp("tiny-model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_heads_folder(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A head set folder for `tiny_folder`: untrained adapters at exits 2 and 3, with a calibration whose gates are open
    at every accuracy level up to some nats, and branch from there on."""
    import numpy as np
    from skipstone.engine.pretrained import load_pretrained
    from skipstone.heads.fingerprint import BaseIdentity, base_fingerprint, tokenizer_sha256
    from skipstone.heads.fitting import fit_calibration
    from skipstone.heads.head_set import HeadSet, adapter_config

    base = load_pretrained(tiny_folder, torch.float32, progress=False)
    fingerprint = base_fingerprint(base.weights, base.config.num_layers)
    identity = BaseIdentity("tiny", fingerprint, tokenizer_sha256(base.tokenizer))
    entropy = np.linspace(0.01, 6.0, 600, dtype=np.float32)
    rank = np.where(entropy < 3.0, 0, 2)  # the best guess is right up to three nats, one of the top four beyond
    # Exit 3 meets what exit 2 refused in falling order, so that both are sure of half of their tokens.
    calibration = fit_calibration({2: entropy, 3: 9.0 - entropy}, {2: rank, 3: rank[::-1]}, source="made up")
    sizes = adapter_config((2, 3), base.config.hidden_size, base.config.vocab_size, base.config.num_layers, 4, None)
    folder = tmp_path_factory.mktemp("tiny-heads") / "heads"
    HeadSet(sizes, None, identity, calibration).save(folder)
    return folder


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what `gpu`, `triton` and `interpreter` need and this run has not, and says so. A `triton` test is a `gpu`
    one where there is a GPU."""
    from skipstone.kernels import tile

    on_gpu, interprets = torch.cuda.is_available(), os.environ.get("TRITON_INTERPRET") == "1"
    lacks = {
        "gpu": "" if on_gpu else "needs a CUDA device; torch sees none here",
        "triton": "" if tile.triton and (on_gpu or interprets) else "needs Triton, with a GPU or TRITON_INTERPRET=1",
        "interpreter": "" if tile.triton and interprets else "needs Triton and TRITON_INTERPRET=1",
    }
    for item in items:
        for name, reason in lacks.items():
            if reason and item.get_closest_marker(name) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
        if on_gpu and item.get_closest_marker("triton") is not None:
            item.add_marker("gpu")
