"""Where text begins: own prompts, plain text, the mix of temperatures.

The model that writes is a stand-in for `write_text`, so that what it "says" is known; SmolLM2 itself writes two turns
where its weights are installed.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from skipstone.engine import pretrained
from skipstone.engine.model import Decoder
from skipstone.engine.tokenizer import Tokenizer
from skipstone.train import sources
from skipstone.train.data import SelfText, is_held_out, make_batch
from skipstone.train.generate import Sampling
from skipstone.train.sources import (
    corpus_text,
    is_corpus,
    load_corpus,
    load_prompts,
    mix_temperatures,
    user_turn,
    write_prompts,
)
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{{ '<|start|>system be kind<|end|>' }}{% for m in messages %}{{ '<|start|>' + m['role'] + ' ' + m['content'] + "
    "'<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant ' }}{% endif %}"
)
IN_WORDS = "{{ bos_token }}{% for m in messages %}{{ 'Q: ' + m['content'] + ' A:' }}{% endfor %}"
TWICE = "{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}"


def make_tokenizer(template: str | None, bos: str = "<s>") -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = RustTokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(["<s>", "<|start|>", "<|end|>", "</s>"])
    return Tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=rust, bos_token=bos, eos_token="</s>", chat_template=template)
    )


def says(tokenizer: Tokenizer, turns: list[str], asked: list) -> Callable:
    """A `write_text` that continues the first prompt with the first turn, and so on over all calls."""
    left = iter(turns)

    def write(decoder: object, prompts: list, temperatures: list, sampling: Sampling, on_tokens: object) -> SelfText:
        asked.append((prompts, temperatures, sampling))
        texts = [p + tokenizer.encode(next(left, ""), add_special_tokens=False) for p in prompts]
        return SelfText.of(texts, [len(p) for p in prompts], [False] * len(prompts))

    return write


def test_the_opening_is_the_template_up_to_the_users_words() -> None:
    """Catches: BOS or the system turn left out, the end of turn not taken for a stop."""
    tokenizer = make_tokenizer(CHATML)
    turn = user_turn(tokenizer)
    assert tokenizer.decode(turn.opening, skip_special_tokens=False) == "<|start|>system be kind<|end|><|start|>user "
    assert turn.closing == "<|end|><|start|>assistant "
    vocabulary = tokenizer.get_vocab()
    assert turn.stop_ids == (vocabulary["<|end|>"], vocabulary["</s>"])
    plain = user_turn(make_tokenizer(IN_WORDS))
    assert plain.opening[0] == vocabulary["<s>"] and plain.closing == " A:" and plain.stop_ids == (vocabulary["</s>"],)
    with pytest.raises(ValueError, match="2 times"):
        user_turn(make_tokenizer(TWICE))


def test_turns_of_no_use_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty, unfinished, with a special token inside, without a word, repeated; then more are asked for."""
    tokenizer = make_tokenizer(CHATML)
    asked: list = []
    turns = [
        " Why? <|end|>", "<|end|>", "cut off", "a<|start|>b<|end|>", "?!<|end|>", "WHY?<|end|>", "How so</s>",
        "why?<|end|>", "Where<|end|>", "When<|end|>", "Who<|end|>",
    ]  # fmt: skip
    monkeypatch.setattr(sources, "write_text", says(tokenizer, turns, asked))
    decoder = object.__new__(Decoder)
    prompts = write_prompts(decoder, tokenizer, 5, max_tokens=20, temperature=0.9, seed=3)
    assert [p.text for p in prompts] == ["Why?", "How so", "Where", "When", "Who"]
    assert tokenizer.decode(prompts[1].ids, skip_special_tokens=False) == (
        "<|start|>system be kind<|end|><|start|>user How so<|end|><|start|>assistant "
    )
    (first, temperatures, sampling), (_, _, again), *_ = asked
    assert first[0] == user_turn(tokenizer).opening and set(temperatures) == {0.9}
    assert sampling.max_new_tokens == 20 and sampling.seed != again.seed
    monkeypatch.setattr(sources, "write_text", says(tokenizer, [], []))
    with pytest.raises(ValueError, match="no usable prompt"):
        write_prompts(decoder, tokenizer, 2)


def test_a_turn_closed_in_plain_words_is_cut_there(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer(IN_WORDS)
    monkeypatch.setattr(sources, "write_text", says(tokenizer, ["Why me A: since", "endless", "more</s>"], []))
    assert [p.text for p in write_prompts(object.__new__(Decoder), tokenizer, 2)] == ["Why me", "more"]


def test_without_a_template_documents_are_opened_from_bos(tiny: Callable) -> None:
    """The tiny model itself writes: openings start at BOS, differ, and go on as they are."""
    tokenizer = make_tokenizer(None, bos="a")  # an id of the tiny vocabulary
    config, weights = tiny("llama3")
    prompts = write_prompts(Decoder(config, weights), tokenizer, 6, seed=1)
    assert 0 < len(prompts) <= 6 and len({p.text for p in prompts}) == len(prompts)
    assert {p.ids[0] for p in prompts} == {tokenizer.bos_id}
    assert {len(p.ids) for p in prompts} == {1 + sources.OPENING_TOKENS}
    assert prompts == write_prompts(Decoder(config, weights), tokenizer, 6, seed=1)


def test_smollm2_asks_itself() -> None:
    try:
        model = pretrained.load_pretrained("smollm2-135m-instruct", torch.bfloat16, progress=False)
    except (FileNotFoundError, ValueError, ImportError) as error:
        pytest.skip(f"SmolLM2's weights are not installed: {error}")
    decoder = Decoder(model.config, model.weights, torch.bfloat16)
    prompts = write_prompts(decoder, model.tokenizer, 1, max_tokens=48, seed=5)
    assert prompts and all(p.ids == model.tokenizer.encode_chat([{"role": "user", "content": p.text}]) for p in prompts)


@pytest.mark.parametrize("name", ["c.txt", "c.txt.gz"])
def test_a_corpus_is_cut_into_pieces_that_hold_all_of_it(tmp_path: Path, name: str) -> None:
    lines = ["first line\n", "\n", "a second, longer line\n", "x" * 200 + "\n", "end"]
    data = "".join(lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert is_corpus(tmp_path / name) and not is_corpus("p.jsonl.gz")
    tokenizer = make_tokenizer(None)
    pieces = load_corpus(tmp_path / name, tokenizer, 16)
    assert max(len(p.ids) for p in pieces) == 16
    assert "".join(tokenizer.decode(p.ids) for p in pieces) == "".join(lines)
    # the split keeps pieces of one stretch together
    held = {p.text: is_held_out(p.text, 50.0) for p in pieces}
    assert len(held) < len(pieces)


def test_every_token_of_a_document_but_the_first_is_drafted(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("abcd")
    text = corpus_text(load_corpus(tmp_path / "c.txt", make_tokenizer(None), 16))
    batch = make_batch(text, [0], "cpu")
    assert batch.drafted.tolist() == [[True, True, True, False]]
    (tmp_path / "c.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="no text"):
        load_corpus(tmp_path / "c.txt", make_tokenizer(None), 16)


def test_prompts_go_through_the_template(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    tokenizer = make_tokenizer(CHATML)
    prompts = load_prompts(tmp_path / "p.jsonl", tokenizer, 1)
    assert [p.text for p in prompts] == ["one"]
    assert prompts[0].ids == tokenizer.encode_chat([{"role": "user", "content": "one"}])


@pytest.mark.parametrize(("copies", "fraction"), [(1, 0.0), (1, 1.0), (2, 0.5), (2, 0.25), (3, 0.1)])
def test_temperatures_are_mixed_as_asked(copies: int, fraction: float) -> None:
    pairs = mix_temperatures(100, copies, fraction, (0.7, 1.0))
    assert sorted(p for p, _ in pairs) == sorted(list(range(100)) * copies)
    greedy = [p for p, t in pairs if t == 0]
    assert len(greedy) == round(100 * copies * fraction) and len(set(greedy)) == len(greedy)
    sampled = [t for _, t in pairs if t]
    assert abs(sampled.count(0.7) - sampled.count(1.0)) <= 1
    half = [p for p in greedy if p < 50]
    assert abs(len(half) - len(greedy) / 2) <= 1  # evenly


def test_a_prompt_has_one_greedy_text() -> None:
    with pytest.raises(ValueError, match=r"expected 0 to 0\.5"):
        mix_temperatures(10, 2, 0.6)
    with pytest.raises(ValueError, match="above 0"):
        mix_temperatures(10, 2, 0.5, (0.0,))
