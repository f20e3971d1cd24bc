"""Offline tuning of a decode step's kernels: which settings are fastest for a model's shapes on this GPU.

    python -m skipstone.bench.sweep_kernels --out sweep.json                       # about three minutes
    python -m skipstone.bench.sweep_kernels --models qwen2.5-1.5b --ops down,up --most 200

A sample of each operation's settings is timed, then the neighbours of the best ones. A timing is one CUDA graph of
calls that go round over so many copies of the weights that L2 holds none of them (16 live rows, programmatic launch
on); all settings were compiled before, in worker processes. The best few are timed with 1 and 16 rows, with and
without programmatic launch, if their results agree with the table's and one row has the same bits alone and among 16.
Settings that fail are counted by their reasons. Prints the best of each operation and shape for the tables in
`_settings`, and writes everything as JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..engine.config import ModelConfig
from .device_time import bandwidth, capture, replay_us
from .environment import describe_device, versions
from .kernel_ops import (
    KERNELS,
    MOST_PARTS,
    NUM_ROWS,
    OPS,
    Bench,
    Kernels,
    Op,
    Settings,
    attention_grid,
    combinations,
    weight_shape,
)
from .shapes import SHAPES, shape_config

Place = tuple[str, str, int]  # model, operation, context (0 but for attention)
Task = tuple[str, str, int, Settings, bool]  # a place, settings, programmatic launch
SHARED_BYTES = 227 * 1024  # of a program, on Hopper
LEAST_PROGRAMS = 36  # a quarter of the multiprocessors
TOLERANCE = 0.02  # bf16 sums in another order
REPLAYS, FINALISTS, KEPT = 4, 3, 40


def grid_of(config: ModelConfig, name: str) -> list[Settings]:
    """Settings worth a try; the names are those of the operation's launcher."""
    if name == "attention":
        return attention_grid()
    width, k = weight_shape(config, name)
    if name == "qkv":
        blocks = [2 * pairs for pairs in (4, 8, 16, 32) if pairs <= config.head_dim // 2]
        return [{"BLOCK_P": s["BN"] // 2, **_less(s, "BN")} for s in product_grid(k, width, blocks)]
    if name == "up":
        ways = 2 if config.gated_mlp else 1
        return [{**s, "BN": s["BN"] // ways} for s in product_grid(k, width, [ways * n for n in (4, 8, 16, 32, 64)])]
    if name == "lm_head":
        return product_grid(k, width, [32, 64, 128, 256])
    parts = [p for p in (1, 2, 4, MOST_PARTS) if p == 1 or k // p >= 256]
    return product_grid(k, width, [8, 16, 32, 64], {"PARTS": parts})


def _less(settings: Settings, name: str) -> Settings:
    return {key: value for key, value in settings.items() if key != name}


def product_grid(
    k: int, width: int, blocks: Sequence[int], more: Mapping[str, Sequence[int]] = MappingProxyType({})
) -> list[Settings]:
    """Settings of a tile product `[16, k] x [k, width]` that can make sense.

    Left out: tiles that do not fit shared memory, splits of k shorter than a block, tails that do not deal out all of
    k, more stages than steps, warps with nothing to do, and wide tiles where they would leave most processors idle.
    """
    choices = {
        "BN": blocks, "BK": (32, 64, 128, 256, 512), "TAIL": (0, 16, 32, 64, 128, 256), "SPLIT": (1, 2, 4, 8, 16),
        **more, "num_warps": (2, 4, 8, 16), "num_stages": (1, 2, 3, 4, 6),
    }  # fmt: skip
    found = []
    for s in combinations(choices):
        parts, tail = s.get("PARTS", 1), s["TAIL"]
        depth = s["SPLIT"] * (s["BK"] + tail)
        if tail and not (s["SPLIT"] > 1 and tail < s["BK"] and depth * parts == k):
            continue
        fits = s["num_stages"] * depth * (NUM_ROWS + s["BN"]) * 2 <= SHARED_BYTES and depth < 2 * k // parts
        steps = -(-k // (parts * depth))
        staged = min(2, steps) <= s["num_stages"] <= steps
        warps = s["num_warps"] <= max(2, s["SPLIT"] * s["BN"] // 8) and s["SPLIT"] <= 4 * s["num_warps"]
        if fits and staged and warps and -(-width // s["BN"]) * parts >= LEAST_PROGRAMS:
            found.append(s)
    return found


def draw(grid: Sequence[Settings], table: Settings, most: int) -> list[Settings]:
    """The table's settings and at most so many others of the grid."""
    others = [settings for settings in grid if settings != table]
    return [table, *random.Random(1).sample(others, min(most, len(others)))]


def neighbours(grid: Sequence[Settings], best: Settings) -> list[Settings]:
    """Settings of the grid within two steps of `best`, nearest first."""
    steps = {key: sorted({s[key] for s in grid}) for key in grid[0]}

    def distance(settings: Settings) -> int:
        return sum(abs(values.index(settings[key]) - _nearest(values, best[key])) for key, values in steps.items())

    return [settings for settings in sorted(grid, key=distance) if 0 < distance(settings) <= 2]


def _nearest(values: list[int], value: int) -> int:
    return min(range(len(values)), key=lambda i: abs(values[i] - value))


# --- compiling beside each other


def kernels_of(num_rows: int) -> tuple[Kernels, Callable[[ModelConfig, str], list[Settings]]]:
    """Kernels for tiles of 16 rows, or those specialised to one, and their grids."""
    if num_rows == 1:
        from . import one_row

        return one_row.kernels(), one_row.grid_of
    return KERNELS, grid_of


_configs: dict[str, ModelConfig] = {}  # a worker's own, from here on
_kernels: list[Kernels] = []
_ops: dict[Place, Op] = {}


def _begin(configs: Mapping[str, ModelConfig], num_rows: int) -> None:
    _configs.update(configs)
    _kernels[:] = [kernels_of(num_rows)[0]]


def compile_one(task: Task, deadline: float) -> str | None:
    """Launch a setting once, in a worker, so that its binary lies in Triton's cache. Returns why it failed."""
    model, name, context, settings, pdl = task
    if time.monotonic() > deadline:
        return "out of time"
    try:
        if (model, name, context) not in _ops:
            bench = Bench(_configs[model], torch.device("cuda"), cold_bytes=2, kernels=_kernels[0])
            _ops[model, name, context] = bench.op(name, context)
        launch, _ = _ops[model, name, context].prepare(settings)
        launch(0, pdl)
        torch.cuda.synchronize()
    except Exception as error:  # whatever a compiler throws: this setting is out, and the reason is counted
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100] if str(error).strip() else ''}"
    return None


def _compile(job: tuple[Task, float]) -> str | None:
    return compile_one(*job)


# --- timing


def time_us(op: Op, settings: Settings, pdl: bool, live: int, repeats: int) -> float:
    """Median device time of a call, over a graph of one call for each copy of the weights."""
    launch, _ = op.prepare(settings)
    op.set_live(live)

    def body() -> None:
        for copy in range(op.copies):
            launch(copy, pdl)

    return replay_us(capture(body, warm_up=lambda: launch(0, pdl)), REPLAYS, repeats).p50 / op.copies


def wrong(op: Op, settings: Settings, pdl: bool) -> str | None:
    """Why the results of a setting cannot be trusted: far from the table's, or one row's bits change with the number
    of rows."""
    results = []
    for chosen, live in ((op.default, op.num_rows), (settings, op.num_rows), (settings, 1)):
        launch, result = op.prepare(chosen)
        op.set_live(live)
        launch(0, pdl)
        results.append(result().float())
    expected, found, alone = results
    error = float((found - expected).norm() / expected.norm())
    if not error < TOLERANCE:
        return f"results differ from the table's settings by {error:.2g}"
    return None if torch.equal(alone[0], found[0]) else f"one row alone has other bits than among {op.num_rows}"


@dataclass
class Search:
    """What is known of one operation."""

    times: dict[str, tuple[float, Settings]]
    failures: Counter[str]

    @property
    def ranked(self) -> list[Settings]:
        return [settings for _, settings in sorted(self.times.values(), key=lambda pair: pair[0])]

    def time(self, op: Op, candidates: Iterable[Settings]) -> None:
        for settings in candidates:
            try:
                self.times[str(settings)] = time_us(op, settings, True, op.num_rows, 1), settings
            except Exception as error:  # as in compile_one
                self.failures[f"{type(error).__name__}: {str(error)[:100]}"] += 1

    def finish(self, op: Op) -> dict[str, Any]:
        """Check the best settings and the table's own, and time them in every way."""
        rows: list[dict[str, Any]] = []
        for settings in finalists(self, op.default):
            reason = wrong(op, settings, True) or wrong(op, settings, False)
            if reason is not None:
                self.failures[reason] += 1
                continue
            us = {
                _way(live, pdl): round(time_us(op, settings, pdl, live, 5), 3)
                for pdl, live in itertools.product((True, False), dict.fromkeys((op.num_rows, 1)))
            }
            rows.append({"settings": settings, "us": us, "gb_s": round(op.num_bytes / next(iter(us.values())) / 1e3)})
        rows.sort(key=lambda row: next(iter(row["us"].values())))
        return {
            "op": op.name, "sizes": op.sizes, "bytes": op.num_bytes, "copies": op.copies, "timed": len(self.times),
            "best": rows[0] if rows else None, "table": next((r for r in rows if r["settings"] == op.default), None),
            "finalists": rows, "failures": dict(self.failures),
            "all": [[round(self.times[str(s)][0], 3), s] for s in self.ranked[:KEPT]],
        }  # fmt: skip


def finalists(search: Search, default: Settings) -> list[Settings]:
    """The best few and the table's own."""
    best = search.ranked[:FINALISTS]
    return best if default in best else [*best, default]


def _way(live: int, pdl: bool) -> str:
    return f"{live} row{'s' if live > 1 else ''}{', pdl' if pdl else ''}"


def report(model: str, found: Mapping[str, Any]) -> Iterator[str]:
    """Lines for people."""
    name = f"{model} {found['op']} {found['sizes']}"
    if found["best"] is None:
        yield f"{name}: nothing worked"
    else:
        best, table = found["best"], found["table"]
        us = ", ".join(f"{way} {value:.2f}" for way, value in best["us"].items())
        before = "" if table is None else f" (table {next(iter(table['us'].values())):.2f})"
        yield f"{name}: {best['settings']}  us: {us}{before}  {best['gb_s']} GB/s, best of {found['timed']}"
    for reason, count in list(found["failures"].items())[:3]:
        yield f"    {count} out: {reason}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--ops", default=",".join(OPS), help=f"of {', '.join(OPS)}")
    parser.add_argument(
        "--rows", type=int, default=NUM_ROWS, choices=[NUM_ROWS, 1], help="1: bench/one_row.py's kernels"
    )
    parser.add_argument("--contexts", default="320,4096", help="lengths that attention is tuned for")
    parser.add_argument("--most", type=int, default=48, help="settings of an operation, drawn from the grid")
    parser.add_argument("--near", type=int, default=24, help="neighbours of the best ones")
    parser.add_argument("--seconds", type=float, default=70, help="for compiling the sample; what is late is left out")
    parser.add_argument("--processes", type=int, default=max(1, (multiprocessing.cpu_count() or 2) - 1))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if unknown := sorted({*args.ops.split(",")} - {*OPS}):
        raise SystemExit(f"unknown operations {unknown}; expected some of {', '.join(OPS)}")
    if not torch.cuda.is_available():
        raise SystemExit("settings are tuned on a GPU, and torch sees none here")
    start = time.monotonic()
    configs = {model: shape_config(model) for model in args.models.split(",")}
    contexts = [int(context) for context in args.contexts.split(",")]
    places = [
        (model, name, context)
        for model in configs
        for name in args.ops.split(",")
        for context in (contexts if name == "attention" else [0])
    ]
    # Workers come from a process that has imported everything and never touched the GPU.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__spec__.name] if __spec__ else [])
    with processes.Pool(args.processes, _begin, (configs, args.rows)) as pool:
        document = sweep(places, configs, args, pool)
    print(f"{time.monotonic() - start:.0f} s in all", file=sys.stderr)
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


def sweep(
    places: Sequence[Place], configs: Mapping[str, ModelConfig], args: argparse.Namespace, pool: Any
) -> dict[str, Any]:
    """Compile and time a sample, then its best ones' neighbours, then finish."""
    kernels, grid = kernels_of(args.rows)
    grids = {place: grid(configs[place[0]], place[1]) for place in places}
    tables = {place: kernels.table(configs[place[0]], place[1], torch.bfloat16) for place in places}
    searches = {place: Search({}, Counter()) for place in places}
    tried: dict[Place, list[Settings]] = {place: [] for place in places}
    found: dict[str, Any] = {"not_compiled": {}, "ops": []}

    def compiled(wanted: Mapping[Place, Sequence[Settings]], pdl: bool, seconds: float) -> dict[Place, list[Settings]]:
        tasks: list[Task] = [(*place, settings, pdl) for place in places for settings in wanted[place]]
        random.Random(0).shuffle(tasks)  # a deadline then costs every operation alike
        start = time.monotonic()
        outcomes = pool.map(_compile, [(task, start + seconds) for task in tasks], chunksize=1)
        reasons = Counter(why for why in outcomes if why is not None)
        note = f"{len(tasks) - reasons.total()} of {len(tasks)} settings compiled in {time.monotonic() - start:.0f} s"
        print(note, *reasons.most_common(3), sep="\n    ", file=sys.stderr, flush=True)
        found["not_compiled"] = dict(reasons + Counter(found["not_compiled"]))
        good = {place: [] for place in places}  # type: dict[Place, list[Settings]]
        for task, why in zip(tasks, outcomes, strict=True):
            if why is None:
                good[task[:3]].append(task[3])
        return good

    def ops() -> Iterator[tuple[Place, Op]]:
        bench, of = None, ""
        for place in places:
            if bench is None or of != place[0]:
                bench, of = Bench(configs[place[0]], torch.device("cuda"), kernels=kernels), place[0]
            yield place, bench.op(*place[1:])

    def time_round(wanted: Mapping[Place, list[Settings]], seconds: float) -> None:
        for place in places:
            tried[place] += wanted[place]
        good = compiled(wanted, True, seconds)
        for place, op in ops():
            searches[place].time(op, good[place])

    time_round({place: draw(grids[place], tables[place], args.most) for place in places}, args.seconds)
    near = {}
    for place in places:
        best = [neighbours(grids[place], settings) for settings in searches[place].ranked[:2]]
        mixed = [settings for pair in itertools.zip_longest(*best) for settings in pair if settings is not None]
        fresh = {str(settings): settings for settings in mixed if settings not in tried[place]}
        near[place] = list(fresh.values())[: args.near]
    time_round(near, args.seconds / 2)
    finals = {place: finalists(searches[place], tables[place]) for place in places}
    compiled(finals, False, args.seconds / 2)
    for place, op in ops():
        found["ops"].append({"model": place[0], **searches[place].finish(op)})
        print(*report(place[0], found["ops"][-1]), sep="\n", flush=True)
    device = torch.device("cuda")
    about = {"schema_version": 1, "rows": args.rows, "device": describe_device(device), "versions": versions()}
    return about | {"bandwidth_gb_s": bandwidth(device), **found}


if __name__ == "__main__":
    sys.exit(main())
