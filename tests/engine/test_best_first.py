"""Best-first drafting against a brute-force search over all paths, with a head that is a function of the path.

The memory is the real class's interface with a made-up head behind it: an entry's output is the number of its path, and
logits are random numbers of that path. Planted bugs seen to fail here: children ranked by their own probability instead
of their path's; drafting that ends one step early; a node that the gate refuses expanded all the same.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from skipstone.engine.best_first import best_first
from skipstone.engine.draft import DraftRow, largest, read
from skipstone.engine.forward import Working
from skipstone.engine.gate import DraftPolicy, Gate, fixed_exit
from skipstone.engine.gate import best_first as shaped
from skipstone.engine.head_memory import Paths
from skipstone.engine.tree import DraftTree

VOCAB = 11


def logits_of(path, sharpness):
    generator = torch.Generator().manual_seed(hash((5, *path)) % 2**31)
    return torch.randn(VOCAB, generator=generator) * sharpness


class MadeUp:
    """A decoder, a memory and a head in one: hidden states are token ids, outputs are places in `self.known`."""

    def __init__(self, sharpness):
        self.sharpness, self.device, self.head = sharpness, torch.device("cpu"), self
        self.known, self.calls = [], []
        self.places = {}

    def embed(self, tokens):
        return tokens.unsqueeze(1).float()

    def open(self, works):
        opened = []
        for work in works:
            self.places[work.sequence] = [()]
            opened.append(Paths(work.sequence, work.base, [[0]]))
        return opened

    def grow(self, level, hidden):
        tokens = iter(hidden[:, 0].long().tolist())
        self.calls.append([len(parents) for _, parents in level])
        for own, parents in level:
            for parent in parents:
                self.places[own.sequence].append((*self.places[own.sequence][parent], next(tokens)))

    def outputs(self, level):
        paths = [self.places[own.sequence][place] for own, places in level for place in places]
        self.known = [*self.known, *paths]
        return torch.arange(len(self.known) - len(paths), len(self.known)).unsqueeze(1)

    def draft_logits(self, out):
        return torch.stack([logits_of(self.known[row], self.sharpness) for row in out[:, 0].tolist()])


def row(depth=100, sequence=0):
    work = Working(sequence, 7, DraftTree(3), torch.zeros(16, 1))
    work.embed_new(MadeUp(1.0))
    return DraftRow(work, depth, lambda guesses, at, path, count: guesses.best[at][:count])


def found(made, policy, rows):
    stops = best_first(made, rows, made, policy)
    trees = [{tuple(r.work.tree.path_tokens(node)) for node in range(1, len(r.work.tree))} for r in rows]
    return trees, stops


def brute_force(sharpness, depth, branch, count, high=math.inf):
    """The `count` likeliest paths, and of how many nodes on the way the gate gets to refuse any."""
    paths, level = [], [((), 0.0)]
    for _ in range(depth):
        grown = []
        for path, log_prob in level:
            log_probs = logits_of(path, sharpness).log_softmax(-1)
            if float(-(log_probs.exp() * log_probs).sum()) >= high:
                continue
            best = log_probs.topk(branch)
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            grown += [((*path, token), log_prob + own) for token, own in pairs]
        paths += grown
        level = grown
    paths.sort(key=lambda pair: -pair[1])
    return {path for path, _ in paths[:count]}


@pytest.mark.parametrize("sharpness", [0.5, 3.0])
@pytest.mark.parametrize("high", [math.inf, 1.7])
@pytest.mark.parametrize(("depth", "branch", "count"), [(1, 4, 15), (3, 3, 15), (4, 2, 7), (4, 3, 1)])
def test_a_wide_beam_finds_the_likeliest_paths(sharpness, high, depth, branch, count):
    made = MadeUp(sharpness)
    policy = shaped(beam=100, branch=branch, max_depth=depth, max_nodes=count, stop=high)
    (tree,), _ = found(made, policy, [row()])
    assert tree == brute_force(sharpness, depth, branch, count, high)


@pytest.mark.parametrize("beam", [1, 2, 4])
def test_a_narrow_beam_expands_no_more_than_it_may(beam):
    made = MadeUp(1.0)
    (tree,), _ = found(made, shaped(beam=beam, branch=3, max_depth=6), [row()])
    assert all(width <= beam for widths in made.calls for width in widths) and len(made.calls) <= 5
    assert len(tree) <= 15 and all(path[:-1] in tree or len(path) == 1 for path in tree)


def test_drafting_ends_when_no_child_can_enter():
    """One sharp chain of three nodes is full at once; steps beyond it could not change the tree."""
    made = MadeUp(50.0)
    trees, _ = found(made, shaped(beam=4, branch=4, max_depth=9, max_nodes=3), [row()])
    assert trees[0] == brute_force(50.0, 4, 4, 3)
    assert len(made.calls) < 8


def test_rows_of_a_batch_grow_as_if_alone():
    alone = [found(MadeUp(1.0), shaped(beam=3, branch=3), [row(depth, i)])[0][0] for i, depth in enumerate((9, 0, 2))]
    trees, _ = found(MadeUp(1.0), shaped(beam=3, branch=3), [row(depth, i) for i, depth in enumerate((9, 0, 2))])
    assert trees == alone
    assert trees[1] == set() and max(map(len, trees[2])) == 2


def test_the_gate_counts_what_it_refuses():
    made = MadeUp(1.0)
    trees, stops = found(made, shaped(stop=0.1), [row()])
    assert trees == [set()] and stops == [1] and made.calls == []


@pytest.mark.hazard(14)
def test_a_head_that_is_not_finite_gets_no_children():
    made, clean = MadeUp(1.0), logits_of
    bad = max(brute_force(1.0, 1, 3, 1))
    made.draft_logits = lambda out: torch.stack(
        [clean(path, 1.0) * (math.nan if path == bad else 1.0) for path in (made.known[i] for i in out[:, 0].tolist())]
    )
    (tree,), stops = found(made, shaped(beam=4, branch=3, max_depth=3), [row()])
    assert bad in tree and not any(path[:1] == bad and len(path) > 1 for path in tree)
    assert stops == [1] and len(tree) == 15


@pytest.mark.parametrize("max_nodes", [0, 1, 15])
def test_budgets(max_nodes):
    (tree,), _ = found(MadeUp(1.0), shaped(max_nodes=max_nodes), [row()])
    assert len(tree) == max_nodes


def test_only_a_head_without_trunk_layers_drafts_so():
    with pytest.raises(ValueError, match=r"beam is 2 for exits \(3,\)"):
        DraftPolicy((3,), {3: Gate(0.0, 1.0)}, beam=2)
    assert fixed_exit(0, 4).beam == 0


@pytest.mark.parametrize(("size", "count"), [(64, 1), (640, 4), (199, 3), (128, 2), (128, 4)])
def test_largest_entries(size, count):
    """Two stages where blocks fit, one where they do not; several of the largest in one block."""
    x = torch.randn(5, size, generator=torch.Generator().manual_seed(size))
    x[0, 3:7] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    values, indices = largest(x, count)
    expected = x.sort(descending=True)
    assert torch.equal(values, expected.values[:, :count]) and torch.equal(indices, expected.indices[:, :count])


def test_guesses_are_token_ids_with_their_probabilities():
    logits = torch.tensor([[0.0, 2.0, 1.0], [math.nan, 0.0, 0.0]])
    guesses = read(logits, 2, torch.tensor([5, 151_935, 16_777_215]))
    log_probs = logits[0].log_softmax(-1).tolist()
    assert [token for token, _ in guesses.best[0]] == [151_935, 16_777_215]
    assert [p for _, p in guesses.best[0]] == pytest.approx([log_probs[1], log_probs[2]])
    assert math.isnan(guesses.entropies[1])
    assert guesses.entropies[0] == pytest.approx(-sum(math.exp(p) * p for p in log_probs))


def test_paths_number_their_entries():
    own = Paths(0, 4, [[0], [0, 1], [0, 2], [0, 1, 3]])
    assert [own.depth(place) for place in range(4)] == [0, 1, 1, 2]
    assert list(itertools.chain(*own.paths[3:])) == [0, 1, 3]
