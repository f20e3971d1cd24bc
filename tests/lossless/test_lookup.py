"""Drafts from the text, alone and by turns with heads': the output is plain decoding's all the same.

Prompts that repeat give matches, most of them wrong.
"""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from skipstone.engine import loop
from skipstone.engine.device_draft import RecurrentDraft
from skipstone.engine.device_loop import _Queue
from skipstone.engine.engine import LONG, _default_policy
from skipstone.engine.expectation import Expected
from skipstone.engine.fused import FusedWeights
from skipstone.engine.gate import (
    BESIDE,
    WHOLE,
    DraftPolicy,
    Gate,
    Lookup,
    best_first,
    every,
    fixed_exit,
    from_text,
)
from skipstone.engine.graphs import BY_HEADS, Rounds
from skipstone.engine.ladder import Ladder
from skipstone.engine.load import load
from skipstone.engine.pacing import Pace
from skipstone.engine.tree import FROM_TEXT, Acceptance
from skipstone.kernels.head_rows import RING

PROMPTS = [[4, 9, 2, 7, 4, 9, 2], [*range(5, 20), *range(5, 20)], [3, 3, 3, 3]]
NEW = 16
TEXT = Lookup(min_match=2, max_nodes=6)
POLICIES = {
    "chain": from_text(1),
    "tree": from_text(1, per_match=4, max_nodes=15, branch=3),
    "mixed chain": replace(fixed_exit(0, 3), lookup=TEXT),
    "mixed gated tree": replace(every((0,), Gate(0.3, 99.0), branch=2, max_depth=3), lookup=TEXT),
    "mixed best first": replace(best_first(3, 2, 2), lookup=TEXT),
    "mixed beside": replace(best_first(3, 2, 3, 6), lookup=Lookup(1, max_nodes=8, beside=True)),
    "mixed beside a chain": replace(fixed_exit(0, 3), lookup=Lookup(1, max_nodes=5, beside=True)),
    "mixed trees": replace(best_first(3, 2, 4, max_nodes=6), lookup=Lookup(1, 15, 6, 3)),
}


def engine_with_heads(engine_of: Callable[..., Any], stateful: Callable[..., Any]) -> Any:
    engine = engine_of()
    stateful(engine, "recurrent", prompts=PROMPTS)
    return engine


@pytest.mark.hazard(6, 24)
@pytest.mark.parametrize(
    ("policy", "sampling"),
    [*((name, {}) for name in POLICIES), *((name, {"temperature": 0.6}) for name in ("tree", "mixed best first"))],
)
def test_output_is_plain_decodings(
    policy: str, sampling: dict[str, Any], engine_of: Callable, stateful: Callable, assert_same_output: Callable
) -> None:
    """In a batch and alone."""
    engine = engine_with_heads(engine_of, stateful)
    options = {"max_new_tokens": NEW, "logprobs": 1, **sampling}
    plain = engine.generate(PROMPTS, seeds=[5, 6, 7], speculation=False, **options)
    trees: list[Any] = []
    engine.observer = lambda on, works, logits: trees.extend(work.tree for work in works)
    together = engine.generate(PROMPTS, seeds=[5, 6, 7], policy=POLICIES[policy], **options)
    for out, expected in zip(together, plain, strict=True):
        assert_same_output(out, expected)
    alone = engine.generate(PROMPTS[1], seed=6, policy=POLICIES[policy], **options)
    assert_same_output(alone, plain[1])
    sources = [set(tree.exit_layers[1:]) for tree in trees]
    assert any(FROM_TEXT in own for own in sources) and max(map(len, trees)) <= 16
    assert sum(out.stats.num_accepted for out in together) > 0
    if policy.startswith("mixed"):
        assert {0} in sources, "heads are asked where the text gives nothing"
        assert ({FROM_TEXT, 0} in sources) == ("beside" in policy), "and beside it, if that is wanted"


def test_no_heads_are_needed_and_stops_hold(engine_of: Callable, assert_same_output: Callable) -> None:
    engine = engine_of("qwen2")
    options: dict[str, Any] = {"max_new_tokens": 40}
    whole = engine.generate(PROMPTS[0], speculation=False, **options)
    for place in (3, 17):
        stop = {"stop_ids": [whole.token_ids[place]], **options}
        plain = engine.generate(PROMPTS[0], speculation=False, **stop)
        out = engine.generate(PROMPTS[0], policy=from_text(1, 4, 15, 2), **stop)
        assert_same_output(out, plain)
    assert engine.generate(PROMPTS[0], policy=from_text(1), **options).stats.num_accepted > 0
    with pytest.raises(ValueError, match="takes no lookup"):
        engine.generate(PROMPTS[0], mode="early_exit", policy=from_text())


@pytest.mark.hazard(15)
def test_a_verifier_that_follows_the_text_blindly_is_caught(
    engine_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: what the text suggests is accepted without the target's word."""
    engine = engine_of()
    plain = [engine.generate(ids, speculation=False, max_new_tokens=NEW).token_ids for ids in PROMPTS]

    def first_children(tree: Any, target: Any) -> Acceptance:
        nodes = [0]
        while children := tree.children(nodes[-1]):
            nodes.append(children[0])
        return Acceptance(tuple(nodes[1:]), tuple(tree.tokens[n] for n in nodes[1:]), target(nodes[-1]))

    monkeypatch.setattr(loop, "accept", first_children)
    found = [engine.generate(ids, policy=from_text(1), max_new_tokens=NEW).token_ids for ids in PROMPTS]
    assert found != plain


@pytest.mark.interpreter
@pytest.mark.hazard(6, 24)
@pytest.mark.parametrize("policy", ["chain", "tree", "mixed best first", "mixed beside", "mixed beside a chain"])
def test_rounds_on_the_device(
    policy: str, engine_of: Callable, stateful: Callable, assert_same_output: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chains from the text are drafted there, alone and where a recurrent head drafts if there are none, and trees from
    the text by the host: the same trees. Planted bug: drafts from the text no deeper than the head's."""
    # a short context, so that attention launches few programs that leave at once
    short = functools.partial(engine_of, max_context=200)
    engine = engine_with_heads(short, stateful) if policy.startswith("mixed") else short(num_layers=2)
    prompts, new = [[4, 9, 2, 4, 9], [7, 8, 7, 8, 7, 8, 7]], 6
    options: dict[str, Any] = {"seeds": [5, 6], "max_new_tokens": new, "temperature": 0.4}
    waiting = engine.generate(prompts, policy=POLICIES[policy], **options)
    with torch.inference_mode():
        engine.fused = FusedWeights(engine.decoder)
    engine.workspace.cache = None
    plain = engine.generate(prompts, speculation=False, **options)
    kinds = []
    launch = Rounds.launch
    monkeypatch.setattr(Rounds, "launch", lambda own, kind, *rest: (kinds.append(kind), launch(own, kind, *rest))[1])
    outs = engine.generate(prompts, policy=POLICIES[policy], **options)
    for out, expected, own in zip(outs, plain, waiting, strict=True):
        assert_same_output(out, expected)
        assert out.token_ids == own.token_ids
        assert (out.stats.num_drafted, out.stats.num_accepted) == (own.stats.num_drafted, own.stats.num_accepted)
        assert out.stats.tokens_by_exit == own.stats.tokens_by_exit and out.exit_layers == own.exit_layers
    assert sum(out.stats.num_accepted for out in outs) > 0
    kind = {"chain": "text", "tree": "given"}.get(policy, "both")
    assert kind in kinds and set(kinds) <= {kind, "plain"}
    alone = {"policy": POLICIES[policy], "max_new_tokens": new, "temperature": 0.4}
    if policy != "chain":
        return
    events = [[*engine.stream(ids, seed=s, **alone)] for ids, s in zip(prompts, (5, 6), strict=True)]
    for own, expected in zip(events, plain, strict=True):
        assert [event.token_id for event in own] == expected.token_ids
    drafted = [event for own in events for event in own if event.drafted and event.exit_layer == FROM_TEXT]
    assert drafted and all(event.entropy is None for event in drafted)


@pytest.mark.interpreter
@pytest.mark.hazard(6, 24)
@pytest.mark.parametrize("heads", ["none", "recurrent"])
def test_sources_by_turns_on_the_device(
    heads: str, engine_of: Callable, stateful: Callable, assert_same_output: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds of the text, of heads, of both and plain ones, each of which the others must hear of; more requests in the
    same rounds. Planted bugs: a text that takes in nothing of plain rounds, or a head nothing of the text's, drafts
    other trees than the host's; heads' nodes that keep the text's mark."""
    engine = engine_of(num_layers=2 if heads == "none" else 4, max_context=200)
    engine.policy = from_text()
    if heads == "recurrent":
        stateful(engine, "recurrent", prompts=PROMPTS)
        engine.policy = replace(fixed_exit(0, 2), lookup=TEXT)
    prompts = PROMPTS if heads == "none" else PROMPTS[:2]
    options: dict[str, Any] = {"max_new_tokens": 16 if heads == "none" else 12, "temperature": 0.4, "seed": 3}

    def by_turns(ids: list[int]) -> Any:
        engine._paces = {(1, on_device, False, False): Turns(plain_ms=1e9) for on_device in (False, True)}
        return engine.generate(ids, lookup=True, **options)

    waiting = [by_turns(ids) for ids in prompts]
    with torch.inference_mode():
        engine.fused = FusedWeights(engine.decoder)
    engine.workspace.cache = None
    plain = [engine.generate(ids, speculation=False, **options) for ids in prompts]
    kinds = set()
    launch = Rounds.launch

    def launched(own: Rounds, kind: Any, *rest: Any) -> Any:
        kinds.add(kind)
        if kind == "draft":  # any round of the text may have left its mark
            own.exits.fill_(FROM_TEXT)
        return launch(own, kind, *rest)

    monkeypatch.setattr(Rounds, "launch", launched)
    outs = [by_turns(ids) for ids in prompts]
    for out, expected, own in zip(outs, plain, waiting, strict=True):
        assert_same_output(out, expected)
        assert (out.stats.num_drafted, out.stats.num_accepted) == (own.stats.num_drafted, own.stats.num_accepted)
        assert out.stats.tokens_by_exit == own.stats.tokens_by_exit
    assert sum(out.stats.num_accepted for out in outs) > 0
    assert kinds == ({"plain", "text"} if heads == "none" else {"plain", "text", "draft", "both"})
    assert len({key for key in engine.workspace.rounds if key[3] is not None}) == 1


def test_pairs_that_wait_are_taken_in_before_a_head_drafts() -> None:
    """A round of the text may commit 16 tokens; a drafting round finds 16 pairs at most, and the ring holds all."""

    class Waiting:
        draft = RecurrentDraft.__new__(RecurrentDraft)
        pairs, most = 0, 0

        def replay(self, kind: str) -> None:
            assert kind == "absorb"
            self.pairs = max(0, self.pairs - 16)

        def launch(self, kind: str, depth: int | None = None) -> None:
            assert kind not in BY_HEADS or self.pairs <= 16
            self.pairs = 16 if kind in BY_HEADS else self.pairs + (1 if kind == "plain" else 16)
            self.most = max(self.most, self.pairs)

    rounds = Waiting()
    queue, rng = _Queue(rounds, deque(), 0), random.Random(1)  # type: ignore[arg-type]
    for _ in range(3000):
        queue.launch(rng.choice(["plain", "plain", "text", "draft", "both"]))
    assert 32 < rounds.most <= RING


class Turns(Pace):
    """Text, heads, both and neither by turns."""

    def next(self, policy: DraftPolicy) -> DraftPolicy:
        super().next(policy)
        self.turn = getattr(self, "turn", 0) + 1
        return policy.without([(), ("text",), ("heads",), ("text", "heads")][self.turn % 4])


@pytest.mark.hazard(6, 24)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("heads", ["none", "recurrent"])
def test_the_default_is_plain_decoding_whatever_the_pace_says(
    heads: str, sampling: dict[str, Any], engine_of: Callable, stateful: Callable, assert_same_output: Callable
) -> None:
    """Batches of 1 and 3, a stream, a stop string; no rounds drafted, some, all. Planted bug: a paused head's memory
    that is not kept up changes drafts and no token; a text index that misses the rounds of other sources raises."""
    engine = engine_of() if heads == "none" else engine_with_heads(engine_of, stateful)
    engine.policy = _default_policy(engine.heads, fused=False)
    assert engine.policy.sources == (("text",) if heads == "none" else ("text", "heads"))
    fused = _default_policy(engine.heads, fused=True)
    assert fused.sources == engine.policy.sources and fused.lookup == (WHOLE if heads == "none" else BESIDE)
    assert _default_policy(engine.heads, fused=True, batch=8).lookup is None
    long = _default_policy(engine.heads, fused=True, context=LONG)  # rounds of four rows
    assert long.lookup == replace(WHOLE, min_match=1 if heads == "none" else 3, max_nodes=3) and not long.beam
    assert not long.exits or long.max_depth == 3
    options: dict[str, Any] = {"max_new_tokens": 40, **sampling}
    plain = [engine.generate(p, seed=s, speculation=False, **options) for p, s in zip(PROMPTS, (5, 6, 7), strict=True)]
    for pace in (Pace(), Turns(), Pace(plain_ms=1e9)):
        engine._paces = {(1, False, False, False): pace, (3, False, False, False): pace}
        together = engine.generate(PROMPTS, seeds=[5, 6, 7], **options)
        alone = [engine.generate(p, seed=s, **options) for p, s in zip(PROMPTS, (5, 6, 7), strict=True)]
        for out, expected in zip([*together, *alone], [*plain, *plain], strict=True):
            assert_same_output(out, expected)
        events = list(engine.stream(PROMPTS[0], seed=5, **options))
        assert [event.token_id for event in events] == plain[0].token_ids
    assert FROM_TEXT in {layer for out in together for layer in out.stats.tokens_by_exit}
    assert any(event.drafted and event.exit_layer == FROM_TEXT and event.entropy is None for event in events)


@pytest.mark.hazard(6, 24)
def test_lengths_that_move_while_running_change_no_token(
    engine_of: Callable, stateful: Callable, assert_same_output: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug: a head's memory with room for the planned length alone."""
    engine = engine_with_heads(engine_of, stateful)
    engine.policy = replace(fixed_exit(0, 1), lookup=TEXT)
    rungs = {n: Expected(1.0 + n, n, 10.0 + n) for n in range(1, 7)}
    monkeypatch.setattr(Ladder, "next", property(lambda ladder: 1 + ladder.rounds % 6))
    plain = engine.generate(PROMPTS[1], seed=6, speculation=False, max_new_tokens=80)
    engine._paces = {(1, False, False, False): Pace(plain_ms=1e9, ladder=Ladder(rungs))}
    out = engine.generate(PROMPTS[1], seed=6, max_new_tokens=80)
    assert_same_output(out, plain)
    assert set(out.stats.rounds_by_drafted) >= {1, 2, 3, 4} and 0 in out.stats.tokens_by_exit


def test_stop_strings_cut_drafts_from_the_text(tiny_folder: Any, assert_same_output: Callable) -> None:
    tiny_engine = load(tiny_folder, heads=None, dtype=torch.float32, device="cpu", progress=False)
    text = "one two three one two three one two"
    whole = tiny_engine.generate(text, speculation=False, max_new_tokens=32)
    for start in (4, 9, 14):
        stop = whole.text[start : start + 3]
        options: dict[str, Any] = {"max_new_tokens": 32, "stop": stop}
        plain = tiny_engine.generate(text, speculation=False, **options)
        assert_same_output(tiny_engine.generate(text, speculation="always", **options), plain)
        assert_same_output(tiny_engine.generate(text, lookup=True, **options), plain)
    assert tiny_engine.generate(text, speculation="always", max_new_tokens=32).stats.num_drafted > 0


def test_lookup_is_an_option_of_a_request(engine_of: Callable, stateful: Callable) -> None:
    """With a policy or without one; it may also be taken out."""
    engine = engine_with_heads(engine_of, stateful)
    engine.policy, sources = fixed_exit(0, 2), set()
    engine.observer = lambda on, works, logits: sources.update(x for w in works for x in w.tree.exit_layers[1:])
    options: dict[str, Any] = {"max_new_tokens": NEW, "speculation": "always"}
    for lookup, policy, expected in (
        (None, None, {0}),
        (True, None, {0, FROM_TEXT}),
        (True, fixed_exit(0, 2), {0, FROM_TEXT}),
        (False, replace(fixed_exit(0, 2), lookup=TEXT), {0}),
        (False, from_text(1), set()),
    ):
        sources.clear()
        engine.generate(PROMPTS[1], lookup=lookup, policy=policy, **options)
        assert sources == expected
    for refused in ({"mode": "early_exit"}, {"speculation": False}):
        with pytest.raises(ValueError, match="lookup drafts"):
            engine.generate(PROMPTS[2], lookup=True, **refused)
