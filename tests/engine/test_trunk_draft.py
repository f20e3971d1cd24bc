"""Drafting with trunk exits on the device against the host's (`draft.draft`), on tiny models after real prompts.

Without a GPU the kernels run in Triton's interpreter (`TRITON_INTERPRET=1`), which proves their logic only.

Regimes: chains and trees; adapters, a head with its own projection, bare exits, blocks of two layers; one exit and
three; gates by entropy and by path, and none; greedy and sampled; a draft vocabulary; RMSNorm, LayerNorm with parallel
residual, Gemma's norms, factor and soft-cap, windows; a sequence that is not active and one near its end; open slots
poisoned with NaN; layers that drop inputs, apart from verification, against the CPU's decoder that does
(`thresholded.py`). Planted bugs that these tests were seen to catch: the final norm in place of the adapter's, its gain
left out, the tap of another exit or none, outputs taken for token ids, no soft-cap, another node's residual stream,
noise of the node's own position, a row that does not see itself, ancestors' keys missing at a deeper exit, siblings
that see each other; thinned out: nothing dropped, dense positions that drop, another layer's thresholds, a node that
stops at the exit that was sure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from skipstone.engine.cache import KVCache, plan_cache
from skipstone.engine.draft import DraftRow, draft
from skipstone.engine.forward import RowTiles, Working, prefill
from skipstone.engine.fused import FusedStep, FusedWeights
from skipstone.engine.gate import DraftPolicy, Gate
from skipstone.engine.head_memory import HeadMemory, plan_memory
from skipstone.engine.model import Decoder
from skipstone.engine.sampling import Context, History, SamplingParams, TargetSampler
from skipstone.engine.sparsity.teal_step import ChannelWeights, TealStep
from skipstone.engine.sparsity.thresholded import TealDecoder, projections
from skipstone.engine.tree import DraftTree
from skipstone.engine.trunk_draft import TrunkDraft
from skipstone.heads import HeadSet, HeadSetConfig, HeadSpec, Projection
from skipstone.heads.stateful import BlockHead
from skipstone.kernels.grow_level import Levels
from skipstone.kernels.grow_tree import Sequences, Trees
from skipstone.kernels.linear import PackedLinear

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.triton
INF = math.inf
CONTEXT = 96
DENSE_TOKENS = 5
BARE, LINEAR, ADAPTER = ("adapter", {"width": 1}), ("linear", {}), ("adapter", {"width": 24})
BLOCK = ("block", {"num_heads": 4, "num_kv_heads": 2, "head_dim": 12, "ff": 40, "depth": 2, "rope_theta": 10_000})


def heads_of(decoder: Decoder, kinds: dict[int, tuple[str, dict[str, int]]], draft_ids: torch.Tensor | None) -> HeadSet:
    """Random, with every parameter away from its start, but for bare exits."""
    config = decoder.config
    specs = tuple(HeadSpec(kind, e, options) for e, (kind, options) in kinds.items())
    size = None if draft_ids is None else len(draft_ids)
    torch.manual_seed(3)
    heads = HeadSet(HeadSetConfig(config.hidden_size, config.vocab_size, config.num_layers, specs, size), draft_ids)
    projection = Projection(decoder.final_norm, decoder.head_weight, config.logit_softcap, PackedLinear)
    heads.initialise(projection)
    with torch.no_grad():
        for e, head in heads.heads.items():
            for parameter in head.parameters() if kinds[e] != BARE else ():
                scale = 0.3 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
                parameter.add_(torch.randn(parameter.shape).to(parameter.device) * scale)
    return heads.attach(projection)


class Both:
    """The same sequences, drafted for by the host and on the device."""

    def __init__(
        self,
        model: tuple[Any, Any],
        kinds: dict[int, tuple[str, dict[str, int]]],
        levels: Levels,
        prompts: list[list[int]],
        ends: list[int],
        *,
        draft_ids: torch.Tensor | None = None,
        params: SamplingParams | None = None,
        width: int = 4,
        dtype: torch.dtype = torch.float32,
        pdl: bool = False,
        thinned: bool = False,
    ) -> None:
        config, weights = model
        self.decoder = Decoder(config, weights, dtype, DEVICE)
        self.heads, self.levels, self.ends = heads_of(self.decoder, kinds, draft_ids), levels, ends
        self.params, batch = params or SamplingParams(), len(prompts)
        self.histories = [History(prompt) for prompt in prompts]
        self.caches = [
            KVCache(plan_cache(config, batch, CONTEXT, self.decoder.device, dtype), self.decoder.device)
            for _ in range(2)
        ]
        blocks = {e: head for e, head in self.heads.heads.items() if isinstance(head, BlockHead)}
        self.memories = [
            {e: HeadMemory(plan_memory(head, batch, CONTEXT, 16, self.decoder.device), self.decoder.device)
             for e, head in blocks.items()}
            for _ in range(2)
        ]  # fmt: skip
        for store in (store for memory in self.memories[1].values() for store in (memory.cache.k, memory.cache.v)):
            store.fill_(math.nan)
        for b, prompt in enumerate(prompts):
            for cache, memories in zip(self.caches, self.memories, strict=True):
                for memory in memories.values():
                    memory.restart(b)

                def take(states, b=b, memories=memories):  # type: ignore[no-untyped-def]
                    for memory in memories.values():
                        memory.take(b, states)

                prefill(self.decoder, cache, b, prompt[:-1], tuple(blocks), take)
            for store in (self.caches[1].k, self.caches[1].v):
                store[:, b, :, len(prompt) - 1 :] = math.nan

        def whole(*values: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=DEVICE)

        self.trees = Trees.empty(batch, DEVICE)
        self.trees.tokens[:, 0] = whole(*[prompt[-1] for prompt in prompts])
        self.sequences = Sequences(
            whole(*[end > 0 for end in ends]), whole(*[len(p) - 1 for p in prompts]), whole(*ends)
        )
        self.drafter: Decoder = self.decoder
        if thinned:
            own, last, width = len(projections(config)), levels.exits[-1], levels.lanes
            thresholds = 0.1 + 0.03 * torch.arange(config.num_layers * own).view(-1, own).flip(0)
            self.drafter = TealDecoder(self.decoder, thresholds, DENSE_TOKENS, last, skip=not ON_GPU)
            channels = ChannelWeights(self.decoder, thresholds, DENSE_TOKENS, last)
            step: FusedStep = TealStep(channels, self.caches[1], batch * width, pdl=pdl)
        else:
            step = FusedStep(FusedWeights(self.decoder), self.caches[1], -(-batch * width // 16) * 16, pdl=pdl)
        for stale in (step.hidden, step._stats_embed):
            stale.fill_(math.nan)
        self.num_refused, self.row_layers = (whole(*[-5] * batch) for _ in range(2))
        self.exits = torch.zeros(batch, 16, dtype=torch.int32, device=DEVICE)
        self.device = TrunkDraft(
            self.heads.heads, self.decoder, self.heads.draft_ids, levels, step, width, self.trees, self.sequences,
            torch.full((batch,), self.params.seed, device=DEVICE),
            torch.tensor([self.params.temperature, 1, 0, 1, 0, 0, 0, 0], device=DEVICE), self.num_refused, self.exits,
            self.row_layers, memories=self.memories[1],
        )  # fmt: skip
        self.device.start(range(batch))

    def draft_on_host(self) -> tuple[list[DraftTree | None], list[int]]:
        works, rows = [], []
        for b, history in enumerate(self.histories):
            hidden = torch.zeros(16, self.decoder.config.hidden_size, device=DEVICE)
            kept = {e: torch.zeros_like(hidden) for e in self.memories[0]}
            work = Working(b, len(history) - 1, DraftTree(history.token_ids[-1]), hidden, kept=kept)
            work.embed_new(self.decoder)
            self.caches[0].clear_open(b)
            works.append(work)
            sampler = TargetSampler(self.params, self.decoder.config.vocab_size, DEVICE)

            def rank(guesses, at, path, count, history=history, sampler=sampler):  # type: ignore[no-untyped-def]
                return sampler.candidates(guesses.logits[at], Context(history, path), self.heads.draft_ids, count)

            if self.ends[b]:
                rows.append(DraftRow(work, max(0, self.ends[b] - len(history) - 1), rank))
        levels = self.levels
        gates = {e: Gate(*gate) for e, gate in zip(levels.exits, levels.gates, strict=True)}
        policy = DraftPolicy(
            levels.exits, gates, max_depth=levels.max_depth, max_nodes=levels.max_nodes, branch=levels.branch,
            confidence="path" if levels.by_path else "entropy",
        )  # fmt: skip
        tiles = RowTiles(gathered=ON_GPU)
        asked = self.heads.heads, policy, tiles, self.memories[0], self.heads.draft_ids
        stops = iter(draft(self.drafter, self.caches[0], rows, *asked))
        return [w.tree if end else None for w, end in zip(works, self.ends, strict=True)], [
            next(stops) if end else 0 for end in self.ends
        ]

    def check(self) -> list[DraftTree]:
        """One draft on both sides; the trees of active sequences."""
        trees, refused = self.draft_on_host()
        self.device.draft()
        assert self.num_refused.tolist() == refused
        for b, tree in enumerate(trees):
            if tree is None:
                assert self.trees.count[b] == 0
                continue
            n = int(self.trees.count[b])
            found = [t[b, :n].tolist() for t in (self.trees.tokens, self.trees.parents, self.trees.depths)]
            assert found == [tree.tokens, tree.parents, tree.depths], b
            assert self.exits[b, 1:n].tolist() == tree.exit_layers[1:]
            assert self.trees.entropies[b, 1:n].tolist() == pytest.approx(tree.entropies[1:], rel=1e-3, abs=1e-3)
        return [tree for tree in trees if tree is not None]


def prompt_of(length: int, salt: int = 0) -> list[int]:
    return [(17 * i + 3 + salt) % 199 for i in range(length)]


def chain(
    exits: tuple[int, ...], stops: tuple[float, ...], length: int, by_path: bool = False, apart: bool = False
) -> Levels:
    return Levels(exits, tuple((stop, stop) for stop in stops), 1, length, length, by_path, apart)


RUNS: dict[str, tuple[str, dict[int, tuple[str, dict[str, int]]], Levels, dict[str, Any]]] = {
    "one adapter": ("llama2", {2: ADAPTER}, chain((2,), (INF,), 3), {}),
    "one gated, rows by node": ("qwen3", {1: ADAPTER}, chain((1,), (3.0,), 5), {"width": 16}),
    "three": ("llama2", {1: ADAPTER, 2: LINEAR, 3: BARE}, chain((1, 2, 3), (1.8, 1.5, 2.1), 5), {"width": 8}),
    "by path, sampled": ("gemma2", {1: ADAPTER, 2: BARE}, chain((1, 2), (3.0, 7.0), 4, True), {"width": 8}),
    "layer norm": ("gpt_neox", {1: ADAPTER, 3: LINEAR}, chain((1, 3), (2.5, 5.0), 3), {"width": 4}),
    "tree": ("llama2", {2: ADAPTER}, Levels((2,), ((2.4, 3.3),), 3, 4, 15), {"width": 16}),
    "tree, full early": ("qwen3", {1: LINEAR}, Levels((1,), ((-INF, INF),), 2, 3, 7), {"width": 8}),
    "tree of two, sampled": ("gemma2", {1: ADAPTER, 2: BARE}, Levels((1, 2), ((3.2, 3.42), (3.3, 3.63)), 2, 4, 13), {}),
    "block": ("llama2", {2: BLOCK}, chain((2,), (3.57,), 4), {"width": 8}),
    "tree of a block and an adapter": (
        "gemma2",
        {1: ADAPTER, 3: BLOCK},
        Levels((1, 3), ((3.5, 4.02), (3.85, 4.1)), 2, 3, 14),
        {},
    ),
    "tree by path": ("gpt_neox", {1: ADAPTER, 3: LINEAR}, Levels((1, 3), ((1.0, 2.5), (2.0, 6.0)), 2, 3, 14, True), {}),
    "thinned out": ("llama2", {2: ADAPTER}, chain((2,), (INF,), 3, apart=True), {"thinned": True}),
    "thinned out, three": (
        "qwen3", {1: ADAPTER, 2: LINEAR, 3: BARE}, chain((1, 2, 3), (1.8, 1.5, 2.1), 5, apart=True), {"thinned": True},
    ),
    "thinned out, by path, sampled": (
        "gemma2", {1: ADAPTER, 2: BARE}, chain((1, 2), (3.0, 7.0), 4, True, True), {"thinned": True},
    ),
    "thinned out, layer norm": (
        "gpt_neox", {1: ADAPTER, 3: LINEAR}, chain((1, 3), (2.5, 5.0), 3, apart=True), {"thinned": True},
    ),
    "thinned out, tree": ("llama2", {2: ADAPTER}, Levels((2,), ((2.4, 3.3),), 2, 3, 6, apart=True), {"thinned": True}),
    "thinned out, tree of two": (
        "qwen3", {1: LINEAR, 3: BARE}, Levels((1, 3), ((1.4, 2.2), (2.4, 3.0)), 2, 2, 5, apart=True), {"thinned": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_drafts_are_those_of_the_host(name: str, tiny: Callable[[str], Any]) -> None:
    """The first sequence has a prompt of one token, the last one room for one draft; one is not active."""
    family, kinds, levels, options = RUNS[name]
    options = {"width": 16} | options if levels.branch > 1 else options
    if "sampled" in name:
        options = options | {"params": SamplingParams(temperature=0.8, seed=7)}
    if name.endswith("three") or "sampled" in name:
        options = options | {"draft_ids": torch.arange(1, 199, 2)}
    prompts = [prompt_of(1), prompt_of(30), prompt_of(9), prompt_of(22, 5)]
    with torch.inference_mode():
        both = Both(tiny(family), kinds, levels, prompts, [90, 90, 0, 24], **options)
        trees = both.check()
    assert {e for tree in trees for e in tree.exit_layers[1:]} >= set(levels.exits[-2:])
    assert max(trees[2].depths) == 1
    assert max(high for _, high in levels.gates) == INF or sum(both.num_refused.tolist()) > 0
    assert levels.branch == 1 or not all(tree.is_chain for tree in trees[:2])


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize(
    "name", ["one adapter", "three", "tree", "thinned out", "thinned out, three", "thinned out, tree"]
)
def test_captured_drafts_are_the_same(name: str, pdl: bool, tiny: Callable[[str], Any]) -> None:
    if pdl and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a GPU with programmatic dependent launch")
    family, kinds, levels, options = RUNS[name]
    with torch.inference_mode():
        prompts = [prompt_of(1), prompt_of(30), prompt_of(9), prompt_of(22, 5)]
        both = Both(tiny(family), kinds, levels, prompts, [90, 90, 0, 24], pdl=pdl, **options)
        both.device.draft()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            both.device.draft()
        for stale in (both.trees.tokens[:, 1:], both.trees.count, both.exits, both.num_refused):
            stale.fill_(-9)
        both.device.draft = graph.replay  # type: ignore[method-assign]
        both.check()
