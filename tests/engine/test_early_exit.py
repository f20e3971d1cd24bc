"""Early-exit mode: which exit writes which token, and the keys and values made up for afterwards.

Planted bugs seen to fail here: see each test.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from skipstone.bench.arms import bare_heads
from skipstone.engine import early_exit
from skipstone.engine.cache import ContextTooLong
from skipstone.engine.early_exit import calibrated_exits
from skipstone.engine.engine import Engine
from skipstone.engine.gate import NEVER, DraftPolicy, Gate, best_first, every, fixed_exit, likely
from skipstone.engine.load import load
from skipstone.engine.sampling import Context, History, SamplingParams, TargetSampler
from skipstone.heads.base import HeadSpec, Projection
from skipstone.heads.calibration import Calibration, ExitCalibration
from skipstone.heads.calibration import Gate as CalibratedGate
from skipstone.heads.head_set import HeadSet, HeadSetConfig
from skipstone.kernels.linear import PackedLinear

PROMPT = [5, 17, 3, 99, 42]
OTHERS = [[7, 8, 9], list(range(20, 60))]
NEW = 36
EXITS = (1, 2, 3)
SOME = every(EXITS, Gate(2.3, 2.3))  # a mixture of exits and full passes on the tiny models


def calibration(exits: tuple[int, ...], low: float = 2.3) -> Calibration:
    gates = {level: CalibratedGate(low, low, 0.5, level, 9) for level in (0.60, 0.95, 0.99)}
    one = ExitCalibration(9, 0.5, (0.5,), (0.0, 1.0), (9,), (0.5,), gates)
    return Calibration(dict.fromkeys(exits, one))


@pytest.fixture
def engine_with(engine_of: Any) -> Any:
    """`engine_with(family="llama2", **options)` -> an engine with bare heads at exits 1, 2, 3, calibrated."""

    def build(family: str = "llama2", exits: tuple[int, ...] = EXITS, **options: Any) -> Any:
        engine = engine_of(family, **options)
        engine.heads = bare_heads(engine.decoder.config, exits)
        engine.heads.calibration = calibration(exits)
        decoder = engine.decoder
        with torch.inference_mode():
            softcap = decoder.config.logit_softcap
            engine.heads.attach(Projection(decoder.final_norm, decoder.head_weight, softcap, PackedLinear))
        return engine

    return build


def early(engine: Any, prompt: Any = PROMPT, **options: Any) -> Any:
    return engine.generate(prompt, mode="early_exit", **{"max_new_tokens": NEW, **options})


def plain(engine: Any, prompt: Any = PROMPT, **options: Any) -> Any:
    return engine.generate(prompt, speculation=False, **{"max_new_tokens": NEW, **options})


def forced(engine: Any, tokens: list[int], prompt: Any = PROMPT) -> Any:
    """Plain decoding made to write these tokens."""

    def only(prefix: list[int], logits: torch.Tensor) -> torch.Tensor:
        row = torch.full_like(logits, -math.inf)
        row[tokens[len(prefix) - len(prompt)]] = 0.0
        return row

    return plain(engine, prompt, logits_processor=only, max_new_tokens=len(tokens))


SAMPLING = [{}, {"temperature": 0.8, "seed": 3}, {"repetition_penalty": 1.3, "frequency_penalty": 0.4}]


@pytest.mark.parametrize("options", SAMPLING, ids=["greedy", "sampled", "penalties"])
def test_with_closed_gates_it_is_plain_decoding(engine_with: Any, options: dict[str, Any]) -> None:
    """Planted bug: the chain not started anew after a full pass."""
    engine = engine_with()
    out = early(engine, policy=every(EXITS, NEVER), logprobs=2, **options)
    expected = plain(engine, logprobs=2, **options)
    assert out.token_ids == expected.token_ids and out.logprobs == expected.logprobs
    assert out.mode == "early_exit" and expected.mode == "lossless"
    assert out.stats.num_verifications == NEW and out.stats.tokens_by_exit == {}
    assert out.stats.layers_per_token == expected.stats.layers_per_token == 4


@pytest.mark.parametrize("exit_layer", EXITS)
@pytest.mark.parametrize("options", SAMPLING, ids=["greedy", "sampled", "penalties"])
def test_an_exit_that_is_always_open_writes_what_its_head_says(
    engine_with: Any, exit_layer: int, options: dict[str, Any]
) -> None:
    """Against a fresh pass over each prefix. Planted bugs: noise of another position; the head asked about the token
    before; logits of the wrong exit."""
    engine, limit = engine_with(), 15
    out = early(engine, policy=fixed_exit(exit_layer, 5), **options)
    decoder = engine.decoder
    sampler = TargetSampler(SamplingParams(**options), decoder.config.vocab_size)
    for index, (token, written_by) in enumerate(zip(out.token_ids, out.exit_layers, strict=True)):
        ids = PROMPT + out.token_ids[:index]
        history = History(PROMPT)
        history.extend(out.token_ids[:index])
        layer = decoder.config.num_layers if index % (limit + 1) == limit else exit_layer
        with torch.inference_mode():
            hidden = decoder.encode(torch.tensor([ids]), [layer])[layer][0, -1:]
            logits = decoder.lm_head(decoder.final_norm(hidden))[0]
        assert token == sampler.target(logits, Context(history)), index
        assert written_by == (None if layer == 4 else exit_layer)


@pytest.mark.parametrize("family", ["llama2", "mistral", "gemma2", "gpt_neox"])
def test_made_up_keys_and_values_are_those_of_plain_decoding(engine_with: Any, family: str) -> None:
    """Bit for bit, in every layer. Planted bugs: waiting tokens run without the ones before them; a waiting token's
    state taken from where the new one stands."""
    engine = engine_with(family)
    out = early(engine, policy=every(EXITS, Gate(3.92, 3.92)) if family == "gemma2" else SOME)
    length = engine.workspace.cache.lens[0]  # committed: made up for
    assert len(set(out.exit_layers)) >= 3, "a mixture"
    assert length >= len(PROMPT) + NEW - 17
    ours = [store[:, 0, :, :length].clone() for store in (engine.workspace.cache.k, engine.workspace.cache.v)]
    again = forced(engine, out.token_ids)
    assert again.token_ids == out.token_ids
    for own, store in zip(ours, (engine.workspace.cache.k, engine.workspace.cache.v), strict=True):
        assert torch.equal(own, store[:, 0, :, :length])


@pytest.mark.parametrize("most", [1, 4, 15])
def test_as_many_tokens_wait_as_may(engine_with: Any, most: int) -> None:
    """Then the full model writes one. Planted bug: one more or fewer."""
    policy = DraftPolicy((2,), fixed_exit(2, 5).gates, max_nodes=most)
    written_by = early(engine_with(), policy=policy).exit_layers
    assert written_by == [None if i % (most + 1) == most else 2 for i in range(NEW)]


def test_layers_are_counted_once_a_row_also_those_made_up_for(engine_with: Any) -> None:
    """Planted bug: layers that waiting tokens run later left out."""
    engine = engine_with()
    out = early(engine, policy=fixed_exit(2, 5), max_new_tokens=10)
    assert out.stats.tokens_by_exit == {2: 10} and out.stats.num_verifications == 0
    assert out.stats.num_row_layers == 10 * 2 and out.stats.layers_per_token == out.stats.mean_depth(4) == 2
    out = early(engine, policy=fixed_exit(2, 5), max_new_tokens=17)
    assert out.stats.num_row_layers == 16 * 4 + 2 and out.stats.num_verifications == 1
    assert out.stats.mean_depth(4) == (16 * 2 + 4) / 17
    assert out.stats.num_drafted == out.stats.num_accepted == 0
    assert out.stats.to_dict()["layers_per_token"] == out.stats.layers_per_token


@pytest.mark.hazard(24)
@pytest.mark.parametrize("options", SAMPLING, ids=["greedy", "sampled", "penalties"])
def test_a_batch_writes_what_each_writes_alone(engine_with: Any, options: dict[str, Any]) -> None:
    """Planted bugs: a head asked about all chains at one shape or another; one chain for two requests."""
    engine, prompts = engine_with(), [PROMPT, *OTHERS]
    seeds = [11, 12, 13]
    together = early(engine, prompts, policy=SOME, **{**options, "seed": 0}, seeds=seeds)
    for prompt, seed, out in zip(prompts, seeds, together, strict=True):
        alone = early(engine, prompt, policy=SOME, **{**options, "seed": seed})
        assert out.token_ids == alone.token_ids and out.exit_layers == alone.exit_layers
        assert out.stats.num_row_layers == alone.stats.num_row_layers
    assert len({tuple(out.exit_layers) for out in together}) == 3


@pytest.mark.hazard(1, 2, 4)
@pytest.mark.parametrize("cut", ["stop", "length"])
def test_an_end_at_each_position(engine_with: Any, cut: str) -> None:
    engine = engine_with()
    free = early(engine, policy=SOME)
    ends = set()
    for end in range(NEW):
        if free.token_ids[end] in free.token_ids[:end]:
            continue
        options = {"stop_ids": [free.token_ids[end]]} if cut == "stop" else {"max_new_tokens": end + 1}
        out = early(engine, policy=SOME, **options)
        assert out.token_ids == free.token_ids[: end + 1] and out.finish_reason == cut
        assert out.exit_layers == free.exit_layers[: end + 1]
        assert out.stats.num_committed == end + 1
        assert sum(out.stats.tokens_by_exit.values()) == sum(e is not None for e in out.exit_layers)
        ends.add(out.exit_layers[-1])
    assert ends >= {None, *EXITS}, "ends that exits wrote and ends that the full model wrote"


def test_stop_ids_are_banned_below_the_minimum(engine_with: Any) -> None:
    engine = engine_with()
    free = early(engine, policy=fixed_exit(2, 5)).token_ids
    banned = [free[3], free[6]]
    out = early(engine, policy=fixed_exit(2, 5), stop_ids=banned, min_new_tokens=9)
    assert not set(out.token_ids[:9]) & set(banned) and out.token_ids[:3] == free[:3]


@pytest.mark.hazard(5)
@pytest.mark.parametrize("room", [0, 1, 2, 15, 16, 17, 30])
def test_the_context_ends_it(engine_with: Any, room: int) -> None:
    prompt = [(7 * i + 3) % 199 for i in range(64 - room)]
    free = early(engine_with(), prompt, policy=SOME)
    out = early(engine_with(max_context=64), prompt, policy=SOME)
    assert out.token_ids == free.token_ids[:room] and out.finish_reason == "context"
    with pytest.raises(ContextTooLong):
        early(engine_with(max_context=64), [1] * 65, policy=SOME)


@pytest.mark.hazard(14)
def test_a_head_that_is_not_finite_is_not_sure(engine_with: Any) -> None:
    engine = engine_with()
    engine.heads.heads[1].projection = None
    engine.heads.heads[1].forward = lambda hidden: torch.full((len(hidden), 199), math.nan)
    out = early(engine, policy=fixed_exit(1, 5), logprobs=0)
    assert out.token_ids == plain(engine).token_ids and out.stats.tokens_by_exit == {} and out.error is None


@pytest.mark.hazard(14, 24)
def test_a_model_that_is_not_finite_ends_its_request_alone(engine_with: Any, monkeypatch: Any) -> None:
    engine, original, calls = engine_with(), early_exit.node_logits, [0]
    expected = early(engine, [PROMPT, *OTHERS], policy=every(EXITS, NEVER))

    def broken(*args: Any) -> torch.Tensor:
        logits = original(*args)
        calls[0] += 1
        if calls[0] == 5:
            logits[0] = math.nan
        return logits

    monkeypatch.setattr(early_exit, "node_logits", broken)
    first, *others = early(engine, [PROMPT, *OTHERS], policy=every(EXITS, NEVER))
    assert first.finish_reason == "error" and "NaN" in first.error and first.token_ids == expected[0].token_ids[:4]
    assert first.stats.num_committed == 4
    assert [out.token_ids for out in others] == [out.token_ids for out in expected[1:]]


@pytest.mark.parametrize("draft_ids", [None, torch.arange(0, 199, 3)], ids=["whole", "every third"])
def test_a_head_writes_in_its_own_vocabulary(engine_with: Any, engine_of: Any, draft_ids: Any) -> None:
    """And where the processors leave none of it, the full model does. Planted bug: outputs taken for token ids."""
    engine = engine_of()
    decoder, size = engine.decoder, None if draft_ids is None else len(draft_ids)
    specs = (HeadSpec("adapter", 2, {"width": 4}),)
    engine.heads = HeadSet(HeadSetConfig(decoder.config.hidden_size, 199, 4, specs, size), draft_ids)
    with torch.inference_mode():
        engine.heads.attach(Projection(decoder.final_norm, decoder.head_weight, None, PackedLinear))
    out = early(engine, policy=fixed_exit(2, 5), logprobs=2)
    written = [token for token, e in zip(out.token_ids, out.exit_layers, strict=True) if e == 2]
    assert len(written) > 30 and len(set(written)) > 3
    if draft_ids is None:
        assert out.token_ids == early(engine_with(), policy=fixed_exit(2, 5)).token_ids
        return
    assert all(token % 3 == 0 for token in written)

    def others_only(prefix: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits[::3] = -math.inf
        return logits

    out = early(engine, policy=fixed_exit(2, 5), logits_processor=others_only)
    assert out.error is None and set(out.exit_layers) == {None}
    assert out.token_ids == plain(engine, logits_processor=others_only).token_ids


def test_a_stream_is_what_generate_writes(engine_with: Any) -> None:
    engine = engine_with()
    out = early(engine, policy=SOME, logprobs=0)
    with engine.stream(PROMPT, mode="early_exit", policy=SOME, logprobs=0, max_new_tokens=NEW) as stream:
        events = list(stream)
    assert [e.token_id for e in events] == out.token_ids and [e.exit_layer for e in events] == out.exit_layers
    assert all((e.entropy is not None and e.entropy < 2.3) == e.drafted for e in events)
    assert [e.logprob for e in events] == [entry.logprob for entry in out.logprobs]
    with engine.stream(PROMPT, mode="early_exit", policy=SOME, max_new_tokens=NEW) as stream:
        for _ in range(7):
            next(stream)
    assert stream.result.finish_reason == "cancelled" and stream.result.token_ids == out.token_ids[:7]
    assert stream.result.mode == "early_exit"
    assert early(engine, policy=SOME).token_ids == out.token_ids


@pytest.mark.hazard(16)
def test_lossless_decoding_is_what_it_was_after_early_exit(engine_with: Any, monkeypatch: Any) -> None:
    """Also after an interrupt and after memory ran out."""
    engine = engine_with()
    expected = plain(engine, logprobs=2)
    for error in (None, KeyboardInterrupt(), torch.OutOfMemoryError("planted")):
        with monkeypatch.context() as patch:
            original, calls = early_exit.advance, [0]

            def failing(*args: Any, error: Any = error, calls: Any = calls, original: Any = original) -> None:
                calls[0] += 1
                if error is not None and calls[0] == 20:
                    raise error
                original(*args)

            patch.setattr(early_exit, "advance", failing)
            if error is None:
                early(engine, policy=SOME)
            else:
                wanted = MemoryError if isinstance(error, RuntimeError) else KeyboardInterrupt
                with pytest.raises(wanted, match="KV cache 2 x 4 layers" if wanted is MemoryError else None):
                    early(engine, policy=SOME)
        for options in ({"speculation": False}, {"policy": fixed_exit(2, 4)}, {"mode": "lossless"}):
            out = engine.generate(PROMPT, max_new_tokens=NEW, logprobs=2, **options)
            assert out.token_ids == expected.token_ids and out.logprobs == expected.logprobs
            assert out.mode == "lossless"


def test_accuracy_takes_the_calibrated_thresholds(engine_with: Any) -> None:
    engine = engine_with()
    assert early(engine, accuracy=0.95).exit_layers == early(engine, policy=SOME).exit_layers
    assert early(engine).token_ids == early(engine, accuracy=0.95).token_ids
    assert calibrated_exits(engine.heads, 0.95, [3]).exits == (3,)
    engine.heads.calibration = calibration(EXITS, low=0.0)
    out = early(engine)
    assert out.token_ids == plain(engine).token_ids and out.stats.tokens_by_exit == {}


REFUSED = [
    ({"mode": "fast"}, "mode is 'fast', expected one of"),
    ({"accuracy": 0.9}, "accuracy is of mode='early_exit'"),
    ({"mode": "early_exit", "accuracy": 0.5}, "accuracy is 0.5, expected within"),
    ({"mode": "early_exit", "accuracy": 1.0}, "accuracy is 1.0, expected within"),
    ({"mode": "early_exit", "speculation": "always"}, "speculation is 'always' in mode 'early_exit'"),
    ({"mode": "early_exit", "speculation": False}, "speculation is False in mode 'early_exit'"),
    ({"mode": "early_exit", "accuracy": 0.9, "policy": SOME}, "accuracy or policy, and both"),
    ({"mode": "early_exit", "policy": fixed_exit(9, 2)}, r"no heads at exits \[9\]"),
    ({"mode": "early_exit", "policy": likely((2,), 0.5)}, "has gates by entropy"),
    ({"mode": "early_exit", "policy": best_first()}, r"no heads at exits \[0\]"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
@pytest.mark.parametrize("how", ["generate", "stream"])
def test_what_makes_no_sense_is_refused(engine_with: Any, options: dict[str, Any], message: str, how: str) -> None:
    engine = engine_with()
    with pytest.raises(ValueError, match=message):
        getattr(engine, how)(PROMPT, **options)
    assert engine.generate(PROMPT, max_new_tokens=1).finish_reason == "length"


def test_heads_that_cannot_serve_are_refused(engine_of: Any, engine_with: Any, stateful: Any) -> None:
    engine = engine_with()
    engine.heads.calibration = None
    with pytest.raises(ValueError, match="needs calibrated heads"):
        early(engine)
    assert early(engine, policy=SOME).mode == "early_exit"
    engine = engine_of()
    with pytest.raises(ValueError, match="needs exit heads, and this engine has none"):
        early(engine)
    stateful(engine, "recurrent", "block")
    for options in ({}, {"policy": fixed_exit(2, 4)}, {"policy": best_first()}):
        with pytest.raises(ValueError, match="heads that read the trunk alone"):
            early(engine, **options)
    with pytest.raises(ValueError, match="in mode 'early_exit', which drafts"):
        engine_with().verify_lossless(PROMPT, mode="early_exit")


@pytest.fixture(scope="module")
def reader(tiny_folder: Path, tiny_heads_folder: Path) -> Engine:
    return load(tiny_folder, heads=tiny_heads_folder, dtype=torch.float32, device="cpu", progress=False)


@pytest.mark.hazard(3, 13)
def test_text_streams_and_stop_strings(reader: Engine) -> None:
    options = {"mode": "early_exit", "accuracy": 0.9, "max_new_tokens": 40, "ignore_eos": True}
    free = reader.generate("a stone skips", **options)
    assert len(set(free.exit_layers)) > 1
    with reader.stream("a stone skips", **options) as stream:
        assert "".join(event.text for event in stream) == free.text == stream.result.text
    for start in range(1, 12, 3):
        stop = free.text[start : start + 3]
        out = reader.generate("a stone skips", stop=stop, **options)
        assert out.text == free.text[: free.text.find(stop)] and out.finish_reason == "stop"
        assert out.stats.num_committed == len(out.token_ids) == len(out.exit_layers)
    chat = [{"role": "user", "content": "a stone"}]
    assert reader.chat(chat, **options).mode == "early_exit"


def test_on_an_engine_that_gives_up_equal_bits(engine_with: Any) -> None:
    out = early(engine_with(deterministic=False), policy=SOME)
    assert len(out.token_ids) == NEW and len(set(out.exit_layers)) > 2
