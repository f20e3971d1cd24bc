"""Drafts from the text itself: what followed the last tokens where they stood before.

An index of every run of `min_match` tokens gives the places where the text's end has occurred; each match is followed
backwards, and the longest ones draft what came next there. With one branch that is prompt lookup decoding (LLMA, arXiv
2304.04487); with more, the continuations of all places of the longest match form a tree, the more frequent first, as in
SuffixDecoding (arXiv 2411.04975). No model is asked, so such drafts are free but for the rows they take in
verification; like any draft they can change the speed and never the output.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Sequence

from ..kernels.draft_text import LONGEST, MOST_PLACES  # one source, for the device drafts the same
from .gate import Lookup
from .tree import FROM_TEXT, DraftTree


class TextIndex:
    """Where each run of `min_match` tokens of one growing text ends.

    Args:
        min_match: tokens of a run, at least 1.
    """

    def __init__(self, min_match: int) -> None:
        self.min_match = min_match
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}

    def follow(self, ids: Sequence[int]) -> None:
        """Take in what a text has grown by; `ids` is all of it."""
        for token in ids[len(self._ids) :]:
            self._ids.append(token)
            if len(self._ids) >= self.min_match:
                self._ends.setdefault(self._run(), []).append(len(self._ids))

    def longest(self) -> tuple[int, list[int]]:
        """How many of the last tokens stand elsewhere too, and the places of what followed there, newest first."""
        ends = self._ends.get(self._run(), [])[:-1]  # the last one is the text's own end
        lengths = {end: self._match(end) for end in reversed(ends[-MOST_PLACES:])}
        best = max(lengths.values(), default=0)
        return best, [end for end, length in lengths.items() if length == best]

    def following(self, place: int, count: int) -> list[int]:
        """At most `count` tokens from a place on, as far as the text goes."""
        return self._ids[place : place + count]

    def at(self, place: int) -> int | None:
        """The token at a place, None at the text's end."""
        return self._ids[place] if place < len(self._ids) else None

    def _run(self) -> tuple[int, ...]:
        return tuple(self._ids[-self.min_match :])

    def _match(self, end: int) -> int:
        length, most = self.min_match, min(end, LONGEST)
        while length < most and self._ids[end - 1 - length] == self._ids[-1 - length]:
            length += 1
        return length


def draft_from_text(tree: DraftTree, index: TextIndex, lookup: Lookup, max_depth: int, max_nodes: int) -> None:
    """Hang what the text suggests below the root of a tree that has nothing else yet.

    Args:
        index: up to the root's token.
        max_depth: most tokens in a row.
        max_nodes: most drafted nodes of the tree.
    """
    matched, places = index.longest()
    room = min(lookup.most_behind(matched), max_nodes)
    order = itertools.count()
    waiting: list[tuple[int, int, int, int, list[int]]] = []  # most frequent, then first come

    def offer(parent: int, places: Iterable[int]) -> None:
        after: dict[int, list[int]] = {}
        for place in places:
            token = index.at(place)
            if token is not None:
                after.setdefault(token, []).append(place + 1)
        if tree.depths[parent] < max_depth:
            for token, own in sorted(after.items(), key=lambda item: -len(item[1]))[: lookup.branch]:
                heapq.heappush(waiting, (-len(own), next(order), parent, token, own))

    offer(0, places[:1] if lookup.branch == 1 else places)
    while waiting and tree.num_drafted < room:
        _, _, parent, token, own = heapq.heappop(waiting)
        offer(tree.add(parent, token, exit_layer=FROM_TEXT), own)


def chain_from_text(index: TextIndex, lookup: Lookup, max_depth: int, max_nodes: int) -> list[int]:
    """The tokens that `draft_from_text` hangs for one branch."""
    matched, places = index.longest()
    return index.following(places[0], min(lookup.most_behind(matched), max_nodes, max_depth)) if places else []


def hang_beside(tree: DraftTree, chain: Iterable[int]) -> None:
    """Add a chain from the text to heads' tree: as far as it goes their way, below their nodes."""
    at = 0
    for token in chain:
        child = tree.child(at, token)
        at = tree.add(at, token, exit_layer=FROM_TEXT) if child is None else child
