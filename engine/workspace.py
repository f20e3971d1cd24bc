"""What decoding runs in, kept from one request to the next: the KV cache, the heads' memories, captured rounds, and
what reads prompts by fused kernels.

A request takes what is large enough. What is made anew takes with it what lay on it, for captured rounds read and write
where their cache and memory lay.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..heads.head_set import HeadSet
from ..heads.stateful import RecurrentHead, StatefulHead
from ..kernels.grow_level import Levels
from ..kernels.grow_tree import Shape
from .cache import CachePlan, KVCache, free_memory, plan_cache
from .device_draft import RecurrentDraft
from .device_loop import kinds_of, shape_of, text_of
from .fused import FusedWeights
from .gate import DraftPolicy, Lookup
from .graphs import Rounds
from .head_memory import HeadMemory, MemoryPlan
from .loop import is_out_of_memory
from .model import Decoder
from .prompt_reader import PromptReader
from .sparsity.teal_step import ChannelWeights, TealStep
from .tree import MAX_NODES
from .trunk_draft import TrunkDraft

CONTEXT_STEP = 512  # caches grow in such steps, and rounds reach 512, 1024, 2048, ... positions
ROOM_SHARE = 1 / 16  # of a GPU's free memory that a cache may take beyond its first request's need
MOST_ROUNDS = 16  # shapes of captured rounds that are kept, by default


class Workspace:
    """Of one decoder.

    Attributes:
        cache: the last one; None before the first request.
        reader: of prompts, into `cache`.
        memories: the heads', by exit layer.
        rounds: captured ones, the last used last.
        most_rounds: that are kept.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.most_rounds = MOST_ROUNDS
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.cache: KVCache | None = None
        self.reader: PromptReader | None = None
        self.memories: dict[int, HeadMemory] = {}
        self.rounds: dict[Any, Rounds] = {}

    def cache_for(self, batch: int, context: int) -> KVCache:
        """A cache with room for so many sequences of so many tokens; the last one again where it is large enough.

        Raises:
            MemoryError: it does not fit.
        """
        cache = self.cache
        if cache is None or cache.plan.batch < batch or cache.plan.context < context:
            self.cache = self.reader = cache = None  # their memory is free again before the next one is planned
            self.rounds = {}
            plan = self._plan_cache(batch, context)
            try:
                self.cache = cache = KVCache(plan, self._decoder.device)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise MemoryError(f"out of memory for a cache: {plan.arithmetic()}") from error
        for sequence in range(cache.plan.batch):
            cache.restart(sequence)
        return cache

    def _plan_cache(self, batch: int, context: int) -> CachePlan:
        """On a GPU with room to spare: making a cache anew throws captured rounds away."""
        config, device, dtype = self._decoder.config, self._decoder.device, self._decoder.dtype
        size = -(-context // CONTEXT_STEP) * CONTEXT_STEP
        wider, spare = reach_of(context), spare_memory(device)
        while spare:
            size = min(wider, config.max_context)
            wider = reach_of(size + 1)
            next_one = plan_cache(config, batch, min(wider, config.max_context), device, dtype, check_free=False)
            if size == config.max_context or next_one.num_bytes > spare:
                break
        return plan_cache(config, batch, min(size, config.max_context), device, dtype)

    def reader_for(self, weights: FusedWeights, cache: KVCache, longest: int | None) -> PromptReader:
        """What reads prompts of up to `longest` tokens (None: any) into this cache by fused kernels."""
        if self.reader is None or self.reader.cache is not cache or self.reader.weights is not weights:
            self.reader = PromptReader(weights, cache, reach_of, longest=longest)
        return self.reader

    def memories_for(self, plans: Mapping[int, MemoryPlan], batch: int) -> dict[int, HeadMemory]:
        """An empty memory for each plan, by exit layer; the last ones again where they fit."""
        found = {}
        for exit_layer, plan in plans.items():
            memory = self.memories.pop(exit_layer, None)
            if memory is None or not memory.plan.holds(plan):
                memory = None  # free again before the next one is made
                self.rounds = {key: own for key, own in self.rounds.items() if not _remembers(own)}
                memory = HeadMemory(plan, self._decoder.device)
            for sequence in range(batch):
                memory.restart(sequence)
            found[exit_layer] = self.memories[exit_layer] = memory
        return found

    def rounds_for(
        self,
        weights: FusedWeights,
        cache: KVCache,
        head_set: HeadSet | None,
        policy: DraftPolicy,
        batch: int,
        processed: bool,
        context: int,
        thinned: ChannelWeights | None = None,
        depths: Collection[int] = (),
    ) -> Rounds:
        """Rounds of this shape on this cache for sequences of up to `context` tokens, made and captured once; `thinned`
        are what the layers before an exit of the trunk draft with, None: the rounds' own weights; `depths`: of trees
        that a recurrent head may draft in place of the policy's."""
        heads = {} if head_set is None else head_set.heads
        head = heads.get(0)
        shape, text, width, taps = round_shape(policy, head_set, thinned is not None)
        reach = min(reach_of(context), cache.plan.context)
        key = batch, processed, shape, text, width, taps, reach
        memory = self.memories.get(0)

        def current(own: Rounds) -> bool:
            if isinstance(own.draft, RecurrentDraft):
                drafts = memory is not None and own.draft.draws_on(memory)
            else:
                drafts = own.draft is None or own.draft.asks(heads, self.memories, thinned or weights)
            return own.cache is cache and own.weights is weights and drafts

        self.rounds = {k: own for k, own in self.rounds.items() if current(own)}
        found = self.rounds.pop(key, None)
        if found is None:
            draft_ids = None if head_set is None else head_set.draft_ids
            drafts = [own.draft for own in self.rounds.values()]
            known = next((own.weights for own in drafts if isinstance(own, RecurrentDraft)), None)
            blocks = [own.weights for own in drafts if isinstance(own, TrunkDraft)]

            def draft(own: Rounds) -> RecurrentDraft | TrunkDraft:
                state = own.trees, own.sequences, own.seeds, own.options
                if isinstance(shape, Levels):
                    step, each = own.steps[own.width], own.width
                    if thinned is not None:
                        each = shape.lanes
                        step = TealStep(thinned, cache, batch * each, reach=reach, pdl=own.pdl)
                    heard, report = (heads, self._decoder, draft_ids, shape, step, each), (own.num_refused, own.exits)
                    return TrunkDraft(
                        *heard, *state, *report, own.row_layers,
                        memories=self.memories, reach=reach, weights=ChainMap(*blocks),
                    )  # fmt: skip
                assert isinstance(head, RecurrentHead) and shape is not None and memory is not None
                place = head, memory, self._decoder, draft_ids, shape, batch
                return RecurrentDraft(*place, *state, own.pdl, reach=reach, weights=known)

            found = Rounds(
                weights, cache, batch, processed=processed, width=width, taps=taps,
                draft=None if shape is None else draft, text=text, reach=reach,
            )  # fmt: skip
        self.rounds[key] = found
        while len(self.rounds) > self.most_rounds:
            del self.rounds[next(iter(self.rounds))]
        with torch.inference_mode():
            found.prepare(kinds_of(found, policy), depths)
        return found


def round_shape(
    policy: DraftPolicy, head_set: HeadSet | None, apart: bool = False
) -> tuple[Shape | Levels | None, Lookup | None, int, tuple[int, ...]]:
    """Of device rounds: how heads' and the text's drafts grow there (None of either: the host drafts), rows a sequence,
    layers kept for heads; `apart` as in `shape_of`."""
    heads = {} if head_set is None else head_set.heads
    shape = shape_of(policy, heads, apart)
    taps = {t for e in policy.exits if isinstance(h := heads[e], StatefulHead) for t in (e, *h.taps) if t}
    text = None if policy.exits and shape is None else text_of(policy)
    most = max((own.max_nodes for own in (shape, text) if own is not None), default=policy.max_nodes)
    return shape, text, 1 << most.bit_length() if policy.drafts else 1, tuple(sorted(taps))


def _remembers(rounds: Rounds) -> bool:
    """Whether captured rounds hold a memory's addresses."""
    return isinstance(rounds.draft, RecurrentDraft) or (
        isinstance(rounds.draft, TrunkDraft) and bool(rounds.draft.weights)
    )


def reach_of(context: int) -> int:
    """Tokens that rounds for a sequence of `context` tokens reach: 512, 1024, 2048, ... positions less a tree's."""
    positions = CONTEXT_STEP
    while positions - MAX_NODES < context:
        positions *= 2
    return positions - MAX_NODES


def spare_memory(device: torch.device) -> float:
    """Bytes that a cache may take beyond what its first request needs; 0 where nothing is gained by it."""
    free = free_memory(device) if device.type == "cuda" else None
    return 0.0 if free is None else ROOM_SHARE * free
