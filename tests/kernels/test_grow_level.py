"""Chains and trees in device memory against the reference and `engine/draft.py`, with made-up heads that are functions
of a node's path.

Regimes: one exit and three; chains, and trees of two to four children that fill up in the middle of a level, at its end
or never; no gate, gates by entropy and by path that stop some at once and some late; NaN; heads with fewer tokens than
a node may have children; sequences at their ends, inactive ones and such in between; a second round in the first one's
memory; in verification's rows, and apart in a level's. Planted bugs that these tests were seen to catch: an ancestor
not live at a deeper exit, a path's measure without what is above, a refused node counted at every exit, a tree that is
full and still asks, one node too few, places of children that count too much, a node not on its own path, lanes taken
for nodes, a certain node that branches, a token more than the budget, tokens that are none, lanes of the level before,
rows that are not counted, a last level that does not run, positions by node. Drafts apart from verification, in the
rows of a level: a sure node that does not run on to the next exit, rows of the level before that stay, an answer read
from a node's place.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from skipstone.engine import draft as eager
from skipstone.engine.draft import DraftRow
from skipstone.engine.forward import RowTiles, Working
from skipstone.engine.gate import DraftPolicy, Gate
from skipstone.engine.tree import DraftTree
from skipstone.kernels.adapter_rows import adapter_rows, adapter_rows_reference
from skipstone.kernels.grow_level import (
    Asked,
    Levels,
    begin_levels,
    begin_levels_reference,
    grow_level,
    grow_level_reference,
)
from skipstone.kernels.grow_tree import Sequences, Trees
from skipstone.kernels.rows import Rows

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
VOCAB = 11
INF, ONE = math.inf, (1.0, 1.0)


def chain(exits: tuple[int, ...], stops: tuple[float, ...], length: int, by_path: bool = False) -> Levels:
    return Levels(exits, tuple((stop, stop) for stop in stops), 1, length, length, by_path)


SHAPES = {
    "one exit, no gate": chain((2,), (INF,), 3),
    "one exit": chain((1,), (1.9,), 5),
    "three exits": chain((1, 2, 4), (1.3, 1.5, 1.7), 7),
    "two exits by path": chain((1, 3), (4.0, 6.0), 6, by_path=True),
    "refused at once": chain((3,), (-1.0,), 4),
    "tree": Levels((2,), ((1.2, 2.0),), 2, 5, 15),
    "tree of all": Levels((1,), ((-INF, INF),), 2, 4, 15),
    "wide tree, full in a level": Levels((3,), ((1.3, 2.1),), 4, 6, 13),
    "small tree": Levels((1,), ((1.0, 2.2),), 3, 3, 5),
    "tree of three exits": Levels((1, 2, 4), ((0.9, 1.4), (1.1, 1.6), (1.2, 1.9)), 3, 6, 15),
    "tree of two exits by path": Levels((1, 3), ((1.5, 4.0), (2.0, 6.0)), 3, 6, 14, True),
    "one level": Levels((1, 2), ((1.0, 1.6), (1.0, 1.9)), 3, 1, 3),
}
SHAPES |= {
    f"{name}, apart": replace(SHAPES[name], apart=True)
    for name in ("one exit", "three exits", "two exits by path", "small tree", "tree of three exits", "one level")
}


def any_levels(seed: int) -> Levels:
    draw = random.Random(seed)
    exits = tuple(sorted(draw.sample(range(1, 9), draw.choice([1, 1, 2, 3]))))
    by_path, gates = draw.random() < 0.4, []
    for _ in exits:
        low = draw.choice([-INF, draw.uniform(0.5, 2.0) * (2.5 if by_path else 1.0)])
        high = draw.choice([INF, draw.uniform(1.0, 2.5), max(low, 0.0) + draw.uniform(0.0, 1.5)])
        gates.append((low, max(low, high)))
    max_nodes = draw.randint(1, 15)
    return Levels(exits, tuple(gates), draw.randint(1, 8), draw.randint(1, max_nodes), max_nodes, by_path)


RUNS = [
    (begin_levels_reference, grow_level_reference),
    pytest.param((begin_levels, grow_level), marks=pytest.mark.triton),
]


def logits_of(path: tuple[int, ...], exit_layer: int, salt: int, nan_at: int | None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hash((salt, exit_layer, *path)) % 2**31)
    logits = torch.randn(VOCAB, generator=generator) * 2.0
    if len(path) % 3 == 2 and sum(path) % 2:
        logits[logits < logits.topk(2).values[-1]] = -INF  # two tokens left
    if len(path) == nan_at:
        logits[4] = math.nan
    return logits


def tree_of_the_engine(
    levels: Levels, salt: int, depth: int, nan_at: int | None, monkeypatch: pytest.MonkeyPatch
) -> tuple[DraftTree, int, list[tuple[int, set[int]]]]:
    """By `draft.draft`, with the nodes of every pass: hidden states are the nodes' own numbers, and layers do
    nothing."""
    work = Working(0, 7, DraftTree(3), torch.zeros(16, 1))
    passes: list[tuple[int, set[int]]] = []

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
        return [(token, own) for token, own in guesses.best[at][:count] if own > -INF]

    def advance(decoder, cache, needed, stop, tiles) -> None:  # type: ignore[no-untyped-def]
        passes.append((stop, set(needed[0][1])))

    work.embed_new(Made())  # type: ignore[arg-type]
    gates = {e: Gate(*gate) for e, gate in zip(levels.exits, levels.gates, strict=True)}
    policy = DraftPolicy(
        levels.exits, gates, max_depth=levels.max_depth, max_nodes=levels.max_nodes, branch=levels.branch,
        confidence="path" if levels.by_path else "entropy",
    )  # fmt: skip
    monkeypatch.setattr(eager, "advance", advance)
    heads = {e: head(e) for e in levels.exits}
    rows = [DraftRow(work, depth, rank)]
    refused = eager.draft(Made(), None, rows, heads, policy, RowTiles())  # type: ignore[arg-type]
    return work.tree, refused[0], passes


def whole(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def answer(logits: torch.Tensor, branch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `top_candidates` leaves it, greedily. With NaN, tokens mean nothing."""
    if logits.isnan().any():
        return torch.full((branch,), 5), torch.tensor(math.nan), torch.tensor(math.nan)
    log_probs = logits.log_softmax(-1)
    best = log_probs.sort(descending=True, stable=True)
    tokens = torch.where(best.values > -INF, best.indices, -1)[:branch]
    return tokens, eager.entropy(logits.unsqueeze(0))[0], -best.values[0]


def grow(run, levels, salts, sequences, asked, trees, rows, ids, width, nan_at=None):  # type: ignore[no-untyped-def]
    """Drive a round; the rows of every pass are checked on the way. Returns of each sequence the passes that ask (exit
    layer, nodes asked about and those on their paths), as the engine has them, and the layers of rows that ran."""
    begin, add = run
    begin(levels, asked, sequences, trees, rows, ids, width)
    reached = [[0] * 16 for _ in salts]
    passes: list[list[tuple[int, set[int]]]] = [[] for _ in salts]
    ran = [0] * len(salts)
    size = len(asked.rows)
    for depth in range(levels.num_steps):
        for k, exit_layer in enumerate(levels.exits):
            tokens = torch.full((size, levels.branch), -7, dtype=torch.int32, device=DEVICE)
            entropies, surprisals = torch.full((2, size), math.nan, device=DEVICE).unbind()
            for b, salt in enumerate(salts):
                lanes = [r for r in range(b * levels.lanes, (b + 1) * levels.lanes) if asked.rows.live[r]]
                level = [i for i in range(int(trees.count[b])) if trees.depths[b, i] == depth]
                at = {node: i for i, node in enumerate(level)} if levels.apart else {i: i for i in range(16)}
                live = [node for node, place in at.items() if place < width and rows.live[b * width + place]]
                asks = [node for r in lanes for node, place in at.items() if asked.source[r] == b * width + place]
                assert asked.runs[b] == bool(live) and (live or not asks)
                assert levels.reached or bool(live) == bool(asks) or (levels.apart and k and live)
                base = int(sequences.base[b])
                on_paths = {node for ask in asks for node in trees.paths[b, ask, : depth + 1].tolist()}
                if levels.apart:  # those that are asked first run on
                    assert live == (level if asks else []) if k == 0 else set(asks) <= set(live)
                else:
                    assert live == (sorted(on_paths) if k else level if asks or levels.reached else [])
                if asks:
                    passes[b].append((exit_layer, on_paths))
                ran[b] += len(live) * (exit_layer - (levels.exits[k - 1] if k else 0))
                for node in live:
                    r = b * width + at[node]
                    assert k == 0 or reached[b][node] >= levels.exits[k - 1]
                    reached[b][node] = exit_layer
                    assert [int(t[r]) for t in (rows.sequence, rows.base)] == [b, base]
                    assert rows.position[r] == base + trees.depths[b, node] and rows.slot[r] == base + node
                    assert rows.path[r].tolist() == trees.paths[b, node].tolist()
                    assert ids[r] == trees.tokens[b, node]
                for r, node in zip(lanes, asks, strict=True):
                    assert depth < levels.max_depth and node in level
                    assert asked.rows.position[r] == base + depth and asked.rows.sequence[r] == b
                    path = [int(trees.tokens[b, i]) for i in trees.paths[b, node, 1 : depth + 1]]
                    answers = answer(logits_of(tuple(path), exit_layer, salt, nan_at), levels.branch)
                    tokens[r], entropies[r], surprisals[r] = answers
            if depth < levels.max_depth:
                place = levels, asked, sequences, trees, rows, ids, width
                add(depth, k, tokens, entropies, surprisals, *place)
    for b, layers in enumerate(reached):
        n = int(trees.count[b])
        if levels.reached:  # verification goes on from there
            assert layers == [levels.reached] * n + [0] * (16 - n)
        elif levels.apart:  # what was asked about has been everywhere, so its keys are there for what is below
            assert set(layers) <= {0, levels.exits[-1]}
            assert all(layers[int(trees.parents[b, node])] for node in range(1, n))
    return passes, ran


def check(run, levels: Levels, monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, ...]]:  # type: ignore[no-untyped-def]
    """Two rounds of eight sequences, and the parents of all trees that were seen. Sequences 1 and 4 are not active; 2
    has room for two drafts, 3 for none."""
    salts, depths = [5, 6, 7, 8, 9, 10, 11, 12], [100, 100, 2, 0, 100, 100, 100, 100]
    base = whole(0, 9, 30, 2, 4, 1000, 3, 17)
    sequences = Sequences(whole(1, 0, 1, 1, 0, 1, 1, 1), base, base + 2 + whole(*depths))
    shapes = set()
    for width in (levels.lanes,) if levels.apart else (8, 16) if levels.max_nodes < 8 else (16,):
        rows, trees = Rows.empty(len(salts) * 16, DEVICE), Trees.empty(len(salts), DEVICE)
        stale = torch.full((len(salts), 16), -9, dtype=torch.int32, device=DEVICE)
        asked = Asked.empty(levels.lanes, whole(*[-9] * len(salts)), stale, whole(*[-9] * len(salts)))
        for t in (trees.entropies, asked.nats):
            t.fill_(math.nan)
        for t in (trees.parents, trees.depths, trees.paths, trees.count, asked.rows.live, rows.path):
            t.fill_(-(10**6))
        trees.tokens.fill_(3)
        ids = torch.full_like(rows.live, -5)
        for round_salt, nan_at in ((0, None), (100, 2)):
            place = asked, trees, rows, ids, width, nan_at
            passes, ran = grow(run, levels, [round_salt + salt for salt in salts], sequences, *place)
            for b, salt in enumerate(salts):
                if not sequences.active[b]:
                    assert trees.count[b] == 0 and asked.num_refused[b] == 0
                    continue
                tree, refused, expected = tree_of_the_engine(levels, round_salt + salt, depths[b], nan_at, monkeypatch)
                n = len(tree)
                shapes.add(tuple(tree.parents))
                assert trees.count[b] == n and asked.num_refused[b] == refused
                assert trees.tokens[b, :n].tolist() == tree.tokens
                assert trees.parents[b, :n].tolist() == tree.parents and trees.depths[b, :n].tolist() == tree.depths
                assert trees.entropies[b, 1:n].tolist() == pytest.approx(tree.entropies[1:], rel=1e-4)
                assert asked.exits[b, 1:n].tolist() == tree.exit_layers[1:]
                paths = [[*tree.path(node), *[0] * (15 - tree.depths[node])] for node in range(n)]
                assert trees.paths[b, :n].tolist() == paths
                assert passes[b] == expected
                assert asked.row_layers[b] == ran[b]
    return shapes


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.hazard(14)
def test_trees_are_those_of_the_engine(run, name, monkeypatch):  # type: ignore[no-untyped-def]
    shapes = check(run, SHAPES[name], monkeypatch)
    assert len(shapes) > (1 if SHAPES[name].branch == 1 else 2) or name == "refused at once"


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("seed", range(6))
def test_trees_of_any_shape_are_those_of_the_engine(run, seed, monkeypatch):  # type: ignore[no-untyped-def]
    check(run, any_levels(seed), monkeypatch)


def test_what_does_not_fit_is_refused() -> None:
    for wrong, match in (
        (((), (), 1, 2, 2), "exits are"), (((3, 1), (ONE, ONE), 1, 2, 2), "rising"),
        (((0,), (ONE,), 1, 2, 2), "from 1"), (((1, 2), (ONE,), 1, 2, 2), "2 exits"),
        (((1,), ((2.0, 1.0),), 1, 2, 2), "gates are"),
        (((1,), (ONE,), 9, 2, 9), "branch is 9"), (((1,), (ONE,), 2, 3, 2), "max_depth 3"),
        (((1,), (ONE,), 1, 16, 16), "max_nodes 16"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            Levels(*wrong)
    rows, trees, levels = Rows.empty(16, DEVICE), Trees.empty(1, DEVICE), chain((1, 2), (INF, INF), 4)
    asked, sequences = Asked.empty(1, whole(0), trees.parents, whole(0)), Sequences(whole(1), whole(4), whole(90))
    for width in (1, 4, 3, 32):
        with pytest.raises(ValueError, match=f"width {width}"):
            begin_levels(levels, asked, sequences, trees, rows, rows.live, width)
    nats, tokens = torch.zeros(16, device=DEVICE), torch.zeros(16, 1, dtype=torch.int32, device=DEVICE)
    place = levels, asked, sequences, trees, rows, rows.live, 8
    with pytest.raises(ValueError, match="depth 4"):
        grow_level(4, 0, tokens, nats, nats, *place)
    with pytest.raises(ValueError, match="16 rows of 1 tokens"):
        grow_level(0, 0, tokens.view(8, 2), nats, nats, *place)
    many = Sequences(*whole(*[1] * 17).expand(3, 17).unbind())
    with pytest.raises(ValueError, match="rows are asked"):
        begin_levels(levels, asked, many, trees, Rows.empty(144, DEVICE), rows.live, 8)


def test_what_depends_on_the_shape() -> None:
    assert not chain((2,), (INF,), 3).gated and chain((2, 3), (INF, 1.0), 3).gated
    assert Levels((2,), ((1.0, INF),), 2, 3, 13).gated, "it may be full early"
    assert not Levels((2,), ((1.0, INF),), 2, 3, 14).gated
    for branch, depth, nodes, lanes in ((1, 7, 7, 1), (2, 3, 15, 4), (3, 3, 15, 16), (3, 3, 5, 8), (4, 1, 4, 1)):
        assert Levels((2,), (ONE,), branch, depth, nodes).lanes == lanes


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
