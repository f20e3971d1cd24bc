"""Weights in pages of 2 MiB, so that reading them takes fewer address translations.

A plain decoding step on the CPU reads every weight once; with pages of 4 KiB an eighth of that time goes into page
table walks (docs/log.md). Linux moves memory into huge pages when asked; nothing in it changes, so results keep their
bits. Where the system does not offer this, nothing happens.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterable

import torch
from torch import Tensor

PAGE = 2 << 20
LEAST = 64 << 20  # bytes of weights; fewer stay in the caches anyway
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # linux/mman.h; the second since Linux 6.1


def settle(weights: Iterable[Tensor]) -> None:
    """`use_huge_pages` behind the caller's back, for it takes a second for 256 MiB and the weights can be used
    meanwhile; not for small models."""
    weights = list(weights)
    if sum(_span(weight)[1] for weight in weights) >= LEAST:
        threading.Thread(target=use_huge_pages, args=(weights,), daemon=True).start()


def use_huge_pages(weights: Iterable[Tensor]) -> int:
    """Move CPU tensors, dense or in oneDNN's layout, into huge pages.

    Args:
        weights: what is read again and again; neighbours in memory share a page.

    Returns:
        Bytes that now lie in huge pages, whole pages counted; 0 where there are none.
    """
    if sys.platform != "linux":
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    pages: set[int] = set()
    for weight in weights:
        start, size = _span(weight)
        pages.update(range(start // PAGE, -(-(start + size) // PAGE)))
    moved = 0
    for page in sorted(pages):
        madvise(page * PAGE, PAGE, MADV_HUGEPAGE)
        moved += PAGE * (madvise(page * PAGE, PAGE, MADV_COLLAPSE) == 0)
    return moved


def _span(weight: Tensor) -> tuple[int, int]:
    """Address and bytes; 0 bytes where they cannot be told."""
    if weight.device.type != "cpu":
        return 0, 0
    if not weight.is_mkldnn:
        return weight.data_ptr(), weight.nbytes
    if not hasattr(torch.ops.mkldnn, "data_ptr") or not hasattr(torch.ops.mkldnn, "_nbytes"):
        return 0, 0
    return torch.ops.mkldnn.data_ptr(weight), torch.ops.mkldnn._nbytes(weight)
