"""`train` from prompts to a loadable set, and its resume after a SIGKILL in the middle of a save (hazard 21)."""

from __future__ import annotations

import functools
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
from skipstone.train import Base, Recipe, TrainConfig, newest_checkpoint, run, run_text, train, training_projection
from skipstone.train.choose import choose_heads
from skipstone.train.data import SelfText, is_held_out
from skipstone.train.generate import write_text
from skipstone.train.run import fresh_heads, look
from skipstone.train.sources import Prompt
from skipstone.train.stop import Stopped
from skipstone.train.trainer import HeadTrainer

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


@pytest.fixture(autouse=True)
def _short_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens a prompt: calibration has its own tests."""
    monkeypatch.setattr(run, "calibrate", functools.partial(run.calibrate, max_new_tokens=2))


@pytest.fixture
def settings(tmp_path: Path) -> TrainConfig:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": " ".join(str((i * 5 + j * 3) % 190) for j in range(3 + i % 6))} for i in range(40)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = Recipe(steps=6, batch_tokens=300, chunk_tokens=64, lr=3e-3, warmup=2)
    return TrainConfig(
        "tiny", str(tmp_path / "out"), str(prompts), exits=(1, 3), options={"width": 8}, draft_vocab=60,
        max_new_tokens=12, held_out_percent=25.0, eval_every=2, eval_texts=4, save_every=2, progress=False,
        device="cpu", recipe=recipe,
    )  # fmt: skip


def test_a_run_ends_with_a_calibrated_set(settings: TrainConfig, base: Base) -> None:
    heads = train(settings, base)
    out = Path(settings.out)
    loaded = HeadSet.load(out / "heads", base.identity)
    assert loaded.exits == heads.exits == (1, 3)
    assert loaded.config.draft_vocab == 60
    assert 7 in loaded.draft_ids.tolist()  # the stop id can always be drafted
    assert loaded.calibration is not None
    held_out = load_file(out / "held_out.safetensors")["greedy"]
    assert f"{int(held_out.sum())} held-out prompts" in loaded.calibration.source
    report = json.loads((out / "report.json").read_text())
    assert [entry["step"] for entry in report["curve"]] == [2, 4, 6]
    assert set(report["curve"][0]["tokens_per_verification"]) == {"1", "3"}
    assert str(settings.out) not in (out / "heads" / "config.json").read_text()
    assert "| 3 |" in (out / "heads" / "README.md").read_text()
    facts = report["run"]
    assert facts["config"]["recipe"]["seed"] == 0 and facts["config"]["options"] == {"width": 8}
    assert facts["versions"]["torch"] == torch.__version__ and facts["device"].startswith("cpu")
    recorded = json.loads((out / "run.json").read_text())
    assert recorded["heads"][0] == {"kind": "adapter", "exit_layer": 1, "options": {"width": 8}}
    assert recorded["git_revision"] == facts["git_revision"]


def test_a_stored_set_names_no_folder_of_this_machine(settings: TrainConfig, base: Base, tmp_path: Path) -> None:
    train(settings, base)
    train(replace(settings, out=str(tmp_path / "other"), prompts=None, text_from=settings.out), base)
    for out in (settings.out, tmp_path / "other"):
        assert str(tmp_path) not in (Path(out) / "heads" / "config.json").read_text(encoding="utf-8")


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
from skipstone.train import Base, Recipe, TrainConfig, checkpoint, run, train
import functools, json
run.calibrate = functools.partial(run.calibrate, max_new_tokens=2)
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

    def child(out: str, kill: bool) -> int:
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

    assert child("killed", kill=True) == -signal.SIGKILL
    found = newest_checkpoint(tmp_path / "killed" / "checkpoints")
    assert found is not None
    assert found.step == 2
    assert not (tmp_path / "killed" / "heads").exists()
    assert child("killed", kill=False) == 0
    train(replace(settings, out=str(tmp_path / "whole")), base)
    assert_same_end(tmp_path / "killed", tmp_path / "whole")


def stop_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, signum: int) -> None:
    """A signal to this process in the middle of the `call`-th call of a function."""
    original, calls = getattr(owner, name), []

    def stopping(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), signum)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, stopping)


def assert_same_end(one: Path, two: Path) -> None:
    ends = [newest_checkpoint(folder / "checkpoints") for folder in (one, two)]
    assert ends[0] is not None and ends[1] is not None
    assert ends[0].values == ends[1].values
    assert ends[0].tensors.keys() == ends[1].tensors.keys()
    for name, tensor in ends[0].tensors.items():
        assert torch.equal(tensor, ends[1].tensors[name]), name
    assert (one / "heads" / "heads.safetensors").read_bytes() == (two / "heads" / "heads.safetensors").read_bytes()


@pytest.fixture
def in_rounds(settings: TrainConfig) -> TrainConfig:
    """Rounds of steps 1-2, 3-4 and 5-7, checkpoints only where a round or the run ends."""
    return replace(settings, rounds=3, prompts_per_round=12, save_every=100, recipe=replace(settings.recipe, steps=7))


@pytest.mark.hazard(21)
@pytest.mark.parametrize(
    ("place", "call", "signum", "saved"),
    [
        ("step", 1, signal.SIGTERM, 1),
        ("step", 2, signal.SIGINT, 2),  # the last step of a round: the next one's text is not yet written
        ("step", 6, signal.SIGTERM, 6),
        ("text", 3, signal.SIGTERM, 2),  # while the second round's text is written (the first call is held-out text)
    ],
)
def test_stopped_by_a_signal_then_resumed_equals_an_unbroken_run(
    in_rounds: TrainConfig, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    place: str, call: int, signum: int, saved: int,
) -> None:  # fmt: skip
    """Catches: a round's text drawn from another seed, the data order begun anew in mid-round or continued into the
    next round's text, a draft vocabulary of the current round's text, no checkpoint at the signal."""
    owner, name = (HeadTrainer, "step") if place == "step" else (run_text, "write_text")
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        stop_at(patch, owner, name, call, signum)
        with pytest.raises(Stopped, match=f"stopped by {signal.Signals(signum).name}"):
            train(in_rounds, base)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    found = newest_checkpoint(Path(in_rounds.out) / "checkpoints")
    assert found is not None and found.step == saved
    train(in_rounds, base)
    train(replace(in_rounds, out=str(tmp_path / "whole")), base)
    assert_same_end(Path(in_rounds.out), tmp_path / "whole")


def test_rounds_keep_one_round_of_text(in_rounds: TrainConfig, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round writes other prompts with another seed, and only the last round's text is left."""
    seen: list[tuple[list[list[int]], int]] = []

    def spy(decoder: Any, prompts: Any, temperatures: Any, sampling: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(([list(prompt) for prompt in prompts], sampling.seed))
        return write_text(decoder, prompts, temperatures, sampling, *args, **kwargs)

    monkeypatch.setattr(run_text, "write_text", spy)
    heads = train(in_rounds, base)
    held_out, *rounds = seen
    assert len(rounds) == 3 and len({seed for _, seed in seen}) == 4
    assert all(len(prompts) == 24 for prompts, _ in rounds)  # greedy and sampled
    assert rounds[0][0] != rounds[1][0] != rounds[2][0]
    assert not {tuple(p) for p in held_out[0]} & {tuple(p) for prompts, _ in rounds for p in prompts}
    out = Path(in_rounds.out)
    assert int(load_file(out / "text.safetensors")["round"]) == 2
    files = {path.name for path in out.iterdir() if path.is_file()}
    assert files == {"text.safetensors", "held_out.safetensors", "run.json", "report.json"}
    written = newest_checkpoint(out / "checkpoints").values["written_tokens"]
    assert heads.config.training["written_tokens"] == sum(written.values()) and set(written) == {"0", "1", "2"}


def test_without_prompts_the_model_writes_its_own(
    in_rounds: TrainConfig, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New prompts each round; none that hashes into the held-out split is ever trained on, in later rounds too."""
    asked, trained = [], []

    def write_prompts(decoder: Any, tokenizer: Any, count: int, *args: Any, seed: int, **kwargs: Any) -> list[Prompt]:
        asked.append((count, seed))
        words = [f"{seed % 7} {i} {i * 3 % 190}" for i in range(count)]
        return [Prompt(text, tokenizer.encode(text)) for text in words]

    def spy(decoder: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        trained.append({" ".join(map(str, prompt)) for prompt in prompts})
        return write_text(decoder, prompts, *args, **kwargs)

    monkeypatch.setattr(run_text, "write_prompts", write_prompts)
    monkeypatch.setattr(run_text, "write_text", spy)
    train(replace(in_rounds, prompts=None, prompts_per_round=30), base)
    assert [count for count, _ in asked] == [30, 30, 30] and len({seed for _, seed in asked}) == 3
    held_out, *rounds = trained
    assert all(is_held_out(prompt, 25.0) for prompt in held_out) and len(held_out) > 1
    assert not any(is_held_out(prompt, 25.0) for prompts in rounds for prompt in prompts)
    assert not rounds[0] & rounds[1] and not rounds[1] & rounds[2]


def test_plain_text_is_trained_on_as_it_is(settings: TrainConfig, base: Base, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(" ".join(str((i * 7 + j) % 190) for j in range(20)) + "\n" for i in range(60)))
    heads = train(replace(settings, prompts=str(corpus), max_prompt_tokens=8), base)
    text = SelfText.from_tensors(load_file(Path(settings.out) / "text.safetensors"))
    assert set(text.prompt_lens.tolist()) == {1} and max(text.lens) <= 20
    words = " ".join(corpus.read_text().split())
    assert all(" ".join(map(str, text.text(i).tolist())) in words for i in range(len(text)))
    assert heads.calibration is not None  # on what the model goes on with after held-out pieces


def test_the_recurrent_kind_trains_with_its_defaults(settings: TrainConfig, base: Base) -> None:
    """Exit 0, taps by depth, layers of the base's sizes that start from its last one."""
    config = replace(settings, kind="recurrent", exits=None, options={}, recipe=replace(settings.recipe, chain=2))
    specs = choose_heads(config, base.decoder.config)
    assert [spec.exit_layer for spec in specs] == [0]
    assert specs[0].options["taps"][-1] == 4 and specs[0].options["source"] == 3
    text = SelfText.of([[5, 6, 7, 8]] * 3, [2] * 3, [True] * 3)
    config_, weights = base.decoder.config, {"layers.3.o.weight": torch.ones(48, 48)}
    heads = fresh_heads(config, specs, replace(base, weights=weights), text)
    assert torch.equal(heads.heads[0].layers[0].o.weight, weights["layers.3.o.weight"]), config_
    trained = look(base.decoder, heads.attach(training_projection(base.decoder)), text, [0, 1, 2], config.recipe)
    assert set(trained["agreement"]) == set(trained["tokens_per_verification"]) == {"0"}
