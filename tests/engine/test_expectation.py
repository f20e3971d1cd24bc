"""Expected tokens against real runs of the same prompts: every round of every policy, from one plain rehearsal.

Planted bugs seen to fail here: a chain counted one token too long at a text's end; the deeper of two sure exits asked.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from skipstone.engine.expectation import Costs, Expected, expect
from skipstone.engine.gate import ALWAYS, BESIDE, PLAIN, DraftPolicy, Gate, Lookup, best_first, fixed_exit, likely
from skipstone.engine.load import load
from skipstone.engine.statistics import Statistics
from skipstone.heads import Calibration
from skipstone.heads.rehearsal import Rehearsal, TreeCounts
from skipstone.train.rehearse import play_trees, rehearse

PROMPTS = [[5, 80, 200], [3, 9, 27, 81, 243], [100, 101], [7, 7, 7, 7]]
STUDIED = [[1, 2, 3], [7, 8, 9, 10], [30, 31]]
OPTIONS = {"max_new_tokens": 33}
COSTS = Costs(4, {1: 1.0, 16: 1.0}, {1: 2.0}, {1: 0.0, 16: 8.0}, 0.5, 1.0, {2: 3.0, 3: 5.0}, 7.0, {1: 2.0, 4: 4.0})


def real(engine, policy, prompts):
    outs = engine.generate(prompts, speculation="always", policy=policy, **OPTIONS)
    return Statistics.merge(out.stats for out in outs)


@pytest.fixture(scope="module")
def trunk(tiny_folder, tiny_heads_folder):
    engine = load(tiny_folder, heads=tiny_heads_folder, dtype=torch.float32, device="cpu", progress=False)
    return engine, rehearse(engine, PROMPTS, **OPTIONS).rehearsal()


@pytest.fixture(scope="module")
def recurrent(engine_of, stateful):
    engine = engine_of()
    stateful(engine, "recurrent", prompts=STUDIED)
    return engine, rehearse(engine, STUDIED, **OPTIONS)


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_fixed_exits(trunk, depth):
    engine, rehearsal = trunk
    for exit_layer in (2, 3):
        stats, found = real(engine, fixed_exit(exit_layer, depth), PROMPTS), None
        found = expect(fixed_exit(exit_layer, depth), rehearsal, COSTS)
        assert found.tokens == pytest.approx(stats.tokens_per_verification)
        assert found.drafted == pytest.approx(stats.num_drafted / stats.num_verifications)
    assert found is not None and found.tokens > 1.1


@pytest.mark.parametrize("exits", [(2,), (3,), (2, 3)])
def test_gated_exits(trunk, exits):
    engine, rehearsal = trunk
    nats = float(np.median(rehearsal.entropy[2])) + 1e-4
    policy = DraftPolicy(exits, {e: Gate(nats, nats) for e in exits}, max_depth=4, branch=1)
    found, stats = expect(policy, rehearsal, COSTS), real(engine, policy, PROMPTS)
    assert found.tokens == pytest.approx(stats.tokens_per_verification)
    assert 0 < found.drafted < 4


@pytest.mark.parametrize(("depth", "stop"), [(1, math.inf), (4, math.inf), (6, 1.5), (3, 0.5)])
def test_chains_of_a_head_at_exit_0(recurrent, depth, stop):
    engine, found = recurrent
    policy = DraftPolicy((0,), {0: Gate(stop, stop)}, max_depth=depth, branch=1)
    expected, stats = expect(policy, found.rehearsal(), COSTS), real(engine, policy, STUDIED)
    assert expected.tokens == pytest.approx(stats.tokens_per_verification)
    assert expected.drafted == pytest.approx(stats.num_drafted / stats.num_verifications)


LOOKUPS = [Lookup(), Lookup(2, 3, 5), Lookup(1, 15, 15)]


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_drafts_from_the_text_alone_and_beside_heads(recurrent, trunk, lookup):
    """Planted bugs: a match's drafts cut to a head's depth; heads asked beside them."""
    own, found = recurrent
    for engine, rehearsal, prompts, policy in (
        (own, found.rehearsal(), STUDIED, PLAIN),
        (own, found.rehearsal(), STUDIED, fixed_exit(0, 2)),
        (*trunk, PROMPTS, fixed_exit(2, 3)),
    ):
        mixed = replace(policy, lookup=lookup)
        expected, stats = expect(mixed, rehearsal, COSTS), real(engine, mixed, prompts)
        assert expected.tokens == pytest.approx(stats.tokens_per_verification)
        assert expected.drafted == pytest.approx(stats.num_drafted / stats.num_verifications)
        assert expected.drafted > expect(policy, rehearsal, COSTS).drafted * 0.9 and expected.drafted > 0


@pytest.mark.parametrize("lookup", [Lookup(beside=True), Lookup(1, 15, 3, beside=True), Lookup(2, 15, 15, beside=True)])
def test_chains_that_the_text_drafts_beside(recurrent, lookup):
    """Planted bugs: the longer of both drafts in place of the better one; heads' nodes beyond the rows."""
    engine, found = recurrent
    policy = replace(fixed_exit(0, 3), lookup=lookup)
    expected, stats = expect(policy, found.rehearsal(), replace(COSTS, reuse=False)), real(engine, policy, STUDIED)
    assert expected.tokens == pytest.approx(stats.tokens_per_verification)


def test_time_of_drafts_from_the_text():
    """One text of six tokens: a match of two drafts four, one of them right; then a plain step; a match at the end."""
    text = np.array([[2, 9, 0, 3, 9, 9], [9, 9, 0, 9, 9, 9], [1, 9, 0, 9, 9, 9]])
    rehearsal = Rehearsal((6,), text=text)
    costs = Costs(4, {1: 1.0, 5: 2.0, 16: 9.0}, {1: 10.0}, step_ms=0.5)
    found = expect(DraftPolicy(lookup=Lookup()), rehearsal, costs)
    last = 4 * costs.layer[3]  # two tokens are left beside the bonus
    assert found.ms == pytest.approx((4 * 2.0 + 4 * 1.0 + last) / 3 + 10.5)
    assert (found.tokens, found.drafted) == (6 / 3, (4 + 0 + 2) / 3)


def test_time_of_captured_drafts_from_the_text():
    """The same text where rounds are captured: one that suggests nothing lays its rows as well, and heads have drafted
    before it is known whether the text does."""
    text = np.array([[2, 9, 0, 3, 9, 9], [9, 9, 0, 9, 9, 9], [1, 9, 0, 9, 9, 9]])
    rehearsal = Rehearsal(
        (6,), text=text, chain_entropy=np.ones((2, 6), np.float32), chain_right=np.array([0, 0, 1, 0, 0, 0])
    )
    costs = Costs(4, {1: 1.0, 2: 2.0, 5: 2.5}, {1: 10.0}, open_ms=3.0, grow_ms={1: 1.0}, reuse=False)
    alone = expect(DraftPolicy(lookup=Lookup()), rehearsal, costs)
    # four tokens of the text, none, two for want of room
    assert (alone.tokens, alone.ms) == (6 / 3, pytest.approx(4 * (2.5 + 2.0 + costs.layer[3]) / 3 + 10.0))
    both = expect(replace(fixed_exit(0, 2), lookup=Lookup()), rehearsal, costs)
    # four of the text, two of the head, one of the text; the head's two steps each time
    assert both.tokens == 6 / 3 and both.ms == pytest.approx(4 * (2.5 + costs.layer[3] + 2.0) / 3 + 10.0 + 4.0)


@pytest.mark.parametrize(("depth", "nodes"), [(2, 3), (3, 7), (5, 15)])
def test_best_first_trees(recurrent, depth, nodes):
    """Pools are a little narrower than all trees: a hundredth is allowed."""
    engine, found = recurrent
    counts = play_trees(found, depth, nodes)
    stats = real(engine, best_first(4, 4, depth, nodes), STUDIED)
    assert counts.tokens == pytest.approx(stats.tokens_per_verification, rel=0.01)
    assert counts.nodes == pytest.approx(stats.num_drafted / stats.num_verifications, rel=0.01)
    expected = expect(best_first(4, 4, depth, nodes), found.rehearsal(), COSTS)
    draft = 7.0 + (counts.steps - 1) * 4.0
    tree = 8.0 * counts.nodes / 15
    assert expected.tokens == counts.tokens and expected.ms == pytest.approx(draft + 4.0 + 2.0 + 0.5 + tree)


def test_trees_behind_the_text_and_beside_it():
    """Made up: 2.6 tokens a tree, 1.8 of seven nodes; texts that match nowhere, everywhere, at every other place."""
    costs = Costs(4, {1: 1.0, 2: 2.0}, {1: 10.0}, open_ms=3.0, grow_ms={1: 1.0, 4: 1.0}, reuse=False)
    size, policy = 4000, best_first(4, 4, 3)
    trees = {(3, 15): TreeCounts(2.6, 15.0, 3.0), (3, 7): TreeCounts(1.8, 7.0, 3.0)}

    def of(matched: np.ndarray, right: int = 4, beside: bool = False) -> Expected:
        text = np.stack([matched, np.full(size, 9), np.where(matched > 0, right, 0)])
        left = np.arange(size, 0, -1)
        rehearsal = Rehearsal((size,), text=np.minimum(text, [left * 9, left, left - 1]), beam=4, branch=4, trees=trees)
        assert expect(policy, rehearsal, costs).tokens == 2.6
        return expect(replace(policy, lookup=Lookup(2, 15, 15, beside=beside)), rehearsal, costs)

    nowhere, everywhere = of(np.ones(size, int)), of(np.full(size, 3))
    assert nowhere.tokens == pytest.approx(2.6, rel=0.02) and everywhere.tokens == pytest.approx(5.0, rel=0.01)
    assert nowhere.ms == pytest.approx(8.0 + 10.0 + 3.0 + 2.0) and everywhere.ms == nowhere.ms
    some = of(np.where(np.random.default_rng(1).random(size) < 0.5, 3, 0))
    assert some.tokens == pytest.approx((2.6 + 5.0) / 2, rel=0.03)
    beside = of(np.full(size, 3), beside=True)
    assert (beside.tokens, beside.ms) == pytest.approx((everywhere.tokens, everywhere.ms), rel=0.01)
    # seven nodes of the text that are never right, eight of the tree's
    wrong = of(np.full(size, 3), right=0, beside=True)
    assert wrong.tokens == pytest.approx(1.8 + 0.8 / 8, rel=0.03) and of(np.full(size, 3), right=0).tokens == 1.0
    assert of(np.ones(size, int), beside=True) == nowhere


def test_trees_are_right_where_their_chains_are():
    """Made up: a chain of three is right at every other place; the text has the same right, or nothing. Planted bugs:
    trees that are right anywhere; tokens of trees that have no node left."""
    costs = Costs(4, {1: 1.0, 2: 2.0}, {1: 10.0}, open_ms=3.0, grow_ms={1: 1.0, 4: 1.0}, reuse=False)
    size, left = 4000, np.arange(4000, 0, -1)
    chain = np.minimum(np.where(np.random.default_rng(2).random(size) < 0.5, 3, 0), left - 1)
    alone = 1 + 3 * (chain > 0).mean()

    def of(matched: int, right: np.ndarray, nodes: int = 15) -> float:
        trees = {(3, n): TreeCounts(alone, float(n), 3.0) for n in (4, nodes)}  # as good with few nodes
        text = np.stack([np.full(size, matched), np.full(size, 15), right])
        rehearsal = Rehearsal(
            (size,), text=np.minimum(text, [left * 15, left, left - 1]), beam=4, branch=4, trees=trees,
            chain_entropy=np.ones((8, size), np.float32), chain_right=chain,
        )  # fmt: skip
        return expect(replace(best_first(4, 4, 3), lookup=BESIDE), rehearsal, costs).tokens

    assert of(1, chain) == pytest.approx(alone, rel=0.03)
    assert of(1, 3 - chain) == pytest.approx(4.0, rel=0.03)
    assert of(8, np.zeros(size, int)) == pytest.approx(1.0, abs=0.01)  # all rows are the text's, but at its end
    assert of(4, np.zeros(size, int)) == pytest.approx(alone, rel=0.03)


def test_time_of_a_chain_from_an_exit():
    """One text of three tokens, all right: a round drafts two from exit 2 and the bonus ends it."""
    rehearsal = Rehearsal((3,), {2: np.zeros(3, np.float32)}, {2: np.ones(3, bool)})
    costs = Costs(
        4, {1: 1.0, 2: 1.5, 3: 1.75}, {1: 10.0, 3: 12.0}, step_ms=0.5, draft_layer_ms=1.0, ask_ms={2: 5.0}
    )  # fmt: skip
    found = expect(fixed_exit(2, 2), rehearsal, costs)
    # the root and its child run two layers each to be asked; the last node alone, then all three to the end
    assert found.ms == pytest.approx(2 * 2 * 1.0 + 2 * 5.0 + 2 * 1.0 + 2 * 1.75 + 12.0 + 0.5)
    again = expect(fixed_exit(2, 2), rehearsal, replace(costs, reuse=False))
    assert again.ms == pytest.approx(found.ms - 2 * 1.0 + 2 * 1.75)
    assert (found.tokens, found.drafted) == (3.0, 2.0)
    assert expect(PLAIN, rehearsal, costs).ms == costs.plain_ms == 4.0 + 10.0 + 0.5


def test_what_was_not_rehearsed_is_refused():
    rehearsal = Rehearsal((2,), {2: np.zeros(2, np.float32)}, {2: np.ones(2, bool)})
    for policy in (fixed_exit(3, 1), fixed_exit(0, 1), best_first(4, 4, 3)):
        with pytest.raises(ValueError, match="rehearsed"):
            expect(policy, rehearsal, COSTS)
    branching = DraftPolicy((2,), {2: Gate(1.0, 2.0)}, branch=2)
    with pytest.raises(ValueError, match="not played"):
        expect(branching, rehearsal, COSTS)
    with pytest.raises(ValueError, match="by 'path' are not played"):
        expect(likely((2,), 0.5), rehearsal, COSTS)
    for looked in (DraftPolicy(lookup=Lookup()), DraftPolicy(lookup=Lookup(branch=2))):
        with pytest.raises(ValueError, match="text was rehearsed"):
            expect(looked, rehearsal, COSTS)
    known = replace(rehearsal, text=np.ones((3, 2), int))
    with pytest.raises(ValueError, match="share with the text"):
        expect(DraftPolicy((2,), {2: ALWAYS}, lookup=Lookup(beside=True)), known, COSTS)
    assert expect(DraftPolicy((2,), {2: ALWAYS}), rehearsal, COSTS).tokens == 2.0


def test_harder_text_keeps_its_share(trunk):
    """A quarter of what heads had right is wrong, of chains from there on; drafts from the text stay."""
    size, rng = 4000, np.random.default_rng(1)
    right = {2: rng.random(size) < 0.8, 6: rng.random(size) < 0.9}
    text = np.stack([np.full(size, n) for n in (2, 3, 1)])
    own = Rehearsal(
        (size // 2,) * 2, {e: np.ones(size, np.float32) for e in right}, right, np.ones((8, size), np.float32),
        np.full(size, 8), text, 4, 4, {(1, 4): TreeCounts(2.0, 4.0, 1.0), (3, 15): TreeCounts(3.0, 15.0, 3.0)},
    )  # fmt: skip
    harder = own.harder(0.75)
    for exit_layer, before in right.items():
        assert harder.right[exit_layer].sum() / before.sum() == pytest.approx(0.75, abs=0.03)
        assert not (harder.right[exit_layer] & ~before).any()
    for step in range(1, 5):  # of chains that were right to their ends
        assert (harder.chain_right >= step).mean() == pytest.approx(0.75**step, abs=0.03)
    assert harder.trees[1, 4].tokens == pytest.approx(1.75, abs=0.03)
    assert harder.trees[3, 15].tokens == pytest.approx(1 + 2 * (0.75 + 0.75**2 + 0.75**3) / 3, abs=0.06)
    assert (harder.text == own.text).all() and harder == own.harder(0.75)
    (exit_layer, before), *_ = trunk[1].right.items()
    assert (trunk[1].harder(1 - 1e-9).right[exit_layer] == before).all()


def test_a_rehearsal_survives_its_file(recurrent):
    kept = recurrent[1].rehearsal()
    again = Calibration.from_json(Calibration({}, rehearsal=kept).to_json()).rehearsal
    assert again.lengths == kept.lengths and again.trees == kept.trees and (again.beam, again.branch) == (4, 4)
    assert (again.chain_right == kept.chain_right).all() and (again.text == kept.text).all()
    assert np.abs(again.chain_entropy - kept.chain_entropy).max() < 0.1
    with pytest.raises(ValueError, match="expected the same of all"):
        replace(kept, chain_right=kept.chain_right[1:])
    broken = kept.to_document() | {"chain": [8, "AAAA", "AAAA"]}
    with pytest.raises(ValueError, match="damaged"):
        Rehearsal.from_document(broken)
