"""A plan checked by the clock, and the command around it. Speeds of tiny models mean nothing; the parts must fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from skipstone.bench import measure
from skipstone.bench.plan_check import NUM_RETIMED, PLANNED, check
from skipstone.bench.questions import built_in
from skipstone.cli import app
from skipstone.engine import planner
from skipstone.engine.gate import Lookup
from skipstone.engine.load import load
from skipstone.heads import HeadSet, store_calibration
from skipstone.train.rehearse import rehearse
from typer.testing import CliRunner

OPTIONS = {"dtype": torch.float32, "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def rehearsed(tiny_folder, tiny_heads_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rehearsed") / "heads"
    shutil.copytree(tiny_heads_folder, folder)
    engine = load(tiny_folder, heads=folder, plan="none", **OPTIONS)
    found = rehearse(engine, [[5, 80, 200], [3, 9, 27]], max_new_tokens=24)
    calibration = replace(HeadSet.load(folder).calibration, rehearsal=found.rehearsal())
    store_calibration(folder, calibration)
    return folder


def cache_of_one(measure):
    """A function that answers every call with its first answer."""
    found = []

    def measured(*args):
        found.append(found[0] if found else measure(*args))
        return found[0]

    return measured


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "cache"))


def test_the_command_plans_checks_and_keeps(tiny_folder, rehearsed, monkeypatch):
    monkeypatch.setattr(measure, "SECONDS_A_LINE", 0)
    command = ["plan", "--model", str(tiny_folder), "--heads", str(rehearsed), "--dtype", "fp32", "--device", "cpu"]
    command += ["--seconds", "0"]
    result = CliRunner().invoke(app, [*command, "--json", "--check", "1", "--max-new-tokens", "6", "--repeats", "1"])
    assert result.exit_code == 0, result.output
    assert "measuring this machine for 0 s" in result.stderr and "1, plain: warming up" in result.stderr
    document = json.loads(result.stdout)
    names = [row["name"] for row in document["check"]["arms"]]
    assert names[0] == "plain" and document["chosen"] in names and document["num_considered"] > 20
    assert document["check"]["different"] == [] and document["check"]["num_compared"] >= len(names) - 1
    assert all(row["measured_tokens_per_second"] > 0 for row in document["check"]["arms"])
    engine = load(tiny_folder, heads=rehearsed, **OPTIONS)
    assert engine.plan is not None and engine.plan.chosen.name == document["chosen"]
    shown = CliRunner().invoke(app, [*command, "--no-keep", "--check", "1", "--arms", "1", "--max-new-tokens", "4"])
    assert shown.exit_code == 0 and "of plain decoding" in shown.stdout and "best policy's speed" in shown.stdout


def test_a_sweep_measures_everything_considered(tiny_folder, rehearsed, monkeypatch):
    engine = load(tiny_folder, heads=rehearsed, plan="none", **OPTIONS)
    some = list(planner.candidates(engine.heads.calibration))[:5]
    monkeypatch.setattr(planner, "candidates", lambda calibration: iter(some))
    monkeypatch.setattr(planner, "LOOKUPS", (Lookup(1),))
    made = planner.plan(engine, 0.0)
    found = check(engine, made, built_in()[:2], arms=None, max_new_tokens=4, repeats=1)
    heads = {name for name, _ in some}
    mixed = {"+".join([*([] if name == "plain" else [name]), "lookup:8:1"]) for name in heads}
    assert {row["name"] for row in found["arms"]} == heads | mixed | {PLANNED}
    assert 0 < found["chosen_share"] <= 1 and found["different"] == []
    again = {row["name"]: row for row in found["retimed"]}
    fastest = sorted(found["arms"], key=lambda row: -row["measured_tokens_per_second"])
    fastest = [row["name"] for row in fastest if row["name"] != PLANNED][:NUM_RETIMED]
    assert set(again) == {*fastest, "plain", made.chosen.name, PLANNED}
    assert again[made.chosen.name]["chosen_share"] == 1 == again[made.chosen.name]["chosen_share_interval"][1]


def test_a_bounded_check_ends_after_one_question_each(tiny_folder, rehearsed):
    """Planted bug: a deadline that stops before anything was measured, or not at all."""
    engine = load(tiny_folder, heads=rehearsed, plan="none", **OPTIONS)
    made = planner.plan(engine, 0.0)
    found = check(engine, made, built_in()[:3], arms=1, max_new_tokens=4, repeats=2, seconds=0.0)
    assert found["num_answered"] == [1] and found["chosen_share_interval"] is None
    assert found["arms"][0]["error_interval"] is None
    whole = check(engine, made, built_in()[:3], arms=1, max_new_tokens=4, repeats=1)
    assert whole["num_answered"] == [3] and whole["best"] in {row["name"] for row in whole["arms"]}
    for row in whole["arms"]:
        (low, high), error = row["error_interval"], row["error"]
        assert low <= error <= high
        assert error == pytest.approx(row["expected_tokens_per_second"] / row["measured_tokens_per_second"] - 1)
    (low, high), share = whole["chosen_share_interval"], whole["chosen_share"]
    assert low <= share <= high and share == min(r["chosen_share"] for r in whole["arms"] if r["name"] != PLANNED)


def test_the_plan_is_followed_as_users_follow_it(tiny_folder, rehearsed, monkeypatch):
    """With a pace and a ladder, which fixed policies do not have; the engine is as before then."""
    engine = load(tiny_folder, heads=rehearsed, plan="none", **OPTIONS)
    made = planner.plan(engine, 0.0)
    everything = planner.rank(engine.heads.calibration, made.costs)
    rehearsal = engine.heads.calibration.rehearsal
    own = ((c, planner.rungs_of(c.policy, rehearsal, made.costs)) for c in everything if c.policy.lookup is None)
    chains, rungs = next((c, rungs) for c, rungs in own if rungs)
    made, seen, generate = replace(made, chosen=chains, rungs=rungs), [], engine._decode

    def decode(requests, mode, accuracy, speculation, policy, lookup):
        yield from generate(requests, mode, accuracy, speculation, policy, lookup)
        if speculation is True:
            seen.append((policy, engine.plan is made, engine.policy is chains.policy, engine.pace().ladder.rounds))

    monkeypatch.setattr(engine, "_decode", decode)
    found = check(engine, made, built_in()[:2], arms=1, max_new_tokens=8, repeats=1)
    assert seen and {own[:3] for own in seen} == {(None, True, True)} and seen[-1][3] >= 0
    (row,) = (row for row in found["arms"] if row["name"] == PLANNED)
    assert row["planned_share"] == 1 and found["planned_share"] > 0
    assert engine.plan is None and engine._paces == {}


def test_of_several_head_sets_the_best_expected_wins(tiny_folder, rehearsed, tmp_path, monkeypatch):
    """Over the same costs, for a busy host times one set slower than the other. Planted bug: the first of them."""
    monkeypatch.setattr(planner, "measure_costs", cache_of_one(planner.measure_costs))
    slow, fast = tmp_path / "slow", tmp_path / "fast"
    for folder, fits in ((slow, False), (fast, True)):  # drafts from the text that are never, and always, right
        shutil.copytree(rehearsed, folder)
        calibration = HeadSet.load(folder).calibration
        own = calibration.rehearsal
        right = {e: np.zeros_like(of) for e, of in own.right.items()}
        text = np.full_like(own.text, 3 if fits else 0)
        store_calibration(folder, replace(calibration, rehearsal=replace(own, right=right, text=text)))
    command = ["plan", "--model", str(tiny_folder), "--dtype", "fp32", "--device", "cpu", "--seconds", "0", "--json"]
    document = json.loads(CliRunner().invoke(app, [*command, "--heads", f"{slow},{fast}"]).stdout)
    assert set(document["rivals"]) == {str(slow), str(fast)}
    speeds = {name: rival["tokens_per_second"] for name, rival in document["rivals"].items()}
    assert document["heads"] == str(fast) == max(speeds, key=speeds.get)
    assert document["chosen"] == document["rivals"][document["heads"]]["chosen"]
    assert document["rivals"][str(slow)]["kept"] != document["rivals"][str(fast)]["kept"]
    none = CliRunner().invoke(app, [*command, "--heads", "all"])
    assert none.exit_code == 2 and "no heads are shipped" in none.output


def test_heads_without_a_rehearsal_are_refused(tiny_folder, tiny_heads_folder):
    command = ["plan", "--model", str(tiny_folder), "--heads", str(tiny_heads_folder), "--device", "cpu"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and "skipstone calibrate" in result.output


def test_missing_questions_are_noticed_before_anything_is_measured(tiny_folder, rehearsed, tmp_path, monkeypatch):
    monkeypatch.setattr(planner, "plan", lambda *_: pytest.fail("measured first"))
    command = ["plan", "--model", str(tiny_folder), "--heads", str(rehearsed), "--device", "cpu", "--check", "2"]
    result = CliRunner().invoke(app, [*command, "--prompts", str(tmp_path / "missing.jsonl")])
    assert result.exit_code == 2 and "no prompt file at" in result.output
