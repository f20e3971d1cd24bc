"""What a head set would have drafted, position by position, while held-out prompts were decoded plainly.

In greedy decoding an accepted prefix is the plain prefix, so these few bytes a token decide every round of every policy
(`engine/expectation.py` plays them). Kept inside calibration.json.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

MOST_NATS = 16.0  # entropies beyond are stored as this
CODES = 255  # entropies in a byte: MOST_NATS * (code / CODES)**2, steps of 0.03 nats at 1 nat


@dataclass(frozen=True)
class TreeCounts:
    """Best-first trees of one depth and node budget, over the rehearsed texts.

    Attributes:
        tokens: committed tokens a verification, bonus included.
        nodes: drafted nodes a verification (less than the budget where a text ends).
        steps: passes of the head a round.
    """

    tokens: float
    nodes: float
    steps: float


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """N positions, text after text; position i is the draft of new token i after a right prefix.

    Attributes:
        lengths: new tokens of each text; they sum to N.
        entropy: exit layer -> fp32 `[N]` nats; of exits that run through trunk layers.
        right: exit layer -> bool `[N]`, the head's best guess is the full model's token.
        chain_entropy: fp32 `[S, N]` nats of the head at exit 0 at each step of the chain that starts there; None
            without such a head.
        chain_right: int `[N]`, how many tokens of that chain are right before the first wrong one, at most S.
        text: int `[3, N]`, of drafts from the text itself: how many of the last tokens stand elsewhere in it, how many
            tokens follow there (15 at most), and how many of those are right before the first wrong one. None where it
            was not looked up.
        beam, branch: of `trees`.
        trees: (depth, nodes) -> what such trees gave.
    """

    lengths: tuple[int, ...]
    entropy: Mapping[int, np.ndarray] = field(default_factory=dict)
    right: Mapping[int, np.ndarray] = field(default_factory=dict)
    chain_entropy: np.ndarray | None = None
    chain_right: np.ndarray | None = None
    text: np.ndarray | None = None
    beam: int = 0
    branch: int = 0
    trees: Mapping[tuple[int, int], TreeCounts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        total = sum(self.lengths)
        arrays = [*self.entropy.values(), *self.right.values()]
        arrays += [] if self.chain_right is None else [self.chain_right]
        arrays += [] if self.chain_entropy is None else list(self.chain_entropy)
        arrays += [] if self.text is None else list(self.text)
        wrong = sorted({len(values) for values in arrays} - {total})
        if wrong or set(self.entropy) != set(self.right) or (self.chain_entropy is None) != (self.chain_right is None):
            raise ValueError(
                f"a rehearsal of {total} positions has arrays of {wrong or 'that length'}, entropies of exits "
                f"{sorted(self.entropy)} and verdicts of {sorted(self.right)}: expected the same of all"
            )

    def __eq__(self, other: object) -> bool:
        """Whether their stored forms are the same."""
        return isinstance(other, Rehearsal) and self.to_document() == other.to_document()

    @property
    def left(self) -> np.ndarray:
        """int `[N]`: tokens from each position to the end of its text."""
        return np.concatenate([np.arange(n, 0, -1) for n in self.lengths])

    def harder(self, kept: float) -> Rehearsal:
        """The same texts, had heads been right less often: of what they had right a share `kept` stays so, by a fixed
        draw for each position. What the text itself suggests stays: it is as good on other text (docs/log.md). Trees,
        known by their means, lose what chains of their depth lose."""
        draws = np.random.default_rng(0)
        size = sum(self.lengths)
        still, run = draws.random(size) < kept, draws.geometric(1.0 - kept, size) - 1  # tokens before one that is not
        right = {e: own & still for e, own in self.right.items()}
        if self.chain_right is None:
            return replace(self, right=right)
        trees = {}
        for (depth, nodes), own in self.trees.items():
            before = np.minimum(self.chain_right, depth)
            share = np.minimum(before, run).sum() / max(1, before.sum())
            trees[depth, nodes] = replace(own, tokens=1.0 + (own.tokens - 1.0) * float(share))
        return replace(self, right=right, chain_right=np.minimum(self.chain_right, run), trees=trees)

    def to_document(self) -> dict[str, Any]:
        """In types that JSON holds."""
        document: dict[str, Any] = {
            "lengths": list(self.lengths),
            "exits": {str(e): [_pack(_codes(self.entropy[e])), _pack(self.right[e])] for e in sorted(self.entropy)},
        }
        if self.chain_entropy is not None and self.chain_right is not None:
            document["chain"] = [len(self.chain_entropy), _pack(_codes(self.chain_entropy)), _pack(self.chain_right)]
        if self.text is not None:
            document["text"] = _pack(self.text)
        if self.trees:
            rows = [[*size, c.tokens, c.nodes, c.steps] for size, c in sorted(self.trees.items())]
            document["trees"] = {"beam": self.beam, "branch": self.branch, "rows": rows}
        return document

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Rehearsal:
        """Raises KeyError, TypeError or ValueError where something is missing or broken."""
        exits = {int(e): pair for e, pair in document["exits"].items()}
        chain, trees = document.get("chain"), document.get("trees", {"beam": 0, "branch": 0, "rows": []})
        text = document.get("text")
        return cls(
            tuple(int(n) for n in document["lengths"]),
            {e: _nats(_unpack(pair[0])) for e, pair in exits.items()},
            {e: _unpack(pair[1]).astype(bool) for e, pair in exits.items()},
            None if chain is None else _nats(_unpack(chain[1])).reshape(int(chain[0]), -1),
            None if chain is None else _unpack(chain[2]).astype(np.int64),
            None if text is None else _unpack(text).astype(np.int64).reshape(3, -1),
            int(trees["beam"]),
            int(trees["branch"]),
            {(int(d), int(n)): TreeCounts(*map(float, rest)) for d, n, *rest in trees["rows"]},
        )


def _codes(nats: np.ndarray) -> np.ndarray:
    return np.round(CODES * np.sqrt(np.clip(nats, 0.0, MOST_NATS) / MOST_NATS)).astype(np.uint8)


def _nats(codes: np.ndarray) -> np.ndarray:
    return (MOST_NATS * (codes.astype(np.float32) / CODES) ** 2).astype(np.float32)


def _pack(values: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(values, dtype=np.uint8).tobytes(), 9)).decode()


def _unpack(text: str) -> np.ndarray:
    try:
        return np.frombuffer(zlib.decompress(base64.b64decode(text, validate=True)), dtype=np.uint8)
    except zlib.error as error:
        raise ValueError(f"calibration.json's rehearsal is damaged ({error}); calibrate again") from error
