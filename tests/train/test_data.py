"""Prompts, split, batches, draft vocabulary."""

from __future__ import annotations

import gzip
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from skipstone.train.data import SelfText, evenly, frequent_ids, is_held_out, make_batch, plan_batches, read_prompts


def write_lines(path: Path, records: list) -> Path:
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_prompts_of_both_formats(tmp_path: Path, name: str) -> None:
    records = [{"source": "x", "prompt": "one\u2028two"}, {"turns": ["three", "four"]}, {"prompt": "three"}]
    assert read_prompts(write_lines(tmp_path / name, records)) == ["one\u2028two", "three"]


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 2"):
        read_prompts(write_lines(tmp_path / "p.jsonl", [{"prompt": "a"}, {"text": "b"}]))
    with pytest.raises(ValueError, match="no prompts"):
        read_prompts(write_lines(tmp_path / "q.jsonl", []))


def test_a_hub_data_set_is_read_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []

    def load_dataset(name: str, **options: object) -> list[dict]:
        asked.append((name, options))
        return [{"prompt": "a"}, {"prompt": "a"}, {"turns": ["b"]}, {"prompt": "c"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read_prompts("some-one/some.set", limit=2) == ["a", "b"]
    assert asked == [("some-one/some.set", {"split": "train", "streaming": True})]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        read_prompts("some-one/some.set")
    with pytest.raises(FileNotFoundError, match="owner/name"):
        read_prompts("folder/missing.jsonl")


def test_some_of_a_sorted_file_are_of_all_its_parts() -> None:
    """Planted bug seen to fail: the first ones."""
    assert evenly("aabbccdd", 4) == ["a", "b", "c", "d"] and evenly("abc", 2) == ["a", "b"]
    assert evenly("abc", 3) == evenly("abc", 9) == ["a", "b", "c"] and evenly("", 3) == []


def test_split_depends_on_the_text_only() -> None:
    prompts = [f"prompt {i}" for i in range(4000)]
    held = [is_held_out(p, 3.0) for p in prompts]
    assert 80 < sum(held) < 160  # 120 expected, sd 11
    assert held == [is_held_out(p, 3.0) for p in prompts]
    assert all(is_held_out(p, 6.0) for p, h in zip(prompts, held, strict=True) if h)


TEXTS = [[1, 2, 3, 9, 9], [4, 5, 7], [6, 8, 8, 7, 7, 7]]


def make_text() -> SelfText:
    return SelfText.of(TEXTS, [3, 2, 1], [True, False, True])


def test_self_text_round_trip() -> None:
    text = make_text()
    assert len(text) == 3
    assert text.num_written == 2 + 1 + 5
    assert [text.text(i).tolist() for i in range(3)] == TEXTS
    tensors = text.tensors()
    assert tensors["ids"].dtype == torch.uint16
    again = SelfText.from_tensors(tensors)
    assert again.greedy.tolist() == [True, False, True]
    assert [t.tolist() for t in (again.text(1), again.select([2]).text(0))] == [TEXTS[1], TEXTS[2]]


def test_wide_ids_and_shards() -> None:
    """Catches: ids of a large vocabulary stored in two bytes."""
    wide = SelfText.of([[1, 151_935], [65_536]], [1, 1], [False, True])
    again = SelfText.from_tensors(wide.tensors())
    assert again.ids.tolist() == [1, 151_935, 65_536] and again.ids.dtype == torch.int32
    both = SelfText.concat([make_text(), again])
    assert [both.text(i).tolist() for i in range(5)] == [*TEXTS, [1, 151_935], [65_536]]
    assert both.prompt_lens.tolist() == [3, 2, 1, 1, 1] and both.greedy.tolist() == [True, False, True, False, True]


def test_batch_marks_the_positions_that_drafts_start_from() -> None:
    """From the prompt's last token to the last but one. Catches: training on the prompt, or an offset of one."""
    batch = make_batch(make_text(), [1, 2], "cpu")
    assert batch.ids.tolist() == [[4, 5, 7, 0, 0, 0], [6, 8, 8, 7, 7, 7]]
    assert batch.drafted.int().tolist() == [[0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert batch.next_ids[batch.drafted].tolist() == [7, 8, 8, 7, 7, 7]


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_plan_holds_each_text_once_within_the_budget(seed: int | None) -> None:
    lens = [int(n) for n in torch.randint(1, 300, (400,), generator=torch.Generator().manual_seed(5))]
    plan = plan_batches(lens, 1000, seed)
    assert sorted(i for group in plan for i in group) == list(range(400))
    area = [len(group) * max(lens[i] for i in group) for group in plan]
    assert max(area) <= 1000
    assert sum(lens) / sum(area) > 0.85  # little filling
    assert plan == plan_batches(lens, 1000, seed)


def test_epochs_differ() -> None:
    assert plan_batches([5] * 40, 50, 1) != plan_batches([5] * 40, 50, 2)


def test_a_text_longer_than_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="300 tokens, batch_tokens is 200"):
        plan_batches([10, 300], 200, 0)


def test_draft_vocabulary_counts_what_the_model_wrote() -> None:
    """9 twice, 7 four times, 8 twice; prompt tokens do not count. Catches: ids in order of count, prompts counted."""
    assert frequent_ids(make_text(), 3, 20).tolist() == [7, 8, 9]
    assert frequent_ids(make_text(), 2, 20, always=[15]).tolist() == [7, 15]
    assert frequent_ids(make_text(), 5, 20).tolist() == [0, 1, 7, 8, 9]
    with pytest.raises(ValueError, match=r"1\.\.20"):
        frequent_ids(make_text(), 21, 20)
