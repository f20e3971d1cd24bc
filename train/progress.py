"""What a run shows while it trains: a bar on stderr, and a tracker of Accelerate where one is asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from .trainer import StepResult

REFRESH_S = 0.5  # reading a loss waits for the device, so not every step is read
TRACK_EVERY = 10


class _Lines(Progress):
    """A bar, and under it what an 80-column terminal has no room for beside it."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["note"]:
                yield Text(task.fields["note"])


class Bar:
    """The progress lines: tokens/s, time left, loss and agreement of each exit, the last held-out result."""

    def __init__(self, progress: Progress, label: str, total: int, done: int) -> None:
        self._progress = progress
        self._task = progress.add_task(label, total=total, completed=done, speed="", note="")
        self._tokens, self._since, self._held_out, self._shown = 0, time.monotonic(), "", 0.0

    def advance(self, count: int) -> None:
        """More text was written."""
        self._tokens += count
        self._progress.update(self._task, advance=count, speed=self._rate())

    def step(self, result: StepResult) -> None:
        """A step was taken."""
        self._tokens += result.num_tokens
        self._progress.advance(self._task)
        if self._progress.disable or time.monotonic() - self._shown < REFRESH_S:
            return
        self._shown = time.monotonic()
        loss, agreement = (_row(part["heads"].tolist()) for part in (result.loss, result.agreement))
        note = f"loss {loss}  agreement {agreement}{self._held_out}"
        self._progress.update(self._task, speed=self._rate(), note=note)

    def held_out(self, entry: Mapping[str, Any]) -> None:
        """Held-out text was measured; this stays on the screen."""
        shown = _row(entry["tokens_per_verification"].values())
        self._held_out = f"\nheld-out tokens per verification {shown}"
        if not self._progress.disable:
            agreement = _row(entry["agreement"].values())
            said = f"step {entry['step']}: held-out agreement {agreement}, tokens per verification {shown}"
            self._progress.console.print(said, soft_wrap=True)

    def _rate(self) -> str:
        return f"{self._tokens / max(1e-6, time.monotonic() - self._since):,.0f} tokens/s"


@contextmanager
def bar(show: bool, label: str, total: int, done: int = 0) -> Iterator[Bar]:
    """A progress line on stderr while inside."""
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(), TextColumn("{task.fields[speed]}"),
    )  # fmt: skip
    with _Lines(*columns, console=Console(stderr=True, highlight=False), disable=not show) as progress:
        yield Bar(progress, label, total, done)


class Tracker:
    """Numbers of a run to one of Accelerate's trackers."""

    def __init__(self, name: str, out: Path, settings: Mapping[str, Any]) -> None:
        """
        Args:
            name: as Accelerate names it: tensorboard, wandb, ...
            out: trackers that write files write into `out/tracker`.
            settings: recorded once, nested tables flattened.

        Raises:
            ValueError: it is unknown or not installed.
        """
        try:
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
        except ImportError as error:
            raise ValueError(
                f"tracker {name!r} needs Accelerate, which cannot be imported ({error}); install 'skipstone[train]', "
                "or leave the tracker out"
            ) from error
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"tracker is {name!r}, expected one of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        available = [str(found) for found in get_available_trackers()]
        if name not in available:
            raise ValueError(
                f"tracker {name!r} is not installed: pip install {name} "
                f"(installed: {', '.join(available) or 'none'}; 'skipstone[train]' brings tensorboard)"
            )
        kind = LOGGER_TYPE_TO_CLASS[name]
        place = {"logging_dir": str(out / "tracker")} if kind.requires_logging_directory else {}
        self._tracker = kind("skipstone", **place)
        self._tracker.start()
        self._tracker.store_init_configuration(dict(_flat(settings)))

    def step(self, step: int, exits: Sequence[int], result: StepResult) -> None:
        """Loss and agreement of each exit on the batch, now and then."""
        if step % TRACK_EVERY == 0:
            found = {"loss": result.loss["heads"].tolist(), "agreement": result.agreement["heads"].tolist()}
            values = {
                f"train/{name}/exit_{layer}": x
                for name, row in found.items()
                for layer, x in zip(exits, row, strict=True)
            }
            self._tracker.log(values, step=step)

    def held_out(self, entry: Mapping[str, Any]) -> None:
        """One point of the held-out curve."""
        values = {
            f"held_out/{name}/exit_{layer}": x
            for name in ("agreement", "tokens_per_verification")
            for layer, x in entry[name].items()
        }
        self._tracker.log(values, step=entry["step"])

    def close(self) -> None:
        self._tracker.finish()


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, bool | int | float | str) else str(value)


def _row(values: Any) -> str:
    return " ".join(f"{x:.2f}" for x in values)
