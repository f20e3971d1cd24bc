"""Times on the device: captured graphs, events, percentiles, and the memory bandwidth that everything is held against.

A decode step is tens of kernels of a few microseconds, so whatever is timed here is captured in a CUDA graph first:
between launches from Python the device would mostly wait.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: nothing is timed on a GPU
    triton = None

WARM_UP = 3
REPLAYS, REPEATS = 50, 5
BANDWIDTH_BYTES = 2**31  # some thirty times the largest L2
CLOCK_NS = 50_000


@dataclass(frozen=True)
class Spread:
    """20th, 50th and 80th percentile of repeated measurements, in us."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Percentiles of at least one value, with linear interpolation."""
        if len(values) == 1:
            return cls(*[float(values[0])] * 3)
        cuts = statistics.quantiles(values, n=10, method="inclusive")
        return cls(cuts[1], statistics.median(values), cuts[7])

    def to_json(self) -> dict[str, float]:
        return {name: round(value, 3) for name, value in vars(self).items()}


def capture(body: Callable[[], object], warm_up: Callable[[], object] | None = None) -> torch.cuda.CUDAGraph:
    """`body` as a CUDA graph. It (or a `warm_up` that stands for it) runs a few times before: compilers, handles and
    allocators must be past their first call."""
    for _ in range(WARM_UP):  # on this stream: others make later kernels slower (`engine/graphs.captured`)
        (warm_up or body)()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph, replays: int = REPLAYS, repeats: int = REPEATS) -> Spread:
    """Device time of one replay among many back to back."""
    values = []
    for _ in range(repeats):
        graph.replay()  # the clock starts on a busy device
        values.append(events_us(graph.replay, replays))
    return Spread.of(values)


def events_us(body: Callable[[], object], count: int) -> float:
    """Time between two events around `count` calls, divided by the count."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        body()
    end.record()
    end.synchronize()
    return 1e3 * float(start.elapsed_time(end)) / count


if triton is not None:

    @triton.jit
    def _cycles():  # type: ignore[no-untyped-def]
        return tl.inline_asm_elementwise("mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)

    @triton.jit
    def _clock_kernel(out, NANOSECONDS: tl.constexpr):  # type: ignore[no-untyped-def]
        start = tl.extra.cuda.globaltimer()
        cycles = _cycles()
        now = start
        while now - start < NANOSECONDS:
            now = tl.extra.cuda.globaltimer()
        tl.store(out, _cycles() - cycles)
        tl.store(out + 1, now - start)


def clock_mhz(device: torch.device) -> int:
    """The multiprocessors' clock right now, from a kernel that counts cycles for 50 us. Times of steps
    that wait for latency mean little without it."""
    found = torch.zeros(2, dtype=torch.int64, device=device)
    _clock_kernel[(1,)](found, NANOSECONDS=CLOCK_NS, num_warps=1)
    cycles, nanoseconds = found.tolist()
    return round(1e3 * cycles / nanoseconds)


def bandwidth(device: torch.device, num_bytes: int = BANDWIDTH_BYTES) -> dict[str, float]:
    """GB/s that plain kernels reach on memory far beyond the caches.

    Returns:
        `copy` (bytes read plus bytes written), `read` (a sum over everything) and `best`, the larger.
    """
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    found = {}
    for name, body, moved in (
        ("copy", lambda: target.copy_(source), 2 * num_bytes),
        ("read", lambda: source.sum(), num_bytes),
    ):
        body()
        found[name] = round(max(moved / events_us(body, 5) / 1e3 for _ in range(3)), 1)
    return found | {"best": max(found.values())}


def read_bandwidth(device: torch.device) -> float:
    """GB/s of plain operations on memory: `bandwidth` on a GPU; elsewhere the best of a few sums over 256 MiB."""
    if device.type == "cuda":
        return bandwidth(device)["best"]
    source, best = torch.ones(2**26, device=device), 0.0
    for _ in range(5):
        start = time.perf_counter()
        source.sum()
        best = max(best, 4 * len(source) / (time.perf_counter() - start) / 1e9)
    return round(best, 2)
