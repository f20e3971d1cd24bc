"""Does speculative decoding write what plain decoding writes, token for token? Counts the tokens that differ.

    python -m skipstone.bench.lossless PROMPTS.jsonl --limit 24 --max-new-tokens 64 --dtype bf16 --out RESULT.json
    python -m skipstone.bench.lossless PROMPTS.jsonl --arms 'chain,tree,recurrent:1,8:greedy,sampled' --limit 240
    python -m skipstone.bench.lossless PROMPTS.jsonl --verify tda --sparsity THRESHOLDS

Every arm (how it drafts; greedy or sampled; a batch size) is compared with plain decoding in batches of 5, with the
same seeds; under `--verify tda` both are of the model that skips neurons. `--arms` takes groups of
`MODES:BATCHES:SAMPLINGS`, separated by spaces, each part a comma-separated list.
The result is written after every arm, so an interrupted run leaves what it has. Exit code 1 if a token differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..engine.engine import Engine
from ..engine.gate import BESIDE, DraftPolicy, Gate, best_first, fixed_exit
from ..engine.generation import Generation
from ..engine.load import load
from ..engine.statistics import Statistics
from .environment import describe_device, versions
from .questions import choose, read_questions

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8},
    "filtered": {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1},
}
DEFAULT_ARMS = "chain:1:greedy tree:8:greedy tree:3:sampled chain:8:sampled"
PLAIN_BATCH = 5
WARM_UP_TOKENS = 8


def chain(engine: Engine) -> DraftPolicy:
    """Over a middle and a deep exit, with gates wide enough to accept and to reject often."""
    middle, deep = _exits(engine)
    return DraftPolicy((middle, deep), {middle: Gate(1.5, 1.5), deep: Gate(2.5, 2.5)}, max_depth=4)


def tree(engine: Engine) -> DraftPolicy:
    """Over the same exits, with siblings."""
    middle, deep = _exits(engine)
    gates = {middle: Gate(0.7, 1.5), deep: Gate(1.0, 4.0)}
    return DraftPolicy((middle, deep), gates, max_depth=3, max_nodes=9, branch=2)


def _exits(engine: Engine) -> tuple[int, int]:
    assert engine.heads is not None
    if len(engine.heads.exits) < 3:
        raise ValueError(
            f"heads at exits {engine.heads.exits} were given, expected at least three for chains and trees"
        )
    return engine.heads.exits[-3], engine.heads.exits[-1]


# mode -> (kind of heads, policy)
MODES: dict[str, tuple[str, Callable[[Engine], DraftPolicy]]] = {
    "chain": ("adapter", chain),
    "tree": ("adapter", tree),
    "recurrent": ("recurrent", lambda engine: fixed_exit(0, 4)),
    "recurrent-tree": ("recurrent", lambda engine: best_first(4, 4, 5)),
    "beside": ("recurrent", lambda engine: replace(best_first(4, 4, 3), lookup=BESIDE)),
}


@dataclass(frozen=True)
class Arm:
    """One way to draft, in batches of one size, with one kind of sampling."""

    mode: str
    batch: int
    sampling: str


def parse_arms(text: str) -> list[Arm]:
    """Arms from groups such as `chain,tree:1,8:greedy`; the first batch sizes and samplings of all modes come first.

    Raises:
        ValueError: a group of another form, or an unknown mode or sampling.
    """
    arms: list[Arm] = []
    for group in text.split():
        parts = [part.split(",") for part in group.split(":")]
        known = len(parts) == 3 and set(parts[0]) <= set(MODES) and set(parts[2]) <= set(SAMPLINGS)
        if not known or not all(size.isdigit() and int(size) for size in parts[1]):
            raise ValueError(
                f"arms {group!r}: expected MODES:BATCHES:SAMPLINGS such as chain,tree:1,8:greedy, of modes "
                f"{', '.join(MODES)} and samplings {', '.join(SAMPLINGS)}"
            )
        modes, sizes, samplings = parts
        arms += [Arm(mode, int(size), how) for how, size, mode in itertools.product(samplings, sizes, modes)]
    return list(dict.fromkeys(arms))


def run_arm(engine: Engine, prompts: list[list[int]], batch: int, **options: Any) -> list[Generation]:
    """All prompts in batches; prompt i has seed 1000 + i whatever its batch."""
    outs: list[Generation] = []
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        outs += engine.generate(part, seeds=[1000 + first + i for i in range(len(part))], **options)
    return outs


def differing(ours: list[int], plain: list[int]) -> int:
    """Tokens that differ, those that only one side has included."""
    return sum(a != b for a, b in zip(ours, plain, strict=False)) + abs(len(ours) - len(plain))


class Comparison:
    """Arms against plain decoding over the same prompts. Plain decoding runs once for each kind of sampling, and every
    arm answers one batch shortly before the clock counts.

    Args:
        engine_of: kind of heads -> the engine to decode with; all of one model.
        prompts: token ids.
        max_new_tokens: of every answer.
    """

    def __init__(self, engine_of: Callable[[str], Engine], prompts: list[list[int]], max_new_tokens: int) -> None:
        self.engine_of, self.prompts, self.max_new_tokens = engine_of, prompts, max_new_tokens
        self._plain: dict[str, list[Generation]] = {}

    def rows(self, arm: Arm) -> list[dict[str, Any]]:
        """The arm's row, after plain decoding's own if that had to be run first."""
        kind, policy = MODES[arm.mode]
        engine, rows = self.engine_of(kind), []
        if arm.sampling not in self._plain:
            plain = Arm("plain", PLAIN_BATCH, arm.sampling)
            self._plain[arm.sampling], row = self._timed(engine, plain, speculation=False)
            rows.append(row)
        outs, row = self._timed(engine, arm, speculation="always", policy=policy(engine))
        pairs = list(zip(outs, self._plain[arm.sampling], strict=True))
        row["differing_tokens"] = sum(differing(a.token_ids, b.token_ids) for a, b in pairs)
        row["differing_prompts"] = [i for i, (a, b) in enumerate(pairs) if a.token_ids != b.token_ids]
        return [*rows, row]

    def _timed(self, engine: Engine, arm: Arm, **options: Any) -> tuple[list[Generation], dict[str, Any]]:
        options |= SAMPLINGS[arm.sampling]
        run_arm(engine, self.prompts[: arm.batch], arm.batch, max_new_tokens=WARM_UP_TOKENS, **options)
        start = time.perf_counter()
        outs = run_arm(engine, self.prompts, arm.batch, max_new_tokens=self.max_new_tokens, **options)
        return outs, _row(arm, outs, time.perf_counter() - start)


def _row(arm: Arm, outs: list[Generation], seconds: float) -> dict[str, Any]:
    stats = Statistics.merge([out.stats for out in outs])
    return {
        "mode": arm.mode,
        "batch": arm.batch,
        "sampling": arm.sampling,
        "temperature": SAMPLINGS[arm.sampling]["temperature"],
        "prompts": len(outs),
        "tokens": stats.num_committed,
        "acceptance_rate": round(stats.acceptance_rate, 4) if stats.num_drafted else None,
        "tokens_per_verification": round(stats.tokens_per_verification, 4),
        "errors": sum(out.error is not None for out in outs),
        "seconds": round(seconds, 1),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--heads", action="append", default=[], metavar="KIND=FOLDER", help="in place of shipped ones")
    parser.add_argument("--arms", default=DEFAULT_ARMS, help=f"of modes {', '.join(MODES)}")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--device")
    parser.add_argument("--verify", default="dense", choices=["dense", "tda"], help="the target model of both sides")
    parser.add_argument("--sparsity", type=Path, help="of --verify tda: a folder of calibrate --sparsity tda")
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.dtype]
    if unnamed := [pair for pair in args.heads if "=" not in pair]:
        parser.error(f"--heads {unnamed[0]}: expected KIND=FOLDER, such as recurrent=run/heads")
    try:
        arms = parse_arms(args.arms)
    except ValueError as error:
        parser.error(str(error))
    folders = dict(pair.split("=", 1) for pair in args.heads)
    engines: dict[str, Engine] = {}

    def engine_of(kind: str) -> Engine:
        if kind not in engines:
            engines[kind] = load(
                args.model, heads=folders.get(kind, kind), dtype=dtype, device=args.device, verify=args.verify,
                sparsity=args.sparsity,
            )  # fmt: skip
        return engines[kind]

    try:
        engine = engine_of(MODES[arms[0].mode][0])
    except ValueError as error:
        raise SystemExit(f"nothing could be drafted: {error}") from error
    if engine.tokenizer is None:
        raise SystemExit(f"{args.model} has no tokenizer, so it cannot read questions")
    try:
        questions = choose(read_questions(args.prompts), limit=args.limit)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    prompts = [engine.tokenizer.encode_chat([{"role": "user", "content": q.turns[0]}]) for q in questions]
    document: dict[str, Any] = {
        "schema_version": 2,
        "what": f"speculative against plain decoding, plain in batches of {PLAIN_BATCH}, first turns",
        "command": "python -m skipstone.bench.lossless " + " ".join(argv or sys.argv[1:]),
        "model": args.model,
        "dtype": args.dtype,
        "max_new_tokens": args.max_new_tokens,
        "verify": engine.verify,
        "skipping": _skipping(engine),
        "device": describe_device(engine.decoder.device),
        "versions": versions(),
        "complete": False,
        "rows": [],
    }
    comparison = Comparison(engine_of, prompts, args.max_new_tokens)
    for arm in arms:
        for row in comparison.rows(arm):
            document["rows"].append(row)
            print(row, file=sys.stderr, flush=True)
        document["complete"] = arm == arms[-1]
        _write(document, args.out)
    print(json.dumps(document, indent=1))
    return int(any(row.get("differing_tokens") or row["errors"] for row in document["rows"]))


def _skipping(engine: Engine) -> dict[str, Any] | None:
    """What skips neurons: its target, and when masks are read."""
    if engine.sparse is None:
        return None
    selection = engine.sparse.selection
    targets = {name: getattr(selection, name, None) for name in ("cett", "density")}
    return targets | {"options": vars(selection.options)}


def _write(document: dict[str, Any], path: Path | None) -> None:
    if path is None:
        return
    work = path.with_name(path.name + ".tmp")
    work.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(work, path)  # a kill leaves the last whole state


if __name__ == "__main__":
    sys.exit(main())
