"""Text to token ids and back.

`Tokenizer` is a thin layer over a `transformers` fast tokenizer: its own BOS habit, its chat template, and the stop
ids of the generation config. Decoding is done here, token by token in bytes, so that a stream of pieces and the whole
text come from one code path: `"".join(pieces)` equals `decode(ids)` for every list of ids (hazard 13).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from .gguf_tokenizer import read_gguf_tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A model's tokenizer, with what generation needs to know of it.

    Args:
        backend: a fast (Rust-backed) transformers tokenizer.
        stop_ids: ids that end a sequence; empty means the backend's own eos token, if it has one.

    Raises:
        ValueError: a stop id below zero, or a backend whose decoder is of a kind this module cannot stream.
    """

    def __init__(self, backend: PreTrainedTokenizerFast, stop_ids: Iterable[int] = ()) -> None:
        self._hf: Any = backend
        ids = {int(i) for i in stop_ids}
        if not ids and isinstance(backend.eos_token_id, int):
            ids = {backend.eos_token_id}
        if any(i < 0 for i in ids):
            raise ValueError(f"stop_ids {sorted(ids)} hold a negative id; expected token ids of 0 or more")
        self.stop_ids: tuple[int, ...] = tuple(sorted(ids))
        self._bytes = _TokenBytes(self._hf.backend_tokenizer)

    @classmethod
    def from_folder(cls, folder: Path | str) -> Tokenizer:
        """Load from a checkpoint folder, with the stop ids of its generation_config.json (else config.json).

        Raises:
            FileNotFoundError: no such folder.
            ValueError: no fast tokenizer in it, or unreadable eos ids.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; expected one with tokenizer.json in it")
        backend = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return cls(_require_fast(backend, folder), read_stop_ids(folder))

    @classmethod
    def from_gguf(cls, path: Path | str) -> Tokenizer:
        """Load the tokenizer inside a GGUF file (seconds; `save` keeps the result for `from_folder`).

        Raises:
            FileNotFoundError, ValueError: as `read_gguf_tokenizer`.
        """
        return cls(*read_gguf_tokenizer(Path(path)))

    @property
    def vocab_size(self) -> int:
        """Number of ids the tokenizer knows; a model's V may be larger (padding rows)."""
        return len(self._hf)

    @property
    def eos_id(self) -> int | None:
        value = self._hf.eos_token_id
        return value if isinstance(value, int) else None

    @property
    def bos_id(self) -> int | None:
        value = self._hf.bos_token_id
        return value if isinstance(value, int) else None

    @property
    def has_chat_template(self) -> bool:
        return bool(self._hf.chat_template)

    def get_vocab(self) -> dict[str, int]:
        """Token string -> id."""
        return dict(self._hf.get_vocab())

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with `add_special_tokens` the tokenizer's own habit of adding BOS applies."""
        if not isinstance(text, str):
            raise ValueError(f"text is a {type(text).__name__}; expected str (a list of ids needs no encoding)")
        return list(self._hf(text, add_special_tokens=add_special_tokens)["input_ids"])

    def encode_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation through the chat template.

        Args:
            messages: dicts with "role" and "content".
            add_generation_prompt: end with the opening of the assistant's turn.

        Raises:
            ValueError: no chat template, no messages, or one without role or content.
        """
        # The template writes BOS itself where the model wants one, so nothing is added a second time.
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(text, add_special_tokens=False)

    def render_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The conversation as the text that `encode_chat` encodes. Raises as it does."""
        if not self.has_chat_template:
            raise ValueError("this tokenizer has no chat template (a base model?); use generate with plain text")
        if not messages:
            raise ValueError("messages is empty; expected at least one {'role': ..., 'content': ...}")
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise ValueError(f"messages[{i}] is {message!r}; expected a dict with 'role' and 'content'")
        rendered = self._hf.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return str(rendered)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of some ids. Malformed UTF-8 becomes U+FFFD; ids the tokenizer lacks contribute nothing."""
        stream = self.detokenizer(skip_special_tokens=skip_special_tokens)
        pieces = [stream.feed(i) for i in ids]
        return "".join(pieces) + stream.flush()

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh incremental decoder for one sequence."""
        return Detokenizer(self._bytes, skip_special_tokens)

    def save(self, folder: Path | str) -> None:
        """Write tokenizer files that `from_folder` (and transformers) load. Stop ids go with the generation config."""
        self._hf.save_pretrained(folder)


class Detokenizer:
    """Token ids in, text out, one sequence from its first token on.

    `feed` returns the characters that its token completed, perhaps none; bytes of an unfinished character wait, at
    most three of them. `flush` ends the sequence.
    """

    def __init__(self, token_bytes: _TokenBytes, skip_special_tokens: bool = True) -> None:
        self._token_bytes = token_bytes
        self._skip_special = skip_special_tokens
        # Python's incremental decoder, like the Rust one behind `tokenizers`, replaces each maximal broken part by
        # one U+FFFD, wherever the chunks end.
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_first = True

    def feed(self, token_id: int) -> str:
        """The text that this token completes. O(1) in the length of the sequence."""
        if self._skip_special and token_id in self._token_bytes.special_ids:
            return ""
        data = self._token_bytes.lookup(token_id)
        if data is None:
            return ""
        if self._is_first:
            data = self._token_bytes.at_start(data)
            self._is_first = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What was held back: U+FFFD for an unfinished character, else nothing. The decoder is then as new."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        self._is_first = True
        return rest


class _TokenBytes:
    """What each token adds to a text, in bytes, read off the decoder of a `tokenizers` tokenizer.

    Three kinds exist among the families here: byte-level BPE (each character of a token stands for a byte), the
    SentencePiece chain (a word mark for the space, `<0xNN>` for bytes, perhaps a space stripped at the very start),
    and none at all (tokens joined by spaces).
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.special_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        self._cache: dict[int, bytes | None] = {}
        self._strip_start = 0
        self._separator = b""
        self._word_mark: str | None = None
        self._byte_of: dict[str, int] | None = None
        self._byte_fallback = False
        decoder = backend.decoder
        spec = None if decoder is None else json.loads(decoder.__getstate__())
        self._read_decoder(spec)

    def _read_decoder(self, spec: dict[str, Any] | None) -> None:
        if spec is None:
            self._separator = b" "
            return
        for part in spec["decoders"] if spec["type"] == "Sequence" else [spec]:
            kind = part["type"]
            if kind == "ByteLevel":
                self._byte_of = _byte_level_alphabet()
            elif kind == "ByteFallback":
                self._byte_fallback = True
            elif kind == "Metaspace":
                self._word_mark = part["replacement"]
                self._strip_start = 1 if part.get("prepend_scheme", "always") != "never" else 0
            elif kind == "Replace" and part["pattern"] == {"String": "\u2581"} and part["content"] == " ":
                self._word_mark = "\u2581"
            elif kind == "Strip" and part["content"] == " " and part["stop"] == 0:
                self._strip_start = int(part["start"])
            elif kind != "Fuse":
                raise ValueError(
                    f"the tokenizer decodes with {json.dumps(part)}, which cannot be streamed here; expected "
                    "byte-level BPE or a SentencePiece chain (Replace, ByteFallback, Fuse, Strip, Metaspace)"
                )

    def lookup(self, token_id: int) -> bytes | None:
        """Bytes of a token inside a text; None when the tokenizer has no such id."""
        if token_id not in self._cache:
            token = self._backend.id_to_token(token_id) if token_id >= 0 else None
            self._cache[token_id] = None if token is None else self._separator + self._to_bytes(token)
        return self._cache[token_id]

    def at_start(self, data: bytes) -> bytes:
        """The same token's bytes when it opens the text."""
        data = data.removeprefix(self._separator)
        for _ in range(self._strip_start):
            data = data.removeprefix(b" ")
        return data

    def _to_bytes(self, token: str) -> bytes:
        if self._byte_of is not None:
            # A token with any character outside the alphabet (an added token with a space, say) stands for itself.
            values = [self._byte_of.get(c) for c in token]
            return token.encode() if None in values else bytes(v for v in values if v is not None)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.replace(self._word_mark, " ").encode() if self._word_mark else token.encode()


def read_stop_ids(folder: Path) -> list[int]:
    """Every eos id of generation_config.json, or of config.json when that names none; may be empty.

    Raises:
        ValueError: an eos_token_id that is neither an id nor a list of ids, naming file and value.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not ids or any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
            raise ValueError(f"{path}: eos_token_id is {value!r}; expected a token id or a list of them")
        return list(ids)
    return []


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's stand-in characters: printable Latin-1 bytes are themselves, the others follow from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _require_fast(backend: Any, source: Path) -> PreTrainedTokenizerFast:
    if getattr(backend, "backend_tokenizer", None) is None:
        raise ValueError(
            f"{source} holds a {type(backend).__name__}, which has no fast (Rust) tokenizer; expected tokenizer.json"
        )
    return backend
