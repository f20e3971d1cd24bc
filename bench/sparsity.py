"""What skipping neurons costs and why it can work, on real text: one JSON document.

    python -m skipstone.bench.sparsity --text wikitext2_valid.txt --out tda.json

The text's first half calibrates; windows of the second half are measured: a prompt, read densely, and its continuation,
whose loss counts. Every way of choosing neurons is measured on the same windows, so differences are paired; intervals
are bootstraps over windows.

Claims behind masks from prompts (arXiv 2408.11393):
- uncertainty: which neurons matter changes with the text. The loss under a fixed pruning, under another text's mask,
  under the prompt's, and under the continuation's own (which no decoder can know), at the same count in each layer.
- inertia: the prompt's mask stays valid. Overlap of a continuation's strongest neurons with those of its own prompt, of
  that prompt with its tokens shuffled, and of other prompts; of single tokens' with their neighbours' and with those of
  the same token elsewhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.engine import Engine
from ..engine.load import load
from ..engine.model import Decoder
from ..engine.sparsity.neurons import down_norms
from ..engine.sparsity.quality import Quality, measure_quality
from ..engine.sparsity.selection import Count, Fixed, Griffin, Layers, MaskOptions, Selection, sum_of_squares
from ..engine.sparsity.target import SparseTarget
from ..engine.sparsity.tda import Budget, CettCurves, Tda, calibrate_tda, cut, measure_curves
from .environment import describe_device, versions

BOOTSTRAPS = 2000
TOKEN_SHARE = 0.25  # of a layer's neurons that count as a single token's active set
TEXT_SHARE = 0.5  # likewise of a text's
BLOCK = 32  # tokens of a continuation whose overlap is reported by distance
PAIRS = 2000


@dataclass(frozen=True)
class Windows:
    """Texts `[B, T]` and how many of their tokens are prompt."""

    texts: Tensor
    prompt_len: int


@dataclass(frozen=True, eq=False)
class Strongest:
    """TDA's strengths with a fixed count instead of a threshold: separates scores from allocation."""

    density: float
    options: MaskOptions = MaskOptions()
    name: str = "tda_top_k"
    num_layers: int | None = None

    weigh = staticmethod(sum_of_squares)

    def rank(self, layers: Layers, weights: Tensor, num_tokens: int, norms: Tensor) -> tuple[Tensor, Count]:
        return (weights / num_tokens).sqrt() * norms, round(self.density * weights.shape[-1])


def compare(found: Quality, dense: Quality) -> dict[str, Any]:
    """Perplexity and agreement against the whole model, with an interval of the increase."""
    by_window = (found.losses - dense.losses).double().mean(1).cpu()
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(by_window), (BOOTSTRAPS, len(by_window)), generator=generator)
    low, high = by_window[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).exp().sub(1)
    return {
        "density": sum(found.density) / len(found.density),
        "density_by_layer": [round(share, 4) for share in found.density],
        "perplexity": found.perplexity,
        "perplexity_increase": found.perplexity / dense.perplexity - 1,
        "perplexity_increase_95": [float(low), float(high)],
        "greedy_agreement": found.agreement(dense),
    }


def baselines(decoder: Decoder, tda: Tda, found: Quality, curves: CettCurves) -> dict[str, Selection]:
    """Other ways to choose as many neurons as TDA kept: its mean share in all layers, or its own in each."""
    first, by_layer = tda.options.first_dense, found.density
    own, fixed = tda.options, curves.fixed_strengths()
    # Counts are rounded up to whole steps; half a step less than the mean of rounded counts rounds to it on average.
    half = own.round_to / 2 / decoder.config.intermediate_size
    uniform = max(half, sum(by_layer[first:]) / max(1, len(by_layer) - first) - half)
    layers = [max(half, share - half) if share < 1 else 1.0 for share in by_layer]
    return {
        "griffin, uniform": Griffin(uniform, own),
        "griffin, by layer": Griffin(layers, own),
        "fixed, uniform": Fixed(fixed, uniform, own),
        "fixed, by layer": Fixed(fixed, layers, own),
        "tda strengths, uniform": Strongest(uniform, own),
    }


def against_baselines(decoder: Decoder, windows: Windows, tda: Tda, curves: CettCurves, dense: Quality) -> list[Any]:
    """TDA, and the baselines at its density."""
    found = measure_quality(decoder, windows.texts, windows.prompt_len, tda)
    rows = [{"arm": "tda", "cett": tda.cett, "target_density": tda.density, **compare(found, dense)}]
    for name, selection in baselines(decoder, tda, found, curves).items():
        note(f"  {name}")
        quality = measure_quality(decoder, windows.texts, windows.prompt_len, selection)
        rows.append({"arm": name, **compare(quality, dense)})
    return rows


class Observed:
    """An `mlp` of `Decoder.encode`: neurons' output norms of every token, `[B, T, F]` a layer, in half precision."""

    def __init__(self, decoder: Decoder, num_texts: int) -> None:
        self.norms: list[Tensor] = []
        self._decoder, self._num_texts, self._down = decoder, num_texts, down_norms(decoder)

    def __call__(self, layer: int, normed: Tensor) -> Tensor:
        own = self._decoder.layers[layer]
        neurons = self._decoder.neurons(own.up, normed)
        norms = neurons.abs() * self._down[layer]
        self.norms.append(norms.view(self._num_texts, -1, norms.shape[-1]).bfloat16())
        return self._decoder.from_neurons(own.down, neurons)


@torch.inference_mode()
def observe(decoder: Decoder, texts: Tensor) -> list[Tensor]:
    """Neurons' output norms by layer, `[B, T, F]`."""
    found = Observed(decoder, len(texts))
    decoder.encode(texts, [decoder.config.num_layers], found)
    return found.norms


def strongest(norms: Tensor, share: float) -> Tensor:
    """The strongest neurons of `[..., F]`, as a mask."""
    count = round(share * norms.shape[-1])
    kept = torch.zeros(norms.shape, dtype=torch.bool, device=norms.device)
    return kept.scatter_(-1, norms.float().topk(count).indices, True)


def overlap(one: Tensor, other: Tensor) -> float:
    """Mean share of a mask's neurons that are in the other's; both have the same count."""
    return float(((one & other).sum(-1) / one.sum(-1)).double().mean())


def inertia(decoder: Decoder, windows: Windows) -> dict[str, Any]:
    """Overlaps of masks, mean over layers; two random masks overlap by the share that they keep."""
    texts, prompt_len = windows.texts, windows.prompt_len
    generator = torch.Generator().manual_seed(0)
    mixed = texts.clone()
    mixed[:, :prompt_len] = texts[:, torch.randperm(prompt_len, generator=generator)]
    norms, shuffled = observe(decoder, texts), observe(decoder, mixed)
    by_text: dict[str, list[float]] = {}
    by_token: dict[str, list[float]] = {}
    distances: dict[int, list[float]] = {}
    pairs = token_pairs(texts, generator)
    for own, other in zip(norms, shuffled, strict=True):
        prompt, after = (_text_mask(part) for part in (own[:, :prompt_len], own[:, prompt_len:]))
        _add(by_text, "own prompt", overlap(prompt, after))
        _add(by_text, "own prompt, tokens shuffled", overlap(_text_mask(other[:, :prompt_len]), after))
        _add(by_text, "another text's prompt", overlap(prompt.roll(1, 0), after))
        for first in range(prompt_len, texts.shape[1] - BLOCK + 1, BLOCK):
            block = _text_mask(own[:, first : first + BLOCK])
            distances.setdefault(first - prompt_len, []).append(overlap(prompt, block))
        active = strongest(own, TOKEN_SHARE)
        for name, (one, two) in pairs.items():
            _add(by_token, name, overlap(active[one[:, 0], one[:, 1]], active[two[:, 0], two[:, 1]]))
    return {
        "texts": {"share_kept": TEXT_SHARE, "overlap": _means(by_text), "overlap_by_layer": _rounded(by_text)},
        "by_distance": [
            {"tokens_after_prompt": at, "overlap": sum(values) / len(values)} for at, values in distances.items()
        ],
        "tokens": {"share_kept": TOKEN_SHARE, "overlap": _means(by_token), "overlap_by_layer": _rounded(by_token)},
    }


def token_pairs(texts: Tensor, generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    """Places (text, position) of pairs of tokens, `[n, 2]` each, on the CPU."""
    texts = texts.cpu()
    count, length = texts.shape

    def draw(most: int) -> Tensor:
        return torch.randint(most, (20 * PAIRS,), generator=generator)

    text, at, near = draw(count), draw(length), 1 + draw(8)
    second, elsewhere = draw(count), draw(length)
    place, ids = torch.stack([text, at], 1), texts[text, at]
    after = torch.stack([text, (at + near).clamp_max(length - 1)], 1)
    far = torch.stack([second, elsewhere], 1)
    is_near = (at + near < length) & (texts[after[:, 0], after[:, 1]] != ids)
    apart = text != second
    same = apart & (texts[second, elsewhere] == ids)
    return {
        "another token, at most 8 places on": (place[is_near][:PAIRS], after[is_near][:PAIRS]),
        "the same token in another text": (place[same][:PAIRS], far[same][:PAIRS]),
        "another token in another text": (place[apart & ~same][:PAIRS], far[apart & ~same][:PAIRS]),
    }


def uncertainty(decoder: Decoder, windows: Windows, tda: Tda, curves: CettCurves, dense: Quality) -> list[Any]:
    """The loss under masks of the same count in every text and layer, from different sources."""
    own = measure_quality(decoder, windows.texts, windows.prompt_len, tda)
    fixed = curves.fixed_strengths()
    norms = observe(decoder, windows.texts)
    counts = {layer: kept.sum(-1) for layer, kept in own.kept.items()}

    def top(strengths: Tensor, count: Tensor) -> Tensor:
        rank = strengths.argsort(-1, descending=True).argsort(-1)
        return rank < count.unsqueeze(-1)

    def continuation(layer: int, kept: Tensor) -> Tensor:
        after = norms[layer][:, windows.prompt_len - 1 :].float().square().mean(1)
        return top(after, counts[layer])

    def another(layer: int, kept: Tensor) -> Tensor:
        before = norms[layer][:, : windows.prompt_len - 1].float().square().mean(1).roll(1, 0)
        return top(before, counts[layer])

    swaps = {
        "another text's prompt": another,
        "fixed": lambda layer, kept: top(fixed[layer].expand(kept.shape), counts[layer]),
        "the continuation itself": continuation,
    }
    rows = [{"mask": "own prompt", **compare(own, dense)}]
    for name, swap in swaps.items():
        note(f"  mask of {name}")
        quality = measure_quality(decoder, windows.texts, windows.prompt_len, tda, swap)
        rows.append({"mask": name, **compare(quality, dense)})
    for row in rows:
        del row["density_by_layer"]
    return rows


def speed(engine: Engine, windows: Windows, targets: dict[str, Selection | None], repeats: int) -> list[Any]:
    """Plain decoding, ms a token: best and median of runs that take turns. Rough on a shared machine."""
    sparse = {n: None if s is None else SparseTarget(engine.decoder, s) for n, s in targets.items()}
    prompts = [text[: windows.prompt_len].tolist() for text in windows.texts]
    times: dict[str, list[float]] = {name: [] for name in targets}
    prefill: dict[str, list[float]] = {name: [] for name in targets}
    for repeat in range(repeats + 1):
        for name, target in sparse.items():
            engine.sparse = target
            prompt = prompts[repeat % len(prompts)]
            out = engine.generate(prompt, speculation=False, max_new_tokens=32, ignore_eos=True)
            times[name].append(out.stats.decode_ms / len(out.token_ids))
            prefill[name].append(out.stats.prefill_ms)
    engine.sparse = None
    return [
        {
            "target": name,
            "ms_per_token_best": min(own[1:]),
            "ms_per_token_median": sorted(own[1:])[repeats // 2],
            "prefill_ms_first": prefill[name][0],
            "prefill_ms_best": min(prefill[name][1:]),
        }
        for name, own in times.items()
    ]


def decode_ms(engine: Engine, prompt: list[int], num_tokens: int) -> float:
    """Plain decoding, ms a token, the prompt left out: on a CPU of the calling thread's CPU time, else by the clock."""
    clock = time.thread_time if engine.decoder.device.type == "cpu" else time.perf_counter
    with engine.stream(prompt, speculation=False, max_new_tokens=num_tokens + 1, ignore_eos=True) as stream:
        next(stream)
        start = clock()
        count = sum(1 for _ in stream)
        return 1e3 * (clock() - start) / count


def _text_mask(norms: Tensor) -> Tensor:
    return strongest(norms.float().square().mean(1), TEXT_SHARE)


def _add(to: dict[str, list[float]], name: str, value: float) -> None:
    to.setdefault(name, []).append(value)


def _means(values: dict[str, list[float]]) -> dict[str, float]:
    return {name: sum(own) / len(own) for name, own in values.items()}


def _rounded(values: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [round(value, 4) for value in own] for name, own in values.items()}


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m skipstone.bench.sparsity", description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="plain text, wikitext-2 for one")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--prompt-len", type=int, default=256)
    parser.add_argument("--length", type=int, default=384, help="of a window: prompt and continuation")
    parser.add_argument("--calibration-texts", type=int, default=8, help="of 256 tokens")
    parser.add_argument("--cett", type=float, default=0.2)
    parser.add_argument("--densities", type=float, nargs="*", default=[0.9, 0.75, 0.5])
    parser.add_argument("--budget", type=float, default=0.03, help="relative increase of perplexity; 0: none")
    parser.add_argument("--speed-repeats", type=int, default=5, help="0: no speed")
    options = parser.parse_args(arguments)
    if not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: there is no folder {options.out.parent}")
    start = time.perf_counter()
    engine = load(options.model, heads=None, dtype=getattr(torch, options.dtype), device="cpu", progress=False)
    decoder, text = engine.decoder, options.text.read_text(encoding="utf-8")
    if engine.tokenizer is None:
        parser.error(f"--model {options.model} has no tokenizer")
    ids, start_ids = engine.tokenizer.encode(text, add_special_tokens=False), engine.tokenizer.encode("")
    front, back = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    windows = Windows(cut(back, options.length, options.windows, start_ids), options.prompt_len)
    calibration = cut(front, 256, options.calibration_texts, start_ids)
    budget_texts = cut(front[128:], 256, options.calibration_texts, start_ids)
    note("calibrating")
    curves = measure_curves(decoder, calibration)
    dense = measure_quality(decoder, windows.texts, windows.prompt_len, None)
    document: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "skipstone.bench.sparsity", *_shown_arguments(arguments)]),
        "model": options.model,
        "dtype": options.dtype,
        "device": describe_device(decoder.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "text": {"name": options.text.name, "sha256": hashlib.sha256(text.encode()).hexdigest(), "tokens": len(ids)},
        "calibration_tokens": calibration.numel(),
        "windows": len(windows.texts),
        "prompt_len": options.prompt_len,
        "scored_tokens": dense.losses.numel(),
        "dense_perplexity": dense.perplexity,
        "settings": {},
        "budgets": {},
    }
    targets: dict[str, Tda] = {f"cett {options.cett}": Tda(curves.thresholds(options.cett), options.cett)}
    for share in options.densities:
        targets[f"density {share}"] = Tda(curves.thresholds_for_density(share), density=share)
    for allocation in ("cett", "density") if options.budget else ():
        note(f"budget of {options.budget:.0%} by {allocation}")
        found = calibrate_tda(
            decoder, calibration, budget=Budget(options.budget), budget_texts=budget_texts, allocation=allocation,
            on_step=note,
        )  # fmt: skip
        targets[f"budget {options.budget} by {allocation}"] = replace(found, calibration={})
        document["budgets"][allocation] = found.calibration
    for name, tda in targets.items():
        note(f"{name}: against the baselines")
        document["settings"][name] = against_baselines(decoder, windows, tda, curves, dense)
    note("uncertainty")
    middle = targets[f"density {options.densities[len(options.densities) // 2]}"] if options.densities else None
    probed = middle or targets[f"cett {options.cett}"]
    document["uncertainty"] = {
        "cett": probed.cett,
        "target_density": probed.density,
        "masks": uncertainty(decoder, windows, probed, curves, dense),
    }
    note("inertia")
    document["inertia"] = inertia(decoder, windows)
    if options.speed_repeats:
        note("speed")
        timed: dict[str, Selection | None] = {"dense": None, **targets}
        document["speed_rough"] = speed(engine, windows, timed, options.speed_repeats)
    document["seconds"] = round(time.perf_counter() - start)
    if not math.isfinite(dense.perplexity):
        raise ValueError(f"the whole model's perplexity is {dense.perplexity}: nothing here means anything")
    options.out.write_text(json.dumps(document, allow_nan=False, indent=1) + "\n", encoding="utf-8")
    note(f"wrote {options.out.name}")


def _shown_arguments(arguments: Sequence[str] | None) -> list[str]:
    """The command line without this machine's folders."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return [Path(one).name if "/" in one else one for one in given]


if __name__ == "__main__":
    main()
