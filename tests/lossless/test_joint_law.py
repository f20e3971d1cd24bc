"""The law of what is written: three tokens, exactly, against the plain model (hazard 25).

Vocabulary 12, T = 0.8. The model's 157 conditional distributions over the first three new tokens are read from the
plain engine, their product is the exact joint law. Draws come from the real `candidates`, `Gate`, `DraftTree`,
`accept_block` and noise, with those logits in place of the forward pass; a test ties them to the engine's own draws
seed by seed. The draft's distribution is another than the target's, so that drafts are accepted about half of the time.

Planted bugs seen to fail here: noise keyed by round; every draft accepted.
"""

from types import SimpleNamespace

import pytest
import torch
from skipstone.engine import loop
from skipstone.engine.draft import entropy
from skipstone.engine.gate import ALWAYS, NEVER, Gate, every
from skipstone.engine.sampling import Context, History, SamplingParams, TargetSampler
from skipstone.engine.tree import Acceptance, DraftTree
from skipstone.kernels.noise import _gumbel_from_words_, gumbel_noise, philox_reference

VOCAB = 12
PROMPT = [1, 7]
PLACES = 3
DRAWS = 50_000
ALPHA = 1e-4
PARAMS = SamplingParams(temperature=0.8)
# The draft's entropies are 0 to 2.0, 1.18 before the first token: "partial" branches there and often stops after it.
GATES = {"none": NEVER, "partial": Gate(0.5, 1.2), "full": ALWAYS}


@pytest.fixture(scope="module")
def engine(engine_of):
    return engine_of("llama2", vocab_size=VOCAB)


@pytest.fixture(scope="module")
def target_logits(engine):
    """new tokens so far -> raw logits [V] of the plain engine."""
    table = {}
    for first in range(VOCAB):
        for second in range(VOCAB):

            def forced(prefix, logits, path=(first, second, 0)):
                new = tuple(prefix[len(PROMPT) :])
                table[new] = logits.clone()
                return torch.nn.functional.one_hot(torch.tensor(path[len(new)]), VOCAB) * 50.0

            engine.generate(PROMPT, speculation=False, max_new_tokens=PLACES, logits_processor=forced)
    assert len(table) == 1 + VOCAB + VOCAB**2
    return table


@pytest.fixture(scope="module")
def draft_logits(target_logits):
    """A draft that is near the target and has its own opinions, sharp and flat in turn."""
    generator = torch.Generator().manual_seed(1)
    return {
        new: (logits + 1.5 * torch.randn(VOCAB, generator=generator)) * (0.5 + 2.0 * torch.rand(1, generator=generator))
        for new, logits in target_logits.items()
    }


@pytest.fixture(scope="module")
def noise():
    """Gumbel noise [draw, place, V] of seeds 0, 1, ...: bit for bit what a sampler computes for itself."""
    ids, places = torch.arange(VOCAB), torch.arange(len(PROMPT), len(PROMPT) + PLACES).view(1, -1, 1)
    words = philox_reference((ids >> 2, places, 0, 0), (torch.arange(DRAWS).view(-1, 1, 1), 0))
    words = torch.stack([word.expand(DRAWS, PLACES, VOCAB) for word in words], -1)
    lanes = (ids & 3).expand(DRAWS, PLACES, VOCAB).unsqueeze(-1)
    noise = _gumbel_from_words_(words.gather(-1, lanes).squeeze(-1).to(torch.float32))
    for seed in (0, 1, DRAWS - 1):
        for place in range(PLACES):
            assert torch.equal(noise[seed, place], gumbel_noise(seed, len(PROMPT) + place, VOCAB))
    return noise


@pytest.fixture(scope="module")
def law(target_logits):
    probs = {new: (logits.double() / PARAMS.temperature).softmax(-1) for new, logits in target_logits.items()}
    second = torch.stack([probs[a,] for a in range(VOCAB)])
    third = torch.stack([probs[a, b] for a in range(VOCAB) for b in range(VOCAB)]).view(VOCAB, VOCAB, VOCAB)
    return (probs[()].view(-1, 1, 1) * second.unsqueeze(-1) * third).flatten()


def write(sampler, noise, gate, target_logits, draft_logits):
    """Three tokens of one seed, in rounds: draft by the gate, verify, accept. Returns them and the accepted drafts."""
    sampler._noise = dict(enumerate(noise, len(PROMPT)))  # as the sampler itself fills it
    request = SimpleNamespace(history=History(PROMPT), sampler=sampler)
    num_accepted = 0
    while (start := request.history.num_new) < PLACES:
        tree = DraftTree(request.history.token_ids[-1])
        new = tuple(request.history.token_ids[len(PROMPT) :])
        frontier = [0]
        for _ in range(PLACES - start - 1):
            grown = []
            for node in frontier:
                path = tuple(tree.path_tokens(node))
                logits, uncertainty = draft_logits[(*new, *path)]
                width = gate.width(uncertainty, 2)
                context = Context(request.history, path)
                for token, _ in sampler.candidates(logits, context, None, width) if width else ():
                    grown.append(tree.add(node, token))
            frontier = grown
        logits = [target_logits[(*new, *tree.path_tokens(node))] for node in range(len(tree))]
        block = loop.accept_block(request, tree, logits)
        request.history.extend(block.tokens)
        num_accepted += len(block.acceptance.nodes)
    return request.history.token_ids[len(PROMPT) : len(PROMPT) + PLACES], num_accepted


def draws(count, gate, noise, target_logits, draft_logits):
    draft = {new: (logits, float(entropy(logits.unsqueeze(0)))) for new, logits in draft_logits.items()}
    sampler = TargetSampler(PARAMS, VOCAB)
    with torch.inference_mode():
        drawn = [write(sampler, rows, gate, target_logits, draft) for rows in noise[:count]]
    return torch.tensor([tokens for tokens, _ in drawn]), sum(accepted for _, accepted in drawn)


def p_value(tokens, law):
    """Of Pearson's chi-square; cells that expect fewer than five draws are one cell."""
    cells = (tokens[:, 0] * VOCAB + tokens[:, 1]) * VOCAB + tokens[:, 2]
    counts, expected = cells.bincount(minlength=len(law)).double(), law * len(tokens)
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum().view(1)])
    expected = torch.cat([expected[~rare], expected[rare].sum().view(1)])
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


@pytest.mark.hazard(25)
@pytest.mark.parametrize("gate", GATES)
def test_three_tokens_have_the_plain_models_joint_law(gate, noise, target_logits, draft_logits, law):
    tokens, accepted = draws(DRAWS, GATES[gate], noise, target_logits, draft_logits)
    assert p_value(tokens, law) > ALPHA
    most = 2 * DRAWS  # of three tokens two can be drafted
    low, high = {"none": (0, 0), "partial": (0.1, 0.9), "full": (0.3, 0.9)}[gate]
    assert low <= accepted / most <= high, "drafts should be accepted and rejected"


@pytest.mark.hazard(25)
@pytest.mark.parametrize("gate", GATES)
def test_the_draws_are_the_engines(gate, engine, noise, target_logits, draft_logits, planned):
    heads = planned(engine)
    tokens, _ = draws(60, GATES[gate], noise, target_logits, draft_logits)
    options = {"max_new_tokens": PLACES, "temperature": PARAMS.temperature}
    for seed, expected in enumerate(tokens.tolist()):
        plain = heads.learn(PROMPT, seed=seed, **options)
        out = engine.generate(PROMPT, seed=seed, policy=every((1, 2, 3), Gate(0.3, 1.5), branch=2), **options)
        assert plain.token_ids == out.token_ids == expected


@pytest.mark.hazard(25)
def test_noise_keyed_by_round_fails_the_law(noise, target_logits, draft_logits, law, monkeypatch):
    monkeypatch.setattr(Context, "position", property(lambda context: len(context.history)))
    tokens, _ = draws(8000, ALWAYS, noise, target_logits, draft_logits)
    assert p_value(tokens, law) < ALPHA


@pytest.mark.hazard(15, 25)
def test_accepting_everything_fails_the_law(noise, target_logits, draft_logits, law, monkeypatch):
    def accept_all(tree, target):
        nodes = [0]
        while children := tree.children(nodes[-1]):
            nodes.append(children[0])
        return Acceptance(tuple(nodes[1:]), tuple(tree.tokens[node] for node in nodes[1:]), target(nodes[-1]))

    monkeypatch.setattr(loop, "accept", accept_all)
    tokens, _ = draws(8000, ALWAYS, noise, target_logits, draft_logits)
    assert p_value(tokens, law) < ALPHA
