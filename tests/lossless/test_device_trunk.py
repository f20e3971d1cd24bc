"""Chains from exits of the trunk in rounds on the device: plain decoding's tokens, and the host's drafts.

The rounds run kernel by kernel in Triton's interpreter (`TRITON_INTERPRET=1`), which proves their logic only; on a GPU
they are captured, in bf16 too. Planted bugs that these tests were seen to catch: the exit layer of every node taken for
the first exit's, verification that leaves out the last drafted node, drafts that go on beyond the budget, a round that
drafts with the length of the one before the last request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from skipstone.engine.fused import FusedWeights
from skipstone.engine.gate import ALWAYS, DraftPolicy, Gate, every, fixed_exit, likely
from skipstone.engine.graphs import Rounds
from skipstone.engine.trunk_draft import TrunkDraft
from skipstone.heads import HeadSet, HeadSetConfig, HeadSpec, Projection
from skipstone.kernels.linear import PackedLinear

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32] + ([torch.bfloat16] if ON_GPU else [])
pytestmark = pytest.mark.triton
PROMPTS = [[4, 9, 2], list(range(5, 24)), [7]]
SEEDS = [5, 6, 7]
NEW = 40 if ON_GPU else 8
SAMPLED = {"temperature": 0.8}
TWO = DraftPolicy((1, 2), {1: Gate(3.4, 3.4), 2: Gate(3.0, 3.0)}, max_depth=4, branch=1)
COUNTS = ("num_drafted", "accepted_by_position", "drafted_by_position", "tokens_by_exit", "gate_stops",
          "drafted_by_entropy", "accepted_by_entropy")  # fmt: skip


@pytest.fixture(params=DTYPES, ids=str)
def engine(request: pytest.FixtureRequest, engine_of: Callable) -> Any:
    """With bare exits after layers 1 and 2 of 3 (untrained adapters), and its rounds on the device."""
    engine = engine_of(num_layers=3, dtype=request.param, device=DEVICE)
    decoder, config = engine.decoder, engine.decoder.config
    specs = tuple(HeadSpec("adapter", e, {"width": 1}) for e in (1, 2))
    heads = HeadSet(HeadSetConfig(config.hidden_size, config.vocab_size, config.num_layers, specs))
    with torch.inference_mode():
        projection = Projection(decoder.final_norm, decoder.head_weight, config.logit_softcap, PackedLinear)
        engine.heads = heads.attach(projection)
        engine.fused = FusedWeights(decoder)
    return engine


def by_host(engine: Any, prompt: Any, **options: Any) -> Any:
    """By the loop that waits for every round: drafts are the host's."""
    fused, engine.fused, engine._cache = engine.fused, None, None
    try:
        return engine.generate(prompt, **options)
    finally:
        engine.fused, engine._cache = fused, None


def same_drafts(out: Any, host: Any) -> None:
    for name in COUNTS:
        assert getattr(out.stats, name) == getattr(host.stats, name), name
    assert out.exit_layers == host.exit_layers


@pytest.mark.hazard(6, 24)
def test_a_batch_that_asks_two_exits(
    engine: Any, assert_same_output: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled. With all steps in every round the drafts are the host's, and so are their counts."""
    monkeypatch.setattr(Rounds, "draft_at_most", lambda *_: None)
    options: dict[str, Any] = {"seeds": SEEDS, "max_new_tokens": NEW, **SAMPLED}
    plain = engine.generate(PROMPTS, speculation=False, **options)
    together = engine.generate(PROMPTS, policy=TWO, **options)
    assert any(isinstance(rounds.draft, TrunkDraft) for rounds in engine._rounds.values())
    for out, expected in zip(together, plain, strict=True):
        assert_same_output(out, expected)
        assert out.stats.num_committed == NEW
    assert {e for out in together for e in out.stats.tokens_by_exit} == {1, 2}
    if not ON_GPU:  # where the host's own forwards round otherwise
        for out, host in zip(together, by_host(engine, PROMPTS, policy=TWO, **options), strict=True):
            same_drafts(out, host)
    alone = engine.generate(PROMPTS[1], seed=SEEDS[1], policy=TWO, max_new_tokens=NEW, **SAMPLED)
    assert_same_output(alone, plain[1])


@pytest.mark.hazard(6, 24)
@pytest.mark.parametrize(
    ("policy", "prompt"),
    [
        (fixed_exit(2, 3), PROMPTS[1]),
        (likely((2,), 0.05, max_depth=4), PROMPTS[1]),
        (every((2,), Gate(-1.0, -1.0), max_depth=3), PROMPTS[2]),
    ],
    ids=["chain", "by path", "refused at once"],
)
def test_one_exit(
    policy: DraftPolicy, prompt: list[int], engine: Any, assert_same_output: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rounds, "draft_at_most", lambda *_: None)
    plain = engine.generate(prompt, speculation=False, max_new_tokens=NEW)
    out = engine.generate(prompt, policy=policy, max_new_tokens=NEW)
    assert_same_output(out, plain)
    assert (out.stats.num_drafted > 0) == (policy.gates[2].high > 0)
    if not ON_GPU:
        host = by_host(engine, prompt, policy=policy, max_new_tokens=NEW)
        assert_same_output(host, plain)
        same_drafts(out, host)
        ran = out.stats.num_row_layers - host.stats.num_row_layers
        assert ran == 2 * (out.stats.num_drafted + out.stats.gate_stops)


@pytest.mark.hazard(24)
def test_a_stop_id_inside_a_draft(engine: Any, assert_same_output: Callable) -> None:
    options: dict[str, Any] = {"seed": SEEDS[1], "max_new_tokens": NEW, **SAMPLED}
    policy = every((2,), ALWAYS, max_depth=4, branch=1)
    whole = engine.generate(PROMPTS[1], policy=policy, **options)
    at = next(i for i, layer in enumerate(whole.exit_layers) if layer == 2)
    assert at + 1 < NEW
    options["stop_ids"] = [whole.token_ids[at]]
    out = engine.generate(PROMPTS[1], policy=policy, **options)
    assert out.token_ids == whole.token_ids[: out.stats.num_committed] and out.finish_reason == "stop"
    assert_same_output(out, engine.generate(PROMPTS[1], speculation=False, **options))


def test_rounds_draft_a_step_more_than_the_last_drafts_had(
    engine: Any, assert_same_output: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where gates end chains; the host is at most two rounds behind."""
    original, lengths = TrunkDraft.draft, []

    def draft(own: TrunkDraft, length: int) -> None:
        lengths.append(length)
        original(own, length)

    monkeypatch.setattr(TrunkDraft, "draft", draft)
    options: dict[str, Any] = {"seed": SEEDS[0], "max_new_tokens": 6, **SAMPLED}
    plain = engine.generate(PROMPTS[0], speculation=False, **options)
    found = []
    for _ in range(2):
        lengths.clear()
        out = engine.generate(PROMPTS[0], policy=TWO, **options)
        assert_same_output(out, plain)
        found.append((list(lengths), out.stats))
    if ON_GPU:  # graphs are replayed
        assert found[0][0] and not found[1][0]
    else:
        assert found[0] == found[1]
        assert lengths[:2] == [2, 2] and set(lengths) > {2} and max(lengths) <= 4
        assert out.stats.num_drafted <= sum(lengths)
