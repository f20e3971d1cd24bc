"""Questions behind long texts: does drafting still pay far into the context (hazard 22)?

The text in front is the other questions of the file, one after the other from the next one on and from the start
again: something to read of the very kinds that are asked. Each question so becomes one for every size, of the task
`context SIZE`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..engine.tokenizer import Tokenizer
from .measure import prompt_ids
from .questions import Question

BETWEEN = "\n\n"


def parse_sizes(text: str) -> tuple[int, ...]:
    """Token counts from `512,1k,4k`; k is 1024.

    Raises:
        ValueError: anything else.
    """
    sizes = []
    for part in text.split(","):
        number, factor = (part.strip()[:-1], 1024) if part.strip().lower().endswith("k") else (part.strip(), 1)
        if not number.isdigit() or int(number) == 0:
            raise ValueError(f"context {part.strip()!r}: expected token counts such as 512,1k,2k")
        sizes.append(int(number) * factor)
    return tuple(sorted(set(sizes)))


def at_contexts(questions: Sequence[Question], sizes: Sequence[int], tokenizer: Tokenizer, room: int) -> list[Question]:
    """Each question's first turn behind as much text as makes its prompt so many tokens.

    Args:
        sizes: tokens of a prompt, the chat template's included. One beyond `room` is cut to it, so that 8192 of a model
            of 8192 means as much as leaves place for the answer.
        room: tokens that a prompt may have.

    Returns:
        Size by size; a prompt has at most that many tokens and few less. Questions longer than a size are
        left out of it.
    """
    made = []
    for size in sizes:
        wanted = min(size, room)
        for at, question in enumerate(questions):
            turn = question.turns[0]
            others = [*questions[at + 1 :], *questions[: at + 1]]
            text = BETWEEN.join(turn for other in others for turn in other.turns)
            filler = tokenizer.encode(text, add_special_tokens=False)
            filler *= -(-wanted // max(1, len(filler)))
            keep = wanted - len(prompt_ids(tokenizer, [BETWEEN + turn], ()))
            while keep > 0:
                whole = tokenizer.decode(filler[:keep]) + BETWEEN + turn
                over = len(prompt_ids(tokenizer, [whole], ())) - wanted
                if over <= 0:
                    made.append(Question(f"{question.question_id}@{size}", f"context {size}", (whole,)))
                    break
                keep -= over
    return made
