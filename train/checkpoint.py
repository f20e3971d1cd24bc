"""Checkpoints that a kill cannot tear.

A checkpoint is written as `step-N.tmp`, flushed, given a manifest with the hash of each file, renamed to `step-N`; then
the file `latest` is replaced, then old ones are pruned. Resuming takes the newest directory whose manifest verifies,
whatever `latest` says, so every moment of a kill leaves something whole to go on from. Tensors are safetensors,
the rest JSON: no pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save as serialise_safetensors
from torch import Tensor

from ..heads.artefact import MANIFEST, ArtefactError, flush_directory, parse_tensors, read_folder

FILES = {"state.safetensors", "state.json"}
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory."""

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


def save_checkpoint(
    root: str | Path, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write `root/step-N` as the module says and prune to the newest `keep`.

    Args:
        tensors: everything that must come back bit for bit.
        values: JSON values.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    final, work = root / f"step-{step}", root / f"step-{step}.tmp"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    files = {
        "state.safetensors": serialise_safetensors({k: t.detach().cpu().contiguous() for k, t in tensors.items()}),
        "state.json": json.dumps(dict(values)).encode(),
    }
    for name, data in files.items():
        _write(work / name, data)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    _write(work / MANIFEST, json.dumps({"step": step, "files": hashes}).encode())
    flush_directory(work)
    if final.exists():  # a resumed run saves the step it resumed before, or one that did not verify
        shutil.rmtree(final)
    os.rename(work, final)
    flush_directory(root)
    _write(root / "latest.tmp", f"step-{step}\n".encode())
    os.replace(root / "latest.tmp", root / "latest")
    flush_directory(root)
    _prune(root, keep)
    return final


def newest_checkpoint(root: str | Path) -> Checkpoint | None:
    """The newest checkpoint under `root` whose manifest verifies, or None."""
    for step, folder in _steps(Path(root)):
        try:
            _, files = read_folder(folder, FILES)
            tensors = parse_tensors(files["state.safetensors"], str(folder))
            return Checkpoint(step, tensors, json.loads(files["state.json"]))
        except (ArtefactError, OSError):
            continue  # torn: an older one is whole
    return None


def _steps(root: Path) -> list[tuple[int, Path]]:
    if not root.is_dir():
        return []
    found = [(m, path) for path in root.iterdir() if (m := _NAME.fullmatch(path.name)) and path.is_dir()]
    return sorted(((int(m.group(1)), path) for m, path in found), reverse=True)


def _prune(root: Path, keep: int) -> None:
    for _, folder in _steps(root)[keep:]:
        shutil.rmtree(folder, ignore_errors=True)
    for leftover in root.glob("step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
