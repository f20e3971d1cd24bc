"""`train` from prompts to a loadable set, and its resume after a SIGKILL in the middle of a save (hazard 21)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from skipstone.engine.model import Decoder
from skipstone.heads import BaseIdentity, HeadSet, base_fingerprint
from skipstone.train import Base, Recipe, TrainConfig, newest_checkpoint, train
from skipstone.train.__main__ import parse

# A stand-in for a tokenizer: words are numbers. Also run by the child process below.
STUB = """
class Words:
    has_chat_template = False
    stop_ids = (7,)
    def encode(self, text):
        return [int(word) for word in text.split()]
"""
namespace: dict[str, Any] = {}
exec(STUB, namespace)  # noqa: S102 (the constant above, so that the child has the very same class)


@pytest.fixture
def base(tiny: Callable) -> Base:
    config, weights = tiny("llama3")
    identity = BaseIdentity("tiny", base_fingerprint(weights, config.num_layers))
    return Base(Decoder(config, weights), namespace["Words"](), identity)


@pytest.fixture
def settings(tmp_path: Path) -> TrainConfig:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": " ".join(str((i * 5 + j * 3) % 190) for j in range(3 + i % 6))} for i in range(40)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = Recipe(steps=6, batch_tokens=300, chunk_tokens=64, lr=3e-3, warmup=2)
    return TrainConfig(
        "tiny", str(prompts), str(tmp_path / "out"), (1, 3), width=8, draft_vocab=60, max_new_tokens=12,
        held_out_percent=25.0, eval_every=2, eval_texts=4, save_every=2, progress=False, recipe=recipe,
    )  # fmt: skip


def test_a_run_ends_with_a_calibrated_set(settings: TrainConfig, base: Base) -> None:
    heads = train(settings, base)
    out = Path(settings.out)
    loaded = HeadSet.load(out / "heads", base.identity)
    assert loaded.exits == heads.exits == (1, 3)
    assert loaded.config.draft_vocab == 60
    assert 7 in loaded.draft_ids.tolist()  # the stop id can always be drafted
    assert loaded.calibration is not None
    held_out = load_file(out / "text.safetensors")["held_out.greedy"]
    assert f"{int(held_out.sum())} held-out prompts" in loaded.calibration.source
    report = json.loads((out / "report.json").read_text())
    assert [entry["step"] for entry in report["curve"]] == [2, 4, 6]
    assert set(report["curve"][0]["tokens_per_verification"]) == {"1", "3"}
    assert str(settings.out) not in (out / "heads" / "config.json").read_text()
    assert "| 3 |" in (out / "heads" / "README.md").read_text()


def test_two_runs_with_one_seed_are_equal(settings: TrainConfig, base: Base, tmp_path: Path) -> None:
    train(settings, base)
    train(replace(settings, out=str(tmp_path / "again")), base)
    one, two = (Path(p) / "heads" / "heads.safetensors" for p in (settings.out, tmp_path / "again"))
    assert one.read_bytes() == two.read_bytes()


def test_a_folder_of_another_run_is_refused(settings: TrainConfig, base: Base) -> None:
    train(settings, base)
    with pytest.raises(ValueError, match="other settings .recipe."):
        train(replace(settings, recipe=replace(settings.recipe, lr=1e-3)), base)
    train(replace(settings, keep=1), base)  # what does not change the result may change


CHILD = """
import os, pickle, signal, sys
import torch
torch.set_num_threads(1)
from safetensors.torch import load_file
from skipstone.engine.config import ModelConfig
from skipstone.engine.model import Decoder
from skipstone.heads import BaseIdentity
from skipstone.train import Base, Recipe, TrainConfig, checkpoint, train
import json
given = json.loads(sys.argv[1])
config = ModelConfig.from_json(given["model"])
base = Base(Decoder(config, load_file(given["weights"])), Words(), BaseIdentity("tiny", given["fingerprint"]))
settings = given["settings"]
recipe = Recipe(**settings.pop("recipe"))
settings["exits"] = tuple(settings["exits"])
if given["kill"]:
    rename, seen = os.rename, []
    def deadly(source, target):
        if str(target).endswith("step-4"):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)
    checkpoint.os.rename = deadly
train(TrainConfig(**settings, recipe=recipe), base)
"""


@pytest.mark.hazard(21)
def test_killed_while_saving_then_resumed_equals_an_unbroken_run(
    settings: TrainConfig, base: Base, tiny: Callable, tmp_path: Path
) -> None:
    """SIGKILL as step 4 is renamed into place: step 2 is the newest whole one, and the run that goes on ends with the
    same bits as one that was never killed, its checkpoint's moments included."""
    from dataclasses import asdict

    from safetensors.torch import save_file

    config, weights = tiny("llama3")
    save_file({k: t.contiguous().clone() for k, t in weights.items()}, tmp_path / "weights.safetensors")

    def run(out: str, kill: bool) -> int:
        given = {
            "model": config.to_json(),
            "weights": str(tmp_path / "weights.safetensors"),
            "fingerprint": base.identity.fingerprint,
            "settings": asdict(replace(settings, out=str(tmp_path / out))),
            "kill": kill,
        }
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-c", STUB + CHILD, json.dumps(given)], env=environment, timeout=120, check=False
        ).returncode

    assert run("killed", kill=True) == -signal.SIGKILL
    found = newest_checkpoint(tmp_path / "killed" / "checkpoints")
    assert found is not None
    assert found.step == 2
    assert not (tmp_path / "killed" / "heads").exists()
    assert run("killed", kill=False) == 0
    assert run("whole", kill=False) == 0
    ends = [newest_checkpoint(tmp_path / name / "checkpoints") for name in ("killed", "whole")]
    assert ends[0] is not None
    assert ends[1] is not None
    assert ends[0].step == ends[1].step == 6
    assert ends[0].tensors.keys() == ends[1].tensors.keys()
    for name, tensor in ends[0].tensors.items():
        assert torch.equal(tensor, ends[1].tensors[name]), name
    assert ends[0].values == ends[1].values


def test_command_line_reaches_every_setting() -> None:
    given = "--model m --prompts p --out o --exits 2,5 --draft-vocab 0 --steps 7 --lr 0.1 --device cuda --no-progress"
    config = parse(given.split())
    assert config.exits == (2, 5)
    assert config.draft_vocab is None
    assert (config.recipe.steps, config.recipe.lr, config.device, config.progress) == (7, 0.1, "cuda", False)
    with pytest.raises(SystemExit):
        parse([*given.split(), "--stpes", "3"])
