"""Draft trees and acceptance, against a brute-force reading of the definition.

Planted bugs seen to fail here: accept everything, stop at the first sibling, take the longest branch instead of
the agreeing one, ancestors taken from the row before.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skipstone.engine.tree import MAX_NODES, NO_ANCESTOR, DraftTree, accept


@st.composite
def trees(draw, vocab_size=4):
    tree = DraftTree(draw(st.integers(0, vocab_size - 1)))
    for _ in range(draw(st.integers(0, MAX_NODES - 1))):
        parent = draw(st.integers(0, len(tree) - 1))
        free = [token for token in range(vocab_size) if tree.child(parent, token) is None]
        if free:
            tree.add(parent, draw(st.sampled_from(free)), exit_layer=6, entropy=0.5)
    return tree


@given(trees())
def test_structure(tree):
    assert len(tree) <= MAX_NODES
    assert tree.parents[0] == NO_ANCESTOR
    table = tree.ancestor_table(MAX_NODES)
    seen = tree.visibility(MAX_NODES)
    assert table.shape == seen.shape == (MAX_NODES, MAX_NODES)
    for node in range(len(tree)):
        path = tree.path(node)
        assert path[0] == 0
        assert path[-1] == node
        assert len(path) == tree.depths[node] + 1
        assert all(tree.parents[after] == before for before, after in zip(path, path[1:], strict=False))
        assert path == sorted(path)  # parents come before children
        assert table[node].tolist() == path + [NO_ANCESTOR] * (MAX_NODES - len(path))
        assert seen[node].nonzero().flatten().tolist() == path
        assert all(tree.parents[child] == node for child in tree.children(node))
        assert tree.path_tokens(node) == [tree.tokens[index] for index in path[1:]]
    for pad in range(len(tree), MAX_NODES):
        assert seen[pad].nonzero().flatten().tolist() == [0]
    assert tree.leaves() == [node for node in range(len(tree)) if node not in tree.parents]
    assert tree.is_chain == (len(tree.leaves()) == 1)
    assert tree.positions(100) == [100 + depth for depth in tree.depths]
    rebuilt = DraftTree.from_lists(tree.tokens, tree.parents)
    assert rebuilt.depths == tree.depths
    assert rebuilt.max_depth == tree.max_depth


@pytest.mark.hazard(15)
@given(trees(), st.data())
def test_acceptance_is_the_longest_path_that_a_plain_decoder_would_write(tree, data):
    targets = data.draw(st.lists(st.integers(0, 3), min_size=len(tree), max_size=len(tree)))
    agreeing = [
        node
        for node in range(len(tree))
        if all(
            tree.tokens[after] == targets[before]
            for before, after in zip(tree.path(node), tree.path(node)[1:], strict=False)
        )
    ]
    longest = max(agreeing, key=lambda node: tree.depths[node])
    assert sum(tree.depths[node] == tree.depths[longest] for node in agreeing) == 1
    verdict = accept(tree, targets)
    assert list(verdict.nodes) == tree.path(longest)[1:]
    assert verdict.last == longest
    assert verdict.bonus == targets[longest]
    assert tree.child(longest, verdict.bonus) is None
    assert verdict.committed == (*(tree.tokens[node] for node in verdict.nodes), targets[longest])


@given(trees(), st.data())
def test_a_target_function_is_asked_only_along_the_accepted_path(tree, data):
    targets = data.draw(st.lists(st.integers(0, 3), min_size=len(tree), max_size=len(tree)))
    asked = []

    def target_of(node):
        asked.append(node)
        return targets[node]

    verdict = accept(tree, target_of)
    assert verdict == accept(tree, targets)
    assert asked == [0, *verdict.nodes]


def test_a_root_alone_commits_its_target():
    verdict = accept(DraftTree(3), [7])
    assert (verdict.nodes, verdict.tokens, verdict.bonus, verdict.last) == ((), (), 7, 0)


def test_siblings_and_their_subtrees():
    #      0:5
    #   1:6   2:7
    #  3:8   4:8  5:9
    tree = DraftTree.from_lists([5, 6, 7, 8, 8, 9], [-1, 0, 0, 1, 2, 2])
    assert not tree.is_chain
    assert accept(tree, [7, 8, 9, 0, 0, 1]).nodes == (2, 5)
    assert accept(tree, [6, 8, 9, 2, 0, 1]).committed == (6, 8, 2)
    assert accept(tree, [0, 8, 9, 2, 0, 1]).committed == (0,)
    assert torch.equal(tree.visibility()[4], torch.tensor([1, 0, 1, 0, 1, 0]).bool())


@pytest.mark.parametrize("marker", [-1, -2])
def test_a_marker_of_a_failed_row_ends_the_path_and_comes_back_as_the_bonus(marker):
    tree = DraftTree.from_lists([5, 6, 7], [-1, 0, 1])
    assert accept(tree, [6, marker, 3]).committed == (6, marker)


def test_wrong_use_is_refused():
    tree = DraftTree(1)
    tree.add(0, 2)
    with pytest.raises(ValueError, match="already has child 1 with token 2"):
        tree.add(0, 2)
    with pytest.raises(ValueError, match="parent is 5"):
        tree.add(5, 2)
    with pytest.raises(ValueError, match="token is -1"):
        tree.add(0, -1)
    with pytest.raises(ValueError, match="1 targets given for a tree of 2 nodes"):
        accept(tree, [1])
    with pytest.raises(ValueError, match="num_rows is 1"):
        tree.ancestor_table(1)
    with pytest.raises(ValueError, match="max_nodes is 17"):
        DraftTree(1, max_nodes=17)
    with pytest.raises(ValueError, match="first parent"):
        DraftTree.from_lists([1, 2], [0, 0])
    full = DraftTree(0, max_nodes=2)
    full.add(0, 1)
    with pytest.raises(ValueError, match="holds 2 nodes, its maximum"):
        full.add(1, 1)
