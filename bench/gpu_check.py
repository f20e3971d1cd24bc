"""Is a GPU's decoding right? Kernels against their references, bits in every company, speculative against plain.

    python -m skipstone.bench.gpu_check --out check.json                                  # kernels and bits, 3 minutes
    python -m skipstone.bench.gpu_check --steps lossless --prompts spec_bench.jsonl --limit 24 --out check.json

Steps, each of which can fail the run (exit code 1):

    kernels   tests/kernels on the device, from a source checkout
    bits      a row's logits from the fused kernels must be the same whatever it stands beside: plain decoding, one row
              at a time, against chains of every width, other round starts, random trees (whose accepted path is then
              decoded on), and batch mates; unused slots of the cache hold NaN. For the model, and for small random
              ones of each family
    lossless  `bench/lossless.py` on prompts: chains, trees and recurrent drafts, batches of 1, 3 and 8
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.cache import KVCache, plan_cache
from ..engine.device_state import fill
from ..engine.forward import RowTiles, Working, advance, node_logits, prefill
from ..engine.fused import FusedStep, FusedWeights
from ..engine.model import Decoder
from ..engine.pretrained import load_pretrained
from ..engine.tree import MAX_NODES, DraftTree
from ..kernels.embed_rows import lay_rows
from ..kernels.grow_tree import Trees
from ..kernels.lm_head import lm_head
from . import lossless
from .environment import describe_device, versions
from .shapes import FAMILIES, random_weights, tiny_config

STEPS = ("kernels", "bits", "lossless")
WIDTHS = (1, 2, 4, 8, 16)  # rows a sequence has
SIZES = tuple(range(1, MAX_NODES + 1))
# Round starts before, at and after what attention is cut at: groups of 16, blocks of 64, splits of 256.
BASES = (1, 15, 16, 17, 63, 64, 100, 240, 255, 256, 500)
NUM_PLAIN = MAX_NODES
NUM_STARTS, BATCH = 4, 3
# Against the decoder's own operations, relative: half types round differently, fp32 adds in another order.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.05}


@dataclass
class Finding:
    """Rows compared in one way, and how many had other bits (or, of `reference`, the largest relative error)."""

    case: str
    rows: int = 0
    different: int = 0
    worst: float = 0.0
    first: str = ""

    def compare(self, found: Tensor, expected: Tensor, where: str) -> None:
        """Row by row, bit by bit."""
        wrong = int((found != expected).any(1).sum()) if found.shape == expected.shape else len(expected)
        self.rows += len(expected)
        self.different += wrong
        if wrong:
            self.first = self.first or where


class FusedRows:
    """Trees of several sequences verified by the fused kernels, as a captured round does, with all logits.

    Args:
        decoder: the model.
        batch: sequences.
        context: tokens of each.
        pdl: programmatic dependent launch.
    """

    def __init__(self, decoder: Decoder, batch: int, context: int, pdl: bool) -> None:
        self.decoder, self.weights = decoder, FusedWeights(decoder)
        self.cache = KVCache(plan_cache(decoder.config, batch, context, decoder.device, decoder.dtype), decoder.device)
        self.trees = Trees.empty(batch, decoder.device)
        self.steps = {w: FusedStep(self.weights, self.cache, -(-batch * w // 16) * 16, pdl=pdl) for w in WIDTHS}

    def read(self, sequence: int, ids: Sequence[int]) -> None:
        """Read a prompt from its start."""
        self.cache.restart(sequence)
        prefill(self.decoder, self.cache, sequence, ids)

    def rewind(self, sequence: int, base: int) -> None:
        """Go back to a committed length; what stood beyond becomes NaN."""
        for store in (self.cache.k, self.cache.v):
            store[:, sequence, :, base:] = float("nan")
        self.cache.lens[sequence] = base

    def verify(self, trees: Mapping[int, DraftTree], width: int) -> dict[int, Tensor]:
        """Logits `[nodes, V]` of each sequence's tree at its committed length, with `width` rows a sequence."""
        step, head, config = self.steps[width], self.weights.head, self.decoder.config
        fill(self.trees, trees)
        base = torch.tensor(self.cache.lens, dtype=torch.int32, device=self.cache.device)
        state = self.trees
        lay_rows(state.tokens, state.depths, state.paths, state.count, base, step.rows, step.ids, width, pdl=step.pdl)
        step.embed()
        step.run(0, config.num_layers)
        logits = torch.full((len(step.rows), config.vocab_size), float("nan"), device=self.cache.device)
        lm_head(
            step.x, step.stats, head.weight, head.bias, head.shift, step.rows, eps=config.norm_eps,
            softcap=config.logit_softcap, logits=logits, pdl=step.pdl,
        )  # fmt: skip
        return {b: logits[b * width : b * width + len(tree)] for b, tree in trees.items()}

    def reference(self, tree: DraftTree) -> Tensor:
        """Logits `[nodes, V]` of the first sequence's tree through the decoder's own operations, not the kernels."""
        self.cache.clear_open(0)
        decoder, tiles = self.decoder, RowTiles(gathered=True)
        hidden = torch.zeros(MAX_NODES, decoder.config.hidden_size, device=decoder.device)
        work = Working(0, self.cache.lens[0], tree, hidden)
        work.embed_new(decoder)
        advance(decoder, self.cache, [(work, range(len(tree)))], decoder.config.num_layers, tiles)
        return node_logits(decoder, work.hidden[: len(tree)], tiles).float()


def bits(rows: FusedRows, bases: Sequence[int] = BASES, num_trees: int = 3, seed: int = 0) -> list[Finding]:
    """Compare rows with plain decoding's in every company."""
    rng = random.Random(seed)
    vocab, batch = rows.decoder.config.vocab_size, len(rows.cache.lens)
    found = {case: Finding(case) for case in ("width", "start", "tree", "after a tree", "batch", "reference")}
    context = max(bases) + NUM_PLAIN
    texts = [[rng.randrange(vocab) for _ in range(context + 1)] for _ in range(batch)]
    for base in bases:
        ids = texts[0][base : base + NUM_PLAIN]
        for sequence, text in enumerate(texts):
            rows.read(sequence, text[:base])
        plain = _plain(rows, base, ids)
        rows.rewind(0, base)
        expected, reference = rows.reference(chain_of(ids)), found["reference"]
        error = float((plain - expected).abs().max() / expected.abs().max())
        reference.rows, reference.worst = reference.rows + len(plain), max(reference.worst, error)
        for size in SIZES:
            for width in (w for w in WIDTHS if w >= size):
                rows.rewind(0, base)
                logits = rows.verify({0: chain_of(ids[:size])}, width)[0]
                found["width"].compare(logits, plain[:size], f"base {base}, {size} rows of {width}")
        for start in sorted(rng.sample(range(1, NUM_PLAIN), NUM_STARTS)):
            _plain(rows, base, ids[:start])
            logits = rows.verify({0: chain_of(ids[start:])}, 16)[0]
            found["start"].compare(logits, plain[start:], f"base {base}, round from {base + start}")
        for _ in range(num_trees):
            depth = rng.randrange(2, NUM_PLAIN // 2 + 1)
            tree, spine = bushy(ids[:depth], rng, vocab)
            mates = {b: bushy(texts[b][base : base + 5], rng, vocab)[0] for b in range(1, batch)}
            for case, others in (("tree", {}), ("batch", mates)):
                for sequence in range(batch):
                    rows.rewind(sequence, base)
                logits = rows.verify({0: tree, **others}, 16)[0]
                found[case].compare(logits[spine], plain[:depth], f"base {base}, {tree}")
            rows.cache.commit(0, spine)
            rest = rows.verify({0: chain_of(ids[depth:])}, 16)[0]
            found["after a tree"].compare(rest, plain[depth:], f"base {base}, after {spine} of {tree}")
    return list(found.values())


def _plain(rows: FusedRows, base: int, ids: Sequence[int]) -> Tensor:
    """Logits of plain decoding, one row at a time; the tokens are committed."""
    rows.rewind(0, base)
    logits = []
    for token in ids:
        logits.append(rows.verify({0: DraftTree(token)}, 1)[0].clone())
        rows.cache.commit(0, [0])
    return torch.cat(logits)


def chain_of(tokens: Sequence[int]) -> DraftTree:
    return DraftTree.from_lists(tokens, [-1, *range(len(tokens) - 1)])


def bushy(tokens: Sequence[int], rng: random.Random, vocab_size: int) -> tuple[DraftTree, list[int]]:
    """A random tree of 16 nodes that holds `tokens` as one of its paths; also that path's nodes."""
    tree, spine, wanted = DraftTree(tokens[0]), [0], list(tokens[1:])
    while not tree.is_full:
        must = len(wanted) >= tree.max_nodes - len(tree)
        if wanted and (must or rng.random() < 0.4):
            token = wanted.pop(0)
            known = tree.child(spine[-1], token)
            spine.append(tree.add(spine[-1], token) if known is None else known)
            continue
        parent, token = rng.randrange(len(tree)), rng.randrange(vocab_size)
        if tree.child(parent, token) is None:
            tree.add(parent, token)
    return tree, spine


# --- steps


def check_bits(task: tuple[str, str]) -> dict[str, Any]:
    """One model's findings; `task` is a family of a small random model or a model to load, and the dtype's name."""
    name, dtype_name = task
    start, dtype, device = time.perf_counter(), getattr(torch, dtype_name), torch.device("cuda")
    if name in FAMILIES:
        config = tiny_config(name)
        decoder = Decoder(config, random_weights(config, torch.float32, device), dtype, device)
    else:
        loaded = load_pretrained(name, torch.bfloat16, progress=False)
        decoder = Decoder(loaded.config, loaded.weights, dtype, device)
    found = []
    with torch.inference_mode():
        for pdl in (False, True):
            rows = FusedRows(decoder, BATCH, max(BASES) + 2 * NUM_PLAIN, pdl)
            found += [{**asdict(finding), "pdl": pdl} for finding in bits(rows)]
    bad = [f for f in found if f["different"] or not f["worst"] < TOLERANCES[dtype]]
    return {
        "model": name, "dtype": dtype_name, "ok": not bad, "findings": found,
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def check_kernels(processes: int) -> dict[str, Any]:
    """The kernels' own tests."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "tests" / "kernels").is_dir():
        return {"ok": False, "summary": f"no tests/kernels beside {root}: this needs a source checkout"}
    start = time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(processes), "tests/kernels"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    return {
        "ok": done.returncode == 0, "summary": lines[-1] if lines else done.stderr[-500:], "tail": lines[-40:],
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def all_bits(model: str, processes: int) -> Iterator[dict[str, Any]]:
    """Every family, and the model, in processes beside each other."""
    tasks = [(model, "bfloat16"), *((family, dtype) for family in FAMILIES for dtype in ("bfloat16", "float16"))]
    with multiprocessing.get_context("spawn").Pool(min(processes, len(tasks))) as pool:
        yield from pool.imap_unordered(check_bits, tasks)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default="kernels,bits", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", type=Path, help="of the step lossless")
    parser.add_argument("--arms", default="chain,tree,recurrent,recurrent-tree:1,3,8:greedy,sampled")
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    steps = args.steps.split(",")
    if unknown := sorted(set(steps) - set(STEPS)):
        raise SystemExit(f"unknown steps {unknown}; expected some of {', '.join(STEPS)}")
    if "lossless" in steps and args.prompts is None:
        raise SystemExit("the step lossless needs --prompts")
    if not torch.cuda.is_available():
        raise SystemExit("this checks a GPU, and torch sees none here")
    document: dict[str, Any] = {
        "schema_version": 1, "device": describe_device(torch.device("cuda")), "versions": versions(), "bits": [],
    }  # fmt: skip
    ok = True

    def note(good: bool, text: str) -> None:
        nonlocal ok
        ok = ok and good
        print(f"{'ok' if good else 'FAILED':8}{text}", flush=True)
        if args.out:
            args.out.write_text(json.dumps({**document, "ok": ok}, indent=1) + "\n", encoding="utf-8")

    if "kernels" in steps:
        document["kernels"] = found = check_kernels(args.processes)
        note(found["ok"], f"tests/kernels: {found['summary']}")
        if not found["ok"]:
            print(*found.get("tail", []), sep="\n")
    if "bits" in steps:
        for found in all_bits(args.model, args.processes):
            document["bits"].append(found)
            note(found["ok"], describe(found))
    if "lossless" in steps:
        given = [str(args.prompts), "--model", args.model, "--arms", args.arms, "--limit", str(args.limit)]
        given += ["--max-new-tokens", str(args.max_new_tokens)]
        if args.out:
            given += ["--out", str(args.out.with_suffix(".lossless.json"))]
        note(lossless.main(given) == 0, "speculative against plain decoding")
    return int(not ok)


def describe(found: Mapping[str, Any]) -> str:
    """A line of one model's findings, and lines of what is wrong."""
    rows = sum(f["rows"] for f in found["findings"])
    worst = max(f["worst"] for f in found["findings"])
    lines = [
        f"bits of {found['model']} in {found['dtype']}: {rows} rows compared, relative error {worst:.1e} "
        f"({found['seconds']} s)"
    ]
    for f in found["findings"]:
        if f["different"]:
            lines.append(f"  {f['case']}, pdl {f['pdl']}: {f['different']} of {f['rows']} rows; first at {f['first']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
