"""Shapes of trees on made-up pools whose best shape is known."""

from __future__ import annotations

import math

import pytest
from skipstone.bench.trees import Map, by_place, by_probability, chain_tokens, compare
from skipstone.train.rehearse import Candidates, Rehearsed


def pool(first: float, right: int) -> Candidates:
    """Two children of the root with probabilities `first` and 1 - `first`; child `right` is the full model's (0: none
    is), and has one child that is right too."""
    logs = [0.0, math.log(first), math.log(1 - first), 0.0, 0.0]
    path = [True, right == 1, right == 2, right == 1, right == 2]
    return Candidates(
        [-1, 0, 0, 1, 2], [0, 1, 1, 2, 2], [0, 0, 1, 0, 0], logs, [0.0] * 5, path, [[1, 2], [3], [4], [], []]
    )


def texts(pools: list[Candidates]) -> Rehearsed:
    """Each pool begins a text of three tokens; the others of a text are never right."""
    rest = [pool(0.6, 0)] * 2
    right = [2 * int(one.right[1]) for one in pools]
    return Rehearsed(
        [3] * len(pools),
        {},
        {},
        [],
        [n for own in right for n in (own, 0, 0)],
        pools=[p for one in pools for p in (one, *rest)],
    )


def test_probabilities_that_lie_are_corrected() -> None:
    """The head prefers its first guess; the second is right."""
    wrong, fitted = texts([pool(0.9, 2)] * 8), texts([pool(0.9, 2)] * 40)
    table = compare(fitted, wrong, [2])
    assert table["chain"][2] == pytest.approx(1.0) and table["own probabilities"][2] == pytest.approx(1.0)
    assert table["map of p"][2] == pytest.approx(3.0)  # two accepted and the bonus, in one round
    assert table["fixed shape"][2] == pytest.approx(3.0)


def test_best_first_follows_each_round() -> None:
    """Sure rounds go deep and unsure ones wide, which no fixed shape of two nodes can."""
    mixed = texts([pool(0.99, 1), pool(0.5, 2)] * 10)
    table = compare(mixed, mixed, [2])
    assert table["own probabilities"][2] >= table["fixed shape"][2]


def test_maps_count_only_behind_right_parents() -> None:
    made = Map(by_place, prior=0.0)
    made.fit([pool(0.9, 1)])
    assert made.seen == {(0,): 1, (1,): 1, (0, 0): 1} and made.right[(0,)] == 1 and made.right[(1,)] == 0
    assert Map(by_probability).fit([])(pool(0.9, 1))[1] == pytest.approx(math.log((4 * 0.9 + 0.02) / 4.04))


def test_chains_stop_at_the_end_of_a_text() -> None:
    found = Rehearsed([3, 2], chain_right=[8, 8, 8, 8, 8])
    assert chain_tokens(found, 8) == 2.5 and chain_tokens(found, 1) == 5 / 3
