"""Acceptance on the device against the walk of `engine/tree.py`.

Regimes: random trees of 1 to 16 nodes (chains of 15, stars, mixed), targets that accept nothing, some and everything;
widths 1, 2, 8 and 16; sequences without a tree or not active between others; stops at, before and after `min_end`, in
the last place before `end` and beyond it; the end reached by an accepted token and by the bonus; no bonus. Nodes beyond
the tree and outputs hold poison. Without a GPU the kernel runs in Triton's interpreter, which proves its logic only.

Planted bugs that these tests were seen to catch: only the deepest node compared; a node beyond the tree accepted; rows
of a sequence found at stride 16 for another width; the bonus taken from the root's target; min_end and end off by one;
a stop beyond the end counted; the failed bonus written as the next root.
"""

from __future__ import annotations

import random

import pytest
import torch
from skipstone.engine import tree as host
from skipstone.engine.tree import DraftTree
from skipstone.kernels.accept import END, FAILED, RUNNING, STOP, accept, accept_reference
from skipstone.kernels.grow_tree import Sequences, Trees

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
POISON = 9  # a token, a node, a depth: what is read by mistake stays inside the tensors


def tensor(values: list, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


class Batch:
    """Trees by sequence (None: no tree), their targets by node, and what `accept` writes."""

    def __init__(self, trees: list[DraftTree | None], targets: list[list[int]], width: int, base: int = 20) -> None:
        batch, self.trees, self.width = len(trees), trees, width
        self.base = [base + b for b in range(batch)]
        state = Trees.empty(batch, DEVICE)
        for poisoned in (state.tokens, state.parents, state.depths, state.paths):
            poisoned.fill_(POISON)
        state.entropies.fill_(float("nan"))
        rows = torch.full((batch * width + 32,), POISON, dtype=torch.int32)
        for b, (tree, own) in enumerate(zip(trees, targets, strict=True)):
            if tree is None:
                continue
            size = len(tree)
            state.count[b] = size
            state.tokens[b, :size], state.parents[b, :size] = tensor(tree.tokens), tensor(tree.parents)
            state.depths[b, :size] = tensor(tree.depths)
            state.entropies[b, :size] = tensor([0.25 * node for node in range(size)], torch.float32)
            for node in range(size):
                path = tree.path(node)
                state.paths[b, node] = tensor([*path, *[0] * (16 - len(path))])
            rows[b * width : b * width + size] = torch.tensor(own)
        self.state, self.targets, self.own = state, rows.to(DEVICE), targets
        self.sequences = Sequences(tensor([1] * batch), tensor(self.base), tensor([1000] * batch))
        self.min_end = tensor([0] * batch)
        self.record = tensor([[77] * 96] * batch)
        self.path_nodes, self.num_path = tensor([[77] * 16] * batch), tensor([77] * batch)

    def run(self, stop_ids: list[int]) -> None:
        accept(
            self.targets, self.state, self.sequences, self.min_end, tensor([*stop_ids, -1, -1]), self.record,
            self.path_nodes, self.num_path, self.width,
        )  # fmt: skip

    def check(self, b: int, stop_ids: list[int]) -> int:
        """Everything of sequence `b`; the status."""
        tree, record = self.trees[b], self.record[b].tolist()
        end, min_end = int(self.sequences.end[b]), int(self.min_end[b])
        assert tree is not None
        path, committed, status = accept_reference(
            self.own[b], tree.tokens, tree.parents, self.base[b], end, min_end, stop_ids
        )
        wanted = host.accept(tree, self.own[b])
        assert path == [0, *wanted.nodes] and committed == list(wanted.committed)
        size, rest = len(tree), 16 - len(path)
        assert record[:4] == [len(path) - 1, status, size, self.base[b]]
        assert record[4:20] == committed + [-1] * rest
        assert record[20:36] == path + [-1] * rest
        assert record[36:52] == [*tree.tokens, *[-1] * (16 - size)]
        assert record[52:68] == [*tree.parents, *[-1] * (16 - size)]
        entropies = self.record[b, 68:84].view(torch.float32).tolist()
        assert entropies == [0.25 * node for node in range(size)] + [0.0] * (16 - size)
        assert record[84:] == [0] * 12
        assert self.path_nodes[b].tolist() == path + [0] * rest and self.num_path[b] == len(path)
        assert self.sequences.base[b] == self.base[b] + len(path)
        assert self.state.tokens[b, 0] == max(committed[-1], 0)
        assert self.state.tokens[b, 1:size].tolist() == tree.tokens[1:]
        assert self.sequences.active[b] == self.state.count[b] == int(status == RUNNING)
        return status


def chain(tokens: list[int]) -> DraftTree:
    tree = DraftTree(tokens[0])
    for token in tokens[1:]:
        tree.add(len(tree) - 1, token)
    return tree


def random_tree(rng: random.Random, size: int) -> tuple[DraftTree, list[int]]:
    """A tree, and targets that follow one of its paths for a while."""
    tree = DraftTree(rng.randrange(5))
    for _ in range(size - 1):
        parent = rng.randrange(len(tree)) if rng.random() < 0.5 else len(tree) - 1
        taken = {tree.tokens[i] for i in range(len(tree)) if tree.parents[i] == parent}
        tree.add(parent, rng.choice([token for token in range(20) if token not in taken]))
    targets = [rng.randrange(20) for _ in range(size)]
    node = rng.randrange(size)
    while node > 0:
        targets[tree.parents[node]] = tree.tokens[node]
        node = tree.parents[node]
    return tree, targets


@pytest.mark.triton
@pytest.mark.parametrize("width", [1, 2, 8, 16])
def test_random_trees(width: int) -> None:
    rng = random.Random(width)
    lengths = set()
    for _ in range(12):
        pairs = [random_tree(rng, rng.randint(1, width)) for _ in range(3)]
        batch = Batch([tree for tree, _ in pairs], [targets for _, targets in pairs], width)
        batch.run([])
        for b in range(3):
            assert batch.check(b, []) == RUNNING
            lengths.add(int(batch.num_path[b]))
    assert len(lengths) > (0 if width == 1 else 1 if width == 2 else 3)


@pytest.mark.triton
def test_a_full_chain_and_a_star() -> None:
    star = DraftTree(0)
    for token in range(1, 16):
        star.add(0, token)
    batch = Batch([chain(list(range(16))), star], [list(range(1, 17)), [9, *range(100, 115)]], 16)
    batch.run([])
    assert batch.check(0, []) == batch.check(1, []) == RUNNING
    assert batch.num_path.tolist() == [16, 2] and batch.state.tokens[:, 0].tolist() == [16, 108]


@pytest.mark.triton
def test_sequences_that_take_no_part_change_nothing() -> None:
    tree = chain([1, 2])
    batch = Batch([None, tree, chain([3]), tree], [[], [2, 5], [4], [2, 5]], 2)
    batch.sequences.active[2] = 0
    before = [t.clone() for t in (*vars(batch.state).values(), *vars(batch.sequences).values())]
    batch.run([])
    for b in (1, 3):
        assert batch.check(b, []) == RUNNING
    for old, new in zip(before, (*vars(batch.state).values(), *vars(batch.sequences).values()), strict=True):
        assert torch.equal(old[[0, 2]].nan_to_num(5.0), new[[0, 2]].nan_to_num(5.0))
    assert batch.record[:, 0].tolist() == [-1, 1, -1, 1] and batch.num_path.tolist() == [0, 2, 0, 2]


# base 20, chain 1 2 3 accepted whole, bonus 4: tokens 2 3 4 at positions 21 22 23
@pytest.mark.triton
@pytest.mark.parametrize(
    ("stop_ids", "min_end", "end", "status"),
    [
        ([], 0, 25, RUNNING),
        ([], 0, 24, END),  # the bonus is the last token
        ([], 0, 23, END),  # 3 is
        ([4], 0, 1000, STOP),
        ([2], 0, 1000, STOP),
        ([9, 3], 0, 1000, STOP),
        ([1], 0, 1000, RUNNING),  # the root is not of this round
        ([2], 22, 1000, RUNNING),  # stands below the minimum
        ([3], 22, 1000, STOP),
        ([4], 0, 24, STOP),  # a stop in the last place
        ([4], 0, 23, END),  # beyond the end
    ],
)
def test_ends(stop_ids: list[int], min_end: int, end: int, status: int) -> None:
    batch = Batch([chain([1, 2, 3])], [[2, 3, 4]], 4)
    batch.min_end[0], batch.sequences.end[0] = min_end, end
    batch.run(stop_ids)
    assert batch.check(0, stop_ids) == status


@pytest.mark.triton
@pytest.mark.parametrize(
    ("stop_ids", "end", "status"), [([], 1000, FAILED), ([3], 1000, STOP), ([], 23, END), ([], 24, FAILED)]
)
def test_no_bonus(stop_ids: list[int], end: int, status: int) -> None:
    batch = Batch([chain([1, 2, 3]), chain([0])], [[2, 3, -1], [-1]], 4)
    batch.sequences.end[0] = end
    batch.run(stop_ids)
    assert batch.check(0, stop_ids) == status
    assert batch.check(1, stop_ids) == FAILED


@pytest.mark.triton
def test_tensors_that_do_not_fit_are_refused() -> None:
    batch = Batch([chain([1, 2, 3])], [[2, 3, 4]], 4)
    batch.width = 99
    with pytest.raises(ValueError, match="expected 1 sequences of 99 rows"):
        batch.run([])
    batch.record = batch.record[:, :80]
    with pytest.raises(ValueError, match="do not fit 1 sequences"):
        batch.run([])
