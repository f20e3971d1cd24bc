"""Speculative output equals plain output where rounds run on the device and every sequence skips neurons of its own.

Drafts are hung by the test (right tokens behind wrong siblings, wrong ones at some places), or come from a briefly
studied recurrent head on the device. Without a GPU the rounds run kernel by kernel in Triton's interpreter, on few
layers and for few tokens, and keys are compared up to rounding: numpy's products, of which the interpreter's are made,
give a row other last bits in another place. On a GPU they are captured graphs, in bf16, too, and bits count.

Regimes: batches of 1 and 3 whose prompts keep other neurons, one of them too short for a mask; chains and trees; greedy
and T = 0.8; masks read once and read again inside the output; gated and plain MLPs, biases, post-norms, parallel
residuals; the same rounds for other lists; prompts read by the decoder and by the fused kernels.

Planted bugs seen to fail here: another sequence's list, lists of the request before, a round that runs past a reading,
tokens that the fused kernels read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from skipstone.engine import device_loop, loop, workspace
from skipstone.engine.fused import FusedWeights
from skipstone.engine.gate import WHOLE, Gate, best_first, every, fixed_exit
from skipstone.engine.graphs import Rounds
from skipstone.engine.prompt_reader import PromptReader
from skipstone.engine.sparsity.selection import MaskOptions
from skipstone.engine.sparsity.target import SparseTarget
from skipstone.engine.sparsity.tda import Tda, measure_curves
from skipstone.engine.trunk_draft import TrunkDraft
from skipstone.heads import HeadSet, HeadSetConfig, HeadSpec, Projection
from skipstone.kernels.linear import PackedLinear

ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.triton
LENGTHS = (23, 41, 3)  # the third is shorter than a mask's least prompt
SEEDS = [5, 6, 7]
NEW = 24 if ON_GPU else 5
SAMPLED = {"temperature": 0.8}
CHAIN = fixed_exit(1, 3)
TREE = every((1,), Gate(0.3, 99.0), branch=3, max_depth=3, max_nodes=9)
ONCE = MaskOptions(first_dense=0, min_tokens=8, round_to=4)
AGAIN = MaskOptions(first_dense=0, min_tokens=8, round_to=4, refresh=3)


class HungHeads:
    """Stands in for a head set with one head, at exit 1, that is never asked."""

    exits, heads, draft_ids, calibration = (1,), {1: None}, None, None


def prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture
def skipping(engine_of: Callable) -> Callable:
    """`skipping(options, family="llama2", num_layers=1, dtype=float32)` -> an engine that skips neurons in rounds on
    the device, and prompts whose masks differ."""

    def build(
        options: MaskOptions = ONCE, family: str = "llama2", num_layers: int = 1, dtype: torch.dtype = torch.float32
    ) -> tuple[Any, list[list[int]]]:
        engine = engine_of(family, dtype, num_layers=num_layers, max_context=250, device="cuda" if ON_GPU else "cpu")
        decoder = engine.decoder
        given = prompts(decoder.config.vocab_size)
        with torch.inference_mode():
            curves = measure_curves(decoder, torch.tensor([given[1][:20], given[0][:20]], device=decoder.device))
            engine.fused = FusedWeights(decoder, by_neuron=True)
        engine.sparse = SparseTarget(decoder, Tda(curves.thresholds(0.4).cpu(), cett=0.4, options=options))
        engine.heads = HungHeads()
        return engine, given

    return build


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`hang(outputs, siblings=0)`: from now on drafts are what these `Generation`s say, wrong at new token 2, each node
    behind so many wrong siblings."""

    def plan(outputs: Sequence[Any], siblings: int = 0) -> None:
        def draft(decoder, cache, rows, heads, policy, *rest):  # type: ignore[no-untyped-def]
            for row in rows:
                tree, out, node = row.work.tree, outputs[row.work.sequence], 0
                text, vocab_size = out.prompt_ids + out.token_ids, decoder.config.vocab_size
                for depth in range(1, 1 + min(policy.max_depth, row.max_depth)):
                    position = row.work.base + depth
                    token = text[position] if position < len(text) else 0
                    token = (token + (position == len(out.prompt_ids) + 2)) % vocab_size
                    for i in range(siblings):
                        tree.add(node, (token + 1 + i) % vocab_size, exit_layer=1, entropy=0.2)
                    node = tree.add(node, token, exit_layer=1, entropy=0.5)
                row.work.embed_new(decoder)
            return [0] * len(rows)

        monkeypatch.setattr(loop, "draft", draft)

    return plan


def seen(engine: Any, outs: Sequence[Any]) -> list[Any]:
    """Of each output of the last batch its tokens, and the committed keys and values of all layers."""
    found = []
    for i, out in enumerate(outs):
        length = len(out.prompt_ids) + len(out.token_ids) - 1
        stores = [
            torch.stack(engine.workspace.cache.read(n, i, length)) for n in range(engine.decoder.config.num_layers)
        ]
        found.append((out.token_ids, torch.stack(stores).clone()))
    return found


def alone(engine: Any, given: list[list[int]], **options: Any) -> tuple[list[Any], list[Any]]:
    """Every prompt by itself, plainly: outputs, and what `seen` saw."""
    outs, all_seen = [], []
    for ids, seed in zip(given, SEEDS, strict=False):
        outs.append(engine.generate(ids, seed=seed, speculation=False, max_new_tokens=NEW, **options))
        all_seen += seen(engine, outs[-1:])
    return outs, all_seen


def same(found: Sequence[Any], expected: Sequence[Any]) -> bool:
    slack = {"rtol": 0.0, "atol": 0.0} if ON_GPU else {"rtol": 1e-4, "atol": 1e-5}
    return all(
        own[0] == other[0] and torch.allclose(own[1], other[1], **slack)
        for own, other in zip(found, expected, strict=True)
    )


def waiting(engine: Any, given: list[list[int]], fused_reads: bool = False) -> list[list[int]]:
    """Greedy tokens of the loop that waits for every round, where sequences have MLPs of their own."""
    seeds, plainly = SEEDS[: len(given)], {"speculation": False, "max_new_tokens": NEW}
    if fused_reads:
        return [out.token_ids for out in engine.generate(given, seeds=seeds, logprobs=0, **plainly)]
    fused, engine.fused = engine.fused, None
    try:
        outs = engine.generate(given, seeds=seeds, **plainly)
    finally:
        engine.fused = fused
    return [out.token_ids for out in outs]


RUNS = {
    "once, chains": (ONCE, {}, CHAIN, 0),
    "again, trees, sampled": (AGAIN, SAMPLED, TREE, 2),
    "once, trees": (ONCE, {}, TREE, 2),
    "again, chains": (AGAIN, {}, CHAIN, 0),
    "once, chains, sampled": (ONCE, SAMPLED, CHAIN, 0),
}
IN_INTERPRETER = ("once, chains", "again, trees, sampled")


@pytest.mark.hazard(6, 23, 24)
@pytest.mark.parametrize("dtype", [torch.float32] + ([torch.bfloat16] if ON_GPU else []), ids=str)
@pytest.mark.parametrize("name", [n if n in IN_INTERPRETER else pytest.param(n, marks=pytest.mark.gpu) for n in RUNS])
def test_drafted_batches_equal_solo_plain(name: str, dtype: torch.dtype, skipping: Callable, hang: Callable) -> None:
    options, sampling, policy, siblings = RUNS[name]
    engine, given = skipping(options, dtype=dtype, num_layers=4 if ON_GPU else 1)
    outs, expected = alone(engine, given, **sampling)
    if not sampling and dtype == torch.float32:
        assert [out.token_ids for out in outs] == waiting(engine, given)
    hang(outs, siblings)
    drafted = engine.generate(given, seeds=SEEDS, policy=policy, max_new_tokens=NEW, **sampling)
    assert same(seen(engine, drafted), expected)
    assert sum(out.stats.num_accepted for out in drafted) >= 3
    assert all(out.error is None and out.verify == "tda" for out in drafted)
    if ON_GPU:
        together = engine.generate(given, seeds=SEEDS, speculation=False, max_new_tokens=NEW, **sampling)
        assert same(seen(engine, together), expected)
    assert engine.workspace.rounds, "the device must have run"
    if options is ONCE:
        counts = next(reversed(engine.workspace.rounds.values())).steps[16].kept.count[-1].tolist()
        assert counts[2] == max(counts) and counts[0] < counts[2] and counts[1] < counts[2]


@pytest.mark.parametrize("family", ["llama_linear", "gemma2", "gpt_neox"])
def test_families(family: str, skipping: Callable, hang: Callable) -> None:
    engine, given = skipping(AGAIN, family, num_layers=2)
    given = given[:1]
    outs, expected = alone(engine, given)
    assert [out.token_ids for out in outs] == waiting(engine, given)
    hang(outs)
    drafted = engine.generate(given, seeds=SEEDS[:1], policy=CHAIN, max_new_tokens=NEW)
    assert same(seen(engine, drafted), expected)


def test_prompts_that_the_fused_kernels_read(
    skipping: Callable, hang: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several steps, and again inside the output: the same tokens as where the decoder reads them, whichever loop
    decodes, and drafts change nothing."""
    engine, given = skipping(AGAIN, num_layers=4 if ON_GPU else 1)
    given = given[: 3 if ON_GPU else 1]
    slow, _ = alone(engine, given)
    slow_sums = engine.sparse._watches[0].weights
    engine._reads_fused = True
    monkeypatch.setattr(workspace, "PromptReader", partial(PromptReader, sizes=(16,)))
    monkeypatch.setattr(loop, "prefill", None)
    outs, expected = alone(engine, given)
    torch.testing.assert_close(engine.sparse._watches[0].weights, slow_sums, rtol=1e-3, atol=1e-3)
    assert engine.prefill == "fused" and [out.token_ids for out in outs] == [out.token_ids for out in slow]
    assert waiting(engine, given, fused_reads=True) == [out.token_ids for out in outs]
    hang(outs, siblings=2)
    drafted = engine.generate(given, seeds=SEEDS[: len(given)], policy=TREE, max_new_tokens=NEW)
    assert same(seen(engine, drafted), expected) and sum(out.stats.num_accepted for out in drafted) > 0


def test_a_head_that_drafts_on_the_device(skipping: Callable, stateful: Callable) -> None:
    engine, given = skipping(AGAIN, num_layers=4)
    given = given[: 2 if ON_GPU else 1]
    engine.heads = None
    _, expected = alone(engine, given)
    stateful(engine, "recurrent", prompts=given)
    tree = best_first(2, 2, 2, 5)
    for policy in [tree, replace(tree, lookup=WHOLE)] + ([fixed_exit(0, 3)] if ON_GPU else []):
        drafted = engine.generate(given, seeds=SEEDS[: len(given)], policy=policy, max_new_tokens=NEW)
        assert same(seen(engine, drafted), expected)
        assert sum(out.stats.num_drafted for out in drafted) > 0
    assert any(own.text is not None and own.draft is not None for own in engine.workspace.rounds.values())


def test_exits_of_the_trunk_that_draft_on_the_device(skipping: Callable) -> None:
    """A bare exit after layer 1: drafts run over each sequence's own neurons, and end where its text is read again."""
    engine, given = skipping(AGAIN, num_layers=4 if ON_GPU else 2)
    given = given[: 2 if ON_GPU else 1]
    decoder, config = engine.decoder, engine.decoder.config
    _, expected = alone(engine, given)
    sizes = HeadSetConfig(
        config.hidden_size, config.vocab_size, config.num_layers, (HeadSpec("adapter", 1, {"width": 1}),)
    )
    with torch.inference_mode():
        projection = Projection(decoder.final_norm, decoder.head_weight, config.logit_softcap, PackedLinear)
        engine.heads = HeadSet(sizes).attach(projection)
    drafted = engine.generate(given, seeds=SEEDS[: len(given)], policy=CHAIN, max_new_tokens=NEW)
    assert same(seen(engine, drafted), expected)
    assert any(isinstance(own.draft, TrunkDraft) for own in engine.workspace.rounds.values())
    assert sum(out.stats.num_drafted for out in drafted) > 0


def test_one_capture_serves_every_list(skipping: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other prompts, other densities, no mask: the same rounds, prepared once; each as a new engine has it."""
    engine, given = skipping(num_layers=2)
    captured = []
    original = Rounds._capture
    monkeypatch.setattr(Rounds, "_capture", lambda rounds, kind: captured.append(kind) or original(rounds, kind))
    _, expected = alone(engine, given[:2])
    assert captured == ["plain"]
    fresh, _ = skipping(num_layers=2)
    again = fresh.generate(given[1], seed=SEEDS[1], speculation=False, max_new_tokens=NEW)
    assert same(seen(fresh, [again]), expected[1:])
    engine.sparse = None
    dense = engine.generate(given[1], seed=SEEDS[1], speculation=False, max_new_tokens=NEW)
    assert dense.verify == "dense"
    assert not torch.equal(seen(engine, [dense])[0][1], expected[1][1]), "masks should matter"


# ---- planted bugs


@pytest.mark.hazard(24)
def test_wrong_lists_are_caught(skipping: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another sequence's, and those of the request before."""
    engine, given = skipping(num_layers=2)
    _, expected = alone(engine, given[:2])
    original = Rounds.keep
    wrong: list[Callable] = [
        lambda rounds, sequence, kept: original(rounds, 1 - sequence, kept),
        lambda rounds, sequence, kept: None,
    ]
    for ids, keep in ((given[:2], wrong[0]), (given[:1], wrong[1])):
        monkeypatch.setattr(Rounds, "keep", keep)
        outs = engine.generate(ids, seeds=SEEDS[: len(ids)], speculation=False, max_new_tokens=NEW)
        assert not same(seen(engine, outs), expected[: len(ids)])


def test_a_round_past_a_reading_is_caught(skipping: Callable, hang: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device does not know where texts are read again: the host sees no end there and decoding goes on."""
    engine, given = skipping(AGAIN, num_layers=2)
    outs, expected = alone(engine, given[:1])
    hang(outs)
    monkeypatch.setattr(device_loop, "_end", lambda on, request: len(request.history) + request.checker.num_remaining)
    drafted = engine.generate(given[:1], seeds=SEEDS[:1], policy=CHAIN, max_new_tokens=NEW)
    assert not same(seen(engine, drafted), expected)
