"""The text of a run: written by the model, a round at a time, and kept on the disk only as long as it is used.

Held-out text is written once. Text to train on belongs to a round; the next round's replaces it, so that whatever the
number of rounds, no more than one round lies on the disk. All of it follows from the settings: text that is lost
is written again, the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from .config import TrainConfig
from .data import SelfText, encode_chat, is_held_out, read_prompts
from .distributed import Ranks
from .generate import Sampling, write_text
from .progress import bar

if TYPE_CHECKING:
    from .run import Base

Ids = list[int]


class RunText:
    """Reads prompts when text must be written, and not when it lies there already."""

    def __init__(self, config: TrainConfig, base: Base, ranks: Ranks, out: Path) -> None:
        self.config, self.decoder, self.tokenizer, self.ranks, self.out = (
            config, base.decoder, base.tokenizer, ranks, out,
        )  # fmt: skip
        self._splits: tuple[list[Ids], list[Ids]] | None = None

    def held_out(self) -> SelfText:
        """What the model wrote after prompts that training never sees."""
        path = self.out / "held_out.safetensors"
        if not path.exists():
            self._store(path, self._write("held-out text", self._prompts()[1], 0), 0)
        return self._read(path)[0]

    def of_round(self, index: int) -> SelfText:
        """What the model wrote to train on in a round, from 0."""
        path = self.out / "text.safetensors"
        if path.exists():
            text, found = self._read(path)
            if found == index:
                return text
        chosen = self._prompts()[0]
        count = min(len(chosen), self.config.prompts_per_round or len(chosen))
        chosen = [chosen[(index * count + i) % len(chosen)] for i in range(count)]
        name = "text" if self.config.rounds == 1 else f"text, round {index + 1}"
        self._store(path, self._write(name, chosen, index + 1), index)
        return self._read(path)[0]

    def _prompts(self) -> tuple[list[Ids], list[Ids]]:
        """Token ids of the training and the held-out prompts."""
        if self._splits is None:
            config = self.config
            if config.prompts is None:
                raise ValueError("no prompts: give a file with --prompts")
            prompts = read_prompts(config.prompts)[: config.max_prompts]
            longest = min(config.max_prompt_tokens, self.decoder.config.max_context - config.max_new_tokens)
            splits: tuple[list[Ids], list[Ids]] = [], []
            for prompt in prompts:
                ids = encode_chat(self.tokenizer, prompt)
                if 0 < len(ids) <= longest:
                    splits[is_held_out(prompt, config.held_out_percent)].append(ids)
            for name, split in zip(("train", "held-out"), splits, strict=True):
                if not split:
                    raise ValueError(
                        f"no prompts for the {name} split among {len(prompts)} (of at most {longest} tokens): "
                        "give more prompts, or change held_out_percent or max_prompt_tokens"
                    )
            self._splits = splits
        return self._splits

    def _write(self, name: str, prompts: Sequence[Ids], number: int) -> SelfText:
        """Every prompt continued greedily and once at the run's temperature; each process writes its share."""
        config = self.config
        sampling = Sampling(
            config.max_new_tokens,
            tuple(self.tokenizer.stop_ids),
            config.cache_tokens,
            config.recipe.seed * (config.rounds + 1) + number,
        )
        pairs = [(ids, temperature) for temperature in (0.0, config.temperature) for ids in prompts]
        own, numbers = self.ranks.share(pairs), self.ranks.share(range(len(pairs)))
        with bar(config.progress, f"writing {name}", len(own) * config.max_new_tokens) as shown:
            text = write_text(
                self.decoder, [p for p, _ in own], [t for _, t in own], sampling, shown.advance, numbers=numbers
            )
        rows = [(text.text(i).tolist(), int(text.prompt_lens[i]), bool(text.greedy[i])) for i in range(len(text))]
        texts, lens, greedy = zip(*self.ranks.unite(rows), strict=True)
        return SelfText.of(texts, lens, greedy)

    def _store(self, path: Path, text: SelfText, index: int) -> None:
        if self.ranks.rank == 0:
            work = path.with_suffix(".tmp")
            tensors = {name: t.contiguous() for name, t in text.tensors().items()}
            save_file({**tensors, "round": torch.tensor(index)}, work)
            os.replace(work, path)
        self.ranks.wait()

    def _read(self, path: Path) -> tuple[SelfText, int]:
        tensors = load_file(path)
        return SelfText.from_tensors(tensors), int(tensors["round"])
