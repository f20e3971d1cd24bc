"""The step whose rows drop inputs, against the decoder that drops them on the CPU, every family, after a real prompt.

Without a GPU the kernels run in Triton's interpreter (`TRITON_INTERPRET=1`), which proves their logic only. fp32: sums
in another order differ in the sixth digit; no |x| of these seeds lies so near its threshold that it would be dropped on
one side and kept on the other, which would show in the second digit.

Planted bugs that these tests were seen to catch: thresholds of k used for v; the first row's thresholds for all; a
padded segment's width left out; a LayerNorm's bias left out; a dense row thinned out; a post norm left out.
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
from skipstone.engine.sparsity.teal_step import ChannelWeights, TealStep
from skipstone.engine.sparsity.thresholded import TealDecoder, projections
from skipstone.engine.tree import DraftTree
from skipstone.kernels.embed_rows import lay_rows

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.triton
PROMPTS = (2, 21)  # tokens of two sequences; windows of the tiny models are 8
DENSE_TOKENS = 5  # so the first row drops nothing
SLACK = {"rtol": 2e-4, "atol": 2e-4}


def thresholds_of(decoder: Decoder) -> torch.Tensor:
    """Another one for each projection of each layer: a tenth to a half of the inputs of these models."""
    own = len(projections(decoder.config))
    return 0.1 + 0.04 * torch.arange(decoder.config.num_layers * own).view(-1, own).flip(0)


def filled(decoder: Decoder) -> KVCache:
    config = decoder.config
    cache = KVCache(plan_cache(config, 2, 64, decoder.device, decoder.dtype), decoder.device)
    for sequence, length in enumerate(PROMPTS):
        prefill(decoder, cache, sequence, [(17 * i + 2 + sequence) % config.vocab_size for i in range(length)])
        for store in (cache.k, cache.v):
            store[:, sequence, :, length:] = float("nan")
    return cache


def stepped(step: FusedStep, tokens: list[int], halves: bool = False) -> torch.Tensor:
    """The residual stream `[2, D]` of each sequence's next token."""
    tree = torch.zeros(2, 16, dtype=torch.int32, device=DEVICE)
    paths = torch.zeros(2, 16, 16, dtype=torch.int32, device=DEVICE)
    count, base = torch.tensor([[1, 1], PROMPTS], dtype=torch.int32, device=DEVICE)
    ids = tree.clone()
    ids[:, 0] = torch.tensor(tokens)
    lay_rows(ids, tree, paths, count, base, step.rows, step.ids, 1)
    step.embed()
    if halves:
        step.run(0, 1)
        step.resume(1)
    step.run(int(halves), step.weights.config.num_layers)
    return step.hidden[:2]


def expected(decoder: Decoder, cache: KVCache, tokens: list[int]) -> torch.Tensor:
    """The same by the decoder's own layers."""
    rows = []
    for sequence, (base, token) in enumerate(zip(PROMPTS, tokens, strict=True)):
        work = Working(sequence, base, DraftTree(token), torch.zeros(16, decoder.config.hidden_size, device=DEVICE))
        work.embed_new(decoder)
        cache.clear_open(sequence)
        advance(decoder, cache, [(work, range(1))], decoder.config.num_layers, RowTiles(gathered=ON_GPU))
        rows.append(work.hidden[0])
    return torch.stack(rows)


@torch.inference_mode()
def test_layers(family: str, tiny: Callable[[str], Any]) -> None:
    decoder = Decoder(*tiny(family), torch.float32, DEVICE)
    thresholds, tokens = thresholds_of(decoder), [5, 7]
    caches = [filled(decoder) for _ in range(2)]
    wanted = expected(TealDecoder(decoder, thresholds, DENSE_TOKENS, skip=not ON_GPU), caches[0], tokens)
    step = TealStep(ChannelWeights(decoder, thresholds, DENSE_TOKENS), caches[1], 2)
    torch.testing.assert_close(stepped(step, tokens), wanted, **SLACK)
    for sequence, slot in enumerate(PROMPTS):
        for ours, theirs in ((caches[1].k, caches[0].k), (caches[1].v, caches[0].v)):
            torch.testing.assert_close(ours[:, sequence, :, slot], theirs[:, sequence, :, slot], **SLACK)
    # what the LM head reads: the final norm, deferred
    normed = decoder._final_norm(wanted)
    own = step.x[:2].float()
    if decoder.config.norm == "rms":
        square = step.stats[:2, 0].sum(-1, keepdim=True) / decoder.config.hidden_size
        torch.testing.assert_close(own * (square + decoder.config.norm_eps).rsqrt(), normed, **SLACK)


@torch.inference_mode()
def test_nothing_dropped_is_the_dense_step(tiny: Callable[[str], Any]) -> None:
    """Thresholds of 0, or positions that are all dense; and one step serves every threshold."""
    decoder, tokens = Decoder(*tiny("llama_linear"), torch.float32, DEVICE), [5, 7]
    dense = stepped(FusedStep(FusedWeights(decoder), filled(decoder), 16), tokens)
    thresholds = thresholds_of(decoder)
    weights = ChannelWeights(decoder, torch.zeros_like(thresholds), 0)
    step = TealStep(weights, filled(decoder), 2)
    nothing = stepped(step, tokens).clone()
    torch.testing.assert_close(nothing, dense, **SLACK)
    weights.drop(thresholds, 64)
    assert torch.equal(stepped(step, tokens), nothing)
    weights.drop(thresholds, DENSE_TOKENS)
    thinned = stepped(step, tokens).clone()
    assert torch.equal(thinned[0], nothing[0]), "the first sequence stands at a dense position"
    assert float((thinned[1] - nothing[1]).abs().max()) > 0.1
    weights.drop(2 * thresholds, 0)
    assert float((stepped(step, tokens) - thinned).abs().amax(1).min()) > 0.1


@torch.inference_mode()
def test_a_row_has_its_bits_beside_any_other(tiny: Callable[[str], Any]) -> None:
    decoder = Decoder(*tiny("gemma2"), torch.float32, DEVICE)
    weights = ChannelWeights(decoder, thresholds_of(decoder), DENSE_TOKENS)
    step = TealStep(weights, filled(decoder), 2)
    first, other = stepped(step, [5, 7]).clone(), stepped(step, [9, 7]).clone()
    assert torch.equal(first[1], other[1]) and not torch.equal(first[0], other[0])
    assert torch.equal(stepped(step, [9, 7], halves=True), other), "resumed from the residual stream"


@torch.inference_mode()
def test_states_for_heads_are_refused(tiny: Callable[[str], Any]) -> None:
    decoder = Decoder(*tiny("llama2"), torch.float32, DEVICE)
    step = TealStep(ChannelWeights(decoder, thresholds_of(decoder)), filled(decoder), 1)
    with pytest.raises(ValueError, match=r"states after layers \[1\]"):
        step.run(0, 2, {1: step.hidden})
