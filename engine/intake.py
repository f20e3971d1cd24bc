"""What a caller gives, checked and made into requests: prompts as token ids, options as sampling parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.noise import derive_seed
from .cache import ContextTooLong
from .config import ModelConfig
from .loop import Request
from .sampling import History, SamplingParams, TargetSampler
from .statistics import StatisticsRecorder
from .stopping import StopChecker
from .tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Intake:
    """Of one model.

    Args:
        tokenizer: None takes token ids alone.
        device: where tokens are drawn.
    """

    config: ModelConfig
    tokenizer: Tokenizer | None
    device: torch.device

    def prompts(self, prompt: Prompt | Sequence[Prompt]) -> tuple[bool, list[list[int]]]:
        """Whether one prompt was given, and the prompts as checked token ids."""
        if isinstance(prompt, torch.Tensor):
            prompt = prompt.tolist()
        single = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int))
        given: Sequence[Any] = [prompt] if single else prompt
        if len(given) == 0:
            raise ValueError("no prompt was given; expected text, token ids, or a list of either")
        return single, [self._prompt_ids(one) for one in given]

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        ids = self.needed_tokenizer().encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        vocab_size, context = self.config.vocab_size, self.config.max_context
        if not ids:
            raise ValueError("the prompt is empty; a model needs at least one token to continue")
        outside = [i for i in ids if not 0 <= i < vocab_size]
        if outside:
            raise ValueError(f"prompt ids {outside[:5]} are outside the vocabulary 0..{vocab_size - 1}")
        if len(ids) > context:
            raise ContextTooLong(f"the prompt has {len(ids)} tokens, the model's context is {context}; shorten it")
        return ids

    def requests(
        self, prompts: list[list[int]], seeds: Sequence[int] | None, ignore_eos: bool, sampling: Mapping[str, Any]
    ) -> list[Request]:
        """A request a prompt; `seeds` in place of those that follow from the options' seed and the prompt's place."""
        params = self.params(ignore_eos, sampling)
        if seeds is not None and len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds were given for {len(prompts)} outputs, expected one each")
        requests = []
        for i, ids in enumerate(prompts):
            seed = derive_seed(params.seed, i) if seeds is None else seeds[i]
            own = dataclasses.replace(params, seed=seed)
            checker = StopChecker(
                self.tokenizer.detokenizer() if self.tokenizer else _NoText(),
                max_new_tokens=own.max_new_tokens,
                min_new_tokens=own.min_new_tokens,
                stop_ids=own.stop_ids,
                stop=own.stop,
                context_room=self.config.max_context - len(ids),
            )
            sampler = TargetSampler(own, self.config.vocab_size, self.device)
            requests.append(Request(i, History(ids), sampler, checker, StatisticsRecorder()))
        return requests

    def params(self, ignore_eos: bool, sampling: Mapping[str, Any]) -> SamplingParams:
        """Options as `Engine.generate` takes them; the tokenizer's stop ids are added unless `ignore_eos`.

        Raises:
            ValueError: an option that is unknown or out of range.
        """
        known = {field.name for field in dataclasses.fields(SamplingParams)}
        unknown = sorted(set(sampling) - known)
        if unknown:
            raise ValueError(f"unknown options {unknown}; sampling options are {sorted(known)}")
        options = dict(sampling)
        if isinstance(options.get("stop"), str):
            options["stop"] = (options["stop"],)
        if "bad_words" in options:
            if isinstance(options["bad_words"], str):
                raise ValueError(f"bad_words is {options['bad_words']!r}, expected a list of strings or of id lists")
            options["bad_words"] = [ids for word in options["bad_words"] for ids in self._spellings(word)]
        own = () if ignore_eos or self.tokenizer is None else self.tokenizer.stop_ids
        options["stop_ids"] = tuple(dict.fromkeys((*own, *options.get("stop_ids", ()))))
        return SamplingParams(**options)

    def _spellings(self, word: str | Sequence[int]) -> list[list[int]]:
        """A bad word's token ids; a string is banned at the start of a text and after a space."""
        if not isinstance(word, str):
            return [list(word)]
        tokenizer = self.needed_tokenizer()
        return [tokenizer.encode(text, add_special_tokens=False) for text in (word, " " + word)]

    def needed_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            ValueError: there is none.
        """
        if self.tokenizer is None:
            raise ValueError("this engine has no tokenizer: give token ids, not text")
        return self.tokenizer


class _NoText:
    """Stands in for a detokenizer where there is no tokenizer: tokens have no text."""

    def feed(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""
