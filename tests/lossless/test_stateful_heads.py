"""Heads with memory change how much is accepted and never what is written (design rule 10).

Heads that studied the tiny model's own text accept much and reject some; random ones reject nearly all; planned ones
say at each place what a test wants. Chains, gated trees and best-first trees, alone and beside each other, batches of 1
and 3, greedy and sampled, against plain decoding of the same engine.

Planted bugs seen to fail here: states of a block's first rows in place of the accepted path's; waiting states that are
never taken in; a context one token late; drafts that stay where true entries belong (`test_entries_...`).
"""

import dataclasses
import zlib

import pytest
import torch
from skipstone.engine import loop
from skipstone.engine.engine import CHAIN_LENGTH, Engine
from skipstone.engine.gate import PLAIN, DraftPolicy, Gate, Lookup, best_first, every, fixed_exit
from skipstone.engine.head_memory import WAITING, HeadMemory
from skipstone.engine.inventory import inventory
from skipstone.heads import Entries

PROMPTS = [[4, 9, 2], list(range(5, 64)), [7]]
LONG = [i * 7 % 199 for i in range(WAITING + 20)]
ROOM = len(LONG) + 60
NEW = 40
SAMPLED = {"temperature": 0.8, "top_p": 0.97}
TREE = Gate(0.3, 99.0)
POLICIES = {
    "chain": (("recurrent",), fixed_exit(0, 5)),
    "tree": (("recurrent",), every((0,), TREE, branch=3, max_depth=4)),
    "best first": (("recurrent",), best_first(beam=4, branch=3, max_depth=5)),
    "best first, gated": (("recurrent",), best_first(beam=2, branch=4, max_depth=6, max_nodes=9, stop=3.0)),
    "block chain": (("block",), fixed_exit(2, 5)),
    "block tree": (("block",), every((2,), TREE, branch=3, max_depth=4)),
    "both": (("recurrent", "block"), DraftPolicy((0, 2), {0: Gate(1.0, 1.5), 2: TREE}, max_depth=5, branch=2)),
}
TOLERANCE = 2e-4  # fp32: decode steps against one pass over the whole text, four layers deep


@pytest.fixture(params=list(POLICIES))
def drafting(request):
    return POLICIES[request.param]


@pytest.mark.hazard(6, 24)
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "random"])
def test_output_is_plain_decodings(trained, sampling, drafting, engine_of, stateful, assert_same_output):
    kinds, policy = drafting
    engine = engine_of()
    stateful(engine, *kinds, prompts=PROMPTS if trained else None)
    options = {"max_new_tokens": NEW, "logprobs": 1, **sampling}
    seeds = list(range(len(PROMPTS)))
    plain = engine.generate(PROMPTS, seeds=seeds, speculation=False, **options)
    together = engine.generate(PROMPTS, seeds=seeds, policy=policy, **options)
    for seed, (ids, out, expected) in enumerate(zip(PROMPTS, together, plain, strict=True)):
        assert_same_output(out, expected)
        alone = engine.generate(ids, seed=seed, policy=policy, **options)
        assert_same_output(alone, expected)
        assert alone.stats.num_drafted > 0
        assert set(alone.stats.tokens_by_exit) <= set(policy.exits)
    if trained:
        assert 0 < sum(out.stats.num_accepted for out in together) < sum(out.stats.num_drafted for out in together)


@pytest.mark.hazard(23)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_in_the_models_dtype(dtype, drafting, engine_of, stateful, assert_same_output):
    kinds, policy = drafting
    engine = engine_of("qwen3", dtype)
    stateful(engine, *kinds)
    options = {"max_new_tokens": 12, "logprobs": 0}
    plain = engine.generate(PROMPTS, speculation=False, **options)
    for out, expected in zip(engine.generate(PROMPTS, policy=policy, **options), plain, strict=True):
        assert_same_output(out, expected)


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("policy", [fixed_exit(0, 6), best_first(4, 3, 5)], ids=["chain", "best first"])
def test_any_pattern_of_right_and_wrong_drafts(policy, sampling, engine_of, stateful, assert_same_output):
    """A planned head: its memory is the real one, what it says after each token is the plan's, mostly the truth."""
    engine = engine_of("gemma2")
    head = stateful(engine, "recurrent").heads[0]
    options = {"max_new_tokens": NEW, "logprobs": 1, **sampling}
    plain = engine.generate(PROMPTS, seeds=[1, 2, 3], speculation=False, **options)
    truths = [out.prompt_ids + out.token_ids + [0] * 20 for out in plain]
    places, extend = {}, head.extend

    def listening(hidden, context, entries, state):
        out = extend(hidden, context, entries, state)
        at = [(own.sequence, position) for own in entries for position in own.positions]
        places.update(zip([row.numpy().tobytes() for row in out], at, strict=True))
        return out

    def say(out):
        logits = torch.full((len(out), head.num_outputs), -50.0)
        for row, state in zip(logits, [row.numpy().tobytes() for row in out], strict=True):
            sequence, position = places[state]
            truth, salt = truths[sequence][position + 1], zlib.crc32(state) // 7
            guesses = [(truth,), (truth,), ((truth + 1) % 199,), (truth, 3), (5, truth, 6), (8, 9)][salt % 6]
            row[list(guesses)] = torch.linspace(51.0, 50.0, len(guesses))
        return logits

    head.extend, head.draft_logits = listening, say
    outs = engine.generate(PROMPTS, seeds=[1, 2, 3], policy=policy, **options)
    for out, expected in zip(outs, plain, strict=True):
        assert_same_output(out, expected)
    assert sum(out.stats.num_accepted for out in outs) > NEW


# ---- the head's own keys and values


def entries_differ(engine, outs):
    """The largest difference between the heads' true entries and those of one pass over the committed text."""
    worst = 0.0
    for exit_layer, memory in engine.workspace.memories.items():
        head = memory.head
        for sequence, out in enumerate(outs):
            text = (out.prompt_ids + out.token_ids)[: memory._made[sequence]]
            assert len(text) >= len(out.prompt_ids)
            with torch.inference_mode():
                states = engine.decoder.encode(torch.tensor([text]), (*memory.layers, engine.decoder.config.num_layers))
                context = None
                if head.taps:
                    context = head.context(torch.stack([states[layer][0] for layer in head.taps], 1))
                    context = torch.cat([torch.zeros_like(context[:1]), context[:-1]])
                fresh, slots = head.new_state(1, len(text)), range(len(text))
                embedded = engine.decoder.embed(torch.tensor(text))
                hidden = states[exit_layer][0] if exit_layer else embedded
                head.extend(hidden, context, [Entries(0, slots, slots)], fresh)
            for own, expected in ((memory.cache.k, fresh.k), (memory.cache.v, fresh.v)):
                worst = max(worst, float((own[:, sequence, :, : len(text)] - expected[:, 0]).abs().max()))
    return worst


def decode(engine, policy, prompts=PROMPTS, **options):
    return engine.generate(prompts, policy=policy, max_new_tokens=NEW, **options)


@pytest.mark.hazard(6, 8)
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_entries_after_many_rounds_are_those_of_one_pass(sampling, drafting, engine_of, stateful):
    kinds, policy = drafting
    engine = engine_of(max_context=ROOM)
    stateful(engine, *kinds, prompts=PROMPTS)
    outs = decode(engine, policy, [*PROMPTS, LONG], **sampling)
    assert sum(out.stats.num_accepted for out in outs) > 0
    assert entries_differ(engine, outs) < TOLERANCE


@pytest.mark.hazard(6, 15)
@pytest.mark.parametrize("bug", ["first rows", "never taken in", "context late", "drafts stay", "prefill forgotten"])
def test_planted_bugs_in_the_memory_are_caught(bug, engine_of, stateful, monkeypatch):
    engine = engine_of(max_context=ROOM)
    stateful(engine, "recurrent", prompts=PROMPTS)
    policy = best_first(4, 3, 5)
    prompts = [*PROMPTS, LONG]
    plain = [out.token_ids for out in engine.generate(prompts, speculation=False, max_new_tokens=NEW)]
    take, true_rows, commit = HeadMemory.take, HeadMemory._true_rows, loop._commit
    if bug == "first rows":

        def wrong_rows(on, request, block):
            rows = [0, *block.acceptance.nodes]
            states = {layer: kept.clone() for layer, kept in block.states.items()}
            for layer, kept in states.items():
                kept[rows] = block.states[layer][: len(rows)]
            return commit(on, request, dataclasses.replace(block, states=states))

        monkeypatch.setattr(loop, "_commit", wrong_rows)
    elif bug == "never taken in":

        def only_counted(*args):
            hidden, context = true_rows(*args)
            return hidden * 0, context

        monkeypatch.setattr(HeadMemory, "_true_rows", only_counted)
    elif bug == "context late":

        def no_carry(memory, sequence, states):
            memory._lengths[sequence] += len(states[memory.layers[0]]) - 1
            memory._waiting[sequence] = 0

        monkeypatch.setattr(HeadMemory, "_settle", no_carry)
    elif bug == "drafts stay":

        def trusting(*args):
            hidden, context = true_rows(*args)
            return hidden[len(hidden) :], context[-1:]

        monkeypatch.setattr(HeadMemory, "_true_rows", trusting)
    else:

        def late(memory, sequence, states):
            if memory.length(sequence) == 0:
                states = {layer: torch.zeros_like(rows) for layer, rows in states.items()}
            take(memory, sequence, states)

        monkeypatch.setattr(HeadMemory, "take", late)
    outs = decode(engine, policy, prompts)
    assert [out.token_ids for out in outs] == plain, "not even a bug in a head's memory may change the output"
    assert entries_differ(engine, outs) > 50 * TOLERANCE


# ---- pauses


class Pattern:
    """Drafts in some rounds only, as a pace would have it."""

    ladder = None

    def __init__(self, drafts):
        self.drafts, self.rounds, self.paused = drafts, 0, frozenset()

    def place(self, length):
        pass

    def next(self, policy):
        self.rounds += 1
        return policy if self.drafts(self.rounds) else PLAIN

    def round(self, ms, committed, sources):
        pass


def paths(tree):
    return {tuple(tree.path_tokens(node)) for node in range(len(tree))}


@pytest.mark.hazard(6)
@pytest.mark.parametrize("kinds_policy", [0, 2, 4], ids=["chain", "best first", "block chain"])
@pytest.mark.parametrize("drafts", [lambda n: n % 3 == 0, lambda n: n > 150], ids=["every third", "after a long pause"])
def test_drafts_after_a_pause_are_those_of_an_engine_that_never_paused(
    drafts, kinds_policy, engine_of, stateful, monkeypatch
):
    """The same text as a prompt of a fresh request, whose head saw it in prefill, gives the same first draft."""
    kinds, policy = list(POLICIES.values())[kinds_policy]
    engine = engine_of()
    stateful(engine, *kinds, prompts=PROMPTS)
    drafted, accept_block = [], loop.accept_block

    def listening(request, tree, *rest):
        drafted.append((list(request.history.token_ids), tree))
        return accept_block(request, tree, *rest)

    monkeypatch.setattr(loop, "accept_block", listening)
    engine.policy, engine._paces[1, False, False, False] = policy, Pattern(drafts)
    out = engine.generate(PROMPTS[0], max_new_tokens=180)
    rounds = [(ids, tree) for ids, tree in drafted if len(tree) > 1]
    assert len(rounds) >= 5 and len(rounds) < len(drafted)
    for ids, tree in rounds[:: max(1, len(rounds) // 5)]:
        drafted.clear()
        engine.generate(ids, policy=policy, max_new_tokens=183 - len(ids))
        assert paths(drafted[0][1]) == paths(tree)
    assert engine.generate(PROMPTS[0], speculation=False, max_new_tokens=180).token_ids == out.token_ids


# ---- what training predicts is what the engine accepts


def test_chain_acceptance_is_what_unrolling_predicts(engine_of, stateful, monkeypatch):
    length, text = 4, PROMPTS[1]
    engine = engine_of()
    head = stateful(engine, "recurrent", prompts=PROMPTS).heads[0]
    blocks, accept_block = [], loop.accept_block

    def listening(request, *rest):
        blocks.append((len(request.history) - 1, accept_block(request, *rest)))
        return blocks[-1][1]

    monkeypatch.setattr(loop, "accept_block", listening)
    out = engine.generate(text, policy=fixed_exit(0, length), max_new_tokens=NEW)
    ids = torch.tensor([out.prompt_ids + out.token_ids])
    with torch.inference_mode():
        states = engine.decoder.encode(ids, head.taps)
        taps = torch.stack([states[layer] for layer in head.taps], 2)
        steps = head.unroll(engine.decoder.embed(ids[0]).unsqueeze(0), taps, length)
        right = [head.draft_logits(step[0]).argmax(-1)[:-1] == ids[0, 1:] for step in steps]
    seen = set()
    for root, block in blocks:
        drafted = block.tree.num_drafted
        predicted = 0
        while predicted < drafted and bool(right[predicted][root + predicted]):
            predicted += 1
        assert len(block.acceptance.nodes) == predicted, f"root at {root}"
        seen.add(predicted)
    assert len(seen) > 1


# ---- faults


@pytest.mark.hazard(14)
@pytest.mark.parametrize("policy", [fixed_exit(0, 5), best_first(4, 3, 5)], ids=["chain", "best first"])
@pytest.mark.parametrize("place", ["context", "entries", "keys"])
def test_a_state_that_is_not_finite_stops_one_draft_and_no_more(place, policy, engine_of, stateful, monkeypatch):
    engine = engine_of()
    head = stateful(engine, "recurrent", prompts=PROMPTS).heads[0]
    plain = engine.generate(PROMPTS, speculation=False, max_new_tokens=NEW)
    clean = decode(engine, policy)
    calls, bad, lost = [0], range(6, 9), []
    context, extend = head.context, head.extend

    def broken_context(taps):
        calls[0] += 1
        return context(taps) * (float("nan") if calls[0] in bad else 1.0)

    def broken_extend(hidden, *rest):
        calls[0] += 1
        out = extend(hidden * float("nan") if place == "keys" and calls[0] in bad else hidden, *rest)
        if calls[0] in bad:
            lost.append(calls[0])
            return out * float("nan")
        return out

    if place == "context":
        head.context = broken_context
    else:
        head.extend = broken_extend
    outs = decode(engine, policy)
    assert calls[0] > bad.stop
    for out, expected, whole in zip(outs, plain, clean, strict=True):
        assert out.token_ids == expected.token_ids
        assert out.stats.gate_stops > 0, "the rounds that were hit draft nothing"
        assert out.stats.num_accepted > 0
        assert out.stats.num_verifications <= whole.stats.num_verifications + 3 * 5, "and the others draft on"


@pytest.mark.hazard(14, 16)
@pytest.mark.parametrize("policy", [fixed_exit(0, 5), best_first(4, 3, 5)], ids=["chain", "best first"])
def test_nothing_of_an_earlier_request_is_read(policy, engine_of, stateful):
    engine = engine_of()
    stateful(engine, "recurrent", prompts=PROMPTS)
    first = decode(engine, policy)
    memory = engine.workspace.memories[0]
    for store in (memory.cache.k, memory.cache.v, memory._out, *memory._states.values()):
        store.fill_(float("nan"))
    again = decode(engine, policy)
    assert engine.workspace.memories[0] is memory
    for out, expected in zip(again, first, strict=True):
        assert out.token_ids == expected.token_ids
        assert out.stats.num_verifications == expected.stats.num_verifications
        assert out.stats.num_drafted == expected.stats.num_drafted


@pytest.mark.hazard(16)
@pytest.mark.parametrize("place", ["open", "grow", "take", "outputs"])
@pytest.mark.parametrize("call", [1, 4])
def test_a_fault_in_the_memory_leaves_the_next_request_as_it_was(place, call, engine_of, stateful, monkeypatch):
    engine = engine_of()
    stateful(engine, "recurrent", prompts=PROMPTS)
    policy = best_first(4, 3, 5)
    expected = decode(engine, policy)
    with monkeypatch.context() as patch:
        calls, original = [0], getattr(HeadMemory, place)

        def failing(memory, *args):
            calls[0] += 1
            if calls[0] == call:
                raise KeyboardInterrupt
            return original(memory, *args)

        patch.setattr(HeadMemory, place, failing)
        with pytest.raises(KeyboardInterrupt):
            decode(engine, policy)
    for out, one in zip(decode(engine, policy), expected, strict=True):
        assert out.token_ids == one.token_ids and out.stats.num_verifications == one.stats.num_verifications


@pytest.mark.hazard(26)
@pytest.mark.parametrize("calls", [range(3, 4), range(3, 99)], ids=["once", "always"])
def test_out_of_memory_in_a_head_drafts_less(calls, engine_of, stateful):
    engine = engine_of()
    head = stateful(engine, "recurrent", prompts=PROMPTS).heads[0]
    plain = engine.generate(PROMPTS, speculation=False, max_new_tokens=NEW)
    count, extend = [0], head.extend

    def failing(*args):
        count[0] += 1
        if count[0] in calls:
            raise torch.OutOfMemoryError("planted")
        return extend(*args)

    head.extend = failing
    outs = decode(engine, fixed_exit(0, 5))
    for out, expected in zip(outs, plain, strict=True):
        assert out.token_ids == expected.token_ids
        assert out.stats.fallbacks["out of memory"] == (1 if len(calls) == 1 else 4)
    if len(calls) == 1:
        assert sum(out.stats.num_accepted for out in outs) > 0
        head.extend = extend
        assert entries_differ(engine, outs) < TOLERANCE


@pytest.mark.hazard(26)
def test_no_memory_for_a_heads_memory_is_plain_decoding(engine_of, stateful, monkeypatch):
    engine = engine_of()
    head = stateful(engine, "recurrent").heads[0]
    plain = engine.generate(PROMPTS[0], speculation=False, max_new_tokens=5)
    new_state = head.new_state

    def failing(num_rows, capacity, device):
        if capacity > 1:
            raise torch.OutOfMemoryError("planted")
        return new_state(num_rows, capacity, device)

    head.new_state = failing
    out = engine.generate(PROMPTS[0], policy=fixed_exit(0, 5), max_new_tokens=5)
    assert out.token_ids == plain.token_ids and out.stats.fallbacks == {"out of memory": 1}
    head.new_state = new_state
    assert engine.generate(PROMPTS[0], policy=fixed_exit(0, 5), max_new_tokens=5).stats.num_drafted > 0


# ---- what a user sees


def test_a_head_without_trunk_layers_drafts_by_default(engine_of, stateful):
    """Without a calibration: chains, paced; exit 0 is an exit like any other in what is reported."""
    own = engine_of()
    heads = stateful(own, "recurrent", prompts=PROMPTS)
    engine = Engine(own.decoder, None, heads)
    assert engine.policy == dataclasses.replace(fixed_exit(0, CHAIN_LENGTH), lookup=Lookup())
    assert "memory of the head at 0" in engine.memory(2, 100)
    found = inventory(engine, 2, 100)
    assert found["heads"]["exits_in_use"] == [0] and found["heads"]["exits"][0]["kind"] == "recurrent"
    stream = engine.stream(PROMPTS[0], speculation="always", lookup=False, max_new_tokens=30)
    events = list(stream)
    assert [event.drafted for event in events] == [layer == 0 for layer in stream.result.exit_layers]
    assert stream.result.stats.tokens_by_exit == {0: stream.result.stats.num_accepted}
    assert 0 < stream.result.stats.num_accepted == sum(event.exit_layer == 0 for event in events)
    held = engine.workspace.memories[0]
    stores = (held.cache.k, held.cache.v, held._out, *held._states.values())
    assert held.plan.num_bytes == sum(store.numel() * store.element_size() for store in stores)
