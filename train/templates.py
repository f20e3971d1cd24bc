"""Prompts from templates, for heads that are to know other tasks than a prompt file holds.

    python -m skipstone.train.templates code 4000 > code.jsonl
    python -m skipstone.train.templates code 48 --held-out > code_held_out.jsonl
    python -m skipstone.train.templates text 8000 --passages PROMPTS.jsonl.gz > text.jsonl

`code`: programming tasks in several languages and phrasings; every eighth task is kept for `--held-out`, in all its
phrasings. `text`: things to do with the passages found in a prompt file (summarise, answer, translate, continue), and
open questions. Heads learn what the model writes after them, so the prompts need to be varied, not clever.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence

from .data import read_prompts

LANGUAGES = ("Python",) * 8 + ("JavaScript", "TypeScript", "Java", "C++", "C", "Go", "Rust", "SQL-free Python", "Bash")
CODE_TASKS = (
    "reverses a string", "checks whether a string is a palindrome", "computes the n-th Fibonacci number iteratively",
    "finds all prime numbers up to n with a sieve", "counts the words of a text file", "merges two sorted lists",
    "sorts a list with quicksort", "sorts a list with merge sort", "performs binary search in a sorted array",
    "implements a stack with push, pop and peek", "implements a queue with two stacks", "reverses a linked list",
    "detects a cycle in a linked list", "inserts a value into a binary search tree", "traverses a binary tree in order",
    "computes the height of a binary tree", "finds the shortest path in a grid with breadth-first search",
    "runs Dijkstra's algorithm on a weighted graph", "sorts a directed graph topologically",
    "counts islands in a grid of zeros and ones", "computes the edit distance of two strings",
    "finds the longest common subsequence", "solves the 0/1 knapsack problem", "generates all permutations of a list",
    "generates all subsets of a set", "solves the n-queens problem", "validates an e-mail address",
    "parses a CSV file into dictionaries", "converts a dictionary to JSON and back", "reads a configuration file",
    "downloads a web page and prints its title", "counts how often each word occurs", "removes duplicates from a list",
    "flattens a nested list", "groups items by a key", "computes the greatest common divisor",
    "converts decimal numbers to binary", "converts Roman numerals to integers", "checks for balanced brackets",
    "evaluates an arithmetic expression", "multiplies two matrices", "transposes a matrix", "rotates an image matrix",
    "finds the maximum subarray sum", "finds two numbers that add up to a target",
    "moves all zeros to the end of a list",
    "finds the first non-repeating character", "checks whether two strings are anagrams",
    "compresses a string by run length",
    "encrypts a text with a Caesar cipher", "hashes a password with a salt", "generates a random password",
    "implements a least-recently-used cache", "implements a trie with insert and search", "implements a min heap",
    "limits how often a function may be called per second", "retries a function with exponential backoff",
    "measures how long a function takes with a decorator", "memoizes a recursive function",
    "implements a bank account class",
    "models a shopping cart with discounts", "simulates a parking lot", "implements tic-tac-toe for two players",
    "plays rock-paper-scissors against the computer", "implements Conway's game of life", "draws a triangle of stars",
    "prints the multiplication table", "solves FizzBuzz", "computes the factorial recursively", "checks for leap years",
    "computes the number of days between two dates", "formats a timestamp", "parses command-line arguments",
    "lists all files of a directory recursively", "renames files in a folder by a pattern", "finds duplicate files",
    "watches a log file for errors", "extracts all links of an HTML page",
    "sends an HTTP GET request and parses the JSON",
    "defines a REST endpoint that returns a list of users", "validates a form with name and age",
    "connects to an SQLite database and creates a table", "inserts rows into a database safely",
    "paginates query results",
    "computes the mean, median and standard deviation", "fits a line to points by least squares",
    "implements k-means clustering", "implements logistic regression with gradient descent", "computes softmax stably",
    "splits a data set into training and test parts", "normalises the columns of a table", "computes a moving average",
    "implements an event emitter", "implements the observer pattern", "implements a singleton",
    "writes a context manager",
    "runs several downloads concurrently", "implements a thread-safe counter", "implements a producer and a consumer",
    "computes the checksum of a file", "splits a text into chunks of n words", "wraps a text at 80 columns",
    "converts Celsius to Fahrenheit", "computes compound interest", "converts a number to words", "swaps two variables",
)  # fmt: skip
CODE_PHRASES = (
    "Write a {language} function that {task}.", "Write {language} code that {task}.",
    "Write a {language} program that {task}. Include comments.", "Implement a {language} class that {task}.",
    "How do I write a {language} function that {task}? Show an example.",
    "I need a short {language} script that {task}. Please handle errors.",
    "Give me a {language} implementation that {task}, with type annotations if the language has them.",
    "Write a {language} function that {task}, then write three unit tests for it.",
    "Write a {language} function that {task} and explain how it works step by step.",
    "Complete the task in {language}: a function that {task}. Only show the code.",
    "Write an efficient {language} function that {task}. What is its time complexity?",
    "Show two different ways in {language} to write a function that {task}.",
)  # fmt: skip
CODE_SNIPPETS = (
    "def f(xs):\n    out = []\n    for x in xs:\n        if x not in out:\n            out.append(x)\n    return out",
    "def add(a, b):\n    return a - b", "for i in range(10)\n    print(i)",
    "x = [i**2 for i in range(10) if i % 2 == 0]",
    "class Dog:\n    def __init__(self, name):\n        name = name\n\n    def bark(self):\n        print(self.name)",
    "function sum(a) { let s = 0; for (let i = 0; i <= a.length; i++) { s += a[i]; } return s; }",
    "SELECT name, COUNT(*) FROM orders WHERE total > 100 GROUP BY name HAVING COUNT(*) > 3 ORDER BY 2 DESC;",
    "def fact(n):\n    return n * fact(n - 1)", "int main() { int *p = malloc(10); p[10] = 1; return 0; }",
    "import re\ndef words(t):\n    return re.findall(r'\\w+', t.lower())",
    "def read(path):\n    f = open(path)\n    return f.read()",
    "const get = async (u) => { const r = await fetch(u); return r.json(); }",
    "def bs(a, x):\n    lo, hi = 0, len(a)\n    while lo < hi:\n        mid = (lo + hi) // 2\n        if a[mid] < x:\n"
    "            lo = mid + 1\n        else:\n            hi = mid\n    return lo",
    "try:\n    value = int(input())\nexcept:\n    pass",
    "def append(x, items=[]):\n    items.append(x)\n    return items",
    "df.groupby('city')['price'].mean().sort_values(ascending=False).head(5)",
)  # fmt: skip
SNIPPET_PHRASES = (
    "Explain what this code does:\n\n{code}", "Find the bug in this code and fix it:\n\n{code}",
    "Add comments and type annotations to this code:\n\n{code}", "Write unit tests for this code:\n\n{code}",
    "Rewrite this code so that it is easier to read:\n\n{code}", "Make this code faster, and explain why:\n\n{code}",
    "Translate this code to Java:\n\n{code}", "Translate this code to Python 3:\n\n{code}",
    "Review this code:\n\n{code}",
)  # fmt: skip
TOPICS = (
    "photosynthesis", "the French Revolution", "inflation", "black holes", "the water cycle", "machine learning",
    "jazz music",
    "a trip to Japan", "healthy breakfasts", "time management", "climate change", "the Roman Empire",
    "renewable energy",
    "vaccines", "the stock market", "chess openings", "gardening", "online privacy", "quantum computing", "volcanoes",
    "the human heart", "public speaking", "electric cars", "the moon landing", "Shakespeare", "yoga",
    "supply and demand",
    "the immune system", "Python programming", "coffee", "city planning", "coral reefs", "the Silk Road",
    "job interviews",
    "DNA", "remote work", "World War I", "evolution", "photography", "budgeting", "democracy", "sleep", "antibiotics",
    "the Renaissance", "space telescopes", "bicycles", "olive oil", "social media", "robots",
    "the history of mathematics",
)  # fmt: skip
TOPIC_PHRASES = (
    "Write a short blog post about {topic}.", "Explain {topic} to a ten-year-old.",
    "What are the main facts about {topic}?",
    "Write an outline for a talk about {topic}.", "Give me five questions with answers about {topic}.",
    "Compare two views on {topic} and say which you find more convincing.", "Write a persuasive e-mail about {topic}.",
    "Imagine you are an expert on {topic}. How would you introduce your field?", "Write a poem about {topic}.",
    "Describe a typical misunderstanding about {topic} and correct it.", "Tell a short story in which {topic} matters.",
    "What should a beginner know about {topic}? Answer with a numbered list.", "Why does {topic} matter today?",
    "Write a dialogue between two friends about {topic}.", "Discuss the causes and effects of {topic}.",
    "Pretend to be a museum guide and present {topic}.", "Draft a letter to the editor on {topic}.",
)  # fmt: skip
PASSAGE_PHRASES = (
    "Summarize: {passage}",
) * 6 + (
    "{passage}\n{question}",
    "{passage}\nWhat is this text about?", "{passage}\nWho or what is described here, and why?",
    "Read the text and list its three main points.\n\n{passage}", "Write a headline for this text:\n{passage}",
    "{passage}\n\nContinue the text.", "Rewrite this text in simpler words: {passage}",
    "Extract all names and dates from this text:\n\n{passage}", "{passage}\nWhen did this happen?",
    "{passage}\nDescribe the main idea in your own words.", "{passage}\nHow is this explained in the text?",
)  # fmt: skip
GERMAN = (
    ("Der Bürgermeister", "Die Regierung", "Ein Sprecher der Polizei", "Das Unternehmen", "Der Trainer",
    "Die Ministerin",
     "Der Konzern", "Eine Studie der Universität", "Die Opposition", "Das Gericht", "Der Verband", "Die Stadt",
     "Die Europäische Union", "Ein Zeuge", "Der Künstler", "Die Mannschaft", "Der Minister", "Die Bank"),
    ("kündigte am Montag", "fordert seit Jahren", "bestätigte gegenüber der Zeitung", "plant für das nächste Jahr",
     "lehnte am Wochenende", "veröffentlichte in Berlin", "verteidigte vor dem Ausschuss", "kritisierte im Interview",
     "erklärte am Dienstag", "begrüßte in München", "verschob wegen des Wetters", "prüft derzeit"),
    ("neue Regeln für den Verkehr", "den Bau von tausend Wohnungen", "eine Senkung der Steuern",
    "den Vertrag mit dem Spieler",
     "die Ergebnisse der Untersuchung", "mehr Geld für Schulen", "den Abbau von Arbeitsplätzen",
     "die Pläne für den Flughafen",
     "ein Verbot von Plastiktüten", "die Reise nach Frankreich", "eine Ausstellung über das Mittelalter",
     "höhere Preise für Strom", "den Umzug in ein neues Gebäude", "die Wahl des Präsidenten"),
    ("", " , weil die Kosten gestiegen sind", " , obwohl viele Bürger dagegen sind", " und sprach von einem Erfolg",
     " , sagte er am Abend", " , wie die Behörde mitteilte", " , um die Umwelt zu schützen", " nach langen Gesprächen"),
)  # fmt: skip
_QUESTION = re.compile(r"(?:^|[.\n:] ?)((?:Who|What|When|Where|Which|How|Why|Is|Does|Did) [^.?\n]{8,90}\?)")


def code(count: int, seed: int = 0, held_out: bool = False) -> list[str]:
    """Programming prompts; `held_out` takes the tasks and snippets that the others leave."""

    def chosen(things: Sequence[str]) -> list[str]:
        return [thing for place, thing in enumerate(things) if (place % 8 == 7) is held_out]

    def generate() -> Iterator[str]:
        draw = random.Random(seed)
        tasks, snippets = chosen(CODE_TASKS), chosen(CODE_SNIPPETS)
        while True:
            if draw.random() < 0.06:
                yield draw.choice(SNIPPET_PHRASES).format(code=draw.choice(snippets))
            yield draw.choice(CODE_PHRASES).format(language=draw.choice(LANGUAGES), task=draw.choice(tasks))

    return _distinct(generate(), count)


def text(count: int, prompts: Sequence[str], seed: int = 0) -> list[str]:
    """Prompts about the passages and questions found in other prompts, and about topics of this file."""
    passages = [p for p in (_passage(prompt) for prompt in prompts) if p]
    questions = sorted({q.strip() for prompt in prompts for q in _QUESTION.findall(prompt)})
    if not passages or not questions:
        raise ValueError(f"{len(prompts)} prompts hold {len(passages)} passages and {len(questions)} questions")

    def generate() -> Iterator[str]:
        draw = random.Random(seed)
        while True:
            kind = draw.random()
            if kind < 0.55:
                pieces = " ".join(draw.choice(passages) for _ in range(draw.choice((1, 1, 1, 2, 3))))
                phrase = draw.choice(PASSAGE_PHRASES)
                yield phrase.format(
                    passage=pieces[: draw.choice((600, 1200, 2000, 2600))], question=draw.choice(questions)
                )
            elif kind < 0.75:
                yield draw.choice(questions)
            elif kind < 0.85:
                yield "Translate German to English: " + " ".join(draw.choice(part) for part in GERMAN).replace(
                    "  ", " "
                )
            else:
                yield draw.choice(TOPIC_PHRASES).format(topic=draw.choice(TOPICS))

    return _distinct(generate(), count)


def _passage(prompt: str) -> str | None:
    """A prompt's longest paragraph, if it is a text of some sentences."""
    longest = max(prompt.split("\n"), key=len).strip()
    return longest if len(longest) >= 250 and longest.count(". ") >= 2 else None


def _distinct(made: Iterable[str], count: int) -> list[str]:
    """The first `count` different ones; fewer where there are no more."""
    found: dict[str, None] = {}
    for one in itertools.islice(made, 20 * count):
        found[one] = None
        if len(found) == count:
            break
    return list(found)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="skipstone.train.templates", description="Prompts from templates, as JSON lines."
    )
    parser.add_argument("kind", choices=("code", "text"))
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", action="store_true", help="code: the tasks that the others leave")
    parser.add_argument("--passages", metavar="FILE", help="text: a prompt file to take passages and questions from")
    given = parser.parse_args()
    if given.kind == "code":
        found = code(given.count, given.seed, given.held_out)
    elif given.passages is None:
        parser.error("text needs --passages FILE")
    else:
        found = text(given.count, read_prompts(given.passages), given.seed)
    for prompt in found:
        sys.stdout.write(json.dumps({"source": f"template-{given.kind}", "prompt": prompt}, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
