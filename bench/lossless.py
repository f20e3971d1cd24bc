"""Does speculative decoding write what plain decoding writes, token for token? Counts the tokens that differ.

    python -m skipstone.bench.lossless PROMPTS.jsonl --limit 24 --max-new-tokens 64 --dtype bf16 --out RESULT.json

Every arm (chain, tree; greedy and T = 0.8; batches of 1, 3 and 8) is compared with plain decoding in a batch of
its own size plus one, with the same seeds. Exit code 1 if a token differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from ..engine.engine import Engine, Generation
from ..engine.gate import DraftPolicy, Gate
from ..engine.load import load
from ..engine.statistics import Statistics
from .environment import describe_device, versions
from .questions import choose, read_questions

ARMS = [("chain", 1, 0.0), ("tree", 8, 0.0), ("tree", 3, 0.8), ("chain", 8, 0.8)]


def policies(engine: Engine) -> dict[str, DraftPolicy]:
    """A chain and a tree over the deepest exits, with gates wide enough that both accept and reject often."""
    assert engine.heads is not None
    middle, deep = engine.heads.exits[-3], engine.heads.exits[-1]
    return {
        "chain": DraftPolicy((middle, deep), {middle: Gate(1.5, 1.5), deep: Gate(2.5, 2.5)}, max_depth=4),
        "tree": DraftPolicy(
            (middle, deep), {middle: Gate(0.7, 1.5), deep: Gate(1.0, 4.0)}, max_depth=3, max_nodes=9, branch=2
        ),
    }


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--device")
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.dtype]
    engine = load(args.model, dtype=dtype, device=args.device)
    if engine.heads is None or len(engine.heads.exits) < 3 or engine.tokenizer is None:
        raise SystemExit(f"{args.model} has no shipped heads with three exits here; nothing could be drafted")
    questions = choose(read_questions(args.prompts), limit=args.limit)
    prompts = [engine.tokenizer.encode_chat([{"role": "user", "content": q.turns[0]}]) for q in questions]
    plain: dict[float, list[Generation]] = {}
    rows: list[dict[str, Any]] = []
    for mode, batch, temperature in ARMS:
        options = {"temperature": temperature, "max_new_tokens": args.max_new_tokens}
        start = time.perf_counter()
        if temperature not in plain:
            plain[temperature] = run_arm(engine, prompts, 5, speculation=False, **options)
        outs = run_arm(engine, prompts, batch, speculation="always", policy=policies(engine)[mode], **options)
        stats = Statistics.merge([out.stats for out in outs])
        pairs = zip(outs, plain[temperature], strict=True)
        row = {
            "mode": mode,
            "batch": batch,
            "temperature": temperature,
            "prompts": len(outs),
            "tokens": stats.num_committed,
            "differing_tokens": sum(differing(a.token_ids, b.token_ids) for a, b in pairs),
            "acceptance_rate": round(stats.acceptance_rate, 4),
            "tokens_per_verification": round(stats.tokens_per_verification, 4),
        }
        rows.append(row)
        print(row, f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    document = {
        "schema_version": 1,
        "what": "speculative against plain decoding, plain in batches of 5, first turns",
        "command": "python -m skipstone.bench.lossless " + " ".join(argv or sys.argv[1:]),
        "dtype": args.dtype,
        "device": describe_device(engine.decoder.device),
        "versions": versions(),
        "rows": rows,
    }
    print(json.dumps(document, indent=1))
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return int(any(row["differing_tokens"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
