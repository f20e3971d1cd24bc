"""Pacing by made-up clocks: drafting that pays goes on, drafting that does not costs a bounded share.

Planted bugs seen to fail here: a pause that never ends; an account without a bottom, whose old gains pay for later
losses.
"""

import pytest
from skipstone.engine.gate import fixed_exit
from skipstone.engine.pacing import CREDIT_STEPS, GAIN_STEPS, MOST_HALVINGS, REFRESH_ROUNDS, SHARE, WARM_STEPS, Pace


def play(pace, rounds, plain_ms, draft_ms, tokens):
    """Wall time, tokens and drafting rounds of a run at constant speeds."""
    spent = written = drafted = 0.0
    for _ in range(rounds):
        if pace.drafting():
            pace.drafting_round(draft_ms, tokens)
            spent, written, drafted = spent + draft_ms, written + tokens, drafted + 1
        else:
            pace.plain_step(plain_ms)
            spent, written = spent + plain_ms, written + 1
    return spent, written, drafted


def test_plain_steps_are_timed_first():
    pace = Pace()
    for _ in range(WARM_STEPS):
        assert not pace.drafting()
        pace.plain_step(10.0)
    assert pace.drafting() and pace.plain_ms == 10.0


def test_drafting_that_pays_goes_on():
    pace = Pace()
    _, _, drafted = play(pace, 1000, 10.0, 15.0, 2.0)
    assert pace.pauses == 0 and drafted >= 1000 * (1 - 1.5 / REFRESH_ROUNDS) - WARM_STEPS


@pytest.mark.parametrize(("draft_ms", "tokens"), [(30.0, 1.0), (20.0, 1.5), (100.0, 1.0)])
def test_drafting_that_does_not_pay_costs_a_share(draft_ms, tokens):
    pace = Pace()
    spent, written, drafted = play(pace, 4000, 10.0, draft_ms, tokens)
    trial = (CREDIT_STEPS + 1) * draft_ms
    assert spent <= 10.0 * written * (1 + 2 * SHARE) + trial
    assert pace.pauses > 0 and drafted > 0


@pytest.mark.parametrize("draft_ms", [11.0, 13.0, 20.0, 40.0])
def test_useless_heads_keep_98_percent_of_plain_speed(draft_ms):
    """A task of 24 answers of 64 tokens, its clock made up; nothing that is drafted is ever accepted. Planted bug: a
    share that does not shrink."""
    pace = Pace()
    spent, written, drafted = play(pace, 24 * 64, 10.0, draft_ms, 1.0)
    assert drafted > 0
    assert 10.0 * written / spent >= 0.98


def test_a_gain_restores_the_share():
    pace = Pace()
    play(pace, 3000, 10.0, 40.0, 1.0)
    assert pace.share == SHARE / 2**MOST_HALVINGS and pace.failures > 3
    play(pace, 6000, 10.0, 10.0, 3.0)
    assert pace.share == SHARE and pace.failures == 0


def test_a_long_losing_stretch_is_noticed_after_gains():
    pace = Pace()
    play(pace, 500, 10.0, 10.0, 3.0)
    spent, written, _ = play(pace, 500, 10.0, 30.0, 1.0)
    assert pace.pauses > 0
    assert spent - 10.0 * written < (GAIN_STEPS + CREDIT_STEPS) * 10.0 + 2 * 30.0 + 0.03 * spent


def test_it_drafts_again_when_it_pays_again():
    pace = Pace()
    play(pace, 300, 10.0, 40.0, 1.0)
    assert pace.pauses > 0
    _, _, drafted = play(pace, 3000, 10.0, 10.0, 3.0)
    assert drafted > 1500


def test_one_slow_step_of_a_shared_host_is_no_measurement():
    pace = Pace()
    for ms in (10.0, 500.0, *[10.0] * (WARM_STEPS - 2)):
        pace.plain_step(ms)
    assert pace.plain_ms == 10.0
    pace.plain_step(1000.0)
    assert pace.plain_ms <= 10.5


def test_a_pause_is_in_the_statistics_and_changes_no_token(engine_of, planned, monkeypatch):
    """The clock is made up: drafting rounds take a second each."""
    engine = engine_of()
    heads = planned(engine, lambda place: {place.wrong: 50.0}, exits=(2,))
    plain = heads.learn([1, 2, 3], max_new_tokens=40)
    engine.policy = fixed_exit(2, 4)
    original = Pace.drafting_round
    monkeypatch.setattr(Pace, "drafting_round", lambda pace, ms, committed: original(pace, ms + 1000.0, committed))
    out = engine.generate([1, 2, 3], max_new_tokens=40)
    assert out.token_ids == plain.token_ids
    assert out.stats.fallbacks == {"drafting does not pay": 1}
    assert 0 < out.stats.num_drafted <= 4 * 2
    always = engine.generate([1, 2, 3], max_new_tokens=40, speculation="always")
    assert always.token_ids == plain.token_ids and always.stats.num_drafted > 40
    assert engine.generate([1, 2, 3], max_new_tokens=40, speculation=False).stats.num_drafted == 0


def test_the_account_is_kept_in_plain_steps_and_drafting_rounds(monkeypatch, engine_of, planned):
    engine = engine_of()
    planned(engine, "right", exits=(2,)).learn([1, 2, 3], max_new_tokens=20)
    engine.policy = fixed_exit(2, 4)
    seen = []
    monkeypatch.setattr(Pace, "plain_step", lambda pace, ms: (seen.append("plain"), setattr(pace, "plain_ms", 1e9)))
    monkeypatch.setattr(Pace, "drafting_round", lambda pace, ms, committed: seen.append(committed))
    out = engine.generate([1, 2, 3], max_new_tokens=20)
    assert seen[0] == "plain" and sum(1 if s == "plain" else s for s in seen) == 20
    assert seen.count("plain") + sum(s != "plain" for s in seen) == out.stats.num_verifications
