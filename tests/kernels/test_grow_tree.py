"""Best-first trees in device memory, against `engine/best_first.py` and the reference, with a made-up head that is a
function of the path.

Regimes: chains and trees, one step and six, beams of 1 to 5 (also no power of two), 1 to 40 children a step; more
nodes than candidates and fewer; gates that refuse some nodes; NaN entropies; missing candidates; equal log-
probabilities; sequences at their ends, inactive ones and such in between; a second round in the first one's memory.
Planted bugs that these tests were seen to catch: children ranked by their own probability, ties to the later
candidate, one draft more than the budget, a NaN entropy trusted, candidates expanded twice, a row or a candidate too
many, paths one node short, rows a beam apart instead of a width.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from skipstone.engine import best_first as eager
from skipstone.engine.draft import DraftRow, read
from skipstone.engine.forward import Working
from skipstone.engine.gate import best_first as shaped
from skipstone.engine.head_memory import Paths
from skipstone.engine.tree import DraftTree
from skipstone.kernels.grow_tree import Pool, Sequences, Shape, Trees, grow_tree, grow_tree_reference

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
VOCAB = 11
SHAPES = [
    Shape(1, 1, 1, 1),
    Shape(1, 1, 3, 3),
    Shape(1, 1, 6, 4, stop=2.0),
    Shape(4, 4, 1, 15),
    Shape(4, 4, 6, 15),
    Shape(4, 3, 6, 15, stop=1.9),
    Shape(3, 2, 4, 7, stop=2.1),
    Shape(5, 8, 3, 15),
    Shape(2, 3, 5, 1),
]


def logits_of(path, salt, tied):
    """Random, or of so few values that log-probabilities repeat."""
    generator = torch.Generator().manual_seed(hash((salt, *path)) % 2**31)
    logits = torch.randn(VOCAB, generator=generator) * 1.5
    if tied:
        return torch.full((VOCAB,), -math.inf).index_fill_(0, logits.topk(4).indices, 0.0)
    return logits


def answers(paths, salt, shape, tied, nan_at=None):
    """What a head says after these paths: tokens, log-probabilities, entropies."""
    rows = torch.stack([logits_of(path, salt, tied) for path in paths])
    for i, path in enumerate(paths):
        if nan_at is not None and len(path) == nan_at:
            rows[i] *= math.nan
    return read(rows, shape.branch)


class MadeUp:
    """Decoder, memory and head of `best_first` in one: outputs are numbers of known paths."""

    def __init__(self, salt, tied, nan_at):
        self.salt, self.tied, self.nan_at = salt, tied, nan_at
        self.head, self.device, self.known, self.places = self, torch.device("cpu"), [], {}

    def embed(self, tokens):
        return tokens.unsqueeze(1).float()

    def open(self, works):
        self.places = {work.sequence: [()] for work in works}
        return [Paths(work.sequence, work.base, [[0]]) for work in works]

    def grow(self, level, hidden):
        tokens = iter(hidden[:, 0].long().tolist())
        for own, parents in level:
            own.paths += [[0]] * len(parents)
            for parent in parents:
                self.places[own.sequence].append((*self.places[own.sequence][parent], next(tokens)))

    def outputs(self, level):
        self.known += [self.places[own.sequence][place] for own, places in level for place in places]
        return torch.arange(len(self.known) - sum(len(p) for _, p in level), len(self.known)).unsqueeze(1)

    def draft_logits(self, out):
        paths = [self.known[i] for i in out[:, 0].tolist()]
        rows = [logits_of(p, self.salt, self.tied) * (math.nan if len(p) == self.nan_at else 1.0) for p in paths]
        return torch.stack(rows)


def grown_by_the_engine(shape, salt, depth, tied=False, nan_at=None):
    made = MadeUp(salt, tied, nan_at)
    work = Working(0, 7, DraftTree(3), torch.zeros(16, 1))
    work.embed_new(made)

    def rank(guesses, at, path, count):
        return [pair for pair in guesses.best[at][:count] if pair[1] > -math.inf]

    policy = shaped(shape.beam, shape.branch, shape.max_depth, shape.max_nodes, stop=shape.stop)
    refused = eager.best_first(made, [DraftRow(work, depth, rank)], made, policy)
    return work.tree, refused[0]


def grow(run, shape, salts, sequences, pool, trees, tied=False, nan_at=None, depth=None):
    """Drive `grow_tree` with the made-up head."""
    num, spoken = len(salts), {}
    for step in range(depth or shape.max_depth):
        width, num_rows = (1, -(-num // 16) * 16) if step == 0 else (shape.width, len(pool.rows))
        tokens = torch.full((num_rows, shape.branch), 10**6, dtype=torch.int32)
        log_probs, entropies = torch.full(tokens.shape, math.nan), torch.full((num_rows,), math.nan)
        for b, salt in enumerate(salts):
            for i in range(width):
                r = b * width + i
                if step == 0:
                    path = ()
                elif pool.rows.live[r]:
                    nodes = pool.rows.path[r, 1 : pool.rows.position[r] - pool.rows.base[r] + 1].tolist()
                    assert nodes[-1] == pool.rows.slot[r] - pool.rows.base[r]
                    path = tuple(spoken[b, place] for place in nodes[:-1]) + (int(pool.tokens_of_rows[r]),)
                    spoken[b, nodes[-1]] = path[-1]
                    above = nodes[-2] if len(nodes) > 1 else 0
                    assert pool.parents_of_rows[r] == above
                    assert pool.rows.sequence[r] == b and pool.rows.base[r] == sequences.base[b]
                else:
                    continue
                guesses = answers([path], salt, shape, tied, nan_at)
                best = [pair for pair in guesses.best[0] if pair[1] > -math.inf]
                tokens[r], log_probs[r], entropies[r] = -1, -math.inf, guesses.entropies[0]
                for c, (token, log_prob) in enumerate(best):
                    tokens[r, c], log_probs[r, c] = token, log_prob
        run(step, *(t.to(DEVICE) for t in (tokens, log_probs, entropies)), pool, sequences, trees, depth)


def whole(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def poisoned(shape, num):
    """A pool and trees in which everything that must be written first holds nonsense."""
    pool, trees = Pool.empty(num, shape, DEVICE), Trees.empty(num, DEVICE)
    for t in (pool.values, pool.log_probs_of_rows, trees.entropies):
        t.fill_(math.nan)
    for t in (pool.kept, pool.num_refused, pool.tokens_of_rows, trees.parents, trees.depths, trees.paths, trees.count):
        t.fill_(-(10**6))
    trees.tokens.fill_(-5)
    return pool, trees


RUNS = [grow_tree_reference, pytest.param(grow_tree, marks=pytest.mark.triton)]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.beam}x{s.branch}x{s.max_depth}-{s.max_nodes}")
def test_trees_are_those_of_the_engine(run, shape, tied):
    """Sequences 1 and 4 are not active; 2 has room for two drafts, 3 for none. The first round has fewer steps."""
    salts, depths = [5, 6, 7, 8, 9, 10], [100, 100, 2, 0, 100, 100]
    base = whole(0, 9, 30, 2, 4, 1000)
    end = base + 2 + torch.tensor(depths, dtype=torch.int32, device=DEVICE)
    sequences = Sequences(whole(1, 0, 1, 1, 0, 1), base, end)
    pool, trees = poisoned(shape, len(salts))
    for round_salt, depth in ((0, max(1, shape.max_depth // 2)), (100, None)):
        own = shape if depth is None else dataclasses.replace(shape, max_depth=depth)
        grow(run, shape, [round_salt + s for s in salts], sequences, pool, trees, tied, depth=depth)
        for b, salt in enumerate(salts):
            if not sequences.active[b]:
                assert trees.count[b] == 0 and pool.num_refused[b] == 0
                continue
            tree, refused = grown_by_the_engine(own, round_salt + salt, depths[b], tied)
            n = len(tree)
            assert trees.count[b] == n and pool.num_refused[b] == refused
            assert trees.tokens[b, 1:n].tolist() == tree.tokens[1:] and trees.tokens[b, 0] == -5
            assert trees.parents[b, :n].tolist() == tree.parents and trees.depths[b, :n].tolist() == tree.depths
            assert trees.entropies[b, 1:n].tolist() == pytest.approx(tree.entropies[1:])
            table = [[node if node >= 0 else 0 for node in row] for row in tree.ancestor_table(16).tolist()]
            assert trees.paths[b].tolist() == table[:n] + [[0] * 16] * (16 - n)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.hazard(14)
def test_a_head_that_is_not_finite_gets_no_children(run):
    shape = Shape(3, 3, 4, 15)
    sequences = Sequences(whole(1), whole(3), whole(99))
    pool, trees = poisoned(shape, 1)
    grow(run, shape, [1], sequences, pool, trees, nan_at=1)
    tree, refused = grown_by_the_engine(shape, 1, 100, nan_at=1)
    assert trees.count.tolist() == [len(tree)] == [4] and pool.num_refused.tolist() == [refused] == [3]
    assert trees.depths[0].tolist() == [0, 1, 1, 1] + [0] * 12


def test_shapes_and_inputs_are_checked():
    for change, match in (
        ({"beam": 17}, "beam is 17"),
        ({"branch": 9}, "branch 9"),
        ({"max_depth": 16}, "max_depth is 16"),
        ({"max_nodes": 0}, "max_nodes 0"),
        ({"beam": 7, "branch": 7}, "children"),
    ):
        with pytest.raises(ValueError, match=match):
            dataclasses.replace(Shape(2, 2, 4, 8), **change)
    shape = Shape(1, 2, 2, 3)
    pool, trees, sequences = Pool.empty(1, shape, "cpu"), Trees.empty(1, "cpu"), Sequences(*[whole(1)] * 3)
    tokens = torch.zeros(16, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="step is 2"):
        grow_tree(2, tokens, tokens.float(), torch.zeros(16), pool, sequences, trees)
    with pytest.raises(ValueError, match="expected 2 a row"):
        grow_tree(0, tokens[:, :1], tokens[:, :1].float(), torch.zeros(16), pool, sequences, trees)
    with pytest.raises(ValueError, match=r"tokens are torch\.int64"):
        grow_tree(0, tokens.long(), tokens.float(), torch.zeros(16), pool, sequences, trees)
