"""Reports for people, on stdout: tables as wide as the terminal, or of a fixed width in a pipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .pages import notes

PIPE_WIDTH = 150
OVERALL = "overall"
MOST_COLUMNS = 8  # arms that a table by task has room for


def console() -> Console:
    """A console on stdout; in a pipe wide enough for every table."""
    out = Console(highlight=False, markup=False, emoji=False)
    return out if out.is_terminal else Console(highlight=False, markup=False, emoji=False, width=PIPE_WIDTH)


def print_inventory(found: Mapping[str, Any]) -> None:
    """What `engine.inventory.inventory` found."""
    out, model, heads = console(), found["model"], found["heads"]
    out.print(
        f"{model['id']}: {model['family']}, {model['num_parameters']:,} parameters, {model['num_layers']} layers, "
        f"width {model['hidden_size']}, {model['num_heads']} heads ({model['num_kv_heads']} for keys and values) of "
        f"{model['head_dim']}, MLP {model['intermediate_size']}, vocabulary {model['vocab_size']:,}, context "
        f"{model['max_context']:,}, {model['dtype']} on {model['device']}, prompts read with {model['prefill']}"
    )
    memory = titled("Memory", "what", ">MiB", "arithmetic")
    for item in found["memory"]["items"]:
        what = f"{item['what']} (second copy)" if item["second_copy"] else item["what"]
        memory.add_row(what, f"{item['num_bytes'] / 2**20:.1f}", item["arithmetic"])
    memory.add_row("in all", f"{found['memory']['total_bytes'] / 2**20:.1f}", "")
    out.print(memory)
    if found["warning"]:
        out.print(f"no speculation: {found['warning']}")
    if heads is None:
        how = "drafts come from the text alone" if "text" in found["drafts_from"] else "plain decoding"
        out.print(f"No exit heads: {how}.")
        return
    levels = next((list(e["gates"]) for e in heads["exits"] if "gates" in e), [])
    table = titled(
        f"Heads: {heads['num_parameters']:,} parameters, draft vocabulary {heads['draft_vocab']:,}; thresholds in "
        "nats: extends below the first, branches below the second",
        ">exit", "kind", ">agreement", ">in top 4", *(f">at {level}" for level in levels),
    )  # fmt: skip
    for entry in heads["exits"]:
        table.add_row(
            str(entry["exit_layer"]),
            entry["kind"],
            f"{entry['agreement']:.3f}" if "agreement" in entry else "-",
            f"{entry['top_k'][3]:.3f}" if "top_k" in entry else "-",
            *(" ".join(f"{t:.2f}" for t in entry["gates"][level]) if "gates" in entry else "-" for level in levels),
        )
    out.print(table)
    if heads["exits_in_use"]:
        source = heads["calibrated_on"]
        how = "Not calibrated: chains of a fixed length." if source is None else f"Measured on {source}."
        where = ", where the text does not repeat itself" if "text" in found["drafts_from"] else ""
        out.print(f"Drafting asks exits {heads['exits_in_use']}{where}. {how}")
    else:
        out.print("Not calibrated: give --exit, or thresholds through the Python API, to draft with them.")


def print_environment(versions: Mapping[str, Any], device: Mapping[str, Any]) -> None:
    """Versions and device in a few lines."""
    out = console()
    out.print("  ".join(f"{name} {version or '(not installed)'}" for name, version in versions.items()))
    out.print("  ".join(f"{key}: {_shown(key, value)}" for key, value in device.items()))


def _shown(key: str, value: Any) -> str:
    if key == "memory_bytes" and value is not None:
        return f"{value / 2**30:.1f} GiB"
    return " ".join(map(str, value)) or "none known" if isinstance(value, list) else str(value)


def print_calibration(found: Mapping[str, Any]) -> None:
    """What `train.recalibrate` measured."""
    out, exits = console(), found["exits"]
    levels = list(next(iter(exits.values()))["thresholds"])
    out.print(
        f"Measured on {found['source']}. {found['num_drafted']:,} prefixes end in drafts, {found['num_off_path']:,} "
        "hold one that is rejected."
    )
    table = titled(
        "Agreement, and how well confidence tells right from wrong among what earlier exits refused (at 0.90): AUROC, "
        "and coverage at agreement 0.90, by entropy / max probability / margin",
        ">exit", ">tokens", ">agreement", ">true prefixes", "AUROC", "coverage", "best", ">confidence error",
    )  # fmt: skip
    gates = titled("Entropy thresholds in nats; in brackets what true prefixes alone would give", ">exit", *levels)
    for layer, e in exits.items():
        table.add_row(
            layer, f"{e['num_tokens']:,}", f"{e['agreement']:.3f}", f"{e['true_prefix_agreement']:.3f}",
            " ".join(f"{x:.3f}" for x in e["auroc_reached"].values()),
            " ".join(f"{x:.2f}" for x in e["coverage"].values()),
            e["best_measure"], _number(e["confidence_error"], 3),
        )  # fmt: skip
        pairs = ((e["thresholds"][a], e["thresholds_on_true_prefixes"][a]) for a in levels)
        gates.add_row(layer, *(f"{own:.2f} ({true:.2f})" for own, true in pairs))
    out.print(table)
    out.print(gates)
    if found["folder"] is not None:
        out.print(f"Stored in {found['folder']}.")


def print_plan(document: Mapping[str, Any]) -> None:
    """What `skipstone plan` chose, out of what, and what was measured of it."""
    out, costs, choices = console(), document["costs"], document["choices"]
    chosen = next(choice for choice in choices if choice["name"] == document["chosen"])
    out.print(
        f"{document['chosen']}: {chosen['tokens_per_second']:.1f} tokens/s expected, "
        f"{document['expected_speedup']:.2f} of plain decoding "
        f"({document['num_considered']} policies compared, {document['seconds']:.1f} s)"
    )
    if len(document["rivals"]) > 1:
        table = titled("Head sets", "heads", "policy", ">expected tokens/s", ">of plain")
        for name, rival in document["rivals"].items():
            speed = rival["tokens_per_second"]
            table.add_row(name, rival["chosen"], f"{speed:.1f}", f"{rival['expected_speedup']:.2f}")
        out.print(table)
        out.print(f"{document['heads']} wins: load with --heads {document['heads']}; what follows is its plan")
    layers = "  ".join(f"{rows}: {costs['num_layers'] * ms:.2f}" for rows, ms in costs["layer_ms"].items())
    asks = "  ".join(f"{exit_layer}: {ms:.2f}" for exit_layer, ms in costs["ask_ms"].items())
    out.print(f"ms of all layers by rows: {layers}; the rest of a plain step: {costs['step_ms']:.2f}")
    grown = "  ".join(f"{rows}: {ms:.2f}" for rows, ms in costs["grow_ms"].items())
    first = f"{costs['open_ms']:.2f}, then by rows {grown}" if grown else "-"
    out.print(f"ms of a head's answer by exit: {asks or '-'}; at exit 0: {first}")
    table = titled("Best first", "policy", ">tokens/s", ">tokens per verification", ">drafted", ">ms a round")
    keys = "tokens_per_second", "tokens_per_verification", "drafted", "round_ms"
    for choice in choices:
        numbers = (choice[key] for key in keys)
        table.add_row(choice["name"], *(f"{number:.2f}" for number in numbers))
    out.print(table)
    if document["rungs"]:
        rungs = ", ".join(f"{n}: {tokens:.2f} in {ms:.1f}" for n, tokens, _, ms in document["rungs"])
        out.print(
            f"tokens per verification and ms of heads' drafts by length, among which it moves while running: {rungs}"
        )
    if document["kept"] is not None:
        out.print(f"kept in {document['kept']}")
    check = document["check"]
    if check is None:
        return
    title = (
        f"Measured: {check['num_answered'][0]} questions x {check['max_new_tokens']} tokens, {check['repeats']} repeats"
    )
    for name, rows in ((title, check["arms"]), ("The best of them again", check["retimed"])):
        table = titled(
            name, "policy", ">expected tokens/s", ">measured", ">error", "95 %", ">expected tau", ">measured",
            ">expected ms a round", ">measured", ">speed-up", "range", ">chosen / this", "95 %",
        )  # fmt: skip
        for row in rows:
            (low, high), share = row["speedup_range"] or (1.0, 1.0), row["chosen_share_interval"]
            error = row["error_interval"]
            table.add_row(
                row["name"], f"{row['expected_tokens_per_second']:.1f}", f"{row['measured_tokens_per_second']:.1f}",
                f"{row['error']:+.0%}", "-" if error is None else f"{100 * error[0]:+.0f} to {100 * error[1]:+.0f}",
                f"{row['expected_tokens_per_verification']:.2f}",
                f"{row['measured_tokens_per_verification']:.2f}",
                f"{row['expected_round_ms']:.2f}", f"{row['measured_round_ms']:.2f}",
                f"{row['measured_speedup']:.2f}", f"{low:.2f}-{high:.2f}", f"{row['chosen_share']:.2f}",
                "-" if share is None else f"{share[0]:.2f}-{share[1]:.2f}",
            )  # fmt: skip
        if rows:
            out.print(table)
    out.print(
        f"the plan, followed, has {check['planned_share']:.1%} of the best policy's speed ({check['best']}; 95 % "
        f"{_bounds(check['planned_share_interval'])}), its policy as it stands {check['chosen_share']:.1%} "
        f"({_bounds(check['chosen_share_interval'])}); {len(check['different'])} of "
        f"{check['num_compared']} answers differ from plain decoding's"
    )


def print_bench(document: Mapping[str, Any]) -> None:
    """Overall first, with what drafting did; then speed and acceptance by task; then what was compared."""
    out, summary = console(), document["summary"]
    out.print(
        f"{document['model']} {document['dtype']}, {document['device']['name']}, {document['threads']} threads; "
        f"{document['num_questions']} questions ({document['prompts']}), {document['max_new_tokens']} new tokens, "
        f"temperature {document['temperature']}, seed {document['seed']}, {document['repeats']} repeats"
    )
    if document.get("note"):
        out.print(f"Note: {document['note']}")
    if document["interrupted"]:
        out.print("Interrupted: only whole questions count.")
    if OVERALL in summary:
        out.print(_overall(summary[OVERALL]))
        if any(m.get("num_drafted") for m in summary[OVERALL].values()):
            out.print(_drafts(summary[OVERALL]))
        for name, m in summary[OVERALL].items():
            if m.get("fallbacks"):
                reasons = ", ".join(f"{reason} ({count} times)" for reason, count in m["fallbacks"].items())
                out.print(f"Arm {name} fell back to less drafting: {reasons}.")
            elif not m.get("num_drafted") and document["arms"][name].get("exits"):
                out.print(
                    f"Arm {name} drafted nothing: it was paused from the warm-up on, as drafting does not pay here."
                )
        if document["matched"][OVERALL]:
            out.print(_matched(document["matched"][OVERALL]))
        if len(summary[OVERALL]) <= MOST_COLUMNS:
            out.print(_by_task(summary))
            if len(document.get("contexts", {})) > 1:
                title = "By most tokens of the prompt: tok/s, speedup; acceptance, tokens per verification"
                out.print(_by_task(document["contexts"] | {OVERALL: summary[OVERALL]}, title, "tokens"))
    if document.get("lossy"):
        out.print(_lossy(document["lossy"]))
    if document["skipped_questions"]:
        out.print(f"Left out, too long for the context: questions {document['skipped_questions']}")
    found = document["lossless"]
    out.print(f"Lossless check: {found['num_compared']} answers compared, {found['num_different']} different.")
    for line in notes(document):
        out.print(line)


def print_comparison(found: Mapping[str, Any]) -> None:
    """What `bench.compare.compare` found."""
    out = console()
    for name, (before, after) in found["conditions"].items():
        out.print(f"{name} differs: {before} before, {after} now")
    table = titled(
        f"Now against before, {found['questions']} questions in both; intervals of 95 %",
        "arm", "number", ">before", ">now", ">ratio", ">interval", ">repeats apart", "changed",
    )  # fmt: skip
    for arm, rows in found["arms"].items():
        for metric, row in rows.items():
            table.add_row(
                arm, metric, _number(row["before"], 3), _number(row["after"], 3), f"{row['ratio']:.3f}",
                _bounds(row["interval"]), _percent(row["spread"]), "yes" if row["changed"] else "no",
            )  # fmt: skip
    out.print(table)
    for arm, own in found["texts"].items():
        out.print(f"{arm}: {own['different']} of {own['compared']} answers have other tokens.")


def _bounds(interval: Sequence[float] | None, digits: int = 2) -> str:
    return "-" if interval is None else f"{interval[0]:.{digits}f}-{interval[1]:.{digits}f}"


def print_profile(found: Mapping[str, Any]) -> None:
    """What `bench.profile.profile` measured."""
    out = console()
    out.print(
        f"{found['model']} {found['dtype']}, {found['device']['name']}; batch 1, context {found['context']}, "
        f"{found['num_tokens']} new tokens"
    )
    if "operations" in found:
        own = found["operations"]
        table = titled(
            f"torch's operations in one plain step of {own['step_us']:.0f} us, by their own time",
            "operation",
            ">calls",
            ">us",
        )
        for row in own["rows"]:
            table.add_row(row["name"], f"{row['calls']:.1f}", f"{row['us']:.1f}")
        out.print(table)
        return
    for kind, own in found["rounds"].items():
        table = titled(
            f"Kernels of one {kind} round: {own['profiled_us']:.1f} us under the profiler, {own['idle_us']:.1f} idle",
            "kernel", ">launches", ">us", ">MB", ">GB/s", ">of bandwidth",
        )  # fmt: skip
        for row in own["kernels"]:
            moved = [f"{row['bytes'] / 1e6:.1f}", str(row["gb_s"]), _percent(row["share"])] if "bytes" in row else []
            table.add_row(row["name"], f"{row['launches']:.1f}", f"{row['us']:.2f}", *(moved or ["-"] * 3))
        out.print(table)
        out.print(
            f"{kind}: {own['device_us']:.1f} us on the device, {own['round_us']:.1f} us from one round's end to the "
            f"next: host gap {own['host_gap']:.1%}; {own['tokens_per_round']:.2f} tokens a round"
        )
    rows = ", ".join(f"{own['p50']:.1f} us with {live} rows" for live, own in found["step_us"].items())
    out.print(
        f"A step up to the draw: {rows}; {found['us_per_layer']:.2f} us a layer. {found['weight_bytes'] / 1e6:.0f} MB "
        f"of weights at {found['bandwidth_gb_s']['best']:.0f} GB/s need {found['floor_us']:.1f} us: roofline ratio "
        f"{found['roofline']:.2f}"
    )


def _overall(arms: Mapping[str, Any]) -> Table:
    table = titled(
        "All tasks together (medians of the repeats)",
        "arm", ">tok/s", ">speedup", ">95 %", ">repeats", ">end to end", ">speedup", ">first token ms", ">token ms p50",
        ">p99", ">roofline", ">worst question",
    )  # fmt: skip
    for name, m in arms.items():
        spread = m["speedup_range"]
        table.add_row(
            name,
            _number(m["decode_tokens_per_second"], 1),
            _times(m["speedup"]),
            _bounds(m.get("speedup_interval")),
            "-" if spread is None else f"{spread[0]:.2f}-{spread[1]:.2f}",
            _number(m["end_to_end_tokens_per_second"], 1),
            _times(m["end_to_end_speedup"]),
            _number(m.get("first_token_ms_p50"), 1),
            _number(m.get("token_ms_p50"), 2),
            _number(m.get("token_ms_p99"), 2),
            _number(m.get("roofline_ratio"), 2),
            _times(m["worst_question_time_ratio"]),
        )
    return table


def _drafts(arms: Mapping[str, Any]) -> Table:
    table = titled(
        "Drafting",
        "arm", ">acceptance", ">tok/verification", ">without bonus", ">wasted", ">row layers/tok",
        "acceptance by position", "accepted tokens by exit",
    )  # fmt: skip
    for name, m in arms.items():
        if m.get("num_drafted"):
            table.add_row(
                name,
                _percent(m["acceptance_rate"]),
                _number(m["tokens_per_verification"], 2),
                _number(m["tokens_per_verification_without_bonus"], 2),
                str(m["num_wasted"]),
                _number(m["row_layers_per_token"], 1),
                " ".join(f"{a:.2f}" for a in m["acceptance_by_position"]),
                " ".join(f"{layer}:{share:.0%}" for layer, share in m["share_by_exit"].items()),
            )
    return table


def _lossy(arms: Mapping[str, Any]) -> Table:
    table = titled(
        "Lossy arms. Depth: layers until a token is written; row layers: with those made up for later; "
        "agreement with the full model after the same prefix; perplexity under the full model",
        "arm", ">depth", ">saved", ">row layers/tok", ">by exits", "tokens by exit", ">agreement", ">of exits",
        ">equal texts", ">differs from", ">perplexity", ">plain's",
    )  # fmt: skip
    for name, m in arms.items():
        table.add_row(
            name, _number(m["mean_depth"], 1), _percent(m["depth_saved"]), _number(m["layers_per_token"], 1),
            _percent(m["share_by_exits"]), " ".join(f"{e}:{n}" for e, n in m["tokens_by_exit"].items()),
            _number(m["agreement"], 3), _number(m["agreement_of_exits"], 3), f"{m['num_equal']}/{m['num_compared']}",
            _number(m["median_first_difference"], 0), _number(m["perplexity"], 2), _number(m["plain_perplexity"], 2),
        )  # fmt: skip
    return table


def _matched(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = titled(
        "Gated drafting at no fewer tokens per verification than the best fixed exits and lengths: acceptance rate, "
        "wasted drafts a token",
        "fixed", ">tok/verification", ">acceptance", ">wasted", "gated", ">tok/verification", ">acceptance", ">wasted",
        ">ratio",
    )  # fmt: skip
    for row in rows:
        if row["frontier"]:
            table.add_row(row["reference"], *_work(row), row["gated"] or "-", *_work(row["gated_metrics"]),
                          _times(row["acceptance_ratio"]))  # fmt: skip
    return table


def _work(m: Mapping[str, Any] | None) -> list[str]:
    if m is None:
        return ["-"] * 3
    numbers = (
        _number(m["tokens_per_verification"], 2),
        _percent(m["acceptance_rate"]),
        _number(m["wasted_per_token"], 2),
    )
    return list(numbers)


def _by_task(
    summary: Mapping[str, Any],
    title: str = "By task: tok/s, speedup; acceptance, tokens per verification",
    what: str = "task",
) -> Table:
    names = list(summary[OVERALL])
    table = titled(title, what, *(f">{n}" for n in names))
    for task, arms in summary.items():
        if task != OVERALL:
            table.add_row(task, *(_cell(arms[name]) if name in arms else "-" for name in names))
    return table


def _cell(m: Mapping[str, Any]) -> str:
    speed = f"{_number(m['decode_tokens_per_second'], 1)} {_times(m['speedup'])}"
    if not m.get("num_drafted"):
        return speed
    return f"{speed}; {_percent(m['acceptance_rate'])} {_number(m['tokens_per_verification'], 2)}"


def titled(title: str, *headings: str) -> Table:
    """A table; headings that begin with > are of numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for heading in headings:
        justify: Any = "right" if heading.startswith(">") else "left"
        table.add_column(heading.removeprefix(">"), justify=justify, no_wrap=heading in ("arm", "policy"))
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
