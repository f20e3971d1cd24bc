"""The report on stored head sets, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skipstone.engine.model import Decoder
from skipstone.heads import HeadSet, HeadSetConfig, HeadSpec, adapter_config, layer_options
from skipstone.train.data import SelfText
from skipstone.train.evaluate import evaluate, main, read_questions, restrictions
from skipstone.train.generate import Sampling, write_text
from skipstone.train.measure import inference_projection, measure, simulate_chain


@pytest.fixture(scope="module")
def base(tiny: Callable) -> tuple[Decoder, SelfText]:
    torch.manual_seed(0)
    decoder = Decoder(*tiny("llama3"))
    prompts = [[(7 * i + 3 * j) % 199 for j in range(3 + i % 5)] for i in range(8)]
    return decoder, write_text(decoder, prompts, [0.0] * 8, Sampling(16, (7,)))


def sets_of(decoder: Decoder) -> tuple[HeadSet, HeadSet]:
    c = decoder.config
    torch.manual_seed(1)
    adapters = HeadSet(adapter_config((1, 3), c.hidden_size, c.vocab_size, c.num_layers, 8, None))
    sizes = layer_options(c.num_heads, c.num_kv_heads, c.head_dim, 48, 1e4, False)
    spec = HeadSpec("recurrent", 0, {**sizes, "taps": (1, c.num_layers)})
    return adapters, HeadSet(HeadSetConfig(c.hidden_size, c.vocab_size, c.num_layers, (spec,), None))


def test_numbers_are_those_of_the_parts(base: tuple[Decoder, SelfText]) -> None:
    """Weighted by tokens, categories give the whole; chains of one token are the simulated ones."""
    decoder, text = base
    adapters, recurrent = (heads.attach(inference_projection(decoder)) for heads in sets_of(decoder))
    categories = ["a", "b"] * 4
    found = evaluate(decoder, adapters, text, categories)
    seen = measure(decoder, adapters, text)
    for layer in (1, 3):
        own = found[str(layer)]
        assert own["agreement"] == pytest.approx(float((seen.rank[layer] == 0).mean()))
        assert own["tokens_per_verification_3"] == simulate_chain(seen.rank[layer] == 0, seen.text, 3)
        parts = own["by_category"].values()
        assert sum(p["tokens"] for p in parts) == own["tokens"] == text.num_written
        assert sum(p["tokens"] * p["agreement"] for p in parts) == pytest.approx(own["tokens"] * own["agreement"])
    chains = evaluate(decoder, recurrent, text, categories)["0"]
    assert chains["cumulative"] == pytest.approx(list(np.cumprod(chains["conditional"])))
    assert 1.0 <= chains["tokens_per_verification_1"] <= chains["tokens_per_verification_5"] <= 6.0


def test_smaller_vocabularies_are_the_most_frequent_ids(base: tuple[Decoder, SelfText]) -> None:
    decoder, text = base
    adapters, _ = sets_of(decoder)
    found = restrictions(adapters, [40, 10_000], text)
    assert list(found) == [40] and restrictions(adapters, [40], None) == {}
    counts = torch.bincount(text.ids.long(), minlength=decoder.config.vocab_size)
    kept = found[40].draft_ids
    assert kept is not None and int(counts[kept].min()) >= int(counts.sort(descending=True).values[40])
    again = restrictions(found[40], [10], text)[10]
    assert again.draft_ids is not None and bool(torch.isin(again.draft_ids, kept).all())


def test_the_command_measures_chains_and_trees(tiny_folder: Any, tmp_path: Path) -> None:
    from skipstone.train.run import load_base

    loaded = load_base(str(tiny_folder), torch.float32, "cpu", progress=False)
    prompts = tmp_path / "q.jsonl"
    records = [{"category": "x", "turns": ["a stone"]}, {"prompt": "the rain", "source": "y"}, {"prompt": "over"}]
    prompts.write_text("\n".join(json.dumps(r) for r in records) + "\n")
    assert read_questions(prompts) == [("x", "a stone"), ("y", "the rain"), ("all", "over")]
    folders = []
    for number, heads in enumerate(sets_of(loaded.decoder)):
        heads.base = loaded.identity
        heads.save(tmp_path / str(number))
        folders.append(str(tmp_path / str(number)))
    out = tmp_path / "found.json"
    arguments = ["--model", str(tiny_folder), "--prompts", str(prompts), "--out", str(out), "--new-tokens", "6",
                 "--dtype", "fp32", "--device", "cpu", "--tree", "2,2,3"]  # fmt: skip
    assert main([*folders, str(tmp_path / "missing"), *arguments]) == 0
    report = json.loads(out.read_text())
    assert report["texts"] == 3 and sorted(report["sets"][folders[0]]["exits"]) == ["1", "3"]
    trees = report["sets"][folders[1]]["trees"]
    assert trees["tokens"] <= 18 and trees["tokens_per_verification"] >= 1.0 and len(trees["by_category"]) == 3
    assert "error" in report["sets"][str(tmp_path / "missing")] and "trees" not in report["sets"][folders[0]]
    assert main([folders[1], *arguments, "--part", "1/2", "--only-tree"]) == 0
    assert json.loads(out.read_text())["texts"] == 1
