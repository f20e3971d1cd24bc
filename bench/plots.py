"""Pictures of a run as PNG files. Needs matplotlib (the `plot` extra); the numbers stand in the run's JSON and CSV."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..train.plots import DPI, SIZE, require_matplotlib
from .pages import OVERALL, fastest

ROW = 0.27  # inches of one arm
LEAST_DRAFTED = 10  # tokens of a bin of entropies that is drawn


def plot_run(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Speed by task, acceptance by position, share accepted by entropy.

    Returns:
        The files written.

    Raises:
        ValueError: matplotlib is not installed.
    """
    require_matplotlib()
    summary = document["summary"]
    if OVERALL not in summary:
        return []
    drafting = {name: summary[OVERALL][name] for name in fastest(summary[OVERALL])}
    paths = [_speed_by_task(summary, folder / "speed_by_task.png")]
    if drafting:
        curves = {n: (range(1, 1 + len(a)), a) for n, m in drafting.items() if (a := m["acceptance_by_position"])}
        path = folder / "acceptance_by_position.png"
        paths.append(_curves(curves, "position in the draft", "accepted, of drafts that got there", path))
        curves = {}
        for name, m in drafting.items():
            rows = [row for row in m["acceptance_by_entropy"] if row["drafted"] >= LEAST_DRAFTED]
            if rows:
                shares = [row["accepted"] / row["drafted"] for row in rows]
                curves[name] = [row["nats"] for row in rows], shares  # type: ignore[assignment]
        path = folder / "acceptance_by_entropy.png"
        paths.append(_curves(curves, "entropy in nats, in bins of 0.25", "accepted", path))
    return paths


def _speed_by_task(summary: Mapping[str, Any], path: Path) -> Path:
    """A row an arm: a bar of all tasks together with its interval, a dot a task."""
    arms, tasks = list(summary[OVERALL]), [task for task in summary if task != OVERALL]
    figure, axes = _figure((SIZE[0] * 1.25, max(2.5, 1.0 + ROW * len(arms))))
    for row, name in enumerate(arms):
        own = summary[OVERALL][name]
        speed = own["speedup"] or 0.0
        low, high = own.get("speedup_interval") or (speed, speed)
        whiskers = [[max(0.0, speed - low)], [max(0.0, high - speed)]]
        axes.barh(row, speed, 0.62, color="#d5dbe8", xerr=whiskers, ecolor="#555", error_kw={"linewidth": 1})
    for task in tasks:
        known = [(own["speedup"], row) for row, name in enumerate(arms) if (own := summary[task].get(name))]
        places = [place for place in known if place[0] is not None]
        axes.scatter([x for x, _ in places], [y for _, y in places], s=12, label=task, zorder=3)
    axes.axvline(1.0, color="grey", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(arms)), arms, fontsize=8)
    axes.set(ylim=(len(arms) - 0.4, -0.6), xlim=(0, None), xlabel="speed against plain decoding; bars: all tasks, 95 %")
    return _save(figure, axes, path)


def _curves(curves: Mapping[str, Any], x: str, y: str, path: Path) -> Path:
    figure, axes = _figure()
    for name, (xs, ys) in curves.items():
        axes.plot(list(xs), list(ys), marker="o", markersize=3, label=name)
    axes.set(xlabel=x, ylabel=y, ylim=(0, 1.02))
    return _save(figure, axes, path)


def _figure(size: tuple[float, float] = (SIZE[0] * 1.25, SIZE[1])) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, axes: Any, path: Path) -> Path:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path, dpi=DPI)
    return path
