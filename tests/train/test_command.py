"""`skipstone train` from the outside: what it prints and leaves, exit codes, signals, trackers."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from skipstone import cli
from skipstone.engine.load import load
from skipstone.heads import HeadSet
from skipstone.train import newest_checkpoint, progress, run
from skipstone.train.__main__ import main
from typer.testing import CliRunner


@pytest.fixture(autouse=True)
def _short_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "calibrate", functools.partial(run.calibrate, max_new_tokens=2))


@pytest.fixture
def arguments(tiny_folder: Path, tmp_path: Path) -> list[str]:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"stone {i} on water {i * i}"}) + "\n" for i in range(24)))
    settings = (
        f"--model {tiny_folder} --out {tmp_path / 'out'} --prompts {prompts} --device cpu --dtype fp32 "
        "--draft-vocab 100 --max-new-tokens 8 --held-out-percent 25 "
        "--steps 4 --batch-tokens 400 --eval-every 2 --eval-texts 4"
    )
    return [*settings.split(), "--option", "width=8"]


def test_from_a_model_to_heads_that_load(
    arguments: list[str], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exits by depth, a line of progress a look, and a second start that has nothing left to train."""
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert [line.split(":")[0] for line in shown.out.splitlines()] == [
        "exit 1",
        "exit 2",
        "exit 3",
        shown.out.splitlines()[-1],
    ]
    assert "step 2: held-out agreement" in shown.err and "tokens per verification" in shown.err
    engine = load(tiny_folder, heads=tmp_path / "out" / "heads", device="cpu", progress=False)
    assert engine.heads is not None and engine.heads.calibration is not None
    assert main(arguments) == 0
    assert main([*arguments, "--lr", "0.1"]) == 2
    assert "other settings (recipe)" in capsys.readouterr().err


def test_the_console_script_passes_arguments_on() -> None:
    done = CliRunner().invoke(cli.app, ["train", "--model", "m", "--out", "o", "--stpes", "3"])
    assert done.exit_code == 2 and "skipstone: unrecognized arguments: --stpes 3" in done.stderr
    assert "--batch-tokens" in CliRunner().invoke(cli.app, ["train", "--help"]).stdout


@pytest.mark.parametrize("kind", ["adapter", "recurrent"])
def test_dry_run_says_what_it_takes_and_leaves_untrained_heads(
    arguments: list[str], tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    given = [*(arguments if kind == "adapter" else arguments[:-2]), "--kind", kind, "--dry-run", "--no-progress"]
    assert main(given) == 0
    shown = capsys.readouterr().out
    folder = tmp_path / "out" / "untrained"
    heads = HeadSet.load(folder)
    assert f"heads: {heads.num_parameters:,} parameters, {kind} at {heads.exits[0]}" in shown
    assert f"{heads.num_parameters * 8 / 2**20:,.1f} MiB  optimiser" in shown
    sizes = [float(size.replace(",", "")) for size in re.findall(r"([\d,.]+) MiB", shown)]
    assert sizes[-1] == pytest.approx(sum(sizes[:-1]), abs=0.05 * len(sizes))
    assert re.search(r"step: \d+\.\d+ s for 384 tokens", shown)
    assert load(tiny_folder, heads=folder, device="cpu", progress=False).heads is not None
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["untrained"]  # the folder is free for the run


@pytest.mark.hazard(21)
def test_sigterm_saves_and_ends_with_its_own_code(arguments: list[str], tmp_path: Path) -> None:
    """A child in the middle of 100,000 steps: 75, one sentence, and a checkpoint from which the command goes on."""
    command = [sys.executable, "-m", "skipstone.train", *arguments, "--steps", "100000", "--eval-every", "100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([*command, "--save-every", "2"], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        saved = tmp_path / "out" / "checkpoints" / "latest"
        deadline = time.monotonic() + 120
        while not saved.exists():
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
        _, said = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 75, said
    found = newest_checkpoint(tmp_path / "out" / "checkpoints")
    assert found is not None
    last = said.strip().splitlines()[-1]
    assert last == f"skipstone: stopped by SIGTERM, saved at step {found.step:,} of 100,000; the same command goes on"


def test_a_tracker_that_is_not_installed_is_refused_first(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate.tracking", None)
    monkeypatch.setattr(
        run, "load_base", lambda *_: pytest.fail("the model was loaded before the tracker was looked for")
    )
    assert main([*arguments, "--tracker", "tensorboard"]) == 2
    assert "skipstone[train]" in capsys.readouterr().err


class Spy:
    """Stands for one of Accelerate's trackers."""

    requires_logging_directory = True
    seen: list[tuple[str, Any]] = []

    def __init__(self, name: str, logging_dir: str) -> None:
        self.seen.append(("init", (name, Path(logging_dir).name)))

    def start(self) -> None:
        self.seen.append(("start", None))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.seen.append(("settings", values))

    def log(self, values: dict[str, float], step: int) -> None:
        self.seen.append(("log", (step, values)))

    def finish(self) -> None:
        self.seen.append(("finish", None))


def test_a_tracker_is_told_settings_losses_and_looks(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = types.ModuleType("accelerate.tracking")
    tracking.LOGGER_TYPE_TO_CLASS = {"spy": Spy, "absent": Spy}  # type: ignore[attr-defined]
    tracking.get_available_trackers = lambda: ["spy"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "accelerate", types.ModuleType("accelerate"))
    monkeypatch.setitem(sys.modules, "accelerate.tracking", tracking)
    monkeypatch.setattr(progress, "TRACK_EVERY", 2)
    monkeypatch.setattr(Spy, "seen", [])
    assert main([*arguments, "--tracker", "spy"]) == 0
    kinds = [kind for kind, _ in Spy.seen]
    assert kinds == ["init", "start", "settings", "log", "log", "log", "log", "finish"]
    assert Spy.seen[2][1]["recipe.steps"] == 4 and Spy.seen[2][1]["options.width"] == 8
    step, values = Spy.seen[4][1]
    assert step == 2 and set(values) >= {"held_out/agreement/exit_1", "held_out/tokens_per_verification/exit_3"}
    assert set(Spy.seen[3][1][1]) >= {"train/loss/exit_1", "train/agreement/exit_3"}
    for wrong, message in (("absent", "'absent' is not installed"), ("nope", "expected one of absent, spy")):
        with pytest.raises(ValueError, match=message):
            progress.Tracker(wrong, Path("o"), {})


def test_tensorboard_through_accelerate(arguments: list[str], tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the 'train' extra is not installed")
    pytest.importorskip("tensorboard", reason="the 'train' extra is not installed")
    assert main([*arguments, "--tracker", "tensorboard"]) == 0
    assert list((tmp_path / "out" / "tracker").rglob("events.out.tfevents*"))
