"""Drafts from the text by `kernels/draft_text.py` against its reference and against what the host drafts.

Texts of few different tokens, so that matches overlap, repeat more than `MOST_PLACES` times, reach back to the text's
beginning and are longer than `LONGEST`; several blocks of places; ends that leave no room. What lies behind a text is
poisoned with tokens that would match.

Planted bugs that these tests were seen to catch: the oldest of equal matches, one match too many or too few counted, a
match that runs past the text's beginning, a draft one token late, no room left for the target's own token.
"""

from __future__ import annotations

import random

import pytest
import torch
from skipstone.engine.device_state import fill
from skipstone.engine.gate import Lookup
from skipstone.engine.lookup import TextIndex, chain_from_text, draft_from_text, hang_beside
from skipstone.engine.tree import FROM_TEXT as HOSTS_MARK
from skipstone.engine.tree import DraftTree
from skipstone.kernels import draft_text as own
from skipstone.kernels.accept import RECORD
from skipstone.kernels.draft_text import FROM_TEXT, draft_text, draft_text_reference, empty_text, keep_text
from skipstone.kernels.grow_tree import Sequences, Trees

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.triton


def texts() -> list[list[int]]:
    rng = random.Random(0)
    few = [[rng.randrange(k) for _ in range(n)] for k, n in ((2, 60), (3, 200), (4, 7), (2, 700), (30, 300))]
    period = list(range(5, 50))
    # a longer match behind 63 and 64 newer ones; one at the beginning, behind a row that ends as if it went on
    far = [[1, 2, 3, 9, *(t for i in range(n) for t in (3, 100 + i)), 1, 2, 3] for n in (63, 64)]
    begins = [[4, 5], [1, 2, 3, 4, 5, 1, 2]]
    return [
        *few,
        *far,
        *begins,
        [3] * 150,
        period * 3,
        period + [1] + period[:40],
        [7],
        [7, 7],
        [1, 2, 3, 4],
        period * 13 + [2, 5, 6],
    ]


def drafted(
    ids: list[list[int]], ends: list[int], lookup: Lookup, heads: Trees | None = None, together: int = 15
) -> tuple[Trees, torch.Tensor]:
    """`heads`: trees that are there, which share their rows."""
    batch, room = len(ids), 16 + max(map(len, ids))
    text = empty_text(batch, room, DEVICE)
    for b, one in enumerate(ids):
        text[b] = one[-1]  # would match everywhere
        text[b, : len(one)] = torch.tensor(one, dtype=torch.int32)
    trees, exits = Trees.empty(batch, DEVICE), torch.full((batch, 16), 9, dtype=torch.int32, device=DEVICE)
    for tensor in (trees.tokens, trees.parents, trees.depths, trees.paths, trees.count):
        tensor.fill_(99)
    trees.tokens[:, 0] = torch.tensor([one[-1] for one in ids])
    trees = trees if heads is None else heads

    def whole(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    sequences = Sequences(whole([1] * batch), whole([len(one) - 1 for one in ids]), whole(ends))
    options = {"min_match": lookup.min_match, "per_match": lookup.per_match, "max_nodes": lookup.max_nodes}
    shared = {"over": heads is not None, "beside": lookup.beside, "together": together}
    draft_text(text, sequences, trees, exits, **options, **shared)
    return trees, exits


@pytest.mark.parametrize("lookup", [Lookup(), Lookup(2, 3, 15), Lookup(3, 1, 5), Lookup(32, 1, 15)], ids=str)
def test_the_hosts_drafts(lookup: Lookup) -> None:
    ids = texts()
    trees, exits = drafted(ids, [10**6] * len(ids), lookup)
    seen = set()
    for b, one in enumerate(ids):
        index, tree = TextIndex(lookup.min_match), DraftTree(one[-1])
        index.follow(one)
        draft_from_text(tree, index, lookup, 15, 15)
        count = int(trees.count[b])
        assert count == len(tree)
        assert trees.tokens[b, :count].tolist() == tree.tokens and trees.parents[b, :count].tolist() == tree.parents
        assert trees.depths[b, :count].tolist() == tree.depths and not trees.depths[b, count:].any()
        assert exits[b].tolist() == [0] + [FROM_TEXT] * (count - 1) + [0] * (16 - count)
        for node in range(count):
            assert trees.paths[b, node].tolist() == tree.path(node) + [0] * (15 - node)
        assert not trees.paths[b, count:].any() and not trees.entropies[b].any()
        most = lookup.max_nodes
        assert tree.tokens[1:] == draft_text_reference(one, lookup.min_match, lookup.per_match, most)
        seen.add(count)
    assert len(seen) > (1 if lookup.min_match > 3 else 2)
    assert FROM_TEXT == HOSTS_MARK


@pytest.mark.parametrize(("most", "together"), [(15, 15), (7, 9), (3, 7)])
def test_the_rows_are_shared_as_on_the_host(most: int, together: int) -> None:
    """Heads' trees, some of whose paths begin as the text goes on, or are all of it, before and behind what is cut off.
    Planted bugs: a chain hung below the root alone, one node of the heads too many, a way that goes on over a node that
    was cut off, or behind a token that it misses, the text's mark on a node that both drafted."""
    rng, ids, lookup = random.Random(1), texts(), Lookup(1, max_nodes=most, beside=True)
    heads, expected = [], []
    for one in ids:
        index = TextIndex(1)
        index.follow(one)
        chain = chain_from_text(index, lookup, 15, 15)
        size, tree = rng.randrange(1, together + 2), DraftTree(one[-1])
        along = rng.randrange(5)  # of the chain, somewhere among the nodes
        while len(tree) < size:
            at = rng.randrange(len(tree))
            ours = tree.path_tokens(at) == chain[: tree.depths[at]] and tree.depths[at] < min(along, len(chain))
            token = (
                chain[tree.depths[at]] if ours and rng.random() < 0.7 else rng.choice([*chain[1:], 1000 + len(tree)])
            )
            if tree.child(at, token) is None:
                tree.add(at, token, exit_layer=0, entropy=0.5)
        shared = DraftTree(one[-1])
        for node in range(1, min(len(tree), 1 + together - len(chain))):
            shared.add(tree.parents[node], tree.tokens[node], exit_layer=0, entropy=0.5)
        hang_beside(shared, chain)
        heads.append(tree)
        expected.append(shared)
    state, target = (Trees.empty(len(ids), DEVICE) for _ in range(2))
    fill(state, dict(enumerate(heads)))
    fill(target, dict(enumerate(expected)))
    trees, exits = drafted(ids, [10**6] * len(ids), lookup, state, together)
    for name in ("count", "tokens", "parents", "depths", "paths"):
        assert torch.equal(getattr(trees, name), getattr(target, name)), name
    for b, tree in enumerate(expected):
        assert exits[b, 1 : len(tree)].tolist() == tree.exit_layers[1:] and not exits[b, len(tree) :].any()
    mixed = [{FROM_TEXT, 0} <= set(tree.exit_layers) for tree in expected]
    assert any(mixed) and any(FROM_TEXT not in tree.exit_layers for tree in expected)


def test_blocks_of_places_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, lookup = texts(), Lookup(2, 3, 15)
    expected, _ = drafted(ids, [10**6] * len(ids), lookup)
    monkeypatch.setattr(own, "BLOCK", 16)
    found, _ = drafted(ids, [10**6] * len(ids), lookup)
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.count, expected.count)


def test_a_round_ends_in_a_token_of_the_targets_own() -> None:
    """No node stands deeper than end - base - 2; sequences that are not active keep what they have."""
    ids = [[*range(20)] * 2] * 4
    trees, _ = drafted(ids, [41, 42, 43, 60], Lookup(1, 4, 15))
    assert trees.count.tolist() == [1, 1 + 1, 1 + 2, 1 + 15]
    text, trees = empty_text(1, 40, DEVICE), Trees.empty(1, DEVICE)
    idle = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    place = text, Sequences(idle, idle + 9, idle + 30), trees, idle.repeat(16)[None]
    draft_text(*place, min_match=1, per_match=2, max_nodes=4)
    assert not trees.count.any() and not trees.depths.any()


def test_what_a_round_committed_is_kept() -> None:
    """Of a round with two accepted tokens, none, one that failed, and at the end of a text's room."""
    record = torch.full((4, RECORD), -1, dtype=torch.int32, device=DEVICE)
    rounds = (2, 4, [8, 9, 7]), (-1, 0, [5]), (1, 2, [6, -1]), (2, 8, [1, 2, 3])
    for b, (accepted, base, tokens) in enumerate(rounds):
        record[b, 0], record[b, 3] = accepted, base
        record[b, 4 : 4 + len(tokens)] = torch.tensor(tokens)
    text = empty_text(4, 10, DEVICE)
    keep_text(record, text)
    expected = torch.zeros(4, 10, dtype=torch.int32)
    expected[0, 5:8], expected[2, 3], expected[3, 9] = torch.tensor([8, 9, 7], dtype=torch.int32), 6, 1
    assert torch.equal(text.cpu(), expected)


def test_what_does_not_fit_is_refused() -> None:
    idle = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    place = empty_text(1, 40, DEVICE), Sequences(idle, idle, idle), Trees.empty(1, DEVICE), idle
    for options in (
        {"min_match": 33, "max_nodes": 4},
        {"min_match": 0, "max_nodes": 4},
        {"min_match": 1, "max_nodes": 16},
    ):
        with pytest.raises(ValueError, match="expected 1 to 32 and 0 to 15"):
            draft_text(*place, per_match=1, **options)
    with pytest.raises(ValueError, match="does not fit a text of 2"):
        keep_text(torch.zeros(1, RECORD, dtype=torch.int32, device=DEVICE), empty_text(2, 4, DEVICE))
