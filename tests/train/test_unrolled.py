"""Training and measuring heads with state: chunks, chains and what they count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from skipstone.engine.model import Decoder
from skipstone.heads import HeadSet, HeadSetConfig, HeadSpec, StatefulHead, layer_options
from skipstone.train.chains import measure_chains
from skipstone.train.data import SelfText, frequent_ids
from skipstone.train.generate import Sampling, write_text
from skipstone.train.measure import training_projection
from skipstone.train.trainer import HeadTrainer, Recipe


@pytest.fixture(scope="module")
def base(tiny: Callable) -> tuple[Decoder, SelfText]:
    torch.manual_seed(0)
    decoder = Decoder(*tiny("llama3"))
    prompts = [[(7 * i + 3 * j) % 199 for j in range(3 + i % 5)] for i in range(24)]
    return decoder, write_text(decoder, prompts, [0.0, 1.0] * 12, Sampling(16, (7,)))


def make_heads(base: tuple[Decoder, SelfText], kind: str = "recurrent") -> HeadSet:
    decoder, text = base
    config = decoder.config
    sizes = layer_options(config.num_heads, config.num_kv_heads, config.head_dim, 48, 1e4, False)
    taps = {"taps": (1, config.num_layers)} if kind == "recurrent" else {}
    spec = HeadSpec(kind, 0 if kind == "recurrent" else 2, {**sizes, **taps})
    torch.manual_seed(1)
    return HeadSet(
        HeadSetConfig(config.hidden_size, config.vocab_size, config.num_layers, (spec,), 150),
        frequent_ids(text, 150, config.vocab_size),
    )


def recipe(**changes: float) -> Recipe:
    settings = {"steps": 40, "batch_tokens": 200, "lr": 5e-3, "warmup": 4, "chunk_tokens": 64, "chain": 4}
    return Recipe(**{**settings, **changes})


@pytest.mark.parametrize("kind", ["block", "recurrent"])
def test_training_raises_the_chains(base: tuple[Decoder, SelfText], kind: str) -> None:
    decoder, text = base
    heads = make_heads(base, kind)
    trainer = HeadTrainer(decoder, {"heads": heads}, text, recipe(steps=100, lr=1e-2))
    before = measure_chains(decoder, heads, heads.exits[0], text, 4).tokens_per_verification(4)
    first = trainer.step()
    for _ in range(99):
        last = trainer.step()
    after = measure_chains(decoder, heads, heads.exits[0], text, 4).tokens_per_verification(4)
    assert float(last.loss["heads"]) < 0.8 * float(first.loss["heads"])
    assert after > before + 0.2


def test_chunks_do_not_change_the_gradient(base: tuple[Decoder, SelfText]) -> None:
    """Catches: a chunk's gradient lost or doubled, reached flags that stop at a chunk's edge."""
    decoder, text = base
    gradients, reached = [], []
    for chunk in (10_000, 7):
        heads = make_heads(base)
        trainer = HeadTrainer(decoder, {"heads": heads}, text, recipe(chunk_tokens=chunk, unreached=0.1, clip=1e9))
        reached.append(trainer.step().reached["heads"])
        gradients.append([p.grad for p in heads.heads[0].parameters()])
    torch.testing.assert_close(reached[0], reached[1])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_unreached_positions_can_be_left_out(base: tuple[Decoder, SelfText]) -> None:
    """An untrained head is right almost nowhere: with weight 0 there, only a chain's first step trains it."""
    decoder, text = base
    moved = []
    for chain, unreached in ((1, 1.0), (4, 0.0), (4, 1.0)):
        heads = make_heads(base)
        head = heads.heads[0]
        assert isinstance(head, StatefulHead)
        with torch.no_grad():
            head.gain.mul_(-1.0)  # wrong everywhere
        trainer = HeadTrainer(decoder, {"heads": heads}, text, recipe(chain=chain, unreached=unreached, clip=1e9))
        right = trainer.step().agreement["heads"]
        assert float(right) < 0.02
        moved.append(torch.cat([p.grad.flatten() for p in head.parameters() if p.grad is not None]))
    first_only, unweighted = moved[0] / 4, moved[2]  # the mean over four steps
    assert float((moved[1] - first_only).norm() / first_only.norm()) < 0.2
    assert float((unweighted - first_only).norm() / first_only.norm()) > 0.5


def test_reached_is_cumulative_acceptance(base: tuple[Decoder, SelfText]) -> None:
    """The trainer's running count against the measurement's, with one batch of all texts; and by hand from `right`."""
    decoder, text = base
    heads = make_heads(base)
    trainer = HeadTrainer(decoder, {"heads": heads}, text, recipe())
    for _ in range(40):
        trainer.step()
    chains = measure_chains(decoder, heads, 0, text, 3)
    probe = HeadTrainer(decoder, {"heads": heads}, text, recipe(batch_tokens=10_000, chain=3))
    heads.attach(training_projection(decoder))
    counted = probe.step().reached["heads"][0, :3]
    by_hand = []
    starts = range(len(chains.text))
    for step in range(3):
        hits = [
            all(chains.right[s, i + s] for s in range(step + 1))
            for i in starts
            if i + step < len(chains.text) and chains.text[i + step] == chains.text[i]
        ]
        by_hand.append(sum(hits) / len(hits))
    torch.testing.assert_close(counted, torch.tensor(by_hand))
    assert by_hand[0] == pytest.approx(chains.conditional[0])
    assert chains.cumulative[2] == pytest.approx(chains.conditional[0] * chains.conditional[1] * chains.conditional[2])
