"""Pictures of a calibration: PNG files, each with its numbers beside it as CSV. Needs matplotlib (the `plot` extra)."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..heads.calibration import CURVE_LEVEL, Calibration

SIZE = (6.4, 4.0)  # inches
PANEL = (3.6, 3.0)
DPI = 150
LABELS = {"entropy": "entropy", "max_prob": "max probability", "margin": "margin"}

Rows = Sequence[Sequence[Any]]


def require_matplotlib() -> None:
    """
    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("plots need matplotlib, which is not installed: pip install 'skipstone[plot]'") from error


def plot_calibration(calibration: Calibration, folder: str | Path) -> list[Path]:
    """Draw everything a calibration holds.

    Returns:
        The PNG files; each has a CSV file of the same name beside it.

    Raises:
        ValueError: matplotlib is not installed.
    """
    require_matplotlib()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _agreement_by_layer(calibration, folder / "agreement_by_layer.png"),
        _entropy_histogram(calibration, folder / "entropy_histogram.png"),
        _coverage_curves(calibration, folder / "coverage_curves.png"),
        _reliability(calibration, folder / "reliability.png"),
    ]


def _agreement_by_layer(calibration: Calibration, path: Path) -> Path:
    columns = ("exit_layer", "agreement", "true_prefix_agreement", "in_top_4")
    rows = [
        (layer, e.agreement, e.true_prefix_agreement, e.top_k[-1]) for layer, e in sorted(calibration.exits.items())
    ]
    figure, (axes,) = _figure(1, SIZE)
    for place, label in (
        (3, "full model's token in the head's top 4"),
        (1, "agreement"),
        (2, "on right prefixes only"),
    ):
        axes.plot([row[0] for row in rows], [row[place] for row in rows], marker="o", label=label)
    axes.set(xlabel="exit layer", ylabel="share of tokens", ylim=(0, 1), xticks=[row[0] for row in rows])
    axes.legend()
    return _save(figure, path, columns, rows)


def _entropy_histogram(calibration: Calibration, path: Path) -> Path:
    """Bins are of unlike width, so heights are tokens per nat."""
    columns = ("exit_layer", "entropy_from", "entropy_to", "right", "wrong")
    figure, panels = _figure(len(calibration.exits), PANEL)
    rows = []
    for axes, (layer, e) in zip(panels, sorted(calibration.exits.items()), strict=True):
        bins = list(zip(e.bin_edges, e.bin_edges[1:], e.bin_counts, e.bin_agreement, strict=False))
        own = [(layer, low, high, round(n * share), n - round(n * share)) for low, high, n, share in bins]
        for place, label in ((3, "right"), (4, "wrong")):
            heights = [row[place] / (row[2] - row[1]) for row in own]
            axes.stairs(heights, e.bin_edges, fill=True, alpha=0.5, label=label)
        axes.set(title=f"exit {layer}", xlabel="entropy (nats)", ylabel="tokens per nat", xlim=(0, 8))
        rows += own
    panels[0].legend()
    return _save(figure, path, columns, rows)


def _coverage_curves(calibration: Calibration, path: Path) -> Path:
    columns = ("exit_layer", "measure", "threshold", "coverage", "agreement")
    figure, panels = _figure(len(calibration.exits), PANEL)
    rows = []
    for axes, (layer, e) in zip(panels, sorted(calibration.exits.items()), strict=True):
        for name, separation in e.separation.items():
            curve = separation.curve
            label = f"{LABELS.get(name, name)} {separation.auroc_reached:.3f}"
            axes.plot(curve.coverage, curve.agreement, label=label)
            points = zip(curve.threshold, curve.coverage, curve.agreement, strict=True)
            rows += [(layer, name, *point) for point in points]
        title = f"exit {layer}, of what was refused before at {CURVE_LEVEL:.2f}"
        axes.set(xlabel="coverage", ylabel="agreement", xlim=(0, 1), ylim=(0, 1.02))
        axes.set_title(title, fontsize=8)
        if e.separation:
            axes.legend(title="AUROC", fontsize=7, title_fontsize=7, loc="lower left")
    return _save(figure, path, columns, rows)


def _reliability(calibration: Calibration, path: Path) -> Path:
    columns = ("exit_layer", "bin", "tokens", "confidence", "agreement")
    figure, (axes,) = _figure(1, SIZE)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    rows = []
    for layer, e in sorted(calibration.exits.items()):
        if e.reliability is None:
            continue
        bins = zip(e.reliability.counts, e.reliability.confidence, e.reliability.agreement, strict=True)
        own = [(layer, number, *values) for number, values in enumerate(bins)]
        shown = [row for row in own if row[2]]
        label = f"exit {layer} (error {e.reliability.error:.3f})"
        axes.plot([row[3] for row in shown], [row[4] for row in shown], marker="o", markersize=3, label=label)
        rows += own
    axes.set(xlabel="the head's largest probability", ylabel="agreement", xlim=(0, 1), ylim=(0, 1))
    if rows:
        axes.legend()
    return _save(figure, path, columns, rows)


def _figure(num_panels: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """A figure without pyplot, so that no state is shared and no display is looked for."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * num_panels, size[1]), layout="constrained")
    return figure, list(figure.subplots(1, num_panels, squeeze=False)[0])


def _save(figure: Any, path: Path, columns: Sequence[str], rows: Rows) -> Path:
    figure.savefig(path, dpi=DPI)
    with open(path.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path
