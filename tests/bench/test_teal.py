"""What dropping inputs costs and drafts: rows of the report on a tiny model.

Planted bug seen to fail here: levels measured on thresholds of another level.
"""

import pytest
import torch
from skipstone.bench import teal as bench
from skipstone.bench.sparsity import Windows
from skipstone.engine.load import load
from skipstone.engine.sparsity.teal import calibrate_teal


@pytest.fixture(scope="module")
def engine(tiny_folder, tiny_heads_folder):
    return load(tiny_folder, heads=tiny_heads_folder, dtype=torch.float32, device="cpu", progress=False)


@pytest.fixture(scope="module")
def teal(engine):
    texts = torch.randint(320, (3, 40), generator=torch.Generator().manual_seed(0))
    return calibrate_teal(engine.decoder, texts, levels=(0.1, 0.6), allocation="uniform")


def test_quality_by_level(engine, teal):
    texts = torch.randint(320, (4, 30), generator=torch.Generator().manual_seed(1))
    rows = bench.quality(engine, {"uniform": teal}, Windows(texts, 10))
    assert [(row["allocation"], row["level"]) for row in rows] == [(None, 0.0), ("uniform", 0.1), ("uniform", 0.6)]
    assert rows[0]["perplexity_increase"] == 0 and rows[0]["greedy_agreement"] == 1
    assert 1 > rows[1]["greedy_agreement"] > rows[2]["greedy_agreement"]


def test_drafts_differ_in_acceptance_only(engine, teal):
    prompts = [engine.tokenizer.encode(text) for text in ("the rain falls", "a stone skips over the water")]
    rows = bench.drafts(engine, prompts, [None, teal.at(0.6)], 12)
    plain = rows.pop(0)
    assert (plain["policy"], plain["num_drafted"], plain["tokens_per_verification"]) == ("plain", 0, 1)
    assert [row["draft"] for row in rows] == ["dense", "teal 0.6"] * 2 and engine.draft == "dense"
    assert all(row["differing_tokens"] == 0 and row["num_tokens"] == 24 and row["num_drafted"] for row in rows)
    layers = engine.decoder.config.num_layers
    for row in rows:
        verified = layers * (row["num_drafted"] / 24 + 1 / row["tokens_per_verification"])
        if row["draft"] == "dense":
            assert row["row_layers_per_token"] == pytest.approx(verified)
        else:
            assert row["row_layers_per_token"] > verified + 0.5


def test_times(engine, teal, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", {"small": (64, 32)})
    monkeypatch.setattr(bench, "COLD_BYTES", 1)
    (row,) = bench.products([0.0, 0.5], torch.float32, 2)
    assert set(row["us"]) == {"dense", "0", "0.5"} and min(row["us"].values()) > 0
    found = bench.decoding(engine, [1, 2, 3], [None, teal.at(0.6)], 1)
    assert set(found) == {"dense", "teal 0.6"} and engine.verify == "dense"
