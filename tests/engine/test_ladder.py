"""Lengths of chains, learned: made-up costs, drafts that are right so often.

Planted bugs seen to fail here: positions behind a wrong one counted as wrong; the plan's expectation forgotten at once.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from skipstone.engine.expectation import Expected
from skipstone.engine.gate import fixed_exit
from skipstone.engine.ladder import MEMORY, PRIOR_ROUNDS, SHARED, Ladder
from skipstone.engine.pacing import Pace

MS = [10.0 + 2.0 * n for n in range(1, 7)]


def ladder(share: float) -> Ladder:
    """A plan that expects every position to be right so often."""
    tokens = [sum(share**k for k in range(n + 1)) for n in range(1, 7)]
    return Ladder({n: Expected(own, n, ms) for n, (own, ms) in enumerate(zip(tokens, MS, strict=True), 1)})


def best(share: float) -> int:
    rates = [sum(share**k for k in range(n + 1)) / MS[n - 1] for n in range(1, 7)]
    return 1 + max(range(6), key=rates.__getitem__)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7, 0.9])
def test_it_starts_where_the_plan_is(share: float) -> None:
    made = ladder(share)
    assert made.acceptance == pytest.approx([share] * 6) and made.length == best(share)


def test_rungs_may_be_apart() -> None:
    """Trees are rehearsed from two levels on: both positions of the first rung share what it brings."""
    tokens = {
        2: 1 + 0.8 + 0.8**2,
        3: 1 + 0.8 + 0.8**2 + 0.8**2 * 0.5,
        6: 1 + 0.8 + 0.8**2 + 0.8**2 * 0.5 * (1 + 0.5 + 0.25 + 0.125),
    }
    made = Ladder({length: Expected(own, 9, 10.0 + length) for length, own in tokens.items()})
    assert made.acceptance == pytest.approx([0.8, 0.8, 0.5, 0.5, 0.5, 0.5]) and made.longest == 6
    assert made.length == 3 and {made.next for made.rounds in range(16)} == {3, 6}
    for _ in range(300):
        made.saw(3, 0)
    assert made.length == 2
    for _ in range(300):
        made.saw(6, 6)
    assert made.length == 6 and {made.next for made.rounds in range(16)} == {6}


@pytest.mark.parametrize(("planned", "real"), [(0.9, 0.3), (0.3, 0.9), (0.6, 0.6)])
def test_it_moves_to_the_length_that_the_text_wants(planned: float, real: float) -> None:
    made, rng = ladder(planned), random.Random(0)
    for _ in range(3000):  # one rung after the other where it has to climb
        length = made.next
        right = next((n for n in range(length) if rng.random() >= real), length)
        made.saw(length, right)
    assert abs(made.length - best(real)) <= 1
    assert made.acceptance[0] == pytest.approx(real, abs=0.15)


def test_one_round_changes_little_and_nothing_is_learned_behind_a_wrong_token() -> None:
    made = ladder(0.5)
    before = made.acceptance
    made.saw(4, 1)
    first, second, *rest = made.acceptance
    seen, right = MEMORY * PRIOR_ROUNDS + 1, MEMORY * PRIOR_ROUNDS / 2
    assert (first, second) == pytest.approx(((right + 1) / seen, right / seen))
    assert first > before[0] and second < before[1] and rest == before[2:]


def test_rounds_that_the_text_drafts_speak_for_shorter_drafts() -> None:
    """They take as much longer as heads' own rounds, and gain half as much. Planted bugs: their rounds left out of the
    mean; as good a reason for long drafts as the others; none at all."""
    made, rng = ladder(0.9), random.Random(0)
    alone = made.length
    for _ in range(200):  # six tokens in every other round
        made.saw_text(alone, 6)
        made.saw(alone, next((n for n in range(alone) if rng.random() >= 0.9), alone))
    tokens = [sum(math.prod(made.acceptance[:k]) for k in range(n + 1)) for n in range(1, 7)]

    def fastest(gain: float) -> int:
        """If a level gains so much of what it gains heads' own rounds in shared ones, too."""
        rates = [(6 + gain * (own - tokens[alone - 1]) + own) / ms for own, ms in zip(tokens, MS, strict=True)]
        return 1 + max(range(6), key=rates.__getitem__)

    assert fastest(1.0) > fastest(SHARED) > fastest(0.0) and made.length == fastest(SHARED)
    assert made.rounds == 400


def test_a_text_that_ends_says_nothing_of_drafts_that_did_not_fit(engine_of: Any, planned: Any) -> None:
    """Seen to fail while a round's length was the policy's: requests of one token taught that no draft is right."""
    engine = engine_of("llama2")
    prompt = [5, 9, 3]
    planned(engine, "right").learn(prompt, max_new_tokens=8)
    engine.policy = fixed_exit(2, 3)
    for new in (1, 3):
        pace = Pace(plain_ms=1e9, ladder=ladder(0.5))
        engine._paces = {(1, False, False, False): pace}
        for _ in range(5):
            engine.generate(prompt, max_new_tokens=new)
        assert pace.ladder is not None and pace.ladder.rounds >= 5
        assert all(share >= 0.499 for share in pace.ladder.acceptance)
        assert (pace.ladder.acceptance[0] > 0.5) == (new > 1)


def test_the_pace_drafts_by_it() -> None:
    pace = Pace(plain_ms=10.0, ladder=ladder(0.9))
    assert pace.next(fixed_exit(0, 2)).max_depth == best(0.9)
    for _ in range(200):
        pace.ladder.saw(best(0.9), 0)  # type: ignore[union-attr]
    assert pace.next(fixed_exit(0, 2)).max_depth == 1
    assert ladder(0.0).length == 1
