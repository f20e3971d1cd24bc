"""What a GPU user would run instead, on the same weights: transformers' generate, and a compiled loop in a CUDA graph.

    python -m skipstone.bench.gpu_baselines --out baselines.json
    python -m skipstone.bench.gpu_baselines --models smollm2-135m --weights smollm2-135m=smollm2-135m.gguf

One JSON row per model and arm, batch 1, greedy, decode only: from the first new token to the last.

| arm | what it is |
|---|---|
| `floor` | bytes of the weights over the bandwidth measured here |
| `hf-eager` | `transformers` generate |
| `compile` | one token's forward over a static cache through torch.compile, captured in one CUDA graph (gpt-fast's scheme, less its work on the host) |
| `compile-host` | the same through `mode="reduce-overhead"`, called from Python, as gpt-fast does |
| `step` | our own step up to the draw with 1 and 16 live rows, at each of `--contexts`; the table of docs/kernels.md |
| `step-unshared` | the same where attention reads its keys for each row, and whether all bits are those of `step` and of each row alone |
| `tda` | the same step over the weights of neurons on a random list of its own in each layer (`verify="tda"`), at each of `--shares`; 1.0 beside `step` is what the lists cost |
| `teal` | the same step of one row that drops small inputs (`verify="teal"`), at each of `--levels`; 0 beside `step` is what it costs. Thresholds are set so that each projection drops that share of this row's inputs; `dropped_share` is what was dropped of the layers' weights |
| `prefill` | a prompt of 64, 256, 1024 and 4096 tokens read by torch's attention and by the fused kernels (wall time, us a prompt); with `-tda` behind it neurons are watched and a mask that keeps 3/4 of them is made |
| `cublas-1`, `cublas-16` | only the matrix products of a step, with 1 and 16 rows, in one CUDA graph: what a dedicated one-row step cannot beat through cuBLAS |

Weights are random of the exact shapes unless given; a row's `weights` says which.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.cache import KVCache, plan_cache
from ..engine.config import ModelConfig
from ..engine.forward import prefill
from ..engine.fused import FusedStep, FusedWeights
from ..engine.model import Decoder
from ..engine.pretrained import load_pretrained
from ..engine.prompt_reader import PromptReader
from ..engine.sparsity.target import SparseTarget
from ..engine.sparsity.teal_step import ChannelWeights, TealStep
from ..engine.sparsity.thresholded import projections
from ..engine.workspace import reach_of
from ..kernels.kept import KeptNeurons
from ..kernels.kept_list import list_kept
from .baselines import as_transformers
from .compiled import CompiledLoop, StaticDecoder, check
from .device_time import Spread, bandwidth, capture, clock_mhz, replay_us
from .environment import describe_device, versions
from .profile import rows_that_differ, step_us
from .shapes import SHAPES, random_weights, shape_config, weight_bytes
from .sparsity import Strongest
from .targets import own_downs

ARMS = (
    "floor", "hf-eager", "compile", "compile-host", "step", "step-unshared", "tda", "teal", "prefill",
    "cublas-1", "cublas-16",
)  # fmt: skip
DEFAULT_ARMS = ("floor", "hf-eager", "compile", "cublas-1", "cublas-16")
SHARES = (1.0, 0.9, 0.75, 0.5, 0.25)  # of each layer's neurons that are kept
LEVELS = (0.0, 0.25, 0.4, 0.5, 0.65)  # of each projection's inputs that are dropped
PROMPT_LENGTHS = (64, 256, 1024, 4096)


class _FirstToken:
    """A stopping criterion that stops nothing and notes, with the device idle, when the first token stood."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if not self.at:
            _synchronise(input_ids.device)
            self.at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def hf_token_us(model: Any, prompt: Tensor, num_new: int) -> tuple[float, list[int]]:
    """Wall time a token of transformers' greedy generate, from the first to the last, and the tokens."""
    from transformers import StoppingCriteriaList

    clock = _FirstToken()
    ids = prompt.unsqueeze(0)
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            stopping_criteria=StoppingCriteriaList([clock]),
            max_new_tokens=num_new,
            do_sample=False,
        )
    _synchronise(prompt.device)
    elapsed = time.perf_counter() - clock.at
    new = out[0, len(prompt) :].tolist()
    if len(new) != num_new:
        raise RuntimeError(f"generate stopped after {len(new)} of {num_new} tokens; its stop ids should be off")
    return 1e6 * elapsed / (num_new - 1), new


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def products(weights: Mapping[str, Tensor], config: ModelConfig, rows: int) -> Callable[[], None]:
    """All matrix products of a decode step, in its order, on random activations of `rows` rows."""
    layer = [f"layers.{i}.{name}.weight" for i in range(config.num_layers) for name in ("qkv", "o", "up", "down")]
    used = [weights[name] for name in [*layer, "embed.weight" if config.tied_head else "lm_head.weight"]]
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1], dtype=w.dtype, device=w.device) for w in used}

    def step() -> None:
        for weight in used:
            F.linear(inputs[weight.shape[1]], weight)

    return step


def prompt_readers(decoder: Decoder, length: int) -> dict[str, Callable[[], float]]:
    """By way, what reads a prompt of `length` random tokens and returns its wall time in us; both have run before."""
    cache = KVCache(plan_cache(decoder.config, 1, length, decoder.device, decoder.dtype), decoder.device)
    ids = torch.randint(decoder.config.vocab_size, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    reader = PromptReader(FusedWeights(decoder), cache, reach_of)
    skipping = own_downs(decoder)
    watching = PromptReader(FusedWeights(skipping, by_neuron=True), cache, reach_of)
    target, config = SparseTarget(skipping, Strongest(0.75)), decoder.config
    kept = KeptNeurons(config.num_layers, 1, config.intermediate_size, decoder.device)

    def read_masks(fused: bool) -> None:
        watch = target.watch(0)
        if fused:
            watching.read(0, ids, squares=watch.weights)
            watch.num_rows = length
        else:
            prefill(skipping, cache, 0, ids, mlp=watch)
        kept.copy(0, target.finish(watch))

    ways = {
        "sdpa": lambda: prefill(decoder, cache, 0, ids), "fused": lambda: reader.read(0, ids),
        "sdpa-tda": lambda: read_masks(False), "fused-tda": lambda: read_masks(True),
    }  # fmt: skip

    def timed(read: Callable[[], None]) -> float:
        cache.restart(0)
        _synchronise(decoder.device)
        start = time.perf_counter()
        read()
        _synchronise(decoder.device)
        return 1e6 * (time.perf_counter() - start)

    found: dict[str, Callable[[], float]] = {way: partial(timed, read) for way, read in ways.items()}
    for warm_up in found.values():
        warm_up()
    return found


class AimedStep(TealStep):
    """A step of one row, row 0, whose thresholds are set on the way."""

    def __init__(self, weights: ChannelWeights, cache: KVCache, num_rows: int, *, pdl: bool = False) -> None:
        super().__init__(weights, cache, 1, pdl=pdl)
        self._aim: float | None = None
        self._dropped: list[tuple[float, int]] = []

    def aim(self, level: float) -> float:
        """Make every threshold drop that share of the inputs that it meets; the share of all weights dropped with
        them."""
        self._aim, self._dropped = level, []
        self.embed()
        self.run(0, self.weights.config.num_layers)
        self._aim = None
        return sum(share * size for share, size in self._dropped) / sum(size for _, size in self._dropped)

    def product(self, index: int, name: str, x: Tensor) -> None:
        if self._aim is not None:
            own = self.weights.channels[index][name]
            strengths = x[0].float().abs()
            count = round(self._aim * len(strengths))
            limit = float(strengths.kthvalue(count).values) if count else 0.0
            self.weights.thresholds[index, own.places] = limit
            self._limits[0, index, own.places] = limit
            self._dropped.append((float((strengths <= limit).float().mean()), own.weight.numel()))
            if name in self._lists:  # x was listed before its threshold was known
                list_kept(x[0], self._limits[0, index, own.places], self._lists[name].row(0))
        super().product(index, name, x)


@dataclass(frozen=True)
class Subject:
    """A model to measure: `source` is "random weights" or where they come from."""

    name: str
    source: str
    config: ModelConfig
    weights: Mapping[str, Tensor]


def load_subject(name: str, path: str | None, dtype: torch.dtype, device: torch.device) -> Subject:
    """Real weights if a path is given, else random ones.

    Raises:
        ValueError: the weights are of another shape than the name says.
    """
    config = shape_config(name)
    if path is None:
        return Subject(name, "random weights", config, random_weights(config, dtype, device))
    loaded = load_pretrained(path, dtype, progress=False)
    sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size", "tied_head")
    wrong = [size for size in sizes if getattr(loaded.config, size) != getattr(config, size)]
    if wrong:
        raise ValueError(f"{path} differs from {name} in {', '.join(wrong)}")
    return Subject(name, path, loaded.config, {k: w.to(device) for k, w in loaded.weights.items()})


@torch.no_grad()
def measure_model(
    subject: Subject,
    arms: tuple[str, ...],
    prompt_len: int,
    num_new: int,
    repeats: int,
    read: float,
    contexts: tuple[int, ...] = (64, 4096),
    shares: tuple[float, ...] = SHARES,
    levels: tuple[float, ...] = LEVELS,
) -> list[dict[str, Any]]:
    """Rows of one model; each is printed to stderr as it comes. `read` is the bandwidth in GB/s."""
    config, weights = subject.config, subject.weights
    device = weights["embed.weight"].device
    device_name = describe_device(device)["name"]
    prompt = torch.randint(config.vocab_size, (prompt_len,), generator=torch.Generator().manual_seed(1)).to(device)
    rows: list[dict[str, Any]] = []

    def add(arm: str, spread: Spread, start: float, **more: Any) -> None:
        row = {"model": subject.name, "arm": arm, "us_per_token": round(spread.p50, 2), **spread.to_json()}
        row |= {"device": device_name, "weights": subject.source, **more}
        if device.type == "cuda":
            row["clock_mhz"] = clock_mhz(device)
        row["seconds"] = round(time.perf_counter() - start, 1)
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)

    if "floor" in arms:
        num_bytes = weight_bytes(config)
        add("floor", Spread.of([num_bytes / read / 1e3]), time.perf_counter(), bytes=num_bytes, read_gb_s=read)
    needs_reference = {"hf-eager", "compile", "compile-host"} & set(arms)
    if needs_reference:
        start = time.perf_counter()
        with device:
            reference = as_transformers(config, weights, weights["embed.weight"].dtype, subject.name).eval()
        decoder = StaticDecoder(config, weights, -(-(prompt_len + num_new + 8) // 64) * 64)
        error = check(decoder, reference, prompt)
        _, tokens = hf_token_us(reference, prompt, num_new)  # also the warm-up
        if "hf-eager" in arms:
            add("hf-eager", Spread.of([hf_token_us(reference, prompt, num_new)[0] for _ in range(repeats)]), start)
        del reference
        for arm in ("compile", "compile-host"):
            if arm in arms:
                start = time.perf_counter()
                loop = CompiledLoop(decoder, prompt, num_new, in_graph=arm == "compile")
                spread = Spread.of([loop.token_us() for _ in range(repeats)])
                equal = sum(a == b for a, b in zip(loop.new.tolist(), tokens, strict=True))
                add(arm, spread, start, logits_error=round(error, 5), tokens_equal_to_hf=equal)
                del loop
                torch._dynamo.reset()
    if {"step", "step-unshared"} & set(arms):
        fused = FusedWeights(Decoder(config, weights, weights["embed.weight"].dtype, device))
        for context in contexts:
            for arm, step_of in (("step", FusedStep), ("step-unshared", partial(FusedStep, share=False))):
                if arm not in arms:
                    continue
                more = {} if arm == "step" else {"rows_that_differ": rows_that_differ(fused, context)}
                for live in (1, 16):
                    start = time.perf_counter()
                    spread = step_us(fused, context, live, step_of=step_of)
                    add(f"{arm}-{live}", spread, start, context=context, **more)
        del fused
    if "tda" in arms:
        fused = FusedWeights(Decoder(config, weights, weights["embed.weight"].dtype, device), by_neuron=True)
        for context in contexts:
            for live in (1, 16):
                for share in shares:
                    start = time.perf_counter()
                    spread = step_us(fused, context, live, share=share)
                    add(f"tda-{live}", spread, start, context=context, kept_share=share)
        del fused
    if "teal" in arms:
        nothing = torch.zeros(config.num_layers, len(projections(config)))
        channels = ChannelWeights(Decoder(config, weights, weights["embed.weight"].dtype, device), nothing)
        for context in contexts:
            for level in levels:
                start = time.perf_counter()
                dropped: list[float] = []

                def aim(step: AimedStep, level: float = level, dropped: list[float] = dropped) -> None:
                    dropped.append(round(step.aim(level), 4))

                spread = step_us(channels, context, 1, step_of=AimedStep, prepare=aim)
                add("teal-1", spread, start, context=context, level=level, dropped_share=dropped[0])
        del channels
    if "prefill" in arms:
        own = Decoder(config, weights, weights["embed.weight"].dtype, device)
        for length in PROMPT_LENGTHS:
            for way, read_us in prompt_readers(own, length).items():
                start = time.perf_counter()
                add(f"prefill-{way}", Spread.of([read_us() for _ in range(repeats)]), start, context=length)
        del own
    for arm, count in (("cublas-1", 1), ("cublas-16", 16)):
        if arm in arms:
            start = time.perf_counter()
            add(arm, replay_us(capture(products(weights, config, count)), repeats=repeats), start)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--arms", default=",".join(DEFAULT_ARMS), help=f"of {', '.join(ARMS)}")
    parser.add_argument("--weights", action="append", default=[], metavar="MODEL=PATH")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=256, help="new tokens")
    parser.add_argument("--contexts", default="64,4096", help="of step..., tda and teal: tokens before the rows")
    parser.add_argument("--shares", default=",".join(map(str, SHARES)), help="of the arm tda: kept shares of neurons")
    parser.add_argument("--levels", default=",".join(map(str, LEVELS)), help="of the arm teal: dropped shares")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    arms, paths = tuple(args.arms.split(",")), dict(pair.split("=", 1) for pair in args.weights)
    contexts = tuple(int(context) for context in args.contexts.split(","))
    shares = tuple(float(share) for share in args.shares.split(","))
    levels = tuple(float(level) for level in args.levels.split(","))
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise SystemExit(f"unknown arms {unknown}; expected some of {', '.join(ARMS)}")
    if not torch.cuda.is_available():
        raise SystemExit("these baselines are of a GPU, and torch sees none here")
    device = torch.device("cuda")
    found = bandwidth(device)
    document: dict[str, Any] = {
        "schema_version": 1,
        "what": f"us per token: batch 1, greedy, bf16, prompt {args.prompt}, {args.new} new tokens, first to last; "
        f"{args.repeats} repeats",
        "bandwidth_gb_s": found,
        "device": describe_device(device),
        "versions": versions(),
        "rows": [],
    }
    for name in args.models.split(","):
        subject = load_subject(name, paths.get(name), torch.bfloat16, device)
        document["rows"] += measure_model(
            subject, arms, args.prompt, args.new, args.repeats, found["best"], contexts, shares, levels
        )
        del subject
        torch.cuda.empty_cache()
        if args.out:
            args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))
    return int(any(row.get("rows_that_differ") for row in document["rows"]))


if __name__ == "__main__":
    sys.exit(main())
