"""Where numbers were measured: versions, device, processor features, threads."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

_PACKAGES = ("torch", "triton", "transformers", "safetensors", "gguf", "tokenizers", "numpy")


def versions() -> dict[str, str | None]:
    """Installed versions by package; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "skipstone": _version("skipstone")}
    return found | {name: _version(name) for name in _PACKAGES}


def describe_device(device: torch.device) -> dict[str, Any]:
    """The device in words and numbers (`memory_bytes` in all)."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return {
        "type": device.type,
        "name": _processor(),
        "memory_bytes": _memory_bytes(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "features": processor_features(),
        "onednn": torch.backends.mkldnn.is_available(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def processor_features() -> list[str]:
    """The vector and matrix extensions that decide a CPU's speed; empty where the system does not say."""
    wanted = (
        "avx2",
        "avx512f",
        "avx512_bf16",
        "avx512_fp16",
        "amx_tile",
        "amx_bf16",
        "amx_int8",
        "asimd",
        "bf16",
        "sve",
    )
    for line in _cpuinfo():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            flags = set(value.split())
            return [name for name in wanted if name in flags]
    return []


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpuinfo() -> list[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return list(lines)
    except OSError:
        return []


def _processor() -> str:
    for line in _cpuinfo():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
