"""Prefill attention by flash-attn (2, 3 or 4), where it is installed.

One pass over the keys with a running softmax (arXiv:2205.14135, arXiv:2307.08691). `full_attention`
(`kernels/attention.py`) computes the same, is the reference in tests and runs wherever this is not asked for.

The packages agree on layouts (rows before heads), on grouped heads and on the causal mask's place: its last row stands
at the last key, as a chunk's does when no key beyond the chunk is passed. They differ in where the function lies, in
how "no window" is spelled and in whether sums of the softmax are returned too. Their forward pass adds in an order that
follows shapes alone, so a chunk's bits depend on the prompt (design rule 6).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import Tensor

MOST_HEAD_DIM = 256
INSTEAD = "or use prefill='sdpa'"


@dataclass(frozen=True)
class Package:
    """Where a version's `flash_attn_func` lies, and the GPUs (major compute capability) that it is taken for."""

    version: int
    module: str
    distributions: tuple[str, ...]
    capabilities: range

    def takes(self, capability: tuple[int, int], head_dim: int, softcap: float | None) -> bool:
        if capability[0] not in self.capabilities:
            return False
        if self.version == 4 and capability[0] in (10, 11):
            return head_dim <= 128 or (head_dim == 256 and softcap is None)
        return True

    def name(self) -> str:
        """The distribution and its version, for reports."""
        for distribution in self.distributions:
            try:
                return f"{distribution} {metadata.version(distribution)}"
            except metadata.PackageNotFoundError:
                continue
        return f"{self.module} (no version known)"


# The first one that is installed and takes the model is used.
PACKAGES = (
    Package(3, "flash_attn_interface", ("flash_attn_3", "flash-attn-3"), range(9, 10)),
    Package(4, "flash_attn.cute", ("flash-attn-4",), range(9, 13)),
    Package(2, "flash_attn", ("flash-attn",), range(8, 13)),
)


@dataclass(frozen=True)
class FlashAttention:
    """`flash_attn_func` of one version, called as `full_attention` is.

    Attributes:
        name: what is installed, for reports.
        version: 2, 3 or 4.
        function: `flash_attn_func`.
    """

    name: str
    version: int
    function: Callable[..., Tensor | tuple[Tensor, ...]]

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        first: int = 0,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Arguments and result of `full_attention`, in half precision on a GPU."""
        stop = first + q.shape[2]  # keys beyond would move the mask, whose last row stands at the last key
        q, k, v = q.transpose(1, 2), k[:, :, :stop].transpose(1, 2), v[:, :, :stop].transpose(1, 2)
        no_window = (None, None) if self.version == 4 else (-1, -1)
        seen = no_window if window is None else (window - 1, 0)  # flash-attn counts the keys before the row's own
        out = self.function(q, k, v, softmax_scale=scale, causal=True, window_size=seen, softcap=softcap or 0.0)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def find_flash(device: torch.device, dtype: torch.dtype, head_dim: int, softcap: float | None = None) -> FlashAttention:
    """The installed flash-attn for a model.

    Args:
        device, dtype: where the model runs, and of its keys and values.
        head_dim, softcap: of its attention.

    Raises:
        ValueError: none takes this model here; the message says what to do.
    """
    if device.type != "cuda":
        raise ValueError(
            f"prefill='flash' needs an NVIDIA GPU, and the model is on {str(device)!r}: move it, {INSTEAD}"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"flash-attn takes bfloat16 and float16, and dtype is {dtype}: load in one of them, {INSTEAD}")
    return choose(torch.cuda.get_device_capability(device), head_dim, softcap)


def choose(capability: tuple[int, int], head_dim: int, softcap: float | None = None) -> FlashAttention:
    """The first of `PACKAGES` that is installed and takes these heads on such a GPU.

    Raises:
        ValueError: as `find_flash`.
    """
    if head_dim % 8 or head_dim > MOST_HEAD_DIM:
        raise ValueError(
            f"flash-attn takes heads of a multiple of 8 up to {MOST_HEAD_DIM}, and this model's have {head_dim}: "
            "use prefill='sdpa'"
        )
    problems = []
    for package in PACKAGES:
        if not package.takes(capability, head_dim, softcap):
            continue
        try:
            function = getattr(importlib.import_module(package.module), "flash_attn_func", None)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] not in ("flash_attn", "flash_attn_interface"):
                problems.append(f"{package.module} lacks a package: {error}")
            continue
        except (ImportError, OSError) as error:  # built for another torch, usually
            problems.append(f"{package.module} cannot be imported: {error}")
            continue
        if function is not None:
            return FlashAttention(package.name(), package.version, function)
    gpu = f"GPUs of compute capability {capability[0]}.{capability[1]}"
    wanted = [p.distributions[0] for p in PACKAGES if p.takes(capability, head_dim, softcap)]
    if not wanted:
        raise ValueError(f"no flash-attn takes this model (heads of {head_dim}) on {gpu}: use prefill='sdpa'")
    found = f" ({'; '.join(problems)})" if problems else ""
    raise ValueError(
        f"prefill='flash', but no flash-attn for {gpu} is installed{found}: install {' or '.join(wanted)} "
        f"(docs/dependencies.md says how), {INSTEAD}"
    )
