"""The draw from tiles, the draw from whole rows, and the tables of its penalties.

Regimes: against `engine/sampling.py` itself, with every processor alone and all together, greedy and sampled, on trees
with paths of 0 to 4 drafted tokens, two sequences, vocabularies below, at and above a block; logits rounded so that
many tie; flat rows, which need the deepest list, and peaked ones; large vocabularies; rows with NaN, +inf, nothing
left; dead rows. Outputs and work space are poisoned first. Without a GPU the kernels run in Triton's interpreter, which
proves their logic only.

Planted bugs that these tests were seen to catch: the path's tokens left out of the penalties, or the root's counted
again; a token twice on the path counted once; ties with the k-th dropped, tokens beyond it kept; top-p's mass including
the token itself, or taken before top-k, or without what stands above the edge; tied tokens at top-p's edge all kept;
another floor of min-p, alone and behind top-k; stop ids banned one position too long; noise of the row's own position;
a row of -inf given a token.
"""

from __future__ import annotations

import pytest
import torch
from skipstone.engine.sampling import Context, History, SamplingParams, TargetSampler
from skipstone.kernels.draw import Penalties, count_tokens, pick, pick_reference, process_and_draw, process_reference
from skipstone.kernels.noise import gumbel_noise
from skipstone.kernels.rows import Rows
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
W = 8
# node -> parent of both trees: a chain of four with branches
PARENTS = [-1, 0, 1, 2, 3, 0, 1, 5]


def path_of(node: int) -> list[int]:
    nodes = []
    while node > 0:
        nodes.insert(0, node)
        node = PARENTS[node]
    return nodes


def tensor(values: list, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


class Case:
    """Two sequences with a tree of eight nodes each, by host and by device."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(vocab_size + seed)

        def ids(count: int) -> list[int]:
            return torch.randint(0, min(vocab_size, 40), (count,), generator=generator).tolist()

        self.vocab_size = vocab_size
        self.histories = [History(ids(5)), History(ids(9))]
        self.histories[0].extend(ids(6))
        self.histories[1].extend(ids(1))
        self.tree_tokens = [[history.token_ids[-1], *ids(W - 1)] for history in self.histories]
        self.tree_tokens[0][2] = self.tree_tokens[0][1]  # twice on one path
        base = [len(history) - 1 for history in self.histories]
        paths = [path_of(node) for node in range(W)]
        self.rows = Rows(
            tensor([1] * W + [1] * W),
            tensor([0] * W + [1] * W),
            tensor([base[b] + len(path) for b in range(2) for path in paths]),
            tensor([0] * 2 * W),
            tensor([base[b] for b in range(2) for _ in paths]),
            tensor([[0, *path, *[0] * (15 - len(path))] for _ in range(2) for path in paths]),
        )
        self.contexts = [
            Context(history, tuple(tokens[node] for node in path))
            for history, tokens in zip(self.histories, self.tree_tokens, strict=True)
            for path in paths
        ]
        self.seeds = [3, 2**63 + 9]

    def kernel(self, logits: Tensor, params: SamplingParams, live: Tensor | None = None) -> Tensor:
        rows = self.rows
        if live is not None:
            rows = Rows(live, rows.sequence, rows.position, rows.slot, rows.base, rows.path)
        penalties = Penalties.empty(2, self.vocab_size, DEVICE)
        penalties.counts.fill_(9)  # of sequences before
        starts = [(b, history.token_ids, history.prompt_len) for b, history in enumerate(self.histories)]
        penalties.start(starts, params.logit_bias)
        out = torch.full((len(rows),), -99, dtype=torch.int32, device=DEVICE)
        logits = logits.to(DEVICE, copy=True)
        process_and_draw(
            logits, rows, penalties, tensor([[*tokens, *[-5] * (16 - W)] for tokens in self.tree_tokens]),
            tensor([params.temperature, params.top_p, params.min_p, params.repetition_penalty,
                    params.presence_penalty, params.frequency_penalty, 0, 0], torch.float32),
            tensor([params.top_k]), tensor([s if s < 2**63 else s - 2**64 for s in self.seeds], torch.int64),
            tensor([*params.stop_ids, -1]),
            tensor([history.prompt_len + params.min_new_tokens for history in self.histories]), out,
            kept_ids=torch.full_like(logits, -1, dtype=torch.int32),
        )  # fmt: skip
        return out.cpu()

    def engine(self, logits: Tensor, params: SamplingParams) -> list[int]:
        tokens = []
        for b, seed in enumerate(self.seeds):
            own = slice(b * W, (b + 1) * W)
            settings = {name: getattr(params, name) for name in params.__dataclass_fields__} | {"seed": seed}
            sampler = TargetSampler(SamplingParams(**settings), self.vocab_size)
            tokens += sampler.targets(logits[own], self.contexts[own])
        return tokens


def make_logits(vocab_size: int, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(2 * W, vocab_size, generator=generator)
    if kind == "ties":
        return (logits * 2).round() / 2
    if kind == "flat":
        return logits * 0.01
    return logits * (3 if kind == "wide" else 12)


PARAMS = {
    "greedy": {},
    "greedy with penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.8},
    "temperature": {"temperature": 0.8},
    "repetition": {"temperature": 1.0, "repetition_penalty": 2.5},
    "presence": {"temperature": 1.0, "presence_penalty": 3.0},
    "frequency": {"temperature": 1.0, "frequency_penalty": -1.5},
    "bias": {"temperature": 0.5, "logit_bias": {3: 4.0, 7: float("-inf"), 11: 2.5}},
    "stops": {"temperature": 1.0, "stop_ids": (3, 9), "min_new_tokens": 8, "logit_bias": {3: 9.0, 9: 9.0}},
    "top-k": {"temperature": 1.5, "top_k": 5},
    "top-k of one": {"temperature": 2.0, "top_k": 1},
    "top-p": {"temperature": 1.2, "top_p": 0.6},
    "small top-p": {"temperature": 1.0, "top_p": 1e-4},
    "min-p": {"temperature": 1.5, "min_p": 0.2},
    "top-k, then min-p": {"temperature": 1.5, "top_k": 30, "min_p": 0.3},
    "filters": {"temperature": 2.0, "top_k": 12, "top_p": 0.7, "min_p": 0.05},
    "all": {
        "temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3,
        "presence_penalty": 0.2, "frequency_penalty": 0.1, "logit_bias": {5: 1.0}, "stop_ids": (2, 4),
        "min_new_tokens": 6,
    },
}  # fmt: skip


@pytest.mark.triton
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in PARAMS for kind in ("wide", "ties")]
    + [(name, kind) for name in ("greedy", "temperature", "top-k", "top-p", "filters") for kind in ("flat", "peaked")],
)
def test_tokens_are_those_of_the_engine(name: str, kind: str) -> None:
    case, params = Case(61), SamplingParams(**PARAMS[name])
    logits = make_logits(61, kind)
    assert case.kernel(logits, params).tolist() == case.engine(logits, params)


@pytest.mark.triton
@pytest.mark.parametrize("name", ["greedy with penalties", "repetition", "presence", "frequency", "all"])
def test_the_own_path_is_penalised(name: str) -> None:
    """Each row likes best what stands on its own path, the root or another row's path, all about the same."""
    case, params = Case(61), SamplingParams(**PARAMS[name])
    logits = make_logits(61, "wide") / 6
    for row, context in enumerate(case.contexts):
        logits[row, case.tree_tokens[row // W]] += 3.0
        logits[row, list(context.path)] += 0.5
    assert case.kernel(logits, params).tolist() == case.engine(logits, params)


@pytest.mark.triton
@pytest.mark.parametrize("vocab_size", [1, 255, 256, 257, 530])
@pytest.mark.parametrize("name", ["greedy", "temperature", "filters"])
def test_vocabularies_around_a_block(name: str, vocab_size: int) -> None:
    case, params = Case(vocab_size), SamplingParams(**PARAMS[name])
    live = tensor([1, 0, 0, 1] * 4)
    logits = make_logits(vocab_size, "ties")
    expected = [token * on for token, on in zip(case.engine(logits, params), live.tolist(), strict=True)]
    assert case.kernel(logits, params, live=live).tolist() == expected


@pytest.mark.triton
@pytest.mark.parametrize("vocab_size", [49152, 151936])
def test_real_vocabularies(vocab_size: int) -> None:
    case = Case(vocab_size)
    live = tensor([0, 0, 0, 1] + [0] * 12)
    logits = make_logits(vocab_size, "wide")
    for name in ("temperature", "all") if vocab_size == 49152 else ("top-p",):
        params = SamplingParams(**PARAMS[name])
        tokens, expected = case.kernel(logits, params, live=live), case.engine(logits, params)
        assert tokens.tolist() == [token if on else 0 for token, on in zip(expected, live.tolist(), strict=True)]


@pytest.mark.triton
@pytest.mark.parametrize("name", ["top-k", "top-p", "top-k, then min-p", "filters"])
def test_every_kept_token_is_drawn_and_no_other(name: str) -> None:
    """Many positions of one flat row: the set of tokens drawn is the set that the reference keeps."""
    params = SamplingParams(**PARAMS[name])
    case = Case(61)
    row = torch.tensor([2.0, 1.75, 1.75, 1.5, 1.5, 1.5, 1.25, 1.25, 1.0, 0.75] + [-1.0] * 20 + [-2.0] * 31)
    row = row[torch.randperm(61, generator=torch.Generator().manual_seed(3))]
    logits = row.expand(2 * W, -1).contiguous()
    kept = process_reference(
        row, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p
    )
    drawn: set[int] = set()
    for trial in range(4):
        case.seeds = [trial, 1000 + trial]
        tokens = case.kernel(logits, params).tolist()
        expected = [
            int((kept + gumbel_noise(case.seeds[r // W], int(case.rows.position[r]) + 1, 61)).argmax())
            for r in range(2 * W)
        ]
        assert tokens == expected
        drawn |= set(tokens)
    allowed = set(kept.isfinite().nonzero().flatten().tolist())
    assert drawn <= allowed and len(drawn) > 0.4 * len(allowed)


@pytest.mark.triton
@pytest.mark.parametrize("name", ["greedy", "temperature", "top-p"])
def test_faults_end_their_row_alone(name: str) -> None:
    case, params = Case(61), SamplingParams(**PARAMS[name])
    logits = make_logits(61, "wide")
    clean = case.kernel(logits, params)
    logits[1, 60], logits[3, 0], logits[5] = float("nan"), float("inf"), float("-inf")
    logits[6, 1:] = float("-inf")
    tokens = case.kernel(logits, params)
    assert tokens[[1, 3, 5, 6]].tolist() == [-1, -1, -1, 0]
    others = [0, 2, 4, *range(7, 16)]
    assert torch.equal(tokens[others], clean[others])
    banned = SamplingParams(**PARAMS[name], logit_bias=dict.fromkeys(range(61), float("-inf")))
    assert (case.kernel(make_logits(61, "wide"), banned) == -1).all()


@pytest.mark.triton
def test_rows_that_are_not_live_give_zero() -> None:
    case, params = Case(257), SamplingParams(**PARAMS["filters"])
    logits = make_logits(257, "ties")
    expected = [token * (row % 2) for row, token in enumerate(case.engine(logits, params))]
    logits[0::2] = float("nan")
    assert case.kernel(logits, params, live=tensor([0, 1] * W)).tolist() == expected


@pytest.mark.triton
def test_pick() -> None:
    for num_tiles in (1, 3, 384, 1187):
        generator = torch.Generator().manual_seed(num_tiles)
        value = torch.randn(16, num_tiles, generator=generator)
        ids = (torch.arange(num_tiles) * 128 + torch.randint(0, 128, (16, num_tiles), generator=generator)).int()
        value[2] = 1.0  # ties
        value[4, num_tiles // 2], ids[4, num_tiles // 2] = float("inf"), -1
        value[5] = float("-inf")
        live = torch.ones(16, dtype=torch.int32)
        live[7] = 0
        value[7] = float("nan")
        zero = torch.zeros(16, dtype=torch.int32, device=DEVICE)
        rows = Rows(live.to(DEVICE), zero, zero, zero, zero, zero)
        out = torch.full((16,), -99, dtype=torch.int32, device=DEVICE)
        pick(value.to(DEVICE), ids.to(DEVICE), rows, out)
        assert torch.equal(out.cpu(), pick_reference(value, ids, live))
        assert out[[2, 4, 5, 7]].tolist() == [int(ids[2, 0]), -1, -1, 0]
        assert out[0] == ids[0, value[0].argmax()]
    with pytest.raises(ValueError, match="do not fit"):
        pick(value, ids, rows, out[:3])


@pytest.mark.triton
def test_committed_tokens_are_counted() -> None:
    record = torch.full((3, 96), 7, dtype=torch.int32, device=DEVICE)
    record[:, 4:20] = -1
    record[0, 0], record[0, 4:8] = 3, tensor([5, 9, 5, 5])
    record[1, 0] = -1  # inactive
    record[2, 0], record[2, 4:6] = 1, tensor([0, -1])  # no bonus could be drawn
    penalties = Penalties.empty(3, 11, DEVICE)
    penalties.start([(0, [3, 3, 5, 5], 2)], {})
    count_tokens(record, penalties)
    expected = torch.zeros(3, 11, dtype=torch.int32)
    expected[0, 5], expected[0, 9], expected[2, 0] = 5, 1, 1
    assert torch.equal(penalties.counts.cpu(), expected)
    expected[0, 3] = 1
    assert torch.equal(penalties.seen.cpu(), (expected > 0).to(torch.int8))


@pytest.mark.triton
def test_tensors_that_do_not_fit_are_refused() -> None:
    case = Case(61)
    logits = make_logits(61, "wide").to(DEVICE)
    rest = (tensor([0.0] * 8), tensor([0]), tensor([1, 2], torch.int64), tensor([-1]), tensor([0, 0]), tensor([0] * 16))
    trees = tensor([[0] * 16] * 2)
    with pytest.raises(ValueError, match="counts has shape"):
        process_and_draw(logits, case.rows, Penalties.empty(3, 61, DEVICE), trees, *rest)
    penalties = Penalties.empty(2, 61, DEVICE)
    with pytest.raises(ValueError, match="kept_ids has shape"):
        process_and_draw(logits, case.rows, penalties, trees, *rest, kept_ids=tensor([[1]]))
    with pytest.raises(ValueError, match="logits have 15 rows"):
        process_and_draw(logits[:15], case.rows, penalties, trees, *rest)
    with pytest.raises(ValueError, match="tables 2"):
        count_tokens(torch.zeros(3, 96, dtype=torch.int32, device=DEVICE), penalties)
