"""The LM head of a decode step, against its reference.

Regimes: vocabularies of 1, 33, 131 (odd, no multiple of a tile), 199, and 49152 and 151936 with a narrow hidden state;
fp32 and fp16; bias, LayerNorm's shift, soft-cap; a draft vocabulary; greedy and sampled; one live row of a tile, all of
them, gaps between, two tiles, a tile without one; NaN, +inf and -inf in the logits. What dead rows hold is NaN and must
neither be read nor overwritten. Without a GPU the kernel runs in Triton's interpreter, which proves its logic only.

Planted bugs that these tests were seen to catch: the noise keyed by the column instead of the mapped id, by the row's
own position, by the row instead of its sequence; lanes of a group interleaved in the wrong order; columns beyond V left
at 0 instead of -inf; the fault's mark lost under a higher score; a tie broken to the highest id.
"""

from __future__ import annotations

import pytest
import torch
from skipstone.kernels import lm_head as op
from skipstone.kernels.lm_head import lm_head, lm_head_reference, num_tiles
from skipstone.kernels.noise import gumbel_noise
from skipstone.kernels.rows import Rows
from skipstone.kernels.tile import x_scale
from torch import Tensor

triton = op.triton
if triton is not None:
    import triton.language as tl
    from skipstone.kernels.device_noise import gumbel_at, gumbel_run

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# fp32: sums of up to 70 products in another order, divided by a norm of about 1. Half: products are exact in fp32, and
# the reference takes the same rounded inputs; see `tolerance_of` for tensor cores, which do not round their sums.
TOLERANCE = 2e-5
NOISE_TOLERANCE = 2e-5  # of logarithms near 0; see device_noise.py


def make_rows(live: list[int], sequences: list[int], positions: list[int]) -> Rows:
    as_tensor = {"dtype": torch.int32, "device": DEVICE}
    zero = torch.zeros(len(live), **as_tensor)
    return Rows(
        torch.tensor(live, **as_tensor), torch.tensor(sequences, **as_tensor), torch.tensor(positions, **as_tensor),
        zero, zero, torch.zeros(len(live), 16, **as_tensor),
    )  # fmt: skip


def make_case(vocab_size: int, width: int, live: list[int], dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(vocab_size + width)
    num_rows = len(live)
    x = torch.randn(num_rows, width, generator=generator) * x_scale(dtype)
    stats = torch.rand(num_rows, 2, 3, generator=generator) * width / 3
    stats[:, 1] *= 0.1
    dead = torch.tensor(live) == 0
    x[dead], stats[dead] = float("nan"), float("nan")
    weight = torch.randn(vocab_size, width, generator=generator) * width**-0.5
    sequences = [row % 3 for row in range(num_rows)]
    positions = [7 * row for row in range(num_rows)]
    return {
        "x": x.to(dtype).to(DEVICE), "stats": stats.to(DEVICE), "weight": weight.to(dtype).to(DEVICE),
        "rows": make_rows(live, sequences, positions),
        "seeds": torch.tensor([5, -3, 2**62 + 17], device=DEVICE),
    }  # fmt: skip


def run(case: dict, temperature: float = 0.0, **more: object) -> dict[str, Tensor]:
    """All outputs, poisoned first."""
    weight, num_rows = case["weight"], len(case["rows"])
    tiles = num_tiles(weight.shape[0], weight.dtype)
    out = {
        "logits": torch.full((num_rows, weight.shape[0]), float("nan"), device=DEVICE),
        "best_value": torch.full((num_rows, tiles), float("nan"), device=DEVICE),
        "best_id": torch.full((num_rows, tiles), -77, dtype=torch.int32, device=DEVICE),
        "tile_stats": torch.full((num_rows, 3, tiles), float("nan"), device=DEVICE),
    }
    options = torch.tensor([temperature] + [float("nan")] * 7, device=DEVICE)
    given = {"bias": None, "shift": None, "eps": 1e-5, "options": options} | more
    lm_head(
        case["x"], case["stats"], weight, given.pop("bias"), given.pop("shift"), case["rows"],
        seeds=case["seeds"], **given, **out,
    )  # fmt: skip
    return out


def tolerance_of(case: dict, logits: Tensor) -> float:
    """Tensor cores cut a sum off where others round it (Fasi et al., PeerJ CS 2021): each 16 products may lose an ulp,
    2**-23 of the partial sum, always towards zero, so errors add up. No partial sum is taken to be larger than the
    largest logit. At K = 1152 and logits up to 7.5 that is 6e-5; 2.003e-5 was measured on an H100."""
    if not ON_GPU or case["weight"].dtype == torch.float32:
        return TOLERANCE
    steps = case["weight"].shape[1] / 16
    return max(TOLERANCE, steps * 2**-23 * float(logits.abs().max()))


def check(case: dict, out: dict[str, Tensor], temperature: float = 0.0, **more: object) -> None:
    rows, weight, ids = case["rows"], case["weight"], more.get("ids")
    live = rows.live.bool()
    given = {"bias": None, "shift": None} | more
    logits, scores = lm_head_reference(
        case["x"][live], case["stats"][live], weight, given.pop("bias"), given.pop("shift"),
        temperature=temperature, seeds=case["seeds"][rows.sequence[live].long()], positions=rows.position[live] + 1,
        **given,
    )  # fmt: skip
    assert torch.isnan(out["logits"][~live]).all() and torch.isnan(out["best_value"][~live]).all()
    assert torch.isnan(out["tile_stats"][~live]).all() and (out["best_id"][~live] == -77).all()
    exact = tolerance_of(case, logits)
    assert float((out["logits"][live] - logits).abs().max()) < exact

    vocab_size = weight.shape[0]
    block = op._settings(vocab_size, weight.dtype)["BN"]
    tiles = out["best_id"].shape[1]
    padding = tiles * block - vocab_size
    tiled = torch.nn.functional.pad(scores, (0, padding), value=float("-inf")).view(-1, tiles, block)
    tolerance = exact * max(1.0, 1.0 / (temperature or 1.0)) + (NOISE_TOLERANCE if temperature else 0)
    assert float((out["best_value"][live] - tiled.amax(-1)).abs().max()) < tolerance
    columns = out["best_id"][live].long()
    if ids is not None:
        columns = torch.searchsorted(ids.long(), columns)
        assert torch.equal(ids[columns], out["best_id"][live])
    # the winner's own score is the tile's best, and it stands in its tile
    assert float((scores.gather(1, columns) - tiled.amax(-1)).abs().max()) < 2 * tolerance
    assert torch.equal(columns // block, torch.arange(tiles, device=DEVICE).expand_as(columns))

    tiled = torch.nn.functional.pad(logits, (0, padding), value=float("-inf")).view(-1, tiles, block)
    top = tiled.amax(-1)
    weights = (tiled - top.unsqueeze(-1)).exp()
    expected = torch.stack([top, weights.sum(-1), (weights * tiled.nan_to_num(0.0, neginf=0.0)).sum(-1)], 1)
    assert torch.allclose(out["tile_stats"][live], expected, rtol=1e-5, atol=1e-3)


ONE = [1] + [0] * 15
GAPS = [1, 0, 0, 1] * 4 + [0] * 16 + [0, 1] * 8


@pytest.mark.triton
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("vocab_size", "width", "live"),
    [(1, 16, ONE), (33, 48, [1] * 16), (131, 70, GAPS), (199, 64, GAPS)],
)
def test_equals_the_reference(
    vocab_size: int, width: int, live: list[int], dtype: torch.dtype, temperature: float
) -> None:
    case = make_case(vocab_size, width, live, dtype)
    check(case, run(case, temperature), temperature)


@pytest.mark.triton
@pytest.mark.parametrize(
    "vocab_size",
    [49152, pytest.param(151936, marks=pytest.mark.skipif(not ON_GPU, reason="a minute in Triton's interpreter"))],
)
def test_real_vocabularies(vocab_size: int) -> None:
    case = make_case(vocab_size, 16, ONE, torch.float16)
    check(case, run(case, 0.7), 0.7)


@pytest.mark.triton
@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("parts", [("bias",), ("bias", "shift"), ("softcap",), ("ids",), ("ids", "bias", "softcap")])
def test_optional_parts(parts: tuple[str, ...], temperature: float) -> None:
    case = make_case(131, 48, GAPS)
    generator = torch.Generator().manual_seed(1)
    all_parts = {
        "bias": torch.randn(131, generator=generator).to(DEVICE),
        "shift": torch.randn(131, generator=generator).to(DEVICE),
        "softcap": 1.5,
        "ids": torch.randperm(50000, generator=generator)[:131].sort().values.to(torch.int32).to(DEVICE),
    }
    more = {name: all_parts[name] for name in parts}
    check(case, run(case, temperature, **more), temperature, **more)


@pytest.mark.triton
def test_logits_alone_and_stats_alone() -> None:
    case = make_case(131, 48, GAPS)
    both = run(case)
    for name in ("logits", "tile_stats"):
        alone = torch.full_like(both[name], float("nan"))
        lm_head(
            case["x"], case["stats"], case["weight"], None, None, case["rows"], eps=1e-5, **{name: alone}
        )  # fmt: skip
        assert torch.equal(alone.nan_to_num(9.0), both[name].nan_to_num(9.0))


@pytest.mark.triton
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_faults_mark_their_tile_and_row_alone(temperature: float) -> None:
    case = make_case(131, 48, [1] * 16)
    bias = torch.zeros(131, device=DEVICE)
    bias[7], bias[40], bias[64:96], bias[100] = float("nan"), float("inf"), float("-inf"), float("-inf")
    out = run(case, temperature, bias=bias)
    for tile in (0, 1):
        assert (out["best_value"][:, tile] == float("inf")).all() and (out["best_id"][:, tile] == -1).all()
    assert (out["best_value"][:, 2] == float("-inf")).all()  # no candidate, but no fault
    assert (out["best_id"][:, 3] >= 96).all() and out["best_value"][:, 3:].isfinite().all()
    # one row's NaN stays in its row
    x = case["x"].clone()
    clean = run(case, temperature)
    case["x"][3, 5] = float("nan")
    out = run(case, temperature)
    assert (out["best_id"][3] == -1).all()
    others = torch.arange(16) != 3
    assert torch.equal(out["best_id"][others], clean["best_id"][others])
    assert torch.equal(out["logits"][others], clean["logits"][others])
    case["x"].copy_(x)


@pytest.mark.triton
def test_ties_go_to_the_lowest_id() -> None:
    case = make_case(131, 16, ONE)
    case["weight"][:] = 0.0
    out = run(case)
    assert out["best_id"][0].tolist() == [0, 32, 64, 96, 128]


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_does_not_depend_on_its_place_or_its_neighbours(dtype: torch.dtype) -> None:
    """The same row alone, in another place of a full tile and in a second tile: the same bits."""
    case = make_case(131, 48, [1] * 32, dtype)
    full = run(case, 0.8)
    for place in (0, 13, 21):
        x, stats = torch.full_like(case["x"][:16], float("nan")), torch.full_like(case["stats"][:16], float("nan"))
        x[5], stats[5] = case["x"][place], case["stats"][place]
        live = [int(row == 5) for row in range(16)]
        rows = make_rows(live, [place % 3] * 16, [7 * place] * 16)
        alone = run(case | {"x": x, "stats": stats, "rows": rows}, 0.8)
        for name in ("logits", "best_value", "best_id", "tile_stats"):
            assert torch.equal(alone[name][5], full[name][place]), name


if triton is not None:

    @triton.jit
    def _noise_kernel(seeds, position, run, at, N: tl.constexpr):  # type: ignore[no-untyped-def]
        row, ids = tl.arange(0, 2), tl.arange(0, N)
        seed = tl.load(seeds + row)[:, None]
        to = row[:, None] * N + ids[None, :]
        group = tl.broadcast_to(tl.arange(0, N // 4)[None, :], [2, N // 4])
        tl.store(run + to, gumbel_run(seed, position, group))
        tl.store(at + to, gumbel_at(seed, position, tl.broadcast_to(ids[None, :], [2, N])))


@pytest.mark.triton
def test_noise_on_the_device_is_the_noise() -> None:
    seeds = torch.tensor([11, -5], device=DEVICE)
    run, at = torch.full((2, 2, 4096), float("nan"), device=DEVICE)
    _noise_kernel[(1,)](seeds, 1234, run, at, N=4096)
    assert torch.equal(run, at)
    expected = torch.stack([gumbel_noise(11, 1234, 4096), gumbel_noise(2**64 - 5, 1234, 4096)])
    assert float((run.cpu() - expected).abs().max()) < NOISE_TOLERANCE


@pytest.mark.triton
def test_tensors_that_do_not_fit_are_refused() -> None:
    case = make_case(131, 48, ONE)
    call = (case["x"], case["stats"], case["weight"], None, None, case["rows"])
    with pytest.raises(ValueError, match="logits has shape"):
        lm_head(*call, eps=1e-5, logits=torch.empty(16, 130))
    with pytest.raises(ValueError, match="go together"):
        lm_head(*call, eps=1e-5, best_value=torch.empty(16, 5))
    with pytest.raises(ValueError, match="one dtype"):
        lm_head(case["x"].half(), *call[1:], eps=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize(("vocab_size", "width"), [(49152, 576), (151936, 896), (262144, 1152)])
def test_bf16_on_a_gpu_in_a_graph(vocab_size: int, width: int) -> None:
    case = make_case(vocab_size, width, GAPS, torch.bfloat16)
    for temperature in (0.0, 0.8):
        check(case, run(case, temperature), temperature)
    full = run(case, 0.8)
    options = torch.tensor([0.0] * 8, device=DEVICE)
    out = {name: torch.zeros_like(full[name]) for name in ("best_value", "best_id")}
    call = (case["x"], case["stats"], case["weight"], None, None, case["rows"])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lm_head(*call, eps=1e-5, options=options, seeds=case["seeds"], pdl=True, **out)
    options[0] = 0.8
    graph.replay()
    torch.cuda.synchronize()
    live = case["rows"].live.bool()
    assert torch.equal(out["best_id"][live], full["best_id"][live])
