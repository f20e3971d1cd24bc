"""A finished run as files: the JSON document, a CSV, one HTML page without outside parts, and PNG plots.

The page is made from the document alone; its charts are drawn as SVG here, so that it opens anywhere and stays small.
"""

from __future__ import annotations

import csv
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OVERALL = "overall"
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2", "#9c6b4e", "#97bbf5", "#ff8ab7", "#9498a0")
EXIT_COLOURS = ("#cdeac0", "#bfe3f2", "#d5ccf2", "#f6d5e5", "#fbe3b5", "#e0e0d0")
TEXT_COLOUR = "#ffe08a"
WIDTH, HEIGHT, LEFT, BOTTOM = 560, 260, 46, 38
ROW, NAMES = 20, 190  # of charts with a row an arm: its height, and the room for its name
MOST_CURVES = 8  # that can be told apart
CSV_COLUMNS = (
    "num_answers", "num_tokens", "decode_tokens_per_second", "speedup", "end_to_end_tokens_per_second",
    "end_to_end_speedup", "first_token_ms_p50", "token_ms_p50", "token_ms_p99", "acceptance_rate",
    "tokens_per_verification", "tokens_per_verification_without_bonus", "wasted_per_token", "row_layers_per_token",
    "roofline_ratio", "joules_per_token", "worst_question_time_ratio",
)  # fmt: skip


def write_report(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write all files of a run; plots are left out where matplotlib is not installed."""
    paths = [folder / "run.json", folder / "run.csv", folder / "report.html"]
    paths[0].write_text(json.dumps(document, allow_nan=False) + "\n", encoding="utf-8")
    with open(paths[1], "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(csv_rows(document))
    paths[2].write_text(page(document), encoding="utf-8")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return paths
    from .plots import plot_run

    return [*paths, *plot_run(document, folder)]


def csv_rows(document: Mapping[str, Any]) -> list[list[Any]]:
    """A heading, then one row for each group (task, overall, prompt length) and arm."""
    rows: list[list[Any]] = [["group", "arm", *CSV_COLUMNS, "speedup_low", "speedup_high"]]
    groups = dict(document["summary"]) | {f"prompt <= {n}": own for n, own in document["contexts"].items()}
    for group, arms in groups.items():
        for name, m in arms.items():
            low, high = m.get("speedup_interval") or (None, None)
            rows.append([group, name, *(m.get(column) for column in CSV_COLUMNS), low, high])
    return rows


def page(document: Mapping[str, Any]) -> str:
    """The whole page."""
    summary = document["summary"]
    arms = list(summary.get(OVERALL, {}))
    drafting = fastest(summary.get(OVERALL, {}))
    parts = [f"<h1>{_esc(document['model'])}: {len(arms)} ways to decode</h1>", _about(document)]
    if arms:
        parts.append(_section("All tasks together", _overall(summary[OVERALL])))
        parts.append(_section("Speed against plain decoding: all tasks together (bars), each (dots)", rows(summary)))
        if len(document["contexts"]) > 1:
            sizes = list(document["contexts"])
            rates = {n: [_get(document["contexts"], size, n, "acceptance_rate") for size in sizes] for n in drafting}
            taus = {n: [_get(document["contexts"], s, n, "tokens_per_verification") for s in sizes] for n in drafting}
            names = [f"<= {size}" for size in sizes]
            charts = bars(names, rates) + bars(names, taus, 1.0)
            parts.append(_section("By length of the prompt: acceptance rate; tokens per verification", charts))
    if drafting:
        overall, num_drafting = summary[OVERALL], sum(bool(m.get("num_drafted")) for m in summary[OVERALL].values())
        if len(drafting) < num_drafting:
            parts.append(f"<p><small>Below: the {MOST_CURVES} fastest of {num_drafting} arms that draft.</small></p>")
        places = {name: overall[name]["acceptance_by_position"] for name in drafting}
        parts.append(_section("Acceptance by position in the draft, given that the draft got there", lines(places, 1)))
        bins = {n: _by_entropy(overall[n]["acceptance_by_entropy"]) for n in drafting}
        parts.append(_section("Share accepted by the entropy (nats) a token was drafted at", points(bins)))
        counts = {name: overall[name]["rounds_by_accepted"] for name in drafting}
        parts.append(_section("Rounds by accepted tokens", _histograms(counts)))
    if document.get("sample"):
        parts.append(_section("One answer, as it was drafted", _sample(document["sample"])))
    style = (
        "body{font:15px/1.45 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}"
        "table{border-collapse:collapse;margin:.6em 0}"
        "td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}"
        "td:first-child,th:first-child{text-align:left}pre{white-space:pre-wrap;font:14px/1.7 ui-monospace,monospace}"
        "s{color:#b33;background:#fbeaea}mark{color:inherit}svg{display:block;margin:.4em 0}small{color:#666}"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>skipstone bench</title>'
        f"<style>{style}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def fastest(arms: Mapping[str, Any]) -> list[str]:
    """The `MOST_CURVES` fastest arms that draft, in the order of the run."""
    drafting = [name for name, m in arms.items() if m.get("num_drafted")]
    first = sorted(drafting, key=lambda name: -(arms[name]["speedup"] or arms[name]["tokens_per_verification"]))
    return [name for name in drafting if name in first[:MOST_CURVES]]


def notes(d: Mapping[str, Any]) -> list[str]:
    """What a reader of the numbers has to know: fewer questions, batches, targets of their own."""
    overall, found = d["summary"].get(OVERALL, {}), []
    limited = [name for name in d.get("limited_arms", ()) if name in overall]
    if limited:
        found.append(
            f"{', '.join(limited)}: {overall[limited[0]]['num_questions']} of {d['num_questions']} questions, evenly "
            "over the tasks; their speedups are over those."
        )
    if d.get("batch", 1) > 1:
        found.append(
            f"{d['batch']} questions side by side (solo: one at a time); an answer's time is its share of the batch's."
        )
    for name, m in overall.items():
        if m.get("target_speedup") is not None:
            plain = f"plain%{name.partition('%')[2]}"
            found.append(f"{name}: {m['target_speedup']:.2f}x its own target's plain decoding ({plain}), same tokens.")
    for name, (equal, count) in d.get("equal_to_plain", {}).items():
        found.append(f"{name} is not held to plain decoding's tokens: {equal} of {count} answers have them.")
    return found


def _about(d: Mapping[str, Any]) -> str:
    found = d["lossless"]
    verdict = f"{found['num_compared']} answers compared with plain decoding, {found['num_different']} differ"
    lines = [
        f"{d['num_questions']} questions ({d['prompts']}), {d['max_new_tokens']} new tokens, temperature "
        f"{d['temperature']}, seed {d['seed']}, {d['repeats']} repeats, {d['dtype']}",
        f"{d['device']['name']}, {d['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in d["versions"].items() if version),
        f"{d['created']}; <code>{_esc(d['command'])}</code>",
        f"<b>{verdict}</b>" + ("; INTERRUPTED" if d["interrupted"] else ""),
    ]
    lines += map(_esc, notes(d))
    if d.get("note"):
        lines.append(f"<b>{_esc(d['note'])}</b>")
    if d.get("problems"):
        lines += [f"<b>{_esc(problem)}</b>" for problem in d["problems"]]
    return "<p>" + "<br>".join(lines) + "</p>"


def _section(title: str, body: str) -> str:
    return f"<h2>{_esc(title)}</h2>{body}"


def _overall(arms: Mapping[str, Any]) -> str:
    columns = (
        ("tokens/s", "decode_tokens_per_second", 1), ("speedup", "speedup", 2), ("end to end", "end_to_end_speedup", 2),
        ("first token ms", "first_token_ms_p50", 1), ("token ms p50", "token_ms_p50", 2), ("p99", "token_ms_p99", 2),
        ("acceptance", "acceptance_rate", 3), ("tokens/verification", "tokens_per_verification", 2),
        ("wasted/token", "wasted_per_token", 2), ("row layers/token", "row_layers_per_token", 1),
        ("roofline", "roofline_ratio", 2),
    )  # fmt: skip
    head = "".join(f"<th>{_esc(title)}</th>" for title, *_ in columns)
    rows = []
    for name, m in arms.items():
        cells = []
        for _, key, digits in columns:
            low_high = m.get(f"{key}_interval")
            tail = f" <small>{low_high[0]:.{digits}f}-{low_high[1]:.{digits}f}</small>" if low_high else ""
            cells.append(f"<td>{_number(m.get(key), digits)}{tail}</td>")
        rows.append(f"<tr><td>{_esc(name)}</td>{''.join(cells)}</tr>")
    note = "<p><small>In small print: 95 % intervals, bootstrap over questions.</small></p>"
    return f"<table><tr><th>arm</th>{head}</tr>{''.join(rows)}</table>{note}"


def _histograms(counts: Mapping[str, Mapping[str, int]]) -> str:
    most = max((int(key) for own in counts.values() for key in own), default=0)
    head = "".join(f"<th>{n}</th>" for n in range(most + 1))
    rows = []
    for name, own in counts.items():
        total = sum(own.values()) or 1
        cells = "".join(f"<td>{own.get(str(n), 0) / total:.0%}</td>" for n in range(most + 1))
        rows.append(f"<tr><td>{_esc(name)}</td>{cells}</tr>")
    return f"<table><tr><th>arm</th>{head}</tr>{''.join(rows)}</table>"


def _by_entropy(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, int]]:
    """(nats, share accepted, drafted), in the middle of each bin that holds anything."""
    return [(row["nats"] + 0.125, row["accepted"] / row["drafted"], row["drafted"]) for row in rows if row["drafted"]]


def _sample(sample: Mapping[str, Any]) -> str:
    exits = sorted(
        {e for rounds in sample["arms"].values() for r in rounds for _, e, _ in r["tokens"] if e is not None}
    )
    tints = {e: TEXT_COLOUR if e < 0 else EXIT_COLOURS[i % len(EXIT_COLOURS)] for i, e in enumerate(exits)}
    legend = " ".join(
        f'<mark style="background:{tints[e]}">{"from the text" if e < 0 else f"exit {e}"}</mark>' for e in exits
    )
    parts = [
        f"<p>{_esc(sample['prompt'])}</p><p><small>Tinted: drafted and accepted, {legend}; plain: the full model's "
        "own; <s>struck</s>: drafted and rejected in that round; | ends a round.</small></p>"
    ]
    for name, rounds in sample["arms"].items():
        text = []
        for one in rounds:
            for piece, exit_layer, nats in one["tokens"]:
                if exit_layer is None:
                    text.append(_esc(piece))
                else:
                    told = "" if nats is None else f' title="{nats:.2f} nats"'
                    text.append(f'<mark style="background:{tints[exit_layer]}"{told}>{_esc(piece)}</mark>')
            if one["rejected"]:
                text.append("".join(f"<s>{_esc(piece)}</s>" for piece in one["rejected"]))
            text.append("<small>|</small>")
        parts.append(f"<h3>{_esc(name)}</h3><pre>{''.join(text)}</pre>")
    return "".join(parts)


# --- charts


def rows(summary: Mapping[str, Any]) -> str:
    """A row an arm: a bar of the speedup of all tasks together with its interval, and a dot for each task."""
    arms, tasks = summary[OVERALL], [task for task in summary if task != OVERALL]
    known = [v for own in summary.values() for m in own.values() if (v := m.get("speedup")) is not None]
    top, width, tall = _top(known, 1.0), WIDTH * 1.6, ROW * len(arms) + 24

    def at(value: float) -> float:
        return NAMES + (width - NAMES - 10) * value / top

    body = "".join(
        f'<line x1="{at(top * i / 4):.1f}" y1="0" x2="{at(top * i / 4):.1f}" y2="{tall - 22}" stroke="#eee"/>'
        + _label(at(top * i / 4), tall - 8, f"{top * i / 4:.2f}")
        for i in range(4)
    )
    for row, (name, m) in enumerate(arms.items()):
        y = ROW * row + ROW / 2
        speed = m.get("speedup")
        body += (
            f'<text x="{NAMES - 6}" y="{y + 4:.1f}" font-size="12" text-anchor="end" fill="#222">{_esc(name)}</text>'
        )
        if speed is None:
            continue
        body += (
            f'<rect x="{NAMES}" y="{y - 6:.1f}" width="{at(speed) - NAMES:.1f}" height="12" fill="#d5dbe8">'
            f"<title>{_esc(name)}: {speed:.3f}</title></rect>"
        )
        if bounds := m.get("speedup_interval"):
            body += (
                f'<line x1="{at(bounds[0]):.1f}" y1="{y:.1f}" x2="{at(min(bounds[1], top)):.1f}" y2="{y:.1f}" '
                'stroke="#555"/>'
            )
        for i, task in enumerate(tasks):
            value = _get(summary, task, name, "speedup")
            if value is not None:
                body += (
                    f'<circle cx="{at(value):.1f}" cy="{y:.1f}" r="3.5" fill="{_colour(i)}" fill-opacity="0.85">'
                    f"<title>{_esc(name)}, {_esc(task)}: {value:.3f}</title></circle>"
                )
    body += f'<line x1="{at(1):.1f}" y1="0" x2="{at(1):.1f}" y2="{tall - 22}" stroke="#888" stroke-dasharray="4 3"/>'
    return _svg(body, width, tall) + _legend(tasks)


def bars(groups: Sequence[str], series: Mapping[str, Sequence[float | None]], rule: float | None = None) -> str:
    """Grouped bars; `rule` draws a line at a value."""
    top = _top([v for own in series.values() for v in own if v is not None], rule)
    wide = (WIDTH * 1.6 - LEFT) / max(1, len(groups))
    each = 0.8 * wide / max(1, len(series))
    body = _axes(top, WIDTH * 1.6)
    for g, group in enumerate(groups):
        for s, (name, own) in enumerate(series.items()):
            value = own[g]
            if value is not None:
                tall = _y(0, top) - _y(value, top)
                body += (
                    f'<rect x="{LEFT + g * wide + s * each:.1f}" y="{_y(value, top):.1f}" width="{each * 0.92:.1f}" '
                    f'height="{tall:.1f}" fill="{_colour(s)}">'
                    f"<title>{_esc(name)}, {_esc(group)}: {value:.3f}</title></rect>"
                )
        body += _label(LEFT + g * wide + 0.4 * wide, HEIGHT - 20, group)
    if rule is not None:
        body += _rule(_y(rule, top), WIDTH * 1.6)
    return _svg(body, WIDTH * 1.6) + _legend(list(series))


def lines(series: Mapping[str, Sequence[float]], first: int = 0) -> str:
    """A line for each series, over whole numbers from `first`."""
    return points({name: [(first + i, value, 1) for i, value in enumerate(own)] for name, own in series.items()}, True)


def points(series: Mapping[str, Sequence[tuple[float, float, int]]], joined: bool = False) -> str:
    """(x, y, weight); the area of a dot follows its weight unless they are joined."""
    xs = [x for own in series.values() for x, _, _ in own]
    right = max(xs, default=1.0)
    top = _top([y for own in series.values() for _, y, _ in own], None)
    body = _axes(top, WIDTH)

    def at(x: float) -> float:
        return LEFT + 12 + (WIDTH - LEFT - 30) * x / (right or 1)

    for s, own in enumerate(series.values()):
        most = max((w for _, _, w in own), default=1)
        if joined and own:
            path = " ".join(f"{at(x):.1f},{_y(y, top):.1f}" for x, y, _ in own)
            body += f'<polyline points="{path}" fill="none" stroke="{_colour(s)}" stroke-width="2"/>'
        for x, y, weight in own:
            size = 3.0 if joined else 2 + 6 * (weight / most) ** 0.5
            body += (
                f'<circle cx="{at(x):.1f}" cy="{_y(y, top):.1f}" r="{size:.1f}" fill="{_colour(s)}" '
                'fill-opacity="0.65">'
                f"<title>{x:g}: {y:.3f}{'' if joined else f' of {weight}'}</title></circle>"
            )
    for tick in range(int(right) + 1):
        if right <= 12 or tick % 2 == 0:
            body += _label(at(tick), HEIGHT - 20, str(tick))
    return _svg(body, WIDTH) + _legend(list(series))


def _top(values: Sequence[float], rule: float | None) -> float:
    return 1.08 * max([*values, rule or 0.0, 1e-9])


def _y(value: float, top: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 10) * value / top


def _axes(top: float, width: float) -> str:
    marks = ""
    for i in range(5):
        value = top * i / 4
        y = _y(value, top)
        marks += f'<line x1="{LEFT}" y1="{y:.1f}" x2="{width:.0f}" y2="{y:.1f}" stroke="#eee"/>'
        marks += f'<text x="{LEFT - 6}" y="{y + 4:.1f}" font-size="11" text-anchor="end" fill="#666">{value:.2f}</text>'
    return marks


def _rule(y: float, width: float) -> str:
    return f'<line x1="{LEFT}" y1="{y:.1f}" x2="{width:.0f}" y2="{y:.1f}" stroke="#888" stroke-dasharray="4 3"/>'


def _label(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y}" font-size="11" text-anchor="middle" fill="#444">{_esc(text)}</text>'


def _svg(body: str, width: float, height: float = HEIGHT) -> str:
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}">{body}</svg>'


def _legend(names: Sequence[str]) -> str:
    spans = (f'<span style="color:{_colour(i)}">&#9632;</span> {_esc(name)}' for i, name in enumerate(names))
    return f"<p><small>{' &nbsp; '.join(spans)}</small></p>"


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _get(groups: Mapping[str, Any], group: str, arm: str, metric: str) -> float | None:
    value = groups[group].get(arm, {}).get(metric)
    return None if value is None else float(value)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _esc(text: object) -> str:
    return html.escape(str(text))
