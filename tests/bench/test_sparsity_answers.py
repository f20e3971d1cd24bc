"""What a setting writes side by side is what the engine decodes with it alone.

Regimes: families with soft-caps, windows and post-norms; prompts of several lengths, one too short for a mask; the
whole model, TDA, GRIFFIN and TEAL; texts that end at different times; fp32, so that rounding decides nothing.

Planted bugs seen to fail here: one text's mask for all; a row's position one too low; windows left out; TEAL's rows
through the whole model.
"""

from __future__ import annotations

import pytest
import torch
from skipstone.bench.intervals import mcnemar
from skipstone.bench.sparsity_answers import against_masks, paired, write
from skipstone.bench.sparsity_settings import WHOLE, Setting
from skipstone.engine.engine import Engine
from skipstone.engine.model import Decoder
from skipstone.engine.sparsity.selection import Griffin, MaskOptions
from skipstone.engine.sparsity.target import SparseTarget
from skipstone.engine.sparsity.tda import Tda, measure_curves
from skipstone.engine.sparsity.teal import calibrate_teal
from skipstone.engine.stopping import StopChecker

LENGTHS, NEW = (23, 61, 3), (14, 9, 20)
OPTIONS = MaskOptions(first_dense=1, min_tokens=8, round_to=4)


class NoText:
    def feed(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def settings(decoder: Decoder) -> dict[str, Setting]:
    texts = torch.randint(decoder.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    curves = measure_curves(decoder, texts, levels=0)
    tda = Tda(curves.thresholds_for_density(0.5), density=0.5, options=OPTIONS)
    teal = calibrate_teal(decoder, texts, levels=(0.5,), allocation="uniform")
    return {
        "dense": WHOLE,
        "tda": Setting("tda 0.5", "tda", 0.5, SparseTarget(decoder, tda)),
        "griffin": Setting("griffin 0.5", "griffin", 0.5, SparseTarget(decoder, Griffin(0.5, OPTIONS))),
        "teal": Setting("teal uniform 0.5", "teal uniform", 0.5, teal.at(0.5)),
    }


@pytest.mark.parametrize("family", ["llama2", "gemma2", "gemma3", "gpt_neox"])
def test_texts_are_those_of_the_engine(tiny, family):
    config, weights = tiny(family)
    engine = Engine(Decoder(config, weights))
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(config.vocab_size, (size,), generator=generator).tolist() for size in LENGTHS]
    texts = {}
    for name, setting in settings(engine.decoder).items():
        checkers = [StopChecker(NoText(), max_new_tokens=most) for most in NEW]
        write(engine.decoder, setting, prompts, checkers)
        texts[name] = [checker.token_ids for checker in checkers]
        setting.use(engine)
        for prompt, most, own in zip(prompts, NEW, texts[name], strict=True):
            assert own == engine.generate(prompt, speculation=False, max_new_tokens=most).token_ids, name
    WHOLE.use(engine)
    assert all(texts[name] != texts["dense"] for name in ("tda", "griffin", "teal")), "something was dropped"


def test_answers_are_compared_one_by_one():
    found = paired([1, 1, 0, 0, 1], [1, 0, 1, 1, 1])
    assert found["difference"] == pytest.approx(-0.2) and (found["lost"], found["gained"]) == (2, 1)
    assert found["difference_95"][0] < -0.2 < found["difference_95"][1]
    assert paired([1, 0], [1, 0])["difference_95"] == [0, 0]


def test_mcnemar_is_a_fair_coin():
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1
    assert mcnemar(1, 0) == 1 and mcnemar(6, 0) == pytest.approx(2 / 64) and mcnemar(0, 6) == mcnemar(6, 0)
    assert mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)


def test_masks_of_one_density_are_compared():
    def row(method, level, nats, right):
        tasks = {"maths": {"items": {"right": right}}}
        return {"method": method, "level": level, "windows": {"nats": nats}} | ({"tasks": tasks} if right else {})

    rows = {
        "dense": row("dense", None, [1.0, 2.0], [1, 1]),
        "tda 0.5": row("tda", 0.5, [1.5, 2.5], [1, 0]),
        "griffin 0.5": row("griffin", 0.5, [1.4, 2.4], [1, 1]),
        "exact 0.5": row("exact", 0.5, [1.5, 2.5], None),
        "teal uniform 0.5": row("teal uniform", 0.5, [1.0, 2.0], [1, 1]),
    }
    found = against_masks(rows)
    assert list(found) == ["tda 0.5 - griffin 0.5", "tda 0.5 - exact 0.5"]
    own = found["tda 0.5 - griffin 0.5"]
    assert own["perplexity_quotient"] == pytest.approx(torch.tensor(0.1).exp().item())
    assert own["perplexity_quotient_95"] == pytest.approx([own["perplexity_quotient"]] * 2), "the same in every window"
    assert own["tasks"]["maths"]["difference"] == -0.5 and own["tasks"]["maths"]["lost"] == 1
    assert found["tda 0.5 - exact 0.5"]["tasks"] == {}
