"""The batched writer writes what the model says, whatever the batch's make-up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from skipstone.engine.model import Decoder
from skipstone.train import generate
from skipstone.train.data import SelfText
from skipstone.train.generate import Sampling, write_text

STOPS = (7, 11)


def make_prompts(lens: list[int], vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lens]


def check_greedy(decoder: Decoder, text: SelfText, max_new_tokens: int, stops: tuple[int, ...]) -> None:
    """Every written token is the argmax of a full forward over what stands before it, and texts end where they must."""
    final = decoder.config.num_layers
    for i in range(len(text)):
        ids, prompt = text.text(i).long().to(decoder.device), int(text.prompt_lens[i])
        state = decoder.encode(ids.unsqueeze(0), [final])[final][0]
        logits = decoder.lm_head(decoder.final_norm(state)).float()
        written = ids[prompt:]
        margin = logits[prompt - 1 : -1].max(-1).values - logits[prompt - 1 : -1].gather(1, written.unsqueeze(1))[:, 0]
        assert float(margin.max()) < 1e-3, "a written token is not the argmax (ties within fp32 rounding aside)"
        stopped = [t in stops for t in written.tolist()]
        assert not any(stopped[:-1]), "written past a stop token"
        assert stopped[-1] or len(written) == max_new_tokens


@torch.no_grad()
def test_greedy_text_equals_full_forwards(tiny: Callable, family: str) -> None:
    """All families: windows, soft-caps, partial rotary. Ragged prompts in batches that mix them with longer ones."""
    config, weights = tiny(family)
    decoder = Decoder(config, weights)
    prompts = make_prompts([4, 9, 1, 23, 4, 40], config.vocab_size)
    text = write_text(decoder, prompts, [0.0] * 6, Sampling(12, STOPS, cache_tokens=170))
    assert [text.text(i)[: len(p)].tolist() for i, p in enumerate(prompts)] == prompts
    check_greedy(decoder, text, 12, STOPS)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 5])
def test_slots_are_refilled_and_dropped(tiny: Callable, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Four slots for 24 prompts: texts end at different times, slots take other prompts, the last rows move together.

    Catches: a refilled slot that keeps its old end, prompts not prefilled, rows moved without their cache; with several
    steps between two looks, as on a GPU: a row without a text that writes into the one it held.
    """
    monkeypatch.setattr(generate, "CPU_STEPS", steps)
    config, weights = tiny("llama3")
    decoder = Decoder(config, weights)
    stops = tuple(range(0, config.vocab_size, 40))
    prompts = make_prompts([3, 5, 14, 6, 1, 8, 9, 3] * 3, config.vocab_size)
    told: list[int] = []
    text = write_text(decoder, prompts, [0.0] * 24, Sampling(60, stops, cache_tokens=4 * 74), told.append)
    check_greedy(decoder, text, 60, stops)
    assert len({int(n) for n in text.lens}) > 5
    assert sum(told) == text.num_written


@torch.no_grad()
def test_a_text_does_not_depend_on_its_slot_or_company(tiny: Callable) -> None:
    """Sampled: all at once, two slots, and a part of the prompts by their numbers. Catches: noise keyed by the slot."""
    decoder = Decoder(*tiny("llama3"))
    prompts = make_prompts([3, 9, 5, 2, 7, 4, 4, 8], decoder.config.vocab_size)
    temperatures = [0.7, 0.0, 1.0, 1.0] * 2
    one = write_text(decoder, prompts, temperatures, Sampling(12, STOPS, seed=9))
    two = write_text(decoder, prompts, temperatures, Sampling(12, STOPS, cache_tokens=42, seed=9))
    part = write_text(decoder, prompts[2::3], temperatures[2::3], Sampling(12, STOPS, seed=9), numbers=range(2, 8, 3))
    assert [one.text(i).tolist() for i in range(8)] == [two.text(i).tolist() for i in range(8)]
    assert [part.text(i).tolist() for i in range(2)] == [one.text(i).tolist() for i in (2, 5)]


@torch.no_grad()
def test_logits_of_many_rows_are_made_in_parts(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(*tiny("llama3"))
    prompts = make_prompts([3] * 7, decoder.config.vocab_size)
    whole = write_text(decoder, prompts, [1.0] * 7, Sampling(6, ()))
    monkeypatch.setattr(generate, "LOGITS_AT_ONCE", 2 * decoder.config.vocab_size + 1)
    assert write_text(decoder, prompts, [1.0] * 7, Sampling(6, ())).ids.tolist() == whole.ids.tolist()


@torch.no_grad()
def test_no_text_is_begun_once_told_so(tiny: Callable) -> None:
    """Texts under way are finished, the rest is left out."""
    decoder = Decoder(*tiny("llama3"))
    prompts = make_prompts([4, 6, 5, 4, 4, 6], decoder.config.vocab_size)
    answers = iter([True, False])
    text = write_text(
        decoder, prompts, [0.0] * 6, Sampling(9, (), cache_tokens=30), keep_going=lambda: next(answers, False)
    )
    assert [text.text(i)[: len(prompts[i])].tolist() for i in range(len(text))] == prompts[:2]
    check_greedy(decoder, text, 9, ())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_the_captured_step_writes_the_same(tiny: Callable, family: str) -> None:
    """Refilled slots and a second, smaller graph at the end."""
    decoder = Decoder(*tiny(family), device="cuda")
    prompts = make_prompts([3, 9, 1, 20] * 10, decoder.config.vocab_size)
    text = write_text(decoder, prompts, [0.0] * 40, Sampling(50, STOPS, cache_tokens=8 * 70))
    check_greedy(decoder, text, 50, STOPS)


@torch.no_grad()
def test_sampled_text_follows_the_distribution(tiny: Callable) -> None:
    """First token of 3000 equal prompts at T = 0.8 against the softmax. Catches: T forgotten."""
    config, weights = tiny("llama3")
    decoder = Decoder(config, weights)
    prompt = make_prompts([5], config.vocab_size)[0]
    text = write_text(decoder, [prompt] * 3000, [0.8] * 3000, Sampling(1, (), cache_tokens=100_000, seed=3))
    drawn = torch.bincount(text.ids.view(3000, 6)[:, 5].long(), minlength=config.vocab_size).double()
    final = config.num_layers
    state = decoder.encode(torch.tensor([prompt]), [final])[final][0, -1:]
    expected = (decoder.lm_head(decoder.final_norm(state))[0].double() / 0.8).softmax(-1) * 3000
    big = expected > 5
    chi = ((drawn - expected)[big] ** 2 / expected[big]).sum()
    freedom = int(big.sum())
    assert freedom > 20
    assert float(chi) < freedom + 5 * (2 * freedom) ** 0.5  # mean + 5 sd of chi-square


@torch.no_grad()
def test_seed_decides(tiny: Callable) -> None:
    decoder = Decoder(*tiny("llama3"))
    prompts = make_prompts([3, 5], decoder.config.vocab_size)
    one, two, other = (
        write_text(decoder, prompts, [1.0, 0.0], Sampling(10, (), seed=seed)).ids.tolist() for seed in (1, 1, 2)
    )
    assert one == two != other


def test_bad_prompts_are_refused(tiny: Callable) -> None:
    decoder = Decoder(*tiny("llama3"))
    with pytest.raises(ValueError, match="none empty"):
        write_text(decoder, [[1], []], [0.0, 0.0], Sampling(4, ()))
    with pytest.raises(ValueError, match="no room in a context of 256"):
        write_text(decoder, [[1] * 256], [0.0], Sampling(4, ()))
