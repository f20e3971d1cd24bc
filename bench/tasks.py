"""Answers that can be checked: sums told as stories, and Python functions that must compile.

Multiple choice hides what pruning breaks: one token is scored, behind text that was never generated. Here a model
writes. The same prompts with worked examples go to every model, with or without a chat template, and numbers are drawn
from a seed, so no model has read the answers. Functions are compiled and never run.
"""

from __future__ import annotations

import ast
import random
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

NAMES = ("Ana", "Ben", "Clara", "Dan", "Eva", "Finn", "Grace", "Hugo", "Iris", "Jack", "Kim", "Leo")
# A story, its answer, and the smallest and largest of each number in it.
STORIES: tuple[tuple[str, Callable[..., int], tuple[tuple[int, int], ...]], ...] = (
    ("{n} has {a} apples and buys {b} more. How many apples does {n} have now?",
     lambda a, b: a + b, ((2, 9), (2, 9))),
    ("{n} had {a} stamps and gave {b} of them to a friend. How many stamps are left?",
     lambda a, b: a - b, ((11, 19), (2, 9))),
    ("A box holds {a} pencils. How many pencils are in {b} boxes?", lambda a, b: a * b, ((2, 9), (2, 9))),
    ("{n} reads {a} pages on Monday, {b} on Tuesday and {c} on Wednesday. How many pages is that in all?",
     lambda a, b, c: a + b + c, ((2, 9), (2, 9), (2, 9))),
    ("{n} buys {a} pens at {b} dollars each and a bag for {c} dollars. How many dollars does {n} spend?",
     lambda a, b, c: a * b + c, ((2, 6), (2, 6), (2, 9))),
    ("A bus carries {a} people. At a stop {b} get off and {c} get on. How many people are on the bus?",
     lambda a, b, c: a - b + c, ((20, 40), (2, 9), (2, 9))),
    ("{n} bakes {a} trays of {b} cookies and eats {c} of them. How many cookies are left?",
     lambda a, b, c: a * b - c, ((3, 9), (4, 9), (2, 9))),
    ("A farmer has {a} rows of {b} trees and {c} rows of {b} bushes. How many plants is that?",
     lambda a, b, c: a * b + c * b, ((2, 9), (3, 9), (2, 9))),
)  # fmt: skip
EXAMPLES = (  # of stories that are not among those above
    ("A shop sells 7 cups in the morning and 12 in the afternoon. How many cups does it sell?", "7 + 12", 19),
    ("There are 45 birds in a tree and 18 fly away. How many birds stay?", "45 - 18", 27),
    ("Each of 6 tables has 4 chairs. How many chairs are there?", "6 * 4", 24),
    ("Tom packs 5 bags with 8 oranges each and keeps 3 oranges. How many oranges did he have?", "5 * 8 + 3", 43),
)
FUNCTIONS = (
    ("is_even(number)", "Return True if the number is even."),
    ("largest(numbers)", "Return the largest number of a list, or None if it is empty."),
    ("count_vowels(text)", "Return how many vowels the text has."),
    ("reverse_words(text)", "Return the text with its words in reverse order."),
    ("factorial(n)", "Return the product of the numbers from 1 to n."),
    ("fibonacci(n)", "Return the first n Fibonacci numbers as a list."),
    ("is_palindrome(text)", "Return True if the text reads the same backwards."),
    ("unique(items)", "Return the items without duplicates, in their first order."),
    ("flatten(lists)", "Return all items of a list of lists as one list."),
    ("word_lengths(text)", "Return a dictionary from each word of the text to its length."),
    ("mean(numbers)", "Return the mean of the numbers; raise ValueError if there are none."),
    ("is_prime(n)", "Return True if n is a prime number."),
    ("merge(left, right)", "Merge two sorted lists into one sorted list."),
    ("binary_search(items, target)", "Return the index of target in a sorted list, or -1."),
    ("read_lines(path)", "Return the lines of a text file without their line ends."),
    ("celsius(fahrenheit)", "Convert a temperature from Fahrenheit to Celsius."),
)
EXAMPLE_FUNCTIONS = '''def absolute(number):
    """Return the number without its sign."""
    if number < 0:
        return -number
    return number


def total(numbers):
    """Return the sum of the numbers."""
    result = 0
    for number in numbers:
        result += number
    return result


'''


@dataclass(frozen=True)
class Item:
    """One prompt; `right` judges the text that follows it, told whether the model stopped by itself."""

    task: str
    name: str
    prompt: str
    max_new_tokens: int
    stop: tuple[str, ...]
    right: Callable[[str, bool], bool]


def maths(count: int, seed: int = 0) -> list[Item]:
    """Questions in GSM8K's form; the number behind #### must be the answer."""
    draw = random.Random(seed)
    shown = "".join(f"Question: {q}\nAnswer: {work} = {value}. #### {value}\n\n" for q, work, value in EXAMPLES)
    items = []
    for i in range(count):
        story, answer, ranges = STORIES[i % len(STORIES)]
        values = {name: draw.randint(*of) for name, of in zip("abc", ranges, strict=False)}
        question = story.format(n=draw.choice(NAMES), **values)
        prompt = f"{shown}Question: {question}\nAnswer:"
        items.append(Item("maths", f"maths {i}", prompt, 48, ("\n\n",), _says(answer(**values))))
    return items


def _says(answer: int) -> Callable[[str, bool], bool]:
    return lambda text, stopped: said(text) == answer


def functions(count: int) -> list[Item]:
    """Python functions to complete, at most as many as there are."""
    return [_function(i, *about) for i, about in enumerate(FUNCTIONS[:count])]


def _function(number: int, signature: str, purpose: str) -> Item:
    start = f'def {signature}:\n    """{purpose}"""'

    def right(text: str, stopped: bool) -> bool:
        return compiles(start, text, stopped)

    return Item("code", f"code {number}", EXAMPLE_FUNCTIONS + start, 96, ("\ndef ", "\nclass ", "\nprint("), right)


def said(text: str) -> int | None:
    """The number behind the first ####, commas left out."""
    found = re.search(r"####\s*\$?(-?\d[\d,]*)", text)
    return None if found is None else int(found[1].replace(",", ""))


def compiles(start: str, text: str, stopped: bool) -> bool:
    """Whether a function's beginning and what was written after it compile, up to the first line outside it.

    Args:
        start: without its last line's end.
        stopped: False where the text was cut at a limit of tokens: its last line is then left out.
    """
    body: list[str] = []
    first, *lines = text.split("\n") if stopped else text.split("\n")[:-1] or [""]
    for line in lines:
        if line.strip() and not line[0].isspace():
            break
        body.append(line)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse("\n".join([start + first, *body]) + "\n")
            compile(tree, "<answer>", "exec")
    except (SyntaxError, ValueError, RecursionError):
        return False
    function = tree.body[0]
    return isinstance(function, ast.FunctionDef) and len(function.body) > 1  # more than its docstring
