"""What the engine gives back: a finished sequence, its tokens as they come, and speculative against plain decoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .loop import Mode, Origin, Request
from .sampling import TokenLogprobs
from .statistics import Statistics
from .stopping import Emission, FinishReason

if TYPE_CHECKING:
    from .engine import Engine


@dataclass(frozen=True)
class Generation:
    """One finished sequence.

    Attributes:
        text: the output, without stop ids and stop strings.
        token_ids: new tokens; a stop id that ended the output is the last of them.
        finish_reason: "stop", "length", "context" (the model's context is full), "cancelled" or "error".
        logprobs: of each new token, raw distribution, when asked for. In early-exit mode it is that of the head that
            wrote the token.
        stats: what drafting and verification did.
        exit_layers: of each new token, the exit that drafted it (in early-exit mode, wrote it), -1 where it was drafted
            from the text, None where the full model wrote it itself.
        prompt_ids: the prompt as the model saw it.
        error: why, when finish_reason is "error".
        mode: "lossless", or "early_exit", whose text need not be the full model's.
        verify: the target model that `mode` speaks of: "dense", or the name of what skips its neurons ("tda") or drops
            its rows' inputs ("teal 0.5").
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None
    stats: Statistics
    exit_layers: list[int | None]
    prompt_ids: list[int]
    error: str | None = None
    mode: Mode = "lossless"
    verify: str = "dense"


@dataclass(frozen=True)
class Event:
    """One streamed token. `entropy` (nats) and `exit_layer` are of the head that drafted it (in early-exit mode wrote
    it); `logprob` of the raw distribution, when asked for."""

    text: str
    token_id: int
    drafted: bool
    exit_layer: int | None
    entropy: float | None
    logprob: float | None


@dataclass(frozen=True)
class LosslessReport:
    """Speculative against plain decoding of one prompt.

    `divergence` is the index of the first differing new token, None if there is none; `margin` is how far apart
    (nats) the plain model's two best tokens stood there: a near-tie is a fraction of a percent, a fault can be
    anything.
    """

    equal: bool
    speculative: Generation
    plain: Generation
    divergence: int | None = None
    margin: float | None = None


class Stream:
    """Events of one sequence; also a context manager. `result` is the `Generation` once the stream has ended."""

    def __init__(self, engine: Engine, request: Request, rounds: Iterator[Any]) -> None:
        self._engine, self._request, self._rounds = engine, request, rounds
        self._waiting: list[Event] = []
        self._open = True
        self.result: Generation | None = None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Event:
        if not self._waiting:
            self._waiting = self.next_block()
        if not self._waiting:
            raise StopIteration
        return self._waiting.pop(0)

    def next_block(self) -> list[Event]:
        """The events of the next round that released any, as they came; empty at the end."""
        block, self._waiting = self._waiting, []
        while not block and self._open:
            try:
                with self._engine.here():
                    released = next(self._rounds, None)
            except BaseException as error:
                self._end("error" if isinstance(error, Exception) else "cancelled")
                raise
            if released is None:
                self._end("cancelled")
                continue
            for request, emissions in released:
                block += [_event(emission, request.origins[emission.index]) for emission in emissions]
        return block

    def close(self) -> None:
        """End the sequence and free the engine; text held back for a stop string is in `result`."""
        self._end("cancelled")
        self._waiting.clear()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._open:
            self._end("cancelled")

    def _end(self, reason: FinishReason) -> None:
        if not self._open:
            return
        self._open = False
        try:
            self._rounds.close()  # type: ignore[attr-defined]
            self._request.checker.finish(reason)
            self.result = self._engine._finished(self._request)
        finally:
            self._engine._release()


def _event(emission: Emission, origin: Origin) -> Event:
    return Event(
        text=emission.text,
        token_id=emission.token_id,
        drafted=origin.exit_layer is not None,
        exit_layer=origin.exit_layer,
        entropy=origin.entropy,
        logprob=None if origin.logprobs is None else origin.logprobs.logprob,
    )
