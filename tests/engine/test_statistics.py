"""Counters: committed is the output's length whatever stops it (hazard 4).

Planted bugs seen to fail here: tokens past a stop counted, tokens taken back by a stop string left in, the bonus
counted as accepted.
"""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skipstone.engine.statistics import Statistics, StatisticsRecorder
from skipstone.engine.stopping import StopChecker
from skipstone.engine.tree import DraftTree, accept


class Letters:
    """A detokenizer whose token i is the i-th letter."""

    def feed(self, token_id):
        return "abcdef"[token_id]

    def flush(self):
        return ""


def chain(root, tokens, exits):
    tree = DraftTree(root)
    for parent, (token, exit_layer) in enumerate(zip(tokens, exits, strict=True)):
        tree.add(parent, token, exit_layer=exit_layer, entropy=0.1)
    return tree


@pytest.mark.hazard(4)
@settings(deadline=None, max_examples=200)
@given(st.data())
def test_invariants_of_any_run(data):
    """Random drafts against a random output, cut by a stop id, a stop string or the budget."""
    output = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=30))
    checker = StopChecker(
        Letters(),
        max_new_tokens=data.draw(st.integers(1, len(output))),
        stop_ids=data.draw(st.sampled_from([[], [5]])),
        stop=data.draw(st.sampled_from([[], ["ab"], ["abc", "dd"], ["aaaa"]])),
    )
    recorder, place, num_drafted, rounds = StatisticsRecorder(), 0, 0, 0
    while not checker.finished and place < len(output):
        num_right = data.draw(st.integers(0, min(4, len(output) - place - 1)))
        wrong = [(output[place + num_right] + 1) % 6] * data.draw(st.integers(0, 1))
        drafted = output[place : place + num_right] + wrong
        tree = chain(0, drafted, [6 + 6 * (i % 2) for i in range(len(drafted))])
        targets = [*output[place : place + num_right + 1], *[0] * len(wrong)]
        verdict = accept(tree, targets)
        before = len(checker.token_ids)
        checker.push(verdict.committed)
        recorder.record_round(tree, verdict, len(checker.token_ids) - before, gate_stops=1)
        place += len(verdict.committed)
        num_drafted += len(drafted)
        rounds += 1
        assert recorder.num_committed == len(checker.token_ids)
    stats = recorder.snapshot()
    assert stats.num_committed == len(checker.token_ids)
    assert stats.num_drafted == num_drafted
    assert stats.num_verifications == stats.gate_stops == rounds
    assert stats.num_accepted == sum(stats.accepted_by_position) == sum(stats.tokens_by_exit.values())
    assert stats.num_accepted <= stats.num_drafted
    assert 0 <= stats.num_committed - stats.num_accepted <= stats.num_verifications
    assert sum(stats.drafted_by_position) == num_drafted  # of chains
    for counts in (stats.rounds_by_drafted, stats.rounds_by_accepted, stats.rounds_by_stops):
        assert sum(counts.values()) == rounds
    assert sum(size * count for size, count in stats.rounds_by_drafted.items()) == num_drafted
    assert sum(stats.drafted_by_entropy.values()) == num_drafted
    assert stats.num_accepted <= sum(stats.accepted_by_entropy.values()) <= num_drafted
    assert all(0 <= share <= 1 for share in stats.acceptance_by_position)
    assert list(stats.drafted_by_position) == sorted(stats.drafted_by_position, reverse=True)


@pytest.mark.hazard(4)
def test_known_counts():
    recorder = StatisticsRecorder()
    tree = chain(0, [1, 2, 3], [6, 6, 12])
    recorder.record_round(tree, accept(tree, [1, 2, 9, 9]), num_kept=3, gate_stops=1)  # two of three, and the bonus
    recorder.record_round(DraftTree(9), accept(DraftTree(9), [4]), num_kept=1)  # a plain step
    tree = chain(4, [1, 2], [12, 6])
    recorder.record_round(tree, accept(tree, [1, 2, 7]), num_kept=1)  # a stop after the first
    recorder.record_fallback("drafting does not pay")
    recorder.prefill_ms += 2.0
    recorder.decode_ms += 3.0
    assert recorder.snapshot() == Statistics(
        num_drafted=5,
        num_accepted=3,
        num_committed=5,
        num_verifications=3,
        accepted_by_position=(2, 1, 0),
        drafted_by_position=(2, 2, 1),
        tokens_by_exit={6: 2, 12: 1},
        gate_stops=1,
        fallbacks={"drafting does not pay": 1},
        prefill_ms=2.0,
        decode_ms=3.0,
        rounds_by_drafted={0: 1, 2: 1, 3: 1},
        rounds_by_accepted={0: 1, 1: 1, 2: 1},
        rounds_by_stops={0: 2, 1: 1},
        drafted_by_entropy={0: 5},
        accepted_by_entropy={0: 3},
    )
    assert recorder.snapshot().acceptance_rate == 3 / 5
    assert recorder.snapshot().tokens_per_verification == 5 / 3
    recorder.record_round(DraftTree(1), accept(DraftTree(1), [4]), num_kept=-4)  # a stop string takes four back
    assert (recorder.snapshot().num_committed, recorder.snapshot().num_accepted) == (1, 1)
    assert recorder.snapshot().tokens_by_exit == {6: 1}


def test_a_tree_counts_depths_once_and_all_its_nodes_as_drafted():
    tree = DraftTree.from_lists([0, 1, 2, 3, 4], [-1, 0, 0, 1, 2])
    recorder = StatisticsRecorder()
    recorder.record_round(tree, accept(tree, [2, 0, 4, 0, 5]), num_kept=3)
    stats = recorder.snapshot()
    assert (stats.num_drafted, stats.num_accepted, stats.acceptance_rate) == (4, 2, 0.5)
    assert stats.drafted_by_position == stats.accepted_by_position == (1, 1)
    assert stats.tokens_by_exit == {}  # nodes without an exit layer belong to none


def test_merging_and_json():
    one = Statistics(4, 2, 3, 1, (1, 1), (1, 1), {6: 2}, 1, {"x": 1}, 1.0, 2.0)
    two = Statistics(2, 1, 2, 1, (1,), (1,), {6: 1, 12: 0}, 0, {"x": 1, "y": 2}, 1.5, 2.5)
    both = Statistics.merge([one, two])
    expected = Statistics(6, 3, 5, 2, (2, 1), (2, 1), {6: 3, 12: 0}, 1, {"x": 2, "y": 2}, 2.5, 4.5)
    assert both == expected == Statistics.merge([two, one])
    assert Statistics.merge([]) == Statistics()
    assert Statistics().acceptance_rate == Statistics().tokens_per_verification == 0.0
    document = json.loads(json.dumps(both.to_dict()))
    assert document["tokens_by_exit"] == {"6": 3, "12": 0}
    assert document["acceptance_rate"] == 0.5
    assert document["tokens_per_verification"] == 2.5
    assert {entry.name for entry in dataclasses.fields(Statistics)} <= document.keys()
    assert Statistics.from_dict(document) == both
    assert Statistics.from_dict({"num_drafted": 3}) == Statistics(num_drafted=3)  # of an older file
    with pytest.raises(dataclasses.FrozenInstanceError):
        both.num_drafted = 1


def test_entropies_fall_into_bins_of_a_quarter_nat():
    """Planted bug: a node without an entropy, or a NaN, counted as certain."""
    tree = DraftTree(0)
    for token, nats in enumerate([0.2, 0.25, 1.3, 99.0, None, float("nan")], 1):
        tree.add(token - 1, token, exit_layer=6, entropy=nats)
    recorder = StatisticsRecorder()
    recorder.record_round(tree, accept(tree, [1, 2, 9, 9, 9, 9, 9]), num_kept=2)
    stats = recorder.snapshot()
    assert stats.drafted_by_entropy == {0: 1, 1: 1, 5: 1, 39: 1} and stats.accepted_by_entropy == {0: 1, 1: 1}


@pytest.mark.parametrize("num_kept", [-1, 3])
def test_an_impossible_growth_is_refused(num_kept):
    tree = chain(0, [1], [6])
    with pytest.raises(ValueError, match=f"num_kept is {num_kept}, expected 0 to 2"):
        StatisticsRecorder().record_round(tree, accept(tree, [1, 2]), num_kept)
