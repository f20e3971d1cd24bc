"""A plan checked by the clock, and the command around it. Speeds of tiny models mean nothing; the parts must fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from skipstone.bench.plan_check import NUM_RETIMED, check
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


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "cache"))


def test_the_command_plans_checks_and_keeps(tiny_folder, rehearsed):
    command = ["plan", "--model", str(tiny_folder), "--heads", str(rehearsed), "--dtype", "fp32", "--device", "cpu"]
    command += ["--seconds", "0"]
    result = CliRunner().invoke(app, [*command, "--json", "--check", "1", "--max-new-tokens", "6", "--repeats", "1"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    names = [row["name"] for row in document["check"]["arms"]]
    assert names[0] == "plain" and document["chosen"] in names and document["num_considered"] > 20
    assert document["check"]["different"] == [] and document["check"]["num_compared"] >= len(names) - 1
    assert all(row["measured_tokens_per_second"] > 0 for row in document["check"]["arms"])
    engine = load(tiny_folder, heads=rehearsed, **OPTIONS)
    assert engine.plan is not None and engine.plan.chosen.name == document["chosen"]
    shown = CliRunner().invoke(app, [*command, "--no-keep", "--check", "1", "--arms", "1", "--max-new-tokens", "4"])
    assert shown.exit_code == 0 and "of plain decoding" in shown.stdout and "best one's speed" in shown.stdout


def test_a_sweep_measures_everything_considered(tiny_folder, rehearsed, monkeypatch):
    engine = load(tiny_folder, heads=rehearsed, plan="none", **OPTIONS)
    some = list(planner.candidates(engine.heads.calibration))[:5]
    monkeypatch.setattr(planner, "candidates", lambda calibration: iter(some))
    monkeypatch.setattr(planner, "LOOKUPS", (Lookup(1),))
    made = planner.plan(engine, 0.0)
    found = check(engine, made, built_in()[:2], arms=None, max_new_tokens=4, repeats=1)
    heads = {name for name, _ in some}
    mixed = {"+".join([*([] if name == "plain" else [name]), "lookup:8:1"]) for name in heads}
    assert {row["name"] for row in found["arms"]} == heads | mixed
    assert 0 < found["chosen_share"] <= 1 and found["different"] == []
    again = {row["name"]: row for row in found["retimed"]}
    fastest = sorted(found["arms"], key=lambda row: -row["measured_tokens_per_second"])[:NUM_RETIMED]
    assert set(again) == {row["name"] for row in fastest} | {"plain", made.chosen.name}
    assert again[made.chosen.name]["chosen_share"] == 1 == again[made.chosen.name]["chosen_share_interval"][1]


def test_heads_without_a_rehearsal_are_refused(tiny_folder, tiny_heads_folder):
    command = ["plan", "--model", str(tiny_folder), "--heads", str(tiny_heads_folder), "--device", "cpu"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and "skipstone calibrate" in result.output
