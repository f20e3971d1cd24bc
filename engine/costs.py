"""Measuring what the parts of a round take on this machine: seconds, once.

Probes take turns, over and over until the time is spent, so that a slow moment of the host hits all of them; of each
probe's times the lower third counts, since other work only ever adds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..heads.stateful import StatefulHead
from .best_first import grow_pools
from .cache import KVCache, plan_cache
from .draft import DraftRow, Guesses, draft
from .expectation import Costs
from .forward import Working, advance, node_logits
from .gate import PLAIN, WHOLE, DraftPolicy, best_first, fixed_exit
from .head_memory import HeadMemory, plan_memory
from .tree import MAX_NODES, DraftTree

if TYPE_CHECKING:
    from .engine import Engine

CONTEXT = 256  # tokens before the measured rounds
CAPTURED_CONTEXT = 128  # the same of captured rounds, which follow the context; most questions are shorter
ROWS, TREE_ROWS = (1, 2, 3, 4, 6, 8, 12, 16), (4, 8, 16)
STEPS = 5  # of the longer drafts, whose time beyond the short ones' is that of further steps
PLAIN_STEPS = 8
SECONDS = 5.0
MOST_ROUNDS = 9
BEAM, BRANCH = 4, 4

Probe = Callable[[], object]


def measure_costs(engine: Engine, seconds: float = SECONDS) -> Costs:
    """Time an engine's rounds, as long as `seconds` allow and at least twice.

    Args:
        engine: with heads; free, and busy until this returns.

    Raises:
        ValueError: no heads, or neurons or inputs are skipped.
    """
    if engine.heads is None:
        raise ValueError("this engine has no heads: there is nothing to plan; load with heads=...")
    if engine.verify != "dense" or engine.draft != "dense":
        raise ValueError(
            f"plans are for the whole model: this engine verifies with {engine.verify!r}, drafts with {engine.draft!r}"
        )
    if engine.fused is not None:
        return _fused_costs(engine, seconds)
    with torch.inference_mode():
        probes = _Probes(engine)
        times = take_turns(probes.all(), seconds)
    return costs_of(times, engine.decoder.config.num_layers, probes.num_prompt)


def take_turns(probes: dict[str, Probe], seconds: float) -> dict[str, float]:
    """Probe -> ms: the lower third of its times. A probe that returns a number has timed itself, in ms."""
    times: dict[str, list[float]] = {name: [] for name in probes}
    end = time.perf_counter() + seconds
    for turn in range(MOST_ROUNDS):
        began = time.perf_counter()
        for name, probe in probes.items():
            start = time.perf_counter()
            own = probe()
            elapsed = 1e3 * (time.perf_counter() - start)
            times[name].append(own if isinstance(own, float) else elapsed)
        now = time.perf_counter()
        if turn > 0 and now + (now - began) > end:
            break
    return {name: sorted(own)[(len(own) - 1) // 3] for name, own in times.items()}


def costs_of(times: dict[str, float], num_layers: int, num_prompt: int) -> Costs:
    """From the probes' times (names as in `_Probes`)."""

    def by_rows(kind: str) -> dict[int, float]:
        return {int(n.partition(":")[2]): ms for n, ms in times.items() if n.startswith(f"{kind}:")}

    rows, output = by_rows("rows"), by_rows("output")
    layer = {n: ms / num_layers for n, ms in rows.items()}
    trunk = {e: max(0.0, ms - e * layer[1]) for e, ms in by_rows("ask").items()}
    grow: dict[int, float] = {}
    if "chain:1" in times:
        grow[1] = max(0.0, (times[f"chain:{STEPS}"] - times["chain:1"]) / (STEPS - 1))
        grow[BEAM] = max(grow[1], (times[f"best:{STEPS}"] - times["best:1"]) / (STEPS - 1))
    chain_at = sorted(rows)
    return Costs(
        num_layers,
        layer,
        output,
        {
            n: max(0.0, ms - float(np.interp(n, chain_at, [rows[r] for r in chain_at])))
            for n, ms in by_rows("tree").items()
        },
        step_ms=max(0.0, times["plain"] - rows[1] - output[1]),
        draft_layer_ms=layer[1],
        ask_ms=trunk,
        open_ms=times.get("chain:1", 0.0),
        grow_ms=grow,
        prefill_ms=times["prefill"] / num_prompt,
    )


class _Probes:
    """The parts of a round, each ready to be called, on a cache filled with noise.

    rows:N, output:N, tree:N   a verification of N rows: all layers, LM head; all layers of a branching tree
    ask:E                      drafting one token from trunk exit E, its layers included
    chain:N, best:N            N steps of the head at exit 0: a chain's, a tree's
    plain, prefill             a plain step and a prompt, through `Engine.generate`
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, config = engine, engine.decoder.config
        room = config.max_context - MAX_NODES - PLAIN_STEPS
        self.base = max(1, min(CONTEXT, room // 2))
        self.num_prompt = self.base
        plan = plan_cache(
            config, 1, min(config.max_context, self.base + 2 * MAX_NODES), engine.decoder.device, engine.decoder.dtype
        )
        self.cache = KVCache(plan, engine.decoder.device)
        generator = torch.Generator().manual_seed(1)
        for store in (self.cache.k, self.cache.v):
            store.copy_(torch.randn(store.shape[2:], generator=generator).to(store.dtype).expand_as(store))
        self.cache.lens[0] = self.base
        self.memories = self._memories()
        self.kept = sorted({layer for memory in self.memories.values() for layer in memory.layers})

    def _memories(self) -> dict[int, HeadMemory]:
        assert self.engine.heads is not None
        decoder, found = self.engine.decoder, {}
        generator = torch.Generator().manual_seed(2)
        for exit_layer, head in self.engine.heads.heads.items():
            if isinstance(head, StatefulHead):
                plan = plan_memory(head, 1, self.base + MAX_NODES, 1 + BEAM * STEPS + MAX_NODES, decoder.device)
                found[exit_layer] = memory = HeadMemory(plan, decoder.device)
                size = self.base, decoder.config.hidden_size
                states = {n: torch.randn(size, generator=generator).to(decoder.device) for n in memory.layers}
                memory.take(0, states)
        return found

    def all(self) -> dict[str, Probe]:
        assert self.engine.heads is not None
        probes: dict[str, Probe] = {}
        hidden = torch.randn(MAX_NODES, self.engine.decoder.config.hidden_size).to(self.engine.decoder.device)
        for rows in ROWS:
            probes[f"rows:{rows}"] = partial(self._verify, chain(rows))
            probes[f"output:{rows}"] = partial(self._output, hidden[:rows])
        for rows in TREE_ROWS:
            probes[f"tree:{rows}"] = partial(self._verify, branching(rows))
        for exit_layer in self.engine.heads.exits:
            if exit_layer:
                probes[f"ask:{exit_layer}"] = partial(self._draft, fixed_exit(exit_layer, 1))
        if 0 in self.memories:
            for steps in (1, STEPS):
                probes[f"chain:{steps}"] = partial(self._draft, fixed_exit(0, steps))
                probes[f"best:{steps}"] = partial(self._draft, best_first(BEAM, BRANCH, steps))
        probes["plain"] = self._plain
        probes["prefill"] = lambda: self._prefill_ms
        return probes

    def _work(self, tree: DraftTree) -> Working:
        decoder = self.engine.decoder
        hidden = torch.zeros(MAX_NODES, decoder.config.hidden_size, device=decoder.device)
        kept = {layer: torch.zeros_like(hidden) for layer in self.kept}
        work = Working(0, self.base, tree, hidden, kept=kept)
        work.embed_new(decoder)
        self.cache.clear_open(0)
        return work

    def _verify(self, tree: DraftTree) -> None:
        work = self._work(tree)
        layers = self.engine.decoder.config.num_layers
        advance(self.engine.decoder, self.cache, [(work, range(len(tree)))], layers, self.engine.tiles)
        self._wait()

    def _output(self, hidden: torch.Tensor) -> None:
        node_logits(self.engine.decoder, hidden, self.engine.tiles).argmax(-1).tolist()

    def _draft(self, policy: DraftPolicy) -> float | None:
        """A policy's draft. Of trees the time is scaled to the steps that were wanted, where they end early."""
        assert self.engine.heads is not None
        heads, start = self.engine.heads, time.perf_counter()
        rows = [DraftRow(self._work(chain(1)), MAX_NODES, _rank)]
        if not policy.beam:
            draft(
                self.engine.decoder, self.cache, rows, heads.heads, policy, self.engine.tiles, self.memories,
                heads.draft_ids,
            )  # fmt: skip
            return None
        (pool,) = grow_pools(self.engine.decoder, rows, self.memories[0], policy, heads.draft_ids)
        pool.hang()
        rows[0].work.embed_new(self.engine.decoder)
        steps = 1 + -(-(len(pool.places) - 1) // BEAM)
        return 1e3 * (time.perf_counter() - start) * policy.max_depth / steps

    def _plain(self) -> float:
        prompt = [(7 * i + 3) % self.engine.decoder.config.vocab_size for i in range(self.num_prompt)]
        out = self.engine.generate(prompt, speculation=False, max_new_tokens=PLAIN_STEPS, ignore_eos=True)
        self._prefill_ms = float(out.stats.prefill_ms)
        return float(out.stats.decode_ms / out.stats.num_verifications)

    def _wait(self) -> None:
        if self.engine.decoder.device.type == "cuda":
            torch.cuda.synchronize(self.engine.decoder.device)


def chain(rows: int) -> DraftTree:
    """A root with a chain below it."""
    tree = DraftTree(1)
    for token in range(1, rows):
        tree.add(token - 1, token)
    return tree


def branching(rows: int) -> DraftTree:
    """A tree as best-first drafting makes them: every other node of a level goes on with two children."""
    tree = DraftTree(1)
    for node in range(1, rows):
        tree.add((node - 1) // 2, node)
    return tree


def _rank(guesses: Guesses, at: int, path: tuple[int, ...], count: int) -> list[tuple[int, float]]:
    return guesses.best[at][:count]


def _fused_costs(engine: Engine, seconds: float) -> Costs:
    """The same where rounds are CUDA graphs: whole rounds of a few shapes are timed, and their differences are the
    parts."""
    assert engine.heads is not None
    prompt = [
        (7 * i + 3) % engine.decoder.config.vocab_size
        for i in range(min(CAPTURED_CONTEXT, engine.decoder.config.max_context // 2))
    ]
    prefill: list[float] = []

    def round_of(policy: DraftPolicy | None) -> float:
        out = engine.generate(
            prompt, speculation=False if policy is None else "always", policy=policy, max_new_tokens=64, ignore_eos=True
        )
        prefill.append(out.stats.prefill_ms)
        return float(out.stats.decode_ms / out.stats.num_verifications)

    shapes: dict[str, DraftPolicy | None] = {"plain": None, "text": replace(PLAIN, lookup=WHOLE)}
    for exit_layer in engine.heads.exits:
        shapes |= {f"exit:{exit_layer}:{n}": fixed_exit(exit_layer, n) for n in (1, STEPS)}
    if 0 in engine.heads.exits:
        shapes |= {f"best:{n}": best_first(BEAM, BRANCH, n) for n in (2, STEPS)}
    for policy in shapes.values():
        round_of(policy)  # captures its graphs
    probes: dict[str, Probe] = {name: partial(round_of, policy) for name, policy in shapes.items()}
    return fused_costs_of(take_turns(probes, seconds), engine.decoder.config.num_layers, min(prefill) / len(prompt))


def fused_costs_of(times: dict[str, float], num_layers: int, prefill_ms: float) -> Costs:
    """From whole rounds, in ms: plain, text (a tile is verified, whatever the text suggests, and nothing else is done),
    exit:E:N (chains of N from exit E) and best:N (trees of N steps)."""
    plain, ask = times["plain"], dict[int, float]()
    grow: dict[int, float] = {}
    verify = {1: plain, 2: max(plain, times["text"])}
    for exit_layer in sorted({int(n.split(":")[1]) for n in times if n.startswith("exit:")}):
        one, many = times[f"exit:{exit_layer}:1"], times[f"exit:{exit_layer}:{STEPS}"]
        each = max(0.0, (many - one) / (STEPS - 1))  # rows of one tile: wider verifications cost nearly nothing
        if exit_layer:  # verification goes on from the layers that drafting ran, which is left out
            ask[exit_layer] = each
        else:
            grow[1] = each
    opening = max(0.0, times["exit:0:1"] - verify[2]) if grow else 0.0
    if grow:
        few, many = times["best:2"], times[f"best:{STEPS}"]
        grow[BEAM] = max(grow[1], (many - few) / (STEPS - 2))
        verify[MAX_NODES] = max(verify[2], few - opening - grow[BEAM])
    layer_ms = 0.0
    if len(ask) > 1:  # a draft token runs its layers and asks once
        layer_ms = float(max(0.0, np.polyfit(list(ask), list(ask.values()), 1)[0]))
    return Costs(
        num_layers,
        {rows: ms / num_layers for rows, ms in verify.items()},
        {1: 0.0},
        draft_layer_ms=layer_ms,
        ask_ms={e: max(0.0, ms - e * layer_ms) for e, ms in ask.items()},
        open_ms=opening,
        grow_ms=grow,
        prefill_ms=prefill_ms,
        reuse=False,
    )
