"""Pictures of a run as PNG files. Needs matplotlib (the `plot` extra); the numbers stand in the run's JSON and CSV."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..train.plots import DPI, SIZE, require_matplotlib

OVERALL = "overall"


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
    drafting = {name: m for name, m in summary[OVERALL].items() if m.get("num_drafted")}
    paths = [_speed_by_task(summary, folder / "speed_by_task.png")]
    if drafting:
        curves = {n: (range(1, 1 + len(a)), a) for n, m in drafting.items() if (a := m["acceptance_by_position"])}
        path = folder / "acceptance_by_position.png"
        paths.append(_curves(curves, "position in the draft", "accepted, of drafts that got there", path))
        curves = {}
        for name, m in drafting.items():
            rows = [row for row in m["acceptance_by_entropy"] if row["drafted"]]
            if rows:
                shares = [row["accepted"] / row["drafted"] for row in rows]
                curves[name] = [row["nats"] for row in rows], shares  # type: ignore[assignment]
        path = folder / "acceptance_by_entropy.png"
        paths.append(_curves(curves, "entropy in nats, in bins of 0.25", "accepted", path))
    return paths


def _speed_by_task(summary: Mapping[str, Any], path: Path) -> Path:
    figure, axes = _figure()
    arms = list(summary[OVERALL])
    for i, name in enumerate(arms):
        places = [group + 0.8 * i / len(arms) for group in range(len(summary))]
        heights = [own.get(name, {}).get("speedup") or 0.0 for own in summary.values()]
        axes.bar(places, heights, 0.8 / len(arms), label=name, align="edge")
    axes.axhline(1.0, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xticks([group + 0.4 for group in range(len(summary))], list(summary), rotation=20, ha="right")
    axes.set_ylabel("speed against plain decoding")
    return _save(figure, axes, path)


def _curves(curves: Mapping[str, Any], x: str, y: str, path: Path) -> Path:
    figure, axes = _figure()
    for name, (xs, ys) in curves.items():
        axes.plot(list(xs), list(ys), marker="o", markersize=3, label=name)
    axes.set(xlabel=x, ylabel=y, ylim=(0, 1.02))
    return _save(figure, axes, path)


def _figure() -> Any:
    from matplotlib.figure import Figure

    figure = Figure(SIZE, layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, axes: Any, path: Path) -> Path:
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=DPI)
    return path
