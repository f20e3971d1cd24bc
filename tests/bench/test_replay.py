"""Replayed arms count what real ones count, field by field."""

from __future__ import annotations

from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import pytest
import torch
from skipstone.bench.arms import parse_arms
from skipstone.bench.replay import ReplayArm, replay, replayed
from skipstone.engine.engine import Engine
from skipstone.engine.load import load

ARMS = "fixed:*:1-5,bare:1:1-3,bare:3:4,accuracy:0.7"


@pytest.fixture(scope="module")
def engine(tiny_folder: Path, tiny_heads_folder: Path) -> Engine:
    return load(tiny_folder, heads=tiny_heads_folder, dtype=torch.float32, device="cpu", progress=False)


@pytest.mark.parametrize("prompt", ["a stone skips over", "the rain"])
@pytest.mark.parametrize("stop_at", [None, 5])
def test_counts_are_those_of_a_real_run(engine: Engine, prompt: str, stop_at: int | None) -> None:
    """With the budget reached and with a stop id in mid-block. Planted bugs: a draft as long at the budget's end, a
    bonus counted behind a stop, guesses one token off."""
    assert engine.tokenizer is not None
    ids = engine.tokenizer.encode(prompt)
    sampling: dict[str, Any] = {"max_new_tokens": 17, "temperature": 0.0, "seed": 0}
    if stop_at is not None:
        plain = engine.generate(ids, speculation=False, **sampling)
        sampling["stop_ids"] = (plain.token_ids[stop_at],)
    real = parse_arms(ARMS, engine)
    counted = replayed(real, engine)
    assert sum(isinstance(arm, ReplayArm) for arm in counted) == 14
    for own, arm in zip(counted, real, strict=True):
        expected, found = arm.run(ids, sampling), own.run(ids, sampling)
        assert found.token_ids == expected.token_ids
        assert expected.stats is not None and found.stats is not None
        # A replay does not know what a head would say behind a wrong draft, so it has no entropies.
        unknown: dict[str, Any] = {"prefill_ms": 0.0, "decode_ms": 0.0}
        if isinstance(own, ReplayArm):
            assert found.stats.drafted_by_entropy == {}
            unknown |= {"drafted_by_entropy": {}, "accepted_by_entropy": {}}
        assert changed(found.stats, **unknown) == changed(expected.stats, **unknown), arm.name
        if arm.name == "fixed:3:3":
            assert 0 < found.stats.num_accepted < found.stats.num_drafted
        if isinstance(own, ReplayArm):
            assert own.describe() == arm.describe() | {"replayed": True}
            assert found.wall_ms == 0.0
    assert engine.observer is None


def test_a_round_ends_at_the_first_wrong_guess() -> None:
    tokens, guesses = [1, 2, 3, 4, 5, 6, 7], [1, 2, 9, 4, 5, 6, 7]
    stats = replay(tokens, guesses, exit_layer=3, length=3, budget=100)
    # 1 2 accepted, 3 written; 4 5 6 accepted, 7 written
    assert (stats.num_verifications, stats.num_accepted, stats.num_drafted) == (2, 5, 6)
    assert stats.accepted_by_position == (2, 2, 1) and stats.drafted_by_position == (2, 2, 2)
    assert stats.tokens_by_exit == {3: 5} and stats.num_committed == 7
