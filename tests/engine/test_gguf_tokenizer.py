"""SentencePiece BPE out of a GGUF file, against its definition: join the best neighbours until none join.

Planted bugs that these tests were seen to catch: scores taken the other way round, merges of byte tokens, no begin
token unless the file says so, no mark of a space in front of a text.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import gguf
import pytest
from skipstone.engine.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
MARK = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
USERS = ["  ", "   ", "\n", "\n\n", "[box]"]
WORDS = ["ab", "bc", "abc", "ca", "cab", "aa", "aaa", "bb", "é▁", "▁a", "▁ab", "▁b", "b▁", "a▁", "0a", "▁▁a"]
WORDS += ["<0", "<0x", "<0x4", "<0x41"]  # the text of a byte token is text
CHARS = [*"abc<0x41>é", MARK]
CONTROLS = ["<unk>", "<s>", "</s>", "<turn>"]


def written(path: Path, seed: int, flags: dict[str, bool]) -> tuple[list[str], dict[str, float]]:
    """A file with nothing but a vocabulary, words scored at random; returns tokens as they are written, and scores."""
    words = random.Random(seed).sample(WORDS, len(WORDS))
    tokens = [*CONTROLS, *BYTES, *USERS, *words, *CHARS]
    scores = [0.0] * (len(CONTROLS) + 256) + [-1000.0] * len(USERS) + [-float(i) for i in range(len(words))]
    scores += [-1e6] * len(CHARS)
    kinds = [UNKNOWN, *[CONTROL] * 3, *[BYTE] * 256, *[USER] * len(USERS), *[NORMAL] * (len(words) + len(CHARS))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, flag in flags.items():
        getattr(writer, f"add_{name}")(flag)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tokens, dict(zip(tokens, scores, strict=True))


def joined(text: str, tokens: list[str], scores: dict[str, float], prefix: bool) -> list[int]:
    """By definition. A run of spaces that users defined joins before anything else."""
    whole = sorted([*CONTROLS[1:], *(own for own in USERS if own.strip(" "))], key=len, reverse=True)
    at = {token: i for i, token in enumerate(tokens)}
    runs = {MARK * len(own): at[own] for own in USERS if not own.strip(" ")}
    known = {token: at[token] for token in (*WORDS, *CHARS)} | runs
    better = {token: (token not in runs, -scores.get(token, 0.0), known[token]) for token in known}
    found: list[int] = []
    for part in re.split("(" + "|".join(map(re.escape, whole)) + ")", text):
        if part in whole:
            found.append(at[part])
            continue
        symbols = list((MARK if prefix and part else "") + part.replace(" ", MARK))
        while True:
            pairs = [(better[one + two], i) for i, (one, two) in enumerate(zip(symbols, symbols[1:], strict=False))
                     if one in known and two in known and one + two in known]  # fmt: skip
            if not pairs:
                break
            _, i = min(pairs)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        for symbol in symbols:
            found += [known[symbol]] if symbol in known else [at[BYTES[byte]] for byte in symbol.encode()]
    return found


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_neighbours_are_joined(tmp_path: Path, seed: int, prefix: bool) -> None:
    tokens, scores = written(tmp_path / "x.gguf", seed, {"add_space_prefix": prefix})
    tokenizer, rng = Tokenizer.from_gguf(tmp_path / "x.gguf"), random.Random(seed)
    pieces = [*"aabbcc", " ", "  ", "\n", "é", "0", "<", "x", "日", "<turn>", "[box]", "<0x41>", "</s>", "\t"]
    for _ in range(200):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(0, 14)))
        ids = tokenizer.encode(text)
        assert ids == [1, *joined(text, tokens, scores, prefix)], text
        if not re.search(r"<turn>|</s>" + (r"|\[box\]|\n" if prefix else ""), text):
            assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.get_vocab().keys() >= {MARK * 2, MARK * 3, "[box]", "<0x00>"}
    assert list(tokenizer.stop_ids) == [2]


def test_a_vocabulary_without_all_its_scores_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "a", "b"])
    writer.add_token_scores([0.0, -1.0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="3 tokens has 2 scores"):
        Tokenizer.from_gguf(tmp_path / "x.gguf")


def test_the_begin_token_is_left_out_where_the_file_says_so(tmp_path: Path) -> None:
    written(tmp_path / "x.gguf", 0, {"add_bos_token": False})
    assert 1 not in Tokenizer.from_gguf(tmp_path / "x.gguf").encode("abc")
