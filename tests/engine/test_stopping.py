"""Where an output ends, whatever blocks its tokens came in.

The detokenizer is a fake of the real one's contract: bytes of a tiny vocabulary through an incremental UTF-8 decoder,
so tokens may end inside an emoji. Planted bugs seen to fail here: stop looked for at block ends only, the
budget before the stop id, text held back without its tokens, a match searched only inside the new token.
"""

import codecs

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from skipstone.engine.stopping import Emission, StopChecker

EOS, EOS_2 = 0, 1
EMOJI = "🦘".encode()
PIECES = {
    EOS: b"",
    EOS_2: b"",
    2: b"a",
    3: b"b",
    4: b"ab",
    5: b"\n",
    6: b"\nab",
    7: EMOJI[:1],
    8: EMOJI[1:3],
    9: EMOJI[3:],
    10: b"",  # a special token inside the text
    11: b"bba",
    12: "é".encode(),
}
STOPS = ["\n\n", "ab\n", "bb", "aba", "🦘", "é", "\n", "abb"]


class FakeDetokenizer:
    def __init__(self):
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id):
        return self.decoder.decode(PIECES[token_id])

    def flush(self):
        return self.decoder.decode(b"", final=True)


def run(tokens, block_lens=None, reason=None, **options):
    """Checker and emissions after the tokens, in blocks of the given lengths (one a block when None)."""
    checker = StopChecker(FakeDetokenizer(), **{"max_new_tokens": 1000, **options})
    emissions, rest = [], list(tokens)
    for length in block_lens or []:
        emissions += checker.push(rest[:length])
        rest = rest[length:]
    for token in rest:
        emissions += checker.push([token])
    if reason is not None:
        emissions += checker.finish(reason)
    return checker, emissions


def outcome(tokens, *, max_new_tokens, min_new_tokens, stop_ids, stop, context_room):
    """The module's rules read literally, with whole strings: (ids, text, reason)."""
    limit = min(max_new_tokens, context_room)
    detokenizer, text, starts, reason = FakeDetokenizer(), "", [], None
    if limit == 0:
        return [], "", "length" if max_new_tokens == 0 else "context"
    for count, token in enumerate(tokens, start=1):
        starts.append(len(text))
        stopped = token in stop_ids and count > min_new_tokens
        ended = stopped or count == limit
        pieces = [] if stopped else [detokenizer.feed(token)]
        for final in (False, True):
            if final and not ended:
                continue
            old = len(text)
            text += detokenizer.flush() if final else "".join(pieces)
            found = [
                (end, len(text[:end]) - len(string))
                for end in range(old + 1, len(text) + 1)
                for string in stop
                if text[:end].endswith(string)
            ]
            if found and count > min_new_tokens:
                begin = min(found)[1]
                kept = sum(start < begin for start in starts)
                return tokens[:kept], text[:begin], "stop"
        if stopped:
            reason = "stop"
        elif count == limit:
            reason = "length" if limit == max_new_tokens else "context"
        if reason:
            return tokens[:count], text, reason
    return tokens, text, "cancelled"


token_lists = st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=14)


@pytest.mark.hazard(1, 2, 3, 13)
@settings(deadline=None, max_examples=400)
@given(
    tokens=token_lists,
    block_lens=st.lists(st.integers(0, 6), max_size=6),
    stop=st.lists(st.sampled_from(STOPS), max_size=3),
    stop_ids=st.sets(st.sampled_from([EOS, EOS_2])),
    min_new_tokens=st.integers(0, 4),
    room=st.integers(0, 16),
    budget=st.integers(0, 16),
)
@example(tokens=[4, 7, 8, 9, 2], block_lens=[2, 2], stop=["🦘"], stop_ids=set(), min_new_tokens=0, room=9, budget=5)
@example(tokens=[4, 10, 5, 5, 2], block_lens=[3], stop=["\n\n"], stop_ids=set(), min_new_tokens=0, room=9, budget=5)
@example(tokens=[2, 7, EOS], block_lens=[3], stop=[], stop_ids={EOS}, min_new_tokens=0, room=3, budget=9)
def test_any_split_into_blocks_gives_the_rules_outcome(
    tokens, block_lens, stop, stop_ids, min_new_tokens, room, budget
):
    options = {
        "stop": stop,
        "stop_ids": stop_ids,
        "min_new_tokens": min_new_tokens,
        "max_new_tokens": max(budget, min_new_tokens),
        "context_room": room,
    }
    one_by_one, events = run(tokens, reason="cancelled", **options)
    in_blocks, block_events = run(tokens, block_lens, reason="cancelled", **options)
    assert block_events == events
    assert (one_by_one.token_ids, one_by_one.text, one_by_one.finish_reason) == outcome(tokens, **options)
    assert (in_blocks.token_ids, in_blocks.text) == (one_by_one.token_ids, one_by_one.text)
    assert in_blocks.finish_reason == one_by_one.finish_reason
    assert "".join(event.text for event in events) == one_by_one.text
    assert [event.token_id for event in events] == one_by_one.token_ids
    assert [event.index for event in events] == list(range(len(events)))
    assert one_by_one.num_released == len(events)
    assert one_by_one.num_remaining == 0


@pytest.mark.hazard(1)
@pytest.mark.parametrize("place", range(6))
def test_stop_id_at_every_place_of_a_block_and_as_the_bonus(place):
    block = [2, 3, 2, 3, 2, 3]
    block[place] = EOS
    checker, events = run(block, [6], stop_ids=[EOS, EOS_2])
    assert checker.token_ids == block[: place + 1]
    assert checker.text == "ababab"[:place]
    assert checker.finish_reason == "stop"
    assert checker.push([2, 3]) == []
    assert checker.token_ids == block[: place + 1]
    assert events[-1] == Emission(place, EOS, "")


@pytest.mark.hazard(2)
@pytest.mark.parametrize(
    ("budget", "reason", "num_tokens"), [(2, "length", 2), (3, "stop", 3), (4, "stop", 3), (0, "length", 0)]
)
@pytest.mark.parametrize("stopper", ["id", "string"])
def test_stop_wins_inside_the_budget_and_length_outside(budget, reason, num_tokens, stopper):
    options = {"stop_ids": [EOS]} if stopper == "id" else {"stop": ["é"]}
    checker, _ = run([2, 3, EOS if stopper == "id" else 12, 2], [4], max_new_tokens=budget, **options)
    assert checker.finish_reason == reason
    expected = num_tokens - (stopper == "string" and reason == "stop")
    assert len(checker.token_ids) == expected
    assert checker.text == "ab"[:num_tokens]


@pytest.mark.parametrize(("room", "reason"), [(0, "context"), (2, "context"), (3, "length"), (4, "length")])
def test_context_end(room, reason):
    checker, _ = run([2] * 6, [6], max_new_tokens=3, context_room=room)
    assert checker.finish_reason == reason
    assert len(checker.token_ids) == min(room, 3)


@pytest.mark.hazard(3)
def test_stop_string_across_blocks_takes_back_tokens_that_were_held():
    checker = StopChecker(FakeDetokenizer(), max_new_tokens=99, stop=["\n\n"])
    assert [event.text for event in checker.push([4, 5])] == ["ab"]  # the newline waits
    assert checker.token_ids == [4, 5]
    assert checker.push([5, 2]) == []
    assert (checker.token_ids, checker.text, checker.finish_reason) == ([4], "ab", "stop")


@pytest.mark.hazard(3)
def test_stop_string_inside_a_token_keeps_the_token_that_began_before_it():
    checker, events = run([2, 11, 2], [3], stop=["ba"])
    assert (checker.token_ids, checker.text) == ([2, 11], "ab")  # "a" + "b|ba"
    assert [event.text for event in events] == ["a", "b"]


def test_held_text_is_released_when_it_is_no_stop_string_and_at_the_end():
    checker = StopChecker(FakeDetokenizer(), max_new_tokens=99, stop=["ab\n"])
    assert checker.push([4]) == []
    assert [event.text for event in checker.push([2])] == ["ab"]
    assert [event.text for event in checker.finish("cancelled")] == ["a"]
    assert checker.finish_reason == "cancelled"
    assert checker.finish("error") == []
    assert checker.finish_reason == "cancelled"


@pytest.mark.hazard(13)
def test_block_that_ends_inside_an_emoji():
    checker = StopChecker(FakeDetokenizer(), max_new_tokens=99)
    texts = ["".join(event.text for event in checker.push(block)) for block in ([2, 7], [8], [9, 3])]
    assert texts == ["a", "", "🦘b"]
    broken, events = run([2, 7, 8], [3], max_new_tokens=3)
    assert broken.text == "".join(event.text for event in events)
    assert broken.text.startswith("a�")


def test_min_new_tokens_keeps_stops_from_ending_the_output():
    checker, _ = run([EOS, 12, 2, EOS, 2], [5], min_new_tokens=3, stop_ids=[EOS], stop=["é"])
    assert (checker.token_ids, checker.text) == ([EOS, 12, 2, EOS], "éa")


def test_the_string_that_completes_first_wins_then_the_longest():
    assert run([11], stop=["bba", "b"])[0].text == ""
    assert run([2, 11], stop=["ba", "bb"])[0].text == "a"
    assert run([2, 2, 11], stop=["bb", "abb"])[0].text == "a"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens -1"),
        ({"max_new_tokens": 2, "min_new_tokens": 3}, "min_new_tokens is 3"),
        ({"max_new_tokens": 2, "stop": [""]}, "non-empty strings"),
        ({"max_new_tokens": 2, "stop": "abc"}, "'abc'"),
        ({"max_new_tokens": 2, "context_room": -1}, "context_room is -1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StopChecker(FakeDetokenizer(), **options)
    with pytest.raises(ValueError, match="reason is 'done'"):
        StopChecker(FakeDetokenizer(), max_new_tokens=1).finish("done")
