"""Chains in device memory against the reference and `engine/draft.py`, with made-up heads that are functions of the
chain.

Regimes: one exit and three; no gate, gates by entropy and by path that stop some chains at once and some late; NaN;
greedy ties over tiles; sequences at their ends, inactive ones and such in between; a second round in the first one's
memory. Planted bugs that these tests were seen to catch: an ancestor not live at a deeper exit, a path's measure taken
from an exit that refused, a refused node counted at every exit, a chain that goes on after it was refused, a token more
than the budget, a tie to the higher id.
"""

from __future__ import annotations

import math

import pytest
import torch
from skipstone.engine import draft as eager
from skipstone.engine.draft import DraftRow
from skipstone.engine.forward import RowTiles, Working
from skipstone.engine.gate import DraftPolicy, Gate
from skipstone.engine.tree import DraftTree
from skipstone.kernels.adapter_rows import adapter_rows, adapter_rows_reference
from skipstone.kernels.grow_chain import (
    Asked,
    Chain,
    begin_chain,
    begin_chain_reference,
    grow_chain,
    grow_chain_reference,
)
from skipstone.kernels.grow_tree import Sequences, Trees
from skipstone.kernels.rows import Rows

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
VOCAB, TILE = 11, 4
INF = math.inf
CHAINS = [
    Chain((2,), (INF,), 3),
    Chain((1,), (1.9,), 5),
    Chain((1, 2, 4), (1.3, 1.5, 1.7), 7),
    Chain((1, 3), (4.0, 6.0), 6, by_path=True),
    Chain((3,), (-1.0,), 4),
]
RUNS = [
    (begin_chain_reference, grow_chain_reference),
    pytest.param((begin_chain, grow_chain), marks=pytest.mark.triton),
]


def logits_of(path: tuple[int, ...], exit_layer: int, salt: int, nan_at: int | None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hash((salt, exit_layer, *path)) % 2**31)
    logits = torch.randn(VOCAB, generator=generator) * 2.0
    if len(path) % 3 == 1:
        logits[[2, 9]] = logits.max()  # two likeliest tokens, in different tiles
    if len(path) == nan_at:
        logits[4] = math.nan
    return logits


def chain_of_the_engine(
    chain: Chain, salt: int, depth: int, nan_at: int | None, monkeypatch: pytest.MonkeyPatch
) -> tuple[DraftTree, int]:
    """By `draft.draft`: hidden states are the nodes' own numbers, and layers do nothing."""
    work = Working(0, 7, DraftTree(3), torch.zeros(16, 1))

    class Made:
        device = torch.device("cpu")

        def embed(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.arange(len(work.reached), len(work.reached) + len(tokens)).unsqueeze(1).float()

    def head(exit_layer: int):  # type: ignore[no-untyped-def]
        def speak(hidden: torch.Tensor) -> torch.Tensor:
            paths = [tuple(work.tree.path_tokens(int(node))) for node in hidden[:, 0]]
            return torch.stack([logits_of(path, exit_layer, salt, nan_at) for path in paths])

        return speak

    def rank(guesses: eager.Guesses, at: int, path: tuple[int, ...], count: int) -> list[tuple[int, float]]:
        return [(int(guesses.logits[at].argmax()), 0.0)]

    work.embed_new(Made())  # type: ignore[arg-type]
    gates = {e: Gate(stop, stop) for e, stop in zip(chain.exits, chain.stops, strict=True)}
    confidence = "path" if chain.by_path else "entropy"
    policy = DraftPolicy(chain.exits, gates, max_depth=chain.length, branch=1, confidence=confidence)
    monkeypatch.setattr(eager, "advance", lambda *_: None)
    heads = {e: head(e) for e in chain.exits}
    rows = [DraftRow(work, depth, rank)]
    refused = eager.draft(Made(), None, rows, heads, policy, RowTiles())  # type: ignore[arg-type]
    return work.tree, refused[0]


def whole(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def answer(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As `lm_head` leaves it, greedily: best values and ids, and stats, of tiles of 4 columns. NaN shows in the best
    value alone."""
    parts = torch.nn.functional.pad(logits, (0, -VOCAB % TILE), value=-INF).view(-1, TILE)
    wrong = parts.isnan().any(1)
    parts = parts.nan_to_num(nan=-INF, neginf=-INF)
    top = parts.amax(1)
    weights = (parts - top.unsqueeze(1)).exp()
    value = torch.where(wrong, torch.tensor(INF), top)
    ids = torch.where(wrong, -1, parts.argmax(1) + TILE * torch.arange(len(parts)))
    stats = torch.stack([top, weights.sum(1), (weights * parts.clamp_min(-1e30)).sum(1)])
    return value, ids.int(), stats


def grow(run, chain, salts, sequences, asked, trees, rows, ids, width, nan_at=None):  # type: ignore[no-untyped-def]
    """Drive a round; the rows of every pass are checked on the way."""
    begin, add = run
    begin(chain, asked, sequences, trees, rows, ids, width)
    reached = [[0] * 16 for _ in salts]
    tiles = -(-VOCAB // TILE)
    for depth in range(chain.num_steps):
        for k, exit_layer in enumerate(chain.exits):
            best_value = torch.full((len(asked.rows), tiles), math.nan, device=DEVICE)
            best_id = torch.full(best_value.shape, -7, dtype=torch.int32, device=DEVICE)
            stats = torch.full((len(asked.rows), 3, tiles), math.nan, device=DEVICE)
            for b, salt in enumerate(salts):
                live = [i for i in range(width) if rows.live[b * width + i]]
                assert asked.runs[b] == bool(live) and (live or not asked.rows.live[b])
                assert chain.reached or asked.runs[b] == asked.rows.live[b]
                base = int(sequences.base[b])
                assert live in ([], [depth] if k == 0 else list(range(depth + 1)))
                for node in live:
                    r = b * width + node
                    assert k == 0 or reached[b][node] >= chain.exits[k - 1]
                    reached[b][node] = exit_layer
                    assert [int(t[r]) for t in (rows.sequence, rows.base)] == [b, base]
                    assert rows.position[r] == rows.slot[r] == base + node
                    assert rows.path[r].tolist() == [n if n <= node else 0 for n in range(16)]
                    assert ids[r] == trees.tokens[b, node]
                if not asked.rows.live[b]:
                    continue
                assert depth < chain.length and asked.source[b] == b * width + depth
                assert asked.rows.position[b] == base + depth and asked.rows.sequence[b] == b
                tokens = trees.tokens[b, 1 : depth + 1].tolist()
                value, own, own_stats = answer(logits_of(tuple(tokens), exit_layer, salt, nan_at))
                best_value[b], best_id[b], stats[b] = value, own, own_stats
            if depth < chain.length:
                add(depth, k, best_value, best_id, stats, chain, asked, sequences, trees, rows, ids, width)
    if len(chain.exits) == 1:  # verification goes on from there
        for b, layers in enumerate(reached):
            n = int(trees.count[b])
            assert layers == [chain.reached] * n + [0] * (16 - n)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("chain", CHAINS, ids=lambda c: f"{len(c.exits)} exits, {c.length}, {c.stops[-1]}")
@pytest.mark.hazard(14)
def test_chains_are_those_of_the_engine(run, chain, monkeypatch):  # type: ignore[no-untyped-def]
    """Sequences 1 and 4 are not active; 2 has room for two drafts, 3 for none."""
    salts, depths = [5, 6, 7, 8, 9, 10, 11, 12], [100, 100, 2, 0, 100, 100, 100, 100]
    base = whole(0, 9, 30, 2, 4, 1000, 3, 17)
    sequences = Sequences(whole(1, 0, 1, 1, 0, 1, 1, 1), base, base + 2 + whole(*depths))
    for width in (8, 16):
        rows, trees = Rows.empty(len(salts) * 16, DEVICE), Trees.empty(len(salts), DEVICE)
        asked = Asked.empty(
            whole(*[-9] * len(salts)), torch.full((len(salts), 16), -9, dtype=torch.int32, device=DEVICE)
        )
        for t in (trees.entropies, asked.nats):
            t.fill_(math.nan)
        for t in (trees.parents, trees.depths, trees.paths, trees.count, asked.rows.live, rows.path):
            t.fill_(-(10**6))
        trees.tokens.fill_(3)
        ids, lengths = torch.full_like(rows.live, -5), set()
        for round_salt, nan_at in ((0, None), (100, 2)):
            place = asked, trees, rows, ids, width, nan_at
            grow(run, chain, [round_salt + salt for salt in salts], sequences, *place)
            for b, salt in enumerate(salts):
                if not sequences.active[b]:
                    assert trees.count[b] == 0 and asked.num_refused[b] == 0
                    continue
                tree, refused = chain_of_the_engine(chain, round_salt + salt, depths[b], nan_at, monkeypatch)
                n = len(tree)
                lengths.add(n - 1)
                assert trees.count[b] == n and asked.num_refused[b] == refused
                assert trees.tokens[b, :n].tolist() == tree.tokens
                assert trees.parents[b, :n].tolist() == tree.parents and trees.depths[b, :n].tolist() == tree.depths
                assert trees.entropies[b, 1:n].tolist() == pytest.approx(tree.entropies[1:], rel=1e-4)
                assert asked.exits[b, 1:n].tolist() == tree.exit_layers[1:]
                assert trees.paths[b, :n].tolist() == [[i if i <= node else 0 for i in range(16)] for node in range(n)]
        assert len(lengths) > 1 or chain.stops == (-1.0,)


def test_what_a_draft_runs_is_counted() -> None:
    assert Chain((4,), (1.0,), 7).row_layers([4, 4], 1) == 0
    assert Chain((2, 5), (1.0, 2.0), 7).row_layers([2, 5, 2], 0) == 2 + (2 + 2 * 3) + 2
    assert Chain((2, 5), (1.0, 2.0), 7).row_layers([2], 1) == 2 + (2 + 2 * 3)
    assert not Chain((2,), (INF,), 3).gated and Chain((2, 3), (INF, 1.0), 3).gated


def test_what_does_not_fit_is_refused() -> None:
    for wrong, match in (
        (((), (), 2), "exits are"), (((3, 1), (1, 1), 2), "rising"), (((0,), (1,), 2), "from 1"),
        (((1, 2), (1,), 2), "1 stops"), (((1,), (1,), 16), "length 16"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            Chain(*wrong)
    rows, trees, chain = Rows.empty(16, DEVICE), Trees.empty(1, DEVICE), Chain((1, 2), (INF, INF), 4)
    asked, sequences = Asked.empty(whole(0), trees.parents), Sequences(whole(1), whole(4), whole(90))
    for width in (1, 4, 3, 32):
        with pytest.raises(ValueError, match=f"width {width}"):
            begin_chain(chain, asked, sequences, trees, rows, rows.live, width)
    tiles = torch.zeros(16, 3, device=DEVICE)
    with pytest.raises(ValueError, match="depth 4"):
        grow_chain(4, 0, tiles, tiles, tiles, chain, asked, sequences, trees, rows, rows.live, 8)
    with pytest.raises(ValueError, match="same rows"):
        grow_chain(0, 0, tiles, tiles, tiles, chain, asked, sequences, trees, rows, rows.live, 8)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [48, 64, 577])
def test_what_an_adapter_reads(width: int, dtype: torch.dtype) -> None:
    """Rows out of order, some not live; tolerance: one rounding to the dtype (the interpreter cuts bf16 off), fp32 sums
    in another order."""
    torch.manual_seed(0)
    hidden = torch.randn(40, width, device=DEVICE) * 7
    norm, gain = torch.randn(2, width, device=DEVICE).unbind()
    source = torch.randperm(40, device=DEVICE)[:16].int()
    rows = Rows.empty(16, DEVICE)
    rows.live[[0, 3, 15]] = 1
    x = torch.full((16, width), math.nan, dtype=dtype, device=DEVICE)
    stats, y = torch.full((16, 2, 1), math.nan, device=DEVICE), torch.full((16, width), math.nan, device=DEVICE)
    adapter_rows(hidden, source, norm, gain, rows, x, stats, y)
    expected = adapter_rows_reference(hidden, source, norm, gain)
    live = rows.live.bool()
    scale = 2.0**-4 if dtype == torch.float16 else 1.0
    rtol = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(x[live].float(), expected[0][live] * scale, rtol=rtol, atol=1e-6)
    torch.testing.assert_close(stats[live], expected[1][live], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(y[live], expected[2][live], rtol=1e-5, atol=1e-6)
    assert all(t[~live].isnan().all() for t in (x, stats, y))
    with pytest.raises(ValueError, match="expected 16 rows"):
        adapter_rows(hidden, source, norm, gain, rows, x[:15], stats, y)
