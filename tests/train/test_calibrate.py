"""Calibration through the engine: what is recorded at drafted nodes, on which prompts, and the command's parts."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skipstone.engine import forward
from skipstone.engine.engine import Engine
from skipstone.engine.gate import ALWAYS, Gate, every
from skipstone.engine.load import load
from skipstone.engine.loop import Machinery
from skipstone.engine.model import Decoder
from skipstone.engine.tree import DraftTree
from skipstone.heads import HeadSet, HeadSetConfig, HeadSpec, layer_options
from skipstone.train import calibrate as calibrating
from skipstone.train import recalibrate as command
from skipstone.train import rehearse as rehearsing
from skipstone.train.calibrate import Recorder, calibrate, record
from skipstone.train.data import is_held_out
from skipstone.train.plots import plot_calibration
from skipstone.train.recalibrate import Settings, recalibrate
from skipstone.train.rehearse import rehearse

PROMPTS = [[5, 80, 200], [3, 9, 27, 81, 243], [100, 101], [7, 7, 7, 7]]


@pytest.fixture(scope="module")
def engine(tiny_folder: Path, tiny_heads_folder: Path) -> Engine:
    return load(tiny_folder, heads=tiny_heads_folder, dtype=torch.float32, device="cpu", progress=False)


def test_every_node_is_recorded_as_its_own_prefix_says(engine: Engine) -> None:
    """Against a forward over each node's whole prefix. Planted bugs: the parent's target instead of the node's own, a
    head asked one layer too deep, true prefixes where a draft was wrong."""
    heads, decoder = engine.heads, engine.decoder
    assert heads is not None
    recorder = Recorder(heads, decoder.config.vocab_size, [], decoder.device)
    trees: list[tuple[int, DraftTree]] = []

    def observe(on: Machinery, works: Any, logits: Any) -> None:
        recorder(on, works, logits)
        trees.extend((work.base, work.tree) for work in works)

    engine.observer = observe
    try:
        out = engine.generate(
            PROMPTS[1], policy=every((2, 3), ALWAYS, max_depth=3), max_new_tokens=14, ignore_eos=True
        )  # fmt: skip
    finally:
        engine.observer = None
    text = PROMPTS[1] + out.token_ids
    prefix, said = np.concatenate(recorder._prefix), {e: np.concatenate(p) for e, p in recorder._said.items()}
    row = 0
    for base, tree in trees:
        for node in range(len(tree)):
            ids = text[: base + 1] + tree.path_tokens(node)
            with torch.inference_mode():
                states = decoder.encode(torch.tensor([ids]), [2, 3, decoder.config.num_layers])
                best = int(decoder.lm_head(decoder.final_norm(states[decoder.config.num_layers][0, -1:])).argmax())
                for exit_layer in (2, 3):
                    logits = heads.logits(exit_layer, states[exit_layer][0, -1:])[0]
                    probs = logits.softmax(-1).sort(descending=True).values
                    expected = (
                        float(torch.special.entr(probs).sum()), float(probs[0]), float(probs[0] - probs[1]),
                        int((logits > logits[best]).sum()),
                    )  # fmt: skip
                    assert said[exit_layer][row] == pytest.approx(expected, rel=1e-3, abs=1e-3)
            assert prefix[row, 0] == tree.depths[node]
            assert bool(prefix[row, 1]) == (ids == text[: len(ids)])
            row += 1
    assert row == len(prefix) > len(out.token_ids)
    assert 0 < (prefix[:, 1] == 0).sum() < row


@pytest.mark.parametrize("kind", ["adapter", "block", "recurrent"])
def test_what_is_recorded_is_what_the_gate_saw(tiny: Callable, kind: str) -> None:
    """Heads with memory too, on chains and below siblings. Planted bugs: a memory asked for another round's nodes, true
    states where the head draws on its own."""
    engine = engine_with(tiny, kind)
    heads = engine.heads
    assert heads is not None
    recorder = Recorder(heads, engine.decoder.config.vocab_size, [], engine.decoder.device)
    gate = every(heads.exits, Gate(0.5, 99.0), max_depth=3, max_nodes=9)
    seen: list[DraftTree] = []

    def observe(on: Machinery, works: Any, logits: Any) -> None:
        recorder(on, works, logits)
        seen.extend(work.tree for work in works)

    engine.observer = observe
    engine.generate([[5, 80, 20], [3, 9, 27, 81]], policy=gate, max_new_tokens=12)
    entropies, row, compared = np.concatenate(recorder._said[heads.exits[0]])[:, 0], 0, 0
    for tree in seen:
        for node in range(1, len(tree)):
            assert entropies[row + tree.parents[node]] == pytest.approx(tree.entropies[node], rel=1e-4, abs=1e-5)
            compared += 1
        row += len(tree)
    assert row == recorder.num_nodes and compared > 50
    assert not seen[0].is_chain


def engine_with(tiny: Callable, kind: str, **options: Any) -> Engine:
    """A tiny model with an untrained head."""
    config, weights = tiny("llama2")
    sizes = layer_options(4, 2, 12, 48, 1e4, False) | ({"taps": (2, 4)} if kind == "recurrent" else {})
    spec = HeadSpec(kind, 0 if kind == "recurrent" else 2, {} if kind == "adapter" else sizes)
    torch.manual_seed(3)
    heads = HeadSet(HeadSetConfig(config.hidden_size, config.vocab_size, config.num_layers, (spec,)))
    return Engine(Decoder(config, weights), None, heads, **options)


def on_gpu(engine: Engine) -> Engine:
    """The same with passes as they are on a GPU, `train.calibrate.measuring_engine`."""
    engine.tiles = replace(engine.tiles, gathered=True)
    return engine


@pytest.mark.parametrize("kind", ["adapter", "block", "recurrent"])
def test_a_gpus_passes_measure_the_same(tiny: Callable, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All sequences in one pass, against fixed tiles. Planted bug: one row's keys taken from another sequence."""
    monkeypatch.setattr(calibrating, "START_GATE", ALWAYS)
    fixed, wide = engine_with(tiny, kind), on_gpu(engine_with(tiny, kind, deterministic=False))
    prompts = [[5, 80], [3, 9, 27, 81], [100, 101], [7, 7, 7, 7], list(range(40, 75))]
    (one, before), (other, after) = (calibrate(e, prompts, max_new_tokens=8, batch=5) for e in (fixed, wide))
    assert one.num_nodes == other.num_nodes > 100
    for layer, parts in one._said.items():
        assert np.allclose(np.concatenate(parts), np.concatenate(other._said[layer]), atol=1e-4)
    assert np.array_equal(np.concatenate(one._prefix), np.concatenate(other._prefix))
    assert before.rehearsal == after.rehearsal
    assert before.joint == after.joint


@pytest.mark.parametrize("kind", ["adapter", "recurrent"])
def test_sequences_share_a_gpus_launches(tiny: Callable, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass attends once a layer whatever the number of sequences: a launch for each took minutes (docs/log.md)."""
    engine, calls = on_gpu(engine_with(tiny, kind, deterministic=False)), []
    original = forward.gathered_attention
    monkeypatch.setattr(forward, "gathered_attention", lambda *args: calls.append(len(args[0])) or original(*args))
    monkeypatch.setattr(forward.Span, "attend", None)
    counts = []
    for number in (1, 6):
        calls.clear()
        rehearse(engine, [[3, 9, 27]] * number, max_new_tokens=5)
        counts.append(len(calls))
        assert calls.count(number) == len(calls)
    assert counts[0] == counts[1] >= 5 * 4


def test_every_position_of_the_text_is_measured_once(engine: Engine) -> None:
    """Also where a stop id ends a text in mid-block: what hangs below it is never decoded."""
    plain = engine.generate(PROMPTS, speculation=False, max_new_tokens=12, ignore_eos=True)
    stop = plain[0].token_ids[6]
    written: list[int] = []
    found = record(engine, PROMPTS, max_new_tokens=12, stop_ids=[stop], batch=3, on_tokens=written.append)
    prefix = np.concatenate(found._prefix)
    assert len(written) == 2 and sum(written) < 12 * len(PROMPTS)
    assert (prefix[:, 1] == 1).sum() == sum(written)
    assert engine.observer is None
    calibration = found.fit()
    assert calibration.exits[2].num_tokens == calibration.exits[3].num_tokens == found.num_nodes == len(prefix)
    assert calibration.num_drafted == (prefix[:, 0] > 0).sum()
    assert found.fit(true_prefixes_only=True).exits[2].num_tokens == sum(written)
    assert "4 held-out prompts" in calibration.source


def test_the_observer_goes_also_when_decoding_fails(engine: Engine) -> None:
    with pytest.raises(ValueError, match="outside the vocabulary"):
        record(engine, [[10_000]])
    assert engine.observer is None
    with pytest.raises(ValueError, match="0 greedy held-out prompts"):
        record(engine, [])


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"a stone skips {i}"}) + "\n" for i in range(30)))
    return path


def settings(prompts: Path, tiny_folder: Path, heads: Path, **changes: Any) -> Settings:
    given = {"max_new_tokens": 6, "held_out_percent": 30.0, "max_prompts": 4, "device": "cpu", "progress": False}
    return Settings(str(tiny_folder), str(heads), str(prompts), dtype=torch.float32, **given | changes)


def test_only_held_out_prompts_are_measured(
    prompts: Path, tiny_folder: Path, tiny_heads_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug: the filter left out, or the wrong share of a set that records another one."""
    seen: list[str] = []
    monkeypatch.setattr(command, "encode_chat", lambda tokenizer, text: seen.append(text) or [5, 6, 7])
    texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    recalibrate(settings(prompts, tiny_folder, tiny_heads_folder, out=str(tmp_path / "out")))
    assert seen == [text for text in texts if is_held_out(text, 30.0)] and 0 < len(seen) < 30
    heads = HeadSet.load(tiny_heads_folder)
    assert command._recorded_percent(heads) == 3.0
    object.__setattr__(heads.config, "training", {"config": {"held_out_percent": 12.5}})
    assert command._recorded_percent(heads) == 12.5
    with pytest.raises(ValueError, match="held-out 0.001 percent"):
        recalibrate(settings(prompts, tiny_folder, tiny_heads_folder, held_out_percent=0.001))


def test_prompts_are_taken_evenly_over_the_file(
    engine: Engine, prompts: Path, tiny_folder: Path, tiny_heads_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A file sorted by task is measured and rehearsed on all of its tasks. Planted bug seen to fail: the first ones."""
    measured: list[list[list[int]]] = []
    monkeypatch.setattr(command, "encode_chat", lambda tokenizer, text: [5, int(text.split()[-1])])

    def note(engine: Engine, prompts: list[list[int]], **options: Any) -> Any:
        measured.append(prompts)
        return calibrate(engine, prompts, **options)

    monkeypatch.setattr(command, "calibrate", note)
    changes = {"held_out_percent": 100.0, "max_prompts": 3, "out": str(tmp_path / "out")}
    recalibrate(settings(prompts, tiny_folder, tiny_heads_folder, **changes))
    assert measured == [[[5, 0], [5, 10], [5, 20]]]
    monkeypatch.setattr(rehearsing, "NUM_PROMPTS", 2)
    asked: list[list[int]] = []
    monkeypatch.setattr(engine, "generate", lambda prompts, **options: asked.extend(prompts) or [])
    rehearse(engine, PROMPTS)
    assert asked == [PROMPTS[0], PROMPTS[2]]


def test_a_set_is_calibrated_anew(prompts: Path, tiny_folder: Path, tiny_heads_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "calibrated"
    found = recalibrate(settings(prompts, tiny_folder, tiny_heads_folder, out=str(out)))
    assert found.folder == out
    loaded = HeadSet.load(out)
    assert loaded.calibration == found.calibration
    assert (out / "heads.safetensors").read_bytes() == (tiny_heads_folder / "heads.safetensors").read_bytes()
    summary = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert set(summary["exits"]) == {"2", "3"}
    assert summary["exits"]["3"]["best_measure"] in ("entropy", "max_prob", "margin")
    with pytest.raises(FileExistsError, match="exists"):
        settings(prompts, tiny_folder, tiny_heads_folder, out=str(out))


def test_plots_lie_beside_their_numbers(tiny_heads_folder: Path, tmp_path: Path) -> None:
    calibration = HeadSet.load(tiny_heads_folder).calibration
    assert calibration is not None
    drawn = plot_calibration(calibration, tmp_path)
    names = ["agreement_by_layer", "entropy_histogram", "coverage_curves", "reliability"]
    assert [path.stem for path in drawn] == names
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "entropy_histogram.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    counted = sum(int(row["right"]) + int(row["wrong"]) for row in rows if row["exit_layer"] == "2")
    assert counted == calibration.exits[2].num_tokens
    right = sum(int(row["right"]) for row in rows if row["exit_layer"] == "2")
    assert right / counted == pytest.approx(calibration.exits[2].agreement, abs=1e-4)


def test_missing_matplotlib_is_said_before_measuring(
    tiny_heads_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    calibration = HeadSet.load(tiny_heads_folder).calibration
    assert calibration is not None
    with pytest.raises(ValueError, match=r"pip install 'skipstone\[plot\]'"):
        plot_calibration(calibration, tmp_path / "plots")
    assert not (tmp_path / "plots").exists()
