"""Chains and trees from exits of the trunk in rounds on the device: plain decoding's tokens, and the host's drafts.

The rounds run kernel by kernel in Triton's interpreter (`TRITON_INTERPRET=1`), which proves their logic only; on a GPU
they are captured, in bf16 too. Planted bugs that these tests were seen to catch: verification that goes on from the
first of two exits, the last node not run to the exit, one exit layer for all nodes, steps that go on when no chain does
or end with the first sequence's, layers of rows counted twice; entries of a block head not made of a prompt, not in
plain rounds, or not moved with the accepted path.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from skipstone.engine import engine as engine_module
from skipstone.engine.fused import FusedWeights
from skipstone.engine.gate import ALWAYS, PLAIN, DraftPolicy, Gate, every, fixed_exit, likely
from skipstone.engine.graphs import Record
from skipstone.engine.statistics import Statistics
from skipstone.engine.trunk_draft import TrunkDraft
from skipstone.heads import HeadSet, HeadSetConfig, HeadSpec, Projection
from skipstone.kernels.accept import RECORD
from skipstone.kernels.linear import PackedLinear

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32] + ([torch.bfloat16] if ON_GPU else [])
pytestmark = pytest.mark.triton
PROMPTS = [[4, 9, 2], list(range(5, 24)), [7]]
SEEDS = [5, 6, 7]
NEW = 40 if ON_GPU else 8
SAMPLED = {"temperature": 0.8}
# gates that branch, extend and stop
TREES = {
    "one exit": every((2,), Gate(2.9, 3.3), branch=3, max_depth=3, max_nodes=15),
    "one exit, by path": every((2,), Gate(1.6, 3.4), branch=2, max_depth=3, max_nodes=7, confidence="path"),
    "two exits": DraftPolicy((1, 2), {1: Gate(2.4, 2.8), 2: Gate(2.9, 3.3)}, max_depth=3, branch=2, max_nodes=13),
}
TWO = DraftPolicy((1, 2), {1: Gate(3.2, 3.2), 2: Gate(3.0, 3.0)}, max_depth=3, branch=1)
COUNTS = ("num_drafted", "accepted_by_position", "drafted_by_position", "tokens_by_exit", "gate_stops",
          "drafted_by_entropy", "accepted_by_entropy")  # fmt: skip


BARE = "adapter", {"width": 1}  # untrained
BLOCK = "block", {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "ff": 32}


@pytest.fixture(params=DTYPES, ids=str)
def engine(request: pytest.FixtureRequest, engine_of: Callable) -> Any:
    """With bare exits after layers 1 and 2 of 3, and its rounds on the device."""
    return with_heads(engine_of, request.param, BARE, BARE)


def with_heads(engine_of: Callable, dtype: torch.dtype, *kinds: tuple[str, dict[str, int]]) -> Any:
    """An engine of a short context, so that attention launches few programs that leave at once."""
    engine = engine_of(num_layers=3, dtype=dtype, max_context=200, device=DEVICE)
    decoder, config = engine.decoder, engine.decoder.config
    specs = tuple(HeadSpec(kind, e, options) for e, (kind, options) in enumerate(kinds, 1))
    torch.manual_seed(5)
    heads = HeadSet(HeadSetConfig(config.hidden_size, config.vocab_size, config.num_layers, specs))
    with torch.inference_mode():
        projection = Projection(decoder.final_norm, decoder.head_weight, config.logit_softcap, PackedLinear)
        engine.heads = heads.attach(projection)
        engine.fused = FusedWeights(decoder)
    return engine


def by_host(engine: Any, prompt: Any, **options: Any) -> Any:
    """By the loop that waits for every round: drafts are the host's."""
    fused, engine.fused, engine.workspace.cache = engine.fused, None, None
    try:
        return engine.generate(prompt, **options)
    finally:
        engine.fused, engine.workspace.cache = fused, None


@functools.cache
def plainly(engine_of: Callable, dtype: torch.dtype, sampled: bool) -> list[tuple[Any, torch.Tensor]]:
    """The prompts' plain decoding, all together, and its committed keys and values: heads do not enter into it."""
    engine = with_heads(engine_of, dtype, BARE, BARE)
    outs = engine.generate(PROMPTS, seeds=SEEDS, speculation=False, max_new_tokens=NEW, **(SAMPLED if sampled else {}))
    return [(out, committed(engine, out, b)) for b, out in enumerate(outs)]


def same_drafts(out: Any, host: Any) -> None:
    for name in COUNTS:
        assert getattr(out.stats, name) == getattr(host.stats, name), name
    assert out.exit_layers == host.exit_layers


def committed(engine: Any, out: Any, sequence: int = 0) -> torch.Tensor:
    size = len(out.prompt_ids) + len(out.token_ids) - 1
    return torch.stack([torch.stack(engine.workspace.cache.read(layer, sequence, size)) for layer in range(3)]).clone()


@torch.inference_mode()
def entries(engine: Any, out: Any, sequence: int) -> torch.Tensor:
    """Of a block head: keys and values of all tokens but the pending one."""
    (memory,) = engine.workspace.memories.values()
    memory.take_in(sequence)  # on the host some wait
    size = len(out.prompt_ids) + len(out.token_ids) - 1
    return torch.stack([store[:, sequence, :, :size] for store in (memory.cache.k, memory.cache.v)]).clone()


def wrong_drafts(out: Any) -> int:
    return out.stats.num_drafted - out.stats.num_accepted


@pytest.mark.hazard(6, 24)
def test_a_batch_that_asks_two_exits(
    engine: Any, assert_same_output: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled. With all steps in every round the drafts are the host's, and so are their counts."""
    options: dict[str, Any] = {"seeds": SEEDS, "max_new_tokens": NEW, **SAMPLED}
    plain = engine.generate(PROMPTS, speculation=False, **options)
    together = engine.generate(PROMPTS, policy=TWO, **options)
    assert any(isinstance(rounds.draft, TrunkDraft) for rounds in engine.workspace.rounds.values())
    for out, expected in zip(together, plain, strict=True):
        assert_same_output(out, expected)
        assert out.stats.num_committed == NEW
    assert {e for out in together for e in out.stats.tokens_by_exit} == {1, 2}
    if not ON_GPU:  # where the host's own forwards round otherwise
        for out, host in zip(together, by_host(engine, PROMPTS, policy=TWO, **options), strict=True):
            same_drafts(out, host)
    else:
        alone = engine.generate(PROMPTS[1], seed=SEEDS[1], policy=TWO, max_new_tokens=NEW, **SAMPLED)
        assert_same_output(alone, plain[1])


@pytest.mark.hazard(6, 24)
@pytest.mark.parametrize(
    ("policy", "which", "new"),
    [
        (fixed_exit(2, 3), 1, NEW),
        (likely((2,), 0.05, max_depth=3), 1, NEW - 2),
        (every((2,), Gate(-1.0, -1.0), max_depth=3), 2, NEW // 2),
    ],
    ids=["chain", "by path", "refused at once"],
)
def test_one_exit(
    policy: DraftPolicy, which: int, new: int, engine: Any, engine_of: Callable, assert_same_output: Callable
) -> None:
    """Verification goes on from the exit; committed keys and values too are plain decoding's, on a GPU bit for bit."""
    prompt, (plain, expected) = PROMPTS[which], plainly(engine_of, engine.decoder.dtype, False)[which]
    out = engine.generate(prompt, policy=policy, max_new_tokens=new)
    assert_same_output(out, dataclasses.replace(plain, token_ids=plain.token_ids[:new]))
    expected = expected[..., : len(prompt) + new - 1, :]
    slack = {"rtol": 0.0, "atol": 0.0} if ON_GPU else {"rtol": 1e-4, "atol": 1e-5}
    assert torch.allclose(committed(engine, out), expected, **slack)
    assert (out.stats.num_drafted > 0) == (policy.gates[2].high > 0)
    if not ON_GPU:
        host = by_host(engine, prompt, policy=policy, max_new_tokens=new)
        same_drafts(out, host)
        assert out.stats.num_row_layers == host.stats.num_row_layers == 3 * (new + wrong_drafts(out))


@pytest.mark.hazard(6, 24)
@pytest.mark.parametrize(
    ("name", "sampling", "batch"),
    [
        ("one exit", {}, 2), ("one exit", SAMPLED, 1), ("one exit, by path", SAMPLED, 2), ("two exits", {}, 1),
        ("two exits", SAMPLED, 2),
    ],
    ids=lambda of: {0: "greedy", 1: "sampled"}[len(of)] if isinstance(of, dict) else str(of),
)  # fmt: skip
def test_trees(
    name: str, sampling: dict[str, Any], batch: int, engine: Any, engine_of: Callable, assert_same_output: Callable
) -> None:
    """Tokens, committed keys and values are plain decoding's; trees and their counts are the host's. With
    one exit verification goes on from it; with two it starts over, and the layers that ran twice are counted."""
    options: dict[str, Any] = {"seeds": SEEDS[2 - batch : 2], "max_new_tokens": NEW, **sampling}
    prompts, policy = PROMPTS[2 - batch : 2], TREES[name]
    outs = engine.generate(prompts, policy=policy, **options)
    assert any(isinstance(rounds.draft, TrunkDraft) for rounds in engine.workspace.rounds.values())
    slack = {"rtol": 0.0, "atol": 0.0} if ON_GPU else {"rtol": 1e-4, "atol": 1e-5}
    wanted = plainly(engine_of, engine.decoder.dtype, bool(sampling))[2 - batch : 2]
    for b, (out, (plain, expected)) in enumerate(zip(outs, wanted, strict=True)):
        assert_same_output(out, plain)
        assert torch.allclose(committed(engine, out, b), expected, **slack)
    stats = Statistics.merge(out.stats for out in outs)
    assert stats.num_accepted > 0 and stats.gate_stops > 0
    assert stats.num_drafted > sum(stats.drafted_by_position), "siblings"
    if ON_GPU:  # where the host's own forwards round otherwise
        return
    for out, host in zip(outs, by_host(engine, prompts, policy=policy, **options), strict=True):
        same_drafts(out, host)
        again = out.stats.num_row_layers - host.stats.num_row_layers
        assert again == 0 if len(policy.exits) == 1 else again >= out.stats.num_drafted


class Turns:
    """In place of a pace: every third round is plain."""

    paused: frozenset[str] = frozenset()
    ladder = None

    def __init__(self) -> None:
        self.rounds = 0

    def place(self, length: int) -> None: ...

    def next(self, policy: DraftPolicy) -> DraftPolicy:
        self.rounds += 1
        return policy if self.rounds % 3 else PLAIN

    def round(self, *_: Any) -> None: ...


@pytest.mark.hazard(6, 24)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("policy", "kinds", "batch"),
    [
        (every((2,), Gate(3.3, 3.3), max_depth=2, branch=1), (BARE, BLOCK), 1),
        (every((2,), Gate(-math.inf, 3.4), max_depth=2, branch=3, max_nodes=12), (BARE, BLOCK), 2),
        (DraftPolicy((1, 2), {1: Gate(2.8, 3.1), 2: Gate(2.8, 3.3)}, max_depth=2, branch=2), (BLOCK, BARE), 1),
    ],
    ids=["chains", "trees", "trees of two exits"],
)
def test_block_heads(
    policy: DraftPolicy, kinds: Any, batch: int, dtype: torch.dtype, engine_of: Callable, assert_same_output: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Heads whose entries come from prompts, drafts, verification behind several exits and plain rounds; sampled.
    Drafts are the host's in every round, and entries of all committed tokens in the end."""
    engine = with_heads(engine_of, dtype, *kinds)
    options: dict[str, Any] = {"seeds": SEEDS[2 - batch : 2], "max_new_tokens": NEW, **SAMPLED}
    prompts = PROMPTS[2 - batch : 2]
    for name in ("decode", "decode_on_device"):
        original = getattr(engine_module, name)
        monkeypatch.setattr(engine_module, name, lambda *args, original=original: original(*args[:-1], Turns()))
    outs = engine.generate(prompts, policy=policy, **options)
    assert any(isinstance(rounds.draft, TrunkDraft) for rounds in engine.workspace.rounds.values())
    for out, (plain, _) in zip(outs, plainly(engine_of, dtype, True)[2 - batch : 2], strict=True):
        assert_same_output(out, plain)
    assert any(out.stats.num_accepted for out in outs)
    made = [entries(engine, out, b) for b, out in enumerate(outs)]
    if not ON_GPU:
        for b, host in enumerate(by_host(engine, prompts, policy=policy, **options)):
            same_drafts(outs[b], host)
            assert torch.allclose(made[b], entries(engine, host, b), rtol=1e-3, atol=1e-4)


@pytest.mark.hazard(24)
def test_a_stop_id_inside_a_draft(engine: Any, assert_same_output: Callable) -> None:
    options: dict[str, Any] = {"seed": SEEDS[1], "max_new_tokens": NEW, **SAMPLED}
    policy = every((2,), ALWAYS, max_depth=3, branch=1)
    whole = engine.generate(PROMPTS[1], policy=policy, **options)
    at = next(i for i, layer in enumerate(whole.exit_layers) if layer == 2)
    assert at + 1 < NEW
    options["stop_ids"] = [whole.token_ids[at]]
    out = engine.generate(PROMPTS[1], policy=policy, **options)
    assert out.token_ids == whole.token_ids[: out.stats.num_committed] and out.finish_reason == "stop"
    assert_same_output(out, engine.generate(PROMPTS[1], speculation=False, **options))


def test_records_name_the_exit_of_each_node() -> None:
    values = [0] * RECORD
    values[:6], values[20:23] = [1, 0, 3, 9, 11, 12], [0, 1, -1]
    values[36:39], values[52:55] = [10, 11, 13], [-1, 0, 1]
    record = Record.read(values, [0.0] * 16, [0, 12, 24, *[7] * 13], 1, 60)
    assert record is not None and record.tree.exit_layers == [None, 12, 24]
    assert record.tokens == (11, 12) and record.nodes == (1,) and record.num_refused == 1
    assert record.row_layers == 60


def test_a_draft_ends_with_its_last_node(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is launched only where a tree has rows in it: one for each level, and the last one's way to the exit."""
    original, steps = TrunkDraft.goes_on, []

    def goes_on(draft: TrunkDraft) -> bool:
        steps.append(original(draft))
        return steps[-1]

    monkeypatch.setattr(TrunkDraft, "goes_on", goes_on)
    for policy in (every((2,), Gate(-1.0, -1.0), max_depth=3), likely((2,), 0.05, max_depth=3)):
        steps.clear()
        out = engine.generate(PROMPTS[1], policy=policy, max_new_tokens=4)
        assert sum(steps) >= out.stats.num_drafted and (sum(steps) > 0) == (out.stats.num_drafted > 0)
        assert steps.count(False) >= out.stats.gate_stops
    steps.clear()
    full = every((2,), Gate(-math.inf, math.inf), branch=3, max_depth=3, max_nodes=5)
    stats = engine.generate(PROMPTS[1], policy=full, max_new_tokens=NEW).stats
    assert stats.gate_stops == 0 and sum(steps) == sum(stats.drafted_by_position)
