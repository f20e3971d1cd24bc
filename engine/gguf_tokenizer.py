"""The tokenizer inside a GGUF file, as a `transformers` fast tokenizer.

Byte-level BPE of a known kind and SentencePiece BPE (Llama 2, Mistral, Gemma) are built here from the file's own
tokens, merges, scores and ids. transformers' reader takes several seconds, forgets how the text is split before merging
("a  2" then gets ids that SmolLM2 never saw in training), in some releases reports the begin token as the end token,
and reads Gemma otherwise from release to release: 5.17 leaves the begin token out and merges in another order, which
costs a model that knows neither seven times its perplexity. Other kinds go through transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from .gguf_weights import read_gguf

_PREFIX = "tokenizer.ggml."
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def read_gguf_tokenizer(path: Path) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """Build the tokenizer of a GGUF file.

    Args:
        path: the file.

    Returns:
        The tokenizer, and its stop ids: end of sequence and, where the file names one, end of turn.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no tokenizer in it that transformers can turn into a fast one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; expected a .gguf file")
    fields = read_gguf(path).fields
    metadata = {name: fields[name].contents() for name in fields if name.startswith("tokenizer.")}
    if f"{_PREFIX}tokens" not in metadata:
        raise ValueError(f"{path} holds no tokenizer ({_PREFIX}tokens is missing); it may be one part of a split file")
    if metadata.get(f"{_PREFIX}model") == "gpt2" and metadata.get(f"{_PREFIX}pre") in _SPLITS:
        backend: Any = PreTrainedTokenizerFast(tokenizer_object=_byte_level_bpe(metadata))
    elif metadata.get(f"{_PREFIX}model") == "llama" and f"{_PREFIX}scores" in metadata:
        backend = PreTrainedTokenizerFast(tokenizer_object=_sentencepiece_bpe(metadata))
    else:
        backend = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        if getattr(backend, "backend_tokenizer", None) is None:
            raise ValueError(f"{path}: transformers made a {type(backend).__name__}, which has no fast tokenizer")
    tokens = metadata[f"{_PREFIX}tokens"]
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = metadata.get(f"{_PREFIX}{key}_token_id")
        if token_id is not None and 0 <= token_id < len(tokens):
            setattr(backend, f"{role}_token", tokens[token_id])
    if template := metadata.get("tokenizer.chat_template"):
        backend.chat_template = template
    stops = [metadata.get(f"{_PREFIX}{role}_token_id") for role in ("eos", "eot")]
    return backend, [int(token_id) for token_id in stops if token_id is not None]


def _byte_level_bpe(metadata: Mapping[str, Any]) -> Tokenizer:
    tokens: list[str] = metadata[f"{_PREFIX}tokens"]
    kinds: list[int] = metadata.get(f"{_PREFIX}token_type", [int(TokenType.NORMAL)] * len(tokens))
    merges: list[str] = metadata.get(f"{_PREFIX}merges", [])
    split = metadata[f"{_PREFIX}pre"]
    tokenizer = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            [_pair(merge) for merge in merges],
            ignore_merges=split == "llama-bpe",
        )
    )
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _SPLITS[split]
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=kind == TokenType.CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    _begin_with_bos(tokenizer, metadata, split == "llama-bpe")
    return tokenizer


def _sentencepiece_bpe(metadata: Mapping[str, Any]) -> Tokenizer:
    """Neighbours whose joint is a token are joined, the one with the best score first, the leftmost of equal ones;
    characters that no token holds become bytes. As llama.cpp does it, by ranked merges: of every token all pairs that
    make it up."""
    # runs of spaces are written as spaces, everything else with the mark that stands for one
    tokens = ["\u2581" * len(t) if t and not t.strip(" ") else t for t in metadata[f"{_PREFIX}tokens"]]
    kinds: list[int] = metadata.get(f"{_PREFIX}token_type", [int(TokenType.NORMAL)] * len(tokens))
    scores = metadata[f"{_PREFIX}scores"]
    if not len(scores) == len(kinds) == len(tokens):
        raise ValueError(f"a vocabulary of {len(tokens)} tokens has {len(scores)} scores and {len(kinds)} types")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    text = {t: i for t, i in vocabulary.items() if kinds[i] in (TokenType.NORMAL, TokenType.USER_DEFINED)}

    def rank(token: str) -> tuple[bool, float, int]:
        i = text[token]  # what users define has no score of its own, and is never cut
        return kinds[i] == TokenType.NORMAL, -scores[i], i

    merges = [
        (token[:at], token[at:])
        for token in sorted(text, key=rank)
        for at in range(1, len(token))
        if token[:at] in text and token[at:] in text
    ]
    unknown = metadata.get(f"{_PREFIX}unknown_token_id")
    prefix = bool(metadata.get(f"{_PREFIX}add_space_prefix", True))
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            merges,
            byte_fallback=True,
            fuse_unk=True,
            unk_token=None if unknown is None else tokens[unknown],
        )
    )
    marks = [normalizers.Prepend("\u2581")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*marks, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    back = decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip
    tokenizer.decoder = decoders.Sequence(list(back))
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == TokenType.CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == TokenType.CONTROL or (kind == TokenType.USER_DEFINED and token.strip("\u2581"))
        ]
    )
    _begin_with_bos(tokenizer, metadata, True)
    return tokenizer


def _begin_with_bos(tokenizer: Tokenizer, metadata: Mapping[str, Any], by_default: bool) -> None:
    bos = metadata.get(f"{_PREFIX}bos_token_id")
    if bos is not None and metadata.get(f"{_PREFIX}add_bos_token", by_default):
        token = metadata[f"{_PREFIX}tokens"][bos]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, bos)])


def _pair(merge: str) -> tuple[str, str]:
    """The two sides of a merge; no token of a byte-level vocabulary holds a space itself."""
    left, _, right = merge.partition(" ")
    return left, right


def _regex_split(numbers: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS % numbers), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# How text is split before merging, by the name that llama.cpp's converter gives it.
_SPLITS: dict[str, Any] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
    "qwen2": _regex_split(r"\p{N}"),
    "llama-bpe": _regex_split(r"\p{N}{1,3}"),
}
