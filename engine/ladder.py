"""How deep heads' drafts should be, learned while running.

A plan expects so much of every length (a rung) on rehearsed text; another text accepts more or less. The ladder counts,
position by position, how often a draft that was right so far went on to be right, starts from what the plan expects,
and the length with the most expected tokens a millisecond drafts next: of a chain its tokens, of a best-first tree its
levels. What the plan measured of the machine stays: a longer draft's acceptance is learned only by drafting it, so now
and then a draft is one rung longer than the best. In captured rounds heads draft before it is known that the text does,
beside them: those rounds take the longer the longer drafts are, too, and gain less by it.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

from .expectation import Expected

PRIOR_ROUNDS = 8.0  # that the plan's expectation counts for at each position
PROBE = 16  # every so many rounds are one rung longer
MEMORY = 0.98  # weight of what was seen, with each time that a position is seen again
SHARED = 0.5  # of what a longer draft brings, what it brings in a tree that the text shares (docs/log.md)


@dataclass
class Ladder:
    """`rungs`: length -> expected tokens and ms of its rounds, rising."""

    rungs: Mapping[int, Expected]
    rounds: int = 0
    _seen: list[float] = field(default_factory=list)
    _right: list[float] = field(default_factory=list)
    _gaining: float = 0.0  # rounds, of those remembered, that gain by longer drafts; shared ones count in part
    _anyhow: float = 0.0  # tokens of shared ones that do not depend on the length

    def __post_init__(self) -> None:
        tokens, reached, shares = 1.0, 1.0, list[float]()
        for length, rung in self.rungs.items():
            count = length - len(shares)
            share = _share(rung.tokens - tokens, reached, count)
            shares += [share] * count
            tokens, reached = max(tokens, rung.tokens), reached * share**count
        self._seen = [PRIOR_ROUNDS] * len(shares)
        self._right = [PRIOR_ROUNDS * share for share in shares]

    @property
    def acceptance(self) -> list[float]:
        """Of each position: how often a draft that is right before it is right there too."""
        return [right / seen for right, seen in zip(self._right, self._seen, strict=True)]

    @property
    def longest(self) -> int:
        """Of all rungs."""
        return len(self._seen)

    @property
    def next(self) -> int:
        """The length to draft now."""
        best = self.length
        if self.rounds % PROBE != PROBE - 1:
            return best
        return min((length for length in self.rungs if length > best), default=best)

    @property
    def length(self) -> int:
        """Of the draft that is expected to be the fastest."""
        fastest, best = 0, 0.0
        for length, tokens in enumerate(self._tokens, 1):
            both = self._anyhow + max(self._gaining, 1.0) * tokens
            if length in self.rungs and both / self.rungs[length].ms > best:
                fastest, best = length, both / self.rungs[length].ms
        return fastest

    @property
    def _tokens(self) -> list[float]:
        """Expected of drafts of 1, 2, ... tokens, by heads alone."""
        reached = itertools.accumulate(self.acceptance, operator.mul)
        return list(itertools.accumulate(reached, initial=1.0))[1:]

    def saw(self, length: int, accepted: int) -> None:
        """A round that might draft `length` tokens in a row, all that fits the text's budget, and how many were
        accepted."""
        self._count(1.0, 0.0)
        for position in range(min(length, accepted + 1, self.longest)):
            self._seen[position] = MEMORY * self._seen[position] + 1
            self._right[position] = MEMORY * self._right[position] + (position < accepted)

    def saw_text(self, length: int, tokens: int) -> None:
        """A captured round in which the text drafted beside heads, and the tokens that it brought."""
        self._count(SHARED, tokens - SHARED * self._tokens[min(max(length, 1), self.longest) - 1])

    def _count(self, gaining: float, anyhow: float) -> None:
        self.rounds += 1
        self._gaining, self._anyhow = MEMORY * self._gaining + gaining, MEMORY * self._anyhow + anyhow


def _share(gain: float, reached: float, count: int) -> float:
    """The acceptance s that `count` positions have in common if they bring reached (s + s^2 + ...) = `gain` tokens."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        enough = reached * sum(middle**n for n in range(1, count + 1)) >= gain
        low, high = (low, middle) if enough else (middle, high)
    return high if gain > 0 else 0.0
