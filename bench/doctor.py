"""Is this machine fit, and does this engine tell the truth here? Checks of under a minute for a small model."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..engine.engine import Engine
from ..engine.gate import DraftPolicy, Gate, every, fixed_exit
from ..engine.graphs import has_dependent_launch
from ..engine.load import load
from ..kernels import tile
from .arms import with_bare_heads
from .baselines import load_reference

PROMPTS = ("Rainbows form when", "def median(values):\n    ")
NUM_TOKENS = 20
# fp32 against fp32 over the same weights: only the order of additions differs.
LOGPROB_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Check:
    """One finding. `status` is "ok", "failed", "skipped", or "warning" (exact, but slow)."""

    name: str
    status: str
    detail: str


def examine(engine: Engine, model: str, transformers_too: bool = True) -> Iterator[Check]:
    """The checks, one after the other.

    Args:
        engine: loaded from `model`.
        transformers_too: compare with `transformers` as well, which loads the weights a second time.
    """
    yield self_test(engine)
    yield fused_kernels(engine)
    yield Check("prefill attention", "ok", engine.prefill)
    if engine.decoder.device.type == "cpu":
        yield threads(lambda: _decode(engine))
    yield from lossless_checks(engine)
    if not transformers_too:
        yield Check("against transformers", "skipped", "not asked for")
        return
    yield against_transformers(engine, model)


def self_test(engine: Engine) -> Check:
    """What the engine found about equal bits when it started."""
    if engine.warning is not None:
        return Check("self-test", "failed", engine.warning)
    tiles = engine.tiles
    if not tiles.deterministic:
        return Check("self-test", "skipped", "deterministic=False: bits may differ between widths")
    rows = "any number of rows" if tiles.least == 1 else f"tiles of {tiles.least} rows"
    return Check("self-test", "ok", f"a row has the same bits in {rows} up to {tiles.most}")


def fused_kernels(engine: Engine) -> Check:
    """Whether decoding runs through the fused kernels, and what their own self-test found."""
    name, device = "fused kernels", engine.decoder.device
    triton = "no Triton" if tile.triton is None else f"Triton {tile.triton.__version__}"
    if engine.fused_refused:
        detail = "rows differ in their bits between tiles or trees: the reference path decodes, with the same results"
        return Check(name, "failed", f"{triton}: {detail}")
    if engine.fused is None:
        asked = "deterministic=False" if not engine.deterministic else f"on {device.type}"
        return Check(name, "skipped", f"{triton}, {asked}: the reference path decodes, with the same results")
    launch = "on" if has_dependent_launch(device) else "off"
    detail = "a row has the same bits alone, in 16 rows, in a tree and beside another sequence"
    return Check(name, "ok", f"{triton}: {detail}; programmatic dependent launch {launch}")


def threads(step: Callable[[], object], repeats: int = 3) -> Check:
    """Whether torch's threads help: on a host whose cores are taken by others every product waits for its slowest
    thread, and decoding can be ten times slower than with one.

    Args:
        step: a piece of decoding; the median of `repeats` of it is taken, with all threads and with one in turn.
    """
    name, count = "threads", torch.get_num_threads()
    if count == 1:
        return Check(name, "ok", "1")
    took: dict[int, list[float]] = {count: [], 1: []}
    step()
    try:
        for _ in range(repeats):
            for number, times in took.items():
                torch.set_num_threads(number)
                start = time.perf_counter()
                step()
                times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(count)
    gain = statistics.median(took[1]) / statistics.median(took[count])
    detail = f"{count}, {gain:.2g}x as fast as one"
    if gain < 1:
        return Check(name, "warning", f"{detail}: the cores are busy; set OMP_NUM_THREADS=1 until other programs end")
    return Check(name, "ok", detail)


def _decode(engine: Engine) -> None:
    engine.generate(_ids(engine, PROMPTS[0]), speculation=False, max_new_tokens=NUM_TOKENS, ignore_eos=True)


def lossless_checks(engine: Engine) -> Iterator[Check]:
    """Speculative against plain decoding: chains and trees, greedy and sampled."""
    if engine.warning is not None:
        yield Check("speculative against plain", "skipped", "the self-test failed")
        return
    layers = engine.decoder.config.num_layers
    if layers < 2:
        yield Check("speculative against plain", "skipped", "a model of one layer has no exit")
        return
    middle = max(1, 2 * layers // 3)
    bare = with_bare_heads(engine, [middle])
    plans: list[tuple[str, Engine, DraftPolicy | None]] = [
        (f"chains of 4 from the bare exit {middle}", bare, fixed_exit(middle, 4)),
        (f"trees from the bare exit {middle}", bare, every([middle], Gate(0.5, math.inf), branch=2)),
    ]
    if engine.policy.drafts:
        plans.append(("the default policy", engine, None))
    for name, owner, policy in plans:
        yield _lossless(name, owner, policy)


def _lossless(name: str, engine: Engine, policy: DraftPolicy | None) -> Check:
    compared = drafted = accepted = 0
    for prompt, temperature in zip(PROMPTS, (0.0, 0.8), strict=True):
        ids = _ids(engine, prompt)
        report = engine.verify_lossless(
            ids, policy=policy, temperature=temperature, max_new_tokens=NUM_TOKENS, ignore_eos=True, seed=1
        )
        stats = report.speculative.stats
        compared += len(report.speculative.token_ids)
        drafted, accepted = drafted + stats.num_drafted, accepted + stats.num_accepted
        if not report.equal:
            margin = "" if report.margin is None else f" (margin {report.margin:.2g} nats)"
            where = f"new token {report.divergence} of {prompt!r} at temperature {temperature}{margin}"
            return Check(f"speculative against plain, {name}", "failed", f"first difference: {where}")
    detail = f"{compared} tokens equal; {accepted} of {drafted} drafted tokens accepted"
    return Check(f"speculative against plain, {name}", "ok", detail)


def against_transformers(engine: Engine, model: str) -> Check:
    """Our fp32 log-probabilities, from cached steps, against one forward of transformers over the same tokens."""
    name = "against transformers, fp32"
    try:
        reference = load_reference(model, torch.float32, engine.decoder.device)
    except (ValueError, OSError, ImportError) as error:
        return Check(name, "skipped", f"transformers cannot load it: {error}")
    own = engine
    if engine.decoder.dtype != torch.float32:
        own = load(model, heads=None, dtype=torch.float32, device=engine.decoder.device, progress=False)
    worst, wrong, compared = 0.0, 0, 0
    for prompt in PROMPTS:
        ids = _ids(own, prompt)
        out = own.generate(ids, speculation=False, max_new_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
        with torch.inference_mode():
            logits = reference(torch.tensor([ids + out.token_ids], device=reference.device)).logits[0].float()
        rows = logits[len(ids) - 1 : -1].log_softmax(-1)
        for row, token, found in zip(rows, out.token_ids, out.logprobs or [], strict=True):
            worst = max(worst, abs(float(row[token]) - found.logprob))
            wrong += bool(row.max() - row[token] > LOGPROB_TOLERANCE)
            compared += 1
    status = "ok" if worst <= LOGPROB_TOLERANCE and not wrong else "failed"
    detail = f"{compared} greedy tokens, {wrong} wrong; log-probabilities differ by at most {worst:.1e}"
    return Check(name, status, detail)


def _ids(engine: Engine, prompt: str) -> list[int]:
    encode: Callable[..., Any] | None = None if engine.tokenizer is None else engine.tokenizer.encode
    if encode is None:
        return [i % engine.decoder.config.vocab_size for i in range(1, 9)]
    return list(encode(prompt))
