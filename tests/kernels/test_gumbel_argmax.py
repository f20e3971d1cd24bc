"""The next token of many rows.

Regimes: vocabularies of one block, no multiple of four, real ones; greedy and sampled rows side by side; -inf; ties;
seeds of more than 63 bits. Planted bugs that these tests were seen to catch: lanes in the wrong order, the noise added
instead of subtracted logarithms, the temperature of another row, the filling of the last block chosen.
"""

from __future__ import annotations

import pytest
import torch
from skipstone.kernels import gumbel_argmax as op
from skipstone.kernels.gumbel_argmax import gumbel_argmax, gumbel_argmax_reference
from skipstone.kernels.noise import derive_seed, derive_seeds, gumbel_noise

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TEMPERATURES = torch.tensor([0.0, 0.7, 1.0, 2.5])
SEEDS = torch.tensor([3, 1, -3, 2**62 + 5])
POSITIONS = torch.tensor([0, 5, 9, 100_000])


def make_logits(vocab_size: int) -> torch.Tensor:
    return torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 2


def test_reference_is_the_argmax_with_the_noise_of_the_decoder() -> None:
    logits = make_logits(500)
    found = gumbel_argmax_reference(logits, TEMPERATURES, SEEDS, POSITIONS).tolist()
    assert found[0] == int(logits[0].argmax())
    for r, seed in ((1, 1), (2, 2**64 - 3), (3, 2**62 + 5)):
        noise = gumbel_noise(seed, int(POSITIONS[r]), 500)
        assert found[r] == int((logits[r] + float(TEMPERATURES[r]) * noise).argmax())
    assert gumbel_argmax(logits, TEMPERATURES, SEEDS, POSITIONS).tolist() == found


@pytest.mark.triton
@pytest.mark.parametrize("vocab_size", [1, 7, 128, 129, 1027, 49152, 151936])
def test_kernel_draws_what_the_reference_draws(vocab_size: int) -> None:
    """Equal, since two best scores within the logarithms' 1e-6 of each other are not among these few."""
    rows = slice(0, 4) if vocab_size < 2000 or ON_GPU else slice(0, 2)  # the interpreter is slow
    given = [t[rows].to(DEVICE) for t in (make_logits(vocab_size), TEMPERATURES, SEEDS, POSITIONS)]
    for _ in range(20 if ON_GPU else 5 if vocab_size < 2000 else 1):
        assert torch.equal(op.launch(*given), gumbel_argmax_reference(*given))
        given[3] += 1


@pytest.mark.triton
def test_ties_infinities_and_strides() -> None:
    logits = torch.full((4, 700), float("-inf"))
    logits[0, [399, 40, 41]] = 1.0  # a tie of greedy rows: the lowest id
    logits[1, 699] = logits[2, 3] = logits[3, 255] = -5.0  # the only possible ones
    wide = torch.full((4, 1000), 9.0)
    wide[:, :700] = logits
    given = [t.to(DEVICE) for t in (wide[:, :700], TEMPERATURES, SEEDS, POSITIONS)]
    assert op.launch(*given).tolist() == [40, 699, 3, 255]
    with pytest.raises(ValueError, match="without gaps"):
        op.launch(given[0].t(), *given[1:])


def test_seeds_of_a_batch_are_those_derived_one_by_one() -> None:
    for seed in (0, 7, 2**64 - 1):
        assert [s % 2**64 for s in derive_seeds(seed, 9).tolist()] == [derive_seed(seed, i) for i in range(9)]
    assert derive_seeds(1, 0).shape == (0,)
