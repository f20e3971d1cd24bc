"""Pacing by made-up clocks: drafting that pays goes on, drafting that does not costs a bounded share.

Planted bugs seen to fail here: a pause that never ends; an account without a bottom, whose old gains pay for later
losses.
"""

from dataclasses import replace

import pytest
from skipstone.engine.gate import PLAIN, Lookup, fixed_exit, from_text
from skipstone.engine.pacing import (
    AHEAD_STEPS,
    CREDIT_STEPS,
    GAIN_STEPS,
    MOST_HALVINGS,
    REFRESH_ROUNDS,
    SELDOM,
    SHARE,
    WARM_STEPS,
    Pace,
)

HEADS = fixed_exit(2, 4)
BOTH = replace(HEADS, lookup=Lookup())


def play(pace, rounds, plain_ms, draft_ms, tokens):
    """Wall time, tokens and drafting rounds of a run at constant speeds."""
    spent, written, drafted = play_both(pace, rounds, plain_ms, {"heads": (draft_ms, tokens)}, 0, HEADS)
    return spent, written, drafted["heads"]


def play_both(pace, rounds, plain_ms, drafts, match_every, policy=BOTH):
    """The same with two sources, source -> ms and tokens; the text drafts in one round of `match_every`."""
    spent = written = 0.0
    drafted = dict.fromkeys(drafts, 0)
    for at in range(rounds):
        own = pace.next(policy)
        source = "text" if own.lookup and at % match_every == 0 else "heads" if own.exits else None
        ms, tokens = drafts[source] if source else (plain_ms, 1.0)
        pace.round(ms, tokens, (source,) if source else ())
        spent, written = spent + ms, written + tokens
        if source:
            drafted[source] += 1
    return spent, written, drafted


def test_plain_steps_are_timed_first():
    pace = Pace()
    for _ in range(WARM_STEPS):
        assert pace.next(BOTH) == PLAIN
        pace.round(10.0, 1.0)
    assert pace.next(BOTH) == BOTH and pace.plain_ms == 10.0


def test_drafting_that_pays_goes_on():
    pace = Pace()
    _, _, drafted = play(pace, 1000, 10.0, 15.0, 2.0)
    assert pace.accounts["heads"].pauses == 0 and drafted >= 1000 * (1 - 1.5 / REFRESH_ROUNDS) - WARM_STEPS


def test_a_plain_step_is_timed_seldom_while_drafting_gains():
    """Each such step costs what drafting would have gained. Planted bug: as seldom where gains were spent."""
    pace = Pace()
    _, _, drafted = play(pace, 1000, 10.0, 15.0, 2.0)
    assert 1000 - drafted - WARM_STEPS == 1000 // (SELDOM * REFRESH_ROUNDS)
    pace.rounds_since_plain = REFRESH_ROUNDS
    assert pace.next(HEADS) == HEADS
    for _ in range(int(2.5 * GAIN_STEPS)):
        pace.round(15.0, 1.0, ("heads",))
    assert pace.next(HEADS) == PLAIN
    pace = Pace(trusted=frozenset({"heads"}))
    spent, drafted = play_texts(pace, [True] * 40)
    plain = (spent - 15.0 * sum(drafted)) / 10.0
    assert plain <= WARM_STEPS + sum(drafted) // (SELDOM * REFRESH_ROUNDS), "as seldom over many texts"


@pytest.mark.parametrize(("draft_ms", "tokens"), [(30.0, 1.0), (20.0, 1.5), (100.0, 1.0)])
def test_drafting_that_does_not_pay_costs_a_share(draft_ms, tokens):
    pace = Pace()
    spent, written, drafted = play(pace, 4000, 10.0, draft_ms, tokens)
    trial = (CREDIT_STEPS + 1) * draft_ms
    assert spent <= 10.0 * written * (1 + 2 * SHARE) + trial
    assert pace.accounts["heads"].pauses > 0 and drafted > 0


def test_heads_that_were_measured_before_survive_a_bad_start_and_no_more():
    """Ten rounds in vain put out heads that nobody has measured; measured ones go on, and pause if that never ends."""
    for trusted, paused in ((frozenset(), True), (frozenset({"heads"}), False)):
        pace = Pace(trusted=trusted)
        play(pace, WARM_STEPS + 10, 10.0, 20.0, 1.0)
        assert ("heads" in pace.paused) == paused
    spent, written, _ = play(pace, 4000, 10.0, 20.0, 1.0)
    assert "heads" in pace.paused and "text" not in pace.accounts
    assert spent <= 10.0 * written * (1 + SHARE) + (GAIN_STEPS + CREDIT_STEPS + 1) * 20.0


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
    assert pace.accounts["heads"].share == SHARE / 2**MOST_HALVINGS and pace.accounts["heads"].failures > 3
    play(pace, 6000, 10.0, 10.0, 3.0)
    assert pace.accounts["heads"].share == SHARE and pace.accounts["heads"].failures == 0


def test_a_long_losing_stretch_is_noticed_after_gains():
    pace = Pace()
    play(pace, 500, 10.0, 10.0, 3.0)
    spent, written, _ = play(pace, 500, 10.0, 30.0, 1.0)
    assert pace.accounts["heads"].pauses > 0
    assert spent - 10.0 * written < (GAIN_STEPS + CREDIT_STEPS) * 10.0 + 2 * 30.0 + 0.03 * spent


def test_it_drafts_again_when_it_pays_again():
    pace = Pace()
    play(pace, 300, 10.0, 40.0, 1.0)
    assert pace.accounts["heads"].pauses > 0
    _, _, drafted = play(pace, 3000, 10.0, 10.0, 3.0)
    assert drafted > 1500


def test_one_slow_step_of_a_shared_host_is_no_measurement():
    pace = Pace()
    for ms in (10.0, 500.0, *[10.0] * (WARM_STEPS - 2)):
        pace.round(ms, 1.0)
    assert pace.plain_ms == 10.0
    pace.round(1000.0, 1.0)
    assert pace.plain_ms <= 10.5


def test_a_stall_now_and_then_pauses_nothing_that_pays():
    """A collection of garbage takes 13 plain steps and comes once in some hundred rounds. Seen to fail: the round in
    which it fell was charged whole, and drafts that gain a third were paused for hundreds of tokens."""
    pace = Pace()
    drafted = 0
    for at in range(2000):
        source = ("heads",) if pace.next(HEADS).drafts else ()
        drafted += len(source)
        stall = 130.0 if at % 130 == 129 else 0.0
        pace.round((15.0 if source else 10.0) + stall, 2.0 if source else 1.0, source)
    assert pace.accounts["heads"].pauses == 0 and drafted > 1900


def test_rounds_that_become_slow_for_good_are_no_stalls():
    pace = Pace()
    play(pace, 200, 10.0, 15.0, 2.0)
    spent, written, drafted = play(pace, 400, 10.0, 90.0, 2.0)
    assert pace.accounts["heads"].paused and drafted < 12
    assert spent <= 10.0 * written * (1 + 2 * SHARE) + 90.0 * 12


def test_a_first_round_that_warms_up_is_no_measurement():
    """It may compile or allocate. Seen to fail: charged whole, it put out heads that gain."""
    pace = Pace()
    for at in range(200):
        source = ("heads",) if pace.next(HEADS).drafts else ()
        cold = 500.0 if at == WARM_STEPS else 0.0
        pace.round((15.0 if source else 10.0) + cold, 2.0 if source else 1.0, source)
    assert pace.accounts["heads"].pauses == 0


def test_long_texts_are_held_against_their_own_plain_steps():
    """A step behind a thousand tokens takes 1.4 times one behind a hundred. Seen to fail: drafts that gain 1.3x on long
    texts were held against short ones' steps, and paused."""
    pace, drafted = Pace(), 0
    for at in range(1600):
        long = at // 64 % 2 == 1
        pace.place(900 if long else 100)
        source = ("heads",) if pace.next(HEADS).drafts else ()
        drafted += len(source)
        plain, draft = (16.0, 22.0) if long else (11.0, 16.0)
        pace.round(draft if source else plain, 1.65 if source else 1.0, source)
    assert pace.accounts["heads"].pauses == 0 and drafted > 1550
    assert pace.plain_ms == pytest.approx(11.0)
    fresh = Pace(trusted=frozenset({"heads"}))  # trust is given once, where the first steps were all timed
    for length, steps in ((100, 2), (900, WARM_STEPS)):
        fresh.place(length)
        for _ in range(steps):
            assert fresh.next(HEADS) == PLAIN
            fresh.round(10.0, 1.0)
    assert fresh.accounts["heads"].owed_ms < -GAIN_STEPS * 9.9 and fresh.next(HEADS) == HEADS


def play_texts(pace, gains, plain_ms=10.0, draft_ms=15.0, size=64):
    """Texts of `size` tokens; drafts write 2 a round where they gain, else 1. Time, and drafting rounds by text."""
    spent, drafted = 0.0, []
    for gain in gains:
        written, count = 0, 0
        while written < size:
            pace.place(20 + written)
            source = ("heads",) if pace.next(HEADS).drafts else ()
            tokens, ms = (2 if gain else 1, draft_ms) if source else (1, plain_ms)
            pace.round(ms, tokens, source)
            written, spent, count = written + tokens, spent + ms, count + len(source)
        drafted.append(count)
    return spent, drafted


def test_a_pause_does_not_outlast_the_texts_that_it_was_for():
    """Seen to fail: four texts where heads lose, and then none of ten where they gain was drafted."""
    pace = Pace(trusted=frozenset({"heads"}))
    _, drafted = play_texts(pace, [False] * 4 + [True] * 10)
    assert sum(drafted[4:]) >= 8 * 30 and min(drafted[8:]) >= 30


def test_what_drafting_gained_pays_for_trials_of_every_text():
    """Heads gain in every fourth text, and are tried in all of them; the first of those where they lose may not spend
    what they gained elsewhere. Seen to fail: texts left out after trials in vain, whatever drafting had gained before,
    and with them some that gain; gains carried over whole."""
    pace = Pace(trusted=frozenset({"heads"}))
    gains = [True] * 4 + [False, False, False, True] * 8
    spent, drafted = play_texts(pace, gains)
    assert min(own for own, gain in zip(drafted, gains, strict=True) if gain) >= 28
    assert max(drafted[4::4]) <= 13 and max(drafted[5::4]) <= 3, "a trial is short"
    assert 64 * 10.0 * len(gains) / spent > 1.05


@pytest.mark.parametrize("draft_ms", [13.0, 15.0, 20.0])
def test_trials_of_new_texts_stay_within_the_share(draft_ms):
    spent, drafted = play_texts(Pace(), [False] * 24, draft_ms=draft_ms)
    assert 24 * 64 * 10.0 / spent >= 0.98 and sum(count > 0 for count in drafted) >= 3


def test_a_pause_is_in_the_statistics_and_changes_no_token(engine_of, planned, monkeypatch):
    """The clock is made up: drafting rounds take a second each."""
    engine = engine_of()
    heads = planned(engine, lambda place: {place.wrong: 50.0}, exits=(2,))
    plain = heads.learn([1, 2, 3], max_new_tokens=40)
    engine.policy = fixed_exit(2, 4)
    original = Pace.round
    slow = lambda pace, ms, committed, asked=(): original(pace, ms + (1000.0 if asked else 0.0), committed, asked)  # noqa: E731
    monkeypatch.setattr(Pace, "round", slow)
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
    engine.policy = replace(fixed_exit(2, 4), lookup=Lookup(min_match=2))
    seen, original = [], Pace.round

    def round(pace, ms, committed, asked=()):
        seen.append((committed, tuple(asked)))
        original(pace, ms, committed, asked)

    monkeypatch.setattr(Pace, "round", round)
    out = engine.generate([1, 2, 3], max_new_tokens=20)
    assert all(own == (1, ()) for own in seen[:WARM_STEPS]) and sum(committed for committed, _ in seen) == 20
    assert len(seen) == out.stats.num_verifications and {asked for _, asked in seen} >= {(), ("heads",)}


def test_what_the_text_drafts_goes_on_where_heads_do_not_pay_and_the_other_way_round():
    for good, bad in (("heads", "text"), ("text", "heads")):
        pace = Pace()
        _, _, drafted = play_both(pace, 2000, 10.0, {good: (12.0, 2.0), bad: (14.0, 1.0)}, 3)
        assert pace.accounts[good].pauses == 0 and pace.accounts[bad].pauses > 0
        assert drafted[bad] < 150 and drafted[good] > (500 if good == "text" else 1500)


@pytest.mark.parametrize("heads_ms", [11.0, 20.0, 40.0])
@pytest.mark.parametrize("text_ms", [10.5, 13.0, 20.0])
@pytest.mark.parametrize("match_every", [1, 4])
def test_two_useless_sources_keep_98_percent_of_plain_speed(heads_ms, text_ms, match_every):
    """The same task and clock as above. Planted bug: each source with the whole share."""
    pace, drafts = Pace(), {"heads": (heads_ms, 1.0), "text": (text_ms, 1.0)}
    spent, written, drafted = play_both(pace, 24 * 64, 10.0, drafts, match_every)
    assert min(drafted.values()) > 0
    assert 10.0 * written / spent >= 0.98


def test_a_source_pays_for_its_trials_itself():
    """Heads that are never right, beside a text that is. Planted bug: one account of what all drafting gained, by which
    heads are tried in every text."""
    pace, drafted = Pace(), []
    for at in range(48 * 64):
        pace.place(20 + at % 64)
        own = pace.next(BOTH)
        source = "text" if own.lookup and at % 3 == 0 else "heads" if own.exits else None
        ms, tokens = {"text": (12.0, 2.0), "heads": (14.0, 1.0), None: (10.0, 1.0)}[source]
        pace.round(ms, tokens, (source,) if source else ())
        drafted += [at // 64] if source == "heads" else []
    assert 0 < len({text for text in drafted if text >= 16}) <= 8 and pace.accounts["text"].pauses == 0


@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize(("heads_ms", "text_ms", "match_every"), [(40.0, 20.0, 1), (20.0, 10.5, 4), (13.0, 13.0, 4)])
def test_two_useless_sources_cost_their_share_and_a_start_over_texts(size, heads_ms, text_ms, match_every):
    """As above over texts, of heads that were measured before, which have more to lose at the start. Seen to fail:
    short texts, for every trial's rounds came on top of the share (7 % lost)."""
    pace, spent = Pace(trusted=frozenset({"heads"})), 0.0
    for at in range(24 * 64):
        pace.place(20 + at % size)
        own = pace.next(BOTH)
        source = "text" if own.lookup and at % match_every == 0 else "heads" if own.exits else None
        ms = {"text": text_ms, "heads": heads_ms, None: 10.0}[source]
        pace.round(ms, 1.0, (source,) if source else ())
        spent += ms
    start = GAIN_STEPS + AHEAD_STEPS + CREDIT_STEPS + max(heads_ms, text_ms) / 10.0
    assert spent <= 24 * 64 * 10.0 * (1 + SHARE) + 10.0 * start


def test_a_source_that_comes_later_has_the_same_start():
    """Planted bug seen to fail: what may be lost ahead was given once, to the sources of the first round."""
    pace, tried = Pace(), []
    play(pace, 20, 10.0, 14.0, 2.0)
    for text in range(3):
        for at in range(64):
            pace.place(20 + at)
            source = ("text",) if pace.next(from_text()).lookup else ()
            pace.round(20.0 if source else 10.0, 1.0, source)
            tried += [text] if source else []
    assert set(tried) == {0, 1, 2}


def test_a_policy_without_a_source_has_no_account_of_it():
    pace = Pace(plain_ms=10.0)
    assert pace.next(from_text()) == from_text() and set(pace.accounts) == {"text"} and not pace.resting
    for _ in range(30):
        pace.round(30.0, 1.0, ("text",))
    assert pace.next(from_text()).sources == () and pace.resting and pace.next(BOTH).sources == ("heads",)
