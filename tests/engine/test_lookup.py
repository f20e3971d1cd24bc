"""Drafts from the text: which places match, what they draft, in chains and trees."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skipstone.engine.gate import DraftPolicy, Lookup, from_text
from skipstone.engine.lookup import LONGEST, MOST_PLACES, TextIndex, draft_from_text
from skipstone.engine.tree import FROM_TEXT, DraftTree


def drafted(ids: list[int], lookup: Lookup, max_depth: int = 99, max_nodes: int = 15) -> DraftTree:
    index, tree = TextIndex(lookup.min_match), DraftTree(ids[-1])
    index.follow(ids)
    draft_from_text(tree, index, lookup, max_depth, max_nodes)
    return tree


def test_the_longest_match_speaks_and_of_equal_ones_the_newest() -> None:
    """Planted bugs: the oldest place; the newest whatever its length; the text's own end as a match of itself."""
    ids = [7, 1, 2, 3, 50, 9, 2, 3, 60, 9, 2, 3, 61, 9, 9, 2, 3]  # after 9 2 3 stood 60 and, later, 61
    assert drafted(ids, Lookup(2)).tokens == [3, 61, 9, 9, 2, 3]
    assert drafted([7, 1, 2, 3, 50, 9, 2, 3, 60, 7, 1, 2, 3], Lookup(2)).tokens[1:3] == [50, 9]
    assert len(drafted([1, 2, 3, 4], Lookup())) == 1
    assert len(drafted([5], Lookup(2))) == 1, "a text shorter than a match"


def test_sizes_are_kept() -> None:
    ids = [*range(20), *range(5)]  # five tokens match
    assert drafted(ids, Lookup(per_match=1)).tokens == [4, 5, 6, 7, 8, 9]
    assert len(drafted(ids, Lookup(per_match=9, max_nodes=7))) == 1 + 7
    assert len(drafted(ids, Lookup(), max_depth=2)) == 1 + 2
    assert len(drafted(ids, Lookup(), max_nodes=3)) == 1 + 3
    assert len(drafted(ids, Lookup(), max_depth=0)) == len(drafted(ids, Lookup(), max_depth=-4)) == 1
    assert len(drafted(ids, Lookup(min_match=6))) == 1, "five match, six are asked for"


def test_a_text_that_repeats_one_token_drafts_up_to_its_end() -> None:
    assert drafted([4] * 6, Lookup(2)).tokens == [4, 4], "the newest match but one token away from the end"
    assert drafted([4] * 300, Lookup(max_nodes=15, per_match=15)).tokens[1:] != []
    index = TextIndex(1)
    index.follow([4] * 300)
    length, places = index.longest()
    assert length == LONGEST and len(places) <= MOST_PLACES


def test_all_places_of_the_longest_match_make_a_tree_the_frequent_first() -> None:
    """Planted bug: places of shorter matches counted among them."""
    ids = [1, 2, 8, 0, 1, 2, 9, 5, 1, 2, 9, 6, 3, 2, 7, 1, 2]
    tree = drafted(ids, Lookup(branch=2))
    assert [tree.tokens[n] for n in tree.children(0)] == [9, 8], "9 twice, 8 once, never 7"
    nine = tree.child(0, 9)
    assert nine is not None and {tree.tokens[n] for n in tree.children(nine)} <= {5, 6}
    assert len(tree) == 1 + 4 and set(tree.exit_layers[1:]) == {FROM_TEXT} and set(tree.entropies) == {None}
    assert drafted(ids, Lookup(branch=1)).is_chain


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 3), st.integers(1, 3), st.data())
def test_whatever_the_text_paths_stand_in_it_behind_its_own_end(
    ids: list[int], min_match: int, branch: int, data: st.DataObject
) -> None:
    """And an index that follows a growing text is the one made at once."""
    lookup = Lookup(min_match, branch=branch)
    tree = drafted(ids, lookup)
    text = "".join(map(str, ids))
    for leaf in tree.leaves():
        path = "".join(map(str, tree.path_tokens(leaf)))
        if path:
            end = text[-min_match:]
            assert end + path in text
    slowly = TextIndex(min_match)
    cut = data.draw(st.integers(0, len(ids)))
    slowly.follow(ids[:cut])
    slowly.follow(ids)
    again = DraftTree(ids[-1])
    draft_from_text(again, slowly, lookup, 99, 15)
    assert (again.tokens, again.parents) == (tree.tokens, tree.parents)


def test_a_policy_that_only_looks_up_drafts_and_sizes_are_checked() -> None:
    assert from_text().drafts and not from_text().exits and not DraftPolicy().drafts
    with pytest.raises(ValueError, match="at most 15"):
        Lookup(max_nodes=16)
    with pytest.raises(ValueError, match="at least 1"):
        Lookup(min_match=0)
