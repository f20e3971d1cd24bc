"""A grammar as a logits processor: the output is a list of whole numbers, whatever the model would rather say.

A processor sees the token ids before one place and the logits there, and returns logits. It is called for drafted
places too, each with its own prefix, so it must depend on nothing else: no counters, no memory.

    python examples/custom_processor.py [MODEL]
"""

import re
import sys

import skipstone
import torch

DIGITS = set("0123456789")


def next_characters(text: str) -> set[str]:
    """What may follow in a list such as 3, 14, 159: numbers of at most three digits."""
    if not text or text.endswith(" "):
        return DIGITS
    if text.endswith(","):
        return {" "}
    number = text.rpartition(" ")[2]
    return {","} if len(number) == 3 else DIGITS | {","}


model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
engine = skipstone.load(model)
tokenizer = engine.tokenizer
assert tokenizer is not None
prompt_ids = tokenizer.encode("The first prime numbers are: ")
id_of = {character: tokenizer.encode(character)[-1] for character in DIGITS | {",", " "}}


def only_numbers(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    text = tokenizer.decode(token_ids[len(prompt_ids) :])
    allowed = torch.tensor([id_of[character] for character in next_characters(text)], device=logits.device)
    masked = torch.full_like(logits, -torch.inf)
    masked[allowed] = logits[allowed]
    return masked


out = engine.generate(prompt_ids, max_new_tokens=32, logits_processor=only_numbers, ignore_eos=True)
print(out.text)
assert re.fullmatch(r"(\d{1,3}, )*(\d{0,3}|\d{1,3},)", out.text), "the grammar was left"
