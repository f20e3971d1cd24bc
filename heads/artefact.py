"""Folders of safetensors and JSON that are whole or absent, with a hash for each file.

Written beside the target, flushed to the disk, then renamed. Read once: the bytes that were hashed are the bytes that
are parsed. Nothing here can run code: JSON and safetensors are the only formats.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import Tensor

MANIFEST = "manifest.json"


class ArtefactError(ValueError):
    """A folder that is not what its manifest says, or that may not be read."""


def write_folder(folder: Path, files: Mapping[str, bytes], manifest: Mapping[str, Any], hashed: set[str]) -> None:
    """Write `files` and a manifest with the SHA-256 of those in `hashed`; `folder` appears complete or not at all.

    An existing folder is moved aside first and removed last, so a crash in between leaves it as `NAME.old`.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        hashes = {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(hashed)}
        document = {**manifest, "files": hashes}
        for name, data in files.items():
            _write_flushed(work / name, data)
        _write_flushed(work / MANIFEST, (json.dumps(document, indent=1) + "\n").encode())
        flush_directory(work)
        old = folder.with_name(f"{folder.name}.old")
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)
        os.rename(work, folder)
        flush_directory(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def read_folder(folder: Path, allowed: set[str]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Read a folder's manifest and every file it lists, checking hashes.

    Args:
        allowed: the only file names a manifest may list; all of them must be listed.

    Raises:
        ArtefactError: no manifest, a name outside `allowed` (a path out of the folder, a pickle), a missing file, or a
            hash that differs. Names are judged before any file is opened.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtefactError(f"{folder} has no {MANIFEST}: expected a folder written by skipstone")
    try:
        manifest = json.loads(path.read_bytes())
        hashes = dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path} is not a manifest: {error}") from error
    for name in hashes:
        _judge_name(folder, name, allowed)
    missing = sorted(allowed - set(hashes))
    if missing:
        raise ArtefactError(f"{path} does not list {missing}; expected {sorted(allowed)}")
    files = {}
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            raise ArtefactError(f"{folder / name} is missing though the manifest lists it; fetch the folder again")
        data = (folder / name).read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if found != expected:
            raise ArtefactError(
                f"{folder / name} is damaged or edited: SHA-256 is {found}, the manifest says {expected}; "
                "fetch or save the folder again"
            )
        files[name] = data
    return manifest, files


def _judge_name(folder: Path, name: str, allowed: set[str]) -> None:
    if name in allowed:
        return
    if Path(name).name != name or "\\" in name or name in ("", ".", ".."):
        raise ArtefactError(f"{folder / MANIFEST} lists {name!r}, a path that leaves the folder: refused, nothing read")
    if Path(name).suffix in (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"):
        raise ArtefactError(f"{folder / MANIFEST} lists {name!r}: pickles can run code and are never loaded")
    raise ArtefactError(f"{folder / MANIFEST} lists {name!r}; expected only {sorted(allowed)}")


def parse_tensors(data: bytes, where: str) -> dict[str, Tensor]:
    """Tensors from safetensors bytes, all finite.

    Raises:
        ArtefactError: not safetensors (a pickle under that name, a truncated file), or NaN or Inf inside.
    """
    try:
        tensors = parse_safetensors(data)
    except SafetensorError as error:
        raise ArtefactError(f"{where} is not a safetensors file ({error}); other formats are never loaded") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ArtefactError(f"{where}: tensor {name} holds NaN or Inf: unusable, train or fetch it again")
    return tensors


def _write_flushed(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def flush_directory(path: Path) -> None:
    """Make renames inside `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
