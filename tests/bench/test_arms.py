"""Arms from their names, bare exits, and transformers' baselines on the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from skipstone.bench.arms import bare_heads, default_arms, expand, parse_arms
from skipstone.bench.baselines import TRANSFORMERS, baseline_arms, load_reference
from skipstone.engine.engine import Engine
from skipstone.engine.gate import BESIDE, PLAIN, WHOLE, Lookup, best_first
from skipstone.engine.load import load
from skipstone.engine.planner import LOOKUPS, _name_of
from skipstone.engine.pretrained import load_pretrained
from skipstone.engine.weights import save_converted

SAMPLING = {"max_new_tokens": 12, "seed": 0, "temperature": 0.0}


@pytest.fixture(scope="module")
def engine(tiny_folder: Path, tiny_heads_folder: Path) -> Engine:
    return load(tiny_folder, heads=tiny_heads_folder, dtype=torch.float32, device="cpu", progress=False)


def ids_of(engine: Engine) -> list[int]:
    assert engine.tokenizer is not None
    return engine.tokenizer.encode("a stone skips over")


def test_every_form_decodes_and_plain_comes_first(engine: Engine) -> None:
    arms = parse_arms("fixed:2:3, bare:1:2,default,always,accuracy:0.7,likely:0.01:4:3", engine)
    names = ["plain", "fixed:2:3", "bare:1:2", "default", "always", "accuracy:0.7", "likely:0.01:4:3"]
    assert [arm.name for arm in arms] == names
    outcomes = [arm.run(ids_of(engine), SAMPLING) for arm in arms]
    assert len({tuple(outcome.token_ids) for outcome in outcomes}) == 1
    stats = {arm.name: outcome.stats for arm, outcome in zip(arms, outcomes, strict=True)}
    assert stats["plain"].num_drafted == 0
    assert len(stats["fixed:2:3"].drafted_by_position) == 3 and len(stats["bare:1:2"].drafted_by_position) == 2
    assert set(stats["fixed:2:3"].tokens_by_exit) <= {2} and set(stats["bare:1:2"].tokens_by_exit) <= {1}
    assert arms[2].describe()["exits"] == [1] and arms[2].describe()["gates"] == {"1": [None, None]}
    assert arms[0].describe() == {"speculation": False}
    shown = arms[6].describe()
    assert shown["confidence"] == "path" and shown["exits"] == [3] and shown["max_depth"] == 4
    assert stats["likely:0.01:4:3"].num_drafted > 0


def test_trees_come_from_a_head_at_exit_0(engine: Engine, stateful: Any) -> None:
    own = Engine(engine.decoder, engine.tokenizer)
    stateful(own, "recurrent")
    plain, chain, tree, gated = parse_arms("fixed:0:4,tree:3:2:5,tree:3:2:5:9:2.5", own)
    outcomes = [arm.run(ids_of(engine), SAMPLING) for arm in (plain, chain, tree, gated)]
    assert len({tuple(outcome.token_ids) for outcome in outcomes}) == 1
    assert outcomes[2].stats is not None and outcomes[2].stats.num_drafted > 0
    assert tree.describe()["beam"] == 3 and tree.describe()["gates"] == {"0": [None, None]}
    assert gated.describe()["gates"] == {"0": [None, 2.5]} and gated.policy.max_nodes == 9
    (_, front, planned) = parse_arms(f"tree:4:4:3:11+lookup:15:3:15,tree:4:4:3:11+{_name_of(BESIDE)}", own)
    assert front.policy == replace(best_first(4, 4, 3, 11), lookup=replace(WHOLE, min_match=3))
    assert planned.policy == replace(best_first(4, 4, 3, 11), lookup=BESIDE)
    with pytest.raises(ValueError, match="expected tree:BEAM:BRANCH:DEPTH"):
        parse_arms("tree:3:2", own)
    with pytest.raises(ValueError, match="needs a head at exit 0"):
        parse_arms("tree:3:2:5", engine)


@pytest.mark.parametrize("lookup", [*LOOKUPS, WHOLE])
def test_names_of_planned_lookups_are_arms(engine: Engine, lookup: Lookup) -> None:
    _, arm = parse_arms(_name_of(lookup), engine)
    assert arm.policy.lookup == lookup


def test_the_text_drafts_alone_and_beside_heads_of_another_set(engine: Engine, stateful: Any) -> None:
    """Planted bug: the + of `accuracy:0.7:2:2+3` taken for a lookup's."""
    other = Engine(engine.decoder, engine.tokenizer)
    names = "lookup:4:1,suffix,fixed:2:2+lookup:3,accuracy:0.7:2:2+3,fixed:2:2+beside:4,fixed:0:2@recurrent+lookup,"
    names += "fixed:2:1-2+suffix:4"
    arms = parse_arms(names, engine, lambda kind: stateful(other, kind))
    assert [arm.name for arm in arms[-3:]] == ["fixed:0:2@recurrent+lookup", "fixed:2:1+suffix:4", "fixed:2:2+suffix:4"]
    outcomes = {arm.name: arm.run(ids_of(engine), SAMPLING) for arm in arms}
    assert len({tuple(outcome.token_ids) for outcome in outcomes.values()}) == 1
    for name, outcome in outcomes.items():
        assert sum(count for _, count in outcome.blocks) == len(outcome.token_ids) == len(outcome.exit_layers), name
        assert 0 < outcome.blocks[0][0] <= outcome.blocks[-1][0] <= outcome.wall_ms
    shown = {arm.name: arm.describe() for arm in arms}
    assert shown["lookup:4:1"]["lookup"]["max_nodes"] == 4 and shown["suffix"]["lookup"]["branch"] == 2
    assert shown["fixed:2:2+beside:4"]["lookup"]["beside"] and not shown["suffix"]["lookup"]["beside"]
    assert shown["fixed:2:2+lookup:3"]["exits"] == [2] and "lookup" not in shown["accuracy:0.7:2:2+3"]
    assert shown["fixed:0:2@recurrent+lookup"]["exits"] == [0]
    for wrong in ("beside", "fixed:2:2+beside:4:1:2"):
        with pytest.raises(ValueError, match="behind heads"):
            parse_arms(wrong, engine)
    with pytest.raises(ValueError, match="only forms that draft"):
        parse_arms("plain+lookup", engine)
    with pytest.raises(ValueError, match="expected lookup\\[:NODES"):
        parse_arms("lookup:x", engine)
    with pytest.raises(ValueError, match="read by name only"):
        parse_arms("fixed:0:2@recurrent", engine)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", "unknown arm 'fast'"),
        ("fixed:1:3", "no trained head at exit 1"),
        ("fixed:2", "expected fixed:EXIT:LENGTH"),
        ("bare:2:16", "length of 1..15"),
        ("bare:9:2", "outside 1..3"),
        ("accuracy:high", "expected a level"),
        ("accuracy:0.2", "accuracy is 0.2"),
        ("accuracy:0.8:x", "accuracy:0.9:4"),
        ("accuracy:0.8:2:2:2", "too many parts"),
        ("accuracy:0.8:2:1", "no calibration for exit layer 1"),
        ("likely:0.4:2:1", r"no heads at exits \[1\]"),
        ("likely:1.5", "probability is 1.5"),
        ("fixed:2:4-1", "a range that rises"),
        ("fixed:2:1-b", "no range such as"),
    ],
)
def test_a_bad_arm_is_refused(engine: Engine, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arms(text, engine)


def test_ranges_become_one_arm_a_setting(engine: Engine) -> None:
    names = [arm.name for arm in parse_arms("fixed:*:1-2,bare:1:2-3,accuracy:0.6-0.7,accuracy:0.8:1-2", engine)]
    assert names == [
        "plain", "fixed:2:1", "fixed:2:2", "fixed:3:1", "fixed:3:2", "bare:1:2", "bare:1:3",
        "accuracy:0.60", "accuracy:0.65", "accuracy:0.70", "accuracy:0.8:1", "accuracy:0.8:2",
    ]  # fmt: skip
    assert parse_arms("accuracy:0.7:2", engine)[1].describe()["max_depth"] == 2
    assert expand("likely:0.1-0.2:7", ()) == ["likely:0.10:7", "likely:0.15:7", "likely:0.20:7"]
    assert expand("accuracy:0.7:1-2:2+3", ()) == ["accuracy:0.7:1:2+3", "accuracy:0.7:2:2+3"]
    assert parse_arms("accuracy:0.7:2:3", engine)[1].describe()["exits"] == [3]
    with pytest.raises(ValueError, match="has none"):
        expand("bare:*:2", ())


def test_without_heads_the_text_drafts_and_without_that_there_is_a_bare_exit_to_measure(tiny_folder: Path) -> None:
    engine = load(tiny_folder, heads=None, dtype=torch.float32, device="cpu", progress=False)
    assert default_arms(engine) == "plain,default,always"
    engine.policy = PLAIN
    assert default_arms(engine) == "plain,bare:2:4"
    with pytest.raises(ValueError, match="needs something to draft with"):
        parse_arms("default", engine)


def test_a_bare_exit_is_the_final_norm_and_the_lm_head(engine: Engine) -> None:
    decoder = engine.decoder
    heads = parse_arms("bare:2:1", engine)[1].engine.heads  # type: ignore[attr-defined]
    hidden = 3.0 * torch.randn(5, decoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = decoder.lm_head(decoder.final_norm(hidden))
        torch.testing.assert_close(heads.logits(2, hidden), expected, rtol=1e-4, atol=1e-4)
    assert bare_heads(decoder.config, [1, 3]).exits == (1, 3)


def test_baselines_write_what_plain_decoding_writes(engine: Engine, tiny_folder: Path) -> None:
    """fp32 on a small model without near-ties: other arithmetic, the same tokens."""
    plain = parse_arms("plain", engine)[0].run(ids_of(engine), SAMPLING)
    for arm in baseline_arms(TRANSFORMERS, str(tiny_folder), engine):
        outcome = arm.run(ids_of(engine), SAMPLING)
        assert outcome.token_ids == plain.token_ids and outcome.text == plain.text, arm.name
        assert 0 < outcome.decode_ms < outcome.wall_ms
        assert 0 < outcome.decode_tokens < len(outcome.token_ids)
        assert not arm.lossless


def test_a_converted_folder_reaches_transformers_with_the_same_weights(tiny_folder: Path, tmp_path: Path) -> None:
    """What a packaged model takes: canonical weights, put back under transformers' names."""
    loaded = load_pretrained(tiny_folder, torch.float32, progress=False)
    folder = tmp_path / "converted"
    save_converted(folder, loaded.config, loaded.weights, loaded.tokenizer.save)
    direct, through = (load_reference(str(f), torch.float32, torch.device("cpu")) for f in (tiny_folder, folder))
    ids = torch.tensor([[3, 5, 80, 200]])
    with torch.inference_mode():
        assert torch.equal(direct(ids).logits, through(ids).logits)


def test_unknown_baselines_and_options_are_refused(engine: Engine, tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="unknown baselines \\['vllm'\\]"):
        baseline_arms(["hf", "vllm"], str(tiny_folder), engine)
    (arm,) = baseline_arms(["hf"], str(tiny_folder), engine)
    odd: dict[str, Any] = SAMPLING | {"top_k": 3}
    with pytest.raises(ValueError, match="top_k"):
        arm.run(ids_of(engine), odd)
