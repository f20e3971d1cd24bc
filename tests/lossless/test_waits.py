"""What a kernel reads before it waits, on a GPU with programmatic launch, nobody may still be writing.

A kernel is started once all programs of the one in front have let it go, each after its own wait: whatever was stored
two kernels ago is there, and what the one in front stores is not. Triton's interpreter runs programs one by one, so it
has no such race; here it tells which addresses each launch reads and stores before and after its wait. Rules: nothing
is stored before the wait, nothing is read before it that the launch in front stored, and in every launch some program
waits, or those behind it would not wait for those in front.

Regimes: plain rounds, drafts by a recurrent head, by exits of the trunk (also of layers that drop inputs), by the text
and by the host, grammar of layers (parallel, norms behind), neurons skipped, prompts of several tiles. Planted bugs
seen to fail here: tiles of one prompt taken for settled, the residual of a parallel layer read behind the kernel that
writes it, rows laid right in front of `qkv`, a list of what is kept read before the product's wait.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from skipstone.engine.cache import KVCache, plan_cache
from skipstone.engine.fused import FusedStep, FusedWeights
from skipstone.engine.gate import NEVER, DraftPolicy, Gate, best_first, every, fixed_exit, from_text
from skipstone.engine.graphs import Rounds
from skipstone.engine.model import Decoder
from skipstone.engine.prompt_reader import PromptReader
from skipstone.engine.sparsity.teal import TealLevel
from skipstone.engine.sparsity.thresholded import projections
from skipstone.heads import HeadSet, HeadSetConfig, HeadSpec, Projection
from skipstone.kernels.linear import PackedLinear

pytestmark = pytest.mark.interpreter
PROMPTS = [[4, 9, 2], list(range(5, 24))]


class Watch:
    """Launches so far, and what is wrong with them."""

    def __init__(self) -> None:
        self.launches: list[str] = []
        self.wrong: list[str] = []
        self._stored: set[int] = set()  # by the launch in front
        self._stores: set[int] = set()
        self._any_waits = self._waited = True
        self._early = False

    def begin(self, name: str, early: bool) -> None:
        """`early`: it may be started before what is in front is done."""
        self.launches.append(name)
        self._stores, self._any_waits, self._early = set(), False, early

    def end(self) -> None:
        if self._early and not self._any_waits:
            self.wrong.append(f"{self.launches[-1]}: no program waits")
        self._stored = self._stores

    def program(self) -> None:
        self._waited = not self._early

    def wait(self) -> None:
        self._waited = self._any_waits = True

    def load(self, addresses: np.ndarray) -> None:
        if not self._waited and not self._stored.isdisjoint(addresses.tolist()):
            front = self.launches[-2] if len(self.launches) > 1 else "-"
            self.wrong.append(f"{self.launches[-1]} reads before its wait what {front} stores")

    def store(self, addresses: np.ndarray) -> None:
        if not self._waited and addresses.size:
            self.wrong.append(f"{self.launches[-1]} stores before its wait")
        self._stores.update(addresses.tolist())


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Every launch from here on is watched."""
    from triton.runtime import interpreter

    seen, builder = Watch(), interpreter.interpreter_builder
    of = type(builder)
    load, store, atomic, place = of.create_masked_load, of.create_masked_store, of.create_atomic_rmw, of.set_grid_idx
    run = interpreter.GridExecutor.__call__

    def masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        seen.load(np.asarray(ptrs.data)[np.asarray(mask.data, bool)])
        return load(self, ptrs, mask, *rest)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        seen.store(np.asarray(ptrs.data)[np.asarray(mask.data, bool)])
        return store(self, ptrs, value, mask, *rest)

    def atomic_rmw(self: Any, op: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        seen.store(np.asarray(ptr.data)[np.asarray(mask.data, bool)])
        return atomic(self, op, ptr, val, mask, *rest)

    def set_grid_idx(self: Any, *at: int) -> None:
        seen.program()
        place(self, *at)

    def launch(self: Any, *args: Any, launch_pdl: bool = False, **kwargs: Any) -> Any:
        seen.begin(self.fn.__name__, launch_pdl)
        found = run(self, *args, **kwargs)
        seen.end()
        return found

    for name, hook in (
        ("create_masked_load", masked_load), ("create_masked_store", masked_store), ("create_atomic_rmw", atomic_rmw),
        ("set_grid_idx", set_grid_idx),
    ):  # fmt: skip
        monkeypatch.setattr(of, name, hook)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    # as on a GPU that has programmatic launch, but for what has no meaning here
    for name, module in list(sys.modules.items()):
        if name.startswith("skipstone."):
            for hook, stand_in in (
                ("pdl_wait", lambda PDL: seen.wait()), ("pdl_next", lambda PDL: None),
                ("bring_near", lambda at, size: None), ("has_dependent_launch", lambda device: True),
            ):  # fmt: skip
                if hasattr(module, hook):
                    monkeypatch.setattr(module, hook, stand_in)
    return seen


def trunk_exits(engine: Any, kind: str, options: dict[str, Any]) -> None:
    decoder, config = engine.decoder, engine.decoder.config
    specs = tuple(HeadSpec(kind, e, options) for e in (1, 2))
    heads = HeadSet(HeadSetConfig(config.hidden_size, config.vocab_size, config.num_layers, specs))
    with torch.inference_mode():
        engine.heads = heads.attach(
            Projection(decoder.final_norm, decoder.head_weight, config.logit_softcap, PackedLinear)
        )


def rounds(engine: Any, policy: Any) -> None:
    with torch.inference_mode():
        engine.fused = FusedWeights(engine.decoder)
    engine.workspace.cache = None
    engine.generate(PROMPTS, policy=policy, speculation="always" if policy else False, max_new_tokens=4)


TREE, CHAIN = best_first(beam=2, branch=2, max_depth=2, max_nodes=5), fixed_exit(0, 2)


@pytest.mark.parametrize(
    ("family", "policy"),
    [("llama2", None), ("gpt_neox", None), ("gemma2", None), ("llama2", TREE), ("llama2", CHAIN)],
    ids=["llama2", "parallel layers", "norms behind", "recurrent tree", "recurrent chain"],
)
def test_plain_rounds_and_a_recurrent_head(
    family: str, policy: Any, watch: Watch, engine_of: Callable, stateful: Callable
) -> None:
    engine = engine_of(family, max_context=200)
    if policy is not None:
        stateful(engine, "recurrent", prompts=PROMPTS)
    rounds(engine, policy)
    assert {"_qkv_kernel", "_tree_attention_kernel", "_residual_kernel", "_up_kernel"} <= set(watch.launches)
    assert policy is None or "_enter_rows_kernel" in watch.launches
    assert not watch.wrong, sorted(set(watch.wrong))


@pytest.mark.parametrize(
    ("policy", "head"),
    [
        (fixed_exit(1, 2), ("linear", {})),
        (every((1, 2), Gate(3.2, 3.2), max_depth=2, branch=1), ("adapter", {"width": 24})),
        (every((2,), Gate(2.0, 9.0), max_depth=2, branch=2, max_nodes=5), ("adapter", {"width": 24})),
        (DraftPolicy((1, 2), {1: NEVER, 2: Gate(2.0, 9.0)}, max_depth=2, branch=2, max_nodes=5), ("linear", {})),
        (
            every((1, 2), Gate(2.0, 3.4), max_depth=1, branch=2),
            ("block", {"head_dim": 16, "num_heads": 2, "num_kv_heads": 1}),
        ),
    ],
    ids=[
        "one linear exit",
        "two adapters and a gate",
        "trees of an adapter",
        "trees of two linear exits",
        "trees of blocks",
    ],
)
def test_rounds_with_exits_of_the_trunk(policy: Any, head: Any, watch: Watch, engine_of: Callable) -> None:
    engine = engine_of(num_layers=3, max_context=200)
    trunk_exits(engine, *head)
    rounds(engine, policy)
    assert "_grow_level_kernel" in watch.launches
    assert ("_adapter_rows_kernel" in watch.launches) == (head[0] != "linear")
    assert not watch.wrong, sorted(set(watch.wrong))


@pytest.mark.parametrize(
    ("family", "policy"),
    [("llama2", fixed_exit(1, 2)), ("gpt_neox", every((1, 2), Gate(3.2, 3.2), max_depth=2, branch=1))],
    ids=["one exit", "parallel layers, two exits and a gate"],
)
def test_drafts_that_drop_inputs(family: str, policy: Any, watch: Watch, engine_of: Callable) -> None:
    """Their steps in front of a verification that lays its own rows, and the next round's behind it."""
    engine = engine_of(family, num_layers=3, max_context=200)
    trunk_exits(engine, "adapter", {"width": 24})
    with torch.inference_mode():
        engine.fused = FusedWeights(engine.decoder)
    at = torch.full((3, len(projections(engine.decoder.config))), 0.3)
    engine.drop_inputs(draft=TealLevel(0.3, at, dense_tokens=4))
    engine.workspace.cache = None
    out = engine.generate(PROMPTS[1], policy=policy, speculation="always", max_new_tokens=4)
    assert out.stats.num_drafted > 0 and {"_grow_level_kernel", "_sparse_kernel", "_qkv_kernel"} <= set(watch.launches)
    assert not watch.wrong, sorted(set(watch.wrong))


@pytest.mark.parametrize("settled", [False, True])
def test_prompts_of_several_tiles(
    settled: bool, watch: Watch, engine_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile reads the keys of earlier ones, which the kernel in front has just stored."""
    decoder = engine_of("llama2", torch.float16, max_context=512, num_layers=1).decoder  # half types: a split at once
    config = decoder.config
    plan = replace(plan_cache(config, 1, 420, decoder.device, torch.float16), dtype=torch.float16)
    cache = KVCache(plan, decoder.device)
    if settled:
        build = FusedStep.__init__
        monkeypatch.setattr(FusedStep, "__init__", lambda *args, **own: build(*args, **{**own, "settled": True}))
    reader = PromptReader(FusedWeights(decoder), cache, lambda length: 420, sizes=(64,))
    reader.read(0, [n % 50 for n in range(404)], first=340)  # its last tile sees all of positions 256..383
    assert bool(watch.wrong) == settled, sorted(set(watch.wrong))


def test_drafts_from_the_text(watch: Watch, engine_of: Callable) -> None:
    engine = engine_of(num_layers=2, max_context=200)
    rounds(engine, from_text(1))
    assert {"_draft_text_kernel", "_keep_text_kernel", "_qkv_kernel"} <= set(watch.launches)
    assert not watch.wrong, sorted(set(watch.wrong))


def a_round(decoder: Decoder, by_neuron: bool = False) -> None:
    cache = KVCache(plan_cache(decoder.config, 1, 96, decoder.device, torch.float32), decoder.device)
    rounds = Rounds(FusedWeights(decoder, by_neuron), cache, 1)
    rounds.prepare(["plain"])
    rounds.sequences.active.fill_(1)
    rounds.trees.count.fill_(1)
    rounds.replay("plain")


def test_neurons_skipped(watch: Watch, engine_of: Callable) -> None:
    a_round(engine_of(num_layers=2).decoder, by_neuron=True)
    assert "_kept_down_kernel" in watch.launches
    assert not watch.wrong, sorted(set(watch.wrong))


def test_planted_an_order_that_races(watch: Watch, engine_of: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are laid right in front of the first kernel that reads them before its wait."""
    monkeypatch.setattr(FusedStep, "embed", lambda step: None)
    a_round(engine_of(num_layers=2).decoder)
    assert watch.wrong == ["_qkv_kernel reads before its wait what _lay_rows_kernel stores"] * len(watch.wrong) != []
