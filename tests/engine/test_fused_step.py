"""The fused step against the decoder's own layers, every family, on real trees after a real prompt.

Without a GPU the kernels run in Triton's interpreter (`TRITON_INTERPRET=1`), which proves their logic only. Planted
bugs that these tests were seen to catch: the MLP's norm used for attention (parallel residual), a post norm left out,
stats of the layer before, the second rotary table for all layers, the window of another layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from skipstone.engine.cache import KVCache, plan_cache
from skipstone.engine.forward import RowTiles, Working, advance, prefill
from skipstone.engine.fused import FusedStep, FusedWeights
from skipstone.engine.model import Decoder
from skipstone.engine.tree import DraftTree
from skipstone.kernels.embed_rows import lay_rows

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.triton
PARENTS = [-1, 0, 0, 1, 1, 3]
PROMPT = 21  # tokens; windows of the tiny models are 8


def a_tree(vocab_size: int) -> DraftTree:
    tree = DraftTree(5)
    for node, parent in enumerate(PARENTS[1:], 1):
        tree.add(parent, (31 * node) % vocab_size)
    return tree


def state_of(trees: list[DraftTree | None], bases: list[int]) -> dict[str, torch.Tensor]:
    """Trees as the device keeps them."""
    tokens, depths = torch.zeros(2, len(trees), 16, dtype=torch.int32).unbind()
    paths = torch.zeros(len(trees), 16, 16, dtype=torch.int32)
    for b, tree in enumerate(trees):
        for node in range(0 if tree is None else len(tree)):
            assert tree is not None
            tokens[b, node], depths[b, node] = tree.tokens[node], tree.depths[node]
            path = tree.path(node)
            paths[b, node, : len(path)] = torch.tensor(path)
    count = torch.tensor([0 if tree is None else len(tree) for tree in trees], dtype=torch.int32)
    state = {"tokens": tokens, "depths": depths, "paths": paths, "count": count}
    return {k: v.to(DEVICE) for k, v in state.items()} | {"base": torch.tensor(bases, dtype=torch.int32, device=DEVICE)}


def test_layers(family: str, tiny: Callable[[str], Any]) -> None:
    config, weights = tiny(family)
    with torch.inference_mode():
        decoder = Decoder(config, weights, torch.float32, DEVICE)
        tree = a_tree(config.vocab_size)
        prompt = [(17 * i + 2) % config.vocab_size for i in range(PROMPT)]
        caches = []
        for _ in range(2):
            cache = KVCache(plan_cache(config, 2, 64, decoder.device, decoder.dtype), decoder.device)
            prefill(decoder, cache, 1, prompt)
            caches.append(cache)
        work = Working(1, PROMPT, tree, torch.zeros(16, config.hidden_size, device=DEVICE))
        work.kept = {layer: torch.zeros_like(work.hidden) for layer in (1, config.num_layers)}
        work.embed_new(decoder)
        caches[0].clear_open(1)
        advance(decoder, caches[0], [(work, range(len(tree)))], config.num_layers, RowTiles(gathered=ON_GPU))

        step = FusedStep(FusedWeights(decoder), caches[1], 32)
        caches[1].k[:, 1, :, PROMPT:], caches[1].v[:, 1, :, PROMPT:] = float("nan"), float("nan")
        lay_rows(*state_of([None, tree], [0, PROMPT]).values(), step.rows, step.ids, 16)
        taps = {layer: torch.full_like(step.hidden, float("nan")) for layer in (1, config.num_layers)}
        step.embed()
        out = step.run(0, config.num_layers, taps)
        rows = slice(16, 16 + len(tree))
        torch.testing.assert_close(out[rows], work.hidden[: len(tree)], rtol=2e-4, atol=2e-4)
        for layer, kept in work.kept.items():
            torch.testing.assert_close(taps[layer][rows], kept[: len(tree)], rtol=2e-4, atol=2e-4)
        slots = slice(PROMPT, PROMPT + len(tree))
        for ours, theirs in ((caches[1].k, caches[0].k), (caches[1].v, caches[0].v)):
            torch.testing.assert_close(ours[:, 1, :, slots], theirs[:, 1, :, slots], rtol=2e-4, atol=2e-4)

        # in two parts, resumed from the residual stream
        lay_rows(*state_of([None, tree], [0, PROMPT]).values(), step.rows, step.ids, 16)
        step.embed()
        step.run(0, 2)
        step.resume(2)
        step.run(2, config.num_layers)
        torch.testing.assert_close(step.hidden[rows], work.hidden[: len(tree)], rtol=2e-4, atol=2e-4)
