"""One-row projections that drop inputs, at bf16, 8 and 4 bits, against dense ones: times on a GPU.

    python -m skipstone.bench.sparse_kernels --models llama-3-8b --out sparse_llama3.json

Per projection and per layer, at each level (share of a standard normal input that is dropped, uniformly):

| arm | what it is |
|---|---|
| `cublas` | `torch.mm` of one row, weight `[M, K]` |
| `rows` | our dense one-row kernel over `[M, K]` (`bench/one_row.py`) |
| `sparse LEVEL` | `sparse_linear` over `[K, M]`: a kernel that lists what is kept, and the product |
| `sparse LEVEL, listed` | the product alone, `listed_linear`: the list is left by the kernel that writes the input |
| `int8`, `int4` | `quantised_linear` without a threshold |
| `int8 LEVEL`, `int4 LEVEL`, and `, listed` | the same with one |

Every arm runs with the fastest of a few settings (those of products with a list are found at 50 %, on the product
alone), in a CUDA graph that goes round over copies of the weights that no cache holds, with programmatic dependent
launch, and is not timed unless its result agrees with the reference. The speed-up of an arm is against the fastest
dense arm of its bits. Random weights; a time does not depend on them.
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

from ..kernels import quantised_linear as quantised
from ..kernels import sparse_linear as sparse
from ..kernels.kept_list import KeptList, list_kept
from ..kernels.quantised_linear import GROUP, QuantisedWeight, quantised_linear_reference, quantised_shares
from ..kernels.sparse_linear import LEAST_COLUMNS, MOST_PARTS, Settings, Shares, sparse_linear_reference
from .device_time import Spread, bandwidth, capture, replay_us
from .environment import describe_device, versions
from .kernel_ops import COLD_BYTES
from .one_row import _OneRow, kernels

LEVELS = (0.25, 0.4, 0.5, 0.65)
TUNED_AT = 0.5
TOLERANCE = 0.02  # bf16 results, fp32 sums in another order


Launch = Callable[[int, Settings | None], None]


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
    launch: Launch
    out: Tensor
    expected: Tensor
    num_bytes: int
    copies: int
    settings: tuple[Settings | None, ...] = (None,)


ROWS = ((2, 2048), (4, 512), (8, 512))  # columns and channels of a block of `rows`


def tried(*starts: Settings) -> tuple[Settings, ...]:
    """Settings and their neighbours: more or fewer warps, columns or parts."""
    found = []
    for start in starts:
        columns, parts, warps = start["COLUMNS"], start["PARTS"], start["num_warps"]
        near = [(columns, parts, warps), (columns, parts, 2 * warps), (columns // 2, parts, warps // 2)]
        near += [(columns // 2, parts, warps), (columns, 2 * parts, warps // 2)]
        found += [
            {"COLUMNS": c, "PARTS": p, "num_warps": w}
            for c, p, w in near
            if c % LEAST_COLUMNS == 0 and c >= 32 and p <= MOST_PARTS and 4 <= w <= 16
        ]
    return tuple(settings for i, settings in enumerate(found) if settings not in found[:i])


def arms(projection: Projection, levels: Sequence[float], device: torch.device, dtype: torch.dtype) -> list[Arm]:
    """All arms of a projection, on the same input and weights."""
    k, width, ends = projection.inputs, projection.outputs, projection.ends
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(k, generator=generator, device=device).to(dtype)
    copies = max(2, -(-COLD_BYTES // (k * width * 2))) if device.type == "cuda" else 1
    by_row = [(torch.randn(width, k, generator=generator, device=device) / k**0.5).to(dtype) for _ in range(copies)]
    by_channel = [weight.T.contiguous() for weight in by_row]
    out, shares, pdl = torch.empty(width, dtype=dtype, device=device), Shares(k, width, device), device.type == "cuda"
    limits = {level: x.float().abs().quantile(level).expand(len(ends)).contiguous() for level in levels}
    rows = _OneRow.empty(1, device)
    rows.live.fill_(1)
    wide = torch.empty(1, width, device=device)
    residual: Any = kernels().residual

    def of_rows(i: int, settings: Settings | None) -> None:
        residual.residual_linear(x.unsqueeze(0), by_row[i], None, None, wide, rows, settings=settings, pdl=pdl)

    def of_sparse(level: float) -> Launch:
        return lambda i, own: sparse.sparse_linear(
            x, by_channel[i], limits[level], ends, out, shares, settings=own, pdl=pdl
        )

    def of_listed(level: float) -> Launch:
        lists = KeptList.empty(k, len(ends), device)
        list_kept(x, limits[level], lists)
        return lambda i, own: sparse.listed_linear(lists, by_channel[i], ends, out, shares, settings=own, pdl=pdl)

    size = k * width * dtype.itemsize
    dense = sparse_linear_reference(x, by_channel[0], None, ends)
    row_settings = tuple(
        {"BN": bn, "BK": bk, "SPLIT": 1, "PARTS": 1, "num_warps": 4, "num_stages": 3} for bn, bk in ROWS
    )
    found = [Arm("rows", "rows", None, of_rows, wide.view(-1), dense, size, copies, row_settings)]
    if device.type == "cuda":

        def of_cublas(i: int, settings: Settings | None) -> None:
            torch.mm(x.unsqueeze(0), by_row[i].T, out=out.unsqueeze(0))

        found.insert(0, Arm("cublas", "cublas", None, of_cublas, out, dense, size, copies))
    settings = tried(sparse._settings(k, ends))
    for level in levels:
        expected, kept = sparse_linear_reference(x, by_channel[0], limits[level], ends), round((1 - level) * size)
        for name, launch in ((f"sparse {level:g}, listed", of_listed), (f"sparse {level:g}", of_sparse)):
            found.append(Arm(name, "sparse", level, launch(level), out, expected, kept, copies, settings))
    for bits in (8, 4):
        found += _quantised(bits, x, limits, ends, out, generator)
    return found


def random_weight(k: int, width: int, bits: int, generator: torch.Generator) -> QuantisedWeight:
    """Any values, and scales of about the same size."""
    device, each = generator.device, 32 // bits
    values = torch.randint(-128, 128, (k, width * bits // 8), dtype=torch.int8, generator=generator, device=device)
    scales = torch.rand(k // GROUP, each, width // each, generator=generator, device=device) * 0.01 + 0.001
    return QuantisedWeight(values if bits == 8 else values.view(torch.uint8), scales.half(), bits)


def _quantised(
    bits: int, x: Tensor, limits: dict[float, Tensor], ends: tuple[int, ...], out: Tensor, generator: torch.Generator
) -> list[Arm]:
    k, width, pdl = len(x), ends[-1], x.is_cuda
    own = random_weight(k, width, bits, generator)
    copies = max(2, -(-COLD_BYTES // own.nbytes)) if x.is_cuda else 1
    several = [own, *(random_weight(k, width, bits, generator) for _ in range(copies - 1))]
    shares = quantised_shares(k, width, x.device)

    def of_all(limit: Tensor | None) -> Launch:
        return lambda i, own: quantised.quantised_linear(x, several[i], limit, ends, out, shares, own, pdl=pdl)

    def of_listed(limit: Tensor) -> Launch:
        lists = KeptList.empty(k, len(ends), x.device, GROUP)
        list_kept(x, limit, lists)
        return lambda i, own: quantised.listed_quantised_linear(lists, x, several[i], ends, out, shares, own, pdl=pdl)

    name, settings = f"int{bits}", tried(*(quantised._settings(k, ends, listed) for listed in (True, False)))
    expected = quantised_linear_reference(x, own, None, ends)
    found = [Arm(name, name, None, of_all(None), out, expected, own.nbytes, copies, settings)]
    for level, limit in limits.items():
        expected = quantised_linear_reference(x, own, limit, ends)
        kept = round((1 - level) * own.values.nbytes) + own.scales.nbytes
        for label, launch in ((f"{name} {level:g}, listed", of_listed), (f"{name} {level:g}", of_all)):
            found.append(Arm(label, f"{name} sparse", level, launch(limit), out, expected, kept, copies, settings))
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
        # Settings of a kind are chosen once: of thresholded arms by the product alone at the level nearest to TUNED_AT.
        for arm in sorted(own, key=lambda a: abs((a.level or TUNED_AT) - TUNED_AT)):
            if arm.kind not in best:
                best[arm.kind], lost = fastest(arm)
                failed += lost
        found = {}
        dead = {kind for kind, settings in best.items() if settings is None and kind != "cublas"}
        for arm in own:
            if arm.kind in dead:
                continue
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
    dense = [us[name] for name in ([bits] if bits else ["cublas", "rows"]) if name in us]
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
