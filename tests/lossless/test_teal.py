"""Drafts that drop inputs change nothing; a target that drops inputs is a model of its own, plain and speculative.

Regimes: every family in fp32, two in bf16; greedy and T = 0.8 in turn; chains and gated trees of planned heads, a block
head with a memory; a batch of three against each prompt's solo plain run, everything committed compared bit for bit; a
prompt shorter than the tokens that stay dense; drafts that drop inputs under a target that skips neurons.

Planned heads look hidden states up. Under draft="teal" they know those of a pending token (its context is the
target's), not those of a draft's child, whose context is the draft's own: so chains are right once and then wrong.

Planted bugs seen to fail here: verification that goes on from thinned-out layers, or from the residual streams that
they left; keys that a thinned-out draft leaves at the root; one mask for all rows of a tile.
"""

import pytest
import torch
from skipstone.engine import loop
from skipstone.engine.forward import Working
from skipstone.engine.gate import Gate, every, fixed_exit
from skipstone.engine.sparsity import thresholded
from skipstone.engine.sparsity.selection import Griffin, MaskOptions
from skipstone.engine.sparsity.target import SparseTarget
from skipstone.engine.sparsity.teal import calibrate_teal

LENGTHS = (23, 61, 3)
NEW = 12
SAMPLED = {"temperature": 0.8, "top_k": 40, "top_p": 0.95}
POLICIES = {"chain": fixed_exit(2, 4), "trees": every((1, 2, 3), Gate(0.3, 1.5), branch=3, max_depth=5)}


@pytest.fixture
def thin():
    """`thin(engine, level)` -> prompts, and thresholds at that level found on them."""

    def build(engine, level=0.5):
        vocab_size = engine.decoder.config.vocab_size
        generator = torch.Generator().manual_seed(3)
        given = [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]
        texts = torch.tensor([given[1][:20], given[0][:20]])
        return given, calibrate_teal(engine.decoder, texts, levels=(level,), allocation="uniform").at(level)

    return build


def accepted(engine, given, sampling):
    outs = engine.generate(given, seeds=[0, 1, 2], policy=POLICIES["chain"], max_new_tokens=NEW, **sampling)
    return sum(out.stats.num_accepted for out in outs)


# ---- drafts that drop inputs


@pytest.mark.hazard(6, 23, 24)
def test_thinned_out_drafts_change_nothing(family, families, engine_of, planned, thin, runs):
    engine, sampling = engine_of(family), SAMPLED if families.index(family) % 2 else {}
    heads = planned(engine)
    given, level = thin(engine)
    expected = runs.solo(engine, None, given, sampling)
    engine.drop_inputs(draft=level)
    assert runs.solo(engine, heads, given, sampling)[0][:3] == expected[0][:3]
    assert (engine.verify, engine.draft) == ("dense", "teal 0.5")
    assert runs.differing(engine, given, expected, sampling) == set()
    assert accepted(engine, given, sampling) >= 4, "the heads should be right now and then"


@pytest.mark.parametrize("family", ["llama_linear", "gpt_neox"])
def test_in_bfloat16(family, engine_of, planned, thin, runs):
    engine = engine_of(family, torch.bfloat16)
    heads = planned(engine)
    given, level = thin(engine)
    expected = runs.solo(engine, heads, given, SAMPLED)
    engine.drop_inputs(draft=level)
    assert runs.differing(engine, given, expected, SAMPLED) == set()
    engine.drop_inputs(verify=level)
    assert runs.differing(engine, given, runs.solo(engine, heads, given, SAMPLED), SAMPLED) == set()


def test_a_head_with_memory(engine_of, stateful, thin, runs):
    engine = engine_of("llama2")
    given, level = thin(engine)
    expected = runs.solo(engine, None, given, {})
    stateful(engine, "recurrent", "block", prompts=given)
    engine.drop_inputs(draft=level)
    policies = {"block": fixed_exit(2, 4), "recurrent": fixed_exit(0, 4), "both": every((0, 2), Gate(0.5, 0.5))}
    assert runs.differing(engine, given, expected, {}, policies) == set()


def test_under_a_target_that_skips_neurons(engine_of, planned, thin, runs):
    engine = engine_of("llama2")
    heads = planned(engine)
    given, level = thin(engine)
    engine.sparse = SparseTarget(engine.decoder, Griffin(0.5, MaskOptions(first_dense=1, min_tokens=8, round_to=4)))
    expected = runs.solo(engine, None, given, {})
    engine.drop_inputs(draft=level)
    runs.solo(engine, heads, given, {})
    assert (engine.verify, engine.draft) == ("griffin", "teal 0.5")
    assert runs.differing(engine, given, expected, {}) == set()
    assert accepted(engine, given, {}) >= 4


def test_layers_that_drafted_are_counted(engine_of, planned, thin):
    """Verification runs all layers of all nodes; drafting came on top."""
    engine = engine_of("llama2")
    heads = planned(engine)
    given, level = thin(engine)
    heads.learn(given[0], max_new_tokens=NEW)
    dense = engine.generate(given[0], policy=POLICIES["chain"], max_new_tokens=NEW).stats
    layers = engine.decoder.config.num_layers
    assert dense.num_row_layers == layers * (dense.num_verifications + dense.num_drafted)
    engine.drop_inputs(draft=level)
    thinned = engine.generate(given[0], policy=POLICIES["chain"], max_new_tokens=NEW).stats
    all_layers = layers * (thinned.num_verifications + thinned.num_drafted)
    # At exit 2 every node but the last of a chain was asked.
    assert all_layers < thinned.num_row_layers <= all_layers + 2 * (thinned.num_verifications + thinned.num_drafted)


# ---- a target that drops inputs


@pytest.mark.hazard(6, 23, 24)
@pytest.mark.parametrize(
    ("family", "sampling"), [("llama_linear", {}), ("gemma2", SAMPLED), ("gpt_neox", {}), ("qwen3", SAMPLED)]
)
def test_the_thinned_out_model_speculates_as_it_decodes(family, sampling, engine_of, planned, thin, runs):
    engine = engine_of(family)
    heads = planned(engine)
    given, level = thin(engine)
    dense = runs.solo(engine, None, given, sampling)
    engine.drop_inputs(verify=level)
    expected = runs.solo(engine, heads, given, sampling)
    assert runs.differing(engine, given, expected, sampling) == set()
    assert accepted(engine, given, sampling) >= 8
    assert [own[0] for own in expected] != [own[0] for own in dense], "the thresholds should matter"
    together = runs.observe(engine, given, seeds=[0, 1, 2], speculation=False, **sampling)
    assert [own[:3] for own in together] == [own[:3] for own in expected]
    out = engine.generate(given[0], max_new_tokens=2)
    assert out.verify == engine.draft == "teal 0.5"


def test_prompts_are_read_densely(engine_of, thin, runs):
    """Keys of a prompt are those of the whole model; the pending token's are not."""
    engine = engine_of("llama2")
    given, level = thin(engine)
    (dense,) = runs.observe(engine, given[:1])
    engine.drop_inputs(verify=level)
    (own,) = runs.observe(engine, given[:1])
    read = len(given[0]) - 1
    assert torch.equal(dense[3][..., :read, :], own[3][..., :read, :])
    assert not torch.equal(dense[3][..., read, :], own[3][..., read, :])


# ---- planted bugs


@pytest.fixture
def setting(engine_of, planned, thin, runs):
    engine = engine_of("llama2")
    heads = planned(engine)
    given, level = thin(engine)
    expected = runs.solo(engine, None, given, {})
    engine.drop_inputs(draft=level)
    runs.solo(engine, heads, given, {})
    return engine, given, expected


def going_on(work, decoder):
    """Nodes stay where the draft left them."""


def from_its_states(work, decoder):
    """All layers run again, on the residual streams that the draft left."""
    work.reached[:] = [0] * len(work.reached)


def without_the_root(work, decoder):
    """Only drafted nodes start over."""
    at, stream = work.reached[0], work.hidden[0].clone()
    work.reached.clear()
    work.embed_new(decoder)
    work.reached[0], work.hidden[0] = at, stream


@pytest.mark.parametrize("bug", [going_on, from_its_states, without_the_root])
def test_reusing_a_thinned_out_drafts_work_is_caught(bug, setting, monkeypatch, runs):
    engine, given, expected = setting
    monkeypatch.setattr(Working, "start_over", bug)
    assert runs.differing(engine, given, expected, {}) == set(POLICIES)


def test_verifying_by_thresholds_is_caught(setting, monkeypatch, runs):
    engine, given, expected = setting
    original = loop.verify

    def verify(on, works):
        return original(loop.replace(on, decoder=on.drafter), works)

    monkeypatch.setattr(loop, "verify", verify)
    assert runs.differing(engine, given, expected, {}) == set(POLICIES)


def test_one_mask_for_a_whole_tile_is_caught(engine_of, planned, thin, monkeypatch, runs):
    engine = engine_of("llama2")
    heads = planned(engine)
    given, level = thin(engine)
    engine.drop_inputs(verify=level)
    expected = runs.solo(engine, heads, given, {})
    original = thresholded.channel_linear
    monkeypatch.setattr(
        thresholded, "channel_linear", lambda x, w, keep, parts: original(x, w, keep.any(0).expand_as(keep), parts)
    )
    assert runs.differing(engine, given, expected, {}) == set(POLICIES)
