"""What dropping small inputs costs, whether it drafts well, and what it saves on a CPU: one JSON document.

    python -m skipstone.bench.teal --teal FOLDER --text wikitext2_valid.txt --out bench/results/teal_smollm2_cpu.json

FOLDER holds greedily allocated thresholds (`skipstone calibrate --sparsity teal`); uniform ones are found beside them,
on the same text's first half. Windows of the second half are measured: a prompt, read densely, and its continuation,
whose loss counts; all settings on the same windows, intervals are bootstraps over windows.

Drafts: the shipped adapters, asked as they are calibrated and at one exit, with layers that drop nothing and with
layers that do; every answer is compared with plain decoding's. Counts do not depend on the machine's load.

Times: one product, and plain decoding, in CPU time of one thread (other work on the machine shares caches and memory
with it), settings taking turns, first quartiles.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..engine.engine import Engine
from ..engine.gate import DraftPolicy, calibrated, fixed_exit
from ..engine.generation import Generation
from ..engine.load import load
from ..engine.sparsity.quality import Quality, measure_quality
from ..engine.sparsity.tda import cut
from ..engine.sparsity.teal import Teal, TealLevel, calibrate_teal
from ..engine.sparsity.thresholded import TealDecoder
from ..kernels.channel_linear import channel_linear
from ..kernels.linear import PackedLinear
from .environment import describe_device, versions
from .questions import built_in, choose, read_questions
from .sparsity import Windows, _shown_arguments, compare, decode_ms, note

PARTS = ("quality", "drafts", "times")
COLD_BYTES = 96 << 20  # of copies of a weight that take turns, so that each is read from memory
SHAPES = {  # inputs, outputs
    "SmolLM2-135M up (gate and up)": (576, 3072),
    "SmolLM2-135M down": (1536, 576),
    "Qwen2.5-1.5B up (gate and up)": (1536, 17920),
    "Qwen2.5-1.5B down": (8960, 1536),
    "4096 x 4096": (4096, 4096),
}


def quality(engine: Engine, teals: dict[str, Teal], windows: Windows) -> list[Any]:
    """Loss by allocation and level."""
    decoder = engine.decoder
    dense = _on_cpu(measure_quality(decoder, windows.texts, windows.prompt_len, None))
    rows = [{"allocation": None, "level": 0.0, **compare(dense, dense)}]
    for name, teal in teals.items():
        for level in teal.levels:
            note(f"  {name} {level:g}")
            sparse = TealDecoder(decoder, teal.at(level).thresholds, dense_tokens=windows.prompt_len - 1)
            found = _on_cpu(measure_quality(sparse, windows.texts, windows.prompt_len, None))
            rows.append({"allocation": name, "level": level, **compare(found, dense)})
    for row in rows:
        del row["density"], row["density_by_layer"]
    return rows


def _on_cpu(found: Quality) -> Quality:
    return replace(found, losses=found.losses.cpu(), choices=found.choices.cpu())


def drafts(engine: Engine, prompts: Sequence[list[int]], levels: Sequence[TealLevel | None], tokens: int) -> list[Any]:
    """Acceptance by policy and level, tokens that differ from plain decoding's, and the calling thread's CPU time,
    prompts included; arms take turns prompt by prompt."""
    assert engine.heads is not None and engine.heads.calibration is not None
    deepest = max(engine.heads.exits)
    policies: dict[str, DraftPolicy] = {
        "calibrated": calibrated(engine.heads.calibration),
        f"exit {deepest}, 4 tokens": fixed_exit(deepest, 4),
    }
    options: dict[str, Any] = {"max_new_tokens": tokens, "ignore_eos": True}
    arms: list[tuple[str, TealLevel | None, dict[str, Any]]] = [("plain", None, {"speculation": False})]
    arms += [(name, level, {"policy": policy}) for name, policy in policies.items() for level in levels]
    outs: dict[int, list[Generation]] = {}
    seconds: dict[int, float] = {}
    for number, prompt in enumerate(prompts):
        note(f"  prompt {number + 1} of {len(prompts)}")
        for arm, (_, level, how) in enumerate(arms):
            engine.drop_inputs(draft=level)
            start = time.thread_time()
            outs.setdefault(arm, []).append(engine.generate(prompt, **how, **options))
            seconds[arm] = seconds.get(arm, 0.0) + time.thread_time() - start
    engine.drop_inputs()
    rows = []
    for arm, (name, level, _) in enumerate(arms):
        drafted, accepted, verified, committed, layers = (
            sum(getattr(out.stats, f"num_{what}") for out in outs[arm])
            for what in ("drafted", "accepted", "verifications", "committed", "row_layers")
        )
        pairs = [(out.token_ids, own.token_ids) for out, own in zip(outs[arm], outs[0], strict=True)]
        rows.append(
            {
                "policy": name,
                "draft": "dense" if level is None else level.name,
                "num_drafted": drafted,
                "num_accepted": accepted,
                "acceptance_rate": accepted / drafted if drafted else None,
                "tokens_per_verification": committed / verified,
                "row_layers_per_token": layers / committed,
                "num_tokens": committed,
                "differing_tokens": sum(a != b for ids, own in pairs for a, b in zip(ids, own, strict=True)),
                "cpu_ms_per_token": round(1e3 * seconds[arm] / committed, 2),
            }
        )
    return rows


def quartile_us(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """First quartile of each run's CPU time in us, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.thread_time()
            run()
            times[name].append(time.thread_time() - start)
    return {name: round(1e6 * sorted(own)[len(own) // 4], 1) for name, own in times.items()}


def _next(weights: Iterator[Any], use: Callable[..., Any]) -> Callable[[], Any]:
    return lambda: use(next(weights))


def products(levels: Sequence[float], dtype: torch.dtype, repeats: int) -> list[Any]:
    """One row through one projection: packed and dense, and by kept channels, in us."""
    rows = []
    for name, (inputs, outputs) in SHAPES.items():
        copies = max(2, -(-COLD_BYTES // (inputs * outputs * dtype.itemsize)))
        weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(min(copies, 32))]
        packed, by_channel = [PackedLinear(w) for w in weights], [w.T.contiguous() for w in weights]
        x = torch.randn(1, inputs).to(dtype)
        # All runs take from one ring, or one would find in the caches what the one before it has read.
        of_packed, of_channels = itertools.cycle(packed), itertools.cycle(by_channel)
        runs: dict[str, Callable[[], Any]] = {"dense": _next(of_packed, lambda weight, x=x: weight(x))}
        for level in levels:
            limit = x.float().abs().quantile(level) if level else torch.tensor(-1.0)
            runs[f"{level:g}"] = _next(
                of_channels, lambda weight, x=x, limit=limit: channel_linear(x, weight, x.float().abs() > limit)
            )
        us = quartile_us(runs, repeats)
        rows.append({"shape": name, "inputs": inputs, "outputs": outputs, "us": us})
    return rows


def decoding(engine: Engine, prompt: list[int], levels: Sequence[TealLevel | None], repeats: int) -> dict[str, float]:
    """Plain decoding, ms of CPU time a token (its first quartile over runs of 24 tokens)."""
    times: dict[str, list[float]] = {}
    for _ in range(repeats):
        for level in levels:
            engine.drop_inputs(verify=level)
            times.setdefault(engine.verify, []).append(decode_ms(engine, prompt, 24))
    engine.drop_inputs()
    return {name: round(sorted(own)[len(own) // 4], 2) for name, own in times.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m skipstone.bench.teal", description=__doc__.splitlines()[0])
    parser.add_argument("--teal", type=Path, required=True, help="a folder of calibrate --sparsity teal")
    parser.add_argument("--text", type=Path, required=True, help="plain text, wikitext-2 for one")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--prompt-len", type=int, default=256)
    parser.add_argument("--length", type=int, default=384, help="of a window: prompt and continuation")
    parser.add_argument("--prompts", type=Path, help="questions, JSON lines; the built-in set by default")
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--draft-levels", type=float, nargs="*", default=[0.25, 0.4, 0.5])
    parser.add_argument("--repeats", type=int, default=40, help="of a product; a tenth of it of decoding")
    parser.add_argument("--device", default="cpu", help="of the quality; drafts and times are of the CPU")
    options = parser.parse_args(arguments)
    if options.device != "cpu" and options.parts != ["quality"]:
        parser.error(f"--device {options.device} measures quality alone: give --parts quality")
    if not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: there is no folder {options.out.parent}")
    start = time.perf_counter()
    needs_heads = "drafts" in options.parts
    engine = load(options.model, heads="adapter" if needs_heads else None, device=options.device, progress=False)
    greedy, text, tokenizer = Teal.load(options.teal), options.text.read_text(encoding="utf-8"), engine.tokenizer
    if tokenizer is None:
        parser.error(f"--model {options.model} has no tokenizer")
    ids, start_ids = tokenizer.encode(text, add_special_tokens=False), tokenizer.encode("")
    front, back = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    device = engine.decoder.device
    windows = Windows(cut(back, options.length, options.windows, start_ids).to(device), options.prompt_len)
    texts = cut(front, 256, 32, start_ids).to(device)
    uniform = calibrate_teal(engine.decoder, texts, levels=greedy.levels, allocation="uniform")
    asked = built_in() if options.prompts is None else read_questions(options.prompts)
    chosen = choose(asked, limit=options.questions)
    prompts = [tokenizer.encode_chat([{"role": "user", "content": question.turns[0]}]) for question in chosen]
    levels = [None, *(greedy.at(level) for level in options.draft_levels)]
    document: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "skipstone.bench.teal", *_shown_arguments(arguments)]),
        "model": options.model,
        "dtype": str(engine.decoder.dtype).removeprefix("torch."),
        "device": describe_device(device),
        "versions": versions(),
        "text": {"name": options.text.name, "sha256": hashlib.sha256(text.encode()).hexdigest(), "tokens": len(ids)},
        "windows": len(windows.texts),
        "prompt_len": options.prompt_len,
        "scored_tokens": len(windows.texts) * (options.length - options.prompt_len),
        "questions": len(prompts),
    }
    if "quality" in options.parts:
        note("quality")
        document["quality"] = quality(engine, {"greedy": greedy, "uniform": uniform}, windows)
    torch.set_num_threads(1)
    if "drafts" in options.parts:
        note("drafts")
        document["drafts"] = drafts(engine, prompts, levels, options.max_new_tokens)
    if "times" in options.parts:
        note("times")
        with torch.inference_mode():
            document["product_us"] = products([0.0, *greedy.levels], engine.decoder.dtype, options.repeats)
        document["decode_ms_per_token"] = decoding(engine, prompts[0], levels, max(1, options.repeats // 10))
    document["wall_s"] = round(time.perf_counter() - start, 1)
    options.out.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    note(f"wrote {options.out}")


if __name__ == "__main__":
    main()
