"""Batches of fixed shapes: every text once an epoch, and the step that one made of the same texts anyhow takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from skipstone.engine.model import Decoder
from skipstone.heads import HeadSet, HeadSetConfig, HeadSpec, layer_options
from skipstone.train.data import SelfText, frequent_ids, make_batch
from skipstone.train.fixed_shapes import Shape, fixed_batch, padded_length, plan_shapes
from skipstone.train.generate import Sampling, write_text
from skipstone.train.trainer import HeadTrainer, Recipe


@pytest.fixture(scope="module")
def base(tiny: Callable) -> tuple[Decoder, SelfText]:
    torch.manual_seed(0)
    decoder = Decoder(*tiny("llama3"))
    prompts = [[(7 * i + 3 * j) % 199 for j in range(3 + i % 5)] for i in range(24)]
    return decoder, write_text(decoder, prompts, [0.0, 1.0] * 12, Sampling(16, (7,)))


def texts_of(lens: list[tuple[int, int]]) -> SelfText:
    return SelfText.of([list(range(whole)) for _, whole in lens], [p for p, _ in lens], [True] * len(lens))


def make_heads(base: tuple[Decoder, SelfText], kind: str) -> HeadSet:
    decoder, text = base
    config = decoder.config
    sizes = layer_options(config.num_heads, config.num_kv_heads, config.head_dim, 48, 1e4, False)
    specs = {
        "recurrent": (HeadSpec(kind, 0, {**sizes, "taps": (1, config.num_layers)}),),
        "adapter": (HeadSpec(kind, 1, {"width": 24}), HeadSpec(kind, 3, {"width": 24})),
    }[kind]
    torch.manual_seed(1)
    return HeadSet(
        HeadSetConfig(config.hidden_size, config.vocab_size, config.num_layers, specs, 150),
        frequent_ids(text, 150, config.vocab_size),
    )


@pytest.mark.parametrize("kind", ["recurrent", "adapter"])
def test_a_step_is_the_step_of_the_same_texts(base: tuple[Decoder, SelfText], kind: str) -> None:
    """Loss, counts and gradients. Catches: empty places that count or open a chain, ages that run on across texts, a
    gradient that is not set to zero between steps."""
    decoder, text = base
    recipe = Recipe(steps=9, batch_tokens=24 * 64, chunk_tokens=48, chain=4, unreached=0.3, clip=1e9, sharpen=0.2)
    found = []
    for fixed in (False, True):
        heads = make_heads(base, kind)
        trainer = HeadTrainer(decoder, {"heads": heads}, text, recipe, fixed=fixed)
        results = [trainer.step() for _ in range(2)]  # all texts fit one batch: an epoch is a step
        assert trainer.state()[1]["epoch"] == 1
        gradients = [p.grad for head in heads.heads.values() for p in head.parameters()]
        found.append((results, gradients))
    (eager, eager_gradients), (fixed_results, fixed_gradients) = found
    for one, other in zip(eager, fixed_results, strict=True):
        assert one.num_tokens == other.num_tokens == text.num_written
        for name in ("loss", "agreement", "reached"):
            torch.testing.assert_close(getattr(other, name)["heads"], getattr(one, name)["heads"], rtol=1e-4, atol=1e-5)
    for one, other in zip(eager_gradients, fixed_gradients, strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-6)


def test_an_epoch_holds_every_text_that_fills_batches() -> None:
    lens = [(5 + i % 40, 60 + (37 * i) % 300) for i in range(400)]
    text = texts_of(lens)
    planned = plan_shapes(text, 1024, 3)
    seen = [i for _, members in planned for i in members]
    assert len(seen) == len(set(seen)) and len(seen) > 350
    assert planned != plan_shapes(text, 1024, 4) and planned == plan_shapes(text, 1024, 3)
    assert len({shape for shape, _ in planned}) <= 6  # lengths of 64 to 384
    for shape, members in planned:
        assert shape.num_texts * shape.length <= 1024 and len(members) <= shape.num_texts
        assert sum(lens[i][1] - lens[i][0] for i in members) <= shape.num_rows
        assert all(padded_length(lens[i][1]) == shape.length for i in members)


def test_a_batch_has_the_drafted_positions_of_its_texts() -> None:
    text = texts_of([(2, 5), (3, 9), (1, 4)])
    batch, usual = fixed_batch(text, [1, 0], Shape(3, 64, 256)), make_batch(text, [1, 0], "cpu")
    assert torch.equal(batch.ids[:2, :9], usual.ids) and not batch.ids[2].any()
    count = int(batch.total)
    wanted = torch.nn.functional.pad(usual.drafted, (0, 55)).reshape(-1).nonzero().squeeze(1)
    assert count == 9 and torch.equal(batch.rows[:count], wanted)
    assert batch.age.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2] + [-1] * 247


def test_texts_that_fit_no_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="fills 640 places, batch_tokens is 512"):
        plan_shapes(texts_of([(2, 530)]), 512, 0)


def test_the_clock_ends_a_run(base: tuple[Decoder, SelfText], monkeypatch: pytest.MonkeyPatch) -> None:
    """The learning rate falls with the clock, and what passed before a checkpoint counts."""
    from skipstone.train import trainer as module
    from skipstone.train.checkpoint import Checkpoint

    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    decoder, text = base
    recipe = Recipe(steps=1000, minutes=1.0, batch_tokens=400, warmup=0, lr=1e-3)
    trainer = HeadTrainer(decoder, {"heads": make_heads(base, "adapter")}, text, recipe)
    trainer.step()
    rates = []
    for _ in range(3):
        now[0] += 15.0
        rates.append(trainer.progress)
        trainer.step()
    assert rates == [0.25, 0.5, 0.75]
    assert (
        trainer.optimizer.param_groups[0]["lr"] == pytest.approx(recipe.lr_at(3, 0.75)) and recipe.lr_at(3, 0.75) < 2e-4
    )
    tensors, values = trainer.state()
    other = HeadTrainer(decoder, {"heads": make_heads(base, "adapter")}, text, recipe)
    other.restore(Checkpoint(4, tensors, values))
    now[0] += 1000.0  # between the two runs
    assert other.progress == pytest.approx(0.75)
