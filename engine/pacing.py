"""Whether drafting pays: a budget of regret for each source of drafts, kept while running.

Speculation must never make a user slower. The pace estimates a plain step's time, by how long the text is (powers of
two, for a step takes longer the more stands before it); a round that drafted is charged what it took beyond the plain
steps that its tokens would have cost, to the account of the source that drafted: the text, or heads. While an account
stays within what decoding has earned for it (a small share of its time) plus a credit of a few steps, its source goes
on. Once it is overdrawn, that source pauses until other rounds have earned the credit back: heads may rest while the
text drafts, and the other way round. Where drafting pays the sum falls and nothing pauses; where it never pays it
costs the share and no more. Every pause in a row without a gain between them halves what an account earns, so that
trials grow rare: the cost of drafting that never pays falls with the length of the task. A pause must not outlast the
texts that it was for, either: a paused source tries every new text, and goes on there until it has lost a step, if
what it lost in all texts, less what it gained, is little more than decoding has earned for it. Gains elsewhere pay for
such trials, and count little in a new text otherwise.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from .gate import PLAIN, DraftPolicy, Source
from .ladder import Ladder

SHARE = 0.02  # of decoding time, that the trials of all sources may cost
CREDIT_STEPS = 3.5  # plain steps that one trial may lose before it is given up: less than a tenth of a short answer
GAIN_STEPS = 8.0  # gains remembered, in plain steps, so that a long losing stretch is noticed
CARRIED_STEPS = 2.0  # of them, into another text
WARM_STEPS = 4  # plain steps timed before the first draft; the fastest counts, the first ones are cold
WARM_STEPS_LONGER = 2  # the same where texts of another length were timed before
SHORT = 8  # bits of a length: all up to 255 tokens are timed together
MOST_HALVINGS = 3  # of the share, after trials that failed one after another; trials go on, for texts change
REFRESH_ROUNDS = 64  # drafting rounds after which a plain step is timed again
SELDOM = 4  # times as many where drafting has gained and owes nothing: a slower machine ends that, and is seen
TRIAL_STEPS = 1.0  # plain steps that a paused source may lose before it pauses again
AHEAD_STEPS = 7.0  # plain steps that a source may have lost in all texts before decoding has earned them
SAVED_STEPS = 64.0  # gains of a source that are remembered to pay for trials, in plain steps
LONGEST_ROUND = 17  # tokens: a text that grows by more, or shrinks, is another one
OUTLIER = 3.0  # times the usual time of a source's rounds: what is beyond came from elsewhere


@dataclass
class Account:
    """What one source of drafts has lost, in ms."""

    owed_ms: float = 0.0  # in this text, with what was carried into it
    lost_ms: float = 0.0  # in all texts, less what was earned for it
    paused: bool = False
    pauses: int = 0
    failures: int = 0  # pauses since its drafts last gained
    usual_ms: float | None = None  # of its rounds

    @property
    def share(self) -> float:
        """Of decoding time, what trials of all sources may cost if all fared like this one."""
        return SHARE / 2 ** min(max(0, self.failures - 1), MOST_HALVINGS)

    def may_try(self, plain_ms: float) -> bool:
        """Whether its drafts together have cost little enough for one trial more."""
        return self.lost_ms <= AHEAD_STEPS * plain_ms

    def begin(self, plain_ms: float) -> None:
        """A new text: what was gained on others counts little for it, but pays for a trial if the source is paused."""
        if not self.paused:
            self.owed_ms = max(self.owed_ms, -CARRIED_STEPS * plain_ms)
        elif self.may_try(plain_ms):
            self.paused, self.owed_ms = False, (CREDIT_STEPS - TRIAL_STEPS) * plain_ms

    def without_stalls(self, ms: float, plain_ms: float) -> float:
        """A round's time, without most of what a busy host, a collection of garbage or a capture put on top: one such
        stall would pause a source that pays for hundreds of tokens. Rounds that stay slow are usual soon."""
        usual = min(ms, OUTLIER * (plain_ms if self.usual_ms is None else self.usual_ms))
        self.usual_ms = usual if self.usual_ms is None else self.usual_ms + 0.1 * (usual - self.usual_ms)
        return usual


@dataclass
class Pace:
    """Running accounts; they survive from request to request of one engine. `ladder`, if any, says how long heads'
    drafts should be. `trusted` sources were measured before, as heads are when they are calibrated: they begin with all
    the gain that is ever remembered, so that a bad start does not put them out for hundreds of tokens."""

    plain_ms: float | None = None
    rounds_since_plain: int = 0
    accounts: dict[Source, Account] = field(default_factory=dict)
    ladder: Ladder | None = None
    trusted: frozenset[Source] = frozenset()
    _warm: list[float] = field(default_factory=list)
    _reach: int | None = None
    _length: int = 0
    _elsewhere: dict[int, tuple[float | None, int, list[float]]] = field(default_factory=dict)

    @property
    def paused(self) -> frozenset[Source]:
        """Sources that do not draft now."""
        return frozenset(source for source, account in self.accounts.items() if account.paused)

    @property
    def resting(self) -> bool:
        """Whether every source is paused."""
        return bool(self.accounts) and len(self.paused) == len(self.accounts)

    def place(self, length: int) -> None:
        """The next rounds stand behind so many tokens: what a plain step takes there is known apart from elsewhere."""
        another = not self._length <= length <= self._length + LONGEST_ROUND
        self._length = length
        reach = max(SHORT, length.bit_length())
        if self._reach not in (None, reach):
            self._elsewhere[self._reach] = self.plain_ms, self.rounds_since_plain, self._warm
            unknown: tuple[float | None, int, list[float]] = None, 0, []
            self.plain_ms, self.rounds_since_plain, self._warm = self._elsewhere.pop(reach, unknown)
        self._reach = reach
        if another and self.plain_ms is not None:
            for account in self.accounts.values():
                account.begin(self.plain_ms)

    def next(self, policy: DraftPolicy) -> DraftPolicy:
        """How the next round should draft."""
        for source in policy.sources:
            self.accounts.setdefault(source, Account())
        if self.plain_ms is None or self.rounds_since_plain >= self._refresh_after():
            return PLAIN
        policy = policy.without(self.paused)
        return policy if self.ladder is None else replace(policy, max_depth=self.ladder.next)

    def round(self, ms: float, committed: float, sources: Collection[Source] = ()) -> None:
        """Account for a round: of `sources` that were asked for drafts, or a plain step; `committed` is tokens per
        sequence of the batch."""
        if not sources:
            self._time(ms)
        if self.plain_ms is None or not self.accounts:
            return
        self.rounds_since_plain = self.rounds_since_plain + 1 if sources else 0
        for source, account in self.accounts.items():
            took, lost = ms, None
            if source in sources:
                took = account.without_stalls(ms, self.plain_ms)
                lost = (took - committed * self.plain_ms) / len(sources)
            self._charge(account, took, lost)

    def _refresh_after(self) -> int:
        """Drafting rounds until a plain step is timed again."""
        assert self.plain_ms is not None
        gained = -GAIN_STEPS * self.plain_ms
        gains = any(account.lost_ms <= gained and account.owed_ms <= 0 for account in self.accounts.values())
        return REFRESH_ROUNDS * (SELDOM if gains else 1)

    def _time(self, ms: float) -> None:
        if self.plain_ms is not None:
            # A shared host's outliers would otherwise make drafting look good.
            self.plain_ms += 0.1 * (min(ms, 1.5 * self.plain_ms) - self.plain_ms)
            return
        self._warm.append(ms)
        before = any(known is not None for known, _, _ in self._elsewhere.values())
        if len(self._warm) >= (WARM_STEPS_LONGER if before else WARM_STEPS):
            self.plain_ms = min(self._warm)
            if not before:
                for source in self.trusted & self.accounts.keys():
                    self.accounts[source].owed_ms = self.accounts[source].lost_ms = -GAIN_STEPS * self.plain_ms

    def _charge(self, account: Account, ms: float, lost: float | None) -> None:
        """One account's part of a round of `ms`: what it earned, and what it lost if it drafted."""
        assert self.plain_ms is not None
        earned = account.share * ms / len(self.accounts)
        account.owed_ms = max(account.owed_ms + (lost or 0.0) - earned, -GAIN_STEPS * self.plain_ms)
        account.lost_ms = max(account.lost_ms + (lost or 0.0) - earned, -SAVED_STEPS * self.plain_ms)
        if account.paused:
            earned_back = account.owed_ms <= (CREDIT_STEPS - TRIAL_STEPS) * self.plain_ms
            account.paused = not (earned_back and account.may_try(self.plain_ms))
        elif lost is not None:
            if account.owed_ms <= -GAIN_STEPS * self.plain_ms:
                account.failures = 0
            if account.owed_ms > CREDIT_STEPS * self.plain_ms:
                account.paused = True
                account.pauses += 1
                account.failures += 1
