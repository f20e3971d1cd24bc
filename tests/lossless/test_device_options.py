"""Rounds on the device, everything around them: options, ends of outputs, streams, faults, batches, bits.

Drafts are hung by the test (`drafting`): right tokens behind wrong siblings, wrong ones where it says so, so acceptance
is planned although no head is trained. Without a GPU the rounds run kernel by kernel in Triton's interpreter, on a
model of one layer and for few tokens, because a step takes most of a second there; what needs more is left to a GPU.
There they are captured graphs, in bf16, and a trained head drafts on the device, too.

Planted bugs that these tests were seen to catch: exit layers and refused nodes of the host's trees lost, a sequence not
dropped after a stop string or a closed stream, the end one token early or late, no minimum before stop ids, the first
row's seed for all, penalties blind to a row's own path or to committed tokens, a bonus kept where none could be drawn,
times with a slow reader's or a prompt's in them, a child accepted that is not the target's, accepted keys left in
place, attention along slots instead of paths, two rounds' records in one slot, memories fed another token's embedding.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from skipstone.engine import device_loop, loop, workspace
from skipstone.engine import engine as engine_module
from skipstone.engine.cache import KVCache, plan_cache
from skipstone.engine.device_state import fill
from skipstone.engine.forward import prefill
from skipstone.engine.fused import FusedStep, FusedWeights
from skipstone.engine.gate import PLAIN, Gate, best_first, every, fixed_exit
from skipstone.engine.graphs import AHEAD, Rounds, Ticket
from skipstone.engine.tree import DraftTree
from skipstone.kernels.accept import END, STOP
from skipstone.kernels.embed_rows import lay_rows
from skipstone.kernels.grow_tree import Trees
from skipstone.kernels.lm_head import lm_head
from skipstone.kernels.noise import derive_seed

ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.triton
on_gpu_only = pytest.mark.skipif(not ON_GPU, reason="needs a GPU: minutes in Triton's interpreter")
PROMPT = [4, 9, 2]
PROMPTS = [PROMPT, list(range(5, 24))]
NEW = 24 if ON_GPU else 4
CHAIN = fixed_exit(1, 3)
SHORT = 200  # a context for which attention launches few programs that leave at once


class Spelling:
    """A tokenizer whose text is the ids: "<4><9><2>"."""

    stop_ids = ()

    def detokenizer(self) -> Any:
        return self

    def feed(self, token_id: int) -> str:
        return f"<{token_id}>"

    def flush(self) -> str:
        return ""


class HungHeads:
    """Stands in for a head set with one head, at exit 1, that is never asked."""

    exits, heads, draft_ids, calibration = (1,), {1: None}, None, None


@pytest.fixture
def engine(engine_of: Callable) -> Any:
    """Rounds on the device, of the tiny Llama in fp32: there the waiting loop, whose sums are others, writes the same
    tokens. Without a GPU of its first layer."""
    return on_device(engine_of(device="cuda") if ON_GPU else engine_of(num_layers=1, max_context=SHORT))


@pytest.fixture
def half(engine_of: Callable) -> Any:
    """The same in bf16, where bits are few and ties near: for what compares the device with itself."""
    return on_device(
        engine_of(dtype=torch.bfloat16, device="cuda") if ON_GPU else engine_of(num_layers=1, max_context=SHORT)
    )


def on_device(engine: Any, wanted: bool = True) -> Any:
    with torch.inference_mode():
        engine.fused = FusedWeights(engine.decoder) if wanted else None
    engine.workspace.cache, engine.workspace.rounds, engine.workspace.memories = None, {}, {}
    engine.tokenizer, engine.heads = Spelling(), HungHeads()
    return engine


def plainly(engine: Any, prompts: Any, **options: Any) -> Any:
    return engine.generate(prompts, speculation=False, **{"max_new_tokens": NEW, **options})


def waiting(engine: Any, prompts: Any, **options: Any) -> Any:
    """Plainly, by the loop that waits for every round."""
    fused, engine.fused = engine.fused, None
    try:
        return plainly(engine, prompts, **options)
    finally:
        engine.fused = fused


@pytest.fixture
def drafting(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`drafting(outputs, wrong=(), siblings=0)`: from now on drafts are what `outputs` say, plain `Generation`s in the
    order of the batch, but wrong at these new tokens; each node gets so many wrong siblings before it. The gate is
    said to have refused one node a round."""

    def plan(outputs: Sequence[Any], wrong: Sequence[int] = (), siblings: int = 0) -> None:
        texts = [out.prompt_ids + out.token_ids for out in outputs]

        def draft(decoder, cache, rows, heads, policy, *rest):  # type: ignore[no-untyped-def]
            for row in rows:
                tree, text = row.work.tree, texts[row.work.sequence]
                node, num_prompt = 0, len(outputs[row.work.sequence].prompt_ids)
                for depth in range(1, 1 + min(policy.max_depth, row.max_depth)):
                    position = row.work.base + depth
                    token = text[position] if position < len(text) else 0
                    if position - num_prompt in wrong:
                        token = (token + 7) % decoder.config.vocab_size
                    for i in range(siblings):
                        if len(tree) < policy.max_nodes:
                            tree.add(node, (token + 1 + i) % decoder.config.vocab_size, exit_layer=1, entropy=0.25)
                    if len(tree) > policy.max_nodes:
                        break
                    node = tree.add(node, token, exit_layer=1, entropy=0.5)
                row.work.embed_new(decoder)
            return [1] * len(rows)

        monkeypatch.setattr(loop, "draft", draft)

    return plan


# ---- options

SAMPLED = {"temperature": 0.8, "seed": 3}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": SAMPLED,
    "hot, 64 bits of seed": {"temperature": 1.5, "seed": 2**64 - 1},
    "top_k": {**SAMPLED, "top_k": 5},
    "top_k beyond 32 bits": {**SAMPLED, "top_k": 2**40},
    "top_p": {**SAMPLED, "top_p": 0.7},
    "min_p": {**SAMPLED, "min_p": 0.1},
    "all filters": {**SAMPLED, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    "repetition": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 1.5},
    "frequency": {**SAMPLED, "frequency_penalty": 0.9},
    "repeats": {"logit_bias": {7: 9.0, 8: 8.0, 9: 7.0}, "frequency_penalty": 0.8, "presence_penalty": 0.1},
    "bias": {"logit_bias": {3: 3.0, 5: -math.inf, 7: 2.0}},
    "one": {"max_new_tokens": 1},
    "none": {"max_new_tokens": 0},
}
IN_INTERPRETER = ("greedy", "temperature", "top_k beyond 32 bits", "all filters", "repeats", "one", "none")


@pytest.mark.hazard(10, 11)
@pytest.mark.parametrize("name", [n if n in IN_INTERPRETER else pytest.param(n, marks=on_gpu_only) for n in OPTIONS])
def test_option(name: str, engine: Any, half: Any, drafting: Callable, assert_same_output: Callable) -> None:
    options = OPTIONS[name]
    plain = plainly(engine, PROMPT, **options)
    if not options.get("temperature"):
        assert_same_output(plain, waiting(engine, PROMPT, **options))
    elif not ON_GPU:  # in fp32 no token stands on an edge here
        assert plain.token_ids == waiting(engine, PROMPT, **options).token_ids
    for own in (engine, half) if ON_GPU else (engine,):
        plain, accepted = plainly(own, PROMPT, **options), 0
        for siblings, policy in ((0, CHAIN), (2, every((1,), Gate(0.3, 99.0), branch=3, max_depth=3, max_nodes=7))):
            if siblings and not ON_GPU and name != "repeats":
                continue
            drafting([plain], wrong=[6], siblings=siblings)
            out = own.generate(PROMPT, policy=policy, **{"max_new_tokens": NEW, **options})
            assert_same_output(out, plain)
            accepted += out.stats.num_accepted
        assert accepted > 0 or len(plain.token_ids) < 2
        assert own.workspace.rounds or not plain.token_ids, "the device must have run"


@pytest.mark.hazard(10)
def test_bans_within_a_block(engine: Any, drafting: Callable, assert_same_output: Callable) -> None:
    """Bad words of one token, and stop ids under a minimum, where a block of drafts covers them; the prompt's tokens
    count for repetition only."""
    free = waiting(engine, PROMPT, max_new_tokens=NEW).token_ids
    every_ban = [
        {"bad_words": [[free[1]], [free[3]]]},
        {"stop_ids": [free[2]], "min_new_tokens": NEW - 1},
        {"stop_ids": [free[1], free[2]], "min_new_tokens": 3, **SAMPLED},
    ]
    for options in every_ban if ON_GPU else every_ban[:2]:
        plain = plainly(engine, PROMPT, **options)
        assert plain.token_ids != free
        if "temperature" not in options:
            assert_same_output(plain, waiting(engine, PROMPT, **options))
        drafting([plain])
        assert_same_output(engine.generate(PROMPT, policy=CHAIN, max_new_tokens=NEW, **options), plain)


@pytest.mark.hazard(24)
def test_seeds_and_return_sequences(half: Any, drafting: Callable, assert_same_output: Callable) -> None:
    """Each output alone with its seed, together, and drafted together."""
    options = {"temperature": 1.0, "max_new_tokens": NEW if ON_GPU else 3}
    prompts = [PROMPT, [8]]
    plain = plainly(half, prompts, num_return_sequences=2, seed=7, **options)
    assert plain[0].token_ids != plain[1].token_ids
    drafting(plain, wrong=[2])
    outs = half.generate(prompts, num_return_sequences=2, seed=7, policy=CHAIN, **options)
    for out, expected in zip(outs, plain, strict=True):
        assert_same_output(out, expected)
    alone = plainly(half, [8], seed=derive_seed(7, 3), **options)
    assert alone.token_ids == plain[3].token_ids


def never_twice(prefix: list[int], logits: torch.Tensor) -> torch.Tensor:
    logits[prefix[-1]] = -math.inf
    return logits


@pytest.mark.hazard(10, 12)
def test_what_needs_the_host_goes_there(engine: Any, assert_same_output: Callable) -> None:
    for options in (
        {"logits_processor": never_twice},
        {"logprobs": 2},
        {"bad_words": [[7, 8], [3]]},
        {"stop_ids": list(range(100, 117)), "min_new_tokens": 2},
    ):
        assert_same_output(plainly(engine, PROMPT, **options), waiting(engine, PROMPT, **options))
        assert not engine.workspace.rounds, options


def test_the_two_ways_can_be_mixed(engine: Any, assert_same_output: Callable) -> None:
    """Requests on the device, by the host and on the device again share a cache and nothing else."""
    before = plainly(engine, PROMPTS[1], max_new_tokens=2)
    plainly(engine, PROMPT, max_new_tokens=2, logprobs=0)
    assert_same_output(plainly(engine, PROMPTS[1], max_new_tokens=2), before)


def test_verify_lossless_compares_like_with_like(engine: Any, drafting: Callable, monkeypatch: Any) -> None:
    """Both sides on the device: its bits are not the waiting loop's, whose log-probabilities are asked for only when
    there is a margin to report."""
    plain = plainly(engine, PROMPT, max_new_tokens=3)
    drafting([plain])
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "decode", lambda *_: pytest.fail("the waiting loop was asked"))
        report = engine.verify_lossless(PROMPT, policy=CHAIN, max_new_tokens=3)
    assert report.equal and report.plain.token_ids == plain.token_ids
    original, calls = device_loop._commit, []

    def lying(on: Any, request: Any, record: Any) -> Any:
        calls.append(record)
        token = record.tokens[-1] if len(calls) > 1 else 11
        return original(on, request, dataclasses.replace(record, tokens=(*record.tokens[:-1], token)))

    monkeypatch.setattr(device_loop, "_commit", lying)
    report = engine.verify_lossless(PROMPT, policy=fixed_exit(1, 1), max_new_tokens=1)
    assert report.divergence == 0 and report.margin is not None and report.margin > 0


# ---- ends of outputs


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """What the host reads, round by round, by sequence."""
    seen: list[list[Any]] = []
    original = Ticket.wait

    def wait(ticket: Ticket) -> Any:
        own, elapsed = original(ticket)
        seen.append(own)
        return own, elapsed

    monkeypatch.setattr(Ticket, "wait", wait)
    return seen


@pytest.mark.hazard(1)
def test_stop_id_at_each_place_of_a_block_and_as_bonus(
    engine: Any, drafting: Callable, assert_same_output: Callable
) -> None:
    """Blocks of four: accepted places 0..2, the bonus, and the block after it on a GPU."""
    free = waiting(engine, PROMPT, max_new_tokens=max(NEW, 5))
    drafting([free])
    for end in range(9 if ON_GPU else 4):
        assert free.token_ids[end] not in free.token_ids[:end], "else another prompt is needed"
        options = {"max_new_tokens": 12, "stop_ids": [free.token_ids[end]]}
        out = engine.generate(PROMPT, policy=CHAIN, **options)
        assert out.token_ids == free.token_ids[: end + 1] and out.finish_reason == "stop"
        assert out.stats.num_committed == len(out.token_ids) == len(out.exit_layers)
        assert out.stats.num_verifications == end // 4 + 1
        if ON_GPU or end == 1:
            assert_same_output(out, plainly(engine, PROMPT, **options))


@pytest.mark.hazard(2)
def test_stop_id_and_budget_in_one_block(engine: Any, drafting: Callable, records: list) -> None:
    free = waiting(engine, PROMPT, max_new_tokens=5)
    drafting([free])
    for budget in range(1, 5):
        out = engine.generate(PROMPT, policy=CHAIN, max_new_tokens=budget, stop_ids=[free.token_ids[2]])
        assert out.finish_reason == ("stop" if budget > 2 else "length")
        assert out.token_ids == free.token_ids[: min(budget, 3)]
        assert out.stats.num_drafted <= max(0, budget - 1), "a token beyond the budget is never drafted"
        assert records[-1][0].status == (STOP if budget > 2 else END), "the device has seen the end by itself"


@pytest.mark.hazard(3, 13)
@pytest.mark.parametrize("at", [0, 1, 2, pytest.param(9, marks=on_gpu_only)])
def test_stop_string_in_mid_block_and_across_blocks(
    at: int, engine: Any, drafting: Callable, assert_same_output: Callable, records: list
) -> None:
    """The string spans two tokens; the device goes on for a round and what it makes is dropped, the mate's output is
    whole."""
    new = 12 if ON_GPU else 5
    plain = waiting(engine, PROMPTS, max_new_tokens=new)
    first, second = (plain[0].token_ids[at + i] for i in range(2))
    options = {"max_new_tokens": new, "stop": f"{first}><{second}"}
    expected = waiting(engine, PROMPTS, **options)
    assert (
        expected[0].finish_reason == "stop"
        and expected[0].text == "".join(f"<{token}>" for token in plain[0].token_ids[:at]) + "<"
    )
    assert expected[1].token_ids == plain[1].token_ids
    drafting(plain, wrong=[1])
    for out, wanted in zip(engine.generate(PROMPTS, policy=CHAIN, **options), expected, strict=True):
        assert_same_output(out, wanted)
    records.clear()
    for out, wanted in zip(plainly(engine, PROMPTS, **options), expected, strict=True):
        assert_same_output(out, wanted)
    rounds_of_it = [own[0] is not None for own in records]
    assert rounds_of_it == [n < at + 1 + AHEAD for n in range(new)], "the device was told"
    stream = engine.stream(PROMPT, policy=CHAIN, **options)
    events = list(stream)
    assert [event.token_id for event in events] == expected[0].token_ids
    assert "".join(event.text for event in events) == expected[0].text == stream.result.text


@pytest.mark.hazard(5)
@pytest.mark.parametrize("size", [14, 18, 19, 20] if not ON_GPU else list(range(13, 21)))
def test_end_of_the_context(size: int, engine: Any, drafting: Callable, assert_same_output: Callable) -> None:
    """Prompts up to the whole context: drafts are clipped, nothing at all is legal."""
    engine.decoder.config = dataclasses.replace(engine.decoder.config, max_context=20)
    on_device(engine)
    prompt = [(5 * i + 1) % 199 for i in range(size)]
    expected = waiting(engine, prompt, max_new_tokens=50)
    assert len(expected.token_ids) == 20 - size and expected.finish_reason == "context"
    drafting([expected])
    assert_same_output(engine.generate(prompt, policy=fixed_exit(1, 4), max_new_tokens=50), expected)
    if ON_GPU:
        assert_same_output(plainly(engine, prompt, max_new_tokens=50), expected)


# ---- streams, statistics, times


def launched(monkeypatch: Any) -> list[str]:
    """Kinds of the rounds launched from now on."""
    kinds: list[str] = []
    original = Rounds.launch

    def launch(rounds: Rounds, kind: Any, depth: int | None = None) -> Ticket:
        kinds.append(kind)
        return original(rounds, kind, depth)

    monkeypatch.setattr(Rounds, "launch", launch)
    return kinds


def test_a_closed_stream_takes_effect_within_two_rounds(
    engine: Any, assert_same_output: Callable, monkeypatch: Any
) -> None:
    expected = waiting(engine, PROMPT)
    kinds = launched(monkeypatch)
    with engine.stream(PROMPT, speculation=False, max_new_tokens=100) as stream:
        events = [next(stream), next(stream)]
        rounds = next(iter(engine.workspace.rounds.values()))
        assert bool(rounds.sequences.active[0]) and len(kinds) <= len(events) + AHEAD
        before = len(kinds)
    assert len(kinds) == before and not bool(rounds.sequences.active[0])
    assert [event.token_id for event in events] == expected.token_ids[:2] == stream.result.token_ids
    assert stream.result.finish_reason == "cancelled"
    assert_same_output(plainly(engine, PROMPT), expected)


def observed(engine: Any, fused: Any, prompts: Any, policy: Any, new: int) -> tuple[Any, Any]:
    """Generations, and on a GPU (they cost rounds) the first prompt's events."""
    engine.fused = fused
    outs = engine.generate(prompts, policy=policy, max_new_tokens=new)
    return outs, list(engine.stream(prompts[0], policy=policy, max_new_tokens=new)) if ON_GPU else None


@pytest.mark.hazard(4)
def test_statistics_are_those_of_the_waiting_loop(engine: Any, drafting: Callable) -> None:
    """For the same trees: all counts, and what events say of each token."""
    new = 13 if ON_GPU else 6
    prompts = PROMPTS if ON_GPU else [PROMPT]
    plain = waiting(engine, prompts, max_new_tokens=new)
    drafting(plain, wrong=[2], siblings=1)
    policy = every((1,), Gate(0.0, 9.0), branch=2, max_depth=3, max_nodes=7)
    fused = engine.fused
    slow_outs, slow_events = observed(engine, None, prompts, policy, new)
    fast_outs, fast_events = observed(engine, fused, prompts, policy, new)
    assert engine.workspace.rounds, "the device must have run"
    for slow, fast in zip(slow_outs, fast_outs, strict=True):
        assert fast.exit_layers == slow.exit_layers
        for field in dataclasses.fields(slow.stats):
            if not field.name.endswith("_ms"):
                assert getattr(fast.stats, field.name) == getattr(slow.stats, field.name), field.name
        assert fast.stats.tokens_by_exit[1] > 0
        assert 0 < fast.stats.gate_stops <= fast.stats.num_verifications
    assert fast_events == slow_events


@pytest.mark.hazard(4)
@pytest.mark.parametrize(
    "policy",
    [every((0,), Gate(3.3, 3.3), branch=1, max_depth=2), best_first(2, 2, 2, 5, 3.3)],
    ids=["chain", "best first"],
)
def test_refused_nodes_are_counted_as_the_host_does(
    policy: Any, engine_of: Callable, stateful_of_one_layer: Callable
) -> None:
    """A head drafts on the device, and its gate refuses some nodes, not all."""
    engine = on_device(engine_of(num_layers=1, max_context=SHORT, device="cuda" if ON_GPU else "cpu"))
    stateful_of_one_layer(engine)
    new, stats = 3, []
    for fused in (None, engine.fused):
        engine.fused = fused
        stats.append(engine.generate(PROMPT, policy=policy, max_new_tokens=new).stats)
    assert stats[1].gate_stops == stats[0].gate_stops > 0
    for name in ("num_drafted", "num_accepted", "num_verifications", "drafted_by_position", "num_row_layers"):
        assert getattr(stats[1], name) == getattr(stats[0], name), name
    assert stats[1].num_drafted > 0, "the gate must not refuse all"


@pytest.fixture
def stateful_of_one_layer() -> Callable:
    """A random recurrent head that reads the first layer, set on the engine."""
    from skipstone.heads import HeadSet, HeadSetConfig, HeadSpec, Projection, layer_options

    def build(engine: Any) -> None:
        config, decoder = engine.decoder.config, engine.decoder
        sizes = layer_options(config.num_heads, config.num_kv_heads, config.head_dim, 64, 1e4, False)
        spec = HeadSpec("recurrent", 0, {**sizes, "taps": (1,)})
        torch.manual_seed(0)
        heads = HeadSet(HeadSetConfig(config.hidden_size, config.vocab_size, config.num_layers, (spec,)))
        with torch.inference_mode():
            engine.heads = heads.attach(Projection(decoder.final_norm, decoder.head_weight, config.logit_softcap))

    return build


def test_a_tree_of_the_host_feeds_the_head_at_exit_0(
    engine_of: Callable, stateful_of_one_layer: Callable, drafting: Callable
) -> None:
    """Its memory reads layer 0, too, which no round keeps: the embeddings of the accepted path."""
    engine = on_device(engine_of(num_layers=1, max_context=SHORT, device="cuda" if ON_GPU else "cpu"))
    plain = waiting(engine, PROMPT, max_new_tokens=3)
    stateful_of_one_layer(engine)
    policy = every((0,), Gate(0.3, 99.0), branch=2, max_depth=2, max_nodes=3)
    stats = []
    for fused in (None, engine.fused):
        engine.fused = fused
        out = engine.generate(PROMPT, policy=policy, max_new_tokens=3)
        assert out.token_ids == plain.token_ids
        stats.append((out.stats.num_drafted, out.stats.accepted_by_position))
    assert stats[0] == stats[1] and stats[0][0] > 0
    drafting([plain])
    out = engine.generate(PROMPT, policy=policy, max_new_tokens=3)
    assert out.token_ids == plain.token_ids and out.stats.num_accepted == 2
    memory, known = engine.workspace.memories[0], PROMPT + plain.token_ids[:2]
    assert memory.length(0) == len(known)
    embedded = engine.decoder.embed(torch.tensor(known, device=engine.decoder.device))
    assert torch.equal(memory._states[0][0, 1 : 1 + len(known)], embedded)


def test_times_leave_out_prompts_and_slow_readers(engine: Any, monkeypatch: Any) -> None:
    (before,) = plainly(engine, [PROMPT], max_new_tokens=3)  # kernels are compiled
    # a reader counts as slow who takes longer than a round, and rounds take what other programs leave
    pause = max(0.3, 4e-3 * before.stats.decode_ms / before.stats.num_verifications)
    original = loop.prefill

    def slow(*args: Any) -> Any:
        time.sleep(pause)
        return original(*args)

    monkeypatch.setattr(loop, "prefill", slow)
    start = time.perf_counter()
    stream = engine.stream(PROMPT, speculation=False, max_new_tokens=5)
    for event in stream:
        if event.token_id is not None and stream.result is None:
            time.sleep(pause)
    wall = 1e3 * (time.perf_counter() - start)
    stats = stream.result.stats
    assert stats.prefill_ms >= 1e3 * pause
    assert 0 < stats.decode_ms <= wall - 1e3 * pause * (1 + 4)


# ---- faults


@pytest.mark.hazard(14)
def test_nan_ends_its_request_alone(engine: Any, drafting: Callable, assert_same_output: Callable) -> None:
    """The embedding of one prompt's token is NaN: an error for it, the same output as ever for its mate, and nothing
    left in the slots for the next one."""
    new = NEW if ON_GPU else 2
    expected = plainly(engine, PROMPTS, max_new_tokens=new)
    bad = torch.full_like(engine.decoder.embedding[:1], math.nan)
    whole = engine.decoder.embedding
    token = next(i for i in PROMPT if i not in PROMPTS[1] + expected[1].token_ids)
    try:
        engine.decoder.embedding = torch.cat([whole[:token], bad, whole[token + 1 :]])
        engine.workspace.rounds = {}
        drafting(expected)
        for options in ({"speculation": False}, {"policy": CHAIN}):
            failed, fine = engine.generate(PROMPTS, max_new_tokens=new, **options)
            assert failed.finish_reason == "error" and "NaN" in failed.error and failed.token_ids == []
            assert_same_output(fine, expected[1])
    finally:
        engine.decoder.embedding, engine.workspace.rounds = whole, {}
    for out, wanted in zip(plainly(engine, PROMPTS, max_new_tokens=new), expected, strict=True):
        assert_same_output(out, wanted)


@pytest.mark.hazard(14)
def test_everything_banned_is_an_error(engine: Any) -> None:
    vocab = engine.decoder.config.vocab_size
    out = plainly(engine, PROMPT, logit_bias=dict.fromkeys(range(vocab), -math.inf))
    assert out.finish_reason == "error" and out.error and out.token_ids == [] and out.stats.num_committed == 0


PHASES: Mapping[str, tuple[Any, str]] = {
    "prompt": (loop, "prefill"),
    "start": (Rounds, "begin"),
    "draft": (loop, "draft"),
    "launch": (Rounds, "launch"),
    "wait": (Ticket, "wait"),
    "commit": (device_loop, "_commit"),
}


@pytest.mark.hazard(16)
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("phase", PHASES)
def test_interrupt_then_parity(
    phase: str, error: type, engine: Any, drafting: Callable, assert_same_output: Callable
) -> None:
    if not ON_GPU and (error is ValueError) != (phase in ("draft", "commit")):
        pytest.skip("half of them are enough in the interpreter")
    expected = waiting(engine, PROMPT, max_new_tokens=4)
    drafting([expected], wrong=[0, 1, 2])
    owner, name = PHASES[phase]
    original, calls = getattr(owner, name), []

    def broken(*args: Any) -> Any:
        calls.append(name)
        if len(calls) == (1 if phase in ("prompt", "start") else 2):
            raise error("broken off")
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, broken)
        with pytest.raises(error, match="broken off"):
            engine.generate(PROMPT, policy=CHAIN, max_new_tokens=4)
    assert not engine._lock.locked() and not any(
        bool(r.sequences.active.any()) for r in engine.workspace.rounds.values()
    )
    drafting([expected])
    assert_same_output(engine.generate(PROMPT, policy=CHAIN, max_new_tokens=4), expected)


def test_a_sequence_that_only_the_device_ended_is_an_error_of_its_own(
    engine: Any, assert_same_output: Callable, monkeypatch: Any
) -> None:
    expected = plainly(engine, PROMPTS, max_new_tokens=3)
    original = Ticket.wait
    for lost in (None, {"status": END}):

        def wait(ticket: Ticket, lost: Any = lost) -> Any:
            records, elapsed = original(ticket)
            if records[0] is not None:
                records[0] = None if lost is None else dataclasses.replace(records[0], **lost)
            return records, elapsed

        monkeypatch.setattr(Ticket, "wait", wait)
        out, mate = plainly(engine, PROMPTS, max_new_tokens=3)
        assert out.finish_reason == "error" and "the device ended" in out.error
        assert out.stats.num_committed == len(out.token_ids) == (0 if lost is None else 1)
        assert_same_output(mate, expected[1])


class NoRoom(Rounds):
    """Rounds for whose drafts, or for which at all, there is no memory."""

    plain_fits = True

    def __init__(self, *args: Any, width: int, **options: Any) -> None:
        if width > 1 or not self.plain_fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        super().__init__(*args, width=width, **options)


@pytest.mark.hazard(26)
def test_no_memory_for_rounds(engine: Any, drafting: Callable, assert_same_output: Callable, monkeypatch: Any) -> None:
    """Without drafts then, and if that does not fit either, the arithmetic; afterwards all is as before."""
    expected = waiting(engine, PROMPT)
    drafting([expected])
    with monkeypatch.context() as patch:
        patch.setattr(workspace, "Rounds", NoRoom)
        out = engine.generate(PROMPT, policy=CHAIN, max_new_tokens=NEW)
        assert_same_output(out, expected)
        assert out.stats.num_drafted == 0 and out.stats.fallbacks == {"out of memory": 1}
        patch.setattr(NoRoom, "plain_fits", False)
        engine.workspace.rounds = {}
        with pytest.raises(MemoryError, match="KV cache 2 x"):
            engine.generate(PROMPT, policy=CHAIN, max_new_tokens=NEW)
    assert not engine._lock.locked()
    out = engine.generate(PROMPT, policy=CHAIN, max_new_tokens=NEW)
    assert_same_output(out, expected)
    assert out.stats.num_accepted > 0


@pytest.mark.hazard(26)
def test_no_memory_for_the_hosts_drafts(
    engine: Any, drafting: Callable, assert_same_output: Callable, monkeypatch: Any
) -> None:
    """A smaller tree, then none."""
    expected = waiting(engine, PROMPT)
    drafting([expected])
    original = loop.draft
    for limit, fallbacks in ((3, 1), (0, 3)):

        def draft(*args: Any, limit: int = limit) -> Any:
            if args[4].max_nodes > limit:
                raise MemoryError("no memory for so many nodes")
            return original(*args)

        monkeypatch.setattr(loop, "draft", draft)
        out = engine.generate(PROMPT, policy=dataclasses.replace(CHAIN, max_nodes=4), max_new_tokens=NEW)
        assert_same_output(out, expected)
        assert out.stats.fallbacks == {"out of memory": fallbacks}
        assert (out.stats.num_drafted > 0) == (limit > 0)


@pytest.mark.hazard(26)
def test_a_round_that_does_not_start_takes_no_slot_of_the_ring(
    engine: Any, drafting: Callable, assert_same_output: Callable, monkeypatch: Any
) -> None:
    """Seen to fail while the host counted a slot before the round had started: it read the next one's old record."""
    expected = waiting(engine, PROMPT)
    drafting([expected])
    original, failed = Rounds.replay, []

    def replay(rounds: Rounds, kind: Any, depth: int | None = None) -> None:
        if kind == "given" and len(failed) < 2:
            failed.append(kind)
            raise MemoryError("no memory for this round")
        original(rounds, kind, depth)

    monkeypatch.setattr(Rounds, "replay", replay)
    out = engine.generate(PROMPT, policy=dataclasses.replace(CHAIN, max_nodes=4), max_new_tokens=NEW)
    assert_same_output(out, expected)
    assert out.stats.fallbacks == {"out of memory": 2} and out.stats.num_drafted > 0


# ---- batches, graphs, bits


@pytest.mark.hazard(24)
@pytest.mark.parametrize("size", [3, pytest.param(8, marks=on_gpu_only)])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.95}], ids=["greedy", "filtered"])
def test_alone_and_in_a_batch(
    size: int, sampling: dict, half: Any, drafting: Callable, assert_same_output: Callable
) -> None:
    """Prompts of many lengths; the mates end, are rejected and go on at other times."""
    if not ON_GPU and sampling:
        pytest.skip("one of them is enough in the interpreter")
    new = NEW if ON_GPU else 3
    prompts = [
        [(11 * i + 7 * n) % 199 for i in range(length)] for n, length in enumerate((1, 30, 17, 63, 2, 64, 65, 9))
    ]
    prompts, seeds = prompts[:size], list(range(size))
    plain = [plainly(half, ids, seed=n, max_new_tokens=new, **sampling) for n, ids in enumerate(prompts)]
    drafting(plain, wrong=[1, 6, 7])
    for outs in (
        plainly(half, prompts, seeds=seeds, max_new_tokens=new, **sampling),
        half.generate(prompts, seeds=seeds, policy=CHAIN, max_new_tokens=new, **sampling),
    ):
        for out, expected in zip(outs, plain, strict=True):
            assert_same_output(out, expected)
    drafting(plain[::-1], wrong=[1, 2])
    outs = half.generate(prompts[::-1], seeds=seeds[::-1], policy=CHAIN, max_new_tokens=new, **sampling)
    for out, expected in zip(outs[::-1], plain, strict=True):
        assert_same_output(out, expected)


@on_gpu_only
@pytest.mark.hazard(9)
@pytest.mark.parametrize("who", ["host", "head"])
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_graphs_against_eager_calls_after_rejections(
    who: str, sampling: dict, half: Any, drafting: Callable, stateful: Callable, assert_same_output: Callable
) -> None:
    """Tokens, statistics, and the committed keys and values bit for bit."""
    policy = CHAIN
    if who == "head":
        stateful(half, "recurrent", prompts=PROMPTS)
        policy = best_first(4, 4, 4, 15)
    plain = plainly(half, PROMPTS, seeds=[5, 6], **sampling)
    drafting(plain, wrong=range(0, NEW, 3))

    def observe(**options: Any) -> list[Any]:
        outs = half.generate(PROMPTS, seeds=[5, 6], max_new_tokens=NEW, **options, **sampling)
        found = []
        for b, out in enumerate(outs):
            assert_same_output(out, plain[b])
            size = len(out.prompt_ids) + NEW - 1
            kept = [torch.stack(half.workspace.cache.read(layer, b, size)) for layer in range(4)]
            found.append((out.stats.num_drafted, out.stats.accepted_by_position, torch.stack(kept)))
        return found

    captured = observe(policy=policy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rounds, "replay", Rounds._body)
        eager = observe(policy=policy)
        eagerly_plain = observe(speculation=False)
    for one, other, third in zip(captured, eager, eagerly_plain, strict=True):
        assert one[:2] == other[:2] and one[0] > sum(one[1]) > 0
        assert torch.equal(one[2], other[2]) and torch.equal(one[2], third[2])


@on_gpu_only
@pytest.mark.hazard(6, 24)
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_head_drafts_on_the_device(
    sampling: dict, half: Any, stateful: Callable, assert_same_output: Callable
) -> None:
    """Chains and trees in bf16, alone and together, with options that the head does not know."""
    stateful(half, "recurrent", prompts=PROMPTS)
    for options in ({}, {"repetition_penalty": 1.3, "logit_bias": {7: 1.0}}):
        options = {"seeds": [5, 6], "max_new_tokens": 60, **sampling, **options}
        plain = half.generate(PROMPTS, speculation=False, **options)
        for policy in (fixed_exit(0, 3), best_first(4, 4, 4, 15)):
            outs = half.generate(PROMPTS, policy=policy, **options)
            for out, expected in zip(outs, plain, strict=True):
                assert_same_output(out, expected)
            assert sum(out.stats.num_accepted for out in outs) > 0


@on_gpu_only
def test_drafting_pauses_and_resumes(half: Any, stateful: Callable, assert_same_output: Callable) -> None:
    """Rounds of both kinds by turns: pairs wait for the head up to its limit and are taken in late."""
    stateful(half, "recurrent", prompts=PROMPTS)
    plain = plainly(half, PROMPTS, seeds=[5, 6], max_new_tokens=200)

    class Turns:
        paused: frozenset[str] = frozenset()
        ladder, count = None, 0

        def place(self, length: int) -> None: ...

        def next(self, policy: Any) -> Any:
            self.count += 1
            return policy if self.count % 50 in (0, 1, 2) or self.count > 120 else PLAIN

        def round(self, ms: float, committed: float, sources: Any) -> None:
            assert ms > 0 and committed >= 1

    half.policy, half._paces[2, True, False, False] = best_first(4, 4, 4, 15), Turns()
    for out, expected in zip(half.generate(PROMPTS, seeds=[5, 6], max_new_tokens=200), plain, strict=True):
        assert_same_output(out, expected)
        assert out.stats.num_accepted > 0


class Bits:
    """Logits of rows in any tree below any prefix of one text, by the fused step."""

    def __init__(self, engine: Any, prompt_len: int, num_steps: int) -> None:
        self.weights, decoder = FusedWeights(engine.decoder), engine.decoder
        config, device = decoder.config, decoder.device
        self.text = [(37 * i + 11) % config.vocab_size for i in range(prompt_len + num_steps)]
        self.cache = KVCache(plan_cache(config, 1, len(self.text), device, decoder.dtype), device)
        prefill(decoder, self.cache, 0, self.text[:prompt_len], [], lambda states: None)
        self.step = FusedStep(self.weights, self.cache, 16)
        self.logits = torch.zeros(16, config.vocab_size, device=device)
        self.plain = {at: self.run(at, DraftTree(self.text[at]), 1)[0] for at in range(prompt_len, len(self.text))}
        self.kept = self.cache.k.clone(), self.cache.v.clone()

    def run(self, base: int, tree: DraftTree, width: int) -> torch.Tensor:
        """`[nodes, V]`; the root stands at `base`."""
        state = Trees.empty(1, self.cache.device)
        fill(state, {0: tree})
        at = torch.tensor([base], dtype=torch.int32, device=self.cache.device)
        step, head, config = self.step, self.weights.head, self.weights.config
        lay_rows(state.tokens, state.depths, state.paths, state.count, at, step.rows, step.ids, width)
        step.embed()
        step.run(0, config.num_layers)
        self.logits.fill_(math.nan)
        lm_head(
            step.x, step.stats, head.weight, head.bias, head.shift, step.rows, eps=config.norm_eps,
            softcap=config.logit_softcap, logits=self.logits,
        )  # fmt: skip
        return self.logits[: len(tree)].clone()

    def differing(self, base: int, tree: DraftTree, spine: Sequence[int], width: int) -> list[int]:
        """Nodes of the spine whose logits are not those of plain decoding; keys that were there before are back."""
        found = self.run(base, tree, width)
        for store, kept in zip((self.cache.k, self.cache.v), self.kept, strict=True):
            store.copy_(kept)
        return [n for depth, n in enumerate(spine) if not torch.equal(found[n], self.plain[base + depth])]

    def spread(self, base: int, depth: int, siblings: int) -> tuple[DraftTree, list[int]]:
        """The text's next tokens, each behind wrong siblings with a child each; and where they stand."""
        tree, spine = DraftTree(self.text[base]), [0]
        size = self.weights.config.vocab_size
        for token in self.text[base + 1 : base + 1 + depth]:
            for i in range(siblings):
                if len(tree) < 14:
                    wrong = tree.add(spine[-1], (token + 1 + i) % size)
                    tree.add(wrong, token)
            if len(tree) == 16:
                break
            spine.append(tree.add(spine[-1], token))
        return tree, spine


@pytest.mark.hazard(23)
@pytest.mark.parametrize("family", ["llama2"])
def test_bits_of_a_few_rows(family: str, engine_of: Callable) -> None:
    """What the test below does, where a step takes a second."""
    with torch.inference_mode():
        bits = Bits(engine_of(family, num_layers=1, device="cuda" if ON_GPU else "cpu"), 62, 4)
        assert not bits.differing(62, *bits.spread(62, 3, 0), 4)
        assert not bits.differing(63, *bits.spread(63, 2, 1), 8)


@on_gpu_only
@pytest.mark.hazard(7, 23)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_bits_at_every_width_place_and_start(family: str, dtype: torch.dtype, engine_of: Callable) -> None:
    """A row's logits, bit for bit: 1 to 16 real rows in tiles of every width, at each place of a tree, whatever round
    it is verified in; positions cross groups of 16 and 64 and a split of 256."""
    with torch.inference_mode():
        for prompt_len in (57,) if dtype == torch.float16 else (57, 247):
            bits = Bits(engine_of(family, dtype, max_context=320, device="cuda"), prompt_len, 18)
            last = prompt_len + 17
            for base in range(prompt_len, last + 1):
                room = last - base
                for rows in range(1, min(16, room + 1) + 1):
                    width = 1 << (rows - 1).bit_length()
                    for wide in {width, 16}:
                        assert not bits.differing(base, *bits.spread(base, rows - 1, 0), wide), (base, rows, wide)
                for siblings in range(1, 8):
                    tree, spine = bits.spread(base, room, siblings)
                    assert not bits.differing(base, tree, spine, 16), (base, siblings)
