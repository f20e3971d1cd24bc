"""Checkpoints survive a kill at every moment of a save (hazard 21)."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from skipstone.train.checkpoint import newest_checkpoint, save_checkpoint


def make_state(step: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.randn(50, generator=torch.Generator().manual_seed(step)), "step": torch.tensor(float(step))}


def test_round_trip_and_pruning(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, make_state(step), {"epoch": step}, keep=2)
    assert {p.name for p in tmp_path.iterdir()} == {"step-2", "step-10", "latest"}
    assert (tmp_path / "latest").read_text() == "step-10\n"
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.values) == (10, {"epoch": 10})
    assert torch.equal(found.tensors["weight"], make_state(10)["weight"])


def test_nothing_there() -> None:
    assert newest_checkpoint(Path("no-such-folder")) is None


@pytest.mark.hazard(21)
@pytest.mark.parametrize("damage", ["bit", "cut", "no manifest", "no state", "tmp only", "empty folder"])
def test_a_damaged_newest_is_passed_over(tmp_path: Path, damage: str) -> None:
    """Also where `latest` points at it. Catches: trusting `latest`, or a folder for its name."""
    save_checkpoint(tmp_path, 1, make_state(1), {})
    newest = save_checkpoint(tmp_path, 2, make_state(2), {})
    state = newest / "state.safetensors"
    data = state.read_bytes()
    if damage == "bit":
        state.write_bytes(data[:-1] + bytes([data[-1] ^ 4]))
    elif damage == "cut":
        state.write_bytes(data[:-7])
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    elif damage == "no state":
        state.unlink()
    elif damage == "tmp only":
        newest.rename(tmp_path / "step-2.tmp")
    else:
        for file in newest.iterdir():
            file.unlink()
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1


SAVER = """
import os, signal, sys
import torch
from skipstone.train import checkpoint
root, at = sys.argv[1], int(sys.argv[2])
calls = 0
def deadly(module, name):
    original = getattr(module, name)
    def call(*args, **kwargs):
        global calls
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1
        return original(*args, **kwargs)
    setattr(module, name, call)
def state(step):
    return {"weight": torch.randn(50, generator=torch.Generator().manual_seed(step)), "step": torch.tensor(float(step))}
checkpoint.save_checkpoint(root, 1, state(1), {"epoch": 1}, keep=1)
for module, name in ((checkpoint.os, "fsync"), (checkpoint.os, "rename"), (checkpoint.os, "replace"),
                     (checkpoint.shutil, "rmtree")):
    deadly(module, name)
checkpoint.save_checkpoint(root, 2, state(2), {"epoch": 2}, keep=1)
print(calls)
"""


@pytest.mark.hazard(21)
def test_sigkill_at_every_system_call_of_a_save(tmp_path: Path) -> None:
    """A child kills itself with SIGKILL before the n-th fsync, rename, replace or removal; whatever n is, the newest
    whole checkpoint is step 1 or step 2, bit for bit, and saving goes on from there. Catches: pruning before the
    rename, writing into the final name, a manifest written first."""
    # one process forks a child for each moment: starting torch a dozen times would take a minute
    script = f"""
import os, sys
source = {SAVER!r}
import torch
from skipstone.train import checkpoint
results = []
for at in range(40):
    root = sys.argv[1] + f"/kill-{{at}}"
    child = os.fork()
    if child == 0:
        sys.argv = ["saver", root, str(at)]
        sys.stdout = open(os.devnull, "w")
        exec(source)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    results.append([at, os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0])
    if results[-1][1] == 0:
        break
import json
print(json.dumps(results))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    results = json.loads(done.stdout)
    assert results[-1][1] == 0, "no run got through: the moments were not exhausted"
    assert all(code == signal.SIGKILL for _, code in results[:-1])
    assert len(results) > 8
    steps = []
    for at, _ in results:
        root = tmp_path / f"kill-{at}"
        found = newest_checkpoint(root)
        assert found is not None, f"killed at call {at}: nothing whole is left"
        assert torch.equal(found.tensors["weight"], make_state(found.step)["weight"])
        assert found.values == {"epoch": found.step}
        steps.append(found.step)
        save_checkpoint(root, 3, make_state(3), {"epoch": 3}, keep=1)
        assert {p.name for p in root.iterdir() if p.is_dir()} == {"step-3"}
    assert steps == sorted(steps)
    assert set(steps) == {1, 2}
