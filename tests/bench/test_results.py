"""Every committed run is listed and every number's run exists; the papers' table says what the calibrations hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"


def test_the_list_of_runs_is_whole() -> None:
    listed = set(re.findall(r"`([\w.-]+\.(?:json|html))`", (RESULTS / "README.md").read_text(encoding="utf-8")))
    assert listed == {path.name for path in RESULTS.iterdir() if path.suffix in (".json", ".html")}


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))])
def test_runs_that_pages_name_exist(page: str) -> None:
    for name in re.findall(r"results/([\w.-]+\.(?:json|html))", (ROOT / page).read_text(encoding="utf-8")):
        assert (RESULTS / name).is_file(), f"{page} names {name}"


def test_the_confidence_table_is_the_shipped_calibrations() -> None:
    """Of each exit AUROC among the tokens that reach it, by entropy, maximum probability, margin."""
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (adapters|recurrent) (\d+) \| ([\d,]+) \| (0\.\d+) \| (0\.\d+) \| (0\.\d+) \|$", text, re.M)
    expected = []
    for kind in ("adapters", "recurrent"):
        folder = ROOT / "heads" / "pretrained" / f"smollm2-135m-instruct-{kind}"
        exits = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))["exits"]
        for layer, own in exits.items():
            scores = [f"{own['separation'][name]['auroc_reached']:.3f}" for name in ("entropy", "max_prob", "margin")]
            expected.append((kind, layer, f"{own['num_tokens']:,}", *scores))
    assert rows == expected


@pytest.mark.parametrize(
    ("run", "reference", "gated"),
    [
        ("dssd_sweep_cpu.json", "bare:24:2", "accuracy:0.90:7:24"),
        ("dssd_sweep_cpu.json", "fixed:24:2", "accuracy:0.80:7:24"),
        ("likely_cpu.json", "fixed:24:2", "likely:0.2:7:24"),
    ],
)
def test_the_dssd_ratios_are_the_committed_sweeps(run: str, reference: str, gated: str) -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    matched = json.loads((RESULTS / run).read_text(encoding="utf-8"))["matched"]["overall"]
    (row,) = (row for row in matched if row["reference"] == reference)
    assert row["gated"] == gated
    wasted = row["wasted_per_token"], row["gated_metrics"]["wasted_per_token"]
    assert f"{row['acceptance_ratio']:.2f}x" in text and f"{wasted[0]:.2f} to {wasted[1]:.2f}" in text
