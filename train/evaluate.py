"""How good stored head sets are on prompts that training never read.

    python -m skipstone.train.evaluate --model smollm2-135m-instruct --prompts spec_bench_dev.jsonl --out found.json
        HEADS...

The model answers every prompt greedily; each set is then asked at every position of the answers, given the true prefix.
For greedy chains that is exact (see `chains`). With `--tree BEAM,BRANCH,DEPTH` the engine also decodes the prompts,
many side by side, with best-first trees of at most 15 nodes from each recurrent set. `--vocab N` also measures each set
with a smaller draft vocabulary: the N of its ids that the training text holds most often. The report is written again
after each set.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from ..engine.gate import best_first
from ..engine.model import Decoder
from ..heads import HeadSet, StatefulHead
from .calibrate import measuring_engine
from .chains import Chains, measure_chains
from .data import SelfText, encode_chat
from .generate import Sampling, write_text
from .measure import MISS, Measurements, inference_projection, measure, simulate_chain
from .run import DTYPES, Base, device_type, load_base

LENGTHS = (1, 2, 3, 4, 5)
CHAIN = 5
SIDE_BY_SIDE = 64


def read_questions(path: str | Path, limit: int | None = None) -> list[tuple[str, str]]:
    """(category, first turn) of a prompt file; the category is "all" where it names none."""
    found = []
    for line in Path(path).read_text(encoding="utf-8").split("\n"):
        if line.strip():
            record = json.loads(line)
            prompt = record["prompt"] if "prompt" in record else record["turns"][0]
            found.append((str(record.get("category", record.get("source", "all"))), prompt))
    if not found:
        raise ValueError(f"{path} holds no prompts: expected JSON lines with 'prompt' or 'turns'")
    return found[:limit]


def answers(base: Base, prompts: Sequence[str], new_tokens: int) -> SelfText:
    """What the model says to each prompt, greedily."""
    ids = [encode_chat(base.tokenizer, prompt) for prompt in prompts]
    return write_text(base.decoder, ids, [0.0] * len(ids), Sampling(new_tokens, tuple(base.tokenizer.stop_ids)))


def evaluate(decoder: Decoder, heads: HeadSet, text: SelfText, categories: Sequence[str]) -> dict[str, Any]:
    """Every exit's numbers on texts, overall and by category; `heads` are attached."""
    found: dict[str, Any] = {}
    plain = [layer for layer, head in heads.heads.items() if not isinstance(head, StatefulHead)]
    batch = max(8_192, int(text.lens.max()))
    for layer in heads.exits:
        if layer not in plain:
            chains = measure_chains(decoder, heads, layer, text, CHAIN, None, batch)
            found[str(layer)] = _of_chains(chains, categories)
    if plain:
        on_gpu = decoder.device.type == "cuda"
        seen = measure(decoder, heads, text, None, batch, autocast=on_gpu)
        found |= {str(layer): _of_exit(seen, layer, categories) for layer in plain}
    return found


def decode_trees(
    base: Base, heads: HeadSet, text: SelfText, categories: Sequence[str], tree: tuple[int, int, int], new_tokens: int
) -> dict[str, Any]:
    """Tokens per verification of the engine's own best-first trees; `heads` are attached for inference."""
    engine = measuring_engine(base.decoder, heads)
    prompts = [text.text(i)[: int(text.prompt_lens[i])].tolist() for i in range(len(text))]
    done = []
    for first in range(0, len(prompts), SIDE_BY_SIDE):
        done += engine.generate(
            prompts[first : first + SIDE_BY_SIDE], speculation="always", policy=best_first(*tree),
            max_new_tokens=new_tokens, stop_ids=tuple(base.tokenizer.stop_ids),
        )  # fmt: skip
    counts = np.array(
        [[g.stats.num_committed, g.stats.num_verifications, g.stats.num_drafted, g.stats.num_accepted] for g in done]
    )

    def rates(rows: np.ndarray) -> dict[str, float]:
        committed, verified, drafted, accepted = (int(x) for x in rows.sum(0))
        return {
            "tokens": committed,
            "verifications": verified,
            "tokens_per_verification": committed / max(1, verified),
            "acceptance_rate": accepted / max(1, drafted),
        }

    by_category = {c: rates(counts[[i for i, own in enumerate(categories) if own == c]]) for c in _kinds(categories)}
    return {"tree": list(tree), **rates(counts), "by_category": by_category}


def _of_exit(seen: Measurements, layer: int, categories: Sequence[str]) -> dict[str, Any]:
    def numbers(chosen: np.ndarray) -> dict[str, float]:
        rank = seen.rank[layer][chosen]
        return {
            "tokens": len(rank),
            "agreement": float((rank == 0).mean()),
            "in_top_4": float((rank < 4).mean()),
            "outside_vocabulary": float((rank == MISS).mean()),
            "mean_entropy": float(seen.entropy[layer][chosen].mean()),
            **{f"tokens_per_verification_{n}": simulate_chain(rank == 0, seen.text[chosen], n) for n in (3, 5)},
        }

    return _by_category(numbers, seen.text, categories)


def _of_chains(chains: Chains, categories: Sequence[str]) -> dict[str, Any]:
    def numbers(chosen: np.ndarray) -> dict[str, Any]:
        part = Chains(
            chains.text[chosen], *(x[:, chosen] for x in (chains.right, chains.in_top, chains.entropy, chains.valid))
        )
        in_top = [float(part.in_top[step][part.valid[step]].mean()) for step in range(len(part.right))]
        return {
            "tokens": len(part.text),
            "conditional": part.conditional,
            "cumulative": part.cumulative,
            "in_top_4": in_top,
            **{f"tokens_per_verification_{n}": part.tokens_per_verification(n) for n in LENGTHS},
        }

    return _by_category(numbers, chains.text, categories)


def _by_category(numbers: Any, text: np.ndarray, categories: Sequence[str]) -> dict[str, Any]:
    own = np.array(categories, dtype=object)[text]
    # categories without a drafted position say nothing
    found = {c: numbers(own == c) for c in _kinds(categories) if bool((own == c).any())}
    return {**numbers(np.ones(len(text), dtype=bool)), "by_category": found}


def _kinds(categories: Sequence[str]) -> list[str]:
    return sorted(set(categories))


def restrictions(heads: HeadSet, sizes: Sequence[int], text: SelfText | None) -> Mapping[int, HeadSet]:
    """Smaller draft vocabularies of a set, by the frequency of ids in the text it was trained on."""
    if text is None:
        return {}
    counts = torch.bincount(text.ids.long(), minlength=heads.config.vocab_size)
    known = torch.arange(len(counts)) if heads.draft_ids is None else heads.draft_ids.cpu()
    by_frequency = known[counts[known].argsort(descending=True, stable=True)]
    return {n: heads.restricted(by_frequency[:n].sort().values) for n in sizes if n < heads.config.num_outputs}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="skipstone.train.evaluate", description="Measure stored head sets on prompts."
    )
    parser.add_argument("heads", nargs="+", metavar="HEADS", help="folders of head sets")
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True, metavar="FILE", help="JSON lines with prompt or turns")
    parser.add_argument("--out", required=True, metavar="FILE", help="the report, JSON")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--limit", type=int, default=None, help="only the first prompts")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="only every N-th prompt, from the I-th")
    parser.add_argument("--tree", default=None, metavar="BEAM,BRANCH,DEPTH", help="also decode with best-first trees")
    parser.add_argument("--only-tree", action="store_true", help="leave out what --tree does not need")
    parser.add_argument("--vocab", default="", metavar="N,N", help="also these smaller draft vocabularies")
    parser.add_argument("--text", default=None, metavar="FILE", help="text.safetensors of the run, for --vocab")
    parser.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="for sets that are not there yet")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default="bf16", choices=tuple(DTYPES))
    given = parser.parse_args(arguments)
    started = time.monotonic()
    base = load_base(given.model, DTYPES[given.dtype], device_type(given.device), progress=False)
    index, parts = map(int, given.part.split("/"))
    questions = read_questions(given.prompts, given.limit)[index::parts]
    categories = [category for category, _ in questions]
    text = answers(base, [prompt for _, prompt in questions], given.new_tokens)
    on_gpu = base.decoder.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()  # the writer's keys and values, which a training run beside this one may want
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    report: dict[str, Any] = {
        "what": "greedy answers of the model, heads asked at every position on true prefixes",
        "model": base.identity.model_id, "prompts": Path(given.prompts).name, "part": given.part,
        "texts": len(text), "tokens": text.num_written, "new_tokens": given.new_tokens, "device": device,
        "dtype": given.dtype, "torch": torch.__version__, "sets": {},
    }  # fmt: skip
    for folder in given.heads:
        found: dict[str, Any] = {}
        report["sets"][str(folder)] = found
        while not (Path(folder) / "manifest.json").exists() and time.monotonic() - started < given.wait:
            time.sleep(0.5)
        try:
            heads = HeadSet.load(folder, base.identity, allow_base_mismatch=True)
            found["parameters"], found["draft_vocab"] = heads.num_parameters, heads.config.num_outputs
            projection = inference_projection(base.decoder)
            if not given.only_tree:
                trained_on = None if given.text is None else SelfText.from_tensors(load_file(given.text))
                small = restrictions(heads, [int(n) for n in given.vocab.split(",") if n], trained_on)
                found["exits"] = evaluate(base.decoder, heads.attach(projection), text, categories)
                for size, other in small.items():
                    found[f"exits_vocab_{size}"] = evaluate(base.decoder, other.attach(projection), text, categories)
                Path(given.out).write_text(json.dumps(report, indent=1) + "\n")
            if given.tree is not None and 0 in heads.exits:
                beam, branch, depth = map(int, given.tree.split(","))
                trees = decode_trees(
                    base, heads.attach(projection), text, categories, (beam, branch, depth), given.new_tokens
                )
                found["trees"] = trees
        except (ValueError, RuntimeError, OSError) as error:  # the other sets are still wanted
            found["error"] = f"{type(error).__name__}: {error}"
        report["seconds"] = time.monotonic() - started
        Path(given.out).write_text(json.dumps(report, indent=1) + "\n")
        sys.stderr.write(f"{folder}: {time.monotonic() - started:.1f} s {found.get('error', '')}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
