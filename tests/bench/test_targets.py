"""Arms of other targets, batches, slow arms, the list of all arms: whole runs of a tiny model.

Planted bugs seen to fail here: arms of %tda compared with the whole model's tokens; a target's weights taken by the
engine it was made from; a batch's seeds by place; a batch's whole time given to every answer.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from skipstone.bench.all_arms import all_arms, is_slow
from skipstone.bench.arms import EngineArm, parse_arms
from skipstone.bench.baselines import baseline_arms
from skipstone.bench.compiled import CompiledArm, CompiledLoop
from skipstone.bench.pages import notes, page
from skipstone.bench.questions import Question
from skipstone.bench.run import Settings, run
from skipstone.bench.targets import own_downs
from skipstone.engine.engine import Engine
from skipstone.engine.gate import fixed_exit
from skipstone.engine.load import load
from skipstone.engine.pretrained import load_pretrained
from skipstone.engine.sparsity.teal import Teal
from skipstone.engine.sparsity.teal_step import TealStep
from skipstone.engine.sparsity.thresholded import projections

QUESTIONS = [
    Question("first", "writing", ("a stone skips over the water and the rain", "again")),
    Question("second", "qa", ("the rain falls on the stones and skips",)),
    Question("third", "rag", ("a stone and a stone and the water and the rain",)),
]


@pytest.fixture(scope="module")
def engine(tiny_folder: Path, tiny_heads_folder: Path) -> Engine:
    return load(tiny_folder, heads=tiny_heads_folder, dtype=torch.float32, device="cpu", progress=False)


@pytest.fixture(scope="module")
def teal(engine: Engine) -> Teal:
    config = engine.decoder.config
    sizes = 2, config.num_layers, len(projections(config))
    return Teal((0.25, 0.5), torch.full(sizes, 0.2) * torch.tensor([1.0, 2.0]).view(2, 1, 1), torch.full(sizes, 0.3))


def test_a_target_is_compared_with_its_own_plain_decoding(engine: Engine, teal: Teal) -> None:
    names = "fixed:2:3%tda:0.5,default%teal:0.5,fixed:2:3%teal-draft:0.5,early:0.9%tda:0.5,bare:2:2%tda:0.5"
    arms = {arm.name: arm for arm in parse_arms(names, engine, thresholds_of=lambda kind: teal)}
    assert list(arms)[:3] == ["plain", "plain%tda:0.5", "fixed:2:3%tda:0.5"]
    shown = {name: (arm.plain, arm.lossless) for name, arm in arms.items()}
    assert shown["plain%tda:0.5"] == ("plain", False), "another model's text"
    assert shown["fixed:2:3%tda:0.5"] == shown["bare:2:2%tda:0.5"] == ("plain%tda:0.5", True)
    assert shown["early:0.9%tda:0.5"] == ("plain%tda:0.5", False)
    assert shown["default%teal:0.5"] == ("plain%teal:0.5", True)
    assert shown["fixed:2:3%teal-draft:0.5"] == ("plain", True)
    ids = engine.tokenizer.encode(3 * QUESTIONS[0].turns[0])  # type: ignore[union-attr]
    texts = {name: arm.run(ids, {"max_new_tokens": 24}).token_ids for name, arm in arms.items()}
    assert texts["plain"] != texts["plain%tda:0.5"] != texts["plain%teal:0.5"] != texts["plain"]
    for name, (plain, lossless) in shown.items():
        assert not lossless or texts[name] == texts[plain], name
    engines = {name: arm.engine for name, arm in arms.items() if isinstance(arm, EngineArm)}
    assert engines["plain%tda:0.5"] is engines["fixed:2:3%tda:0.5"] is not engine
    assert engine.verify == engine.draft == "dense"
    assert arms["fixed:2:3%tda:0.5"].describe()["verify"] == "tda 0.5"
    assert arms["fixed:2:3%teal-draft:0.5"].describe()["draft"] == "teal 0.5"


@pytest.mark.triton
def test_thinned_drafts_run_in_rounds_on_the_device(
    engine: Engine, teal: Teal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An arm's engine takes the fused kernels of the one that it was made from. (The self-test takes minutes in the
    interpreter.)"""
    monkeypatch.setattr("skipstone.engine.engine.fused_rows_agree", lambda weights: True)
    whole = Engine(engine.decoder, engine.tokenizer, engine.heads, fused=True)
    _, arm = parse_arms("fixed:2:1%teal-draft:0.5", whole, thresholds_of=lambda kind: teal)
    outcome = arm.run([5, 9, 4], {"max_new_tokens": 2, "ignore_eos": True})
    assert outcome.error is None and outcome.stats is not None and outcome.stats.num_drafted == 1
    (rounds,) = arm.engine.workspace.rounds.values()  # type: ignore[attr-defined]
    assert isinstance(rounds.draft._step, TealStep) and whole.thinned is None and not is_slow(arm)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plain%griffin", "unknown target 'griffin'; expected tda"),
        ("plain%tda:much", "e.g. tda:0.75"),
        ("plain%teal:0.9", "these thresholds have"),
        ("bare:2:2@adapter", "leave @adapter out"),
    ],
)
def test_a_bad_target_is_refused(engine: Engine, teal: Teal, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arms(text, engine, thresholds_of=lambda kind: teal)
    with pytest.raises(ValueError, match="thresholds are read only"):
        parse_arms("plain%tda", engine)
    thin = parse_arms("plain%tda:0.5", engine, thresholds_of=lambda kind: teal)[1].engine  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="'tda 0.5' .* already"):
        parse_arms("plain%tda:0.5", thin, thresholds_of=lambda kind: teal)


def test_a_targets_down_projections_are_its_own(engine: Engine) -> None:
    """On a GPU TDA stores them by neuron; the whole model's must stay as they are."""
    twin = own_downs(engine.decoder)
    twin.layers[0].down.weight = None  # type: ignore[assignment]
    assert engine.decoder.layers[0].down.weight is not None
    assert twin.layers[0].up is engine.decoder.layers[0].up and twin.embedding is engine.decoder.embedding


def test_a_run_reports_lossy_targets_beside_lossless_drafts_of_them(engine: Engine) -> None:
    settings = Settings("tiny", arms="fixed:2:2%tda:0.5,fixed:2:2", max_new_tokens=20, repeats=1)
    document = run(engine, QUESTIONS, settings, progress=False)
    assert document["problems"] == [] and document["lossless"]["num_compared"] == 2 * 4
    assert list(document["lossy"]) == ["plain%tda:0.5"] == list(document["equal_to_plain"])
    assert 0 < document["lossy"]["plain%tda:0.5"]["agreement"] < 1
    own = document["summary"]["overall"]["fixed:2:2%tda:0.5"]
    plain = document["summary"]["overall"]["plain%tda:0.5"]
    expected = own["decode_tokens_per_second"] / plain["decode_tokens_per_second"]
    assert own["target_speedup"] == pytest.approx(expected) and "target_speedup" not in plain
    assert document["sample"]["arms"].keys() == {"fixed:2:2%tda:0.5", "fixed:2:2"}
    assert any("its own target's plain decoding" in line for line in notes(document))
    assert "plain%tda:0.5" in page(document)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_questions_side_by_side_have_the_tokens_of_solo_ones(engine: Engine, temperature: float) -> None:
    settings = Settings("tiny", arms="default,fixed:2:2", max_new_tokens=12, repeats=1, temperature=temperature)
    alone = run(engine, QUESTIONS, settings, progress=False)
    together = run(engine, QUESTIONS, Settings(**{**vars(settings), "batch": 2}), progress=False)
    assert list(together["arms"]) == ["plain", "solo", "default", "fixed:2:2"]
    assert together["problems"] == [] and together["lossless"]["num_compared"] == 3 * 4

    def texts(document: dict[str, Any], arm: str) -> dict[Any, list[int]]:
        return {(a["question_id"], a["turn"]): a["token_ids"] for a in document["answers"] if a["arm"] == arm}

    assert texts(together, "plain") == texts(alone, "plain") == texts(together, "solo")
    answers = [a for a in together["answers"] if a["arm"] == "fixed:2:2" and a["turn"] == 0]
    assert answers[0]["wall_ms"] == answers[1]["wall_ms"] != answers[2]["wall_ms"], "a batch of two, then one alone"
    assert answers[0]["decode_ms"] == answers[1]["decode_ms"] <= answers[0]["wall_ms"]
    longest = max(a["stats"]["decode_ms"] for a in answers[:2])
    assert answers[0]["decode_ms"] == pytest.approx(longest / 2)
    assert any("side by side" in line for line in notes(together))
    for wrong in ({"batch": 2, "baselines": ("hf",)}, {"batch": 0}):
        with pytest.raises(ValueError, match="batch is"):
            run(engine, QUESTIONS, Settings(**{**vars(settings), **wrong}), progress=False)


def test_the_default_is_described_as_a_batch_drafts(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "policy_for", lambda batch: fixed_exit(2, batch + 1))
    for batch in (1, 2):
        settings = Settings("tiny", arms="always", max_new_tokens=4, repeats=1, batch=batch)
        assert run(engine, QUESTIONS, settings, progress=False)["arms"]["always"]["max_depth"] == batch + 1


def test_a_batch_goes_on_only_whole(engine: Engine, tmp_path: Path) -> None:
    """Planted bug: the answer that the journal has keeps its share of a batch that ran again."""
    settings, path = Settings("tiny", arms="plain", max_new_tokens=6, repeats=1, batch=2), tmp_path / "journal.jsonl"
    first = run(engine, QUESTIONS, settings, progress=False, journal=path)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:2]), encoding="utf-8")  # the settings and one answer of the first batch
    again = run(engine, QUESTIONS, settings, progress=False, journal=path)
    assert again["num_resumed"] == 0 and len(again["answers"]) == len(first["answers"])
    whole = run(engine, QUESTIONS, settings, progress=False, journal=path)
    assert whole["num_resumed"] == len(whole["answers"])


def test_slow_arms_answer_some_questions_and_are_paired_on_those(engine: Engine, tiny_folder: Path) -> None:
    """Planted bug: their speedup over plain decoding of all questions."""
    settings = Settings(
        str(tiny_folder), arms="fixed:2:2", baselines=("hf",), baseline_limit=1, max_new_tokens=6, repeats=2
    )
    document = run(engine, QUESTIONS, settings, progress=False)
    assert document["limited_arms"] == ["hf"] and document["summary"]["overall"]["hf"]["num_questions"] == 1
    assert document["summary"]["overall"]["fixed:2:2"]["num_questions"] == 3
    assert set(document["summary"]["rag"]) == {"plain", "fixed:2:2"}

    def rate(arm: str, repeat: int) -> float:
        own = [
            a for a in document["answers"]
            if (a["arm"], a["repeat"], a["question_id"]) == (arm, repeat, "first")
        ]  # fmt: skip
        return sum(a["decode_tokens"] for a in own) / sum(a["decode_ms"] for a in own)

    speedups = sorted(rate("hf", i) / rate("plain", i) for i in range(2))
    assert document["summary"]["overall"]["hf"]["speedup_range"] == pytest.approx(speedups)
    assert any(line.startswith("hf: 1 of 3 questions") for line in notes(document))


def test_all_arms_are_those_that_the_heads_allow(
    engine: Engine, stateful: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recurrent = Engine(engine.decoder, engine.tokenizer)
    stateful(recurrent, "recurrent")
    assert recurrent.heads is not None
    names = all_arms(engine, {"recurrent": recurrent.heads}, ["tda", "teal"]).split(",")
    assert names[:5] == ["plain", "default", "always", "lookup", "suffix"]
    for name in (
        "fixed:2:3", "fixed:3:3", "accuracy:0.75", "early:0.95", "fixed:0:3@recurrent", "tree:4:4:4@recurrent",
        "bare:2:3", "plain%tda", "always%tda", "plain%teal", "fixed:2:3%teal-draft",
    ):  # fmt: skip
        assert name in names
    assert "fixed:0:3@recurrent%teal-draft" not in names, "a head at exit 0 drafts without the layers"
    assert "always%teal" in names
    with monkeypatch.context() as patch:
        patch.setattr(engine.decoder, "device", torch.device("cuda"))
        on_gpu = all_arms(engine, {"recurrent": recurrent.heads}, ["tda", "teal"]).split(",")
    assert set(names) - set(on_gpu) == {"always%teal"}, "a target that drops inputs decodes plainly there"
    document = run(engine, QUESTIONS[1:2], Settings("tiny", arms="plain"), progress=False)
    assert list(document["arms"]) == ["plain"]


def test_of_a_named_model_all_arms_run(engine: Engine, tiny_folder: Path) -> None:
    settings = Settings(str(tiny_folder), arms="all, fixed:2:1", max_new_tokens=5, repeats=1)
    document = run(engine, QUESTIONS[1:2], settings, progress=False)
    assert document["problems"] == [] and list(document["arms"])[-1] == "fixed:2:1" and len(document["arms"]) > 10
    with pytest.raises(ValueError, match="no arm uses --teal"):
        run(engine, QUESTIONS, Settings(str(tiny_folder), arms="plain", teal="t"), progress=False)
    with pytest.raises(ValueError, match="give --teal"):
        run(engine, QUESTIONS, Settings(str(tiny_folder), arms="plain%teal"), progress=False)


def test_arms_that_wait_for_the_host_are_slow(engine: Engine, tiny_folder: Path, monkeypatch: Any) -> None:
    arms = parse_arms("fixed:2:2,lookup,suffix,fixed:2:2+lookup,early:0.9", engine)
    assert [is_slow(arm) for arm in (*arms, *baseline_arms(["hf"], str(tiny_folder), engine))] == [0, 0, 0, 0, 0, 0, 1]
    monkeypatch.setattr(engine.decoder, "device", torch.device("cuda"))
    monkeypatch.setattr(engine, "fused", object())
    # trees from the text, and the text in front of an exit of the trunk, are the host's; early exit is eager
    assert [is_slow(arm) for arm in arms] == [0, 0, 0, 1, 1, 1]


def test_replayed_arms_are_compared_too(engine: Engine) -> None:
    """Planted bug, which types found first: a replayed arm's plain run in the place of its plain arm's name."""
    settings = Settings("tiny", arms="bare:2:1-2,fixed:2:2", replay=True, max_new_tokens=8, repeats=1)
    document = run(engine, QUESTIONS, settings, progress=False)
    assert document["problems"] == [] and document["lossless"]["num_compared"] == 3 * 4


# --- the compiled loop


def test_the_compiled_loop_writes_plain_decoding_and_stops(
    engine: Engine, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not compiled here. Planted bug: tokens behind a stop id kept."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    arm = CompiledArm(load_pretrained(tiny_folder, torch.float32, progress=False), engine)
    arm._make = partial(CompiledLoop, in_graph=False)
    ids, sampling = engine.tokenizer.encode("a stone skips over"), {"max_new_tokens": 20}  # type: ignore[union-attr]
    plain = engine.generate(ids, speculation=False, **sampling)
    for _ in range(2):  # a second answer on the same cache
        out = arm.run(ids, sampling)
        assert out.token_ids == plain.token_ids and out.text == plain.text
        assert out.decode_tokens == len(out.token_ids) - 1 and 0 < out.decode_ms < out.wall_ms
    loop = arm._loops[512]
    stop = plain.token_ids[4]
    tokens, _ = loop.write(torch.tensor(ids), 20, [stop])
    assert tokens == plain.token_ids[: plain.token_ids.index(stop) + 1]
    assert loop.write(torch.tensor(ids), 20, [plain.token_ids[0]])[0] == plain.token_ids[:1]
    assert loop.write(torch.tensor(ids), 1, ())[0] == plain.token_ids[:1]
    assert arm.describe()["caches"] == [512] and not arm.lossless
    with pytest.raises(ValueError, match="is greedy"):
        arm.run(ids, {**sampling, "temperature": 1.0})
    with pytest.raises(ValueError, match="leave it out"):
        baseline_arms(["compile"], str(tiny_folder), engine)
