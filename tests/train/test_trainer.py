"""The trainer on a tiny base: it learns, it resumes bit for bit, heads do not see each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from skipstone.engine.model import Decoder
from skipstone.heads import HeadSet, HeadSetConfig, HeadSpec, adapter_config
from skipstone.train.checkpoint import Checkpoint
from skipstone.train.data import SelfText, frequent_ids
from skipstone.train.generate import Sampling, write_text
from skipstone.train.measure import inference_projection, measure, simulate_chain
from skipstone.train.trainer import HeadTrainer, Recipe


@pytest.fixture(scope="module")
def base(tiny: Callable) -> tuple[Decoder, SelfText]:
    torch.manual_seed(0)
    decoder = Decoder(*tiny("llama3"))
    prompts = [[(7 * i + 3 * j) % 199 for j in range(3 + i % 5)] for i in range(24)]
    return decoder, write_text(decoder, prompts, [0.0, 1.0] * 12, Sampling(16, (7,)))


def make_heads(
    decoder: Decoder, text: SelfText, exits: tuple[int, ...] = (1, 3), draft_vocab: int | None = 150
) -> HeadSet:
    config = decoder.config
    ids = None if draft_vocab is None else frequent_ids(text, draft_vocab, config.vocab_size)
    torch.manual_seed(1)
    return HeadSet(
        adapter_config(exits, config.hidden_size, config.vocab_size, config.num_layers, 24, draft_vocab), ids
    )


def recipe(**changes: float) -> Recipe:
    return Recipe(**{"steps": 40, "batch_tokens": 200, "lr": 5e-3, "warmup": 4, "chunk_tokens": 64, **changes})


def values(heads: HeadSet) -> dict[str, torch.Tensor]:
    return {f"{e}.{n}": p.detach().clone() for e, h in heads.heads.items() for n, p in h.named_parameters()}


def test_training_lowers_the_loss_at_every_exit(base: tuple[Decoder, SelfText]) -> None:
    decoder, text = base
    heads = make_heads(decoder, text)
    trainer = HeadTrainer(decoder, {"heads": heads}, text, recipe())
    results = [trainer.step() for _ in range(40)]
    first, last = results[0].loss["heads"], torch.stack([r.loss["heads"] for r in results[-4:]]).mean(0)
    assert bool((last < 0.8 * first).all()), (first, last)
    assert all(r.num_tokens > 0 for r in results)


def test_the_base_stays_frozen(base: tuple[Decoder, SelfText]) -> None:
    decoder, text = base
    before = decoder.head_weight.clone()
    trainer = HeadTrainer(decoder, {"heads": make_heads(decoder, text)}, text, recipe())
    trainer.step()
    assert torch.equal(decoder.head_weight, before)
    assert decoder.head_weight.grad is None


def test_resume_is_bitwise(base: tuple[Decoder, SelfText]) -> None:
    """12 steps at once, and 5 + 7 through a checkpoint, across an epoch's end. Catches: moments, step count, learning
    rate or data order not restored (each was left out in turn and seen to fail here)."""
    decoder, text = base
    straight = make_heads(decoder, text)
    trainer = HeadTrainer(decoder, {"heads": straight}, text, recipe())
    for _ in range(12):
        trainer.step()
    assert trainer.state()[1]["epoch"] > 0
    first = HeadTrainer(decoder, {"heads": make_heads(decoder, text)}, text, recipe())
    for _ in range(5):
        first.step()
    tensors, counters = first.state()
    kept = Checkpoint(5, {k: t.clone() for k, t in tensors.items()}, dict(counters))
    resumed = make_heads(decoder, text)
    torch.nn.init.ones_(resumed.heads[1].down)
    second = HeadTrainer(decoder, {"heads": resumed}, text, recipe())
    second.restore(kept)
    for _ in range(7):
        second.step()
    for name, value in values(straight).items():
        assert torch.equal(values(resumed)[name], value), name


def test_a_checkpoint_of_other_heads_is_refused(base: tuple[Decoder, SelfText]) -> None:
    decoder, text = base
    trainer = HeadTrainer(decoder, {"heads": make_heads(decoder, text)}, text, recipe())
    tensors, counters = trainer.state()
    other = HeadTrainer(decoder, {"heads": make_heads(decoder, text, (2, 3))}, text, recipe())
    with pytest.raises(ValueError, match="does not fit these heads"):
        other.restore(Checkpoint(0, tensors, dict(counters)))


def test_a_head_does_not_depend_on_its_company(base: tuple[Decoder, SelfText]) -> None:
    """Exit 3 alone, and beside exit 1 and another set. Catches: one clipping norm or one loss over all heads."""
    decoder, text = base
    alone = make_heads(decoder, text, (3,))
    trainer = HeadTrainer(decoder, {"a": alone}, text, recipe(clip=0.01))
    beside, other = make_heads(decoder, text, (1, 3)), make_heads(decoder, text, (2,), None)
    beside.heads[3].load_state_dict(alone.heads[3].state_dict())
    together = HeadTrainer(decoder, {"a": beside, "b": other}, text, recipe(clip=0.01))
    for _ in range(3):
        trainer.step()
        together.step()
    for name, parameter in alone.heads[3].named_parameters():
        torch.testing.assert_close(beside.heads[3].get_parameter(name), parameter, rtol=0, atol=1e-6)


def test_chunks_bound_memory_and_not_the_result(base: tuple[Decoder, SelfText]) -> None:
    decoder, text = base
    outcomes = []
    for chunk in (7, 1000):
        heads = make_heads(decoder, text)
        trainer = HeadTrainer(decoder, {"heads": heads}, text, recipe(chunk_tokens=chunk))
        outcomes.append((trainer.step().loss["heads"], values(heads)))
    torch.testing.assert_close(outcomes[0][0], outcomes[1][0], rtol=1e-5, atol=1e-6)
    for name, value in outcomes[0][1].items():
        # Adam's first step is lr * sign(gradient): where a gradient is nearly zero its sign is noise
        assert float((outcomes[1][1][name] - value).abs().gt(1e-4).float().mean()) < 0.01, name


def test_the_linear_kind_trains_too(base: tuple[Decoder, SelfText]) -> None:
    decoder, text = base
    sizes = decoder.config
    heads = HeadSet(HeadSetConfig(sizes.hidden_size, sizes.vocab_size, sizes.num_layers, (HeadSpec("linear", 2),)))
    trainer = HeadTrainer(decoder, {"heads": heads}, text, recipe(lr=1e-3))
    heads.initialise(heads.heads[2].attached())
    losses = [float(trainer.step().loss["heads"][0]) for _ in range(12)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("draft_vocab", [None, 60])
def test_measure_equals_a_slow_count(base: tuple[Decoder, SelfText], draft_vocab: int | None) -> None:
    """Entropy and rank position by position, texts in order. Catches: an offset by one, misses counted as rank 0."""
    decoder, text = base
    heads = make_heads(decoder, text, (2,), draft_vocab).attach(inference_projection(decoder))
    found = measure(decoder, heads, text, batch_tokens=100, chunk_tokens=13)
    allowed = range(decoder.config.vocab_size) if draft_vocab is None else heads.draft_ids.tolist()
    at = 0
    for i in dict.fromkeys(found.text.tolist()):
        ids, prompt = text.text(i).long(), int(text.prompt_lens[i])
        states = decoder.encode(ids.unsqueeze(0), [2, 4])
        best = decoder.lm_head(decoder.final_norm(states[4][0])).argmax(-1).tolist()
        with torch.no_grad():
            logits = heads.logits(2, states[2][0])
        for position in range(prompt - 1, len(ids) - 1):
            order = logits[position].argsort(descending=True).tolist()
            token = best[position]
            rank = order.index(list(allowed).index(token)) if token in allowed else 127
            assert found.rank[2][at] == min(rank, 126 if token in allowed else 127)
            entropy = torch.distributions.Categorical(logits=logits[position]).entropy()
            assert abs(float(entropy) - found.entropy[2][at]) < 1e-3
            at += 1
    assert at == len(found.text) == text.num_written


@pytest.mark.parametrize(
    ("right", "drafted", "expected"),
    [
        ("1111111111", 4, 10 / 2),  # 5 + 5
        ("0000", 4, 1.0),
        ("1101100", 1, 7 / 5),  # rounds of 2 1 2 1 1: right draft and bonus, or the target's token alone
        ("111|111", 9, 3.0),  # a round ends with its text
        ("", 5, 0.0),
    ],
)
def test_simulated_chain(right: str, drafted: int, expected: float) -> None:
    flags = np.array([c == "1" for c in right if c != "|"], dtype=bool)
    text = np.array([right[:i].count("|") for i, c in enumerate(right) if c != "|"], dtype=int)
    assert simulate_chain(flags, text, drafted) == pytest.approx(expected)


def test_learning_rate_rises_and_falls() -> None:
    plan = Recipe(steps=100, warmup=10, lr=1.0, final_lr=0.1)
    assert plan.lr_at(0) == pytest.approx(0.1)
    assert plan.lr_at(9) == plan.lr_at(10) == pytest.approx(1.0)
    assert plan.lr_at(55) == pytest.approx(0.55)
    assert plan.lr_at(100) == pytest.approx(0.1)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"lr": 0.0}, {"clip": 0.0}, {"final_lr": 2.0}, {"warmup": -1}])
def test_bad_recipes_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Recipe(**bad)
