"""Tokenizer and streaming detokenizer: pieces add up to the text, whatever the ids.

Regimes: a byte-level BPE and a SentencePiece-like BPE built here (both always run), and SmolLM2's own tokenizer where
its weights package is installed. Texts mix emoji with joiners, CJK, combining marks and plain words; ids are arbitrary,
so most sequences cut characters apart or are not UTF-8 at all.
"""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skipstone.engine import pretrained
from skipstone.engine.tokenizer import Tokenizer, read_stop_ids
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the cat sat on the mat, the hat",
    "naïve café 東京 東京 日本",
    "👩‍👩‍👧 👍🏽 e\u0301 a\u0308\u0323 \u0915\u094d\u0937",
    "  two  spaces\n\n",
]
TEXTS = st.lists(
    st.sampled_from(
        [*CORPUS, "👩‍👩‍👧‍👦", "🇫🇷", "漢字", "e\u0301", "\u0301", " ", "\n", "a", "don't", "\ufffd", "\x00"]
    ),
    max_size=6,
).map("".join)


def byte_level() -> Tokenizer:
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    rust.train_from_iterator(CORPUS, trainer)
    rust.add_tokens([AddedToken("two words", normalized=False)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>"))


def sentencepiece_like() -> Tokenizer:
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "\u2581",
        *"thecasonmt,",
        "th",
        "the",
        "\u2581the",
    ]
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the")]
    rust = RustTokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    rust.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    )


def smollm2() -> Tokenizer:
    if not pretrained.is_available("smollm2-135m-instruct"):
        pytest.skip(
            "SmolLM2's weights package is not installed: " + pretrained.install_command("smollm2-135m-instruct")
        )
    return Tokenizer.from_folder(pretrained.resolve("smollm2-135m-instruct", progress=False))


MAKERS = {"byte_level": byte_level, "sentencepiece": sentencepiece_like, "smollm2": smollm2}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return MAKERS[request.param]()


def stream(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    return [*(detokenizer.feed(i) for i in ids), detokenizer.flush()]


@pytest.mark.hazard(13)
def test_pieces_of_any_ids_add_up_to_the_text(tokenizer: Tokenizer) -> None:
    """Planted bug: decoding each token by itself turns every split emoji into U+FFFD and fails at once."""

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40), st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        assert "".join(stream(tokenizer, ids, skip=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)

    check()


@pytest.mark.hazard(13)
def test_text_survives_the_stream_and_no_glyph_is_split(tokenizer: Tokenizer) -> None:
    """Of a text's own ids, no piece may hold U+FFFD unless the text does, and every prefix is a prefix of the text.

    Planted bug: flushing the byte decoder after each token.
    """

    @settings(max_examples=150, deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        pieces = stream(tokenizer, ids)
        assert "".join(pieces) == text
        assert pieces[-1] == "" and sum(p.count("\ufffd") for p in pieces) == text.count("\ufffd")

    check()


@pytest.mark.parametrize("maker", ["byte_level", "smollm2"])
def test_decode_equals_the_rust_decoder(maker: str) -> None:
    """For byte-level tokenizers our decoder equals transformers' on any ids, malformed ones too.

    (For byte fallback the Rust decoder voids a whole run of bytes for one bad byte, which no stream can follow.)
    """
    tokenizer = MAKERS[maker]()

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30), st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        expected = tokenizer._hf.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids, skip_special_tokens=skip) == expected

    check()


def test_sentencepiece_text_equals_the_rust_decoder() -> None:
    """The space that the normaliser adds in front is taken off once, and inner spaces stay."""
    tokenizer = sentencepiece_like()
    for text in ["the cat", " the cat", "  the", "", "東京 the", "the\u0301 "]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == tokenizer._hf.decode(ids, skip_special_tokens=True) == text


@pytest.mark.hazard(13)
def test_emoji_waits_for_its_last_byte() -> None:
    tokenizer = byte_level()
    ids = [tokenizer.get_vocab()[c] for c in "ðŁĺĢ"]  # the four bytes of U+1F600 in GPT-2's alphabet
    assert stream(tokenizer, ids) == ["", "", "", "\U0001f600", ""]
    assert stream(tokenizer, ids[:3]) == ["", "", "", "\ufffd"]
    assert stream(tokenizer, [*ids[:3], tokenizer.get_vocab()["a"]]) == ["", "", "", "\ufffda", ""]


def test_special_tokens_are_silent_unless_asked_for() -> None:
    tokenizer = byte_level()
    ids = [tokenizer.bos_id or 0, *tokenizer.encode("the"), *tokenizer.stop_ids]
    assert tokenizer.decode(ids) == "the"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>the</s>"


def test_feed_costs_the_same_late_in_a_sequence() -> None:
    """Planted bug: decoding the whole sequence at every token, 40 000 tokens of which take minutes."""
    tokenizer = byte_level()
    ids = tokenizer.encode(CORPUS[2], add_special_tokens=False) * 2000
    start = time.perf_counter()
    stream(tokenizer, ids)
    assert len(ids) > 10_000 and time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 3]}, {"eos_token_id": 1}, (3, 7)),
        ({"eos_token_id": 2}, {"eos_token_id": 1}, (2,)),
        ({"temperature": 0.6}, {"eos_token_id": 5}, (5,)),
        (None, {}, (1,)),  # the tokenizer's own </s>
    ],
)
def test_stop_ids_come_from_the_generation_config_first(tmp_path, generation, config, expected) -> None:
    """Planted bug: keeping only the first id of a list, or preferring the tokenizer's."""
    byte_level().save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert Tokenizer.from_folder(tmp_path).stop_ids == expected


@pytest.mark.parametrize("value", ["</s>", [], [1, "x"], -1, True])
def test_bad_eos_ids_are_refused_by_file_and_value(tmp_path, value) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id is"):
        read_stop_ids(tmp_path)


def test_bos_is_the_tokenizers_own_habit() -> None:
    from tokenizers.processors import TemplateProcessing

    plain = byte_level()
    assert plain.encode("the") == plain.encode("the", add_special_tokens=False)
    habit = byte_level()
    habit._hf.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    assert habit.encode("the") == [0, *plain.encode("the")]


def test_chat_refusals() -> None:
    tokenizer = byte_level()
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    tokenizer._hf.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert tokenizer.encode_chat([{"role": "user", "content": "the"}]) == [0, *tokenizer.encode("the")]
    with pytest.raises(ValueError, match="messages is empty"):
        tokenizer.encode_chat([])
    with pytest.raises(ValueError, match=r"messages\[0\]"):
        tokenizer.encode_chat([{"role": "user"}])


def test_unknown_decoder_is_refused() -> None:
    rust = RustTokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    rust.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="cannot be streamed"):
        Tokenizer(PreTrainedTokenizerFast(tokenizer_object=rust))


def test_smollm2_stop_ids_chat_and_digits() -> None:
    """Stop id 2 only (`<|im_end|>`); the real template with its system turn; digits split before spaces are merged.

    Ids of "a  2": the tokenizer that transformers rebuilds from the GGUF file gives two single spaces instead.
    """
    tokenizer = smollm2()
    assert tokenizer.stop_ids == (2,) and tokenizer.eos_id == 2 and tokenizer.vocab_size == 49152
    assert tokenizer.decode(tokenizer.stop_ids, skip_special_tokens=False) == "<|im_end|>"
    rendered = tokenizer.render_chat([{"role": "user", "content": "Hi"}])
    assert rendered == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert ids.count(1) == 3 and ids.count(2) == 2
    assert tokenizer.decode(ids, skip_special_tokens=False) == rendered
    vocabulary = tokenizer.get_vocab()
    assert tokenizer.encode("a  2") == [vocabulary["a"], vocabulary["ĠĠ"], vocabulary["2"]]
