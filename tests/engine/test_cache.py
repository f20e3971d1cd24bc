"""The KV cache: sizes, slots, commit; and what stands in it after speculation (hazards 5 and 6).

Planted bugs seen to fail here: a commit that moves a row before it was read; a cache without room for the last draft.
More: tests/lossless/test_planted_bugs.py.
"""

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skipstone.engine.cache import CachePlan, ContextTooLong, KVCache, free_memory, plan_cache, runs
from skipstone.engine.forward import prefill
from skipstone.engine.gate import Gate, every, fixed_exit
from skipstone.engine.tree import MAX_NODES

CPU = torch.device("cpu")
TREES = every((1, 2, 3), Gate(0.3, 1.5), branch=3, max_depth=6)


@pytest.fixture
def cache(tiny):
    config, _ = tiny("llama2")
    return KVCache(plan_cache(config, 2, 130, CPU, torch.bfloat16), CPU)


def test_plan_counts_what_is_allocated(tiny, cache):
    assert cache.plan.num_slots >= 130 + MAX_NODES
    assert cache.k.nbytes + cache.v.nbytes == cache.plan.num_bytes
    assert f"{cache.plan.num_bytes / 2**20:.1f} MiB" in cache.plan.arithmetic()


def test_context_that_cannot_fit_says_the_arithmetic(tiny, monkeypatch):
    config, _ = tiny("llama2")
    with pytest.raises(ContextTooLong, match="300 tokens .* context is 256"):
        plan_cache(config, 1, 300, CPU, torch.float32)
    monkeypatch.setattr("skipstone.engine.cache.free_memory", lambda device: 1000)
    with pytest.raises(ContextTooLong, match=r"2 x 4 layers x 3 sequences x \d+ slots .* 0\.0 MiB are free"):
        plan_cache(config, 3, 256, CPU, torch.float32)
    assert plan_cache(config, 3, 256, CPU, torch.float32, check_free=False).num_bytes > 1000


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=20, unique=True))
def test_runs_of_slots_cover_every_row_once(slots):
    covered = {}
    for slot, first, count in runs(slots):
        covered |= {first + i: slot + i for i in range(count)}
    assert [covered[row] for row in range(len(slots))] == slots


def fill(cache):
    """Every slot holds its own number."""
    numbers = torch.arange(cache.plan.num_slots, dtype=torch.float32).unsqueeze(-1)
    for i, store in enumerate((cache.k, cache.v)):
        store.copy_((numbers + 1000 * i).expand_as(store))


@pytest.mark.hazard(6)
@settings(max_examples=60, deadline=None)
@given(base=st.integers(0, 125), data=st.data())
def test_commit_puts_the_path_into_place(base, data):
    """All reads before any write, across group borders, one sequence only."""
    path = [0, *sorted(data.draw(st.sets(st.integers(1, 15), max_size=15)))]
    cache = KVCache(CachePlan(1, 2, 160, 1, 2, 64, torch.float32), CPU)
    fill(cache)
    cache.lens = [base, 3]
    cache.commit(0, path)
    assert cache.lens == [base + len(path), 3]
    for store, first in ((0, 0), (1, 1000)):
        kept = cache.read(0, 0, base + len(path))[store][0, :, 0]
        assert kept.tolist() == [first + slot for slot in [*range(base), *(base + node for node in path)]]
        other = cache.read(0, 1, 160)[store][0, :, 0]
        assert other.tolist() == [first + slot for slot in range(160)]


def test_write_and_read_agree(cache):
    k = torch.randn(10, cache.plan.num_kv_heads, cache.plan.head_dim)
    cache.writer(1, list(range(60, 70)))(1, k, k + 1)
    keys, values = cache.read(1, 1, 70)
    assert torch.equal(keys[:, 60:].transpose(0, 1), k) and torch.equal(values[:, 60:].transpose(0, 1), k + 1)
    assert not cache.k[0].any() and not cache.k[1, 0].any()


@pytest.mark.hazard(14)
def test_values_that_are_not_finite_are_not_stored(cache):
    v = torch.full((1, cache.plan.num_kv_heads, cache.plan.head_dim), float("nan"))
    cache.writer(0, [5])(0, v, v)
    assert cache.v.isfinite().all()


@pytest.mark.parametrize("base", [0, 40, 63, 64, 70, 127])
def test_clear_open_zeroes_what_a_round_may_read_and_nothing_committed(base, cache):
    cache.k.fill_(1.0)
    cache.v.fill_(1.0)
    cache.lens = [base, 0]
    cache.clear_open(0)
    end = -(-(base + MAX_NODES) // cache.group) * cache.group
    _, values = cache.read(0, 0, end)
    assert values[:, :base].all() and not values[:, base:].any()
    assert cache.k.all() and cache.v[:, 1].all()


# ---- after speculation


def committed(engine, prompts, outs):
    """`[2, L, KV, length, d]` of each sequence."""
    layers = range(engine.decoder.config.num_layers)
    stores = []
    for i, (ids, out) in enumerate(zip(prompts, outs, strict=True)):
        length = len(ids) + len(out.token_ids) - 1
        assert engine.workspace.cache.lens[i] >= length
        stores.append(torch.stack([torch.stack(engine.workspace.cache.read(layer, i, length)) for layer in layers], 1))
    return stores


@pytest.mark.hazard(6)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama2", "gemma3", "qwen2_window"])
def test_cache_after_rejections_is_plain_decodings(family, dtype, engine_of, planned):
    """Bit for bit in every layer and row, with ragged acceptance; and near what a fresh prefill computes."""
    engine = engine_of(family, dtype)
    heads = planned(engine)
    rng = random.Random(8)
    prompts = [[rng.randrange(199) for _ in range(length)] for length in (3, 58, 70)]
    for ids in prompts:
        heads.learn(ids, max_new_tokens=20)
    plain = engine.generate(prompts, speculation=False, max_new_tokens=20)
    expected = committed(engine, prompts, plain)
    for policy in (TREES, fixed_exit(2, 5)):
        outs = engine.generate(prompts, policy=policy, max_new_tokens=20)
        accepted = [out.stats.num_accepted for out in outs]
        assert min(accepted) > 0 and sum(accepted) < sum(out.stats.num_drafted for out in outs)
        for found, wanted in zip(committed(engine, prompts, outs), expected, strict=True):
            assert torch.equal(found, wanted)
    tolerance = 2e-4 if dtype == torch.float32 else 0.15  # bf16 rounds each of some 16 products a layer to 3 digits
    config = engine.decoder.config
    for ids, out, wanted in zip(prompts, plain, expected, strict=True):
        fresh = KVCache(plan_cache(config, 1, 128, CPU, dtype), CPU)
        with torch.inference_mode():
            prefill(engine.decoder, fresh, 0, (ids + out.token_ids)[:-1])
        length = fresh.lens[0]
        again = torch.stack([torch.stack(fresh.read(layer, 0, length)) for layer in range(config.num_layers)], 1)
        assert again.shape == wanted.shape
        assert (again - wanted).abs().max() < tolerance * wanted.abs().max()


@pytest.mark.hazard(5)
@pytest.mark.parametrize("family", ["llama2", "gemma2"])
@pytest.mark.parametrize("policy", [fixed_exit(2, 6), TREES], ids=["chain", "trees"])
def test_every_prompt_length_up_to_the_context(family, policy, engine_of, planned, assert_same_output):
    """L - 2K .. L with K = 6: drafts are clipped, in the end to none, and the context is used to its last place."""
    context = 70  # its last drafts lie on both sides of a key group's border
    engine = engine_of(family, max_context=context)
    heads = planned(engine, "right" if policy is not TREES else "mixed")
    for length in range(context - 12, context + 1):
        ids = [(7 * i + length) % 199 for i in range(length)]
        plain = heads.learn(ids, max_new_tokens=100, logprobs=0)
        assert plain.finish_reason == "context" and len(plain.token_ids) == context - length
        out = engine.generate(ids, policy=policy, max_new_tokens=100, logprobs=0)
        assert_same_output(out, plain)
        assert engine.workspace.cache.plan.context <= context
    with pytest.raises(ContextTooLong, match="71 tokens, the model's context is 70"):
        engine.generate([1] * 71)


@pytest.mark.hazard(2, 5)
def test_budget_that_ends_with_the_context(engine_of, planned):
    engine = engine_of(max_context=30)
    planned(engine, "right").learn([1] * 20, max_new_tokens=100)
    for budget, reason in ((9, "length"), (10, "length"), (11, "context")):
        for policy in (None, fixed_exit(2, 15)):
            out = engine.generate([1] * 20, policy=policy, max_new_tokens=budget)
            assert out.finish_reason == reason and len(out.token_ids) == min(budget, 10)


def test_plans_are_data(cache):
    assert dataclasses.replace(cache.plan, batch=4).num_bytes == 2 * cache.plan.num_bytes


def test_what_torch_holds_and_nobody_uses_is_free(monkeypatch):
    """Otherwise a second cache would be refused for want of the memory that the first one gave back to torch."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert free_memory(torch.device("cuda")) == 1400
