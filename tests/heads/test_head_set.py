"""Head sets on disk: what is written comes back, and nothing else is ever loaded (hazards 17-20)."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from skipstone.heads import (
    ArtefactError,
    BaseIdentity,
    Calibration,
    HeadSet,
    HeadSetConfig,
    HeadSpec,
    Projection,
    adapter_config,
    fit_calibration,
    shipped_folders,
)
from skipstone.heads import artefact as artefact_module

V, D = 29, 12
BASE = BaseIdentity("tiny", "a" * 64, "b" * 64, "1.0")


def make_set(calibrated: bool = True) -> HeadSet:
    torch.manual_seed(0)
    heads = HeadSet(adapter_config([1, 3], D, V, 4, 5, 7), torch.tensor([3, 1, 28, 9, 10, 11, 12]), BASE)
    for layer in heads.exits:
        torch.nn.init.normal_(heads.heads[layer].down)
    if calibrated:
        entropy = torch.linspace(0.0, 3.0, 200).numpy()
        rank = (torch.arange(200) > 150).int().numpy() * 3
        heads.calibration = fit_calibration(dict.fromkeys((1, 3), entropy), dict.fromkeys((1, 3), rank), "a test")
    return heads


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_set().save(tmp_path / "set")
    return tmp_path / "set"


def rewrite(folder: Path, name: str, change: Callable[[Path], None]) -> None:
    """Change a file and make the manifest agree, so that only the check under test can object."""
    import hashlib

    change(folder / name)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    def change(path: Path) -> None:
        tensors = {k: t.clone() for k, t in load_file(path).items()}
        edit(tensors)
        save_file(tensors, path)

    rewrite(folder, "heads.safetensors", change)


def edit_manifest(folder: Path, edit: Callable[[dict], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_round_trip(folder: Path) -> None:
    saved, loaded = make_set(), HeadSet.load(folder, BASE)
    assert loaded.exits == (1, 3)
    assert loaded.base == BASE
    assert loaded.calibration == saved.calibration
    assert loaded.draft_ids.tolist() == saved.draft_ids.tolist()
    for layer in saved.exits:
        for name, parameter in saved.heads[layer].named_parameters():
            expected = parameter.detach().bfloat16().float()
            assert torch.equal(loaded.heads[layer].get_parameter(name), expected), name
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "heads.safetensors", "calibration.json", "manifest.json", "README.md"
    }  # fmt: skip


def test_an_uncalibrated_set_has_no_gate(tmp_path: Path) -> None:
    make_set(calibrated=False).save(tmp_path / "set")
    loaded = HeadSet.load(tmp_path / "set", BASE)
    assert loaded.calibration is None
    with pytest.raises(ValueError, match="no calibration"):
        loaded.gate(1, 0.9)


def test_the_card_may_be_edited(folder: Path) -> None:
    (folder / "README.md").write_text("my notes")
    HeadSet.load(folder, BASE)


@pytest.mark.hazard(17)
def test_missing_tensor_is_refused(folder: Path) -> None:
    """Catches: a head left at its random start."""
    edit_tensors(folder, lambda t: t.pop("exit.3.down"))
    with pytest.raises(ArtefactError, match=r"misses \['exit.3.down'\]"):
        HeadSet.load(folder, BASE)


@pytest.mark.hazard(17)
def test_unexpected_tensor_is_refused(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"exit.2.down": torch.zeros(1)}))
    with pytest.raises(ArtefactError, match=r"unexpected \['exit.2.down'\]"):
        HeadSet.load(folder, BASE)


@pytest.mark.hazard(17)
def test_misshaped_tensor_is_refused(folder: Path) -> None:
    """A [1] tensor would broadcast into the parameter without a word."""
    edit_tensors(folder, lambda t: t.update({"exit.1.gain": torch.ones(1)}))
    with pytest.raises(ArtefactError, match=r"exit.1.gain has shape \(1,\)"):
        HeadSet.load(folder, BASE)


@pytest.mark.hazard(17)
def test_other_base_is_refused_unless_allowed(folder: Path) -> None:
    tuned = replace(BASE, model_id="tuned", fingerprint="c" * 64)
    with pytest.raises(ArtefactError, match="allow_base_mismatch"):
        HeadSet.load(folder, tuned)
    assert HeadSet.load(folder, tuned, allow_base_mismatch=True).exits == (1, 3)
    with pytest.raises(ArtefactError, match="tokenizer"):
        HeadSet.load(folder, replace(BASE, tokenizer_sha256="d" * 64))


@pytest.mark.hazard(17)
@pytest.mark.parametrize("name", ["config.json", "heads.safetensors", "calibration.json", "manifest.json"])
def test_missing_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ArtefactError, match=name):
        HeadSet.load(folder, BASE)


@pytest.mark.hazard(17)
def test_other_format_version_is_refused(folder: Path) -> None:
    edit_manifest(folder, lambda m: m.update(format_version=2))
    with pytest.raises(ArtefactError, match="format version 2"):
        HeadSet.load(folder, BASE)


@pytest.mark.hazard(18)
@pytest.mark.parametrize("name", ["config.json", "heads.safetensors", "calibration.json"])
def test_one_flipped_bit_is_refused(folder: Path, name: str) -> None:
    """In the payload of safetensors, which itself does not notice. Catches: a hash that is not compared."""
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1
    (folder / name).write_bytes(bytes(data))
    with pytest.raises(ArtefactError, match="SHA-256"):
        HeadSet.load(folder, BASE)


@pytest.mark.hazard(18)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder: Path, tmp_path: Path, bad: float) -> None:
    edit_tensors(folder, lambda t: t["exit.1.up"].view(-1).__setitem__(4, bad))
    with pytest.raises(ArtefactError, match="NaN or Inf"):
        HeadSet.load(folder, BASE)
    heads = make_set()
    with torch.no_grad():
        heads.heads[1].up[0, 0] = bad
    with pytest.raises(ArtefactError, match="NaN or Inf"):
        heads.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.hazard(18)
def test_calibration_that_is_not_finite_is_refused(folder: Path) -> None:
    def spoil(path: Path) -> None:
        path.write_text(path.read_text().replace('"agreement":', '"agreement":NaN,"was":', 1))

    rewrite(folder, "calibration.json", spoil)
    with pytest.raises(ValueError, match="NaN"):
        HeadSet.load(folder, BASE)


@pytest.mark.hazard(19)
@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.json", "..\\secret.json", "..", "."])
def test_paths_out_of_the_folder_are_refused_unread(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_manifest(folder, lambda m: m["files"].update({name: "0" * 64}))
    read: list[Path] = []
    original = Path.read_bytes

    def recording(self: Path) -> bytes:
        read.append(self)
        return original(self)

    monkeypatch.setattr(Path, "read_bytes", recording)
    with pytest.raises(ArtefactError, match="leaves the folder"):
        HeadSet.load(folder, BASE)
    assert read == [folder / "manifest.json"]


class Trap:
    """Unpickling this makes a file: proof that code ran."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


@pytest.mark.hazard(20)
def test_a_pickle_named_as_safetensors_does_not_run(folder: Path, tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    rewrite(folder, "heads.safetensors", lambda path: path.write_bytes(pickle.dumps(Trap(str(trap)))))
    with pytest.raises(ArtefactError, match="not a safetensors file"):
        HeadSet.load(folder, BASE)
    assert not trap.exists()


@pytest.mark.hazard(20)
@pytest.mark.parametrize("name", ["heads.pt", "pytorch_model.bin", "heads.pkl"])
def test_a_manifest_that_lists_a_pickle_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    trap = tmp_path / "ran"
    (folder / name).write_bytes(pickle.dumps(Trap(str(trap))))
    edit_manifest(folder, lambda m: m["files"].update({name: "0" * 64}))
    with pytest.raises(ArtefactError, match="pickles can run code"):
        HeadSet.load(folder, BASE)
    assert not trap.exists()


def test_unknown_configuration_key_is_refused(folder: Path) -> None:
    def add_key(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": "x.py"}))

    rewrite(folder, "config.json", add_key)
    with pytest.raises(ArtefactError, match="auto_map"):
        HeadSet.load(folder, BASE)


def test_a_crash_while_saving_leaves_the_old_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: writing into the folder in place."""
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fail(path: Path, data: bytes) -> None:
        if path.name == "manifest.json":
            raise OSError("disk full")
        path.write_bytes(data)

    monkeypatch.setattr(artefact_module, "_write_flushed", fail)
    with pytest.raises(OSError, match="disk full"):
        make_set().save(folder, overwrite=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["set"]


def test_saving_over_a_set_must_be_asked_for(folder: Path) -> None:
    with pytest.raises(FileExistsError, match="overwrite=True"):
        make_set().save(folder)
    make_set(calibrated=False).save(folder, overwrite=True)
    assert HeadSet.load(folder, BASE).calibration is None
    assert [p.name for p in folder.parent.iterdir()] == ["set"]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([0, 1, 2]), "expected integers"),
        (torch.tensor([0, 1, 2, V]), "span 0..29"),
        (torch.tensor([0, 1, 2, 2]), "twice"),
        (torch.tensor([0.0, 1.0, 2.0, 3.0]), "expected integers"),
        (None, "draft_ids is absent"),
    ],
)
def test_bad_draft_ids_are_refused(ids: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadSet(adapter_config([1], D, V, 4, 5, 4), ids)


@pytest.mark.parametrize(("layers", "message"), [([], "at least one"), ([1, 1], "twice"), ([4], "below the model's 4")])
def test_bad_exit_layers_are_refused(layers: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadSetConfig(D, V, 4, tuple(HeadSpec("adapter", layer) for layer in layers))


def test_default_for_finds_the_set_of_this_base(tmp_path: Path) -> None:
    assert HeadSet.default_for(BASE, tmp_path) is None
    make_set().save(tmp_path / "one")
    found = HeadSet.default_for(BASE, tmp_path)
    assert found is not None
    assert found.exits == (1, 3)
    assert HeadSet.default_for(replace(BASE, fingerprint="e" * 64), tmp_path) is None


def test_the_kind_chooses_among_shipped_sets(tmp_path: Path) -> None:
    """Two sets of one base: the default is the one that drafts without trunk layers, whatever the folders' names."""
    make_set().save(tmp_path / "a")
    sizes = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "ff": 16}
    config = HeadSetConfig(D, V, 4, (HeadSpec("recurrent", 0, {**sizes, "taps": (2, 4)}),))
    HeadSet(config, None, BASE).save(tmp_path / "b")
    for kind, exits in (("default", (0,)), ("recurrent", (0,)), ("adapter", (1, 3))):
        found = HeadSet.default_for(BASE, tmp_path, kind)
        assert found is not None
        assert found.exits == exits
    assert HeadSet.default_for(BASE, tmp_path, "linear") is None


def test_shipped_sets_load_and_are_calibrated() -> None:
    for folder in shipped_folders():
        heads = HeadSet.load(folder)
        assert isinstance(heads.calibration, Calibration), folder
        assert set(heads.calibration.exits) == set(heads.exits), folder
        assert sum(p.stat().st_size for p in folder.iterdir()) < 16e6, folder


def test_restricted_heads_say_the_same_on_fewer_ids() -> None:
    """Copies: training one leaves the other. Ids outside, and heads with outputs of their own, are refused."""
    torch.manual_seed(0)
    heads = HeadSet(adapter_config((1,), 16, 50, 4, 8, 20), torch.arange(0, 40, 2))
    torch.nn.init.normal_(heads.heads[1].down)
    small = heads.restricted(torch.tensor([4, 8, 30]))
    assert small.config.num_outputs == 3 and small.draft_ids is not None and small.draft_ids.tolist() == [4, 8, 30]
    projection = Projection(lambda x: x, torch.randn(50, 16))
    hidden = torch.randn(5, 16)
    wanted = heads.attach(projection).logits(1, hidden)[:, [2, 4, 15]]
    torch.testing.assert_close(small.attach(projection).logits(1, hidden), wanted)
    assert small.heads[1].down is not heads.heads[1].down
    with pytest.raises(ValueError, match="not among the 20"):
        heads.restricted(torch.tensor([3]))
    linear = HeadSet(HeadSetConfig(16, 50, 4, (HeadSpec("linear", 1, {}),)))
    with pytest.raises(ValueError, match="outputs of their own"):
        linear.restricted(torch.tensor([3]))
