"""Folders of thresholds: config.json, thresholds.safetensors and a manifest that names the model they were found on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save as serialise_safetensors
from torch import Tensor

from ...heads.artefact import ArtefactError, parse_tensors, read_folder, write_folder
from ...heads.fingerprint import BaseIdentity

FORMAT_VERSION = 1
CONFIG, THRESHOLDS = "config.json", "thresholds.safetensors"


def save_thresholds(
    folder: str | Path,
    base: BaseIdentity | None,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    overwrite: bool = False,
) -> None:
    """Write the folder, whole or not at all.

    Raises:
        ValueError: the base is not named.
        FileExistsError: the folder exists and `overwrite` is False.
    """
    folder = Path(folder)
    if base is None:
        raise ValueError("the thresholds name no base model: set `base` before saving")
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists; choose another folder")
    files = {
        CONFIG: (json.dumps(config, indent=1, allow_nan=False) + "\n").encode(),
        THRESHOLDS: serialise_safetensors({name: tensor.float().contiguous() for name, tensor in tensors.items()}),
    }
    write_folder(folder, files, {"format_version": FORMAT_VERSION, "base": vars(base)}, set(files))


def load_thresholds(
    folder: str | Path, base: BaseIdentity | None, allow_base_mismatch: bool
) -> tuple[BaseIdentity, dict[str, Any], dict[str, Tensor]]:
    """The model that thresholds were found on, their configuration, and the tensors.

    Args:
        base: the model that will run; None skips that check (inspection).
        allow_base_mismatch: accept thresholds of other weights, a fine-tuned base's for example.

    Raises:
        ArtefactError: damaged, incomplete, unexpected, not finite, another format version, or another base.
    """
    folder = Path(folder)
    manifest, files = read_folder(folder, {CONFIG, THRESHOLDS})
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ArtefactError(
            f"{folder} has format version {manifest.get('format_version')!r}; this release reads {FORMAT_VERSION}"
        )
    tensors = parse_tensors(files[THRESHOLDS], str(folder / THRESHOLDS))
    try:
        made_for, config = BaseIdentity(**manifest["base"]), dict(json.loads(files[CONFIG]))
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(f"{folder} does not hold thresholds: {error}") from error
    if base is not None and not allow_base_mismatch and made_for.fingerprint != base.fingerprint:
        raise ArtefactError(
            f"{folder} was calibrated on {made_for.model_id} (fingerprint {made_for.fingerprint[:12]}), the model "
            f"is {base.model_id} ({base.fingerprint[:12]}): its weights differ. Calibrate for this model, or pass "
            "allow_base_mismatch=True"
        )
    return made_for, config, tensors
