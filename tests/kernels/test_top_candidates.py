"""The best few tokens of a draft head's rows.

Regimes: one candidate to eight, also three and five; vocabularies of one tile, one column more, 49152 and 151936;
fewer columns and fewer tiles than candidates; a draft vocabulary with gaps; greedy and sampled; ties inside a tile
and across tiles; -inf almost everywhere and everywhere; NaN and +inf; rows that are not live. Outputs are poisoned
first. Planted bugs that these tests were seen to catch: ties to the later tile, -0 below 0, scores below zero in the
order of their bits, noise of the row's own position and of the column instead of the token, columns beyond the
vocabulary, a token given twice, entropies of rows with NaN.
"""

from __future__ import annotations

import math

import pytest
import torch
from skipstone.kernels.noise import MASK_32, gumbel_noise_at
from skipstone.kernels.rows import Rows
from skipstone.kernels.top_candidates import tile_width, top_candidates, top_candidates_reference

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.triton
# fp32: sums of up to 151936 exponentials in another order, and logarithms; entropies multiply them by logits of 10.
TOLERANCE = 5e-5
DEAD = 3


def rows_of(positions):
    rows = Rows.empty(16, DEVICE)
    for r, position in enumerate(positions):
        rows.live[r], rows.sequence[r], rows.position[r] = r != DEAD, r % 2, position
    return rows


def tile_stats(logits, temperature, seeds, rows, tile, ids):
    """What `lm_head` leaves of each tile."""
    known = torch.arange(logits.shape[1]) if ids is None else ids.cpu().long()
    scores = logits.cpu()
    if temperature:
        noise = [
            gumbel_noise_at(int(seeds[q]) & (MASK_32 << 32 | MASK_32), p + 1, known)
            for q, p in zip(rows.sequence.tolist(), rows.position.tolist(), strict=True)
        ]
        scores = scores / temperature + torch.stack(noise)
    stats, best = [], []
    for own, score in zip(logits.cpu().split(tile, 1), scores.split(tile, 1), strict=True):
        finite = own > -math.inf
        top = own.nan_to_num(-math.inf, math.inf, -math.inf).amax(1)
        weights = torch.where(finite, (own - top.unsqueeze(1)).exp(), 0.0)
        stats.append(torch.stack([top, weights.sum(1), (weights * torch.where(finite, own, 0.0)).sum(1)], 1))
        wrong = (own.isnan() | own.isposinf()).any(1)
        best.append(torch.where(wrong, math.inf, score.amax(1)))
    return torch.stack(stats, 2).to(DEVICE), torch.stack(best, 1).to(DEVICE)


def run(logits, temperature, count, tile, ids=None):
    seeds = torch.tensor([7, -3], device=DEVICE)
    rows = rows_of(range(5, 5 + len(logits)))
    padded = torch.full((16, logits.shape[1]), 0.0)
    padded[: len(logits)] = logits
    stats, best = tile_stats(padded, temperature, seeds, rows, tile, ids)
    padded[DEAD] = math.nan
    options = torch.tensor([temperature, 1.0, 0, 1, 0, 0, 0, 0], device=DEVICE)
    tokens = torch.full((16, count), -7, dtype=torch.int32, device=DEVICE)
    log_probs, entropies = torch.full((16, count), math.nan, device=DEVICE), torch.full((16,), math.nan, device=DEVICE)
    surprisals = torch.full_like(entropies, math.nan)
    top_candidates(
        padded.to(DEVICE), stats, best, options, seeds, rows, tokens, log_probs, entropies, ids, surprisals=surprisals
    )
    *wanted, raw = top_candidates_reference(padded, temperature, seeds, rows, count, ids)
    live = rows.live[: len(logits)].cpu() != 0
    assert (tokens[DEAD] == -7).all() and log_probs[DEAD].isnan().all() and entropies[DEAD].isnan()
    assert surprisals[DEAD].isnan()
    found, raw = (t[: len(logits)].cpu()[live] for t in (surprisals, raw))
    torch.testing.assert_close(found, raw, rtol=0, atol=TOLERANCE, equal_nan=True)
    got = [t[: len(logits)].cpu()[live] for t in (tokens, log_probs, entropies)]
    return got, [t[: len(logits)][live] for t in wanted]


def make_logits(num_rows, vocab_size, seed=0):
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(vocab_size + seed)) * 3


SIZES = [(1, 16), (3, 16), (16, 16), (17, 16), (130, 32), (1000, 64), (24576, 128), (49152, 128), (151936, 64)]


@pytest.mark.parametrize(("vocab_size", "tile"), SIZES)
@pytest.mark.parametrize("count", [1, 3, 4, 5, 8])
def test_greedy_is_exact(vocab_size, tile, count):
    if vocab_size > 2000 and count not in (1, 4) and not ON_GPU:
        pytest.skip("the interpreter is slow")
    (tokens, log_probs, entropies), wanted = run(make_logits(5, vocab_size), 0.0, count, tile)
    held = min(vocab_size, count)
    assert torch.equal(tokens[:, :held], wanted[0][:, :held]) and (tokens[:, held:] == -1).all()
    assert float((log_probs[:, :held] - wanted[1][:, :held]).abs().max()) < TOLERANCE
    assert log_probs[:, held:].isneginf().all()
    assert float((entropies - wanted[2]).abs().max()) < TOLERANCE


@pytest.mark.parametrize(("temperature", "most"), [(0.7, 0.2), (1.5, 0.6)])
@pytest.mark.parametrize(("vocab_size", "tile", "gaps"), [(17, 16, 1), (1000, 32, 3), (24576, 128, 2)])
def test_sampled_tokens_are_exact_and_log_probabilities_near(temperature, most, vocab_size, tile, gaps):
    """Tokens equal, since no two best scores are within the logarithms' 1e-5 of each other here. The normaliser leaves
    out what is not a tile's maximum, so log-probabilities come out too large, never too small."""
    ids = torch.arange(vocab_size, dtype=torch.int32, device=DEVICE) * gaps + 1 if gaps > 1 else None
    (tokens, log_probs, entropies), wanted = run(make_logits(5, vocab_size), temperature, 4, tile, ids)
    assert torch.equal(tokens, wanted[0])
    excess = log_probs - wanted[1]
    assert float(excess.min()) > -TOLERANCE and float(excess.max()) < most
    assert float((excess - excess[:, :1]).abs().max()) < TOLERANCE
    assert float((entropies - wanted[2]).abs().max()) < TOLERANCE


def test_ties_go_to_the_lowest_id():
    logits = torch.full((3, 200), -1.0)
    logits[0, [190, 33, 34, 40, 2]] = 1.0
    logits[1, [199, 198, 197]] = 4.0
    logits[1, [150, 31]] = 3.0
    logits[2, 100], logits[2, 99] = 0.0, -0.0
    logits[2, 101:] = -3.0
    (tokens, _, _), wanted = run(logits, 0.0, 4, 32)
    assert tokens.tolist() == [[2, 33, 34, 40], [197, 198, 199, 31], [99, 100, 0, 1]] == wanted[0].tolist()


def test_infinities_and_nan():
    logits = torch.full((8, 100), -math.inf)
    logits[0, 77] = -5.0  # the only possible one
    logits[1, [3, 90]] = torch.tensor([1.0, 2.0])
    logits[4] = make_logits(1, 100)[0]
    logits[4, 50] = math.nan
    logits[5] = 0.0
    logits[5, 99] = math.inf
    logits[6], logits[7] = math.nan, 2.0
    for temperature in (0.0, 1.0):
        (tokens, log_probs, entropies), _ = run(logits, temperature, 4, 16)
        rows = dict(zip((0, 1, 2, 4, 5, 6, 7), range(7), strict=True))
        assert tokens[rows[0]].tolist() == [77, -1, -1, -1] and log_probs[rows[0]].tolist() == [0.0] + [-math.inf] * 3
        assert entropies[rows[0]] == 0.0
        assert sorted(tokens[rows[1]].tolist()) == [-1, -1, 3, 90]
        assert float(log_probs[rows[1], :2].exp().sum()) == pytest.approx(1.0)
        for row in (2, 4, 5, 6):
            assert entropies[rows[row]].isnan(), row
        assert float(entropies[rows[7]]) == pytest.approx(math.log(100), abs=TOLERANCE)


def test_tiles_and_inputs_are_checked():
    assert [tile_width(v, n) for v, n in ((1, 1), (16, 1), (17, 2), (24576, 192), (151936, 2374))] == [
        16,
        16,
        16,
        128,
        64,
    ]
    with pytest.raises(ValueError, match="no tiles"):
        tile_width(1000, 3)
    with pytest.raises(ValueError, match="9 candidates"):
        run(make_logits(2, 100), 0.0, 9, 16)
