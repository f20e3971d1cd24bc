"""Prompts, the held-out split, self-written text, and the batches a trainer reads.

A prompt file is JSON lines (`.jsonl` or `.jsonl.gz`) with a `prompt` and optionally a `source`, or Spec-Bench's
`turns`, whose first is taken; a data set of the hub has the same columns. Held-out prompts are chosen by hash of their
text, so the split survives reordering and new files; calibration never sees a training sequence.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..engine.tokenizer import Tokenizer

T = TypeVar("T")


def read_prompts(source: str | Path, limit: int | None = None) -> list[str]:
    """Prompts of a JSON-lines file or of a hub data set's `train` split, in their order, duplicates dropped.

    Args:
        source: a file, or `owner/name` where no such file exists (needs the package `datasets` and a network).
        limit: stop after this many.

    Raises:
        FileNotFoundError: neither a file nor the id of a data set.
        ImportError: a data set's id, and `datasets` is not installed.
        ValueError: a record that holds neither `prompt` nor `turns`, or no prompts at all.
    """
    path = Path(source)
    if path.is_file():
        records: Iterable[tuple[str, Any]] = _json_lines(path)
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)) and path.suffix not in (".jsonl", ".json", ".gz", ".txt"):
        records = _hub_records(str(source))
    else:
        raise FileNotFoundError(f"{source} is no file; expected JSON lines, or a hub data set's owner/name")
    prompts: dict[str, None] = {}
    for place, record in records:
        try:
            text = record["prompt"] if "prompt" in record else record["turns"][0]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{place}: expected 'prompt' or 'turns' ({error!r})") from error
        if not isinstance(text, str):
            raise ValueError(f"{place}: the prompt is a {type(text).__name__}, expected a string")
        prompts[text] = None
        if limit is not None and len(prompts) >= limit:
            break
    if not prompts:
        raise ValueError(f'{source} holds no prompts: expected JSON lines like {{"prompt": "..."}}')
    return list(prompts)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    data = path.read_bytes()
    # split at line feeds only: U+2028 may stand inside a string
    for number, line in enumerate((gzip.decompress(data) if path.suffix == ".gz" else data).decode().split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path} line {number}: expected JSON with 'prompt' or 'turns' ({error})") from error
            yield f"{path} line {number}", record


def _hub_records(name: str) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"{name} is no file, and reading a hub data set needs the package 'datasets': "
            "pip install datasets, or give a JSON-lines file"
        ) from error
    for number, record in enumerate(load_dataset(name, split="train", streaming=True)):
        yield f"{name} record {number}", record


def is_held_out(prompt: str, percent: float) -> bool:
    """Whether a prompt belongs to the held-out split: `percent` of all texts, by SHA-256."""
    number = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big")
    return number < percent / 100.0 * 2.0**64


def evenly(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, evenly spread: files are often sorted by task, and their first lines are one."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def encode_chat(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a user turn ready for the assistant's answer; the bare text where there is no chat template."""
    if not tokenizer.has_chat_template:
        return tokenizer.encode(prompt)
    return tokenizer.encode_chat([{"role": "user", "content": prompt}])


@dataclass(frozen=True)
class SelfText:
    """Texts one after another: prompts and what the model wrote.

    Attributes:
        ids: int32 `[total]`.
        starts: long `[N + 1]`, text i is ids[starts[i]:starts[i + 1]].
        prompt_lens: long `[N]`.
        greedy: bool `[N]`, written at temperature 0.
    """

    ids: Tensor
    starts: Tensor
    prompt_lens: Tensor
    greedy: Tensor

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], prompt_lens: Sequence[int], greedy: Sequence[bool]) -> SelfText:
        return cls.join([torch.tensor(text, dtype=torch.int32) for text in texts], prompt_lens, greedy)

    @classmethod
    def join(cls, texts: Sequence[Tensor], prompt_lens: Sequence[int], greedy: Sequence[bool]) -> SelfText:
        """As `of`, from int32 tensors."""
        lens = torch.tensor([0] + [len(text) for text in texts])
        ids = torch.cat([torch.empty(0, dtype=torch.int32), *texts])
        return cls(
            ids, lens.cumsum(0), torch.tensor(prompt_lens, dtype=torch.long), torch.tensor(greedy, dtype=torch.bool)
        )

    def __len__(self) -> int:
        return len(self.prompt_lens)

    @property
    def lens(self) -> Tensor:
        return self.starts[1:] - self.starts[:-1]

    @property
    def num_written(self) -> int:
        """Tokens the model wrote, prompts not counted."""
        return int((self.lens - self.prompt_lens).sum())

    def text(self, index: int) -> Tensor:
        return self.ids[int(self.starts[index]) : int(self.starts[index + 1])]

    def select(self, indices: Iterable[int]) -> SelfText:
        chosen = list(indices)
        return SelfText.join(
            [self.text(i) for i in chosen], self.prompt_lens[chosen].tolist(), self.greedy[chosen].tolist()
        )

    @classmethod
    def concat(cls, parts: Sequence[SelfText]) -> SelfText:
        """Several collections, such as shards, as one."""
        texts = [part.text(i) for part in parts for i in range(len(part))]
        lens = [n for part in parts for n in part.prompt_lens.tolist()]
        return cls.join(texts, lens, [g for part in parts for g in part.greedy.tolist()])

    def tensors(self) -> dict[str, Tensor]:
        """For a safetensors file; ids take two bytes where all fit."""
        is_narrow = len(self.ids) == 0 or int(self.ids.max()) < 2**16
        ids = self.ids.to(torch.uint16) if is_narrow else self.ids
        greedy = self.greedy.to(torch.uint8)
        return {"ids": ids, "starts": self.starts, "prompt_lens": self.prompt_lens, "greedy": greedy}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> SelfText:
        return cls(tensors["ids"].int(), tensors["starts"], tensors["prompt_lens"], tensors["greedy"].bool())


@dataclass(frozen=True)
class Batch:
    """Texts side by side, filled up on the right (a causal model's states do not see the filling).

    Attributes:
        ids: long `[B, T]`.
        drafted: bool `[B, T]`, positions whose next token the model wrote: where heads draft.
        next_ids: long `[B, T]`, the token after each position; 0 where there is none.
    """

    ids: Tensor
    drafted: Tensor
    next_ids: Tensor


def make_batch(text: SelfText, members: Sequence[int], device: torch.device | str) -> Batch:
    rows = [text.text(i).long() for i in members]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lens = torch.tensor([len(row) for row in rows]).unsqueeze(1)
    prompts = text.prompt_lens[list(members)].unsqueeze(1)
    at = torch.arange(ids.shape[1]).unsqueeze(0)
    drafted = (at >= prompts - 1) & (at < lens - 1)
    next_ids = torch.cat([ids[:, 1:], torch.zeros(len(rows), 1, dtype=torch.long)], 1)
    return Batch(ids.to(device), drafted.to(device), next_ids.to(device))


def plan_batches(lens: Sequence[int], batch_tokens: int, seed: int | None) -> list[list[int]]:
    """Group texts of like length so that rows * longest <= batch_tokens.

    Texts are not joined into one row: a head must see the states that decoding will show it, and those know no
    neighbour. Sorting leaves a few percent of filling.

    Args:
        seed: order of the batches and of equals; None keeps them sorted by length.
    """
    if not lens or max(lens) > batch_tokens:
        longest = max(lens, default=0)
        raise ValueError(f"the longest of {len(lens)} texts has {longest} tokens, batch_tokens is {batch_tokens}")
    order = list(range(len(lens)))
    generator = torch.Generator().manual_seed(0 if seed is None else seed)
    if seed is not None:
        order = torch.randperm(len(lens), generator=generator).tolist()
    # equal lengths mix within a band of 16, so that epochs differ in company and not in filling
    order.sort(key=lambda i: lens[i] if seed is None else lens[i] // 16)
    batches: list[list[int]] = []
    longest = 0
    for index in order:
        longest = max(longest, lens[index])
        if not batches or longest * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
            longest = lens[index]
        batches[-1].append(index)
    if seed is None:
        return batches
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def frequent_ids(text: SelfText, count: int, vocab_size: int, always: Iterable[int] = ()) -> Tensor:
    """A draft vocabulary: the `count` ids the model wrote most often, `always` among them, ascending long `[count]`.

    Ties, and what was never written, go to the lower id.
    """
    if not 1 <= count <= vocab_size:
        raise ValueError(f"draft vocabulary of {count} ids asked for, expected 1..{vocab_size}")
    at = torch.arange(len(text.ids)) - text.starts[:-1].repeat_interleave(text.lens)
    written = text.ids[at >= text.prompt_lens.repeat_interleave(text.lens)].long()
    counts = torch.bincount(written, minlength=vocab_size).double()
    counts[list(always)] = torch.inf
    return counts.argsort(descending=True, stable=True)[:count].sort().values
