"""The target's draw: its law, its processors, and that a row is a function of itself alone.

Planted bugs seen to fail here: noise keyed by round, or by the place in a block, instead of by position (joint law);
penalties counted over the committed tokens only or over the whole block (hazards 10, 11); stop ids masked by the
root's depth; top-p that keeps one token too many; a filter computed over all rows at once; NaN taken for a token.
"""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skipstone.engine.sampling import (
    Context,
    History,
    NonFiniteLogits,
    NoTokenLeft,
    SamplingParams,
    TargetSampler,
    greedy_tokens,
    token_logprobs,
    tree_contexts,
)
from skipstone.engine.tree import DraftTree, accept
from skipstone.kernels.noise import MASK_32, _gumbel_from_words_, gumbel_noise, philox_reference

ALPHA = 1e-4


# ---- a model of a few tokens: logits are a fixed function of the last two tokens and the position


def toy_logits(prefix, vocab_size, dtype=torch.float32):
    generator = torch.Generator().manual_seed(hash((prefix[-1], prefix[-2] if len(prefix) > 1 else -1, len(prefix))))
    return (torch.randn(vocab_size, generator=generator) * 1.5).to(dtype)


def decode_plainly(params, prompt, vocab_size, num_tokens, dtype=torch.float32):
    sampler, history = TargetSampler(params, vocab_size), History(prompt)
    for _ in range(num_tokens):
        history.extend([sampler.target(toy_logits(history.token_ids, vocab_size, dtype), Context(history))])
    return history.token_ids[len(prompt) :]


def walk(sampler, tree, logits, history):
    """Acceptance as the engine does it: targets are drawn at the root and at accepted nodes only."""
    contexts = tree_contexts(tree, history)
    return accept(tree, lambda node: sampler.target(logits[node], contexts[node]))


def random_tree(rng, sampler, history, vocab_size, dtype):
    """A draft of any shape; half of its nodes are drawn from the target's own logits, so that many are accepted."""
    tree = DraftTree(history.token_ids[-1])
    for _ in range(rng.randrange(16)):
        parent = rng.randrange(len(tree))
        context = Context(history, tuple(tree.path_tokens(parent)))
        token = rng.randrange(vocab_size)
        if rng.random() < 0.7:
            token = sampler.candidates(toy_logits(context.prefix(), vocab_size, dtype), context)[0][0]
        if tree.child(parent, token) is None:
            tree.add(parent, token)
    return tree


def decode_by_trees(params, prompt, vocab_size, num_tokens, rng, dtype=torch.float32):
    sampler, history, num_accepted = TargetSampler(params, vocab_size), History(prompt), 0
    while history.num_new < num_tokens:
        tree = random_tree(rng, sampler, history, vocab_size, dtype)
        contexts = tree_contexts(tree, history)
        logits = torch.stack([toy_logits(context.prefix(), vocab_size, dtype) for context in contexts])
        verdict = walk(sampler, tree, logits, history)
        assert verdict == accept(tree, sampler.targets(logits, contexts))
        history.extend(verdict.committed)
        num_accepted += len(verdict.nodes)
    return history.token_ids[len(prompt) :][:num_tokens], num_accepted


def no_repeat_of_the_last_token(prefix, logits):
    logits[prefix[-1]] = -math.inf
    return logits


ALL_PARAMS = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top_k": {"temperature": 1.0, "top_k": 3},
    "top_p": {"temperature": 1.2, "top_p": 0.7},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "repetition": {"repetition_penalty": 1.6},
    "presence": {"presence_penalty": 0.9, "temperature": 0.7},
    "frequency": {"frequency_penalty": 0.6},
    "bias": {"logit_bias": {3: 4.0, 5: -math.inf}, "temperature": 1.0},
    "bad_words": {"bad_words": [[2], [3, 4], [1, 1, 6]], "temperature": 1.0},
    "min_new_tokens": {"min_new_tokens": 9, "stop_ids": [0, 1, 2, 3, 4]},
    "hook": {"logits_processor": no_repeat_of_the_last_token, "temperature": 0.5},
    "together": {
        "temperature": 0.9,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "logit_bias": {1: 0.5},
        "bad_words": [[4, 4]],
        "min_new_tokens": 5,
        "stop_ids": [2],
    },
}


@pytest.mark.hazard(10, 11)
@pytest.mark.parametrize("name", ALL_PARAMS)
def test_decoding_by_random_trees_equals_plain_decoding(name):
    rng, total = random.Random(1), 0
    for seed in range(6):
        for dtype in (torch.float32, torch.bfloat16):
            params = SamplingParams(seed=seed, max_new_tokens=30, **ALL_PARAMS[name])
            plain = decode_plainly(params, [seed, 3, 4], 11, 30, dtype)
            by_trees, num_accepted = decode_by_trees(params, [seed, 3, 4], 11, 30, rng, dtype)
            assert by_trees == plain
            total += num_accepted
    assert total > 60  # the draws above must have been accepted often enough to mean something


# ---- the joint law of three positions


def chi_square_p_value(counts, probs):
    expected = probs * counts.sum()
    assert expected.min() >= 5
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = torch.tensor((len(probs) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(degrees, statistic / 2).item()


LAW_VOCAB, LAW_SEEDS, LAW_PROMPT_LEN = 8, 60_000, 5


def law_logits():
    """First token's logits [V], second's given the first [V, V], third's given both [V, V, V]."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn((LAW_VOCAB,) * depth, generator=generator) * 0.5 for depth in (1, 2, 3)]


def joint_probs():
    first, second, third = (logits.double().softmax(-1) for logits in law_logits())
    return (first[:, None, None] * second[:, :, None] * third).flatten()


def noise_of_all_seeds(key_position):
    """[N, V] noise of seeds 0..N-1 at one position, all at once; `test_law_test_draws...` ties it to the sampler."""
    seeds, ids = torch.arange(LAW_SEEDS).unsqueeze(1), torch.arange(LAW_VOCAB)
    words = torch.stack(philox_reference((ids >> 2, key_position, 0, 0), (seeds & MASK_32, seeds >> 32)), dim=-1)
    lanes = (ids & 3).expand(LAW_SEEDS, LAW_VOCAB).unsqueeze(-1)
    return _gumbel_from_words_(words.gather(-1, lanes).squeeze(-1).to(torch.float32))


def joint_draws(keys):
    """[N, 3] tokens, with the noise of position i keyed by keys[i]."""
    first, second, third = law_logits()
    tokens = [(first + noise_of_all_seeds(keys[0])).argmax(-1)]
    tokens.append((second[tokens[0]] + noise_of_all_seeds(keys[1])).argmax(-1))
    tokens.append((third[tokens[0], tokens[1]] + noise_of_all_seeds(keys[2])).argmax(-1))
    return torch.stack(tokens, dim=1)


def joint_p_value(keys):
    draws = joint_draws(keys)
    cells = (draws[:, 0] * LAW_VOCAB + draws[:, 1]) * LAW_VOCAB + draws[:, 2]
    return chi_square_p_value(cells.bincount(minlength=LAW_VOCAB**3).double(), joint_probs())


@pytest.mark.hazard(25)
def test_joint_law_of_three_positions():
    assert joint_p_value([LAW_PROMPT_LEN + place for place in range(3)]) > ALPHA


@pytest.mark.hazard(25)
@pytest.mark.parametrize(
    "keys",
    [
        pytest.param([0, 0, 0], id="keyed by round, three tokens in one"),
        pytest.param([0, 0, 1], id="keyed by round, two tokens and one"),
        pytest.param([0, 1, 0], id="keyed by the place in a block of two"),
    ],
)
def test_joint_law_test_catches_noise_that_is_not_keyed_by_position(keys):
    assert joint_p_value(keys) < ALPHA


def test_law_test_draws_are_the_samplers():
    first, second, third = law_logits()
    expected = joint_draws([LAW_PROMPT_LEN + place for place in range(3)])
    for seed in range(200):
        sampler = TargetSampler(SamplingParams(temperature=1.0, seed=seed), LAW_VOCAB)
        history = History([0] * LAW_PROMPT_LEN)
        for place in range(3):
            a, b = (*expected[seed, :place].tolist(), 0, 0)[:2]
            logits = (first, second[a], third[a, b])[place]
            history.extend([sampler.target(logits, Context(history))])
        assert history.token_ids[LAW_PROMPT_LEN:] == expected[seed].tolist()


@pytest.mark.parametrize("filters", [{"top_k": 5}, {"top_p": 0.75}, {"min_p": 0.3, "temperature": 1.4}])
def test_law_of_a_filtered_draw(filters):
    """One position, V = 12, against the exact renormalised law; draws over positions of one seed."""
    params = SamplingParams(**{"temperature": 1.0, "seed": 9, **filters})
    logits = torch.randn(12, generator=torch.Generator().manual_seed(2))
    probs = (logits.double() / params.temperature).softmax(-1)
    order = probs.argsort(descending=True)
    kept = torch.ones(12, dtype=torch.bool)
    if params.top_k:
        kept[order[params.top_k :]] = False
    if params.top_p < 1:
        kept[order[probs[order].cumsum(0) - probs[order] >= params.top_p]] = False
    if params.min_p:
        kept &= probs >= params.min_p * probs.max()
    assert 2 < kept.sum() < 12
    sampler = TargetSampler(params, 12)
    scores = logits / params.temperature - logits.max() / params.temperature
    ids = sampler._kept_ids(scores)
    assert ids.tolist() == kept.nonzero().flatten().tolist()
    # The noise for N positions at once; the sampler's own draw is tied to it below.
    num_draws = 60_000
    words = torch.stack(philox_reference((ids >> 2, torch.arange(num_draws).unsqueeze(1), 0, 0), (9, 0)), dim=-1)
    lanes = (ids & 3).expand(num_draws, len(ids)).unsqueeze(-1)
    noise = _gumbel_from_words_(words.gather(-1, lanes).squeeze(-1).to(torch.float32))
    tokens = ids[(scores[ids] + noise).argmax(-1)]
    for position in range(1, 100):
        assert sampler.target(logits, Context(History([0] * position))) == tokens[position]
    counts = tokens.bincount(minlength=12)[kept].double()
    assert chi_square_p_value(counts, probs[kept] / probs[kept].sum()) > ALPHA


# ---- processors against transformers


def transformers_scores(params, prefix, prompt_len, logits):
    from transformers.generation import logits_process as hf

    steps = []
    if params.logit_bias:
        steps.append(hf.SequenceBiasLogitsProcessor({(key,): float(value) for key, value in params.logit_bias.items()}))
    if params.repetition_penalty != 1:
        steps.append(hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.bad_words:
        steps.append(hf.NoBadWordsLogitsProcessor([list(word) for word in params.bad_words]))
    if params.min_new_tokens:
        steps.append(
            hf.MinNewTokensLengthLogitsProcessor(prompt_len, params.min_new_tokens, list(params.stop_ids), device="cpu")
        )
    if params.temperature not in (0, 1):
        steps.append(hf.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(hf.MinPLogitsWarper(params.min_p))
    scores, ids = logits.float().unsqueeze(0), torch.tensor([prefix])
    for step in steps:
        scores = step(ids, scores)
    return scores[0]


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"logit_bias": {7: 3.0, 9: -2.0}, "repetition_penalty": 0.8},
        {"bad_words": [[4], [11, 12], [900, 11]], "temperature": 0.7},
        {"min_new_tokens": 3, "stop_ids": [0, 5], "max_new_tokens": 9},
        {"temperature": 0.6, "top_k": 40},
        {"temperature": 1.3, "top_p": 0.83},
        {"temperature": 1.0, "min_p": 0.07},
        {"temperature": 0.9, "top_k": 100, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("num_path", [0, 2, 4])
def test_processors_equal_transformers(options, num_path):
    params, vocab_size = SamplingParams(**options), 1000
    history = History([900, 11, 12, 13, 900])
    history.extend([11])
    context = Context(history, (11, 900, 11, 14)[:num_path])
    for trial in range(5):
        logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(trial)) * 3
        before = logits.clone()
        expected = transformers_scores(params, context.prefix(), history.prompt_len, logits)
        sampler = TargetSampler(params, vocab_size)
        got = sampler._process_(logits.clone(), context)
        if params.temperature:
            got = got / params.temperature
            kept = sampler._kept_ids(got - got.max())
            filtered = torch.full_like(got, -math.inf)
            filtered[slice(None) if kept is None else kept] = got[slice(None) if kept is None else kept]
            got = filtered
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
        target = sampler.target(logits, context)
        assert torch.equal(logits, before)  # the model's row is left alone
        assert expected[target] > -math.inf
        if params.is_greedy:
            assert target == int(expected.argmax())


@pytest.mark.hazard(11)
def test_presence_and_frequency_count_generated_tokens_of_the_own_path_only():
    history = History([1, 1, 2])
    history.extend([3, 4, 3])
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    got = TargetSampler(params, 6)._process_(torch.zeros(6), Context(history, (3, 5)))
    assert got.tolist() == [0, 0, 0, -0.5 - 3 * 0.25, -0.75, -0.75]
    # Another node of the same tree does not see that path.
    assert TargetSampler(params, 6)._process_(torch.zeros(6), Context(history))[5] == 0


@pytest.mark.parametrize("options", [{}, {"temperature": 0.01}, {"repetition_penalty": 1.01}])
def test_stop_ids_are_banned_by_the_nodes_own_depth(options):
    params = SamplingParams(min_new_tokens=3, stop_ids=[4, 5], **options)
    history = History([1])
    history.extend([1])
    logits = torch.arange(6.0)
    contexts = [Context(history, path) for path in ((), (1,), (1, 1), (2, 1, 1))]
    assert TargetSampler(params, 6).targets(logits.expand(4, 6), contexts) == [3, 3, 5, 5]


def test_top_p_boundary_and_ties():
    params = SamplingParams(temperature=1.0, top_p=0.5)
    flat = torch.zeros(8)
    assert TargetSampler(params, 8)._kept_ids(flat).tolist() == [0, 1, 2, 3]  # equal ones by rising id
    one = torch.tensor([-9.0, 0.0, -9.0, -9.0])
    assert TargetSampler(SamplingParams(temperature=1.0, top_p=1e-9), 4)._kept_ids(one).tolist() == [1]
    top_k = SamplingParams(temperature=1.0, top_k=2)
    tied = torch.tensor([-1.0, 0.0, -1.0, -1.0, -2.0])
    assert TargetSampler(top_k, 5)._kept_ids(tied).tolist() == [0, 1, 2, 3]  # ties with the second stay


# ---- a row is a function of itself


@pytest.mark.hazard(23, 24)
@pytest.mark.parametrize("vocab_size", [5, 1023, 1024, 1025, 49152, 50304])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_first_of_equal_logits_in_every_row(vocab_size, dtype):
    # Few distinct values, so that every row holds its maximum many times, in several blocks.
    logits = torch.randint(0, 40, (16, vocab_size), generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = [int((row == row.max()).nonzero()[0]) for row in logits]
    assert greedy_tokens(logits) == expected
    assert [greedy_tokens(row.unsqueeze(0))[0] for row in logits] == expected
    wide = torch.randn(16, 2 * vocab_size).to(dtype)
    wide[:, 3 : 3 + vocab_size] = logits
    assert greedy_tokens(wide[:, 3 : 3 + vocab_size]) == expected  # strided, unaligned


@pytest.mark.hazard(23, 24)
@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "together"])
def test_targets_of_many_rows_equal_each_row_alone_wherever_it_stands(name):
    vocab_size = 49152
    sampler = TargetSampler(SamplingParams(**ALL_PARAMS[name]), vocab_size)
    logits = torch.randn(6, vocab_size, generator=torch.Generator().manual_seed(3)) * 2
    history = History([5, 6, 7])
    contexts = [Context(history, tuple(range(depth))) for depth in range(6)]
    together = sampler.targets(logits, contexts)
    assert together == [
        TargetSampler(SamplingParams(**ALL_PARAMS[name]), vocab_size).target(row.clone(), context)
        for row, context in zip(logits, contexts, strict=True)
    ]
    assert together[::-1] == sampler.targets(logits.flip(0), contexts[::-1])
    shifted = torch.empty(6 * vocab_size + 1)[1:].view(6, vocab_size).copy_(logits)
    assert together == sampler.targets(shifted, contexts)
    if not sampler.params.has_processors:  # those bits are compared too, not only the argmax
        for row in logits:
            scores = row - row.max()
            kept = sampler._kept_ids(scores)
            again = sampler._kept_ids(torch.empty(vocab_size + 1)[1:].copy_(scores))
            assert kept is again is None or torch.equal(kept, again)


@pytest.mark.hazard(12)
def test_logprobs_are_those_of_the_raw_row_alone():
    logits = torch.randn(16, 49152, generator=torch.Generator().manual_seed(4))
    for row in logits:
        got = token_logprobs(row, 17, num_top=4)
        exact = row.double().log_softmax(-1)
        assert abs(got.logprob - exact[17].item()) < 1e-5
        assert [token for token, _ in got.top] == exact.topk(4).indices.tolist()
        assert got == token_logprobs(row.clone(), 17, num_top=4)
        offset = torch.empty(49153)[1:].copy_(row)
        assert got == token_logprobs(offset, 17, num_top=4)
    tied = token_logprobs(torch.zeros(5), 4, num_top=2)
    assert [token for token, _ in tied.top] == [0, 1]
    assert token_logprobs(torch.zeros(3), 0, num_top=9).top[2][0] == 2
    assert token_logprobs(torch.zeros(4), 1).top == ()


# ---- drafts


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(sorted(ALL_PARAMS)), seed=st.integers(0, 2**64 - 1), trial=st.integers(0, 100))
def test_a_draft_with_the_targets_logits_draws_the_targets_token(name, seed, trial):
    params = SamplingParams(seed=seed, **ALL_PARAMS[name])
    sampler, history = TargetSampler(params, 40), History([1, 2, 3, trial % 40])
    logits = torch.randn(40, generator=torch.Generator().manual_seed(trial)) * 2
    context = Context(history, (4, 7))
    target = sampler.target(logits, context)
    assert TargetSampler(params, 40).candidates(logits, context)[0][0] == target
    # A draft vocabulary that holds every likely token changes nothing.
    rare = {int(token) for token in logits.argsort()[:5]}
    ids = torch.tensor([token for token in range(40) if token not in rare])
    masked = logits.clone()
    masked[list(rare)] = -math.inf
    assert sampler.candidates(logits[ids], context, ids)[0][0] == sampler.target(masked, context)


@pytest.mark.parametrize("name", ["greedy", "temperature", "top_k", "bias"])
def test_siblings_are_distinct_and_the_drawn_token_comes_first(name):
    sampler = TargetSampler(SamplingParams(**ALL_PARAMS[name]), 40)
    logits = torch.randn(40, generator=torch.Generator().manual_seed(8)) * 2
    context = Context(History([1, 2, 3]))
    for count in (1, 2, 4, 99):
        tokens, log_probs = zip(*sampler.candidates(logits, context, count=count), strict=True)
        assert list(log_probs) == sorted(log_probs, reverse=True) and sum(map(math.exp, log_probs)) < 1.001
        assert tokens[0] == sampler.target(logits, context)
        assert len(set(tokens)) == len(tokens)
        assert len(tokens) == min(count, {"top_k": 3, "bias": 39}.get(name, 40))


def test_noise_is_kept_for_a_round_and_the_oldest_position_goes_first():
    sampler = TargetSampler(SamplingParams(temperature=1.0, seed=3), 16)
    for position in range(100):
        assert torch.equal(sampler._noise_row(position), gumbel_noise(3, position, 16))
    assert len(sampler._noise) <= 32
    assert sampler._noise_row(99) is sampler._noise_row(99)


# ---- faults


@pytest.mark.hazard(14)
@pytest.mark.parametrize("name", ["greedy", "temperature", "top_p", "repetition", "hook"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("place", [0, 1500, 2047])
def test_non_finite_rows(name, bad, place):
    vocab_size = 2048
    sampler = TargetSampler(SamplingParams(**ALL_PARAMS[name]), vocab_size)
    logits = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(6))
    clean = sampler.targets(logits, contexts := [Context(History([1, 2]))] * 3)
    logits[1, place] = bad
    if bad == -math.inf:  # one -inf is a banned token, a whole row of them is a fault
        assert sampler.FAILED not in sampler.targets(logits, contexts)
        logits[1] = bad
    got = sampler.targets(logits, contexts)
    assert got == [clean[0], sampler.FAILED, clean[2]]
    for count in (1, 3):
        assert sampler.candidates(logits[1], contexts[1], count=count) == []
        assert sampler.candidates(logits[1], contexts[1], torch.arange(vocab_size), count) == []
    with pytest.raises(NonFiniteLogits, match="position 2") as raised:
        sampler.target(logits[1], contexts[1])
    assert raised.value.position == 2
    # In a tree the row counts only if the accepted path reaches it.
    tree = DraftTree.from_lists([2, (clean[0] + 1) % vocab_size], [-1, 0])
    assert walk(sampler, tree, logits[:2], History([1, 2])).committed == (clean[0],)
    tree = DraftTree.from_lists([2, clean[0]], [-1, 0])
    with pytest.raises(NonFiniteLogits, match="position 3"):
        walk(sampler, tree, logits[:2], History([1, 2]))


def test_processors_that_leave_nothing_and_broken_hooks():
    context = Context(History([1]))
    with pytest.raises(NoTokenLeft, match="position 1"):
        TargetSampler(SamplingParams(logit_bias=dict.fromkeys(range(4), -math.inf)), 4).target(torch.zeros(4), context)
    nan_hook = SamplingParams(logits_processor=lambda prefix, logits: logits * math.nan)
    with pytest.raises(NoTokenLeft):
        TargetSampler(nan_hook, 4).target(torch.zeros(4), context)
    short_hook = SamplingParams(logits_processor=lambda prefix, logits: logits[:2])
    with pytest.raises(ValueError, match=r"returned \(2,\), expected a tensor of shape \(4,\)"):
        TargetSampler(short_hook, 4).target(torch.zeros(4), context)


def test_a_hook_sees_only_prefixes_that_plain_decoding_would_show_it():
    seen = []

    def hook(prefix, logits):
        seen.append(tuple(prefix))
        return logits

    sampler, history = TargetSampler(SamplingParams(logits_processor=hook), 4), History([9, 1])
    logits = torch.eye(4)[[2, 3, 0, 1]]
    tree = DraftTree.from_lists([1, 2, 0, 3], [-1, 0, 0, 2])
    assert walk(sampler, tree, logits, history).committed == (2, 3)
    assert seen == [(9, 1), (9, 1, 2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"presence_penalty": math.inf}, "presence_penalty is inf"),
        ({"frequency_penalty": None}, "frequency_penalty is None"),
        ({"logit_bias": {3: math.nan}}, r"logit_bias\[3\] is nan"),
        ({"logit_bias": {3: math.inf}}, r"logit_bias\[3\] is inf"),
        ({"logit_bias": [1]}, "logit_bias is"),
        ({"bad_words": [[]]}, "a bad word is"),
        ({"bad_words": [3]}, "a bad word is 3"),
        ({"min_new_tokens": 200}, r"min_new_tokens is 200, expected 0 to max_new_tokens \(128\)"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"stop_ids": [-2]}, "stop_ids is"),
        ({"stop": "end"}, "stop is 'end'"),
        ({"stop": [""]}, "stop is"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"seed": 2**64}, "seed is"),
        ({"seed": True}, "seed is True"),
    ],
)
def test_wrong_parameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


def test_ids_outside_the_vocabulary_are_refused_and_lists_are_copied():
    with pytest.raises(ValueError, match="token id 12 .* below vocab_size 10"):
        TargetSampler(SamplingParams(stop_ids=[12]), 10)
    words = [[1, 2]]
    params = SamplingParams(bad_words=words)
    words[0].append(3)
    assert params.bad_words == ((1, 2),)
    with pytest.raises(ValueError, match="2 contexts given for 1 rows"):
        TargetSampler(params, 10).targets(torch.zeros(1, 10), [Context(History([1]))] * 2)
