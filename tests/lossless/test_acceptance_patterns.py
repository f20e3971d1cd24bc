"""Every acceptance length, every branch place, every tree shape: planned accepts and rejects against plain decoding.

Two ways to plan. Heads that know the plain output and go wrong where a test says so (`PlannedHeads`) show the whole
engine. A replaced drafting step that hangs arbitrary trees below the root, each node run to some layer or other, shows
that nothing depends on how a tree came about.

Planted bugs: see test_planted_bugs.py.
"""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skipstone.engine import loop
from skipstone.engine.forward import advance
from skipstone.engine.gate import Gate, every, fixed_exit

PROMPT = list(range(3, 60))  # its drafts cross the border of the first key group (64)
NEW = 20
SAMPLED = {"temperature": 0.8, "seed": 5, "top_p": 0.97}
BRANCHING = Gate(0.3, 1.5)


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("length", [1, 4, 15])
def test_chain_accepts_exactly_the_right_part(length, sampling, engine_of, planned, assert_same_output):
    engine = engine_of()
    mistakes = set()
    heads = planned(engine, lambda place: {place.wrong if place.index in mistakes else place.guess: 50.0}, exits=(2,))
    plain = heads.learn(PROMPT, max_new_tokens=NEW, logprobs=0, **sampling)
    for accepted in range(length + 1):
        mistakes.clear()
        mistakes.add(accepted)  # in the first round; later rounds are right
        out = engine.generate(PROMPT, policy=fixed_exit(2, length), max_new_tokens=NEW, logprobs=0, **sampling)
        assert_same_output(out, plain)
        sources = [layer is not None for layer in out.exit_layers]
        assert sources[:accepted] == [True] * accepted and not sources[accepted]
        rounds, left = 0, NEW
        while left:
            drafted = min(length, left - 1)
            left -= 1 + (min(accepted, drafted) if not rounds else drafted)
            rounds += 1
        assert out.stats.num_verifications == rounds, "later rounds accept their whole draft"


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("truth_first", [True, False])
def test_branch_at_each_depth(truth_first, sampling, engine_of, planned, assert_same_output):
    """The right token among two or three siblings; below the wrong one the draft goes on, too."""
    engine = engine_of()
    at, width = [0], [2]

    def plan(place):
        if place.index != at[0]:
            return {place.guess: 50.0}
        # Within an e-fold, so that the entropy says branch; the order decides which node is which child.
        step = 0.05 if truth_first else -0.05
        return {(place.guess + i) % place.vocab_size: 50.0 - i * step for i in range(width[0])}

    heads = planned(engine, plan, exits=(2,))
    plain = heads.learn(PROMPT, max_new_tokens=NEW, **sampling)
    for at[0] in range(7):
        for width[0] in (2, 3):
            policy = every((2,), BRANCHING, branch=3, max_depth=6)
            out = engine.generate(PROMPT, policy=policy, max_new_tokens=NEW, **sampling)
            assert_same_output(out, plain)
            if at[0] < 6:
                first = out.exit_layers.index(None)
                assert first > at[0], "the branch holds the right token, so the round goes on below it"
                assert out.stats.num_drafted > out.stats.num_accepted


@pytest.mark.parametrize(
    ("length", "new"), [(1, 1), (15, 1), (15, 2), (15, 3), (4, 5), (4, 6)], ids=lambda value: str(value)
)
def test_the_budget_clips_the_draft(length, new, engine_of, planned, assert_same_output):
    engine = engine_of()
    plain = planned(engine, "right", exits=(2,)).learn(PROMPT, max_new_tokens=new)
    out = engine.generate(PROMPT, policy=fixed_exit(2, length), max_new_tokens=new)
    assert_same_output(out, plain)
    assert out.stats.num_drafted <= max(0, new - 1), "a token beyond the budget is never drafted"


# ---- arbitrary trees


@st.composite
def shapes(draw):
    """Parents of up to 15 nodes, and of each node whether its token is the right one and how far it was run."""
    count = draw(st.integers(0, 15))
    parents = [draw(st.integers(max(0, node - draw(st.integers(1, 6))), node - 1)) for node in range(1, count + 1)]
    is_right = [draw(st.booleans()) or draw(st.booleans()) for _ in parents]
    runs = draw(st.lists(st.tuples(st.integers(0, 15), st.integers(1, 4)), max_size=5))
    return parents, is_right, runs


def hang(row, truth, shape):
    """Grow one tree of this shape; `truth` are the plain tokens by position. Some nodes are run ahead, paths first."""
    parents, is_right, runs = shape
    tree, base = row.work.tree, row.work.base
    nodes = [0]
    for wanted, good in zip(parents, is_right, strict=True):
        parent = nodes[wanted]
        position = base + tree.depths[parent] + 1
        token = truth[position] if position < len(truth) else 0
        if not good:
            token = (token + 1 + len(tree)) % 199
        if tree.depths[parent] >= row.max_depth or tree.child(parent, token) is not None:
            nodes.append(parent)
            continue
        nodes.append(tree.add(parent, token, exit_layer=1, entropy=0.0))
    return runs


def draft_shapes(truths, shape_of_round):
    def draft(decoder, cache, rows, heads, policy, tiles, *rest):
        for row in rows:
            runs = hang(row, truths[row.work.sequence], shape_of_round())
            row.work.embed_new(decoder)
            for node, layer in runs:
                path = row.work.tree.path(min(node, len(row.work.tree) - 1))
                advance(decoder, cache, [(row.work, path)], layer, tiles)
        return [0] * len(rows)

    return draft


@pytest.mark.hazard(8, 23)
@pytest.mark.parametrize("family", ["llama3", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_any_tree_gives_the_plain_tokens(family, sampling, engine_of, planned, monkeypatch):
    """Draft, verify, accept and commit of random trees, against a brute-force plain decode."""
    engine = engine_of(family, torch.bfloat16)
    planned(engine, exits=(2,))
    prompts = [PROMPT, [9, 8, 7]]
    plain = engine.generate(prompts, seeds=[5, 6], speculation=False, max_new_tokens=NEW, **sampling)
    truths = [out.prompt_ids + out.token_ids for out in plain]
    accepted = 0

    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(st.lists(shapes(), min_size=1, max_size=4))
    def check(rounds):
        nonlocal accepted
        taken = iter(rounds * NEW * 2)
        monkeypatch.setattr(loop, "draft", draft_shapes(truths, lambda: next(taken)))
        outs = engine.generate(prompts, seeds=[5, 6], policy=fixed_exit(2, 15), max_new_tokens=NEW, **sampling)
        assert [out.token_ids for out in outs] == [out.token_ids for out in plain]
        accepted += sum(out.stats.num_accepted for out in outs)

    check()
    assert accepted > 50, "the trees should hold right paths"


@pytest.mark.hazard(24)
@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_batches_of_eight_with_ragged_acceptance(family, engine_of, planned, assert_same_output):
    engine = engine_of(family)
    heads = planned(engine)
    rng = random.Random(4)
    prompts = [[rng.randrange(199) for _ in range(rng.choice((1, 2, 30, 63, 64, 65)))] for _ in range(8)]
    options = {"max_new_tokens": 12, "temperature": 0.8, "logprobs": 1}
    plain = [heads.learn(ids, seed=seed, **options) for seed, ids in enumerate(prompts)]
    policy = every((1, 2, 3), BRANCHING, branch=2, max_depth=5)
    for size in (1, 3, 8):
        outs = engine.generate(prompts[:size], seeds=list(range(size)), policy=policy, **options)
        for out, expected in zip(outs, plain, strict=False):
            assert_same_output(out, expected)
        # Mates in another order, and none, change nothing either.
        outs = engine.generate(prompts[:size][::-1], seeds=list(range(size))[::-1], policy=policy, **options)
        for out, expected in zip(outs[::-1], plain, strict=False):
            assert_same_output(out, expected)


@pytest.mark.hazard(22)
@pytest.mark.parametrize("length", [3, 1100])
def test_acceptance_lives_at_long_contexts(length, engine_of, planned):
    """Heads that know what follows, where their hidden state is plain decoding's to the bit, are right at every
    position of the draft behind 1100 tokens as behind three, and statistics say so position by position."""
    engine = engine_of(max_context=1200)
    prompt = [(31 * i + 7) % 199 for i in range(length)]
    plain = planned(engine, "right", exits=(2,)).learn(prompt, max_new_tokens=22)
    out = engine.generate(prompt, policy=fixed_exit(2, 4), max_new_tokens=22)
    assert out.token_ids == plain.token_ids
    assert out.stats.drafted_by_position == out.stats.accepted_by_position
    assert len(out.stats.accepted_by_position) == 4 and out.stats.acceptance_rate == 1.0
