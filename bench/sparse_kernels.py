"""One-row projections that drop inputs, at bf16, 8 and 4 bits, against dense ones: times on a GPU.

    python -m skipstone.bench.sparse_kernels --models llama-3-8b --out sparse_llama3.json

Per projection and per layer, at each level (share of a standard normal input that is dropped, uniformly):

| arm | what it is |
|---|---|
| `cublas` | `torch.mm` of one row, weight `[M, K]` |
| `rows` | our dense one-row kernel over `[M, K]` (`bench/one_row.py`) |
| `channels` | `sparse_linear` over `[K, M]`, without a threshold |
| `sparse LEVEL` | the same with one |
| `int8`, `int4` | `quantised_linear` without a threshold |
| `int8 LEVEL`, `int4 LEVEL` | the same with one |

Every arm runs with the fastest of a few settings (thresholded arms share those found at 50 %), in a CUDA graph that
goes round over copies of the weights that no cache holds, and is not timed unless its result agrees with the reference.
The speed-up of an arm is against the fastest dense arm of its bits. Random weights; a time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.quantised_linear import QuantisedWeight, quantise, quantised_linear, quantised_linear_reference
from ..kernels.sparse_linear import MOST_PARTS, Shares, fitting_columns, sparse_linear, sparse_linear_reference
from .device_time import Spread, bandwidth, capture, replay_us
from .environment import describe_device, versions
from .kernel_ops import COLD_BYTES
from .one_row import _OneRow, kernels

Settings = dict[str, int]
LEVELS = (0.25, 0.4, 0.5, 0.65)
TUNED_AT = 0.5
TOLERANCE = 0.02  # bf16 results, fp32 sums in another order


@dataclass(frozen=True)
class Projection:
    """`ends`: where the columns' segments end; each has a threshold of its own, equal here."""

    name: str
    inputs: int
    ends: tuple[int, ...]

    @property
    def outputs(self) -> int:
        return self.ends[-1]


MODELS: dict[str, tuple[Projection, ...]] = {
    "llama-3-8b": (
        Projection("qkv", 4096, (4096, 5120, 6144)),
        Projection("o", 4096, (4096,)),
        Projection("up", 4096, (14336, 28672)),
        Projection("down", 14336, (4096,)),
    ),
    "llama-2-7b": (
        Projection("qkv", 4096, (4096, 8192, 12288)),
        Projection("o", 4096, (4096,)),
        Projection("up", 4096, (11008, 22016)),
        Projection("down", 11008, (4096,)),
    ),
    "qwen2.5-1.5b": (
        Projection("qkv", 1536, (1536, 1792, 2048)),
        Projection("o", 1536, (1536,)),
        Projection("up", 1536, (8960, 17920)),
        Projection("down", 8960, (1536,)),
    ),
}


@dataclass(frozen=True)
class Arm:
    """One way to compute a projection: `launch(copy of the weights, settings)` leaves its result in `out`."""

    name: str
    kind: str  # arms of one kind share settings
    level: float | None
    launch: Callable[[int, Settings | None], None]
    out: Tensor
    expected: Tensor
    num_bytes: int
    copies: int
    settings: tuple[Settings | None, ...] = (None,)


# (BK, UNROLL, warps) of a try
BLOCKS = ((32, 4, 8), (32, 2, 4), (64, 2, 8), (16, 4, 4))
QUANTISED_BLOCKS = ((32, 2, 8), (32, 4, 8), (32, 2, 4))


def _blocks(columns: Sequence[int], ends: Sequence[int], k: int, blocks: Sequence[tuple[int, ...]]) -> list[Settings]:
    """Settings worth a try: whole segments, no more parts than blocks of k."""
    return [
        {"BN": bn, "BK": bk, "UNROLL": unroll, "PARTS": parts, "num_warps": warps, "num_stages": 1}
        for bn in columns
        for bk, unroll, warps in blocks
        for parts in (4, 8, 16, 32)
        if all(end % bn == 0 for end in ends[:-1]) and bn <= ends[-1] and parts * bk <= k
    ]


def arms(projection: Projection, levels: Sequence[float], device: torch.device, dtype: torch.dtype) -> list[Arm]:
    """All arms of a projection, on the same input and weights."""
    k, width, ends = projection.inputs, projection.outputs, projection.ends
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(k, generator=generator, device=device).to(dtype)
    copies = max(2, -(-COLD_BYTES // (k * width * 2))) if device.type == "cuda" else 1
    by_row = [(torch.randn(width, k, generator=generator, device=device) / k**0.5).to(dtype) for _ in range(copies)]
    by_channel = [weight.T.contiguous() for weight in by_row]
    out, shares = torch.empty(width, dtype=dtype, device=device), Shares(k, width, MOST_PARTS, device)
    limits = {level: x.float().abs().quantile(level).expand(len(ends)).contiguous() for level in levels}
    rows = _OneRow.empty(1, device)
    rows.live.fill_(1)
    wide = torch.empty(1, width, device=device)
    residual: Any = kernels().residual

    def of_rows(i: int, settings: Settings | None) -> None:
        residual.residual_linear(x.unsqueeze(0), by_row[i], None, None, wide, rows, settings=settings)

    def of_channels(limit: Tensor | None) -> Callable[[int, Settings | None], None]:
        return lambda i, settings: sparse_linear(x, by_channel[i], limit, ends, out, shares, settings=settings)

    size = k * width * dtype.itemsize
    dense = sparse_linear_reference(x, by_channel[0], None, ends)
    row_settings = tuple(
        {"BN": bn, "BK": bk, "SPLIT": 1, "PARTS": parts, "num_warps": 4, "num_stages": 3}
        for bn, bk in ((4, 512), (8, 512), (4, 1024))
        for parts in (1,)
    )
    tried = tuple(_blocks((256,), ends, k, BLOCKS)) or (None,)
    found = [
        Arm("rows", "rows", None, of_rows, wide.view(-1), dense, size, copies, row_settings),
        Arm("channels", "channels", None, of_channels(None), out, dense, size, copies, tried),
    ]
    if device.type == "cuda":

        def of_cublas(i: int, settings: Settings | None) -> None:
            torch.mm(x.unsqueeze(0), by_row[i].T, out=out.unsqueeze(0))

        found.insert(0, Arm("cublas", "cublas", None, of_cublas, out, dense, size, copies))
    for level in levels:
        expected = sparse_linear_reference(x, by_channel[0], limits[level], ends)
        kept = round((1 - level) * size)
        found.append(
            Arm(f"sparse {level:g}", "sparse", level, of_channels(limits[level]), out, expected, kept, copies, tried)
        )
    for bits in (8, 4):
        found += _quantised(bits, x, by_row[0], limits, ends, out, shares)
    return found


def _quantised(
    bits: int,
    x: Tensor,
    weight: Tensor,
    limits: dict[float, Tensor],
    ends: tuple[int, ...],
    out: Tensor,
    shares: Shares,
) -> list[Arm]:
    own = quantise(weight, bits)
    copies = max(2, -(-COLD_BYTES // own.nbytes)) if x.is_cuda else 1
    several = [own, *(QuantisedWeight(own.values.clone(), own.scales.clone(), bits) for _ in range(copies - 1))]
    columns = (256,) if bits == 8 else (fitting_columns(512, ends),)
    tried = tuple(_blocks(columns, ends, own.shape[0], QUANTISED_BLOCKS)) or (None,)

    def launch(limit: Tensor | None) -> Callable[[int, Settings | None], None]:
        return lambda i, settings: quantised_linear(x, several[i], limit, ends, out, shares, settings)

    name = f"int{bits}"
    expected = quantised_linear_reference(x, own, None, ends)
    found = [Arm(name, name, None, launch(None), out, expected, own.nbytes, copies, tried)]
    for level, limit in limits.items():
        expected = quantised_linear_reference(x, own, limit, ends)
        kept = round((1 - level) * own.values.nbytes) + own.scales.nbytes
        found.append(
            Arm(f"{name} {level:g}", f"{name} sparse", level, launch(limit), out, expected, kept, copies, tried)
        )
    return found


def wrong(arm: Arm, settings: Settings | None) -> str | None:
    """Why an arm's result is not the reference's, None where it is."""
    arm.out.fill_(torch.nan)
    arm.launch(0, settings)
    error = (arm.out.float() - arm.expected).abs().max() / arm.expected.abs().max()
    return None if bool(error < TOLERANCE) else f"relative error {float(error):.2e}"


def time_us(arm: Arm, settings: Settings | None) -> Spread:
    """Of one call, in a graph of calls over all copies."""

    def body() -> None:
        for i in range(arm.copies):
            arm.launch(i, settings)

    whole = replay_us(capture(body), replays=20)
    return Spread(*(value / arm.copies for value in vars(whole).values()))


def fastest(arm: Arm) -> tuple[Settings | None, list[dict[str, Any]]]:
    """The fastest of an arm's settings, and what failed."""
    best, failed = None, []
    times: list[tuple[float, int]] = []
    for number, settings in enumerate(arm.settings):
        try:
            why = wrong(arm, settings)
            if why is None:
                times.append((time_us(arm, settings).p50, number))
                continue
        except Exception as error:  # a setting that does not compile or launch is left out, with its reason
            why = f"{type(error).__name__}: {str(error)[:120]}"
        failed.append({"arm": arm.name, "settings": settings, "why": why})
    if times:
        best = arm.settings[min(times)[1]]
    return best, failed


def measure(name: str, levels: Sequence[float], device: torch.device, only: Sequence[str] = ()) -> dict[str, Any]:
    """One model: each projection's arms (or those of `only`), and layers of them."""
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    layer: dict[str, float] = {}
    projections = [p for p in MODELS[name] if not only or p.name in only]
    for projection in projections:
        best: dict[str, Settings | None] = {}
        own = arms(projection, levels, device, torch.bfloat16)
        # Settings of a kind are chosen once: thresholded arms at the level nearest to TUNED_AT.
        for arm in sorted(own, key=lambda a: abs((a.level or TUNED_AT) - TUNED_AT)):
            if arm.kind not in best:
                best[arm.kind], lost = fastest(arm)
                failed += lost
        found = {}
        for arm in own:
            why = wrong(arm, best[arm.kind])
            if why is not None:
                failed.append({"arm": arm.name, "settings": best[arm.kind], "why": why})
                continue
            us = found[arm.name] = time_us(arm, best[arm.kind])
            layer[arm.name] = layer.get(arm.name, 0.0) + us.p50
            rows.append(
                {"projection": projection.name, "inputs": projection.inputs, "outputs": projection.outputs,
                 "arm": arm.name, "level": arm.level, "us": us.to_json(), "settings": best[arm.kind],
                 "gb_per_s": round(arm.num_bytes / us.p50 / 1e3, 1)}
            )  # fmt: skip
        for row in rows[-len(found) :]:
            row["speedup"] = speedup(row["arm"], {arm: us.p50 for arm, us in found.items()})
        note(f"{name} {projection.name}: " + ", ".join(f"{arm} {us.p50:.1f}" for arm, us in found.items()))
    complete = {arm: us for arm, us in layer.items() if sum(row["arm"] == arm for row in rows) == len(projections)}
    return {
        "model": name,
        "projections": rows,
        "layer_us": {arm: round(us, 2) for arm, us in complete.items()},
        "layer_speedup": {arm: speedup(arm, complete) for arm in complete},
        "failed": failed,
    }


def speedup(arm: str, us: dict[str, float]) -> float | None:
    """Against the fastest dense arm of the same bits; None where none was timed."""
    bits = arm.split()[0] if arm.startswith("int") else None
    dense = [us[name] for name in ([bits] if bits else ["cublas", "rows", "channels"]) if name in us]
    return round(min(dense) / us[arm], 3) if dense else None


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["llama-3-8b", "llama-2-7b"], choices=sorted(MODELS))
    parser.add_argument("--projections", nargs="*", default=[], help="only these of qkv, o, up, down")
    parser.add_argument("--levels", type=float, nargs="*", default=list(LEVELS))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("kernels are timed on a GPU, and torch sees none here")
    device = torch.device("cuda")
    document: dict[str, Any] = {
        "schema_version": 1, "device": describe_device(device), "versions": versions(), "bandwidth": bandwidth(device),
        "models": [],
    }  # fmt: skip
    for name in options.models:
        with torch.inference_mode():
            document["models"].append(measure(name, options.levels, device, options.projections))
        options.out.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
