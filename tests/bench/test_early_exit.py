"""Early exit judged by the full model: agreement, likelihood, depth.

Planted bugs seen to fail here: the token judged after itself; chunks that begin one place late; arms judged on plain's
conversation.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from skipstone.bench.arms import parse_arms
from skipstone.bench.early_exit import FullModel, judge
from skipstone.bench.questions import Question
from skipstone.bench.run import Settings, run
from skipstone.engine.engine import Engine
from skipstone.engine.fused import FusedWeights
from skipstone.engine.load import load

QUESTIONS = [Question("first", "writing", ("a stone", "again")), Question("second", "qa", ("the rain falls",))]


@pytest.fixture(scope="module")
def engine(tiny_folder: Path, tiny_heads_folder: Path) -> Engine:
    return load(tiny_folder, heads=tiny_heads_folder, dtype=torch.float32, device="cpu", progress=False)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 5}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("length", [1, 16, 17, 40])
def test_of_a_plain_text_the_full_model_is_sure(engine: Engine, sampling: dict[str, Any], length: int) -> None:
    ids = engine.tokenizer.encode("a stone skips over the water")  # type: ignore[union-attr]
    out = engine.generate(ids, speculation=False, ignore_eos=True, logprobs=0, max_new_tokens=length, **sampling)
    found = judge(engine, ids, out.token_ids, sampling)
    assert found.agrees == [True] * length
    assert found.nats == [-entry.logprob for entry in out.logprobs], "bit for bit what plain decoding reports"


def test_logits_are_those_of_a_fresh_pass_over_any_text(engine: Engine) -> None:
    prompt, tokens = [5], [(37 * i + 11) % 320 for i in range(35)]
    model = FullModel(engine, 40)
    with torch.inference_mode():
        logits = torch.cat(list(model.logits(prompt, tokens)))
    with torch.inference_mode():
        hidden = engine.decoder.encode(torch.tensor([[*prompt, *tokens][:-1]]), [4])[4][0]
        expected = engine.decoder.lm_head(engine.decoder.final_norm(hidden))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert list(model.logits(prompt, [])) == []


@pytest.mark.interpreter
@pytest.mark.parametrize("length", [1, 16, 100])
def test_a_text_read_by_the_fused_kernels(engine: Engine, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest takes two steps, the second of which overwrites what the first one left."""
    prompt, tokens = [5, 9, 11], [(37 * i + 11) % 320 for i in range(length)]
    expected = judge(engine, prompt, tokens, {})
    with torch.inference_mode():
        monkeypatch.setattr(engine, "fused", FusedWeights(engine.decoder))
    found = judge(engine, prompt, tokens, {}, FullModel(engine, 120))
    assert found.agrees == expected.agrees and found.nats == pytest.approx(expected.nats, abs=1e-4)


def test_a_benchmark_reports_what_early_exit_saved_and_cost(engine: Engine) -> None:
    settings = Settings("tiny", arms="early:0.9,early:0.9:3,always", max_new_tokens=40, repeats=1)
    document = run(engine, QUESTIONS, settings, progress=False)
    assert document["problems"] == [] and list(document["lossy"]) == ["early:0.9", "early:0.9:3"]
    assert document["lossless"]["num_compared"] == 3, "early exit is not held to plain decoding's tokens"
    assert document["arms"]["early:0.9"]["lossy"] and list(document["arms"]["early:0.9:3"]["gates"]) == ["3"]
    found, raw = document["lossy"]["early:0.9"], [a for a in document["answers"] if a["arm"] == "early:0.9"]
    by_exits = sum(sum(a["stats"]["tokens_by_exit"].values()) for a in raw)
    assert 0 < by_exits < found["num_tokens"] == sum(len(a["token_ids"]) for a in raw)
    assert found["share_by_exits"] == pytest.approx(by_exits / found["num_tokens"])
    assert 2 < found["mean_depth"] < 4 and found["depth_saved"] == pytest.approx(1 - found["mean_depth"] / 4)
    assert found["mean_depth"] < found["layers_per_token"] <= 4
    assert 0 < found["agreement_of_exits"] < found["agreement"] < 1, "wrong only where an exit wrote"
    assert found["num_compared"] == 2 + (found["num_equal"] == 2), "second turns follow the arm's own answers"
    assert found["perplexity"] == pytest.approx(math.exp(found["nats_per_token"]))
    overall = document["summary"]["overall"]["early:0.9"]
    assert overall["row_layers_per_token"] == pytest.approx(found["layers_per_token"])
    assert overall["decode_tokens_per_second"] > 0 and overall["num_drafted"] == 0
    plain = run(engine, QUESTIONS, Settings("tiny", arms="plain", max_new_tokens=4, repeats=1), progress=False)
    assert plain["lossy"] == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("early:high", "expected a level such as early:0.95"),
        ("early:0.2", "accuracy is 0.2"),
        ("early:0.9:1", "no calibration for exit layer 1"),
        ("early", "unknown arm 'early'"),
    ],
)
def test_a_bad_arm_is_refused(engine: Engine, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arms(text, engine)


def test_levels_are_swept(engine: Engine) -> None:
    names = [arm.name for arm in parse_arms("early:0.8-0.95", engine)]
    assert names == ["plain", "early:0.80", "early:0.85", "early:0.90", "early:0.95"]
