"""Checkpoints in, canonical weights out.

File names, tensor names, shapes and dtypes are checked from the headers before a byte of data is read. Only safetensors
and GGUF are read; pickles and checkpoints that bring code are refused. What was converted once is stored by
`save_converted` in this engine's own layout, written to a sibling folder and renamed into place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import ModelConfig, from_hf
from .recipes import (
    Progress,
    Source,
    assemble,
    canonical_shapes,
    check_names,
    hf_recipes,
    is_buffer,
    is_finite,
    is_vision,
    plain_name,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMAT, FORMAT_VERSION = "skipstone-weights", 1
_DOCUMENT, _WEIGHTS = "skipstone.json", "weights.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def load_checkpoint(
    path_or_hub_id: str | os.PathLike[str],
    dtype: torch.dtype,
    progress: Progress | None = None,
    revision: str | None = None,
) -> tuple[ModelConfig, dict[str, Tensor], Path]:
    """Read a model.

    Args:
        path_or_hub_id: a folder with `config.json` and safetensors, a `.gguf` file, or a hub id `owner/name`.
        dtype: torch.float32, bfloat16 or float16 of the returned weights.
        progress: called with (bytes read, bytes in all) as tensors arrive.
        revision: branch, tag or commit of a hub id.

    Returns:
        The configuration, the canonical weights on the CPU, and the folder (or GGUF file) that holds the tokenizer.

    Raises:
        FileNotFoundError: nothing there, or the hub cannot be reached.
        ValueError: the checkpoint is refused; the message names the file, tensor or key.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype}, expected one of {', '.join(map(str, DTYPES))}")
    path = Path(path_or_hub_id)
    if path.suffix == ".gguf" and path.is_file():
        from .gguf_weights import open_gguf

        config, recipes, source = open_gguf(path)
        return config, assemble(recipes, source, dtype, progress), path
    if not path.exists():
        path = _download(str(path_or_hub_id), revision)
    if not path.is_dir():
        raise ValueError(f"{path} is a file, expected a folder with config.json or a file ending in .gguf")
    return *_load_folder(path, dtype, progress), path


# --- transformers folders


def _load_folder(folder: Path, dtype: torch.dtype, progress: Progress | None) -> tuple[ModelConfig, dict[str, Tensor]]:
    document = _read_json(folder / "config.json")
    config = from_hf(document)
    with_vision = document.get("model_type") == "gemma3"
    files = _safetensors_files(folder)

    places: dict[str, tuple[Any, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file, listed in files.items():
        handle = _open_safetensors(file)
        names = set(handle.keys())
        if listed is not None:
            check_names(listed, names, f"{file} against the index")
        for name in sorted(names):
            if is_buffer(name) or (with_vision and is_vision(name)):
                continue
            kind = handle.get_slice(name).get_dtype()
            if kind not in ("F64", "F32", "F16", "BF16"):
                raise ValueError(f"{file}: tensor {name} is stored as {kind}, expected F32, F16 or BF16 weights")
            plain = plain_name(name)
            if plain in places:
                raise ValueError(f"{file}: tensors {name} and {places[plain][1]} are the same weight of the model")
            places[plain] = (handle, name)
            shapes[plain] = tuple(handle.get_slice(name).get_shape())

    def read(name: str) -> Tensor:
        handle, stored = places[name]
        return handle.get_tensor(stored)

    return config, assemble(hf_recipes(config), Source(str(folder), shapes, read), dtype, progress)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}; expected a model folder with config.json and safetensors")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds a {type(document).__name__}, expected a JSON object")
    return document


def _safetensors_files(folder: Path) -> dict[Path, set[str] | None]:
    """The weight files of a folder and, when sharded, the tensors that the index puts in each.

    A shard must be a plain file name: `../` or an absolute path would read outside the folder.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return {single: None}
    if not index.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        if pickles:
            raise ValueError(
                f"{folder} has its weights in {', '.join(pickles)}: pickles can run code when they are read, so they "
                "never are; convert the checkpoint to safetensors"
            )
        raise ValueError(f"{folder} has neither {single.name} nor {index.name}")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    shards: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file):
            raise ValueError(
                f"{index} puts tensor {name} in {file!r}, expected the plain name of a .safetensors file beside it; "
                "a path could lead outside the folder, so nothing was loaded"
            )
        named = shards.setdefault(folder / file, set())
        assert named is not None
        named.add(name)
    for shard in shards:
        if not shard.is_file():
            raise ValueError(f"{index} names {shard.name}, which is not in {folder}; the download is incomplete")
    return shards


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from error


def _download(hub_id: str, revision: str | None) -> Path:
    """A hub snapshot: configuration, tokenizer and safetensors; nothing that could hold code."""
    if not _HUB_ID.fullmatch(hub_id):
        raise FileNotFoundError(
            f"{hub_id} does not exist; expected a model folder, a .gguf file, or a hub id of the form owner/name"
        )
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = huggingface_hub.snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
            ignore_patterns=["*/*", "consolidated*"],  # second copies of the weights
        )
    except (OSError, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"{hub_id} is no local folder, and the hub could not provide it ({error}); check the name and the "
            "network, or give the path of a folder that already holds the model"
        ) from error
    return Path(folder)


# --- converted weights, this engine's own layout


def save_converted(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    attach: Callable[[Path], None] | None = None,
) -> Path:
    """Store a converted model so that a kill at any moment leaves the old state or the new one.

    Args:
        folder: where it shall stand; replaced when it exists.
        config: the configuration.
        weights: canonical weights, all of one dtype.
        attach: called with the unpublished folder, to add files (a tokenizer) before the rename.

    Returns:
        `folder`.

    Raises:
        ValueError: the weights are not those of `config`, or are not finite.
    """
    target = Path(folder).resolve()
    _check_canonical(config, weights, "weights")
    for name, tensor in weights.items():
        if not is_finite(tensor):
            raise ValueError(f"weights: tensor {name} holds NaN or infinity, which is never stored")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    work.mkdir()
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, work / _WEIGHTS)
        document = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "sha256": _sha256(work / _WEIGHTS),
            "config": config.to_json(),
        }
        (work / _DOCUMENT).write_text(json.dumps(document, indent=1), encoding="utf-8")
        if attach is not None:
            attach(work)
        for file in [*work.rglob("*"), work]:
            _fsync(file)
        _replace_folder(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return Path(folder)


def load_converted(folder: str | os.PathLike[str], verify: bool = True) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Map a converted model into memory.

    Args:
        folder: what `save_converted` wrote.
        verify: compare the weights' SHA-256 (about a second per GB); a flipped bit is otherwise not noticed.

    Returns:
        The configuration and the canonical weights, memory-mapped: treat them as read-only.

    Raises:
        ValueError: another format or version, a damaged file, tensors that are not those of the configuration.
    """
    path = Path(folder)
    document = _read_json(path / _DOCUMENT)
    version = (document.get("format"), document.get("format_version"))
    if version != (FORMAT, FORMAT_VERSION):
        raise ValueError(
            f"{path / _DOCUMENT} is {version[0]!r} version {version[1]!r}, expected {FORMAT!r} version "
            f"{FORMAT_VERSION}; delete {path} and let it be converted again"
        )
    config, file = ModelConfig.from_json(document["config"]), path / _WEIGHTS
    if not file.is_file():
        raise ValueError(f"{path} has no {_WEIGHTS}; delete the folder and let it be converted again")
    if verify and _sha256(file) != document.get("sha256"):
        raise ValueError(f"{file} does not match its recorded SHA-256; delete {path} and let it be converted again")
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from error
    _check_canonical(config, weights, str(file))
    return config, weights


def _check_canonical(config: ModelConfig, weights: Mapping[str, Tensor], where: str) -> None:
    shapes = canonical_shapes(config)
    check_names(shapes.keys(), weights.keys(), where)
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise ValueError(f"{where}: tensor {name} has shape {list(weights[name].shape)}, expected {list(shape)}")
    dtypes = {tensor.dtype for tensor in weights.values()}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise ValueError(f"{where}: tensors are of {sorted(map(str, dtypes))}, expected one of {DTYPES} for all")


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # a folder cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace_folder(work: Path, target: Path) -> None:
    """Rename `work` to `target`. No rename replaces a full folder, so what stands there is moved aside first."""
    for _ in range(8):  # another process may publish the same model between our two steps
        aside = target.parent / f".{target.name}.{uuid.uuid4().hex}.old"
        if target.exists():
            with contextlib.suppress(FileNotFoundError):
                os.replace(target, aside)
        try:
            os.replace(work, target)
        except OSError:
            if not target.exists():
                if aside.exists():
                    os.replace(aside, target)
                raise
            continue
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        _fsync(target.parent)
        return
    raise OSError(f"{target} is being replaced by other processes; try again")
