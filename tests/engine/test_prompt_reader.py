"""Prompts read by the decode step's kernels (`prefill="fused"`).

Regimes: prompts of 1, 16, 17, 41 tokens; one step and several; windows (Gemma 2), LayerNorm (GPT-NeoX); the second
sequence of a cache whose every other slot is NaN. Without a GPU in Triton's interpreter, which proves logic only.

Planted bugs that these tests were seen to catch: a tile's root taken for the step's, padding rows that are live, layers
of the taps off by one, the first position of a second step left at 0; sums of neurons that begin anew in each step, or
that keep those of the prompt before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from skipstone.bench.arms import bare_heads, with_heads
from skipstone.bench.shapes import shape_config
from skipstone.engine import loop
from skipstone.engine.cache import KVCache, plan_cache
from skipstone.engine.engine import Engine
from skipstone.engine.forward import prefill
from skipstone.engine.fused import FusedWeights
from skipstone.engine.gate import best_first, fixed_exit
from skipstone.engine.model import Decoder
from skipstone.engine.prompt_reader import PromptReader, longest_for
from skipstone.engine.sparsity.selection import Griffin, MaskOptions
from skipstone.engine.sparsity.target import SparseTarget
from skipstone.engine.sparsity.tda import Tda, measure_curves
from skipstone.engine.workspace import reach_of

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.triton


def read(weights: FusedWeights, ids: list[int], sizes: tuple[int, ...], layers: list[int]) -> tuple:
    """Keys, values `[L, KV, T, d]` and states `[T, D]` of a prompt read in steps of these sizes."""
    decoder = weights.decoder
    cache = KVCache(plan_cache(decoder.config, 2, 64, decoder.device, decoder.dtype), decoder.device)
    cache.k.fill_(float("nan")), cache.v.fill_(float("nan"))
    found: dict[int, list] = {layer: [] for layer in layers}

    def take(states: Any) -> None:
        for layer in layers:
            found[layer].append(states[layer].clone())

    PromptReader(weights, cache, lambda length: length, sizes).read(1, ids, layers, take)
    assert cache.lens == [0, len(ids)] and torch.isnan(cache.k[:, 0]).all()
    assert torch.isnan(cache.k[:, 1, :, len(ids) :]).all()
    return cache.k[:, 1, :, : len(ids)], cache.v[:, 1, :, : len(ids)], *(torch.cat(found[layer]) for layer in layers)


@pytest.mark.parametrize("family", ["llama2", "gemma2", "gpt_neox"])
@torch.inference_mode()
def test_keys_do_not_depend_on_the_steps(family: str, engine_of: Callable) -> None:
    """Bit for bit; and they are those of the decoder's own layers but for the order of sums."""
    decoder = engine_of(family, device=DEVICE, num_layers=2 if family == "gemma2" else 1).decoder
    config = decoder.config
    fused, ids = FusedWeights(decoder), [(17 * i + 2) % config.vocab_size for i in range(41)]
    layers = [0, *range(1, config.num_layers + 1)]
    at_once, in_steps = read(fused, ids, (48,), layers), read(fused, ids, (16, 32), layers)
    for one, other in zip(at_once, in_steps, strict=True):
        assert torch.equal(one, other)
    cache = KVCache(plan_cache(config, 1, 64, decoder.device, decoder.dtype), decoder.device)
    states: dict[int, torch.Tensor] = {}
    prefill(decoder, cache, 0, ids, layers, states.update)
    expected = cache.k[:, 0, :, :41], cache.v[:, 0, :, :41], *(states[layer] for layer in layers)
    for one, other in zip(at_once, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)
    for length in (1, 17) if family == "llama2" else ():  # a prefix has the whole prompt's keys
        short = read(fused, ids[:length], (16, 32), [1])
        assert torch.equal(short[0], at_once[0][:, :, :length]) and torch.equal(short[1], at_once[1][:, :, :length])


def read_masks(target: SparseTarget, weights: FusedWeights, ids: list[int], sizes: tuple[int, ...]) -> tuple:
    """Keys `[L, KV, T, d]` and the watch of a prompt, read twice in steps of these sizes; the watch of a reading that
    goes on with as many tokens again."""
    decoder = weights.decoder
    cache = KVCache(plan_cache(decoder.config, 2, 128, decoder.device, decoder.dtype), decoder.device)
    reader = PromptReader(weights, cache, lambda length: 112, sizes)
    for _ in range(2):  # nothing is left of the prompt before
        watch = target.watch(0)
        reader.read(0, ids, squares=watch.weights)
        watch.num_rows = len(ids)
    keys = cache.k[:, 0, :, : len(ids)].clone()
    target.finish(watch)
    again = target.watch(0, again=True)
    reader.read(0, ids * 2, first=again.num_rows, squares=again.weights)
    assert cache.lens[0] == 2 * len(ids) and torch.equal(keys, cache.k[:, 0, :, : len(ids)])
    return keys, watch, again


@pytest.mark.parametrize("dtype", [torch.float32] + ([torch.bfloat16] if ON_GPU else []), ids=str)
@pytest.mark.parametrize("family", ["llama_linear", "gemma2", "gpt_neox"])
@torch.inference_mode()
def test_masks_do_not_depend_on_the_steps(family: str, dtype: torch.dtype, engine_of: Callable) -> None:
    """What neurons did has the same bits; and the masks are those that the decoder's own layers read."""
    decoder = engine_of(family, dtype, device=DEVICE, num_layers=2 if family == "gemma2" else 1).decoder
    config = decoder.config
    ids = [(17 * i + 2) % config.vocab_size for i in range(37)]
    curves = measure_curves(decoder, torch.tensor([ids[:20]], device=decoder.device))
    fused, options = FusedWeights(decoder, by_neuron=True), MaskOptions(first_dense=0, min_tokens=8, round_to=4)
    target = SparseTarget(decoder, Tda(curves.thresholds(0.4).cpu(), cett=0.4, options=options))
    keys, watch, again = read_masks(target, fused, ids, (48,))
    own_keys, own, own_again = read_masks(target, fused, ids, (16, 32))
    assert torch.equal(keys, own_keys) and torch.equal(watch.weights, own.weights)
    assert torch.equal(again.weights, own_again.weights) and bool((again.weights > watch.weights).any())

    cache = KVCache(plan_cache(config, 1, 128, decoder.device, dtype), decoder.device)
    expected = target.watch(0)
    prefill(decoder, cache, 0, ids, mlp=expected)
    slack = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(watch.weights, expected.weights, rtol=slack, atol=slack)
    kept, wanted = target.kept(watch), target.kept(expected)
    assert set(kept) == set(range(config.num_layers))
    if dtype == torch.float32:
        assert {n: k.tolist() for n, k in kept.items()} == {n: k.tolist() for n, k in wanted.items()}
    target.finish(expected)
    expected = target.watch(0, again=True)
    prefill(decoder, cache, 0, ids * 2, first=expected.num_rows, mlp=expected)
    torch.testing.assert_close(again.weights, expected.weights, rtol=slack, atol=slack)


def test_speculative_output_is_plain_decodings(
    engine_of: Callable, stateful: Callable, assert_same_output: Any
) -> None:
    """With a recurrent head, whose memory takes the states that the reader leaves."""
    engine = engine_of(device=DEVICE, max_context=200)  # so that attention launches few programs that leave at once
    prompt = list(range(5, 23))
    stateful(engine, "recurrent", prompts=[prompt])
    with torch.inference_mode():
        engine.fused = FusedWeights(engine.decoder)
    slow = engine.generate(prompt, speculation=False, max_new_tokens=2)
    engine._reads_fused = True
    reader = engine.workspace.reader = PromptReader(engine.fused, engine.workspace.cache, reach_of, (32,))
    plain = engine.generate(prompt, speculation=False, max_new_tokens=2)
    assert engine.workspace.reader is reader and reader._steps and engine.prefill == "fused"
    drafted = engine.generate(prompt, policy=best_first(2, 2, 2) if ON_GPU else fixed_exit(0, 1), max_new_tokens=2)
    assert_same_output(drafted, plain)
    assert plain.token_ids == slow.token_ids and drafted.stats.num_drafted > 0


def test_it_is_the_default_where_these_kernels_decode(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of an engine made from another one, which would else write other keys than the one it is compared with."""
    config, weights = tiny("llama2")
    monkeypatch.setattr("skipstone.engine.engine.fused_rows_agree", lambda weights: True)
    for fused, expected in ((True, "fused"), (False, "sdpa")):
        engine = Engine(Decoder(config, weights), fused=fused)
        assert engine.prefill == expected == with_heads(engine, bare_heads(config, (2,))).prefill
    assert (
        with_heads(Engine(Decoder(config, weights), fused=True, prefill="sdpa"), bare_heads(config, (2,))).prefill
        == "sdpa"
    )


def test_masks_of_one_kind_are_read_by_these_kernels(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    config, weights = tiny("llama2")
    monkeypatch.setattr("skipstone.engine.engine.fused_rows_agree", lambda weights: True)
    tda = Tda(torch.full((config.num_layers,), 0.1), cett=0.2)
    engine = Engine(Decoder(config, weights), fused=True, sparsity=tda)
    assert engine.prefill == "fused"
    engine.sparse = SparseTarget(engine.decoder, Griffin(0.5))
    assert engine.prefill == "sdpa"
    engine.sparse = None  # the whole model, whose down projections are stored by neuron
    assert engine.prefill == "sdpa"
    assert Engine(Decoder(config, weights), fused=True, sparsity=Griffin(0.5)).prefill == "sdpa"
    with pytest.raises(ValueError, match="this target's masks are of another kind"):
        Engine(Decoder(config, weights), fused=True, prefill="fused", sparsity=Griffin(0.5))


def test_long_prompts_of_large_models_are_left_to_the_decoder(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the weights of the layers alone, so that a prompt's keys depend on the prompt and the model."""

    def limit(name: str) -> int | None:
        config = shape_config(name)
        decoder = SimpleNamespace(dtype=torch.bfloat16)
        return longest_for(cast(FusedWeights, SimpleNamespace(config=config, decoder=decoder)))

    assert [limit(name) for name in ("smollm2-135m", "qwen2.5-0.5b", "qwen2.5-1.5b")] == [None, None, 267]
    config, weights = tiny("llama2")
    monkeypatch.setattr("skipstone.engine.engine.fused_rows_agree", lambda weights: True)
    monkeypatch.setattr("skipstone.engine.engine.longest_for", lambda weights: 20)
    engine = Engine(Decoder(config, weights), fused=True)
    asked: list[tuple[str, int]] = []
    assert engine.prefill == "fused up to 20 tokens, sdpa"
    assert with_heads(engine, bare_heads(config, (2,))).prefill == engine.prefill
    reader = SimpleNamespace(longest=20, read=lambda sequence, ids, *rest: asked.append(("fused", len(ids))))
    reader.takes = partial(PromptReader.takes, reader)
    monkeypatch.setattr(loop, "prefill", lambda own, cache, sequence, ids, *rest: asked.append(("sdpa", len(ids))))
    on = SimpleNamespace(prompts=reader, sparse=None, reader=None, decoder=None, cache=None, flash=None)
    for length in (20, 21):  # and the pending token, which the first round reads
        history = SimpleNamespace(token_ids=[0] * (length + 1))
        loop.read_text(cast(Any, on), cast(Any, SimpleNamespace(sequence=0, history=history)), None)
    assert asked == [("fused", 20), ("sdpa", 21)]


def test_without_fused_kernels_it_is_refused(tiny: Callable) -> None:
    config, weights = tiny("llama2")
    with pytest.raises(ValueError, match="prefill is 'fused'"):
        Engine(Decoder(config, weights), fused=False, prefill="fused")
