"""Answers are judged by what they say, and functions by what a compiler says.

Planted bugs seen to fail here: a docstring alone passes; the cut last line is kept.
"""

import pytest
from skipstone.bench.tasks import FUNCTIONS, STORIES, compiles, functions, maths, said

START = 'def double(x):\n    """Return twice x."""'


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" 3 + 4 = 7. #### 7", 7),
        ("#### $1,204 and then #### 5", 1204),
        ("#### -3", -3),
        ("the answer is 7", None),
        ("####", None),
    ],
)
def test_the_number_behind_the_mark_is_the_answer(text, number):
    assert said(text) == number


@pytest.mark.parametrize(
    ("text", "stopped", "right"),
    [
        ("\n    return 2 * x\n", True, True),
        ("\n    return 2 * x\n\nprint(double(2)", True, True),  # what stands outside is not the function
        ("\n    return 2 * x\n    return (2 *", False, True),  # cut at the limit: the last line does not count
        ("\n    return 2 * x\n    return (2 *", True, False),
        ("\n    return (2 * x\n", True, False),
        ("\n\n", True, False),  # a docstring alone
        ("\nx = 1", True, False),
        ("\n    return '\\d'\n", True, True),  # a warning is no error
    ],
)
def test_functions_compile(text, stopped, right):
    assert compiles(START, text, stopped) is right


def test_questions_have_the_answers_of_their_numbers():
    items = maths(24, seed=3)
    assert [item.prompt for item in items] == [item.prompt for item in maths(24, seed=3)]
    assert len({item.prompt for item in items}) == 24 and items[0].prompt != maths(1, seed=4)[0].prompt
    for item in items:
        question = item.prompt.rsplit("Question: ", 1)[1]
        if "How many apples" in question:
            a, b = (int(word) for word in question.split() if word.isdigit())
            assert item.right(f" {a} + {b} = {a + b}. #### {a + b}", True) and not item.right(f"#### {a + b + 1}", True)


@pytest.mark.parametrize("level", STORIES)
def test_no_question_comes_twice(level):
    items = maths(240, level=level)
    assert len({item.prompt for item in items}) == 240
    for item in items[: len(STORIES[level])]:
        answers = [n for n in range(-100, 3000) if item.right(f"#### {n}", True)]
        assert len(answers) == 1 and answers[0] > 0, "one answer, and a sensible one"


def test_more_questions_than_numbers_are_refused():
    with pytest.raises(ValueError, match="ran out of numbers"):
        maths(2000)


def test_as_many_functions_as_there_are():
    items = functions(99)
    assert len(items) == len(FUNCTIONS) == len({item.prompt for item in items})
    assert items[5].right("\n    return [0, 1][:n]\n", True) and "fibonacci" in items[5].prompt
