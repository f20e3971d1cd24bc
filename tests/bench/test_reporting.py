"""Journal, intervals, contexts, comparison and the files of a report, on answers made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skipstone.bench import energy
from skipstone.bench.arms import Outcome
from skipstone.bench.compare import compare, read_document
from skipstone.bench.contexts import at_contexts, parse_sizes
from skipstone.bench.intervals import interval, rate, rate_ratio
from skipstone.bench.journal import Journal
from skipstone.bench.measure import Measurements, Record, measure, prompt_ids
from skipstone.bench.pages import COLOURS, MOST_CURVES, csv_rows, fastest, page, rows, write_report
from skipstone.bench.questions import Question
from skipstone.bench.report import document
from skipstone.engine.statistics import Statistics
from skipstone.engine.tokenizer import Tokenizer

QUESTIONS = [Question(i, task, (f"word {i} stone",)) for i, task in enumerate(["qa", "qa", "rag", "rag", "writing"])]
SETTINGS = {"model": "tiny", "seed": 0}
ABOUT: dict[str, Any] = {
    "model": "tiny <b>", "heads": "default", "prompts": "p", "command": "skipstone bench", "dtype": "float32",
    "device": {"name": "a CPU"}, "threads": 1, "versions": {"torch": "2"}, "seed": 0, "temperature": 0.0,
    "max_new_tokens": 8, "repeats": 2, "num_questions": 5, "created": "now", "note": "",
    "roofline": {"weight_bytes": 1000, "bandwidth_gb_s": 1.0, "floor_ms": 4.0},
}  # fmt: skip
DRAFTED = Statistics(
    num_drafted=8, num_accepted=6, num_committed=10, num_verifications=4, accepted_by_position=(3, 2, 1),
    drafted_by_position=(4, 3, 1), tokens_by_exit={-1: 2, 3: 4}, rounds_by_drafted={2: 4},
    rounds_by_accepted={1: 2, 2: 2}, rounds_by_stops={0: 4}, drafted_by_entropy={0: 4, 6: 2},
    accepted_by_entropy={0: 4},
)  # fmt: skip


class Rote:
    """An arm with a time a token; counts how often it is asked."""

    lossless, plain = True, "plain"

    def __init__(self, name: str, ms: float, stats: Statistics | None = None, fails_after: int = 99) -> None:
        self.name, self.ms, self.stats, self.left, self.asked = name, ms, stats, fails_after, 0

    def run(self, prompt_ids: list[int], sampling: Any) -> Outcome:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.asked += 1
        slow = self.ms * (1 + len(prompt_ids) % 3 / 10)
        blocks = ((2 * slow, 1), (4 * slow, 2), (13 * slow, 7))
        ids = [len(prompt_ids) % 7, *range(9)]
        return Outcome("text", ids, 13 * slow, 10 * slow, 10, self.stats, None, blocks, (3,) * 10, 0.5)

    def describe(self) -> dict[str, Any]:
        return {"low": float("inf")}


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_folder)


def measured(tokenizer: Tokenizer, arms: list[Rote], journal: Journal | None = None, repeats: int = 2) -> Measurements:
    sampling = {"max_new_tokens": 8, "seed": 0}
    return measure(arms, QUESTIONS, tokenizer, sampling, repeats=repeats, max_context=400, journal=journal)  # type: ignore[arg-type]


def run_of(tokenizer: Tokenizer, ms: float, note: str = "") -> dict[str, Any]:
    arms = [Rote("plain", 2.0), Rote("always", ms, DRAFTED)]
    return document(measured(tokenizer, arms), arms, 4, ABOUT | {"note": note})  # type: ignore[arg-type]


# --- journal


def test_a_stopped_run_goes_on_where_it_was(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Planted bugs: answers measured twice; an answer of another session counted as this one's; a torn line read."""
    path = tmp_path / "journal.jsonl"
    first = [Rote("plain", 2.0), Rote("always", 1.0, DRAFTED, fails_after=3)]  # the warm-up and two questions
    one = measured(tokenizer, first, Journal(path, SETTINGS))
    assert one.interrupted and len(one.records) == 2 * 2
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"session": 1, "key": ["always", "3"')  # killed in mid-line
    again = [Rote("plain", 2.0), Rote("always", 1.0, DRAFTED)]
    journal = Journal(path, SETTINGS)
    two = measured(tokenizer, again, journal)
    journal.close()
    assert journal.session == 2 and journal.num_found == 5, "two whole questions, and plain's answer to the third"
    assert not two.interrupted and len(two.records) == 2 * 2 * 5
    assert again[0].asked == 1 + 10 - 3 and again[1].asked == 1 + 10 - 2
    assert {r.session for r in two.records} == {1, 2}
    third = [Rote("plain", 2.0), Rote("always", 1.0, DRAFTED)]
    whole = measured(tokenizer, third, Journal(path, SETTINGS))
    assert [arm.asked for arm in third] == [1, 1], "only the warm-up"
    assert [r.outcome for r in whole.records] == [r.outcome for r in two.records]


def test_a_journal_of_other_settings_or_none_at_all_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, SETTINGS).close()
    with pytest.raises(ValueError, match="seed 0, now 1"):
        Journal(path, SETTINGS | {"seed": 1})
    path.write_text("{}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="is no journal"):
        Journal(path, SETTINGS)


def test_an_answer_to_another_prompt_is_not_taken(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", SETTINGS)
    journal.add("plain", 1, 0, 0, [1, 2], Outcome("x", [5], 1.0, 1.0, 1))
    journal.close()
    again = Journal(tmp_path / "journal.jsonl", SETTINGS)
    assert again.find("plain", 1, 0, 0, [1, 3]) is None and again.find("plain", "1", 0, 0, [1, 2]) is None
    found = again.find("plain", 1, 0, 0, [1, 2])
    assert found is not None and found[0].token_ids == [5]


# --- intervals


def test_an_interval_is_paired_and_covers() -> None:
    """Twenty times longer questions, always 2x: drawn apart the two arms would give anything but 2. And the mean of
    known draws lies inside 95 % of the time, give or take chance (200 trials: 90-99 %)."""
    rng = np.random.default_rng(3)
    ms = rng.uniform(1, 20, (3, 12))
    tokens = np.full_like(ms, 10.0)
    paired = interval([tokens, ms, tokens, 2 * ms], rate_ratio)
    assert paired == pytest.approx([2.0, 2.0])
    hits = 0
    for trial in range(200):
        shares = rng.binomial(20, 0.4, (1, 30)).astype(float)
        bounds = interval([shares, np.full((1, 30), 20.0)], rate, draws=300, seed=trial)
        assert bounds is not None
        hits += bounds[0] <= 0.4 <= bounds[1]
    assert 0.90 <= hits / 200 <= 0.99
    assert interval([tokens[:, :1], ms[:, :1]], rate) is None, "one question says nothing of others"
    assert interval([tokens * 0, ms * 0], rate) is None


# --- contexts


@pytest.mark.hazard(22)
def test_prompts_have_the_asked_lengths_and_end_in_their_question(tokenizer: Tokenizer) -> None:
    """Planted bug: the template's own tokens forgotten, so that the longest does not fit the context."""
    made = at_contexts(QUESTIONS, (60, 120, 999), tokenizer, room=150)
    assert [q.task for q in made[::5]] == ["context 60", "context 120", "context 999"]
    assert len({q.question_id for q in made}) == len(made) == 15
    for question in made:
        number = int(str(question.question_id).split("@")[0])
        size = min(int(question.category.split()[1]), 150)
        assert question.turns[0].endswith("\n\n" + QUESTIONS[number].turns[0])
        assert size - 12 <= len(prompt_ids(tokenizer, question.turns, ())) <= size
    assert at_contexts(QUESTIONS, (2,), tokenizer, room=150) == []
    assert parse_sizes("4k, 512,1k") == (512, 1024, 4096)
    with pytest.raises(ValueError, match="such as 512"):
        parse_sizes("long")


@pytest.mark.hazard(22)
def test_acceptance_is_reported_by_length_of_the_prompt() -> None:
    arms = [Rote("plain", 1.0), Rote("always", 1.0)]
    records = []
    for i, (size, accepted) in enumerate([(100, 8), (256, 8), (257, 4), (8000, 0)]):
        stats = Statistics(num_drafted=8, num_accepted=accepted, num_committed=10, num_verifications=5)
        for arm in ("plain", "always"):
            records.append(Record(arm, QUESTIONS[i], 0, 0, size, Outcome("x", [1] * 10, 9.0, 8.0, 10, stats)))
    found = document(Measurements(records), arms, 4, ABOUT)["contexts"]  # type: ignore[arg-type]
    assert {size: own["always"]["acceptance_rate"] for size, own in found.items()} == {"256": 1, "512": 0.5, "8192": 0}


# --- metrics of time


def test_times_of_tokens_share_their_blocks(tokenizer: Tokenizer) -> None:
    """Blocks at 2, 4 and 13 of 1, 2 and 7 tokens. Planted bug: tokens of a block at 0 ms but the first."""
    arms = [Rote("plain", 1.0)]
    found = document(measured(tokenizer, arms, repeats=1), arms, 4, ABOUT)["summary"]["overall"]["plain"]  # type: ignore[arg-type]
    slow = [1 + len(prompt_ids(tokenizer, q.turns, ())) % 3 / 10 for q in QUESTIONS]
    assert found["first_token_ms_p50"] == pytest.approx(float(np.median([2 * s for s in slow])))
    tokens = sorted(t for s in slow for t in [1.0 * s] * 2 + [9 / 7 * s] * 7)
    assert found["token_ms_p50"] == pytest.approx(float(np.median(tokens)))
    assert found["token_ms_p99"] == pytest.approx(float(np.quantile(tokens, 0.99)))
    assert found["joules_per_token"] == pytest.approx(0.05)
    assert found["roofline_ratio"] == pytest.approx(4.0 * found["decode_tokens_per_second"] / 1e3)


# --- comparison


def test_compare_tells_a_change_from_noise(tokenizer: Tokenizer, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.json" for i in range(3)]
    for path, ms in zip(paths, (1.0, 1.0, 0.5), strict=True):
        path.write_text(json.dumps(run_of(tokenizer, ms)), encoding="utf-8")
    one, same, faster = map(read_document, paths)
    still = compare(one, same)
    assert not any(row["changed"] for rows in still["arms"].values() for row in rows.values())
    assert still["conditions"] == {} and still["questions"] == 5
    found = compare(one, faster)
    assert found["arms"]["always"]["speedup"]["ratio"] == pytest.approx(2.0)
    assert found["arms"]["always"]["speedup"]["changed"] and found["arms"]["always"]["decode tokens/s"]["changed"]
    assert not found["arms"]["plain"]["decode tokens/s"]["changed"]
    assert not found["arms"]["always"]["acceptance rate"]["changed"]
    assert found["texts"]["always"] == {"compared": 10, "different": 0}
    faster["answers"][3]["token_ids"][0] += 1
    assert sum(own["different"] for own in compare(one, faster)["texts"].values()) == 1
    other = compare(one, faster | {"threads": 9, "device": {"name": "another"}})
    assert other["conditions"] == {"threads": [1, 9], "device": ["a CPU", "another"]}
    paths[0].write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="is no document"):
        read_document(paths[0])


def test_a_change_within_the_spread_of_repeats_is_noise(tokenizer: Tokenizer) -> None:
    """A run whose second repeat took twice as long cannot say that it became 1.4 times slower."""
    one, two = run_of(tokenizer, 1.0), run_of(tokenizer, 1.0)
    for answer in two["answers"]:
        answer["decode_ms"] *= 1.4 if answer["repeat"] == 0 else 2.8
    row = compare(one, two)["arms"]["plain"]["decode tokens/s"]
    assert row["interval"][1] < 1 and row["spread"] == pytest.approx(1.0) and not row["changed"]


# --- files


def test_the_page_stands_alone_and_shows_what_was_drafted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    made = run_of(tokenizer, 1.0, note="a busy <host>")
    tokens = [["<he", -1, None], ["llo", 3, 0.4], [" you", None, None]]
    rounds = [{"tokens": tokens, "rejected": [" wrong&"]}]
    made["sample"] = {"question_id": 1, "prompt": "Say", "arms": {"always": rounds}}
    text = page(made)
    for outside in ("http:", "https:", "src=", "@import", "<script", "<link"):
        assert outside not in text, outside
    assert "a busy &lt;host&gt;" in text and "tiny &lt;b&gt;" in text and "<b>10 answers compared" in text
    assert "&lt;he</mark>" in text and "<s> wrong&amp;</s>" in text and "from the text" in text and "exit 3" in text
    assert text.count("<svg") >= 3 and len(text) < 60_000
    paths = write_report(made, tmp_path)
    assert [path.name for path in paths[:3]] == ["run.json", "run.csv", "report.html"]
    rows = csv_rows(made)
    assert rows[0][:2] == ["group", "arm"] and ["overall", "always"] in [row[:2] for row in rows]
    assert {len(row) for row in rows} == {len(rows[0])}


def test_of_many_arms_the_fastest_are_drawn_and_all_have_a_row(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Planted bugs: curves of the slowest; arms of one colour."""
    arms = [Rote("plain", 2.0), *(Rote(f"arm{i}", 0.2 + 0.1 * i, DRAFTED) for i in range(20))]
    made = document(measured(tokenizer, arms, repeats=1), arms, 4, ABOUT)  # type: ignore[arg-type]
    shown = fastest(made["summary"]["overall"])
    assert shown == [f"arm{i}" for i in range(MOST_CURVES)]
    chart, text = rows(made["summary"]), page(made)
    assert all(f">{arm.name}</text>" in chart for arm in arms) and chart.count("<rect") == len(arms)
    assert chart.count("<circle") == 3 * len(arms), "a dot a task"
    assert f"the {MOST_CURVES} fastest of 20 arms that draft" in text and len(set(COLOURS)) >= MOST_CURVES
    pictures = [path for path in write_report(made, tmp_path) if path.suffix == ".png"]
    assert len(pictures) == 3


def test_pictures_are_drawn_where_matplotlib_is(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pictures = [path for path in write_report(run_of(tokenizer, 1.0), tmp_path) if path.suffix == ".png"]
    assert len(pictures) == 3 and all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


# --- energy


def test_energy_is_what_the_gpu_counted_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nvml:
        @staticmethod
        def nvmlDeviceGetTotalEnergyConsumption(handle: str) -> int:
            assert handle == "gpu 0"
            return 5250

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert energy.Meter("gpu 0", Nvml).joules() == 5.25
    assert energy.meter_of(torch.device("cpu")).joules() is None
