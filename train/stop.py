"""Ending a run by SIGTERM or Ctrl-C: at once while there is nothing to save, after the current step while there is."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """The run was ended by a signal; `message` says what is kept."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class StopSignals:
    """Listens for SIGTERM and SIGINT inside `with`, in the main thread only (elsewhere Python allows no handlers).

    Inside `deferred()` a first signal only sets `requested`, so that the caller can finish its step and save; a second
    one is not waited for. Anywhere else a signal raises `Stopped`.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._deferred = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._deferred and self.requested is None:
            self.requested = name
            return
        raise Stopped(f"stopped by {name}; what was saved before is kept")
