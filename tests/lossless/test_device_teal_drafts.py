"""Drafts that drop inputs, in rounds on the device: plain decoding's tokens and keys, and the CPU's drafts.

Without a GPU the rounds run kernel by kernel in Triton's interpreter, against the host's drafts by the decoder that
skips channels on the CPU; on a GPU they are captured, in bf16, too.

Regimes: one exit and two; gates that stop some chains, by entropy and by path, and none; greedy and sampled; one
sequence and two, the first within the tokens that stay dense; other thresholds in the same captured rounds; what the
host drafts for a round (beside the text), or in the loop that waits (log-probabilities); trees.

Planted bugs seen to fail here: verification that goes on from the exit; keys of the drafts that stay, in every layer or
at the root; rows that drop nothing; rounds kept from other heads' or another model's drafts; a node's layers counted
once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from skipstone.engine.fused import FusedStep, FusedWeights
from skipstone.engine.gate import ALWAYS, DraftPolicy, Gate, Lookup, every, fixed_exit, likely
from skipstone.engine.graphs import Record, Rounds
from skipstone.engine.inventory import memory_items
from skipstone.engine.sparsity.selection import Griffin, MaskOptions
from skipstone.engine.sparsity.target import SparseTarget
from skipstone.engine.sparsity.teal import TealLevel
from skipstone.engine.sparsity.teal_step import TealStep
from skipstone.engine.sparsity.thresholded import projections
from skipstone.engine.trunk_draft import TrunkDraft
from skipstone.heads import HeadSet, HeadSetConfig, HeadSpec, Projection
from skipstone.kernels.grow_level import Levels
from skipstone.kernels.linear import PackedLinear

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32] + ([torch.bfloat16] if ON_GPU else [])
pytestmark = pytest.mark.triton
PROMPTS = [[4, 9], list(range(5, 24))]
SEEDS = [5, 6]
NEW = 40 if ON_GPU else 5
LAYERS = 3
SAMPLED = {"temperature": 0.8}
TREES = every((1, 2), Gate(0.5, 4.0), branch=2, max_depth=2)
TWO = DraftPolicy((1, 2), {1: Gate(3.0, 3.0), 2: Gate(3.2, 3.2)}, max_depth=3, branch=1)
COUNTS = ("num_drafted", "accepted_by_position", "drafted_by_position", "tokens_by_exit", "gate_stops")


def level(engine: Any, share: float = 0.6) -> TealLevel:
    """Thresholds that drop some of the inputs: small, so that drafts are right now and then."""
    own = len(projections(engine.decoder.config))
    at = share * torch.linspace(0.5, 1.0, LAYERS * own).view(LAYERS, own)
    return TealLevel(share, at, dense_tokens=4)


@pytest.fixture(params=DTYPES, ids=str)
def engine(request: pytest.FixtureRequest, engine_of: Callable) -> Any:
    """With bare exits after layers 1 and 2 of 3, drafts that drop inputs, and its rounds on the device."""
    # two KV heads and a short context, so that attention launches few programs that leave at once
    engine = engine_of("qwen2_window", num_layers=LAYERS, dtype=request.param, max_context=200, device=DEVICE)
    decoder, config = engine.decoder, engine.decoder.config
    specs = tuple(HeadSpec("adapter", e, {"width": 1}) for e in (1, 2))
    heads = HeadSet(HeadSetConfig(config.hidden_size, config.vocab_size, config.num_layers, specs))
    with torch.inference_mode():
        projection = Projection(decoder.final_norm, decoder.head_weight, config.logit_softcap, PackedLinear)
        engine.heads = heads.attach(projection)
        engine.fused = FusedWeights(decoder)
    engine.drop_inputs(draft=level(engine))
    return engine


def by_host(engine: Any, prompts: Any, **options: Any) -> Any:
    """By the loop that waits for every round: drafts are the host's."""
    fused, engine.fused, engine.workspace.cache = engine.fused, None, None
    try:
        return engine.generate(prompts, **options)
    finally:
        engine.fused, engine.workspace.cache = fused, None


def decoded(engine: Any, prompts: list[list[int]], **options: Any) -> tuple[list[Any], list[torch.Tensor]]:
    """Outputs, and the committed keys and values of every layer."""
    outs = engine.generate(prompts, **options)
    found = []
    for i, out in enumerate(outs):
        size = len(out.prompt_ids) + len(out.token_ids) - 1
        found.append(torch.stack([torch.stack(engine.workspace.cache.read(n, i, size)) for n in range(LAYERS)]).clone())
    return outs, found


def same_keys(own: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    slack = {"rtol": 0.0, "atol": 0.0} if ON_GPU else {"rtol": 1e-4, "atol": 1e-5}
    return all(torch.allclose(a, b, **slack) for a, b in zip(own, other, strict=True))


def drafts(engine: Any) -> list[TrunkDraft]:
    return [own.draft for own in engine.workspace.rounds.values() if isinstance(own.draft, TrunkDraft)]


RUNS: dict[str, tuple[DraftPolicy, int, dict[str, Any]]] = {
    "one exit": (fixed_exit(2, 3), 1, {}),
    "one exit, two sequences, sampled": (fixed_exit(2, 2), 2, SAMPLED),
    "one exit with a gate, by path": (likely((2,), 0.05, max_depth=3), 2, {}),
    "two exits": (every((1, 2), ALWAYS, max_depth=2, branch=1), 1, SAMPLED),
    "two exits with gates": (TWO, 2, SAMPLED),
    "trees of two exits": (TREES, 2, SAMPLED),
    "refused at once": (every((2,), Gate(-1.0, -1.0), max_depth=3), 1, {}),
}


@pytest.mark.hazard(6, 23, 24)
@pytest.mark.parametrize("name", RUNS)
def test_tokens_are_plain_ones_and_drafts_the_hosts(name: str, engine: Any, assert_same_output: Callable) -> None:
    policy, batch, sampling = RUNS[name]
    new = 3 if name == "refused at once" else NEW
    prompts, options = PROMPTS[-batch:], {"seeds": SEEDS[-batch:], "max_new_tokens": new, **sampling}
    plain, expected = decoded(engine, prompts, speculation=False, **options)
    outs, found = decoded(engine, prompts, policy=policy, **options)
    assert engine.draft == "teal 0.6" and engine.verify == "dense"
    assert [isinstance(own._step, TealStep) for own in drafts(engine)] == [True]
    for out, own in zip(outs, plain, strict=True):
        assert_same_output(out, own)
    assert same_keys(found, expected)
    if name == "refused at once":
        assert outs[0].stats.num_drafted == 0 and outs[0].stats.gate_stops == outs[0].stats.num_verifications - 1
    else:
        stats = [out.stats for out in outs]
        right, drafted = sum(own.num_accepted for own in stats), sum(own.num_drafted for own in stats)
        assert right > 0 and (right < drafted or name == "two exits")
        assert ("gate" in name) == (sum(own.gate_stops for own in stats) > 0)
    if ON_GPU:  # where the host's own forwards round otherwise
        return
    for out, host in zip(outs, by_host(engine, prompts, policy=policy, **options), strict=True):
        for count in COUNTS:
            assert getattr(out.stats, count) == getattr(host.stats, count), count
        assert out.exit_layers == host.exit_layers
        whole = LAYERS * (out.stats.num_verifications + out.stats.num_drafted)
        asked = out.stats.num_drafted + out.stats.gate_stops
        assert policy is TREES or out.stats.num_row_layers == whole + 2 * asked, "what drafted ran again"
        # on the host a node runs no further than it, or a token behind it, was asked
        assert out.stats.num_row_layers >= host.stats.num_row_layers
        assert len(policy.exits) > 1 or out.stats.num_row_layers == host.stats.num_row_layers


def test_one_capture_serves_every_threshold(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other levels draft in the same rounds, also with plain ones between; dense drafts do not, nor thinned ones behind
    them."""
    captured, original, read, trees = [], Rounds._capture, Record.read, []
    monkeypatch.setattr(Rounds, "_capture", lambda rounds, kind: captured.append(kind) or original(rounds, kind))

    def kept(*row: Any) -> Record | None:
        record = read(*row)
        trees.append([] if record is None else record.tree.entropies[1:])
        return record

    monkeypatch.setattr(Record, "read", kept)

    def entropies(own: TealLevel | None, step: type) -> list[float]:
        engine.drop_inputs(draft=own)
        trees.clear()
        engine.generate(PROMPTS[1], policy=fixed_exit(1, 2), max_new_tokens=3)
        assert [type(found._step) for found in drafts(engine)] == [step] and len(trees[0]) == 2
        return trees[0]

    first = entropies(level(engine), TealStep)
    engine.generate(PROMPTS[1], speculation=False, max_new_tokens=1)
    second = entropies(level(engine, 1.5), TealStep)
    assert captured.count("draft") == 1 and first != second
    dense = entropies(None, FusedStep)
    again = entropies(level(engine), TealStep)
    assert captured.count("draft") == 3 and first == again != dense


def test_what_the_host_drafts(engine: Any, assert_same_output: Callable) -> None:
    """Trees beside drafts from the text, verified in rounds on the device; and all of it in the loop that waits."""
    trees = replace(TREES, lookup=Lookup())
    options: dict[str, Any] = {"seeds": SEEDS, "max_new_tokens": NEW, **SAMPLED}
    plain, expected = decoded(engine, PROMPTS, speculation=False, **options)
    outs, found = decoded(engine, PROMPTS, policy=trees, **options)
    kinds = {kind for own in engine.workspace.rounds.values() for kind in own._graphs}
    assert not drafts(engine) and "given" in kinds
    assert same_keys(found, expected)
    waited = by_host(engine, PROMPTS, policy=trees, **options)
    for out, own, host in zip(outs, plain, waited, strict=True):
        assert_same_output(out, own)
        assert out.stats.num_drafted > 0
        if not ON_GPU:
            assert out.stats.num_row_layers == host.stats.num_row_layers
    with_logprobs = engine.generate(PROMPTS, policy=TWO, logprobs=1, **options)
    if not ON_GPU:
        assert [out.token_ids for out in with_logprobs] == [out.token_ids for out in plain]
    silent = engine.generate(PROMPTS, speculation=False, logprobs=1, **options)
    assert [(out.token_ids, out.logprobs) for out in with_logprobs] == [(o.token_ids, o.logprobs) for o in silent]


def test_weights_by_channel_are_those_of_the_layers_that_draft(engine: Any) -> None:
    config, itemsize = engine.decoder.config, engine.decoder.dtype.itemsize
    assert len(engine.thinned.channels) == 2
    wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rows = {"qkv": wide + 2 * (-(-narrow // 16) * 16), "o": config.hidden_size}  # parts are filled up to 16 columns
    inputs = {"qkv": config.hidden_size, "o": wide, "up": config.hidden_size, "down": config.intermediate_size}
    rows |= {"up": 2 * config.intermediate_size, "down": config.hidden_size}
    num_bytes = 2 * itemsize * sum(inputs[name] * rows[name] for name in rows)
    (item,) = (item for item in memory_items(engine, 1, 64) if "by input channel" in item.what)
    assert item.second_copy and item.num_bytes == num_bytes
    assert f"{num_bytes / 2**20:.1f} MiB" in engine.memory(1, 64).split("; ")[-1]
    engine.drop_inputs()
    assert not any("by input channel" in item.what for item in memory_items(engine, 1, 64))


def test_a_target_that_skips_neurons_is_refused(engine: Any) -> None:
    with torch.inference_mode():
        engine.sparse = SparseTarget(engine.decoder, Griffin(0.5, MaskOptions(first_dense=1, min_tokens=8, round_to=4)))
    with pytest.raises(ValueError, match=r"skips neurons \('griffin'\): load with draft='dense', with verify='dense'"):
        engine.drop_inputs(draft=level(engine))


# ---- planted bugs


def test_going_on_from_the_exit_is_caught(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"max_new_tokens": 4}
    plain, expected = decoded(engine, PROMPTS[1:], speculation=False, **options)
    monkeypatch.setattr(Levels, "reached", property(lambda levels: levels.exits[0]))
    monkeypatch.setattr(Levels, "num_steps", property(lambda levels: levels.max_depth))
    outs, found = decoded(engine, PROMPTS[1:], policy=fixed_exit(1, 2), **options)
    assert outs[0].token_ids != plain[0].token_ids or not same_keys(found, expected)


@pytest.mark.parametrize("where", ["every layer", "the root"])
def test_keys_that_a_draft_leaves_are_caught(where: str, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification computes with its own keys, and the draft's are there again before they are committed."""
    options: dict[str, Any] = {"max_new_tokens": 4}
    plain, expected = decoded(engine, PROMPTS[1:], speculation=False, **options)
    thinned, verify, left = TealStep.run, FusedStep.run, []

    def draft(step: TealStep, *args: Any, **kwargs: Any) -> torch.Tensor:
        found = thinned(step, *args, **kwargs)
        at = torch.arange(step.cache.k.shape[3], device=DEVICE)  # by tensors alone: a GPU captures this
        last = step.rows.base[0] if where == "the root" else step.rows.slot[0]
        left[:] = [(at >= step.rows.base[0]) & (at <= last), step.cache.k.clone()]
        return found

    def run(step: FusedStep, *args: Any, **kwargs: Any) -> torch.Tensor:
        found = verify(step, *args, **kwargs)
        if left:
            mine, keys = left
            step.cache.k[:1].copy_(torch.where(mine[:, None], keys[:1], step.cache.k[:1]))
            left.clear()
        return found

    monkeypatch.setattr(TealStep, "run", draft)
    monkeypatch.setattr(FusedStep, "run", run)
    outs, found = decoded(engine, PROMPTS[1:], policy=fixed_exit(1, 2), **options)
    assert outs[0].token_ids != plain[0].token_ids or not same_keys(found, expected)
