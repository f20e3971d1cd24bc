"""How long a chain of heads' drafts should be, learned while running.

A plan expects so much of every length (a rung) on rehearsed text; another text accepts more or less. The ladder counts,
position by position, how often a draft that was right so far went on to be right, starts from what the plan expects,
and the length with the most expected tokens a millisecond drafts next. What the plan measured of the machine stays: a
longer draft's acceptance is learned only by drafting it, so now and then a draft is one token longer than the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .expectation import Expected

PRIOR_ROUNDS = 32.0  # that the plan's expectation counts for at each position
PROBE = 16  # every so many rounds are one token longer
MEMORY = 0.98  # weight of what was seen, with each time that a position is seen again


@dataclass
class Ladder:
    """Rung i is a chain of i + 1 tokens: expected tokens and ms of its rounds."""

    rungs: Sequence[Expected]
    rounds: int = 0
    _seen: list[float] = field(default_factory=list)
    _right: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        gains = [a.tokens - b for a, b in zip(self.rungs, [1.0, *(r.tokens for r in self.rungs)], strict=False)]
        reached, self._seen, self._right = 1.0, [], []
        for gain in gains:
            share = min(max(gain, 0.0) / reached, 1.0) if reached > 0 else 0.0
            self._seen.append(PRIOR_ROUNDS)
            self._right.append(PRIOR_ROUNDS * share)
            reached *= share

    @property
    def acceptance(self) -> list[float]:
        """Of each position: how often a draft that is right before it is right there too."""
        return [right / seen for right, seen in zip(self._right, self._seen, strict=True)]

    @property
    def next(self) -> int:
        """The length to draft now."""
        return min(self.length + (self.rounds % PROBE == PROBE - 1), len(self.rungs))

    @property
    def length(self) -> int:
        """Of the chain that is expected to be the fastest."""
        tokens = reached = 1.0
        fastest, best = 1, 0.0
        for i, (share, rung) in enumerate(zip(self.acceptance, self.rungs, strict=True)):
            reached *= share
            tokens += reached
            if tokens / rung.ms > best:
                fastest, best = i + 1, tokens / rung.ms
        return fastest

    def saw(self, length: int, accepted: int) -> None:
        """A round that might draft `length` tokens, all that fits the text's budget, and how many were accepted."""
        self.rounds += 1
        for position in range(min(length, accepted + 1, len(self.rungs))):
            self._seen[position] = MEMORY * self._seen[position] + 1
            self._right[position] = MEMORY * self._right[position] + (position < accepted)
