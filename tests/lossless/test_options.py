"""Every option of `generate`, plain against speculative: processors, filters, stops, seeds, logprobs, streams.

The drafts mix right and wrong guesses, chains and trees (`PlannedHeads`); a real head set with a draft vocabulary
is run, too. Text comes from a byte-level tokenizer, so most tokens are parts of characters.

Planted bugs: see test_planned_bugs.py; further seen to fail here: penalties that count the committed tokens only
(hazard 11), stop ids masked by the root's depth, logprobs of the processed distribution in one of the two modes.
"""

import math
from functools import partial

import pytest
import torch
from skipstone.engine.gate import ALWAYS, Gate, every, fixed_exit
from skipstone.engine.tokenizer import Tokenizer
from skipstone.heads.base import HeadSpec, Projection
from skipstone.heads.head_set import HeadSet, HeadSetConfig
from skipstone.kernels.linear import PackedLinear
from skipstone.kernels.noise import derive_seed
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PROMPT = [5, 17, 3, 99, 42, 17, 3]
NEW = 24
TREES = every((1, 2, 3), Gate(0.3, 1.5), branch=3, max_depth=6)
CHAIN = fixed_exit(2, 5)
LIKELY = every((1, 2, 3), Gate(0.3, 2.5), branch=2, max_depth=6, confidence="path")


def never_twice(prefix, logits):
    logits[prefix[-1]] = -math.inf
    return logits


def even_then_odd(prefix, logits):
    """A grammar of two states, from the prefix alone."""
    logits = logits.clone()
    logits[prefix[-1] % 2 :: 2] = -math.inf
    return logits


SAMPLED = {"temperature": 0.8, "seed": 3}
OPTIONS = {
    "greedy": {},
    "temperature": SAMPLED,
    "hot": {"temperature": 1.5, "seed": 3},
    "top_k": {**SAMPLED, "top_k": 5},
    "top_p": {**SAMPLED, "top_p": 0.7},
    "min_p": {**SAMPLED, "min_p": 0.1},
    "filters": {**SAMPLED, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    "repetition": {"repetition_penalty": 1.7},
    "repetition_sampled": {**SAMPLED, "repetition_penalty": 1.3},
    "presence": {"presence_penalty": 1.5},
    "frequency": {**SAMPLED, "frequency_penalty": 0.9},
    "bias": {"logit_bias": {3: 3.0, 5: -math.inf, 7: 2.0}},
    "processor": {"logits_processor": never_twice},
    "grammar": {**SAMPLED, "logits_processor": even_then_odd},
    "seed_of_64_bits": {"temperature": 1.0, "seed": 2**64 - 1},
    "nothing_to_do": {"max_new_tokens": 0},
    "one": {"max_new_tokens": 1},
}


@pytest.mark.hazard(10, 11, 12)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_option(options, engine_of, planned, assert_same_output):
    engine = engine_of("qwen2", torch.bfloat16)
    options = {"max_new_tokens": NEW, "logprobs": 3, **options}
    heads = planned(engine)
    plain = heads.learn(PROMPT, **options)
    assert_same_output(engine.generate(PROMPT, speculation=False, **options), plain)
    for policy in (TREES, CHAIN, LIKELY):
        out = engine.generate(PROMPT, policy=policy, **options)
        assert_same_output(out, plain)
        if options["max_new_tokens"] > 1:
            assert out.stats.num_accepted > 0
            assert out.stats.num_drafted > out.stats.num_accepted or policy is CHAIN


@pytest.mark.hazard(10)
def test_options_change_the_output(engine_of):
    """Otherwise the comparison above would say nothing about them."""
    engine = engine_of("qwen2", torch.bfloat16)
    for name, options in OPTIONS.items():
        base = {key: options[key] for key in ("temperature", "seed", "max_new_tokens") if key in options}
        if options != base:
            with_it, without = (engine.generate(PROMPT, **{"max_new_tokens": 40, **o}) for o in (options, base))
            assert with_it.token_ids != without.token_ids, name


@pytest.mark.hazard(10)
def test_bad_words_and_minimum_within_a_block(engine_of, planned, assert_same_output):
    """Bans that plain decoding runs into, in places that a block of drafts covers."""
    engine = engine_of("qwen2", torch.bfloat16)
    free = engine.generate(PROMPT, max_new_tokens=NEW).token_ids
    for options in (
        {"bad_words": [free[4:5], free[8:10], free[12:15]]},
        {"stop_ids": [free[3]], "min_new_tokens": 9},
        {"stop_ids": [free[3], free[6]], "min_new_tokens": 5, **SAMPLED},
    ):
        options = {"max_new_tokens": NEW, "logprobs": 0, **options}
        plain = planned(engine).learn(PROMPT, **options)
        assert plain.token_ids != free
        for policy in (TREES, CHAIN):
            assert_same_output(engine.generate(PROMPT, policy=policy, **options), plain)


@pytest.mark.hazard(11)
def test_penalty_sees_a_token_drafted_twice_in_one_block(engine_of, planned):
    """A repeated token is made likely; the penalty must count the copy in the block itself."""
    engine = engine_of()
    options = {"max_new_tokens": NEW, "logit_bias": {7: 9.0, 8: 8.0, 9: 7.0}, "frequency_penalty": 0.8}
    heads = planned(engine, "right", exits=(2,))
    plain = heads.learn(PROMPT, **options)
    assert plain.token_ids[:6].count(7) > 1, "several copies within the first block"
    # A head that does not know the penalty proposes the plain model's pet token all along, and the right one.
    heads.plan = lambda place: {place.guess: 50.0, 7: 50.0}
    policy = every((2,), Gate(0.1, 1.5), branch=2, max_depth=5)
    for chosen in (policy, fixed_exit(2, 8)):
        out = engine.generate(PROMPT, policy=chosen, **options)
        assert out.token_ids == plain.token_ids


@pytest.mark.hazard(24)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9}], ids=["greedy", "sampled"])
def test_return_sequences_and_seeds(sampling, engine_of, planned, assert_same_output):
    engine = engine_of()
    heads = planned(engine)
    prompts, options = [PROMPT, [8]], {"max_new_tokens": 12, "logprobs": 1, **sampling}
    plain = [
        heads.learn(ids, seed=derive_seed(7, i), **options)
        for i, ids in enumerate(ids for ids in prompts for _ in "ab")
    ]
    outs = engine.generate(prompts, num_return_sequences=2, seed=7, policy=TREES, **options)
    for out, expected in zip(outs, plain, strict=True):
        assert_same_output(out, expected)
    if sampling:
        assert plain[0].token_ids != plain[1].token_ids
    again = engine.generate(prompts, num_return_sequences=2, seeds=[derive_seed(7, i) for i in range(4)], **options)
    assert [out.token_ids for out in again] == [out.token_ids for out in plain]


# ---- ends of outputs inside blocks


@pytest.mark.hazard(1)
def test_stop_id_at_each_place_of_a_block_and_as_bonus(engine_of, planned, assert_same_output):
    """Blocks of 6: stop ids land on accepted places 0..4 and on the bonus token, in the first blocks and later ones."""
    engine = engine_of()
    heads = planned(engine, "right", exits=(2,))
    free = heads.learn(PROMPT, max_new_tokens=NEW, logprobs=0)
    ends = set()
    for end in range(14):
        if free.token_ids[end] in free.token_ids[:end]:
            continue
        options = {"max_new_tokens": NEW, "logprobs": 0, "stop_ids": [free.token_ids[end]]}
        out = engine.generate(PROMPT, policy=CHAIN, **options)
        assert out.token_ids == free.token_ids[: end + 1] and out.finish_reason == "stop"
        assert out.logprobs == free.logprobs[: end + 1] and len(out.exit_layers) == end + 1
        assert_same_output(out, engine.generate(PROMPT, speculation=False, **options))
        ends.add(end % 6)
    assert ends == set(range(6))


@pytest.mark.hazard(2)
def test_stop_id_and_budget_in_one_block(engine_of, planned, assert_same_output):
    engine = engine_of()
    free = planned(engine, "right", exits=(2,)).learn(PROMPT, max_new_tokens=NEW)
    at = next(i for i in range(7, NEW) if free.token_ids[i] not in free.token_ids[:i])
    for budget in range(at - 1, at + 5):
        out = engine.generate(PROMPT, policy=CHAIN, max_new_tokens=budget, stop_ids=[free.token_ids[at]])
        assert out.finish_reason == ("stop" if budget > at else "length")
        assert out.token_ids == free.token_ids[: min(budget, at + 1)]


@pytest.fixture(scope="module")
def byte_tokenizer():
    """256 byte tokens and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({symbol: i for i, symbol in enumerate(alphabet)} | {"</s>": 256}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), stop_ids=[256])


def writing(tokens, prompt_len, prefix, logits):
    """A processor that makes the model write these tokens."""
    forced = torch.full_like(logits, -math.inf)
    forced[tokens[(len(prefix) - prompt_len) % len(tokens)]] = 0.0
    return forced


TEXT = "A stone 👩‍👩‍👧 skips — 漢字, e\u0301 over. "


@pytest.fixture
def writer(engine_of, planned, byte_tokenizer):
    """An engine with text whose model writes TEXT over and over, and its plain output; drafts are right."""
    engine = engine_of("llama2", vocab_size=257)
    engine.tokenizer = byte_tokenizer
    tokens = byte_tokenizer.encode(TEXT)
    options = {"max_new_tokens": len(tokens) + 7, "logprobs": 0}
    options["logits_processor"] = partial(writing, tokens, 2)
    heads = planned(engine, "right", exits=(2,))
    return engine, options, heads.learn([65, 66], **options)


@pytest.mark.hazard(13)
@pytest.mark.parametrize("length", [0, 1, 2, 3, 5, 11])
def test_stream_adds_up_to_the_text(length, writer):
    """Blocks end inside the emoji at every length; a glyph is streamed whole."""
    engine, options, plain = writer
    assert TEXT in plain.text
    stream = engine.stream([65, 66], policy=fixed_exit(2, length), **options)
    events = list(stream)
    assert "".join(event.text for event in events) == plain.text == stream.result.text
    assert [event.token_id for event in events] == plain.token_ids
    assert [event.logprob for event in events] == [entry.logprob for entry in plain.logprobs]
    assert [event.exit_layer for event in events] == stream.result.exit_layers
    assert all("\ufffd" not in event.text for event in events[:-1])
    assert any(event.drafted for event in events) == (length > 0)


@pytest.mark.hazard(3, 13)
@pytest.mark.parametrize("stop", ["skips", "👧", "漢字, e", "zz", " over. A", "one 👩‍👩"])
def test_stop_string_in_mid_block_and_across_blocks(stop, writer, assert_same_output):
    """Text, ids, logprobs and stream are cut alike, wherever blocks end."""
    engine, options, free = writer
    plain = engine.generate([65, 66], speculation=False, stop=stop, **options)
    assert plain.text == (free.text[: free.text.index(stop)] if stop in free.text else free.text)
    assert len(plain.logprobs) == len(plain.token_ids) < len(free.token_ids) or stop == "zz"
    for length in (1, 2, 4, 7):
        out = engine.generate([65, 66], policy=fixed_exit(2, length), stop=stop, **options)
        assert_same_output(out, plain)
        stream = engine.stream([65, 66], policy=fixed_exit(2, length), stop=stop, **options)
        events = list(stream)
        assert "".join(event.text for event in events) == plain.text
        assert [event.token_id for event in events] == plain.token_ids
        assert_same_output(stream.result, plain)


def test_end_token_writes_nothing_and_ignore_eos_goes_on(writer, byte_tokenizer, assert_same_output):
    engine, _, _ = writer
    tokens = [*byte_tokenizer.encode("end"), 256, 66]
    options = {"max_new_tokens": 8, "logits_processor": partial(writing, tokens, 2)}
    for policy in (None, fixed_exit(2, 6)):
        out = engine.generate([65, 66], policy=policy, **options)
        assert out.text == "end" and out.token_ids == tokens[:4] and out.finish_reason == "stop"
        out = engine.generate([65, 66], policy=policy, ignore_eos=True, **options)
        assert out.token_ids == (tokens * 2)[:8] and out.finish_reason == "length"


# ---- real heads


@pytest.mark.parametrize("draft_vocab", [None, 60])
@pytest.mark.parametrize("kind", ["linear", "adapter"])
def test_a_real_head_set(kind, draft_vocab, engine_of, assert_same_output):
    """Heads as they start before training, that is the model's own norm and LM head at earlier layers."""
    engine = engine_of("llama2", torch.bfloat16)
    config, decoder = engine.decoder.config, engine.decoder
    specs = tuple(HeadSpec(kind, exit_layer) for exit_layer in (1, 3))
    sizes = HeadSetConfig(config.hidden_size, config.vocab_size, config.num_layers, specs, draft_vocab)
    ids = None if draft_vocab is None else torch.arange(0, 3 * draft_vocab, 3)
    heads = HeadSet(sizes, ids)
    heads.initialise(Projection(decoder.final_norm, decoder.head_weight))
    heads.attach(Projection(decoder.final_norm, decoder.head_weight, None, PackedLinear))
    engine.heads = heads
    for sampling in ({}, {"temperature": 0.8, "top_k": 20}):
        options = {"max_new_tokens": 40, "logprobs": 1, **sampling}
        plain = engine.generate(PROMPT, speculation=False, **options)
        accepted = 0
        for policy in (every((1, 3), ALWAYS), every((3,), Gate(0.0, 9.0), branch=3, max_depth=3)):
            out = engine.generate(PROMPT, policy=policy, **options)
            assert_same_output(out, plain)
            assert out.stats.num_drafted > 0
            accepted += out.stats.num_accepted
        if draft_vocab is None:
            assert accepted > 0
