"""Where the text to train on begins: prompts of a file, the model's own, or documents that stand as they are.

Prompt-free ("Magpie", arXiv 2406.08464): an aligned model that is fed its chat template up to where a user's words
start writes a user's turn. The template closes the turn and the model answers it, so nothing but the model is needed.
A model without a chat template writes the opening of a document from its BOS token, and goes on with it.

Plain text is trained on as it is, as DSSD does (arXiv 2407.21082): heads learn what the full model says there.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..engine.model import Decoder
from ..engine.tokenizer import Tokenizer
from .data import SelfText, encode_chat, read_prompts
from .generate import Sampling, write_text

OPENING_TOKENS = 24  # of a document whose start the model writes
CHARACTERS_PER_TOKEN = 3  # pieces of a corpus are cut by characters before they are encoded
ROUNDS = 4  # batches of own prompts before giving up on the wanted number


@dataclass(frozen=True)
class Prompt:
    """Where a text begins: its words, which the held-out split hashes, and what the model is fed."""

    text: str
    ids: list[int]


@dataclass(frozen=True)
class UserTurn:
    """A chat template around a user's words.

    Attributes:
        opening: token ids from the start of the conversation to the first of the user's words.
        closing: what the template writes after them, up to the assistant's first word.
        stop_ids: ids that end the user's turn.
    """

    opening: list[int]
    closing: str
    stop_ids: tuple[int, ...]


def is_corpus(source: str | Path) -> bool:
    """Whether a source is plain text, which is trained on as it is, and not a list of prompts."""
    return str(source).endswith((".txt", ".txt.gz"))


def load_prompts(source: str | Path, tokenizer: Tokenizer, limit: int | None = None) -> list[Prompt]:
    """Prompts of a JSON-lines file or hub data set (see `data.read_prompts`), through the chat template if any."""
    return [Prompt(text, encode_chat(tokenizer, text)) for text in read_prompts(source, limit)]


def load_corpus(path: str | Path, tokenizer: Tokenizer, max_tokens: int) -> list[Prompt]:
    """Pieces of a plain text file (`.txt`, `.txt.gz`) of at most `max_tokens` tokens, cut at ends of lines if possible.

    Pieces of one stretch of text carry the same `text`, so that the held-out split keeps them together.

    Raises:
        ValueError: no text in it.
    """
    data = Path(path).read_bytes()
    text = (gzip.decompress(data) if str(path).endswith(".gz") else data).decode("utf-8", errors="replace")
    pieces: list[Prompt] = []
    for block in _blocks(text, max_tokens * CHARACTERS_PER_TOKEN):
        ids = tokenizer.encode(block)
        pieces += [Prompt(block, ids[at : at + max_tokens]) for at in range(0, len(ids), max_tokens)]
    pieces = [piece for piece in pieces if len(piece.ids) > 1]
    if not pieces:
        raise ValueError(f"{path} holds no text: expected a plain text file of at least two tokens")
    return pieces


def corpus_text(pieces: Sequence[Prompt]) -> SelfText:
    """Documents as they are: a head drafts every token but the first."""
    ids = [torch.tensor(piece.ids, dtype=torch.int32) for piece in pieces]
    return SelfText.join(ids, [1] * len(pieces), [False] * len(pieces))


def user_turn(tokenizer: Tokenizer) -> UserTurn:
    """Where a user's words stand in the chat template, found with a word that no template holds.

    Raises:
        ValueError: no chat template, or one that does not show the user's words once and as they are.
    """
    word = "Sentinel7193"
    shown = tokenizer.render_chat([{"role": "user", "content": word}])
    if shown.count(word) != 1:
        raise ValueError(
            f"the chat template shows a user's words {shown.count(word)} times, expected once: its user turns cannot "
            "be left to the model, give a file of prompts"
        )
    opening, closing = shown.split(word)
    first = tokenizer.encode(closing, add_special_tokens=False)[:1]
    ends = [i for i in first if not tokenizer.decode([i]) and tokenizer.decode([i], skip_special_tokens=False)]
    stop_ids = tuple(sorted({*tokenizer.stop_ids, *ends}))
    return UserTurn(tokenizer.encode(opening, add_special_tokens=False), closing, stop_ids)


def write_prompts(
    decoder: Decoder,
    tokenizer: Tokenizer,
    count: int,
    max_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    cache_tokens: int | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> list[Prompt]:
    """Prompts in the model's own words: user turns, or openings of documents where there is no chat template.

    Empty, unfinished (longer than `max_tokens`), broken and repeated turns are left out; more are written to make up
    for them, in at most four batches.

    Args:
        count: prompts wanted; fewer may come back.
        max_tokens: of a user's turn.
        temperature: of the turns; 1 is the model's own distribution.
        seed, cache_tokens, on_tokens: see `write_text`.

    Raises:
        ValueError: not one usable prompt, or a model with neither a chat template nor a BOS or EOS token.
    """
    turn = user_turn(tokenizer) if tokenizer.has_chat_template else None
    if turn is not None:
        start, sampling = turn.opening, Sampling(max_tokens, turn.stop_ids, cache_tokens)
    else:
        first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        if first is None:
            raise ValueError("the tokenizer has no chat template, no BOS and no EOS token: give a file of prompts")
        start, sampling = [first], Sampling(OPENING_TOKENS, tokenizer.stop_ids, cache_tokens)
    found: dict[str, Prompt] = {}
    for number in range(ROUNDS):
        missing = count - len(found)
        if missing <= 0:
            break
        sampling = replace(sampling, seed=(seed * ROUNDS + number) % 2**64)
        rows = missing + missing // 4 + 1
        written = write_text(decoder, [start] * rows, [temperature] * rows, sampling, on_tokens)
        for i in range(rows):
            ids = written.text(i).tolist()
            prompt = _opening(tokenizer, ids) if turn is None else _turn(tokenizer, turn, ids[len(start) :])
            if prompt is not None:
                found.setdefault(" ".join(prompt.text.lower().split()), prompt)
    if not found and count > 0:
        raise ValueError(
            f"the model wrote no usable prompt in {ROUNDS} attempts (turns of 1..{max_tokens} tokens): "
            "give a file of prompts, or allow longer turns"
        )
    return list(found.values())[:count]


def mix_temperatures(
    num_prompts: int, copies: int = 2, greedy_fraction: float = 0.5, temperatures: Sequence[float] = (0.8,)
) -> list[tuple[int, float]]:
    """Which prompt each text continues, and at which temperature.

    Args:
        copies: texts a prompt.
        greedy_fraction: of all texts; at most 1 / copies, since a prompt has one greedy continuation only.
        temperatures: of the others, in turn.

    Returns:
        (prompt, temperature) pairs, the first copy of every prompt first; greedy ones spread evenly over the prompts.

    Raises:
        ValueError: a fraction out of range, or no temperature for sampled texts.
    """
    if copies < 1 or not 0 <= greedy_fraction * copies <= 1:
        raise ValueError(
            f"greedy_fraction is {greedy_fraction} of {copies} copies, expected 0 to {1 / max(1, copies):.3g}: "
            "a prompt has one greedy continuation only"
        )
    if not temperatures or min(temperatures) <= 0:
        raise ValueError(f"temperatures of sampled texts are {tuple(temperatures)}, expected some above 0")
    pairs: list[tuple[int, float]] = []
    sampled = 0
    share = greedy_fraction * copies
    for copy in range(copies):
        for prompt in range(num_prompts):
            if copy == 0 and int((prompt + 1) * share + 1e-9) > int(prompt * share + 1e-9):
                pairs.append((prompt, 0.0))
            else:
                pairs.append((prompt, temperatures[sampled % len(temperatures)]))
                sampled += 1
    return pairs


def _turn(tokenizer: Tokenizer, turn: UserTurn, ids: list[int]) -> Prompt | None:
    """A user's turn as the model wrote it, or None if it is of no use."""
    is_finished = bool(ids) and ids[-1] in turn.stop_ids
    body = ids[:-1] if is_finished else ids
    text = tokenizer.decode(body, skip_special_tokens=False)
    mark = turn.closing.strip()
    if mark and mark in text:  # a template that closes a turn in plain words
        text, is_finished = text.split(mark)[0], True
    elif text != tokenizer.decode(body):
        return None  # a special token inside
    text = text.strip()
    if not is_finished or not re.search(r"\w", text) or "\ufffd" in text:
        return None
    return Prompt(text, encode_chat(tokenizer, text))


def _opening(tokenizer: Tokenizer, ids: list[int]) -> Prompt | None:
    """The start of a document, or None if the document ended at once."""
    if ids[-1] in tokenizer.stop_ids:
        return None
    text = tokenizer.decode(ids)
    return Prompt(text, ids) if text.strip() else None


def _blocks(text: str, size: int) -> list[str]:
    """Stretches of whole lines, of `size` characters or little more; a longer line is cut."""
    blocks, block, length = [], [], 0
    for line in text.splitlines(keepends=True):
        for part in (line[at : at + size] for at in range(0, len(line), size)):
            block.append(part)
            length += len(part)
            if length >= size:
                blocks.append("".join(block))
                block, length = [], 0
    blocks.append("".join(block))
    return [b for b in blocks if b.strip()]
