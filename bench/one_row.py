"""A decode step specialised to one row, to see what tiles of 16 rows cost a plain step.

    python -m skipstone.bench.sweep_kernels --rows 1 --contexts 320 --out one_row_sweep.json
    python -m skipstone.bench.one_row --sweep one_row_sweep.json --out one_row.json

The same kernels with the same fusions, but their products are sums of elementwise products of one row (no matrix units,
no padding), with settings of their own. Beside it the matrix products alone through cuBLAS, with one row. Nothing here
is used for decoding: its bits differ from a tile's.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..engine import fused
from ..engine.config import ModelConfig
from ..engine.fused import FusedStep, FusedWeights
from ..engine.model import Decoder
from ..kernels.rows import Rows
from .device_time import capture, replay_us
from .environment import describe_device, versions
from .gpu_baselines import products
from .kernel_ops import KERNELS, NUM_ROWS, Kernels, Settings, attention_grid, combinations, weight_shape
from .profile import step_us
from .shapes import random_weights, shape_config

try:
    import triton
    import triton.language as tl

    from ..kernels.tile import load_stats, row_scale
except ImportError:
    triton = None

MOST_ELEMENTS = 64 * 32  # of a weight's block, a warp

if triton is not None:

    @triton.jit
    def weights_ahead(  # type: ignore[no-untyped-def]
        w, cols, K: tl.constexpr, SHARE: tl.constexpr, first, BK: tl.constexpr, SPLIT: tl.constexpr,
        TAIL: tl.constexpr = 0, HOLD: tl.constexpr = 0,
    ):  # fmt: skip
        """`tile.weights_ahead`, `[BN, SPLIT * BK]`; none has a tail here, or holds a part."""
        if SPLIT * BK >= SHARE:
            at = tl.arange(0, SPLIT * BK)
            real = (at < SHARE) & (first + at < K)
            w_rows = w + first + cols.to(tl.int64) * K
            return tl.load(w_rows[:, None] + at[None, :], mask=real[None, :], other=0.0)
        else:
            return 0

    @triton.jit
    def rows_product(  # type: ignore[no-untyped-def]
        x, w, ahead, rows, cols, K: tl.constexpr, SHARE: tl.constexpr, first, BK: tl.constexpr, SPLIT: tl.constexpr,
        PRECISION: tl.constexpr, TAIL: tl.constexpr = 0, HOLD: tl.constexpr = 0, live=None,
    ):  # fmt: skip
        """`tile.rows_product` of one row, `[1, BN]`."""
        k = tl.arange(0, SPLIT * BK)
        x_row = x + first + rows.to(tl.int64) * K
        if SPLIT * BK >= SHARE:
            real = (k < SHARE) & (first + k < K)
            a = tl.load(x_row[:, None] + k[None, :], mask=real[None, :], other=0.0).to(tl.float32)
            return tl.sum(a * ahead.to(tl.float32), 1)[None, :]
        else:
            w_rows = w + first + cols.to(tl.int64) * K
            total = tl.zeros([cols.shape[0], SPLIT * BK], tl.float32)
            for start in range(0, SHARE, SPLIT * BK):
                at = start + k
                real = (at < SHARE) & (first + at < K)
                a = tl.load(x_row[:, None] + at[None, :], mask=real[None, :], other=0.0).to(tl.float32)
                total += a * tl.load(w_rows[:, None] + at[None, :], mask=real[None, :], other=0.0).to(tl.float32)
            return tl.sum(total, 1)[None, :]

    @triton.jit
    def normed_rows_product(  # type: ignore[no-untyped-def]
        x, stats, w, ahead, rows, cols, eps,
        D: tl.constexpr, NUM_STATS: tl.constexpr, BLOCK_S: tl.constexpr, LAYER_NORM: tl.constexpr,
        X_SCALE: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, TAIL: tl.constexpr = 0,
        HOLD: tl.constexpr = 0,
    ):  # fmt: skip
        """`tile.normed_rows_product` of one row: its own branch for all of k is a product of tiles."""
        squares, sums = load_stats(stats, rows, NUM_STATS, BLOCK_S, LAYER_NORM)
        y = rows_product(x, w, ahead, rows, cols, D, D, 0, BK, SPLIT, PRECISION)
        scale, mean = row_scale(squares, sums, D, eps, X_SCALE, LAYER_NORM)
        return y, scale, mean


class _OneRow(Rows):
    """`Rows` that need not be whole tiles."""

    @classmethod
    def empty(cls, num_rows: int, device: torch.device | str) -> Rows:
        whole = Rows.empty(-(-num_rows // NUM_ROWS) * NUM_ROWS, device)
        return Rows(*(tensor[:num_rows].clone() for tensor in vars(whole).values()))


def _copied(module: ModuleType, **changed: Any) -> Any:
    """A second copy of a module in which some names stand for something else."""
    name = f"{module.__package__}._one_row_{module.__name__.rpartition('.')[2]}"
    spec = importlib.util.spec_from_file_location(name, module.__file__)
    assert spec is not None and spec.loader is not None
    copy = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    for key, value in changed.items():
        if hasattr(copy, key):
            setattr(copy, key, value)
    return copy


_FIRST = {"BK": 512, "SPLIT": 1, "num_warps": 4, "num_stages": 2}
FIRST: dict[str, Settings] = {
    "qkv": {"BLOCK_P": 2, **_FIRST},
    "residual": {"BN": 4, "PARTS": 1, **_FIRST},
    "up": {"BN": 2, **_FIRST},
    "lm_head": {"BN": 4, **_FIRST},
}


@functools.cache
def kernels() -> Kernels:
    """The step's kernels with one row a program; their tables can be set with `settle`."""
    products = {
        "weights_ahead": weights_ahead,
        "rows_product": rows_product,
        "normed_rows_product": normed_rows_product,
    }
    copies = {}
    for name, settings in FIRST.items():
        original = getattr(KERNELS, name)
        copies[name] = _copied(original, BLOCK_ROWS=1, _settings=_always(settings), **products)
    return replace(KERNELS, **copies, num_rows=1)


def _always(settings: Settings) -> Callable[..., Settings]:
    return lambda *sizes: settings


def settle(best: Mapping[str, Settings], wide: int) -> None:
    """Use these settings, by operation; `wide` is the MLP's inner size, which tells `down` from `o`."""
    own = kernels()
    for name in ("qkv", "up", "lm_head"):
        getattr(own, name)._settings = _always(best[name])
    o, down = best["o"], best["down"]
    own.residual._settings = lambda width, k, dtype: down if k == wide else o


@functools.cache
def step_of() -> type[FusedStep]:
    """`FusedStep` over these kernels."""
    own = kernels()
    copy = _copied(
        fused, Rows=_OneRow, qkv=own.qkv.qkv, up_linear=own.up.up_linear,
        **{name: getattr(own.residual, name)
           for name in ("residual_linear", "post_norm", "Parts", "column_tiles", "most_parts")},
    )  # fmt: skip
    return copy.FusedStep


def grid_of(config: ModelConfig, name: str) -> list[Settings]:
    """Settings worth a try: blocks of a weight of at least 16 bytes a thread."""
    if name == "attention":
        return attention_grid()
    _, k = weight_shape(config, name)
    columns = (4, 8, 16, 32) if name == "lm_head" else (2, 4, 8, 16)  # noise comes for four tokens at once
    choices = {
        "BN": columns,
        "BK": (256, 512, 1024, 2048),
        "num_warps": (1, 2, 4, 8),
        "num_stages": (1, 2, 3, 4),
    }
    found = []
    for s in combinations(choices):
        steps, each = -(-k // s["BK"]), s["BN"] * s["BK"] // s["num_warps"]
        if (
            MOST_ELEMENTS // 8 <= each <= MOST_ELEMENTS
            and s["BK"] < 2 * k
            and min(2, steps) <= s["num_stages"] <= steps
        ):
            found.append(_named(name, s))
    return found


def _named(name: str, settings: Settings) -> Settings:
    """Columns a program under the names of the operation's launcher."""
    columns, rest = settings["BN"], {key: value for key, value in settings.items() if key != "BN"}
    if name == "qkv":
        return {"BLOCK_P": columns // 2, "SPLIT": 1, "TAIL": 0, **rest}
    if name == "up":
        return {"BN": columns // 2, "SPLIT": 1, "TAIL": 0, **rest}
    return {"BN": columns, "SPLIT": 1, "TAIL": 0, **({"PARTS": 1} if name in ("o", "down") else {}), **rest}


def measure(model: str, best: Mapping[str, Settings], context: int) -> dict[str, Any]:
    """A step of one row against the step of tiles, and cuBLAS, in us."""
    config, device = shape_config(model), torch.device("cuda")
    weights = random_weights(config, torch.bfloat16, device)
    settle(best, config.intermediate_size)
    with torch.inference_mode():
        model_weights = FusedWeights(Decoder(config, weights, torch.bfloat16, device))
        us = {f"{live} of {NUM_ROWS} rows": step_us(model_weights, context, live).p50 for live in (1, NUM_ROWS)}
        us["1 row"] = step_us(model_weights, context, 1, num_rows=1, step_of=step_of(), kernels=kernels()).p50
        us |= {f"cublas, {n}": replay_us(capture(products(weights, config, n))).p50 for n in (1, NUM_ROWS)}
    fastest = min(us["1 row"], us["cublas, 1"])
    return {
        "model": model, "context": context, "us": {name: round(value, 2) for name, value in us.items()},
        "ratio": round(us[f"{NUM_ROWS} of {NUM_ROWS} rows"] / fastest, 4), "settings": dict(best),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", type=Path, required=True, help="what sweep_kernels --rows 1 wrote")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    swept = json.loads(args.sweep.read_text(encoding="utf-8"))
    if swept.get("rows") != 1:
        raise SystemExit(f"{args.sweep} is no sweep of one-row kernels")
    if not torch.cuda.is_available():
        raise SystemExit("steps are timed on a GPU, and torch sees none here")
    best: dict[str, dict[str, Settings]] = {}
    for found in swept["ops"]:
        if found["best"] is not None:
            best.setdefault(found["model"], {})[found["op"]] = found["best"]["settings"]
    rows = []
    for model, settings in best.items():
        rows.append(measure(model, settings, args.context))
        print(model, rows[-1]["us"], "ratio", rows[-1]["ratio"], flush=True)
    document = {
        "schema_version": 1,
        "device": describe_device(torch.device("cuda")),
        "versions": versions(),
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
