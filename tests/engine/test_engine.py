"""The engine against interrupts, faults, bad input, and its own statistics.

Planted bugs seen to fail here: a lock kept when a stream cannot start; a NaN row that ends the whole batch; a NaN left
in a stale slot; statistics that count tokens past the end.
"""

import threading
from contextlib import contextmanager

import pytest
import torch
from skipstone.engine import device_loop, loop
from skipstone.engine.cache import ContextTooLong
from skipstone.engine.forward import advance
from skipstone.engine.gate import ALWAYS, Gate, every, fixed_exit
from skipstone.engine.graphs import Record
from skipstone.engine.sampling import TargetSampler
from skipstone.engine.tree import MAX_NODES, Acceptance, DraftTree

PROMPT = [5, 17, 3, 99, 42]
OTHERS = [[7, 8, 9], list(range(20, 40)), [100]]
NEW = 16
TREES = every((1, 2, 3), Gate(0.3, 1.5), branch=3, max_depth=6)


@pytest.fixture
def engine(engine_of):
    return engine_of("llama2")


@pytest.fixture
def plain(engine):
    return engine.generate(PROMPT, speculation=False, max_new_tokens=NEW).token_ids


def is_free(engine):
    """Whether another thread could claim the engine."""
    free = engine._lock.acquire(blocking=False)
    if free:
        engine._lock.release()
    return free


# ---- hazard 16: faults at each phase


def fail_on_call(monkeypatch, target, name, error, call=1):
    """Make the `call`-th call of target.name raise; later ones work again."""
    original, calls = getattr(target, name), [0]

    def failing(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, failing)
    return calls


PHASES = {
    "prefill": (loop, "prefill"),
    "draft": (loop, "draft"),
    "verify": (loop, "verify"),
    "accept": (loop, "accept_block"),
    "commit": (loop.KVCache, "commit"),
}


@pytest.mark.hazard(16)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("planted")], ids=["interrupt", "fault"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("how", ["generate", "stream"])
def test_fault_in_a_phase_leaves_the_engine_as_it_was(phase, error, how, engine, planned, plain, monkeypatch):
    heads = planned(engine)
    heads.learn(PROMPT, max_new_tokens=NEW)
    with monkeypatch.context() as patch:
        calls = fail_on_call(patch, *PHASES[phase], error, call=1 if phase == "prefill" else 2)
        with pytest.raises(type(error)):
            list(
                getattr(engine, how)(PROMPT if how == "stream" else [PROMPT, *OTHERS], policy=TREES, max_new_tokens=NEW)
            )
        assert calls[0] >= 1
    assert is_free(engine)
    for policy in (TREES, fixed_exit(2, 4)):
        assert engine.generate(PROMPT, policy=policy, max_new_tokens=NEW).token_ids == plain
    assert engine.generate(PROMPT, speculation=False, max_new_tokens=NEW).token_ids == plain


@pytest.mark.hazard(16)
def test_a_call_that_cannot_start_frees_the_engine(engine, plain):
    """A stream claims the engine before it knows that it can run."""
    too_deep = fixed_exit(2, 4)  # there are no heads
    bad = [
        (ValueError, PROMPT, {"policy": too_deep}),
        (ValueError, PROMPT, {"speculation": "maybe"}),
        (ValueError, PROMPT, {"temperatur": 1.0}),
        (ValueError, PROMPT, {"temperature": -1.0}),
        (ValueError, [], {}),
        (ValueError, [10_000], {}),
        (ContextTooLong, [1] * 300, {}),
    ]
    for error, prompt, options in bad:
        for call in (engine.stream, engine.generate):
            with pytest.raises(error):
                call(prompt, max_new_tokens=NEW, **options)
            assert is_free(engine), (call.__name__, options)
    assert engine.generate(PROMPT, max_new_tokens=NEW).token_ids == plain


@pytest.mark.hazard(16)
def test_a_processor_that_raises_ends_the_call_only(engine, planned, plain):
    heads = planned(engine)
    heads.learn(PROMPT, max_new_tokens=NEW)

    def breaking(prefix, logits):
        if len(prefix) == len(PROMPT) + 6:
            raise LookupError("planted")
        return logits

    for policy in (None, TREES):
        with pytest.raises(LookupError, match="planted"):
            engine.generate(PROMPT, policy=policy, max_new_tokens=NEW, logits_processor=breaking)
        assert is_free(engine)
    assert engine.generate(PROMPT, policy=TREES, max_new_tokens=NEW).token_ids == plain


@pytest.mark.hazard(16)
def test_closed_stream_frees_the_engine_and_keeps_what_was_written(engine, planned, plain):
    planned(engine).learn(PROMPT, max_new_tokens=NEW)
    with engine.stream(PROMPT, policy=TREES, max_new_tokens=NEW) as stream:
        first = [next(stream).token_id for _ in range(3)]
        with pytest.raises(RuntimeError, match="open stream"):
            engine.generate(PROMPT, max_new_tokens=NEW)
    assert first == plain[:3] and is_free(engine)
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.token_ids == plain[: len(stream.result.token_ids)]
    assert list(stream) == []
    stream.close()
    assert engine.generate(PROMPT, policy=TREES, max_new_tokens=NEW).token_ids == plain
    abandoned = engine.stream(PROMPT, max_new_tokens=NEW)
    next(abandoned)
    del abandoned
    assert is_free(engine)


def test_other_threads_wait_their_turn(engine, planned, plain):
    planned(engine).learn(PROMPT, max_new_tokens=NEW)
    results = []
    threads = [
        threading.Thread(
            target=lambda: results.append(engine.generate(PROMPT, policy=TREES, max_new_tokens=NEW).token_ids)
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [plain] * 3


# ---- hazard 14: NaN and Inf


@pytest.mark.hazard(14)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_draft_head_without_a_finite_answer_only_stops_the_draft(bad, engine, planned, plain):
    heads = planned(engine, exits=(2,))
    heads.heads = {2: lambda hidden: torch.full((len(hidden), engine.decoder.config.vocab_size), bad)}
    for gate in (ALWAYS, Gate(0.3, 1.5)):
        out = engine.generate(PROMPT, policy=every((2,), gate), max_new_tokens=NEW)
        assert out.token_ids == plain and out.finish_reason == "length"
        assert out.stats.num_drafted == 0


def break_rows(monkeypatch, engine, bad_tokens, value):
    """Logits become `value` for the rows whose own token is in `bad_tokens`: their normed state is found again."""
    decoder = engine.decoder
    embed, run_layers = decoder.embed, decoder.run_layers
    marked = [embed(torch.tensor([token]))[0] for token in bad_tokens]

    def run(hidden, start, stop, positions, attend, taps, mlp):
        hidden = hidden.clone()
        if start == 0:
            for row in hidden:
                if any(torch.equal(row, mark) for mark in marked):
                    row.fill_(value)
        return run_layers(hidden, start, stop, positions, attend, taps, mlp)

    monkeypatch.setattr(decoder, "run_layers", run, raising=False)


@pytest.mark.hazard(14)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("policy", [None, TREES, fixed_exit(2, 5)], ids=["plain", "trees", "chain"])
def test_a_target_without_a_finite_answer_ends_its_own_request(value, policy, engine, planned, monkeypatch):
    heads = planned(engine)
    given = [PROMPT, *OTHERS]
    plain = [heads.learn(ids, max_new_tokens=NEW) for ids in given]
    ids = plain[0].token_ids
    elsewhere = {token for other, out in zip(given[1:], plain[1:], strict=True) for token in [*other, *out.token_ids]}
    at = next(i for i, token in enumerate(ids) if i > 3 and token not in elsewhere | {*PROMPT, *ids[:i]})
    with monkeypatch.context() as patch:
        break_rows(patch, engine, [ids[at]], value)
        outs = engine.generate(given, policy=policy, max_new_tokens=NEW)
    assert outs[0].finish_reason == "error" and f"position {len(PROMPT) + at + 1}" in outs[0].error
    assert outs[0].token_ids == ids[: at + 1], "what stood before the fault is kept"
    assert outs[0].stats.num_committed == at + 1
    for out, expected in zip(outs[1:], plain[1:], strict=True):
        assert out.token_ids == expected.token_ids and out.error is None
    # The slots of the failed request, now stale, poison nobody.
    after = engine.generate([OTHERS[0], PROMPT, OTHERS[1]], policy=policy, max_new_tokens=NEW)
    assert [out.token_ids for out in after] == [plain[1].token_ids, ids, plain[2].token_ids]


@pytest.mark.hazard(14)
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("family", ["llama2", "gemma2", "qwen2_window"])
def test_poisoned_slots_poison_nobody(family, deterministic, engine_of, planned):
    """Every slot holds NaN before the first call, as stale slots of a broken request could."""
    engine = engine_of(family, deterministic=deterministic)
    heads = planned(engine)
    prompts = [[3] * 2, list(range(62))]
    plain = [heads.learn(ids, max_new_tokens=NEW).token_ids for ids in prompts]
    for policy in (None, TREES):
        engine.workspace.cache.k.fill_(float("nan"))
        engine.workspace.cache.v.fill_(float("nan"))
        for ids, expected in zip(prompts, plain, strict=True):
            out = engine.generate(ids, policy=policy, max_new_tokens=NEW)
            assert out.error is None
            assert out.token_ids == expected


# ---- hazard 26: out of memory


@pytest.mark.hazard(26)
@pytest.mark.parametrize("mode", ["lossless", "early_exit"])
def test_out_of_memory_over_a_prompt_gives_the_arithmetic(mode, engine, planned, plain, monkeypatch):
    """And the engine lives; seen to fail while the device's own words were passed on."""
    planned(engine, "right")
    policy = fixed_exit(2, 4)

    def prefill(*args):
        raise torch.OutOfMemoryError("CUDA out of memory (planted)")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "prefill", prefill)
        with pytest.raises(MemoryError, match=rf"a prompt of {len(PROMPT) - 1} tokens; KV cache 2 x"):
            engine.generate(PROMPT, mode=mode, policy=policy, max_new_tokens=NEW)
    assert engine.generate(PROMPT, speculation=False, max_new_tokens=NEW).token_ids == plain


@pytest.mark.hazard(26)
@pytest.mark.parametrize("where", ["draft", "verify"])
def test_out_of_memory_shrinks_the_tree_then_stops_drafting(where, engine, planned, plain, monkeypatch):
    heads = planned(engine, "right")
    heads.learn(PROMPT, max_new_tokens=NEW)
    sizes, original = [], getattr(loop, where)

    def too_small(*args):
        """As if more than 3 drafted nodes did not fit."""
        result = original(*args)
        works = args[1] if where == "verify" else [row.work for row in args[2]]
        sizes.append(max(len(work.tree) - 1 for work in works))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory (planted)")
        return result

    monkeypatch.setattr(loop, where, too_small)
    out = engine.generate(PROMPT, policy=fixed_exit(2, 15), max_new_tokens=NEW)
    assert out.token_ids == plain and out.finish_reason == "length"
    assert out.stats.fallbacks == {"out of memory": 2}, "15 nodes, then 7, then 3 that fit"
    assert sizes[:3] == [15, 7, 3] and out.stats.num_accepted > 0
    assert out.stats.num_committed == len(plain)


@pytest.mark.hazard(26)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("planted"), MemoryError("planted")], ids=["torch", "python"])
def test_out_of_memory_in_every_draft_ends_in_plain_decoding(error, engine, planned, plain, monkeypatch):
    planned(engine, "right").learn(PROMPT, max_new_tokens=NEW)

    def never(*args):
        raise error

    monkeypatch.setattr(loop, "draft", never)
    out = engine.generate(PROMPT, policy=fixed_exit(2, 6), max_new_tokens=NEW)
    assert out.token_ids == plain
    assert out.stats.num_drafted == 0 and out.stats.fallbacks == {"out of memory": 4}


@pytest.mark.hazard(26)
def test_out_of_memory_in_a_plain_step_shows_the_arithmetic(engine, planned, plain, monkeypatch):
    planned(engine, "right").learn(PROMPT, max_new_tokens=NEW)
    with monkeypatch.context() as patch:

        def never(*args):
            raise torch.OutOfMemoryError("planted")

        patch.setattr(loop, "verify", never)
        with pytest.raises(MemoryError, match=r"KV cache 2 x 4 layers x 1 sequences x \d+ slots x .* MiB"):
            engine.generate(PROMPT, policy=fixed_exit(2, 6), max_new_tokens=NEW)
    assert is_free(engine)
    assert engine.generate(PROMPT, policy=fixed_exit(2, 6), max_new_tokens=NEW).token_ids == plain


@pytest.mark.hazard(26)
def test_other_errors_are_not_taken_for_memory(engine, planned, monkeypatch):
    planned(engine, "right")
    fail_on_call(monkeypatch, loop, "verify", RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        engine.generate(PROMPT, policy=fixed_exit(2, 6), max_new_tokens=NEW)


# ---- statistics and reports


@pytest.mark.hazard(4)
@pytest.mark.parametrize("cut", ["length", "stop"])
def test_statistics_count_the_output_and_no_more(cut, engine, planned, plain):
    heads = planned(engine, "right")
    heads.learn(PROMPT, max_new_tokens=NEW)
    for end in range(1, NEW):
        if plain[end] in plain[:end]:
            continue
        options = {"stop_ids": [plain[end]]} if cut == "stop" else {"max_new_tokens": end + 1}
        out = engine.generate(PROMPT, policy=fixed_exit(2, 5), **{"max_new_tokens": NEW, **options})
        stats = out.stats
        assert out.token_ids == plain[: end + 1] and out.finish_reason == cut
        assert stats.num_committed == end + 1
        assert stats.num_accepted == sum(stats.accepted_by_position) == sum(stats.tokens_by_exit.values())
        assert stats.num_accepted == sum(layer is not None for layer in out.exit_layers)
        assert stats.num_accepted <= stats.num_drafted and stats.num_verifications <= end + 1


def test_verify_lossless_reports_the_first_difference(engine, planned, plain, monkeypatch):
    planned(engine).learn(PROMPT, max_new_tokens=NEW)
    report = engine.verify_lossless(PROMPT, policy=TREES, max_new_tokens=NEW)
    assert report.equal and report.divergence is None and report.plain.token_ids == plain
    for lookup in (True, False):  # of the run that drafts, the plain one has none
        report = engine.verify_lossless(PROMPT, policy=TREES, lookup=lookup, max_new_tokens=NEW)
        assert report.equal and report.speculative.stats.num_drafted > 0
    original = loop.accept_block

    def lying(request, tree, logits, num_refused=0):
        if len(request.history) - len(PROMPT) >= 4 and len(tree) > 1:
            logits = logits.roll(1, -1)
        return original(request, tree, logits, num_refused)

    monkeypatch.setattr(loop, "accept_block", lying)
    report = engine.verify_lossless(PROMPT, policy=TREES, max_new_tokens=NEW)
    assert not report.equal and report.divergence >= 4 and report.margin > 0


def test_a_cache_is_reused_and_grows(engine):
    engine.generate(PROMPT, max_new_tokens=2)
    first = engine.workspace.cache
    engine.generate([7], max_new_tokens=2)
    assert engine.workspace.cache is first
    engine.generate([PROMPT, [7]], max_new_tokens=2)
    assert engine.workspace.cache is not first and engine.workspace.cache.plan.batch == 2
    assert engine.workspace.cache.plan.num_slots >= engine.workspace.cache.plan.context + MAX_NODES


def test_rows_that_ran_stay_as_they_are(engine):
    """`advance` to a layer that nodes have reached is nothing; a fault in between loses no committed state."""
    engine.generate(PROMPT, max_new_tokens=1)
    request = engine._intake.requests([PROMPT], None, False, {})[0]
    on = loop.Machinery(engine.decoder, engine.workspace.cache_for(1, 64), engine.tiles, {}, None)
    with torch.inference_mode():
        work = loop.begin(on, request)
        advance(on.decoder, on.cache, [(work, [0])], 2, on.tiles)
        before = work.hidden.clone()
        advance(on.decoder, on.cache, [(work, [0])], 1, on.tiles)
    assert torch.equal(work.hidden, before) and work.reached == [2]


@pytest.mark.hazard(27)
@pytest.mark.parametrize("option", ["streamer", "tokenizer"])
@pytest.mark.parametrize("ask", ["generate", "stream", "verify_lossless"])
def test_what_transformers_would_take_is_refused_by_name(ask, option, engine_of):
    """There is no adapter for transformers' generate, so what would be dropped there is no option here."""
    with pytest.raises(ValueError, match=f"unknown options .*{option}"):
        getattr(engine_of(), ask)([1, 2], **{option: object()})


def test_inputs_that_would_be_misread_are_refused(engine_of):
    engine = engine_of()
    with pytest.raises(ValueError, match="one output of one prompt"):
        engine.verify_lossless([[1, 2], [3]])
    with pytest.raises(ValueError, match="bad_words is 'abc'"):
        engine.generate([1, 2], bad_words="abc")
    ids = engine.generate([1, 2], max_new_tokens=4).token_ids
    assert engine.generate(torch.tensor([1, 2]), max_new_tokens=4).token_ids == ids


@pytest.mark.parametrize("fused", [False, True], ids=["waiting", "on the device"])
def test_what_stopped_before_a_fault_did_not_fail(fused, engine_of, planned, monkeypatch):
    """A stop string in an accepted token ends the output; that no token can be drawn behind it is nobody's concern."""
    engine = engine_of()
    plain = planned(engine, "right").learn(PROMPT, max_new_tokens=4)
    request = engine._intake.requests([PROMPT], None, False, {"max_new_tokens": 9, "stop_ids": [plain.token_ids[0]]})[0]
    on = loop.Machinery(engine.decoder, engine.workspace.cache_for(1, 64), engine.tiles, {}, None)
    tree = DraftTree(PROMPT[-1])
    tree.add(0, plain.token_ids[0], exit_layer=2)
    if fused:
        device_loop._commit(on, request, Record(3, (plain.token_ids[0], -1), (1,), tree))
    else:
        acceptance = Acceptance((1,), (plain.token_ids[0],), TargetSampler.FAILED)
        loop._commit(on, request, loop.Block(tree, acceptance, (), 0, error="no token can be drawn"))
    assert request.checker.finish_reason == "stop" and request.error is None


def test_everything_runs_with_the_engines_own_gpu_as_the_current_one(engine, monkeypatch):
    """Kernels run on the current device: with a model on another one they would read addresses that are not theirs."""
    inside, depth = [], [0]

    @contextmanager
    def here(self):
        depth[0] += 1
        yield
        depth[0] -= 1

    original = loop.play_round

    def watched(*args):
        inside.append(depth[0])
        return original(*args)

    monkeypatch.setattr(type(engine), "here", here)
    monkeypatch.setattr(loop, "play_round", watched)
    engine.generate(PROMPT, max_new_tokens=3)
    with engine.stream(PROMPT, max_new_tokens=3) as stream:
        for _ in stream:
            assert depth[0] == 0, "between tokens the caller's own device is the current one"
    assert len(inside) == 6 and all(inside)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_the_second_gpu(engine_of):
    """The same tokens as on the first, with captured rounds."""
    outs = []
    for device in ("cuda:0", "cuda:1"):
        engine = engine_of(dtype=torch.bfloat16, device=device)
        engine.fused = engine._fuse(True)
        assert engine.fused is not None
        outs.append(engine.generate(PROMPT, max_new_tokens=24).token_ids)
    assert outs[0] == outs[1] and torch.cuda.current_device() == 0


def test_paces_of_steps_that_cost_otherwise_are_kept_apart(engine, planned):
    """A waiting step with log-probabilities is no measure of one without."""
    planned(engine, "right").learn(PROMPT, max_new_tokens=4)
    engine.policy = fixed_exit(2, 3)
    for options in ({}, {"logprobs": 1}, {"repetition_penalty": 1.2}):
        engine.generate(PROMPT, max_new_tokens=4, **options)
    assert set(engine._paces) == {(1, False, False, False), (1, False, True, False)}
    assert engine.pace() is engine._paces[1, False, False, False]
