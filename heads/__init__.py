"""Exit heads: modules that draft from intermediate layers, their registry and their artefacts."""

from .adapter import AdapterHead
from .artefact import ArtefactError
from .base import ExitHead, HeadSpec, Projection, build_head, head_kinds, register_head
from .calibration import Calibration, ExitCalibration, Gate
from .fingerprint import BaseIdentity, base_fingerprint, tokenizer_sha256
from .fitting import fit_calibration
from .head_set import (
    HeadSet,
    HeadSetConfig,
    adapter_config,
    shipped_folder_for,
    shipped_folders,
    store_calibration,
)
from .linear import LinearHead
from .stateful import BlockHead, Entries, HeadCache, RecurrentHead, StatefulHead, layer_options

__all__ = [
    "AdapterHead",
    "ArtefactError",
    "BaseIdentity",
    "BlockHead",
    "Calibration",
    "Entries",
    "ExitCalibration",
    "ExitHead",
    "Gate",
    "HeadCache",
    "HeadSet",
    "HeadSetConfig",
    "HeadSpec",
    "LinearHead",
    "Projection",
    "RecurrentHead",
    "StatefulHead",
    "adapter_config",
    "base_fingerprint",
    "build_head",
    "fit_calibration",
    "head_kinds",
    "layer_options",
    "register_head",
    "shipped_folder_for",
    "shipped_folders",
    "store_calibration",
    "tokenizer_sha256",
]
