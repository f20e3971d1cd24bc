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

MOST_DRAWS = 1000  # of numbers that a question does not have yet
NAMES = ("Ana", "Ben", "Clara", "Dan", "Eva", "Finn", "Grace", "Hugo", "Iris", "Jack", "Kim", "Leo")
# Stories of one step, of two or three with small numbers, and of three or four with larger ones: a story, its answer,
# and the smallest and largest of each number in it.
STORIES: dict[str, tuple[tuple[str, Callable[..., int], tuple[tuple[int, int], ...]], ...]] = {
    "easy": (
        ("{n} has {a} apples and buys {b} more. How many apples does {n} have now?",
         lambda a, b: a + b, ((2, 19), (2, 9))),
        ("{n} had {a} stamps and gave {b} of them to a friend. How many stamps are left?",
         lambda a, b: a - b, ((11, 29), (2, 9))),
        ("A box holds {a} pencils. How many pencils are in {b} boxes?", lambda a, b: a * b, ((2, 9), (2, 9))),
        ("There are {a} boys and {b} girls in a class. How many children are there?",
         lambda a, b: a + b, ((6, 19), (6, 19))),
        ("{n} baked {a} rolls and sold {b} of them. How many rolls are not sold?",
         lambda a, b: a - b, ((21, 49), (3, 19))),
        ("One ticket costs {a} dollars. How many dollars do {b} tickets cost?", lambda a, b: a * b, ((3, 12), (2, 9))),
    ),
    "medium": (
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
    ),
    "hard": (
        ("{n} reads {a} pages a day for {b} days and then {c} pages more. The book has 500 pages. How many pages are "
         "left?", lambda a, b, c: 500 - a * b - c, ((12, 29), (3, 9), (11, 49))),
        ("A shop sells {a} cakes at {b} dollars each and {c} pies at {d} dollars each. How many dollars does it take "
         "in?", lambda a, b, c, d: a * b + c * d, ((11, 29), (6, 9), (11, 29), (3, 5))),
        ("A bus carries {a} people. At the first stop {b} get off and {c} get on, at the second {d} get off. How many "
         "people are on the bus?", lambda a, b, c, d: a - b + c - d, ((40, 70), (11, 19), (5, 29), (5, 19))),
        ("{n} earns {a} dollars an hour, works {b} hours a day for {c} days and spends {d} dollars. How many dollars "
         "are left?", lambda a, b, c, d: a * b * c - d, ((11, 19), (3, 8), (3, 6), (21, 99))),
        ("A farmer has {a} rows of {b} trees. A storm takes {c} trees in each row. How many trees are left?",
         lambda a, b, c: a * (b - c), ((11, 29), (12, 25), (2, 9))),
        ("Sam has {a} marbles, {n} has twice as many, and together they give {b} of them away. How many marbles do "
         "they still have?", lambda a, b: a + 2 * a - b, ((21, 49), (12, 59))),
    ),
}  # fmt: skip
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
    ("gcd(a, b)", "Return the greatest common divisor of a and b."),
    ("digits(number)", "Return the digits of a number as a list, the first one first."),
    ("transpose(rows)", "Return the columns of a matrix as lists."),
    ("title_case(text)", "Return the text with the first letter of each word in upper case."),
    ("median(numbers)", "Return the middle of the sorted numbers, or the mean of the two in the middle."),
    ("invert(mapping)", "Return a dictionary from each value to its key."),
    ("chunks(items, size)", "Return the items in lists of at most size."),
    ("common(left, right)", "Return the items of left that are also in right."),
    ("caesar(text, shift)", "Return the text with each letter shifted through the alphabet."),
    ("bubble_sort(items)", "Sort a list in place and return it."),
    ("quick_sort(items)", "Return the items in rising order, sorted by parts around a pivot."),
    ("power(base, exponent)", "Return base to a whole exponent, without the ** operator."),
    ("clamp(value, low, high)", "Return the value, or the bound that it lies beyond."),
    ("running_total(numbers)", "Return a list of the sums of the first 1, 2, 3 and more numbers."),
    ("histogram(items)", "Return a dictionary from each item to how often it comes."),
    ("most_frequent(items)", "Return the item that comes most often, or None if there are no items."),
    ("is_anagram(left, right)", "Return True if both texts have the same letters."),
    ("leap_year(year)", "Return True if the year has 366 days."),
    ("roman(number)", "Return a number from 1 to 3999 in Roman numerals."),
    ("binary(number)", "Return the binary digits of a number as text, without bin()."),
    ("rotate(items, steps)", "Return the items moved to the left by steps places, the first ones at the end."),
    ("dot(left, right)", "Return the sum of the products of two lists of numbers."),
    ("multiply(a, b)", "Return the product of two matrices, given as lists of rows."),
    ("distance(first, second)", "Return the distance between two points (x, y)."),
    ("compound(amount, rate, years)", "Return the amount with interest added once a year."),
    ("strip_tags(text)", "Return the text without what stands between < and >."),
    ("parse_pairs(text)", "Return a dictionary from text such as 'a=1;b=2'."),
    ("count_lines(path)", "Return how many lines of a file are not empty."),
    ("load_json(path, default)", "Return what a JSON file holds, or the default if there is no such file."),
    ("retry(action, times)", "Call action until it raises nothing, at most so many times; then raise its error."),
    ("memoize(function)", "Return a function that remembers the results of calls with one argument."),
    ("evens(limit)", "Yield the even numbers below the limit."),
    ("interleave(left, right)", "Return items of two lists by turns, then what is left of the longer one."),
    ("depth(node)", "Return the depth of a tree of dictionaries with a list of 'children'."),
    ("insert_sorted(items, item)", "Insert an item into a sorted list so that it stays sorted."),
    ("partition(items, test)", "Return two lists: the items for which test is true, and the others."),
    ("hamming(left, right)", "Return in how many places two texts of the same length differ."),
    ("longest_word(text)", "Return the longest word of the text, the first one of several."),
    ("remove_spaces(text)", "Return the text with runs of spaces replaced by one space."),
    ("acronym(phrase)", "Return the first letters of the words in upper case."),
    ("sum_of_squares(n)", "Return the sum of the squares of the numbers from 1 to n."),
    ("collatz(n)", "Return the numbers from n down to 1 by halving even ones and taking 3n + 1 of odd ones."),
    ("pascal(rows)", "Return the first rows of Pascal's triangle."),
    ("primes(limit)", "Return all primes below the limit by a sieve."),
    ("group_by_length(words)", "Return a dictionary from each length to the words that have it."),
    ("zip_to_dict(keys, values)", "Return a dictionary of keys and values, None where a value is missing."),
    ("second_largest(numbers)", "Return the second largest of the different numbers, or None."),
    ("to_seconds(text)", "Return how many seconds a time such as '1:02:03' is."),
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


def maths(count: int, seed: int = 0, level: str = "medium") -> list[Item]:
    """Questions in GSM8K's form, no two the same; the number behind #### must be the answer.

    Args:
        level: of `STORIES`.

    Raises:
        ValueError: more questions than a story has numbers for.
    """
    draw = random.Random(seed)
    shown = "".join(f"Question: {q}\nAnswer: {work} = {value}. #### {value}\n\n" for q, work, value in EXAMPLES)
    stories, items, asked = STORIES[level], [], set[str]()
    for i in range(count):
        story, answer, ranges = stories[i % len(stories)]
        for _ in range(MOST_DRAWS):
            values = {name: draw.randint(*of) for name, of in zip("abcd", ranges, strict=False)}
            question = story.format(n=draw.choice(NAMES), **values)
            if question not in asked:
                break
        else:
            raise ValueError(f"{count} {level} questions were asked for, and {story!r} ran out of numbers: ask fewer")
        asked.add(question)
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
