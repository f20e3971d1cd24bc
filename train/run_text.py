"""The text of a run: written by the model, a round at a time, and kept on the disk only as long as it is used.

Held-out text is written once. Text to train on belongs to a round; the next round's replaces it, so that whatever the
number of rounds, no more than one round lies on the disk. All of it follows from the settings: text that is lost
is written again, the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from .config import TrainConfig
from .data import SelfText, is_held_out
from .distributed import Ranks
from .generate import Sampling, write_text
from .progress import bar
from .sources import Prompt, corpus_text, is_corpus, load_corpus, load_prompts, mix_temperatures, write_prompts

if TYPE_CHECKING:
    from .run import Base

OWN_PROMPTS = 4_000  # of a round, where none are given
CORPUS_OPENING = 32  # tokens of a held-out document that the model goes on with


class RunText:
    """Reads or writes prompts when text must be written, and not when it lies there already."""

    def __init__(self, config: TrainConfig, base: Base, ranks: Ranks, out: Path) -> None:
        self.config, self.decoder, self.tokenizer = config, base.decoder, base.tokenizer
        self.ranks, self.out = ranks, out
        self._kept: tuple[int, tuple[list[Prompt], list[Prompt]]] | None = None
        self._is_corpus = config.prompts is not None and is_corpus(config.prompts)

    def held_out(self) -> SelfText:
        """What the model wrote after prompts that training never sees."""
        if self.config.text_from is not None:
            return self._of_other_run("held_out.safetensors")
        path = self.out / "held_out.safetensors"
        if not self._lies_at(path, 0):
            prompts = self._prompts(0)[1]
            if self._is_corpus and self.config.shard_base:
                text = corpus_text(prompts)
            else:
                if self._is_corpus:
                    prompts = [Prompt(p.text, p.ids[: min(CORPUS_OPENING, len(p.ids) - 1)]) for p in prompts]
                pairs = mix_temperatures(len(prompts), temperatures=(self.config.temperature,))
                text = self._write("held-out text", prompts, pairs, 0)
            self._store(path, text, 0)
        return self._read(path)

    def of_round(self, index: int) -> SelfText:
        """The text to train on in a round, from 0."""
        if self.config.text_from is not None:
            return self._of_other_run("text.safetensors")
        path = self.out / "text.safetensors"
        if self._lies_at(path, index):
            return self._read(path)
        config, chosen = self.config, self._prompts(index)[0]
        if config.prompts is not None:
            count = min(len(chosen), config.prompts_per_round or len(chosen))
            chosen = [chosen[(index * count + i) % len(chosen)] for i in range(count)]
        if self._is_corpus:
            text = corpus_text(chosen)
        else:
            name = "text" if config.rounds == 1 else f"text, round {index + 1}"
            pairs = mix_temperatures(len(chosen), config.copies, config.greedy_fraction, (config.temperature,))
            text = self._write(name, chosen, pairs, index + 1, config.text_minutes)
        self._store(path, text, index)
        return self._read(path)

    def _prompts(self, index: int) -> tuple[list[Prompt], list[Prompt]]:
        """Training and held-out prompts: a file's, the same in every round, or the model's own."""
        config = self.config
        number = index if config.prompts is None else 0
        if self._kept is not None and self._kept[0] == number:
            return self._kept[1]
        longest = min(config.max_prompt_tokens, self.decoder.config.max_context - config.max_new_tokens)
        if config.prompts is None:
            found = self._own_prompts(index)
        elif self._is_corpus:
            longest = min(config.max_prompt_tokens + config.max_new_tokens, self.decoder.config.max_context)
            found = load_corpus(config.prompts, self.tokenizer, longest)[: config.max_prompts]
        else:
            found = load_prompts(config.prompts, self.tokenizer, config.max_prompts)
        splits: tuple[list[Prompt], list[Prompt]] = [], []
        for prompt in found:
            if 0 < len(prompt.ids) <= longest:
                splits[is_held_out(prompt.text, config.held_out_percent)].append(prompt)
        for name, split in zip(("train", "held-out"), splits, strict=True):
            # later rounds need no held-out prompts: theirs are dropped
            if not split and (name == "train" or number == 0):
                raise ValueError(
                    f"no prompts for the {name} split among {len(found)} (of at most {longest} tokens): "
                    "give more prompts, or change held_out_percent or max_prompt_tokens"
                )
        self._kept = number, splits
        return splits

    def _own_prompts(self, index: int) -> list[Prompt]:
        """Prompts that the model writes; each process writes a part, from a seed of its own."""
        config, ranks = self.config, self.ranks
        self._refuse_if_sharded()
        count = len(ranks.share(range(config.prompts_per_round or OWN_PROMPTS)))
        seed = self._seed(index + 1) * ranks.size + ranks.rank
        with bar(config.progress, "writing prompts", count * 32) as shown:
            own = write_prompts(
                self.decoder, self.tokenizer, count, config.max_prompt_tokens, seed=seed,
                cache_tokens=config.cache_tokens, on_tokens=shown.advance,
            )  # fmt: skip
        return list({prompt.text: prompt for prompt in ranks.unite(own)}.values())

    def _write(
        self,
        name: str,
        prompts: Sequence[Prompt],
        pairs: Sequence[tuple[int, float]],
        number: int,
        minutes: float | None = None,
    ) -> SelfText:
        """Prompts continued, (prompt, temperature) each; each process writes its share, in the time it is given."""
        self._refuse_if_sharded()
        ends = None if minutes is None else time.monotonic() + 60.0 * minutes
        keep_going = None if ends is None else lambda: time.monotonic() < ends
        config, stops = self.config, tuple(self.tokenizer.stop_ids)
        sampling = Sampling(config.max_new_tokens, stops, config.cache_tokens, self._seed(number))
        own, numbers = self.ranks.share(pairs), self.ranks.share(range(len(pairs)))
        starts, temperatures = [prompts[p].ids for p, _ in own], [t for _, t in own]
        with bar(config.progress, f"writing {name}", len(own) * config.max_new_tokens) as shown:
            if self.ranks.size == 1:
                return write_text(self.decoder, starts, temperatures, sampling, shown.advance, keep_going)
            rows = []
            if own:
                text = write_text(self.decoder, starts, temperatures, sampling, shown.advance, keep_going, numbers)
                lens, greedy = text.prompt_lens.tolist(), text.greedy.tolist()
                rows = [(text.text(i).tolist(), lens[i], greedy[i]) for i in range(len(text))]
        return SelfText.of(*zip(*self.ranks.unite(rows), strict=True))

    def _refuse_if_sharded(self) -> None:
        if self.config.shard_base:
            raise ValueError(
                "a base spread over processes cannot write text: give plain text (--prompts FILE.txt), or start the "
                "same command without --shard-base where the base fits, until it has written its text"
            )

    def _seed(self, number: int) -> int:
        """Of held-out text (0) and of each round's (from 1)."""
        return self.config.recipe.seed * (self.config.rounds + 1) + number

    def _store(self, path: Path, text: SelfText, index: int) -> None:
        if self.ranks.rank == 0:
            work = path.with_suffix(".tmp")
            tensors = {name: t.contiguous() for name, t in text.tensors().items()}
            save_file({**tensors, "round": torch.tensor(index)}, work)
            os.replace(work, path)
        self.ranks.wait()

    def _lies_at(self, path: Path, index: int) -> bool:
        """Whether this round's text is there; asked together, before anybody writes it."""
        here = path.exists() and int(load_file(path)["round"]) == index
        return self.ranks.total(int(here)) == self.ranks.size

    def _of_other_run(self, name: str) -> SelfText:
        path = Path(str(self.config.text_from)) / name
        if not path.is_file():
            raise ValueError(f"text_from is {self.config.text_from!r}, which holds no {name}: expected a run's folder")
        return self._read(path)

    def _read(self, path: Path) -> SelfText:
        return SelfText.from_tensors(load_file(path))
