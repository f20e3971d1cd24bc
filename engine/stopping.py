"""Where one sequence's output ends, and what may be streamed before that is known.

A round commits a block of tokens (accepted ones and the bonus); the `StopChecker` reads it one token after the
other, so how tokens fall into blocks cannot change the result. The rules, in order, for each token:

1. A stop id ends the output ("stop"), wherever in a block it stands. It is the last of `token_ids` (as in transformers)
   and adds nothing to the text.
2. Otherwise its text is appended, and a stop string that is complete ends the output ("stop"). Reading character by
   character, the string that completes first wins, of several that complete together the longest. The text ends
   before the stop string. `token_ids` keeps exactly the tokens that begin before that place: a token of which only a
   part lies in the stop string is kept (its remaining text is in the output), a token that begins in the stop string
   is dropped, also if an earlier block committed it. Logprobs and events are cut with the ids.
3. The budget: `max_new_tokens` ends it with "length", the context's end with "context" if that comes first. Rules 1
   and 2 are asked first, so a stop in the last place inside the budget is a "stop"; tokens beyond are never looked at.

Before `min_new_tokens` tokens stand, neither a stop id nor a stop string ends the output (the sampler masks stop ids
there; a stop string counts only if it completes in a later token, and may then take back tokens below the minimum).

Text that could be the beginning of a stop string is held back together with the tokens it came from, and released
when it turns out not to be one. All this decides what is shown and committed, never what is sampled (design rule 8).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

FinishReason = Literal["stop", "length", "context", "cancelled", "error"]


class IncrementalDetokenizer(Protocol):
    """Turns token ids into text as they come; what does not end on a whole character waits inside."""

    def feed(self, token_id: int) -> str:
        """Text that this token completes, possibly none."""

    def flush(self) -> str:
        """Text of what still waits (replacement characters for a broken one); called once, at the end."""


@dataclass(frozen=True)
class Emission:
    """One token of the output, released: its place among the new tokens, its id and its own share of the text.

    The texts of all emissions, in order, make up the output's text. A token in the middle of a character has none;
    the last token also carries what the detokenizer flushed.
    """

    index: int
    token_id: int
    text: str


@dataclass
class _Pending:
    token_id: int
    start: int  # characters of text before this token's
    end: int


class StopChecker:
    """Applies the rules of this module to one sequence.

    Args:
        detokenizer: fresh, used by this checker alone.
        max_new_tokens: budget of new tokens, at least 0.
        min_new_tokens: number of tokens before which nothing stops the output.
        stop_ids: token ids that end the output.
        stop: strings that end the output; none may be empty.
        context_room: new tokens that fit into the context, None for no limit.

    Attributes:
        token_ids: the output's ids. Until `finished` it may hold tokens that a stop string takes back.
        finish_reason: None while the sequence runs.
        num_released: tokens handed out as emissions.

    Raises:
        ValueError: a negative budget, a minimum above it, or an empty stop string.
    """

    def __init__(
        self,
        detokenizer: IncrementalDetokenizer,
        *,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        stop_ids: Collection[int] = (),
        stop: Sequence[str] = (),
        context_room: int | None = None,
    ) -> None:
        if not 0 <= min_new_tokens <= max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {min_new_tokens} and max_new_tokens {max_new_tokens}, expected 0 <= min <= max"
            )
        if isinstance(stop, str) or not all(isinstance(string, str) and string for string in stop):
            raise ValueError(f"stop is {stop!r}, expected a sequence of non-empty strings")
        if context_room is not None and context_room < 0:
            raise ValueError(
                f"context_room is {context_room}, expected at least 0: shorten the prompt, it alone is too long"
            )
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.num_released = 0
        self._detokenizer = detokenizer
        self._min_new_tokens = min_new_tokens
        self._stop_ids = frozenset(stop_ids)
        self._stop = tuple(stop)
        self._limit = max_new_tokens if context_room is None else min(max_new_tokens, context_room)
        self._limit_reason: FinishReason = "length" if self._limit == max_new_tokens else "context"
        self._pending: list[_Pending] = []  # tokens not released yet, in order
        self._text = ""
        if self._limit == 0:
            self.finish_reason = self._limit_reason

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def num_remaining(self) -> int:
        """Tokens that the budget still takes; a round needs no longer draft than this less one, the bonus."""
        return 0 if self.finished else self._limit - len(self.token_ids)

    @property
    def text(self) -> str:
        """Text of `token_ids`, without what the detokenizer still holds. Final once `finished`."""
        return self._text

    def push(self, token_ids: Iterable[int]) -> list[Emission]:
        """Take the tokens of one block in order; those after the end are ignored.

        Returns:
            What is released now. After the end it is nothing.
        """
        released: list[Emission] = []
        for token_id in token_ids:
            if self.finished:
                break
            self._take(token_id)
            released += self._release()
        return released

    def finish(self, reason: FinishReason) -> list[Emission]:
        """End the output from outside ("cancelled", "error"); what was held back is released.

        Bytes of an unfinished character are not shown: their tokens may have been streamed already. A sequence that
        has ended keeps its reason and releases nothing.

        Raises:
            ValueError: an unknown reason.
        """
        if reason not in get_args(FinishReason):
            raise ValueError(f"reason is {reason!r}, expected one of {get_args(FinishReason)}")
        if self.finished:
            return []
        self.finish_reason = reason
        return self._release()

    def _take(self, token_id: int) -> None:
        may_stop = len(self.token_ids) >= self._min_new_tokens
        is_stop_id = may_stop and token_id in self._stop_ids
        start = len(self._text)
        if not is_stop_id:
            self._text += self._detokenizer.feed(token_id)
        self.token_ids.append(token_id)
        self._pending.append(_Pending(token_id, start, len(self._text)))
        cut = self._first_stop(start) if may_stop else None
        if cut is not None:
            self._cut(cut)
        elif is_stop_id:
            self._end("stop")
        elif len(self.token_ids) >= self._limit:
            self._end(self._limit_reason)

    def _end(self, reason: FinishReason) -> None:
        """End with the token just taken; what the detokenizer flushes is its text and may complete a stop string."""
        start = len(self._text)
        self._text += self._detokenizer.flush()
        self._pending[-1].end = len(self._text)
        cut = self._first_stop(start) if len(self.token_ids) > self._min_new_tokens else None
        if cut is None:
            self.finish_reason = reason
        else:
            self._cut(cut)

    def _first_stop(self, num_old: int) -> int | None:
        """Where the stop string begins that completes first in the text after its first `num_old` characters."""
        if len(self._text) == num_old:
            return None
        best: tuple[int, int] | None = None  # (end, begin): earliest end, then earliest begin
        for string in self._stop:
            begin = self._text.find(string, max(0, num_old - len(string) + 1))
            if begin >= 0 and (best is None or (begin + len(string), begin) < best):
                best = (begin + len(string), begin)
        return None if best is None else best[1]

    def _cut(self, begin: int) -> None:
        """End the output at character `begin` and drop the tokens that begin there or later."""
        num_dropped = sum(pending.start >= begin for pending in self._pending)
        if num_dropped:
            del self.token_ids[-num_dropped:], self._pending[-num_dropped:]
        for pending in self._pending:
            pending.end = min(pending.end, begin)
        self._text = self._text[:begin]
        self.finish_reason = "stop"

    def _release(self) -> list[Emission]:
        """Hand out the tokens whose text no stop string can take back any more; at the end, all of them."""
        safe = len(self._text) - (0 if self.finished else self._num_held())
        num_ready = 0
        for pending in self._pending:
            # A token without text that begins where held text begins could be dropped with it.
            if not self.finished and (pending.end > safe or (pending.start >= safe and self._stop)):
                break
            num_ready += 1
        ready, self._pending = self._pending[:num_ready], self._pending[num_ready:]
        emissions = [
            Emission(self.num_released + offset, pending.token_id, self._text[pending.start : pending.end])
            for offset, pending in enumerate(ready)
        ]
        self.num_released += num_ready
        return emissions

    def _num_held(self) -> int:
        """Length of the longest end of the text that is a proper beginning of some stop string."""
        longest = 0
        for string in self._stop:
            for length in range(min(len(string) - 1, len(self._text)), longest, -1):
                if self._text.endswith(string[:length]):
                    longest = length
                    break
        return longest
