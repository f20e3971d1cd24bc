"""Drafting rounds with a recurrent head on the device against the host's (`best_first`, `draft`), on tiny models.

Both are fed the same states of the full model and the same verdicts, of which some accept drafts of a path, some are
plain, and some pile up until they are taken in by calls of their own. Without a GPU the kernels run in Triton's
interpreter (`TRITON_INTERPRET=1`), which proves their logic only.

Regimes: trees and chains, with and without a gate, greedy and sampled; RMSNorm, LayerNorm and Gemma's norms, factor
and soft-cap; two layers, grouped heads; a draft vocabulary; prompts of one token, of some, and longer than what may
wait; a sequence that is not active and one at its end; what no one may read poisoned with NaN. Planted bugs that
these tests were seen to catch: contexts of another place, the pending token's pair one place early, states of plain
rounds not kept, lengths off by one, the MLP's norm used for attention, outputs taken for token ids, noise of outputs
instead of tokens, taps in reverse, stats of another norm, no soft-cap.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from skipstone.engine import head_memory
from skipstone.engine.best_first import best_first
from skipstone.engine.device_draft import RecurrentDraft
from skipstone.engine.draft import DraftRow, draft
from skipstone.engine.forward import RowTiles, Working
from skipstone.engine.gate import best_first as shaped
from skipstone.engine.gate import fixed_exit
from skipstone.engine.head_memory import HeadMemory, plan_memory, scratch_of
from skipstone.engine.model import Decoder
from skipstone.engine.sampling import Context, History, SamplingParams, TargetSampler
from skipstone.engine.tree import DraftTree
from skipstone.heads import HeadSpec, Projection, build_head
from skipstone.kernels.grow_tree import Sequences, Shape, Trees
from skipstone.kernels.linear import PackedLinear

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.triton
CONTEXT = 200
TAPS = (1, 2, 4)


def a_head(decoder, draft_ids, depth):
    """Random, with every parameter away from its start."""
    config = decoder.config
    options = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 12, "ff": 40, "depth": depth, "taps": TAPS}
    torch.manual_seed(3)
    outputs = config.vocab_size if draft_ids is None else len(draft_ids)
    head = build_head(HeadSpec("recurrent", 0, {**options, "rope_theta": 1e4}), config.hidden_size, outputs)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn(parameter.shape) * (0.2 if parameter.ndim == 1 else parameter.shape[1] ** -0.5))
    projection = Projection(decoder.final_norm, decoder.head_weight, config.logit_softcap, PackedLinear)
    head.to(DEVICE).attach(projection.restrict(draft_ids))
    return head


class Both:
    """The same sequences, drafted for by the host and on the device."""

    def __init__(self, tiny, family, prompts, policy, shape, ends, params=None, draft_ids=None, depth=1, pdl=False):
        config, weights = tiny(family)
        self.decoder = Decoder(config, weights, torch.float32, DEVICE)
        self.policy, self.draft_ids, self.width = policy, draft_ids, 16
        head = a_head(self.decoder, draft_ids, depth)
        plan = plan_memory(head, len(prompts), CONTEXT, scratch_of(policy), self.decoder.device)
        self.memories = [HeadMemory(plan, self.decoder.device) for _ in range(2)]
        self.host = self.memories[0]
        batch = len(prompts)

        def whole(*values):
            return torch.tensor(values, dtype=torch.int32, device=DEVICE)

        self.trees = Trees.empty(batch, DEVICE)
        self.active = [end > 0 for end in ends]
        self.sequences = Sequences(whole(*self.active), whole(*[len(p) - 1 for p in prompts]), whole(*ends))
        self.params = params or SamplingParams()
        seeds = torch.full((batch,), self.params.seed, device=DEVICE)
        options = torch.tensor([self.params.temperature, 1, 0, 1, 0, 0, 0, 0], device=DEVICE)
        for cache in (self.memories[1].cache.k, self.memories[1].cache.v):
            cache.fill_(math.nan)
        state = self.trees, self.sequences, seeds, options, pdl
        self.device = RecurrentDraft(head, self.memories[1], self.decoder, draft_ids, shape, batch, *state)
        for name in ("_ring", "_outputs", "_contexts"):
            getattr(self.device, name).fill_(math.nan)
        self.histories = [History(prompt) for prompt in prompts]
        self.samplers = [TargetSampler(self.params, config.vocab_size, DEVICE) for _ in prompts]
        for b, prompt in enumerate(prompts):
            self.trees.tokens[b, 0] = prompt[-1]
            states = self.states(prompt[:-1]) if len(prompt) > 1 else {}
            for memory in self.memories:
                memory.restart(b)
                if states:
                    memory.take(b, states)
        self.device.start(self.memories[1], dict(enumerate(prompts)))

    def capture(self):
        """From now on drafting replays graphs, made while no sequence is active."""
        active = self.sequences.active.clone()
        self.sequences.active.zero_()
        for name in ("absorb", "draft"):
            run = getattr(self.device, name)
            run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            setattr(self.device, name, graph.replay)
        self.sequences.active.copy_(active)

    def states(self, ids):
        """layer -> [n, D], the full model's states."""
        layers = tuple(self.host.layers)
        found = self.decoder.encode(torch.tensor([ids], device=DEVICE), layers)
        return {layer: found[layer][0] for layer in layers}

    def draft_on_host(self):
        works = []
        for b, history in enumerate(self.histories):
            work = Working(
                b,
                len(history) - 1,
                DraftTree(history.token_ids[-1]),
                torch.zeros(16, self.decoder.config.hidden_size, device=DEVICE),
            )
            work.kept = {layer: torch.zeros_like(work.hidden) for layer in self.host.layers}
            work.embed_new(self.decoder)
            works.append(work)
        rows = []
        for b, work in enumerate(works):
            if not self.active[b]:
                continue

            def rank(guesses, at, path, count, b=b):
                context = Context(self.histories[b], path)
                return self.samplers[b].candidates(guesses.logits[at], context, self.draft_ids, count)

            rows.append(DraftRow(work, max(0, int(self.sequences.end[b]) - len(self.histories[b]) - 1), rank))
        if self.policy.beam:
            best_first(self.decoder, rows, self.host, self.policy, self.draft_ids)
        else:
            memories = {0: self.host}
            draft(self.decoder, None, rows, {}, self.policy, RowTiles(), memories, self.draft_ids)
        return [work.tree for work in works]

    def check_trees(self):
        """One drafting round, on both sides."""
        trees = self.draft_on_host()
        self.trees.count.fill_(-9)
        self.device.absorb()
        self.device.draft()
        for b, tree in enumerate(trees):
            if not self.active[b]:
                assert self.trees.count[b] == 0
                continue
            n = int(self.trees.count[b])
            found = [t[b, :n].tolist() for t in (self.trees.tokens, self.trees.parents, self.trees.depths)]
            assert found == [tree.tokens, tree.parents, tree.depths], b
            assert self.trees.entropies[b, 1:n].tolist() == pytest.approx(tree.entropies[1:], rel=1e-3)
        return trees

    def commit(self, trees, paths, bonuses):
        """A verification accepts these nodes, by sequence; plain with `trees` of None."""
        batch, width = len(self.histories), 1 if trees is None else self.width
        num_rows = -(-batch * width // 16) * 16
        taps = {n: torch.full((num_rows, self.decoder.config.hidden_size), math.nan, device=DEVICE) for n in TAPS}
        record = torch.full((batch, 96), -77, dtype=torch.int32, device=DEVICE)
        nodes, count = torch.zeros(batch, 16, dtype=torch.int32, device=DEVICE), torch.zeros_like(self.trees.count)
        for b, (path, bonus) in enumerate(zip(paths, bonuses, strict=True)):
            if not self.active[b]:
                continue
            tokens = [trees[b].tokens[node] for node in path] if trees is not None else []
            history, path = self.histories[b], [0, *path]
            base = len(history) - 1
            states = {n: t[base:] for n, t in self.states([*history.token_ids, *tokens]).items()}
            self.host.take(b, states)
            for layer, own in taps.items():
                own[[b * width + node for node in path]] = states[layer]
            record[b, 3] = base
            record[b, 4 : 4 + len(path)] = torch.tensor([*tokens, bonus], dtype=torch.int32)
            nodes[b, : len(path)], count[b] = torch.tensor(path, dtype=torch.int32), len(path)
            history.extend([*tokens, bonus])
            self.sequences.base[b], self.trees.tokens[b, 0] = len(history) - 1, bonus
        self.device.keep(taps, record, nodes, count, width)

    def play(self, rounds, seed=0):
        """Drafting rounds and plain ones, with made-up verdicts; `rounds` gives the plain ones before each."""
        rng, widest = random.Random(seed), 0
        size = self.decoder.config.vocab_size

        def bonuses():
            return [rng.randrange(size) for _ in self.histories]

        for num_plain in rounds:
            for i in range(num_plain):
                self.commit(None, [()] * len(self.histories), bonuses())
                if i % 12 == 11:
                    self.device.absorb()
            trees = self.check_trees()
            widest = max(widest, max(len(tree) for tree in trees))
            paths = [tree.path(rng.choice(tree.leaves()))[1:] for tree in trees]
            self.commit(trees, [path[: rng.randint(0, len(path))] for path in paths], bonuses())
        return widest


def prompt_of(length):
    return [(17 * i + 3) % 199 for i in range(length)]


@pytest.mark.parametrize(("family", "depth"), [("llama2", 1), ("llama2", 2), ("gemma2", 1), ("gpt_neox", 1)])
def test_trees_are_those_of_the_host(tiny, family, depth, monkeypatch):
    """Prompts of one token and of 150, which wait or, where fewer may, are taken in at once; the last sequence is
    idle."""
    if (family, depth) == ("llama2", 2):
        monkeypatch.setattr(head_memory, "WAITING", 40)
    policy, shape = shaped(beam=3, branch=3, max_depth=4, max_nodes=11), Shape(3, 3, 4, 11)
    prompts = [prompt_of(n) for n in (1, 150, 5)]
    with torch.inference_mode():
        both = Both(tiny, family, prompts, policy, shape, [180, 180, 0], depth=depth)
        assert both.play([0, 0, 2] if (family, depth) == ("llama2", 1) else [0]) == 12


def test_gates_draft_vocabularies_and_ends(tiny):
    """A gate that refuses some nodes, few outputs, and a budget that ends in the second round."""
    draft_ids = torch.arange(1, 199, 3, device=DEVICE)
    policy, shape = shaped(beam=4, branch=4, max_depth=5, max_nodes=15, stop=3.2), Shape(4, 4, 5, 15, stop=3.2)
    with torch.inference_mode():
        both = Both(tiny, "llama2", [prompt_of(20), prompt_of(9)], policy, shape, [100, 14], draft_ids=draft_ids)
        trees = both.check_trees()
        assert {int(token) % 3 for tree in trees for token in tree.tokens[1:]} == {1}
        assert any(both.device.pool.num_refused.tolist()) and max(trees[1].depths) == 4
        both.commit(trees, [(), ()], [5, 6])
        for _ in range(3):
            both.commit(None, [(), ()], [5, 6])
        trees = both.check_trees()  # one more token: nothing may be drafted
        assert len(trees[0]) > 1 and len(trees[1]) == 1


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_chains_are_those_of_the_host(tiny, temperature):
    params = SamplingParams(temperature=temperature, seed=11)
    with torch.inference_mode():
        prompts = [prompt_of(30), prompt_of(2)]
        ids = torch.arange(1, 199, 3, device=DEVICE) if temperature else None
        both = Both(tiny, "llama2", prompts, fixed_exit(0, 3), Shape(1, 1, 3, 3), [150, 150], params, ids)
        both.width = 4
        assert both.play([0, 30, 1]) == 4


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("pdl", [False, True])
def test_captured_rounds_grow_the_same_trees(tiny, pdl):
    if pdl and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a GPU with programmatic dependent launch")
    policy, shape = shaped(beam=4, branch=4, max_depth=6, max_nodes=15), Shape(4, 4, 6, 15)
    with torch.inference_mode():
        prompts = [prompt_of(n) for n in (1, 40, 150, 5)]
        both = Both(tiny, "llama2", prompts, policy, shape, [190, 190, 190, 0], pdl=pdl)
        both.capture()
        assert both.play([0, 0, 2, 1]) == 16


def test_what_does_not_fit_is_refused(tiny):
    with torch.inference_mode(), pytest.raises(ValueError, match="draft entries planned"):
        Both(tiny, "llama2", [prompt_of(2)], shaped(beam=2, max_depth=2), Shape(4, 4, 6, 15), [50])
    with torch.inference_mode():
        both = Both(tiny, "llama2", [prompt_of(2)], shaped(beam=2, max_depth=2), Shape(2, 4, 2, 15), [50])
        with pytest.raises(ValueError, match="another memory"):
            both.device.start(both.host, {0: prompt_of(2)})
