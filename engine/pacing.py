"""Whether drafting pays: a budget of regret, kept while running.

Speculation must never make a user slower. The pace estimates a plain step's time; a round that drafted is charged what
it took beyond the plain steps that its tokens would have cost. While the sum stays within what decoding has earned (a
small share of its time) plus a credit of a few steps, drafting goes on. Once it is overdrawn, drafting pauses
until plain steps have earned the credit back. Where drafting pays the sum falls and nothing pauses; where it
never pays it costs the share and no more. Every pause in a row without a gain between them halves what plain steps
earn, so that trials grow rare: the cost of drafting that never pays falls with the length of the task.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SHARE = 0.02  # of decoding time, that trials may cost
CREDIT_STEPS = 4.0  # plain steps that one trial may lose before it is given up: less than a tenth of a short answer
GAIN_STEPS = 8.0  # gains remembered, in plain steps, so that a long losing stretch is noticed
WARM_STEPS = 4  # plain steps timed before the first draft; the fastest counts, the first ones are cold
MOST_HALVINGS = 3  # of the share, after trials that failed one after another; trials go on, for texts change
REFRESH_ROUNDS = 64  # drafting rounds after which a plain step is timed again


@dataclass
class Pace:
    """Running account, in ms; survives from request to request of one engine."""

    plain_ms: float | None = None
    owed_ms: float = 0.0
    paused: bool = False
    pauses: int = 0
    rounds_since_plain: int = 0
    failures: int = 0  # pauses since drafting last gained
    _warm: list[float] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of decoding time, what trials may cost now."""
        return SHARE / 2 ** min(max(0, self.failures - 1), MOST_HALVINGS)

    def drafting(self) -> bool:
        """Whether the next round should draft."""
        return self.plain_ms is not None and not self.paused and self.rounds_since_plain < REFRESH_ROUNDS

    def plain_step(self, ms: float) -> None:
        """Account for a step that was not asked to draft."""
        self.rounds_since_plain = 0
        if self.plain_ms is None:
            self._warm.append(ms)
            if len(self._warm) >= WARM_STEPS:
                self.plain_ms = min(self._warm)
            return
        # A shared host's outliers would otherwise make drafting look good.
        self.plain_ms += 0.1 * (min(ms, 1.5 * self.plain_ms) - self.plain_ms)
        self._owe(-self.share * ms)
        self.paused = self.paused and self.owed_ms > 0

    def drafting_round(self, ms: float, committed: float) -> None:
        """Account for a round that drafted; `committed` is tokens per sequence of the batch."""
        if self.plain_ms is None:
            return
        self.rounds_since_plain += 1
        self._owe(ms * (1 - self.share) - committed * self.plain_ms)
        if self.owed_ms <= -GAIN_STEPS * self.plain_ms:
            self.failures = 0
        if self.owed_ms > CREDIT_STEPS * self.plain_ms:
            self.paused = True
            self.pauses += 1
            self.failures += 1

    def _owe(self, ms: float) -> None:
        assert self.plain_ms is not None
        self.owed_ms = max(self.owed_ms + ms, -GAIN_STEPS * self.plain_ms)
