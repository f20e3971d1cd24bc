"""Fixed exits and lengths counted from one plain run: a sweep of dozens of arms for the price of one.

In greedy decoding a chain from a fixed exit is accepted as far as it repeats plain decoding's own tokens, and up to
there the head sees the very states that plain decoding has at its exit (design rules 2 and 3). So what each head says
at every token of the plain run decides every round of every length; the counts are those of a real run, but for
entropies, which nobody knows behind a wrong draft. Nothing is timed. Heads with memory draft from states of their own
and are not replayed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..engine.engine import Engine
from ..engine.forward import Working, advance
from ..engine.gate import fixed_exit
from ..engine.generation import Generation
from ..engine.loop import Machinery
from ..engine.statistics import Statistics
from ..heads import StatefulHead
from ..heads.head_set import HeadSet
from .arms import PLAIN_ARM, Arm, EngineArm, Outcome


class PlainRun:
    """Plain decoding with several head sets asked at every token; the last prompt's answer is kept for the next arm."""

    def __init__(self, engine: Engine, sets: Sequence[HeadSet]) -> None:
        self.engine, self.sets = engine, list(sets)
        self._key: object = None
        self._out: Generation | None = None
        self._guesses: dict[tuple[int, int], list[int]] = {}

    def answer(self, prompt_ids: list[int], sampling: Mapping[str, Any]) -> Generation:
        """The plain answer to a prompt."""
        key = tuple(prompt_ids), tuple(sorted(sampling.items()))
        if self._out is None or key != self._key:
            self._guesses = {(i, layer): [] for i, heads in enumerate(self.sets) for layer in heads.exits}
            before, self.engine.observer = self.engine.observer, self._observe
            try:
                self._out = self.engine.generate(prompt_ids, speculation=False, **sampling)
            finally:
                self.engine.observer = before
            self._key = key
        return self._out

    def guesses(self, heads: HeadSet, exit_layer: int) -> list[int]:
        """Of each new token of the last answer, what the head at this exit would have drafted."""
        return self._guesses[next(i for i, own in enumerate(self.sets) if own is heads), exit_layer]

    def _observe(self, on: Machinery, works: Sequence[Working], logits: Sequence[Tensor]) -> None:
        (work,) = works
        again = Working(work.sequence, work.base, work.tree, torch.zeros_like(work.hidden))
        again.embed_new(on.decoder)
        for layer in sorted({layer for _, layer in self._guesses}):
            advance(on.decoder, on.cache, [(again, [0])], layer, on.tiles)
            for i, heads in enumerate(self.sets):
                if layer in heads.exits:
                    output = heads.logits(layer, again.hidden[:1]).float().argmax(-1)
                    self._guesses[i, layer] += heads.token_ids(output).tolist()


class ReplayArm:
    """A fixed exit and length, counted from a plain run."""

    lossless, plain = True, PLAIN_ARM

    def __init__(self, name: str, run: PlainRun, heads: HeadSet, exit_layer: int, length: int) -> None:
        self.name, self.source, self.heads = name, run, heads
        self.exit_layer, self.length = exit_layer, length

    def run(self, prompt_ids: list[int], sampling: Mapping[str, Any]) -> Outcome:
        out = self.source.answer(prompt_ids, sampling)
        guesses = self.source.guesses(self.heads, self.exit_layer)
        room = self.source.engine.decoder.config.max_context - len(prompt_ids)
        budget = min(int(sampling["max_new_tokens"]), room)
        stats = replay(out.token_ids, guesses, self.exit_layer, self.length, budget)
        row_layers = self.source.engine.decoder.config.num_layers * (stats.num_verifications + stats.num_drafted)
        stats = replace(stats, num_row_layers=row_layers)
        return Outcome(out.text, out.token_ids, 0.0, 0.0, 0, stats, out.error)

    def describe(self) -> dict[str, Any]:
        return EngineArm(
            self.name, self.source.engine, "always", fixed_exit(self.exit_layer, self.length)
        ).describe() | {"replayed": True}


def replay(tokens: Sequence[int], guesses: Sequence[int], exit_layer: int, length: int, budget: int) -> Statistics:
    """Count the rounds of a fixed exit and length.

    Args:
        tokens: the answer, N tokens.
        guesses: what the head drafts in front of each of them, N.
        budget: most new tokens; the last round of an answer that reaches it drafts less.
    """
    accepted, reached = [0] * length, [0] * length
    drafts, rights = Counter[int](), Counter[int]()
    at = rounds = 0
    while at < len(tokens):
        drafted = min(length, budget - at - 1)
        right = 0
        while right < drafted and at + right < len(tokens) and guesses[at + right] == tokens[at + right]:
            accepted[right] += 1
            right += 1
        for place in range(drafted):
            reached[place] += 1
        drafts[drafted] += 1
        rights[right] += 1
        at += right + 1
        rounds += 1
    deepest = max((place + 1 for place in range(length) if reached[place]), default=0)
    total = sum(accepted)
    return Statistics(
        num_drafted=sum(reached),
        num_accepted=total,
        num_committed=len(tokens),
        num_verifications=rounds,
        accepted_by_position=tuple(accepted[:deepest]),
        drafted_by_position=tuple(reached[:deepest]),
        tokens_by_exit={exit_layer: total} if total else {},
        rounds_by_drafted=dict(sorted(drafts.items())),
        rounds_by_accepted=dict(sorted(rights.items())),
        rounds_by_stops={0: rounds} if rounds else {},
    )


def replayed(arms: Sequence[Arm], engine: Engine) -> list[Arm]:
    """The same arms, those with a fixed exit and stateless heads counted from one plain run."""

    def heads_of(arm: Arm) -> HeadSet | None:
        if not isinstance(arm, EngineArm) or not arm.name.startswith(("fixed:", "bare:")) or set("+%") & set(arm.name):
            return None
        heads = arm.engine.heads
        assert heads is not None
        return None if any(isinstance(head, StatefulHead) for head in heads.heads.values()) else heads

    sets = list({id(heads): heads for arm in arms if (heads := heads_of(arm)) is not None}.values())
    run = PlainRun(engine, sets)
    found: list[Arm] = []
    for arm in arms:
        heads = heads_of(arm)
        if heads is None:
            found.append(arm)
        else:
            _, exit_layer, length = arm.name.partition("@")[0].split(":")
            found.append(ReplayArm(arm.name, run, heads, int(exit_layer), int(length)))
    return found
