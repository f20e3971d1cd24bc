"""A sparsity report for people: tables, and pictures as PNG files (the `plot` extra) of the document's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ..train.plots import require_matplotlib
from .sparsity_settings import DENSE
from .tables import console, titled

SIZE, DPI = (6.4, 4.0), 80


def print_sparsity(document: Mapping[str, Any]) -> None:
    """The settings in a table, and the chosen one."""
    out, rows = console(), document["settings"]
    tasks = list(next(iter(rows.values())).get("tasks", {}))
    out.print(_overall(document, rows))
    if tasks:
        out.print(_tasks(rows, tasks))
    if document.get("against"):
        out.print(_against(document["against"]))
    if "tokens" in document:
        out.print(_tokens(document["tokens"]))
    if "long" in document:
        out.print(_long(document["long"]))
    if document["chosen"] is not None:
        most = document["options"]["max_perplexity_increase"]
        out.print(f"fastest within {most:.0%} of the whole model's perplexity: {document['chosen']}")
    for name, error in document.get("failed", {}).items():
        out.print(f"{name} failed: {error}", markup=False)


def _overall(document: Mapping[str, Any], rows: Mapping[str, Any]) -> Table:
    title = f"{document['model']}, {document['dtype']}, {document['scored_tokens']} tokens scored"
    found = titled(
        title, "setting", ">kept", ">perplexity", ">increase (95 %)", ">greedy agreement", ">tokens/s", ">speed"
    )
    for name, row in rows.items():
        low, high = row["perplexity_increase_95"]
        increase = f"{row['perplexity_increase']:+.1%} ({low:+.1%} to {high:+.1%})" if name != DENSE else ""
        speed = (f"{row['tokens_per_second']:.1f}", f"{row['speedup']:.2f}x") if "speedup" in row else ("", "")
        found.add_row(
            name, f"{row['density']:.3f}", f"{row['perplexity']:.2f}", increase, f"{row['greedy_agreement']:.3f}",
            *speed,
        )  # fmt: skip
    return found


def _tasks(rows: Mapping[str, Any], tasks: Sequence[str]) -> Table:
    parts = ("", " - dense (95 %)", ", lost / gained (p)", ", first difference")
    headings = [f">{task}{what}" for task in tasks for what in parts]
    counts = ", ".join(f"{next(iter(rows.values()))['tasks'][task]['n']} of {task}" for task in tasks)
    title = f"right answers ({counts}), paired, and the median first token that differs"
    found = titled(title, "setting", *headings)
    for name, row in rows.items():
        if "tasks" not in row:
            continue
        cells = []
        for task in tasks:
            own = row["tasks"][task]
            beside = ("", "", "")
            if name != DENSE:
                beside = _difference(own), _split(own), f"{own['median_first_difference']:g}"
            cells += [f"{own['accuracy']:.1%}", *beside]
        found.add_row(name, *cells)
    return found


def _against(found: Mapping[str, Any]) -> Table:
    tasks = list(dict.fromkeys(task for own in found.values() for task in own["tasks"]))
    headings = [f">{task}{what}" for task in tasks for what in ("", ", lost / gained (p)")]
    shown = titled("masks against each other, paired (95 %)", "settings", ">perplexity, quotient", *headings)
    for name, own in found.items():
        cells = []
        for row in (own["tasks"].get(task) for task in tasks):
            cells += ["", ""] if row is None else [_difference(row), _split(row)]
        bounds = own["perplexity_quotient_95"]
        between = "" if bounds is None else f" ({bounds[0]:.3f} to {bounds[1]:.3f})"
        shown.add_row(name, f"{own['perplexity_quotient']:.3f}{between}", *cells)
    return shown


def _difference(row: Mapping[str, Any]) -> str:
    low, high = row["difference_95"] or [row["difference"]] * 2
    return f"{row['difference']:+.1%} ({low:+.1%} to {high:+.1%})"


def _split(row: Mapping[str, Any]) -> str:
    return f"{row['lost']} / {row['gained']} ({row['mcnemar_p']:.2g})"


def _tokens(found: Mapping[str, Any]) -> Table:
    rows = list(next(iter(found.values()))["union_over_rows"])
    unions = [f">union of {count} rows" for count in rows]
    shown = titled(
        "masks of single tokens", "setting", ">of a token's strongest", ">by fixed", *unions, ">parameters",
        ">multiply-adds / neurons'", ">training, CPU s",
    )  # fmt: skip
    for name, own in found.items():
        costs = ("", "", "")
        if "parameters" in own:
            costs = (f"{own['parameters']:,}", f"{own['share_of_neurons']:.3f}", f"{own['training_cpu_seconds']:g}")
        shown.add_row(
            name, f"{own['found_of_strongest']:.3f}", f"{own['found_by_fixed']:.3f}",
            *(f"{own['union_over_rows'][count]:.3f}" for count in rows), *costs,
        )  # fmt: skip
    return shown


def _long(long: Mapping[str, Any]) -> Table:
    title = f"long texts of {long['tokens']} tokens: the first {long['block']} and the last"
    found = titled(
        title, "setting", ">loss of reading - dense, nats", ">own text's loss under dense", ">new 4-grams", ">density",
        ">covered by the prompt's mask",
    )  # fmt: skip
    plain = _mean(long["settings"][DENSE]["read_nats"])
    for name, own in long["settings"].items():
        extra = [mine - base for mine, base in zip(_mean(own["read_nats"]), plain, strict=True)]
        found.add_row(
            name, "" if name == DENSE else _ends(extra), _ends(_mean(own["written_nats"])),
            _ends(_mean(own["written_new"])), _ends(own.get("density")), _ends(own.get("covered")),
        )  # fmt: skip
    return found


def _ends(values: Sequence[float] | None) -> str:
    return "" if not values else f"{values[0]:.3f}, {values[-1]:.3f}"


def _mean(by_text: Sequence[Sequence[float]]) -> list[float]:
    return [sum(own) / len(own) for own in zip(*by_text, strict=True)]


def plot_sparsity(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what the document holds.

    Returns:
        The files written.

    Raises:
        ValueError: matplotlib is not installed.
    """
    require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    if "heat_map" in document:
        paths.append(_heat_map(document["heat_map"], folder / "heat_map.png"))
        paths.append(_density(document["settings"], folder / "density_by_layer.png"))
        paths.append(_claims(document, folder / "claims.png"))
    if any("speedup" in row for row in document["settings"].values()):
        paths.append(_loss_speed(document, folder / "loss_speed.png"))
    if "long" in document:
        paths.append(_drift(document["long"], folder / "drift.png"))
    return paths


def _heat_map(found: Mapping[str, Any], path: Path) -> Path:
    from matplotlib.colors import LogNorm

    figure, (above, below) = _figure(2, 1)
    strength = [[max(value, 0.01) for value in row] for row in found["strength"]]
    shown = above.imshow(strength, aspect="auto", norm=LogNorm(0.1, 10), interpolation="nearest", cmap="viridis")
    figure.colorbar(shown, ax=above, label="strength / layer's mean")
    shares = [sorted(row, reverse=True) for row in found["kept"]]
    shown = below.imshow(shares, aspect="auto", vmin=0, vmax=1, interpolation="nearest", cmap="magma")
    figure.colorbar(shown, ax=below, label="share of prompts")
    above.set(title="strength of neurons on calibration text", ylabel="layer", xlabel="neurons, evenly chosen")
    below.set(
        title=f"kept by {found['setting']}", ylabel="layer", xlabel="neurons of each layer, most often kept first"
    )
    return _save(figure, path)


def _density(rows: Mapping[str, Any], path: Path) -> Path:
    figure, (axes,) = _figure(1, 1)
    for name, row in rows.items():
        if row["method"] == "tda":
            axes.plot(
                range(len(row["density_by_layer"])), row["density_by_layer"], marker="o", markersize=3, label=name
            )
    axes.set(xlabel="layer", ylabel="kept share of neurons", ylim=(0, 1.02))
    axes.legend(fontsize=8)
    return _save(figure, path)


def _loss_speed(document: Mapping[str, Any], path: Path) -> Path:
    figure, (axes,) = _figure(1, 1)
    timed = {name: row for name, row in document["settings"].items() if "speedup" in row}
    for method in dict.fromkeys(row["method"] for row in timed.values()):
        own = [
            (r["speedup"], 100 * r["perplexity_increase"], r["level"]) for r in timed.values() if r["method"] == method
        ]
        (line,) = axes.plot([x for x, _, _ in own], [y for _, y, _ in own], marker="o", markersize=4, label=method)
        for x, y, level in own:
            if level is not None:
                axes.annotate(
                    f"{level:g}", (x, y), (3, 3), textcoords="offset points", fontsize=7, color=line.get_color()
                )
    chosen = timed.get(document["chosen"])
    if chosen is not None:
        place = [chosen["speedup"]], [100 * chosen["perplexity_increase"]]
        axes.scatter(
            *place, s=120, facecolors="none", edgecolors="black", label=f"chosen: {document['chosen']}", zorder=3
        )
    most = 100 * document["options"]["max_perplexity_increase"]
    axes.axhline(most, color="grey", linewidth=0.8, linestyle="--")
    axes.set_yscale("symlog", linthresh=max(most, 1))
    axes.set_ylim(bottom=-1)
    axes.set(xlabel="speed of plain decoding against dense", ylabel="increase of perplexity, %")
    axes.legend(fontsize=7)
    return _save(figure, path)


def _drift(long: Mapping[str, Any], path: Path) -> Path:
    figure, panels = _figure(2, 2)
    reading, density, nats, new = panels
    plain = _mean(long["settings"][DENSE]["read_nats"])
    for i, (name, own) in enumerate(long["settings"].items()):
        colour, at = f"C{i}", [long["block"] * (k + 0.5) for k in range(len(plain))]
        if name != DENSE:
            extra = [mine - base for mine, base in zip(_mean(own["read_nats"]), plain, strict=True)]
            reading.plot(at, extra, color=colour, marker=".")
        if "density" in own:
            places = [long["block"] * (k + (0.5 if "covered" not in own else 0)) for k in range(len(own["density"]))]
            density.plot(places, own["density"], color=colour)
        if "covered" in own:
            density.plot(places, own["covered"], color=colour, linestyle=":")
        nats.plot(at, _mean(own["written_nats"]), color=colour, marker=".", label=name)
        new.plot(at, _mean(own["written_new"]), color=colour, marker=".")
    reading.set(ylabel="loss - dense, nats", title="real text, read")
    density.set(ylim=(0, 1.02), title="density if read again; covered (dotted)")
    nats.set(ylabel="nats under dense", title="own text: loss", xlabel="tokens after the prompt")
    new.set(ylim=(0, 1.02), title="own text: share of new 4-grams", xlabel="tokens after the prompt")
    figure.legend(loc="outside lower center", ncols=4, fontsize=7)
    return _save(figure, path)


def _claims(document: Mapping[str, Any], path: Path) -> Path:
    figure, (uncertain, inert) = _figure(1, 2)
    masks = document["uncertainty"]["masks"]
    values = [100 * row["perplexity_increase"] for row in masks]
    uncertain.barh([row["mask"] for row in masks], values, color="C0")
    for i, row in enumerate(masks):
        uncertain.plot([100 * bound for bound in row["perplexity_increase_95"]], [i, i], color="black")
    uncertain.invert_yaxis()
    uncertain.set(
        xlabel="increase of perplexity, %", title=f"uncertainty: mask of ({document['uncertainty']['setting']})"
    )
    found = document["inertia"]
    by_distance = found["by_distance"]
    xs, ys = [row["tokens_after_prompt"] for row in by_distance], [row["overlap"] for row in by_distance]
    inert.plot(xs, ys, marker="o", markersize=3, label="own prompt, by 32 tokens")
    for i, (name, value) in enumerate(found["texts"]["overlap"].items()):
        inert.axhline(value, color=f"C{i + 1}", linewidth=1, linestyle="--", label=f"{name}, whole continuation")
    inert.axhline(found["texts"]["share_kept"], color="grey", linewidth=0.8, label="chance")
    inert.set(
        xlabel="tokens after the prompt", ylabel="overlap with the continuation's", title="inertia", ylim=(0.4, 1)
    )
    inert.legend(fontsize=6)
    return _save(figure, path)


def _figure(rows: int, columns: int) -> Any:
    from matplotlib.figure import Figure

    size = (SIZE[0] * (1 + 0.5 * (columns - 1)), SIZE[1] * (1 + 0.4 * (rows - 1)))
    figure = Figure(size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).flatten()


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=DPI)
    return path
