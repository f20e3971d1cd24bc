"""Where a decode step's time goes: `skipstone bench --profile`.

On a GPU with the fused kernels: a table of the kernels of one round, the step with 1 and with 16 rows, what a round
takes on the device and from one round's end to the next, and all of it against the time that the weights' bytes need
at the bandwidth measured here. Elsewhere: torch's operations.

Kernels overlap where they are launched programmatically: the next one starts, prefetches and waits. So a kernel's time
here runs from the end of the one before, or from its own start if that is later; these times and the idle ones between
add up to the round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from ..engine.cache import KVCache, plan_cache
from ..engine.config import ModelConfig
from ..engine.device_draft import RecurrentDraft
from ..engine.engine import Engine
from ..engine.fused import FusedStep, FusedWeights
from ..engine.generation import Generation
from ..engine.graphs import Kind, Rounds, Start, has_dependent_launch
from ..engine.sampling import SamplingParams
from ..engine.sparsity.selection import ROUND_TO
from ..kernels.draw import pick
from .device_time import Spread, bandwidth, capture, events_us, replay_us
from .environment import describe_device, versions
from .kernel_ops import KERNELS, NUM_ROWS, Kernels, chain_rows, weight_shape
from .shapes import weight_bytes

NUM_TOKENS = 256
REPLAYS = 40  # rounds under the profiler
MOST_OPERATIONS = 25
# Which operations each kernel does; `_residual_kernel` is both ways back to the residual stream.
KERNEL_OPS = {
    "_qkv_kernel": ("qkv",),
    "_tree_attention_kernel": ("attention",),
    "_residual_kernel": ("o", "down"),
    "_up_kernel": ("up",),
    "_kept_down_kernel": (),  # how many bytes, its lists say
    "_post_norm_kernel": (),
    "_list_kernel": (),
    "_sparse_kernel": (),  # how many bytes, its lists say
    "_place_kernel": (),
    "_activate_kernel": (),
    "_residual_norm_kernel": (),
    "_lm_head_kernel": ("lm_head",),
}
LAYER_KERNELS = tuple(KERNEL_OPS)[:-1]


@dataclass(frozen=True)
class Span:
    """One kernel's (or copy's) run on the device, in us since some moment."""

    name: str
    start: float
    end: float


def profile(engine: Engine, context: int = 64) -> dict[str, Any]:
    """Profile plain decoding and, if the engine drafts on the device, drafting rounds.

    Args:
        engine: one sequence at a time is decoded.
        context: tokens of the prompt; up to `NUM_TOKENS` are written after it.

    Raises:
        ValueError: the model's context has no room for that.
    """
    config, device = engine.decoder.config, engine.decoder.device
    num_tokens = min(NUM_TOKENS, config.max_context - context)
    if context < 1 or num_tokens < 4 * NUM_ROWS:
        most = config.max_context - 4 * NUM_ROWS
        raise ValueError(f"a context of {context} was asked for, expected 1 to {most} for this model")
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(config.vocab_size, (context,), generator=generator).tolist()
    about = {
        "schema_version": 1, "model": engine.model_id, "dtype": str(engine.decoder.dtype).removeprefix("torch."),
        "context": context, "num_tokens": num_tokens, "device": describe_device(device), "versions": versions(),
    }  # fmt: skip
    if engine.fused is None:
        return about | {"operations": operations(engine, prompt, num_tokens)}
    speed = bandwidth(device)
    itemsize = engine.decoder.dtype.itemsize
    num_bytes = weight_bytes(config, itemsize)
    floor = num_bytes / speed["best"] / 1e3
    found: dict[str, Any] = {"bandwidth_gb_s": speed, "weight_bytes": num_bytes, "floor_us": round(floor, 2)}
    found["step_us"] = {str(live): step_us(engine.fused, context, live).to_json() for live in (1, NUM_ROWS)}
    found["rounds"] = {}
    kinds: dict[Kind, Any] = {"plain": False}
    if engine.policy.exits == (0,):
        kinds["draft"] = "always"
    for kind, speculation in kinds.items():
        rounds = _rounds(engine, prompt, num_tokens, kind, speculation)
        found["rounds"][kind] = round_times(engine, rounds, prompt, num_tokens, kind, speculation)
        count = _replays(kind, num_tokens)
        _begin(engine, rounds, prompt, num_tokens)
        spans = device_spans(partial(rounds.replay, kind), count)
        moved = kernel_bytes(config, itemsize, context + count // 2) if kind == "plain" else {}
        found["rounds"][kind] |= kernel_table(spans, count, moved, speed["best"])
    plain = found["rounds"]["plain"]
    layers = sum(row["us"] for row in plain["kernels"] if row["name"] in LAYER_KERNELS)
    found |= {"us_per_layer": round(layers / config.num_layers, 3), "roofline": round(floor / plain["device_us"], 4)}
    return about | found


def kernel_bytes(config: ModelConfig, itemsize: int, context: int) -> dict[str, int]:
    """Bytes that each kernel must move in a plain step: weights, and keys and values of the context."""
    moved = {}
    for kernel, ops in KERNEL_OPS.items():
        total = 0
        for op in ops:
            if op == "attention":
                seen = sum(min(context, window or context) for window in config.windows)
                total += 2 * seen * config.num_kv_heads * config.head_dim
            else:
                width, k = weight_shape(config, op)
                total += width * k * (1 if op == "lm_head" else config.num_layers)
        moved[kernel] = total * itemsize
    return moved


def kernel_table(spans: Iterable[Span], steps: int, moved: Mapping[str, int], gb_s: float) -> dict[str, Any]:
    """Time by kernel, of one step.

    Args:
        spans: of `steps` equal steps.
        moved: bytes a step by the kernel's name.
        gb_s: the bandwidth to compare with.

    Returns:
        `kernels`, longest first: name, launches, us, bytes, gb_s, share (of that bandwidth); `idle_us` between kernels,
        `profiled_us`, all of it.
    """
    ordered = sorted(spans, key=lambda span: (span.start, span.end))
    if not ordered:
        raise RuntimeError("the profiler saw no kernel; its driver library (CUPTI) may be missing here")
    total: dict[str, float] = {}
    launches: dict[str, int] = {}
    idle, done = 0.0, ordered[0].start
    for span in ordered:
        idle += max(0.0, span.start - done)
        total[span.name] = total.get(span.name, 0.0) + max(0.0, span.end - max(done, span.start))
        launches[span.name] = launches.get(span.name, 0) + 1
        done = max(done, span.end)
    rows = []
    for name, us in sorted(total.items(), key=lambda item: -item[1]):
        row: dict[str, Any] = {"name": name, "launches": round(launches[name] / steps, 2), "us": round(us / steps, 3)}
        if moved.get(name) and us:
            speed = moved[name] * steps / us / 1e3
            row |= {"bytes": moved[name], "gb_s": round(speed), "share": round(speed / gb_s, 3)}
        rows.append(row)
    return {
        "kernels": rows,
        "idle_us": round(idle / steps, 3),
        "profiled_us": round((done - ordered[0].start) / steps, 3),
    }


def step_us(
    weights: FusedWeights,
    context: int,
    live: int,
    *,
    num_rows: int = NUM_ROWS,
    step_of: Callable[..., FusedStep] = FusedStep,
    kernels: Kernels = KERNELS,
    share: float = 1.0,
    prepare: Callable[[Any], object] | None = None,
) -> Spread:
    """Device time of a step up to the draw, for a chain of so many live rows, over replays of one CUDA graph.

    Args:
        context: tokens before the chain.
        num_rows, step_of, kernels: the step to time, in place of the engine's.
        share: of each layer's neurons that the rows use, where weights are stored by neuron; random ones.
        prepare: told the step, its rows laid, before it is captured.
    """
    config, device, dtype = weights.config, weights.decoder.device, weights.decoder.dtype
    step = _chain_step(weights, random_cache(weights, context + num_rows), num_rows, step_of)
    if share != 1.0:
        keep_some(step, share)
    step.rows.live.copy_((torch.arange(num_rows) < live).int())
    head = weights.head
    value = torch.zeros(num_rows, kernels.lm_head.num_tiles(config.vocab_size, dtype), device=device)
    best = torch.zeros_like(value, dtype=torch.int32)
    options, seeds = torch.zeros(8, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    targets = torch.zeros_like(step.ids)

    def body() -> None:
        step.embed()
        step.run(0, config.num_layers)
        kernels.lm_head.lm_head(
            step.x, step.stats, head.weight, head.bias, head.shift, step.rows, eps=config.norm_eps,
            softcap=config.logit_softcap, options=options, seeds=seeds, best_value=value, best_id=best, pdl=step.pdl,
        )  # fmt: skip
        pick(value, best, step.rows, targets, pdl=step.pdl)

    with torch.inference_mode():
        if prepare is not None:
            prepare(step)
        return replay_us(capture(body))


def random_cache(weights: FusedWeights, length: int) -> KVCache:
    """A cache of one sequence, full of noise."""
    device = weights.decoder.device
    cache = KVCache(plan_cache(weights.config, 1, length, device, weights.decoder.dtype), device)
    cache.k.normal_()
    cache.v.normal_()
    return cache


def _chain_step(
    weights: FusedWeights, cache: KVCache, num_rows: int, step_of: Callable[..., FusedStep] = FusedStep
) -> FusedStep:
    """A step over the last tokens that a cache holds, all rows live."""
    step = step_of(weights, cache, num_rows, pdl=has_dependent_launch(cache.device))
    wanted = chain_rows(cache.plan.context, cache.device, num_rows)
    for name, tensor in vars(step.rows).items():
        tensor.copy_(getattr(wanted, name))
    return step


@torch.inference_mode()
def rows_that_differ(weights: FusedWeights, context: int) -> int:
    """Rows of a step whose residual stream has other bits where attention shares keys than where it does not, or than
    that of the row alone; for a chain of 16 after `context` tokens, 0 is right."""
    cache = random_cache(weights, context + NUM_ROWS)
    ids = torch.arange(NUM_ROWS, device=cache.device) * 7 % weights.config.vocab_size
    each = torch.arange(NUM_ROWS, device=cache.device)

    def run(live: Tensor, share: bool) -> Tensor:
        step = _chain_step(weights, cache, NUM_ROWS, partial(FusedStep, share=share))
        step.rows.live.copy_(live)
        step.ids.copy_(ids)
        step.embed()
        return step.run(0, weights.config.num_layers).clone()

    shared = run(each >= 0, True)
    alone = torch.stack([run(each == r, True)[r] for r in range(NUM_ROWS)])
    different = (shared != run(each >= 0, False)) | (shared != alone)
    return int(different.any(1).sum())


def keep_some(step: FusedStep, share: float) -> None:
    """Give the first tile of rows random neurons of every layer, rounded as masks are."""
    if step.kept is None or not 0 < share <= 1:
        raise ValueError(f"share is {share}, expected a number above 0 and at most 1, and weights stored by neuron")
    config = step.weights.config
    size = min(config.intermediate_size, -(-round(share * config.intermediate_size) // ROUND_TO) * ROUND_TO)
    generator = torch.Generator().manual_seed(0)
    found = {}
    for layer in range(config.num_layers):
        order = torch.randperm(config.intermediate_size, generator=generator)
        found[layer] = order[:size].sort().values.to(step.cache.device)
    step.kept.keep(0, found)


def round_times(
    engine: Engine, rounds: Rounds, prompt: Sequence[int], num_tokens: int, kind: Kind, speculation: Any
) -> dict[str, float]:
    """A round on the device, replayed back to back, against the time from one round's end to the next in `generate`;
    both over the same contexts, since a step takes longer the more tokens stand before it.

    Returns:
        `device_us`, `round_us` (medians), `host_gap` (the share of `round_us` that is not `device_us`: the device
        waits for the host), `tokens_per_round`.
    """
    between, outs = [], []
    for _ in range(5):
        out = _generate(engine, prompt, num_tokens, speculation)
        between.append(1e3 * out.stats.decode_ms / out.stats.num_verifications)
        outs.append(out)
    alone = []
    # all rounds of a generation but the first and last; drafts are accepted a little otherwise here
    count = round((1.0 if kind == "plain" else 0.9) * outs[0].stats.num_verifications) - 2
    for _ in range(5):
        _begin(engine, rounds, prompt, num_tokens)
        rounds.replay(kind)
        alone.append(events_us(lambda: rounds.replay(kind), count))
        if not int(rounds.sequences.active[0]):
            raise RuntimeError("the sequence ended before its rounds did; ask for more new tokens")
        with torch.inference_mode():
            rounds.drop(0)
    device, wall = statistics.median(alone), statistics.median(between)
    return {
        "device_us": round(device, 2),
        "round_us": round(wall, 2),
        "host_gap": round(1.0 - device / wall, 4),
        "tokens_per_round": round(outs[0].stats.num_committed / outs[0].stats.num_verifications, 3),
    }


def _rounds(engine: Engine, prompt: Sequence[int], num_tokens: int, kind: Kind, speculation: Any) -> Rounds:
    """The captured rounds that `generate` uses for one sequence."""
    _generate(engine, prompt, num_tokens, speculation)
    return next(rounds for rounds in reversed(engine.workspace.rounds.values()) if kind in rounds._graphs)


def _generate(engine: Engine, prompt: Sequence[int], num_tokens: int, speculation: Any) -> Generation:
    out = engine.generate(  # no drafts from the text: its rounds are of another kind
        list(prompt), speculation=speculation, lookup=False, max_new_tokens=num_tokens, ignore_eos=True
    )
    assert isinstance(out, Generation)
    return out


def _begin(engine: Engine, rounds: Rounds, prompt: Sequence[int], num_tokens: int) -> None:
    """As after a prompt was read; what the cache holds of the last one does for timing."""
    with torch.inference_mode():
        rounds.begin([Start(0, list(prompt), len(prompt), len(prompt) + num_tokens, SamplingParams())])
        if isinstance(rounds.draft, RecurrentDraft):
            rounds.draft.start(engine.workspace.memories[0], {0: prompt})


def _replays(kind: Kind, num_tokens: int) -> int:
    """Rounds for the profiler, which surely fit the budget of tokens, two of them for warming up."""
    return min(REPLAYS, (num_tokens if kind == "plain" else num_tokens // NUM_ROWS) - 2)


def device_spans(body: Callable[[], object], count: int) -> list[Span]:
    """What the device does in `count` calls, after one that is not recorded."""
    body()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for _ in range(count):
            body()
        torch.cuda.synchronize()
    return [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in recorded.events()
        if event.device_type == DeviceType.CUDA
    ]


def operations(engine: Engine, prompt: Sequence[int], num_tokens: int) -> dict[str, Any]:
    """torch's operations in plain decoding, by their own time, of one step; the prompt is among them."""
    _generate(engine, prompt, 2, False)
    on_gpu = engine.decoder.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with torch.profiler.profile(activities=activities) as recorded:
        out = _generate(engine, prompt, num_tokens, False)
    steps = out.stats.num_verifications
    times = [
        (1.0 * (event.self_device_time_total if on_gpu else event.self_cpu_time_total), event.count, event.key)
        for event in recorded.key_averages()
    ]
    rows = [
        {"name": name, "calls": round(count / steps, 2), "us": round(us / steps, 3)}
        for us, count, name in sorted(times, reverse=True)[:MOST_OPERATIONS]
    ]
    return {
        "step_us": round(1e3 * out.stats.decode_ms / steps, 2),
        "recorded_us": round(sum(us for us, *_ in times) / steps, 2),
        "rows": rows,
    }
