"""Calibration: every head measured where decoding asks it, and the gates that follow.

The engine itself decodes held-out prompts greedily and drafts as it goes. Verification computes the full model's word
on every node of every draft tree, given that node's own prefix, right or wrong; all heads are asked at all of these
nodes too. So every position of the text is measured once, and beside it the wrong prefixes that drafting makes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.draft import entropy
from ..engine.engine import Engine
from ..engine.forward import Working
from ..engine.gate import DraftPolicy, Gate, every
from ..engine.loop import Machinery
from ..engine.model import Decoder
from ..engine.tree import DraftTree
from ..heads import Calibration, HeadSet, fit_calibration
from ..heads.calibration import LEVELS
from .measure import head_logits, output_places, rank_of
from .progress import bar
from .rehearse import NUM_PROMPTS as REHEARSED
from .rehearse import rehearse

NUM_PROMPTS, NEW_TOKENS = 128, 64
DRAFT_LEVEL = 0.75  # drafts while measuring: low enough that wrong prefixes are plenty, as they are at any useful level
START_GATE = Gate(1.0, 1.0)  # nats, until the first prompts are measured


class Recorder:
    """An observer of an engine's rounds (`Engine.observer`) that keeps what heads and model say at every node.

    Nodes below a drafted stop id are left out: nothing is ever decoded there.
    """

    def __init__(self, heads: HeadSet, vocab_size: int, stop_ids: Sequence[int], device: torch.device) -> None:
        self.heads, self.stop_ids = heads, frozenset(stop_ids)
        self.source = ""
        self._place = output_places(heads.draft_ids, vocab_size, device)
        self._prefix: list[np.ndarray] = []  # [n, 2]: depth, whole prefix right
        self._said: dict[int, list[np.ndarray]] = {layer: [] for layer in heads.exits}  # [n, 4]

    def __call__(self, on: Machinery, works: Sequence[Working], logits: Sequence[Tensor]) -> None:
        best = torch.cat([own.argmax(-1) for own in logits])
        kept, at = [], 0
        for work, targets in zip(works, best.split([len(w.tree) for w in works]), strict=True):
            found = _prefixes(work.tree, targets.tolist(), self.stop_ids)
            kept += [at + node for node in found]
            at += len(work.tree)
            self._prefix.append(np.array([(work.tree.depths[node], right) for node, right in found.items()]))
        rows = torch.tensor(kept, device=best.device)
        for layer, spoken in head_logits(on, works).items():
            own = spoken[rows].float()
            top = own.softmax(-1).topk(min(2, own.shape[-1])).values
            rank = rank_of(own, self._place[best[rows]])
            said = torch.stack([entropy(own), top[:, 0], top[:, 0] - top[:, -1], rank.float()], 1)
            self._said[layer].append(said.cpu().numpy())

    @property
    def num_nodes(self) -> int:
        return sum(map(len, self._prefix))

    def fit(self, levels: Sequence[float] = LEVELS, true_prefixes_only: bool = False) -> Calibration:
        """The calibration of everything recorded, or of the nodes whose whole prefix was right."""
        prefix = np.concatenate(self._prefix)
        chosen = prefix[:, 1] == 1 if true_prefixes_only else np.ones(len(prefix), dtype=bool)
        said = {layer: np.concatenate(parts)[chosen] for layer, parts in self._said.items()}
        entropies, max_prob, margin, rank = (
            {layer: values[:, column] for layer, values in said.items()} for column in range(4)
        )
        return fit_calibration(
            entropies,
            {layer: values.astype(np.int64) for layer, values in rank.items()},
            self.source,
            levels,
            max_prob=max_prob,
            margin=margin,
            depth=prefix[chosen, 0],
            true_prefix=prefix[chosen, 1] == 1,
        )


def _prefixes(tree: DraftTree, targets: Sequence[int], stop_ids: frozenset[int]) -> dict[int, bool]:
    """The nodes that count -> whether their whole prefix is what the full model writes."""
    found = {0: True}
    for node in range(1, len(tree)):
        parent = tree.parents[node]
        if parent in found and tree.tokens[node] not in stop_ids:
            found[node] = found[parent] and tree.tokens[node] == targets[parent]
    return found


def record(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = NEW_TOKENS,
    stop_ids: Sequence[int] = (),
    accuracy: float = DRAFT_LEVEL,
    batch: int | None = None,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Recorder:
    """Decode held-out prompts with drafting on, and keep what was said at every node.

    Drafting starts with one gate for all exits; after every batch the gates are those that all nodes so far
    give for `accuracy`. A stored calibration of the heads is not used.

    Args:
        engine: with heads; busy until this returns.
        prompts: token ids; prompts that training never saw.
        max_new_tokens: written after each prompt.
        stop_ids: end a text, beside those of the engine's own tokenizer.
        accuracy: level of the gates while drafting.
        batch: prompts decoded side by side; None takes what suits the engine.
        on_tokens: told how many tokens each batch wrote.

    Raises:
        ValueError: no prompts or no heads, or a level that is not calibrated.
    """
    if not prompts or engine.heads is None:
        raise ValueError(
            f"{len(prompts)} greedy held-out prompts and heads {engine.heads}: both are needed to calibrate; give more "
            "prompts or a larger held-out share"
        )
    stops = [*stop_ids, *(engine.tokenizer.stop_ids if engine.tokenizer else ())]
    if batch is None:
        batch = 8 if engine.deterministic else 64
    found = Recorder(engine.heads, engine.decoder.config.vocab_size, stops, engine.decoder.device)
    policy = every(engine.heads.exits, START_GATE)
    before, engine.observer = engine.observer, found
    try:
        for first in range(0, len(prompts), batch):
            chosen = [list(prompt) for prompt in prompts[first : first + batch]]
            written = engine.generate(
                chosen, speculation="always", policy=policy, max_new_tokens=max_new_tokens, stop_ids=tuple(stop_ids)
            )
            policy = _policy(found.fit(levels=(accuracy,)), accuracy)
            on_tokens(sum(len(one.token_ids) for one in written))
    finally:
        engine.observer = before
    found.source = (
        f"{found.num_nodes:,} places where decoding {len(prompts):,} held-out prompts greedily asked for a draft, "
        f"prefixes drafted at accuracy {accuracy:.2f}; agreement is with the full model's argmax after the same prefix"
    )
    return found


def _policy(calibration: Calibration, accuracy: float) -> DraftPolicy:
    """All exits, also those whose gate is closed: a head with memory keeps it up only where it is asked."""
    gates = {layer: Gate(low, low) for layer in calibration.exits for low, _ in [calibration.gate(layer, accuracy)]}
    return DraftPolicy(tuple(sorted(gates)), gates)


def measuring_engine(decoder: Decoder, heads: HeadSet) -> Engine:
    """On a GPU without fixed tiles: many sequences in one pass, whose bits then depend on the batch."""
    return Engine(decoder, None, heads, deterministic=decoder.device.type == "cpu")


def calibrate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = NEW_TOKENS,
    stop_ids: Sequence[int] = (),
    accuracy: float = DRAFT_LEVEL,
    batch: int | None = None,
    progress: bool = False,
) -> tuple[Recorder, Calibration]:
    """Measure heads on held-out prompts and rehearse them on some of these; the options are those of `record`.

    Args:
        progress: show bars on stderr.

    Returns:
        What was recorded, and the calibration of all of it, with the rehearsal.
    """
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop_ids": stop_ids, "batch": batch}
    with bar(progress, "measuring", len(prompts) * max_new_tokens) as shown:
        found = record(engine, prompts, accuracy=accuracy, on_tokens=shown.advance, **options)
    with bar(progress, "rehearsing", min(REHEARSED, len(prompts)) * max_new_tokens) as shown:
        rehearsed = rehearse(engine, prompts, on_tokens=shown.advance, **options)
    return found, replace(found.fit(), rehearsal=rehearsed.rehearsal())
