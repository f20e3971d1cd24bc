"""Speculative output equals plain output where every sequence skips neurons of its own (verify="tda").

Regimes: every family, gated and plain MLPs, with biases, post-norms and parallel residuals; fp32 and bf16; greedy and
T = 0.8; chains and gated trees of planned heads (mostly right, sometimes wrong, of two minds or NaN); a batch of three
whose prompts keep other neurons, one of them too short for a mask, each row against its solo plain run; masks read once
and read again inside the output; heads with a memory; everything committed compared bit for bit.

Planted bugs seen to fail here: the union of a batch's masks; drafts on the whole model whose rows verification goes
on from; a round that runs past a refresh; a refresh that counts from the round's start.
"""

import pytest
import torch
from skipstone.engine import forward, loop
from skipstone.engine.gate import Gate, best_first, every, fixed_exit
from skipstone.engine.sparsity.neurons import ReducedMlp
from skipstone.engine.sparsity.selection import Griffin, MaskOptions, keep
from skipstone.engine.sparsity.target import SparseTarget
from skipstone.engine.sparsity.tda import Tda, measure_curves

LENGTHS = (23, 61, 3)  # the third is shorter than a mask's least prompt
NEW = 14
SAMPLED = {"temperature": 0.8, "top_k": 40, "top_p": 0.95}
POLICIES = {
    "chain": fixed_exit(2, 6),
    "trees": every((1, 2, 3), Gate(0.3, 1.5), branch=3, max_depth=6),
}
ONCE = MaskOptions(first_dense=1, min_tokens=8, round_to=4)
AGAIN = MaskOptions(first_dense=1, min_tokens=8, round_to=4, refresh=6)


def prompts(vocab_size, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture
def sparse():
    """`sparse(engine, options)` -> prompts, whose masks differ; the engine skips by TDA from then on."""

    def build(engine, options=ONCE, selection=None):
        decoder = engine.decoder
        given = prompts(decoder.config.vocab_size)
        if selection is None:
            with torch.inference_mode():
                curves = measure_curves(decoder, torch.tensor([given[1][:20], given[0][:20]]))
            selection = Tda(curves.thresholds(0.3), cett=0.3, options=options)
        engine.sparse = SparseTarget(decoder, selection)
        return given

    return build


def masks(engine, count=3):
    """What each sequence of the last batch keeps, by layer."""
    return [
        {i: kept.tolist() for i, kept in engine.sparse.kept(engine.sparse._watches[s]).items()} for s in range(count)
    ]


@pytest.mark.hazard(6, 23, 24)
@pytest.mark.parametrize(("sampling", "options"), [({}, ONCE), (SAMPLED, AGAIN)], ids=["greedy", "sampled-refreshed"])
def test_batches_of_chains_and_trees_equal_solo_plain(family, options, sampling, engine_of, planned, sparse, runs):
    engine = engine_of(family)
    given = sparse(engine, options)
    heads = planned(engine)
    expected = runs.solo(engine, heads, given, sampling)
    assert runs.differing(engine, given, expected, sampling) == set()
    drafted = engine.generate(given, seeds=[0, 1, 2], policy=POLICIES["chain"], max_new_tokens=NEW, **sampling)
    assert sum(out.stats.num_accepted for out in drafted) >= 8, "the heads should often be right"
    kept = masks(engine)
    assert kept[0] != kept[1] and (options is AGAIN or kept[2] == {})
    together = runs.observe(engine, given, seeds=list(range(len(given))), speculation=False, **sampling)
    assert [own[:3] for own in together] == [own[:3] for own in expected]


@pytest.mark.parametrize("family", ["llama_linear", "gemma2", "gpt_neox"])
def test_in_bfloat16(family, engine_of, planned, sparse, runs):
    engine = engine_of(family, torch.bfloat16)
    given = sparse(engine, AGAIN)
    assert runs.differing(engine, given, runs.solo(engine, planned(engine), given, SAMPLED), SAMPLED) == set()


@pytest.mark.parametrize("policy", [fixed_exit(0, 4), best_first(4, 3, 4)], ids=["chain", "best_first"])
def test_a_head_with_memory(policy, engine_of, stateful, sparse, runs):
    engine = engine_of("llama2")
    given = sparse(engine, AGAIN)
    expected = runs.solo(engine, None, given, {})
    stateful(engine, "recurrent", prompts=given)
    assert runs.differing(engine, given, expected, {}, {"recurrent": policy}) == set()


def test_griffin_too(engine_of, planned, sparse, runs):
    engine = engine_of("llama2")
    given = sparse(engine, selection=Griffin(0.5, ONCE))
    assert runs.differing(engine, given, runs.solo(engine, planned(engine), given, {}), {}) == set()
    assert engine.generate(given[0], max_new_tokens=2).verify == "griffin"


def test_the_target_is_another_model_than_the_whole_one(engine_of, sparse):
    engine = engine_of("llama2")
    given = sparse(engine)
    sparse_text = engine.generate(given[1], max_new_tokens=NEW)
    assert sparse_text.verify == "tda" and all(0 < d <= 1 for d in engine.sparse.density(0))
    engine.sparse = None
    assert engine.generate(given[1], max_new_tokens=NEW).token_ids != sparse_text.token_ids


def test_a_mask_does_not_outlive_its_sequence(engine_of, sparse):
    engine = engine_of("llama2")
    given = sparse(engine)
    target, engine.sparse = engine.sparse, None
    dense = engine.generate(given[1], max_new_tokens=NEW).token_ids
    engine.sparse = target
    engine.generate(given, max_new_tokens=NEW)
    assert engine.generate(given[2], max_new_tokens=NEW, speculation=False) is not None
    assert engine.workspace.cache.mlps[0] == {}, "a prompt too short for a mask must not inherit one"
    engine.sparse = None
    assert engine.generate(given[1], max_new_tokens=NEW).token_ids == dense


def test_a_refresh_reads_all_tokens_so_far(engine_of, sparse):
    """The masks at the end are those of the committed text up to the last multiple, read densely in one go."""
    engine = engine_of("llama2")
    given = sparse(engine, AGAIN)
    out = engine.generate(given[0], max_new_tokens=NEW)
    before_last = len(given[0]) + NEW - 2  # committed when the last round began
    text = (out.prompt_ids + out.token_ids)[: before_last // AGAIN.refresh * AGAIN.refresh]
    after = masks(engine, 1)
    engine.generate([*text, 0], max_new_tokens=1)
    assert masks(engine, 1) == after


def test_early_exit_refuses_a_refresh(engine_of, planned, sparse):
    engine = engine_of("llama2")
    given = sparse(engine, AGAIN)
    planned(engine)
    with pytest.raises(ValueError, match="refresh=0"):
        engine.generate(given[0], mode="early_exit", policy=fixed_exit(2, 4), max_new_tokens=4)


# ---- planted bugs


@pytest.fixture
def setting(engine_of, planned, sparse, runs):
    engine = engine_of("llama2")
    given = sparse(engine)
    return engine, given, runs.solo(engine, planned(engine), given, {})


@pytest.mark.hazard(24)
def test_a_union_of_masks_is_caught(setting, monkeypatch, runs):
    """All sequences of a batch run what any of them keeps."""
    engine, given, expected = setting
    original = loop.read_prompts

    def read_prompts(on, requests):
        original(on, requests)
        kept = [on.sparse.kept(on.sparse._watches[request.sequence]) for request in requests]
        for layer in sorted({layer for own in kept for layer in own}):
            union = torch.cat([own[layer] for own in kept if layer in own]).unique()
            for request in requests:
                own = {**on.cache.mlps[request.sequence], layer: ReducedMlp(on.decoder, layer, union)}
                on.cache.mlps[request.sequence] = own

    monkeypatch.setattr(loop, "read_prompts", read_prompts)
    assert runs.differing(engine, given, expected, {}) == set(POLICIES)
    assert runs.observe(engine, given[:1], seeds=[0], speculation=False)[0][:3] == expected[0][:3], (
        "alone nothing differs"
    )


def test_drafts_on_the_whole_model_are_caught(setting, monkeypatch, runs):
    """Verification goes on from a draft's rows, so these must be the target's."""
    engine, given, expected = setting
    own_mlps, draft, drafting = forward._own_mlps, loop.draft, [False]

    def dense_draft(*args):
        drafting[0] = True
        try:
            return draft(*args)
        finally:
            drafting[0] = False

    monkeypatch.setattr(loop, "draft", dense_draft)
    monkeypatch.setattr(forward, "_own_mlps", lambda *args: None if drafting[0] else own_mlps(*args))
    assert runs.differing(engine, given, expected, {}) == set(POLICIES)


@pytest.mark.parametrize("bug", ["unclipped", "by round"])
def test_a_refresh_that_depends_on_rounds_is_caught(bug, engine_of, planned, sparse, monkeypatch, runs):
    engine = engine_of("llama2")
    given = sparse(engine, AGAIN)
    expected = runs.solo(engine, planned(engine, "right"), given, {})
    monkeypatch.setattr(SparseTarget, "clip", lambda target, row: row)
    original = SparseTarget.next_refresh
    bugs = {
        # Rounds step over the position, and the text is read where they land.
        "unclipped": lambda target, i: max(original(target, i), engine.workspace.cache.lens[i]),
        "by round": lambda target, i: engine.workspace.cache.lens[i],
    }
    monkeypatch.setattr(SparseTarget, "next_refresh", bugs[bug])
    assert runs.differing(engine, given, expected, {})


def test_keeping_the_next_strongest():
    """Rounded up, ties to the lowest neuron, at least one step, at most all; neurons that were NaN are kept."""
    tda = Tda(torch.tensor([2.0]), cett=0.2, options=MaskOptions(round_to=4))
    norms = torch.ones(10)
    strengths = torch.tensor([3.0, 1, 1, 0, 0, 9, 1, 0, 0, torch.nan])
    assert keep(tda, 0, strengths.square(), 1, norms).tolist() == [0, 1, 5, 9]
    assert keep(tda, 0, torch.zeros(10), 1, norms).tolist() == [0, 1, 2, 3]
    assert len(keep(tda, 0, torch.full((10,), 99.0), 1, norms)) == 10
