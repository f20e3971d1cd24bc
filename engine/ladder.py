"""How deep heads' drafts should be, learned while running.

A plan expects so much of every length (a rung) on rehearsed text; another text accepts more or less. The ladder counts,
position by position, how often a draft that was right so far went on to be right, starts from what the plan expects,
and the length with the most expected tokens a millisecond drafts next: of a chain its tokens, of a best-first tree its
levels. What the plan measured of the machine stays: a longer draft's acceptance is learned only by drafting it, so now
and then a draft is one rung longer than the best. In captured rounds heads draft before it is known that the text does:
those rounds bring their tokens whatever the length, and take the longer the longer it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .expectation import Expected

PRIOR_ROUNDS = 8.0  # that the plan's expectation counts for at each position
PROBE = 16  # every so many rounds are one rung longer
MEMORY = 0.98  # weight of what was seen, with each time that a position is seen again


@dataclass
class Ladder:
    """`rungs`: length -> expected tokens and ms of its rounds, rising."""

    rungs: Mapping[int, Expected]
    rounds: int = 0
    _seen: list[float] = field(default_factory=list)
    _right: list[float] = field(default_factory=list)
    _own: float = 0.0  # rounds, of those remembered, in which the text did not draft
    _from_text: float = 0.0  # tokens of those in which it did

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
        tokens = reached = 1.0
        fastest, best = 0, 0.0
        for position, share in enumerate(self.acceptance, 1):
            reached *= share
            tokens += reached
            both = self._from_text + max(self._own, 1.0) * tokens
            if position in self.rungs and both / self.rungs[position].ms > best:
                fastest, best = position, both / self.rungs[position].ms
        return fastest

    def saw(self, length: int, accepted: int) -> None:
        """A round that might draft `length` tokens in a row, all that fits the text's budget, and how many were
        accepted."""
        self._count(own=1.0)
        for position in range(min(length, accepted + 1, self.longest)):
            self._seen[position] = MEMORY * self._seen[position] + 1
            self._right[position] = MEMORY * self._right[position] + (position < accepted)

    def saw_text(self, tokens: int) -> None:
        """A captured round in which the text drafted, and the tokens that it brought."""
        self._count(from_text=tokens)

    def _count(self, own: float = 0.0, from_text: float = 0.0) -> None:
        self.rounds += 1
        self._own, self._from_text = MEMORY * self._own + own, MEMORY * self._from_text + from_text


def _share(gain: float, reached: float, count: int) -> float:
    """The acceptance s that `count` positions have in common if they bring reached (s + s^2 + ...) = `gain` tokens."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        enough = reached * sum(middle**n for n in range(1, count + 1)) >= gain
        low, high = (low, middle) if enough else (middle, high)
    return high if gain > 0 else 0.0
