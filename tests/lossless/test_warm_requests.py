"""No kernel is compiled and no round captured in the middle of a request, once the engine is warm.

What Triton would compile is read off each launch by its own rules (`compiled_for`); kernels do not run, so every token
is 0, which is enough for the host's side. On a GPU the same counts are of real compilations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from skipstone.engine import engine as engine_module
from skipstone.engine import workspace
from skipstone.engine.engine import CHAIN_LENGTH, TREE, Engine
from skipstone.engine.expectation import Expected
from skipstone.engine.fused import FusedWeights
from skipstone.engine.gate import BESIDE, WHOLE, best_first, fixed_exit
from skipstone.engine.graphs import Rounds
from skipstone.engine.inventory import memory_items
from skipstone.engine.ladder import Ladder
from skipstone.engine.pacing import Pace
from skipstone.engine.workspace import MOST_ROUNDS, reach_of

pytestmark = pytest.mark.interpreter
CONTEXT = 3000


def compiled_for(function: Any, args: tuple, options: dict[str, Any]) -> tuple:
    """What of a launch makes Triton compile: constants, types, integers that are 1 or multiples of 16, alignment."""
    named, key = dict(zip(function.arg_names, args, strict=False)) | options, []
    for name, value in sorted(named.items()):
        annotation = str(function.fn.__annotations__.get(name, ""))
        if "constexpr" in annotation or value is None or name not in function.arg_names:
            kind: Any = value
        elif isinstance(value, torch.Tensor):
            kind = value.dtype, value.data_ptr() % 16 == 0
        elif isinstance(value, int) and name not in (function.kwargs.get("do_not_specialize") or ()):
            kind = value if value == 1 else value % 16 == 0, value.bit_length() > 31
        else:
            kind = type(value)
        key.append((name, kind))
    return (function.fn.__name__, *key)


class Watch:
    """Compilations and captures so far."""

    def __init__(self) -> None:
        self.compiled: set[tuple] = set()
        self.captured: list[str] = []

    def since(self, before: tuple[set, list]) -> tuple[set, list]:
        """What was compiled, and captured, that had not been then."""
        return self.compiled - before[0], self.captured[len(before[1]) :]

    def now(self) -> tuple[set, list]:
        return set(self.compiled), list(self.captured)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    from triton.runtime.interpreter import InterpretedFunction

    seen, capture = Watch(), Rounds._capture

    def launched(function: Any, grid: Any) -> Callable:
        return lambda *args, **options: seen.compiled.add(compiled_for(function, args, options))

    def captured(rounds: Rounds, kind: Any, depth: int | None = None) -> Any:
        seen.captured.append(kind if depth is None else f"{kind} {depth}")
        rounds._body(kind, depth)  # as a capture does
        return capture(rounds, kind, depth)

    monkeypatch.setattr(InterpretedFunction, "__getitem__", launched)
    monkeypatch.setattr(Rounds, "_capture", captured)
    monkeypatch.setattr(workspace, "spare_memory", lambda device: 1e9)
    return seen


@pytest.fixture
def engine(engine_of: Callable, stateful: Callable) -> Any:
    engine = engine_of(max_context=CONTEXT)
    stateful(engine, "recurrent")
    with torch.inference_mode():
        engine.fused = FusedWeights(engine.decoder)
    engine.policy = best_first(4, 4, 4)
    return engine


def requests(engine: Any, batch: int = 1) -> None:
    """Plain and drafted ones, short and long, in an order in which a cache that only just fits would grow."""
    for length, budget in ((5, 3), (480, 40), (700, 5), (20, 1500), (CONTEXT - 9, 5), (5, 3), (17, 40)):
        for speculation in (False, "always", True):
            out = engine.generate(
                [list(range(1, 2)) * length] * batch, speculation=speculation, max_new_tokens=budget, ignore_eos=True
            )
            assert len(out[0].token_ids) == budget


def test_a_warm_engine_compiles_and_captures_nothing(engine: Any, watch: Watch) -> None:
    """Seen to fail: the cache's splits as a constant of attention's kernel; a cache that grows request by request;
    rounds of one reach only; a head's memory made anew for every request."""
    assert engine.warm_up() > 0
    warm = watch.now()
    reaches = sorted({rounds.reach for rounds in engine.workspace.rounds.values()})
    assert reaches == [reach_of(1), reach_of(600), reach_of(2000), CONTEXT]
    assert len(warm[1]) == len(reaches) * (1 + 3), "plain rounds alone; plain, draft and absorb of those that draft"
    names = [name for name, *_ in warm[0]]
    assert names.count("_tree_attention_kernel") <= 2, "the model's and the head's, whatever the reach"
    requests(engine)
    assert watch.since(warm) == (set(), [])


def test_lengths_that_a_plan_moves_among_are_captured_before(engine: Any, watch: Watch) -> None:
    """Seen to fail: rounds of the planned depth alone, so the first request captured all others."""
    rungs = {depth: Expected(1.0 + depth / 2, 15.0, 10.0 + depth) for depth in (2, 4, 5)}
    engine.plan = SimpleNamespace(chosen=SimpleNamespace(policy=engine.policy), rungs=rungs)
    engine.warm_up()
    warm, reaches = watch.now(), {rounds.reach for rounds in engine.workspace.rounds.values()}
    assert [warm[1].count(f"draft {depth}") for depth in (2, 4, 5)] == [len(reaches), len(reaches), 0]
    engine._paces = {(1, True, False, False): Pace(plain_ms=1e9, ladder=Ladder(rungs))}
    for length, budget in ((5, 3), (480, 40), (20, 100)):
        engine.generate([[1] * length], max_new_tokens=budget, ignore_eos=True)
    assert watch.since(warm) == (set(), []) and engine.pace().ladder.rounds > 0


def test_another_batch_compiles_nothing_either(engine: Any, watch: Watch) -> None:
    """Kernels are the same for every batch; rounds are captured for each."""
    engine.warm_up()
    warm = watch.now()
    requests(engine, batch=3)
    compiled, captured = watch.since(warm)
    assert not compiled and captured


def test_several_sequences_draft_chains_by_default(
    engine_of: Callable, stateful: Callable, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From four on, where nothing was set; what was set holds for every batch. Planted bugs: a batch warmed up with
    trees; rows counted for them; a policy that was set for few alone."""
    own, drafted, decode = engine_of(max_context=CONTEXT), [], engine_module.decode_on_device

    def decoded(on: Any, rounds: Any, requests: Any, policy: Any, pace: Any) -> Any:
        drafted.append(policy)
        return decode(on, rounds, requests, policy, pace)

    monkeypatch.setattr(Engine, "_fuse", lambda engine, *_: FusedWeights(engine.decoder))
    monkeypatch.setattr(engine_module, "decode_on_device", decoded)
    engine = Engine(own.decoder, None, stateful(own, "recurrent"))

    def drafts() -> list[Any]:
        drafted.clear()
        for batch in (1, 3, 4, 8):
            engine.generate([[1, 2, 3]] * batch, speculation="always", max_new_tokens=4)
        return list(drafted)

    tree = replace(best_first(*TREE), lookup=BESIDE)
    chain = fixed_exit(0, CHAIN_LENGTH)
    assert drafts() == [tree, tree, chain, chain] and engine.policy == tree
    rows = [item.what for batch in (3, 4) for item in memory_items(engine, batch, 100) if "rows of" in item.what]
    assert rows == ["rows of device rounds of 3 x 16", "rows of device rounds of 4 x 4"]
    engine.warm_up(batch=5)
    warm = watch.now()
    engine.generate([[1, 2, 3]] * 5, speculation="always", max_new_tokens=4)
    assert watch.since(warm) == (set(), [])
    engine.plan = SimpleNamespace(chosen=SimpleNamespace(policy=fixed_exit(0, 1)), rungs={})
    assert drafts() == [fixed_exit(0, 1)] * 2 + [chain] * 2
    for policy in (tree, chain):
        engine.policy = policy
        assert drafts() == [policy] * 4


def test_long_texts_draft_chains_by_default(
    engine_of: Callable, stateful: Callable, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows, the text's drafts as long as the head's. Planted bugs: rounds of long texts captured at the first of
    them; a length that a plan's ladder moves, for a policy that is not the plan's."""
    monkeypatch.setattr(engine_module, "LONG", 40)
    monkeypatch.setattr(Engine, "_fuse", lambda engine, *_: FusedWeights(engine.decoder))
    own = engine_of(max_context=200)
    engine = Engine(own.decoder, None, stateful(own, "recurrent"))
    chain = replace(fixed_exit(0, CHAIN_LENGTH), lookup=replace(WHOLE, min_match=3, max_nodes=CHAIN_LENGTH))
    assert engine.policy_for(1, 40) == chain and engine.policy_for(1, 39) == engine.policy != chain
    rungs = {depth: Expected(1.0 + depth / 2, 15.0, 10.0 + depth) for depth in (2, 4)}
    engine.plan = SimpleNamespace(chosen=SimpleNamespace(policy=best_first(*TREE)), rungs=rungs)
    engine.warm_up()
    warm = watch.now()
    for length in (10, 40, 10):
        engine.generate([[1] * length], max_new_tokens=4, ignore_eos=True)
    assert watch.since(warm) == (set(), [])
    short, long = (engine._paces[1, True, False, whether] for whether in (False, True))
    assert short.ladder is not None and long.ladder is None


def test_rounds_that_are_kept_are_bounded(engine: Any, watch: Watch) -> None:
    """The longest unused ones go."""
    engine.warm_up(batch=MOST_ROUNDS + 2)
    for batch in range(1, MOST_ROUNDS + 3):
        engine.generate([[1, 2]] * batch, speculation=False, max_new_tokens=2)
        assert len(engine.workspace.rounds) <= MOST_ROUNDS
    assert [rounds.batch for rounds in engine.workspace.rounds.values()] == list(range(3, MOST_ROUNDS + 3))


def test_options_that_need_processing_have_rounds_of_their_own(engine: Any, watch: Watch) -> None:
    options = {"temperature": 0.7, "top_p": 0.9}
    engine.warm_up(**options)
    warm = watch.now()
    engine.generate([1, 2, 3], max_new_tokens=4, **options)
    assert watch.since(warm) == (set(), [])


def test_other_weights_are_other_rounds(engine: Any, watch: Watch) -> None:
    engine.generate([1, 2, 3], max_new_tokens=4)
    first = list(engine.workspace.rounds.values())
    with torch.inference_mode():
        engine.fused = FusedWeights(engine.decoder)
    engine.generate([1, 2, 3], max_new_tokens=4)
    assert first and not any(rounds in engine.workspace.rounds.values() for rounds in first)


def test_a_larger_draft_keeps_the_memory_that_a_smaller_one_can_use(engine: Any, watch: Watch) -> None:
    small = engine.policy
    engine.generate([1, 2, 3], policy=best_first(6, 4, 6), max_new_tokens=4)
    memory = engine.workspace.memories[0]
    for policy in (small, best_first(6, 4, 6), small):
        engine.generate([1, 2, 3], policy=policy, max_new_tokens=4)
        assert engine.workspace.memories[0] is memory
    assert watch.captured.count("draft") == 2


def test_a_sequence_beyond_the_reach_is_refused(engine: Any, watch: Watch) -> None:
    engine.generate([1, 2, 3], speculation=False, max_new_tokens=4)
    rounds = next(iter(engine.workspace.rounds.values()))
    from skipstone.engine.graphs import Start
    from skipstone.engine.sampling import SamplingParams

    with pytest.raises(ValueError, match="reach"):
        rounds.begin([Start(0, [1, 2], 2, rounds.reach + 1, SamplingParams())])
