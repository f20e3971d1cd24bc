"""A round's report to where the host reads it: the next slot of a ring in pinned memory.

In the round's own graph: a copy behind it costs several microseconds between one round and the next.
"""

from __future__ import annotations

from torch import Tensor

try:
    import triton
    import triton.language as tl

    from .tile import pdl_next, pdl_wait
except ImportError:
    triton = None


def publish_reference(report: Tensor, ring: Tensor, slot: Tensor) -> None:
    """In place, as `publish`."""
    ring[int(slot)] = report.to(ring.device)
    slot.copy_((slot + 1) % len(ring))


if triton is not None:

    @triton.jit(do_not_specialize=["size"])  # one kernel for batches of all sizes
    def _publish_kernel(  # type: ignore[no-untyped-def]
        report, ring, slot, size, SLOTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
    ):
        pdl_wait(PDL)
        pdl_next(PDL)
        own = tl.load(slot)
        for first in range(0, size, BLOCK):
            at = first + tl.arange(0, BLOCK)
            tl.store(ring + own * size + at, tl.load(report + at, mask=at < size), mask=at < size)
        tl.debug_barrier()  # every thread has read the slot
        tl.store(slot, (own + 1) % SLOTS)


def publish(report: Tensor, ring: Tensor, slot: Tensor, *, pdl: bool = False) -> None:
    """Copy a report into the ring's slot and go on to the next one.

    Args:
        report: int32 `[N]`.
        ring: int32 `[S, N]`, of the report's device or pinned memory of the host.
        slot: int32 `[1]`, which of the S; moves on.
        pdl: as in `qkv`.
    """
    if ring.shape[1:] != report.shape or not ring.is_contiguous():
        raise ValueError(f"a report of {tuple(report.shape)} does not fit a contiguous ring {tuple(ring.shape)}")
    _publish_kernel[(1,)](
        report, ring, slot, len(report), SLOTS=len(ring), BLOCK=256, PDL=pdl, num_warps=4,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
