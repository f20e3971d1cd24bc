"""What lossy arms (early exit, targets that skip weights) cost: their text as the full model judges it.

The full model reads each text again, 16 tokens a pass, with the rows of decoding, so after the same prefix it says
exactly what plain decoding would say there (design rules 2 and 3). Where rounds run on the device a text is read like a
prompt by the same kernels, up to the LM head, whose product may differ by rounding.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.cache import KVCache, plan_cache
from ..engine.engine import Engine
from ..engine.forward import Working, advance, node_logits, prefill
from ..engine.prompt_reader import PromptReader
from ..engine.sampling import Context, History, SamplingParams, TargetSampler
from ..engine.statistics import Statistics
from ..engine.tokenizer import Tokenizer
from ..engine.tree import MAX_NODES, DraftTree
from ..engine.workspace import reach_of
from .arms import PLAIN_ARM, Arm, EngineArm
from .measure import Measurements, Record, prompt_ids, question_seeds
from .questions import Question, choose

MOST_QUESTIONS = 48  # that are judged, evenly over the tasks: it takes about as long as plain decoding


@dataclass(frozen=True)
class Judgement:
    """Of each token of a text: whether the full model would have written it after the same prefix, and its negative
    log-likelihood in nats under the full model."""

    agrees: list[bool]
    nats: list[float]

    @property
    def mean_nats(self) -> float:
        return sum(self.nats) / len(self.nats) if self.nats else 0.0


class FullModel:
    """Reads texts of up to `context` tokens again, one at a time."""

    def __init__(self, engine: Engine, context: int) -> None:
        self._engine, decoder = engine, engine.decoder
        self._cache = KVCache(plan_cache(decoder.config, 1, context, decoder.device, decoder.dtype), decoder.device)
        self._reader = None if engine.fused is None else PromptReader(engine.fused, self._cache, reach_of)

    def logits(self, prompt: Sequence[int], tokens: Sequence[int]) -> Iterator[Tensor]:
        """Its logits in front of each of these tokens, in order, some at a time: `[n, V]`."""
        decoder, tiles, cache = self._engine.decoder, self._engine.tiles, self._cache
        ids, first, last = [*prompt, *tokens][:-1], len(prompt) - 1, decoder.config.num_layers
        cache.restart(0)
        if self._reader is not None:
            states: list[Tensor] = []
            self._reader.read(0, ids, [last], lambda taken: states.append(taken[last].clone()))
            for rows in torch.cat(states)[first:].split(MAX_NODES) if tokens else ():
                yield node_logits(decoder, rows, tiles)
            return
        prefill(decoder, cache, 0, ids[:first], flash=self._engine.flash)
        while first < len(ids):
            tree = DraftTree(ids[first])
            for token in ids[first + 1 : first + MAX_NODES]:
                tree.add(len(tree) - 1, token)
            work = Working(0, first, tree, torch.zeros(MAX_NODES, decoder.config.hidden_size, device=decoder.device))
            work.embed_new(decoder)
            cache.clear_open(0)
            advance(decoder, cache, [(work, range(len(tree)))], decoder.config.num_layers, tiles)
            yield node_logits(decoder, work.hidden[: len(tree)], tiles)
            cache.commit(0, list(range(len(tree))))
            first += len(tree)


def judge(
    engine: Engine,
    prompt: Sequence[int],
    tokens: Sequence[int],
    sampling: Mapping[str, Any],
    model: FullModel | None = None,
) -> Judgement:
    """What the full model says of a text.

    Args:
        model: with room for the text; None makes one.
        sampling: fields of `SamplingParams`; above temperature 0 the full model's token is the one that it draws with
            the same seed at that position.
    """
    sampler = TargetSampler(SamplingParams(**sampling), engine.decoder.config.vocab_size, engine.decoder.device)
    model = FullModel(engine, len(prompt) + len(tokens)) if model is None else model
    agrees: list[bool] = []
    nats: list[float] = []
    history = History(prompt)
    with torch.inference_mode():
        for logits in model.logits(prompt, tokens):
            own = tokens[len(nats) : len(nats) + len(logits)]
            said = logits.float().log_softmax(-1)[range(len(own)), own]
            for token, row in zip(own, logits, strict=True):
                agrees.append(sampler.target(row, Context(history)) == token)
                history.extend([token])
            nats += (-said).tolist()
    return Judgement(agrees, nats)


def judged(
    engine: Engine,
    found: Measurements,
    arms: Sequence[Arm],
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    sampling: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Lossy arm of our engine -> what it saved and what it cost, over the first repeat of at most `MOST_QUESTIONS`."""
    seeds = question_seeds(questions, sampling)
    texts: dict[str, dict[tuple[int | str, int], tuple[list[int], Record]]] = {}
    read = {q.question_id for q in choose(questions, limit=MOST_QUESTIONS)}
    records = [r for r in found.records if r.repeat == 0 and r.question.question_id in read]
    for arm in arms:
        if arm.name == PLAIN_ARM or (isinstance(arm, EngineArm) and not arm.lossless):
            own = [r for r in records if r.arm == arm.name]
            texts[arm.name] = _conversations(sorted(own, key=lambda r: r.turn), tokenizer)
    if len(texts) < 2:
        return {}
    longest = max(len(ids) + len(r.outcome.token_ids) for own in texts.values() for ids, r in own.values())
    model = FullModel(engine, longest)
    opinions = {
        name: {
            key: judge(engine, prompt, record.outcome.token_ids, {**sampling, "seed": seeds[key[0]]}, model)
            for key, (prompt, record) in own.items()
        }
        for name, own in texts.items()
    }
    num_layers = engine.decoder.config.num_layers

    def plains(name: str, of: Mapping[str, Mapping[Any, Any]]) -> dict[Any, Any]:
        """Plain decoding's of the same questions: a slow arm may have answered fewer."""
        return {key: own for key, own in of[PLAIN_ARM].items() if key in of[name]}

    return {
        name: _summary(texts[name], plains(name, texts), opinions[name], plains(name, opinions), num_layers)
        for name in opinions
        if name != PLAIN_ARM and texts[name]
    }


def _conversations(
    records: Sequence[Record], tokenizer: Tokenizer
) -> dict[tuple[int | str, int], tuple[list[int], Record]]:
    """(question, turn) -> the prompt that the arm saw, and its answer; records by rising turn."""
    found: dict[tuple[int | str, int], tuple[list[int], Record]] = {}
    answers: dict[int | str, list[str]] = {}
    for record in records:
        before = answers.setdefault(record.question.question_id, [])
        ids = prompt_ids(tokenizer, record.question.turns[: record.turn + 1], before)
        found[record.question.question_id, record.turn] = ids, record
        before.append(record.outcome.text)
    return found


def _summary(
    own: Mapping[Any, tuple[list[int], Record]],
    plain: Mapping[Any, tuple[list[int], Record]],
    opinions: Mapping[Any, Judgement],
    plain_opinions: Mapping[Any, Judgement],
    num_layers: int,
) -> dict[str, Any]:
    total = Statistics.merge([r.outcome.stats for _, r in own.values() if r.outcome.stats is not None])
    tokens, by_exits = total.num_committed, sum(total.tokens_by_exit.values())
    disagreements = sum(not agrees for judgement in opinions.values() for agrees in judgement.agrees)
    # Only answers to the same prompt can be compared token by token: later turns follow the arm's own first answer.
    alike = [key for key in own if own[key][0] == plain[key][0]]
    firsts = [first_difference(own[key][1].outcome.token_ids, plain[key][1].outcome.token_ids) for key in alike]
    left = [first for first in firsts if first is not None]
    nats, plain_nats = _mean_nats(opinions), _mean_nats(plain_opinions)
    return {
        "num_tokens": tokens,
        "share_by_exits": by_exits / tokens if tokens else None,
        "tokens_by_exit": {str(layer): count for layer, count in total.tokens_by_exit.items()},
        "mean_depth": total.mean_depth(num_layers),
        "depth_saved": 1 - total.mean_depth(num_layers) / num_layers,
        "layers_per_token": total.layers_per_token,
        "agreement": 1 - disagreements / tokens if tokens else None,
        "agreement_of_exits": 1 - disagreements / by_exits if by_exits else None,
        "num_compared": len(alike),
        "num_equal": len(alike) - len(left),
        "median_first_difference": statistics.median(left) if left else None,
        "nats_per_token": nats,
        "plain_nats_per_token": plain_nats,
        "perplexity": math.exp(nats),
        "plain_perplexity": math.exp(plain_nats),
    }


def _mean_nats(opinions: Mapping[Any, Judgement]) -> float:
    every = [nats for judgement in opinions.values() for nats in judgement.nats]
    return statistics.fmean(every) if every else 0.0


def first_difference(own: Sequence[int], plain: Sequence[int]) -> int | None:
    """Index of the first new token that differs, or where the shorter text ends; None for equal texts."""
    if list(own) == list(plain):
        return None
    pairs = zip(own, plain, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(own), len(plain)))
