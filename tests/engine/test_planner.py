"""The planner: arithmetic of measured parts, what it chooses, and how a plan is kept.

Planted bugs seen to fail here: the slowest policy chosen; a fingerprint blind to the heads; chosen by the rehearsed
text alone, or by the harder one; a plan kept without its choice.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from skipstone.engine import planner
from skipstone.engine.costs import STEPS, _fused_costs, costs_of, fused_costs_of, measure_costs, take_turns
from skipstone.engine.expectation import Costs, Expected, expect
from skipstone.engine.gate import PLAIN, Gate, Lookup, best_first, every, fixed_exit, from_text
from skipstone.engine.load import load
from skipstone.engine.planner import (
    KEPT,
    Choice,
    candidates,
    choose,
    fingerprint,
    follow_plan,
    over_both,
    plan,
    plan_path,
    rank,
    rungs_of,
    store_plan,
)
from skipstone.heads.fitting import fit_calibration
from skipstone.heads.rehearsal import Rehearsal, TreeCounts

COSTS = Costs(10, {1: 1.0, 16: 1.0}, {1: 0.5}, {}, 0.5, 1.0, {2: 0.2, 6: 0.2}, 0.5, {1: 0.5, 4: 0.5})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def engine(tiny_folder, tiny_heads_folder):
    engine = load(tiny_folder, heads=tiny_heads_folder, dtype=torch.float32, device="cpu", progress=False)
    engine.heads.calibration = calibration(0.9, 0.2, exits=(2, 3))
    return engine


def calibration(early, late, exits=(2, 6), num=400, text=None):
    """Heads that are right so often, and sure where they are right. `text`: so many tokens of every draft from it."""
    rng = np.random.default_rng(0)
    right = {e: rng.random(num) < share for e, share in zip(exits, (early, late), strict=True)}
    nats = {e: np.where(own, 0.3, 3.0).astype(np.float32) for e, own in right.items()}
    fitted = fit_calibration(nats, {e: np.where(own, 0, 9) for e, own in right.items()})
    looked = None if text is None else np.array([[4] * num, [15] * num, [text] * num])
    rehearsal = Rehearsal((num // 2,) * 2, nats, right)
    if looked is not None:  # as far as each text goes
        rehearsal = replace(rehearsal, text=np.minimum(looked, [rehearsal.left * 99, rehearsal.left, rehearsal.left]))
    return replace(fitted, rehearsal=rehearsal)


def test_the_fastest_is_chosen():
    """An early exit that is nearly always right; long drafts from it cost little."""
    choices = rank(calibration(0.95, 0.1), COSTS)
    best = choose(choices)
    assert best.policy.exits == (2,) and best.policy.max_depth >= 4
    speeds, play = [choice.tokens_per_second for choice in choices], over_both(calibration(0.95, 0.1).rehearsal, COSTS)
    assert all(choice.expected == play(choice.policy) for choice in choices)
    assert best is choices[0] and speeds == sorted(speeds, reverse=True)
    assert len(choices) > 50 and len({choice.name for choice in choices}) == len(choices)


def made_up(name, speed):
    """A choice that is so much faster than plain decoding's 100 tokens a second."""
    policy = PLAIN if name == "plain" else fixed_exit(2, 3)
    return Choice(name, policy, Expected(speed * 1.2, 3.0, 12.0))


def test_both_texts_count_alike():
    """As many tokens of either, so the harder one, with more rounds, weighs more. Planted bugs: means of speeds; of
    rounds of either."""
    rehearsal = calibration(0.95, 0.1, text=5).rehearsal
    play = over_both(rehearsal, COSTS)
    for policy in (fixed_exit(2, 6), replace(fixed_exit(2, 6), lookup=Lookup())):
        one, other = (expect(policy, text, COSTS) for text in (rehearsal, rehearsal.harder(KEPT)))
        assert policy.lookup or one.tokens_per_second > other.tokens_per_second
        own = play(policy)
        assert own.tokens_per_second == pytest.approx(2 / (1 / one.tokens_per_second + 1 / other.tokens_per_second))
        assert own.tokens == pytest.approx(2 / (1 / one.tokens + 1 / other.tokens))
        rounds = one.drafted / one.tokens + other.drafted / other.tokens, 1 / one.tokens + 1 / other.tokens
        assert own.drafted == pytest.approx(rounds[0] / rounds[1]) and own.ms == pytest.approx(
            (one.ms / one.tokens + other.ms / other.tokens) / rounds[1]
        )
    for policy in (PLAIN, from_text()):  # heads alone are right less often
        assert play(policy).tokens_per_second == pytest.approx(expect(policy, rehearsal, COSTS).tokens_per_second)


def test_a_choice_behind_the_best_twenty_is_kept(engine, monkeypatch):
    many = [made_up(f"deep {i}", 2.5 - 1e-4 * i) for i in range(40)]
    many += [made_up("shallow", 2.0), made_up("plain", 1.0)]
    monkeypatch.setattr(planner, "rank", lambda *_: many)
    monkeypatch.setattr(planner, "choose", lambda *_, **__: many[-2])
    made = plan(engine, costs=COSTS)
    assert [choice.name for choice in made.choices] == [*(f"deep {i}" for i in range(18)), "shallow", "plain"]
    store_plan(made)
    assert follow_plan(engine) == made and made.chosen.name == "shallow"


@pytest.mark.parametrize("costs", [COSTS, replace(COSTS, ask_ms={2: 30.0, 6: 30.0})])
def test_useless_heads_are_not_asked(costs):
    assert choose(rank(calibration(0.0, 0.0), costs)).policy == PLAIN


def test_good_heads_that_are_too_dear_are_not_asked():
    dear = replace(COSTS, ask_ms={2: 40.0, 6: 40.0})
    assert choose(rank(calibration(0.95, 0.95), dear)).policy == PLAIN


def test_trees_where_rows_are_free_and_chains_where_they_are_not():
    rehearsal = Rehearsal(
        (100,), chain_entropy=np.ones((8, 100), np.float32), chain_right=np.array([2, 0, 1, 0, 0] * 20),
        beam=4, branch=4, trees={(3, 15): TreeCounts(2.6, 15.0, 3.0), (3, 4): TreeCounts(2.0, 4.0, 3.0)},
    )  # fmt: skip
    fitted = replace(calibration(0.5, 0.5), rehearsal=rehearsal)
    free = replace(COSTS, layer_ms={1: 1.0, 16: 1.01})
    assert choose(rank(fitted, free)).name == "tree:4:4:3:15"
    assert choose(rank(fitted, replace(COSTS, layer_ms={1: 1.0, 3: 1.05, 16: 9.0}))).policy.beam == 0


def test_rungs_are_lengths_of_chains_and_depths_of_trees_that_were_rehearsed():
    """Planted bug: chains that a gate ends have rungs, whose costs are those of the rehearsed text's longer drafts."""
    rehearsal = calibration(0.9, 0.2).rehearsal
    right = np.minimum(np.full(400, 4), rehearsal.left - 1)
    trees = {(2, 9): TreeCounts(2.2, 9.0, 2.0), (4, 9): TreeCounts(3.1, 9.0, 4.0), (3, 15): TreeCounts(2.9, 15.0, 3.0)}
    rehearsal = replace(
        rehearsal, chain_entropy=np.zeros((8, 400), np.float32), chain_right=right, beam=4, branch=4, trees=trees
    )
    chains = rungs_of(replace(fixed_exit(0, 3), lookup=Lookup(1)), rehearsal, COSTS)
    assert list(chains) == [1, 2, 3, 4, 5, 6]
    assert [chains[n].drafted for n in (1, 2)] == pytest.approx([1.0, 2.0], abs=0.02)  # a text ends
    deep = rungs_of(best_first(4, 4, 4, 9), rehearsal, COSTS)
    assert list(deep) == [2, 4] and deep[2].tokens < 2.2 < deep[4].tokens < 3.1 and deep[4].ms > deep[2].ms
    assert rungs_of(every((0,), Gate(2.0, 2.0), branch=1, max_depth=3), rehearsal, COSTS) == {}
    assert rungs_of(PLAIN, rehearsal, COSTS) == {} == rungs_of(from_text(), rehearsal, COSTS)


def test_the_text_is_planned_where_it_is_right_and_left_out_where_it_is_not():
    """Beside heads that are good, alone where they are not; a text that is never right costs rows."""
    rows = replace(COSTS, layer_ms={1: 1.0, 16: 2.0})
    assert choose(rank(calibration(0.0, 0.0, text=5), rows)).policy.sources == ("text",)
    assert choose(rank(calibration(0.95, 0.1, text=0), rows)).policy.sources == ("heads",)
    assert choose(rank(calibration(0.0, 0.0, text=0), rows)).policy == PLAIN
    mixed = rank(calibration(0.95, 0.1, text=5), rows)
    assert {choice.policy.sources for choice in mixed} == {(), ("text",), ("heads",), ("text", "heads")}
    assert len({choice.name for choice in mixed}) == len(mixed)
    captured = rank(calibration(0.95, 0.1, text=5), replace(rows, reuse=False))
    assert {choice.policy.sources for choice in captured} == {(), ("text",), ("heads",)}  # of trunk exits: by the host


def test_captured_rounds_put_the_text_beside_heads_unless_it_costs_much():
    """Trees and a text that is never right: beside them where that costs little, not where it costs a tenth."""
    rows = replace(COSTS, layer_ms={1: 1.0, 16: 1.01}, reuse=False)
    trees = {(3, 15): TreeCounts(4.0, 15.0, 3.0)}
    fitted = calibration(0.0, 0.0, text=0)
    for share, expected in ((0.02, ("text", "heads")), (0.95, ("heads",))):
        wrong = np.random.default_rng(1).random(400) < share  # of matches, none is right
        own = replace(
            fitted.rehearsal, text=np.stack([np.where(wrong, 3, 0), fitted.rehearsal.left, np.zeros(400, int)])
        )
        own = replace(own, chain_entropy=np.ones((8, 400), np.float32), chain_right=np.zeros(400, int))
        own = replace(own, beam=4, branch=4, trees=trees)
        choices = rank(replace(fitted, rehearsal=own), rows)
        assert choose(choices).policy.sources == ("heads",)
        assert choose(choices, captured=True).policy.sources == expected
        assert {choice.name: choice.policy.lookup for choice in choices}["tree:4:4:3:15+beside:15:1"].beside


def test_parts_from_probes():
    times = {
        "rows:1": 40.0, "rows:4": 44.0, "output:1": 4.0, "output:4": 5.0, "tree:4": 47.0, "ask:5": 23.0, "chain:1": 6.0,
        f"chain:{STEPS}": 6.0 + 4 * (STEPS - 1), "best:1": 7.0, f"best:{STEPS}": 7.0 + 5 * (STEPS - 1), "plain": 46.0,
        "prefill": 64.0,
    }  # fmt: skip
    costs = costs_of(times, 10, 32)
    assert (costs.layer_ms, costs.tree_ms, costs.ask_ms) == ({1: 4.0, 4: 4.4}, {4: 3.0}, {5: 3.0})
    assert (costs.open_ms, costs.grow_ms, costs.step_ms, costs.prefill_ms) == (6.0, {1: 4.0, 4: 5.0}, 2.0, 2.0)
    assert costs.plain_ms == 46.0
    assert Costs.from_document(json.loads(json.dumps(costs.to_document()))) == costs


def test_parts_from_whole_rounds():
    """Of a GPU: a made-up one where verifying takes 100, 102 for more rows, 104 for a tree of 16, a head's first step
    15, another 10, with a beam 12."""
    times = {"plain": 100.0, "text": 102.0, "exit:0:1": 117.0, f"exit:0:{STEPS}": 107.0 + 10 * STEPS}
    times |= {"best:2": 104.0 + 15 + 12, f"best:{STEPS}": 104.0 + 15 + 12 * (STEPS - 1)}
    costs = fused_costs_of(times, 10, 0.1)
    assert costs.plain_ms == pytest.approx(100.0) and not costs.reuse
    assert costs.tree_verification(2) == pytest.approx(102.0) and costs.tree_verification(16) == pytest.approx(104.0)
    assert (costs.open_ms, costs.grow_ms) == (15.0, {1: 10.0, 4: 12.0})
    trunk = {"plain": 100.0, "text": 103.0} | {
        f"exit:{e}:{n}": 100.0 + n * (5 + 2 * e) for e in (4, 8) for n in (1, STEPS)
    }
    costs = fused_costs_of(trunk, 10, 0.1)
    assert costs.draft_layer_ms == pytest.approx(2.0) and costs.ask_ms == pytest.approx({4: 5.0, 8: 5.0})
    assert 10 * costs.layer[2] == pytest.approx(103.0)


def test_probes_take_turns_and_slow_moments_do_not_count():
    calls = []

    def probe(name, times):
        return lambda: (calls.append(name), times.pop(0))[1]

    found = take_turns({"a": probe("a", [90.0, 1.0, 50.0]), "b": probe("b", [5.0, 5.0, 70.0])}, 0.0)
    assert calls == ["a", "b", "a", "b"] and found == {"a": 1.0, "b": 5.0}


def test_a_machine_is_measured(engine, engine_of, stateful):
    costs = measure_costs(engine, 0.0)
    assert set(costs.ask_ms) == {2, 3} and costs.plain_ms > 0 and costs.prefill_ms > 0 and costs.layer[16] > 0
    other = engine_of()
    stateful(other, "recurrent")
    costs = measure_costs(other, 0.0)
    assert costs.open_ms > 0 and set(costs.grow_ms) == {1, 4} and not costs.ask_ms
    whole = _fused_costs(other, 0.0)  # by whole rounds, as where they are captured
    assert not whole.reuse and set(whole.grow_ms) == {1, 4} and set(whole.layer_ms) == {1, 2, 16}


def test_a_plan_is_kept_and_followed(engine, tiny_folder, tiny_heads_folder):
    made = plan(engine, costs=replace(COSTS, num_layers=4, ask_ms={2: 0.1, 3: 0.1}))
    assert made.chosen.policy.exits == (2,) and made.speedup > 1.02 and made.plain.policy == PLAIN
    assert follow_plan(engine) is None and engine.plan is None
    store_plan(made)
    assert follow_plan(engine) == made and engine.policy == engine.policy_for(8) == made.chosen.policy
    looked = replace(made.chosen, name="looked", policy=replace(made.chosen.policy, lookup=Lookup(2, 3)))
    store_plan(replace(made, chosen=looked, choices=(looked, *made.choices)))
    assert follow_plan(engine) is not None and engine.policy == looked.policy
    store_plan(made)
    assert follow_plan(engine) == made
    expected = engine.generate([1, 2, 3], max_new_tokens=12, speculation=False)
    assert engine.generate([1, 2, 3], max_new_tokens=12).token_ids == expected.token_ids
    other = load(tiny_folder, heads=tiny_heads_folder, dtype=torch.float32, device="cpu", progress=False)
    assert other.plan is None  # its heads are calibrated otherwise
    other.heads.calibration = engine.heads.calibration
    assert fingerprint(other) == made.fingerprint and follow_plan(other) == made
    assert fingerprint(other, batch=2) != made.fingerprint
    plan_path(made.fingerprint).write_text("{}")
    assert follow_plan(other) is None


def test_plain_may_be_the_plan(engine):
    engine.heads.calibration = calibration(0.0, 0.0, exits=(2, 3))
    store_plan(plan(engine, costs=replace(COSTS, ask_ms={2: 0.2, 3: 0.2})))
    assert follow_plan(engine) is not None and engine.policy == PLAIN
    assert engine.generate([1, 2, 3], max_new_tokens=12).stats.num_drafted == 0


def test_planning_at_load(tiny_folder, tiny_heads_folder, monkeypatch):
    options = {"heads": tiny_heads_folder, "dtype": torch.float32, "device": "cpu", "progress": False}
    with pytest.raises(ValueError, match="not rehearsed"):
        load(tiny_folder, plan="now", **options)
    monkeypatch.setattr(planner, "plan", lambda engine: replace(made, fingerprint=fingerprint(engine)))
    plain = next(c for c in rank(calibration(0.0, 0.0), COSTS) if c.policy == PLAIN)
    made = planner.Plan("", COSTS, plain, (plain,), 1, 0.0)
    assert load(tiny_folder, plan="now", **options).policy == PLAIN
    assert load(tiny_folder, **options).plan is not None
    assert load(tiny_folder, plan="none", **options).plan is None
    with pytest.raises(ValueError, match="plan is 'later'"):
        load(tiny_folder, plan="later", **options)


def test_names_of_candidates_are_policies(engine):
    found = dict(candidates(engine.heads.calibration))
    assert found["plain"] == PLAIN and found["fixed:2:4"].max_depth == 4
    assert all(policy.branch == 1 or policy.exits in ((), (2,), (3,)) for policy in found.values())
