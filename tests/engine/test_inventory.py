"""The memory budget of device rounds against the rounds themselves, and what is said of the prefill attention.

Nothing is launched, so the tiny engines stay on the CPU. Planted bugs that these tests were seen to catch: rows of one
width only, taps left out, root rows of the drafts left out, the head's parameters counted in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from skipstone.engine.fused import FusedStep, FusedWeights
from skipstone.engine.gate import PLAIN, Gate, best_first, every
from skipstone.engine.inventory import inventory, memory_items
from skipstone.engine.sparsity.target import SparseTarget
from skipstone.engine.sparsity.tda import Tda
from skipstone.engine.tree import MAX_NODES
from skipstone.engine.trunk_draft import TrunkDraft
from skipstone.engine.workspace import reach_of
from skipstone.heads import HeadSet, HeadSetConfig, HeadSpec, Projection
from skipstone.kernels import tile
from skipstone.kernels.flash import FlashAttention
from skipstone.kernels.linear import PackedLinear

pytestmark = pytest.mark.skipif(tile.triton is None, reason="needs Triton")


def test_device_rounds_are_in_the_budget(engine_of: Callable, stateful: Callable) -> None:
    engine, batch, context = engine_of(dtype=torch.bfloat16), 3, 200
    heads = stateful(engine, "recurrent")
    engine.policy = best_first(beam=4, branch=4, max_depth=3)
    assert not any("device rounds" in item.what for item in memory_items(engine, batch, context))
    with torch.inference_mode():
        engine.fused = FusedWeights(engine.decoder)
    items = {item.what: item for item in memory_items(engine, batch, context) if "device rounds" in item.what}

    cache = engine.workspace.cache_for(batch, context)
    engine._memories_for(engine.policy, cache)
    items_at = {i.what: i for i in memory_items(engine, batch, cache.plan.context) if "device rounds" in i.what}
    assert items.keys() == items_at.keys() and len(items) == 3
    rounds = engine._rounds_for(engine.fused, cache, batch, engine.policy, False, cache.plan.context)
    assert sorted(rounds.steps) == [1, MAX_NODES]
    stores = {}
    for rows_each, step in rounds.steps.items():
        for part in (step, step.rows, step._scratch, step._parts):
            stores |= {t.untyped_storage().data_ptr(): t for t in vars(part).values() if isinstance(t, torch.Tensor)}
        stores |= {t.data_ptr(): t for t in rounds.taps[rows_each].values()}
    rows = items_at[f"rows of device rounds of {batch} x {MAX_NODES}"]
    assert rows.num_bytes == sum(t.untyped_storage().nbytes() for t in stores.values())
    assert rows.arithmetic.startswith("16 + 48 rows x ")

    draft = rounds.draft
    assert draft is not None
    large = (draft._root_speech.logits, draft._speech.logits, draft._ring)
    assert items_at["drafts of device rounds"].num_bytes == sum(t.nbytes for t in large)
    weights, head = draft.weights, heads.heads[0]
    copies = [weights.fuse, weights.join, *(t for la in weights.layers for t in (la.qkv, la.o, la.up, la.down))]
    item = items_at["the recurrent head's matrices for device rounds"]
    assert item.second_copy and item.num_bytes == sum(t.nbytes for t in copies)
    assert sum(t.numel() for t in copies) == sum(p.numel() for p in head.parameters() if p.ndim == 2)


@torch.inference_mode()
def test_logits_of_trunk_exits_are_in_the_budget(engine_of: Callable) -> None:
    engine, batch, context = engine_of(), 3, 200
    decoder, config = engine.decoder, engine.decoder.config
    specs = (HeadSpec("adapter", 1, {"width": 24}),)
    heads = HeadSet(HeadSetConfig(config.hidden_size, config.vocab_size, config.num_layers, specs))
    engine.heads = heads.attach(Projection(decoder.final_norm, decoder.head_weight, config.logit_softcap, PackedLinear))
    engine.fused, engine.policy = FusedWeights(decoder), every((1,), Gate(1.0, 2.0), branch=3, max_depth=3)
    cache = engine.workspace.cache_for(batch, context)
    items = {item.what: item for item in memory_items(engine, batch, cache.plan.context)}
    rounds = engine._rounds_for(engine.fused, cache, batch, engine.policy, False, cache.plan.context)
    assert isinstance(rounds.draft, TrunkDraft)
    logits = rounds.draft._speech.logits
    assert items["drafts of device rounds"].num_bytes == logits.nbytes == 48 * 4 * config.vocab_size


def test_rounds_that_the_host_drafts_for_hold_rows_only(engine_of: Callable) -> None:
    engine = engine_of()
    engine.policy = PLAIN
    with torch.inference_mode():
        engine.fused = FusedWeights(engine.decoder)
    (item,) = (item for item in memory_items(engine, 1, 100) if "device rounds" in item.what)
    assert item.what == "rows of device rounds of 1 x 1" and item.arithmetic.startswith("16 rows x ")


@pytest.mark.parametrize("by_neuron", [False, True])
def test_steps_over_prompts_are_in_the_budget(by_neuron: bool, engine_of: Callable) -> None:
    engine = engine_of()
    engine.policy = PLAIN
    with torch.inference_mode():
        engine.fused = FusedWeights(engine.decoder, by_neuron)
    if by_neuron:
        thresholds = torch.zeros(engine.decoder.config.num_layers)
        engine.sparse = SparseTarget(engine.decoder, Tda(thresholds, cett=0.2))
    assert not any("prompts" in item.what for item in memory_items(engine, 1, 200))
    engine._reads_fused = True
    cache = engine.workspace.cache_for(1, 200)
    (item,) = (item for item in memory_items(engine, 1, cache.plan.context) if "prompts" in item.what)
    reader, stores = engine._reader_for(cache), {}
    assert reader is not None
    for size in reader.sizes:
        step = FusedStep(engine.fused, cache, size, reach=min(reach_of(200), cache.plan.context))
        for part in (step, step.rows, step._scratch, step._parts, step.kept):
            tensors = [t for t in ({} if part is None else vars(part)).values() if isinstance(t, torch.Tensor)]
            stores |= {(size, t.untyped_storage().data_ptr()): t.untyped_storage().nbytes() for t in tensors}
    sums = reader._squares.nbytes if by_neuron else 0
    assert item.num_bytes == sum(stores.values()) + sums


def test_lists_of_neurons_are_in_the_budget(engine_of: Callable) -> None:
    """Tiles of one sequence each, and the lists themselves."""
    engine, config = engine_of(), engine_of().decoder.config
    engine.policy, found = PLAIN, []
    for by_neuron in (False, True):
        with torch.inference_mode():
            engine.fused = FusedWeights(engine.decoder, by_neuron=by_neuron)
        found += [item for item in memory_items(engine, 3, 100) if "device rounds" in item.what]
    assert found[1].arithmetic.startswith("48 rows x ")
    lists = config.num_layers * 3 * (config.intermediate_size + 1) * 4
    assert found[1].num_bytes > 3 * found[0].num_bytes / 2 + lists


def test_the_prefill_attention_is_named(engine_of: Callable) -> None:
    engine = engine_of()
    assert inventory(engine, 1, 100)["model"]["prefill"] == "sdpa"
    engine.flash = FlashAttention("flash-attn 2.8.3", 2, lambda *args: args[0])
    assert inventory(engine, 1, 100)["model"]["prefill"] == "flash (flash-attn 2.8.3)"
