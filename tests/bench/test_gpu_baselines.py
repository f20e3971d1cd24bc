"""The compiled loop's model is the same model: the benchmark refuses to time another one.

Planted bugs seen to fail here: the query heads dealt to the wrong KV head, a mask that hides the row's own key, rotary
pairs taken as neighbours, the bias of qkv left out.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from skipstone.bench import compiled
from skipstone.bench.baselines import as_transformers
from skipstone.bench.compiled import CompiledArm, same_model
from skipstone.bench.device_time import Spread
from skipstone.bench.gpu_baselines import (
    StaticDecoder,
    Subject,
    check,
    hf_token_us,
    main,
    measure_model,
    products,
    prompt_readers,
)
from skipstone.bench.profile import keep_some, random_cache
from skipstone.bench.shapes import FAMILIES, SHAPES, random_weights, shape_config, tiny_config, weight_bytes
from skipstone.engine.cache import KVCache, plan_cache
from skipstone.engine.engine import Engine
from skipstone.engine.fused import FusedStep
from skipstone.engine.model import Decoder


def shallow(family, num_layers):
    """A tiny model of so few layers, for what Triton's interpreter runs."""
    config = tiny_config(family)
    ropes, windows = config.ropes[:num_layers], config.windows[:num_layers]
    config = replace(config, num_layers=num_layers, ropes=ropes, windows=windows)
    return config, random_weights(config, torch.float32, "cpu")


@pytest.fixture(params=["llama", "qwen2"])
def subject(request):
    config = tiny_config(request.param)
    weights = random_weights(config, torch.float32, "cpu")
    reference = as_transformers(config, weights, torch.float32, "tiny").eval()
    return Subject("tiny", "random weights", config, weights), reference


def test_static_decoder_is_transformers_model(subject):
    subject, reference = subject
    decoder = StaticDecoder(subject.config, subject.weights, context=64)
    ids = torch.arange(3, 40) * 7 % subject.config.vocab_size
    assert check(decoder, reference, ids) < 1e-5
    _, tokens = hf_token_us(reference, ids, 6)
    step = torch.compile(decoder.next_token, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad():
        token = decoder.next_token(ids, torch.arange(len(ids)))[-1:]
        written = [int(token)]
        for position in range(len(ids), len(ids) + 5):
            token = step(token, torch.tensor([position]))
            written.append(int(token))
    assert written == tokens


def test_another_model_is_not_timed(subject):
    subject, reference = subject
    wrong = {n: w.roll(1, 0) if n == "layers.1.qkv.weight" else w for n, w in subject.weights.items()}
    with pytest.raises(RuntimeError, match="not timing"):
        check(StaticDecoder(subject.config, wrong, context=64), reference, torch.arange(1, 30))


def test_compiled_arm_is_checked_beyond_bf16(monkeypatch):
    """Attention this sharp is another one in bf16 (logits off by 0.37), as trained weights' is on unusual tokens; that
    is no other model. Rotary pairs taken as neighbours are.
    """
    config = tiny_config("llama")
    weights = random_weights(config, torch.bfloat16, "cpu")
    weights = {name: 10 * weight if "qkv" in name else weight for name, weight in weights.items()}
    loaded = SimpleNamespace(config=config, weights=weights)
    engine = Engine(Decoder(config, weights, torch.bfloat16, "cpu"), fused=False)
    assert same_model(config, weights) < 1e-3
    arm = CompiledArm(loaded, engine)
    monkeypatch.setattr(arm, "_make", lambda decoder, prompt, num_new: (decoder.slots.numel(), num_new))
    assert arm._loop(500) == (512, 512) and arm._loop(513) == (1024, 1024)

    def neighbours(x, cos, sin):
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin + x * cos

    monkeypatch.setattr(compiled, "_rotate", neighbours)
    with pytest.raises(RuntimeError, match="not timing"):
        CompiledArm(loaded, engine)._loop(500)


def test_other_families_are_refused():
    config = tiny_config("gemma2")
    with pytest.raises(ValueError, match="expected a Llama or Qwen2"):
        StaticDecoder(config, random_weights(config, torch.float32, "cpu"), context=64)


def test_rows_without_a_gpu(subject, capsys):
    subject, _ = subject
    rows = measure_model(subject, ("floor", "hf-eager"), prompt_len=5, num_new=4, repeats=2, read=100.0)
    assert [row["arm"] for row in rows] == ["floor", "hf-eager"]
    assert rows[0]["us_per_token"] == pytest.approx(weight_bytes(subject.config) / 100e3, abs=0.01)
    assert rows[1]["p20"] <= rows[1]["p50"] <= rows[1]["p80"] and rows[1]["weights"] == "random weights"


def test_our_own_step_at_each_context_and_width(subject, monkeypatch):
    subject, _ = subject
    asked, shares = [], []

    def timed(weights, context, live, *, step_of):
        asked.append((weights.config, context, live))
        shares.append(step_of(weights, random_cache(weights, 40), 16)._share)
        return Spread(1.0, 2.0 + live, 30.0)

    monkeypatch.setattr("skipstone.bench.gpu_baselines.step_us", timed)
    rows = measure_model(subject, ("step",), prompt_len=5, num_new=4, repeats=2, read=100.0, contexts=(8, 40))
    assert asked == [(subject.config, context, live) for context in (8, 40) for live in (1, 16)]
    assert [(row["arm"], row["context"], row["us_per_token"]) for row in rows] == [
        (f"step-{live}", context, 2.0 + live) for context in (8, 40) for live in (1, 16)
    ]
    assert all(shares)
    monkeypatch.setattr("skipstone.bench.gpu_baselines.rows_that_differ", lambda weights, context: context // 40)
    rows = measure_model(subject, ("step-unshared",), prompt_len=5, num_new=4, repeats=2, read=1.0, contexts=(8, 40))
    assert [(row["arm"], row["rows_that_differ"]) for row in rows] == [
        (f"step-unshared-{live}", context // 40) for context in (8, 40) for live in (1, 16)
    ]
    assert not any(shares[4:])


def test_our_own_step_over_listed_neurons(subject, monkeypatch):
    """Timed with weights stored by neuron, whose decoder is still the same model; lists as long as the share says."""
    subject, _ = subject
    asked = []

    def timed(weights, context, live, share):
        step = FusedStep(
            weights, KVCache(plan_cache(weights.config, 1, 8, torch.device("cpu"), torch.float32), "cpu"), 16
        )
        keep_some(step, share)
        lists = [sorted(set(one.ids[0, : one.count[0]].tolist())) for one in step.kept.layers]
        assert lists[0] != lists[1] or share == 1.0
        asked.append((live, [len(own) for own in lists]))
        return Spread(1.0, 2.0, 3.0)

    monkeypatch.setattr("skipstone.bench.gpu_baselines.step_us", timed)
    rows = measure_model(subject, ("tda",), 5, 4, 2, 100.0, contexts=(8,), shares=(1.0, 0.5))
    assert [(row["arm"], row["kept_share"]) for row in rows] == [
        (f"tda-{live}", share) for live in (1, 16) for share in (1.0, 0.5)
    ]
    size, layers = subject.config.intermediate_size, subject.config.num_layers
    assert asked == [(live, [count] * layers) for live in (1, 16) for count in (size, size // 2)]


@pytest.mark.interpreter
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.inference_mode()
def test_our_own_step_that_drops_inputs(family, monkeypatch):
    """Thresholds meet their level on the row that is timed, which is another one at each level."""
    subject = Subject("tiny", "random weights", *shallow(family, 2))
    streams = []

    def timed(weights, context, live, *, step_of, prepare):
        cache = KVCache(plan_cache(weights.config, 1, 24, torch.device("cpu"), torch.float32), "cpu")
        step = step_of(weights, cache, 16)
        step.rows.live[0], step.rows.position[0], step.rows.slot[0], step.rows.base[0] = 1, context, context, context
        prepare(step)
        aimed = step.hidden[0].clone()
        step.embed()
        assert torch.equal(step.run(0, weights.config.num_layers)[0], aimed)
        streams.append(aimed)
        return Spread(1.0, 2.0, 3.0)

    monkeypatch.setattr("skipstone.bench.gpu_baselines.step_us", timed)
    rows = measure_model(subject, ("teal",), 5, 4, 2, 100.0, contexts=(8,), levels=(0.0, 0.5))
    assert [(row["arm"], row["level"]) for row in rows] == [("teal-1", 0.0), ("teal-1", 0.5)]
    assert [row["dropped_share"] for row in rows] == [pytest.approx(0.0, abs=0.01), pytest.approx(0.5, abs=0.01)]
    assert not torch.allclose(*streams, rtol=0.01)


def test_products_are_all_of_a_step(subject):
    """Every matrix of the model is multiplied once."""
    subject, _ = subject
    seen = []
    original = torch.nn.functional.linear

    def linear(x, weight):
        seen.append((weight.data_ptr(), len(x)))
        return original(x, weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skipstone.bench.gpu_baselines.F.linear", linear)
        products(subject.weights, subject.config, 16)()
    matrices = [w.data_ptr() for w in subject.weights.values() if w.ndim == 2]
    assert sorted(seen) == sorted((pointer, 16) for pointer in matrices)


def test_shapes_are_the_real_models():
    """Bytes as docs/benchmarks.md and the evidence have them: 58, 212 and 664 us at 4.65 TB/s."""
    floors = [weight_bytes(shape_config(name)) / 4.65e6 for name in SHAPES]
    assert [round(us) for us in floors] == [58, 212, 664]


@pytest.mark.parametrize("family", FAMILIES)
def test_small_models_of_every_family(family):
    """Finite logits that depend on every layer."""
    config = tiny_config(family)
    weights = random_weights(config, torch.float32, "cpu")
    ids, last = torch.arange(9).unsqueeze(0), config.num_layers
    hidden = Decoder(config, weights).encode(ids, [last])[last]
    for index in range(last):
        changed = {**weights, f"layers.{index}.down.weight": weights[f"layers.{index}.down.weight"].roll(1, 0)}
        other = Decoder(config, changed).encode(ids, [last])[last]
        assert hidden.isfinite().all() and not torch.allclose(hidden, other, rtol=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it would run")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="sees none"):
        main([])


@pytest.mark.interpreter
def test_all_ways_of_reading_a_prompt_are_timed():
    decoder = Decoder(*shallow("llama", 1), torch.float32, "cpu")
    ways = prompt_readers(decoder, 40)
    assert list(ways) == ["sdpa", "fused", "sdpa-tda", "fused-tda"] and all(read() > 0 for read in ways.values())
