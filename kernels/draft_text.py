"""Drafts from the text itself on the device: what followed the last tokens where they stood before.

The chain that `engine/lookup.py` drafts for one branch, token for token, without the host: of the `MOST_PLACES` newest
places where the last `min_match` tokens stood before, the one with the longest match (the newest of several) says what
comes next. One program a sequence compares all places of a block at once, the newest first, token by token backwards.
Positions that no token was committed to yet are never compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .accept import RECORD_BASE, RECORD_TOKENS
from .grow_tree import Sequences, Trees
from .rows import PATH

try:
    import triton
    import triton.language as tl

    from .tile import pdl_next, pdl_wait
except ImportError:
    triton = None

MOST_PLACES = 64  # of one match, the newest; a text of one repeated token would otherwise have thousands
LONGEST = 32  # matched tokens that are told apart
FROM_TEXT = -1  # a node's exit layer, `engine/tree.py: FROM_TEXT`
BLOCK = 1024  # places compared at once, of a long text one block after the other
WARPS = 16


def draft_text_reference(ids: list[int], min_match: int, per_match: int, most: int) -> list[int]:
    """The tokens drafted behind `ids`, at most `most` of them."""

    def match(end: int) -> int:
        length = 0
        while length < min(end, LONGEST) and ids[end - 1 - length] == ids[-1 - length]:
            length += 1
        return length

    found = [(match(end), end) for end in range(min_match, len(ids)) if match(end) >= min_match][-MOST_PLACES:]
    if not found:
        return []
    length, place = max(found)
    return ids[place : place + min(most, per_match * length)]


if triton is not None:

    @triton.jit(do_not_specialize=["min_match", "per_match", "max_nodes"])
    def _draft_text_kernel(  # type: ignore[no-untyped-def]
        text, stride, active_of, base_of, end_of, tree_tokens, tree_parents, tree_depths, tree_paths, tree_count,
        tree_entropies, exits, min_match, per_match, max_nodes,
        N: tl.constexpr, LONGEST: tl.constexpr, MOST_PLACES: tl.constexpr, FROM_TEXT: tl.constexpr,
        OVER: tl.constexpr, BESIDE: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        pdl_wait(PDL)
        pdl_next(PDL)
        b = tl.program_id(0)
        if tl.load(active_of + b) == 0:
            return
        base = tl.load(base_of + b)
        size = base + 1  # tokens so far, the pending one is the last
        text += b.to(tl.int64) * stride
        best, place, num_found = base * 0, base * 0, base * 0
        for first in range(0, size - min_match, BLOCK):
            end = base - first - tl.arange(0, BLOCK)  # a match's last token stands in front of it
            same = end >= min_match
            length = end * 0
            for i in tl.static_range(LONGEST):  # no load waits for a comparison
                own = tl.load(text + tl.maximum(base - i, 0))
                same &= (tl.load(text + end - 1 - i, mask=end > i, other=0) == own) & (end > i)
                length += same.to(tl.int32)
            found = length >= min_match
            counted = found & (num_found + tl.cumsum(found.to(tl.int32), 0) <= MOST_PLACES)
            num_found += tl.sum(found.to(tl.int32), 0)
            longest = tl.max(tl.where(counted, length, 0), 0)
            newest = tl.max(tl.where(counted & (length == longest), end, 0), 0)
            place = tl.where(longest > best, newest, place)
            best = tl.maximum(best, longest)

        most = per_match * best
        if BESIDE:  # 3, 7, 11, 15 behind 1, 2, 4, 8
            most = 4 * (1 + (best > 1).to(tl.int32) + (best > 3).to(tl.int32) + (best > 7).to(tl.int32)) - 1
        room = tl.minimum(tl.minimum(max_nodes, most), size - place)
        count = tl.where(best > 0, tl.maximum(tl.minimum(room, tl.load(end_of + b) - base - 2), 0), 0)
        node = tl.arange(0, N)
        at = b * N + node
        kept, top, shared = count * 0, count * 0, count * 0  # nodes that stay, the one that the chain leaves, its depth
        above = node * 0  # nodes by depth on the way to it
        if OVER:
            if BESIDE:  # the best of heads' nodes come first, parents before children
                kept = tl.minimum(tl.load(tree_count + b) - 1, TOGETHER - count)
                told = tl.load(tree_tokens + at)
                parent = tl.load(tree_parents + at)
                theirs = (node >= 1) & (node <= kept)
                for i in tl.static_range(N - 1):  # as far as the chain goes their way
                    token = tl.load(text + place + i, mask=i < count, other=-1)
                    same = theirs & (parent == top) & (told == token) & (shared == i)
                    found = tl.sum(tl.where(same, node, 0), 0)
                    shared += (found > 0).to(tl.int32)
                    top = tl.where(found > 0, found, top)
                above = tl.load(tree_paths + (b * N + top) * N + node)
                tl.debug_barrier()  # all warps have read what is written now
            if count == 0:  # another's tree is there
                tl.store(exits + at, node * 0)
                return
        rest = node - kept  # of the chain, behind what it shares
        held = (rest >= 1) & (rest <= count - shared)
        own = node > kept
        tl.store(exits + at, tl.where(held, FROM_TEXT, 0))
        token = tl.load(text + place + shared + rest - 1, mask=held, other=0)
        tl.store(tree_tokens + at, token, mask=own & (node >= 1))
        parent = tl.where(held, tl.where(rest == 1, top, node - 1), tl.where(node == 0, -1, 0))
        tl.store(tree_parents + at, parent, mask=own | (node == 0))
        tl.store(tree_depths + at, tl.where(held, shared + rest, 0), mask=own | (node == 0))
        tl.store(tree_entropies + at, (node * 0).to(tl.float32), mask=own | (node == 0))
        deep = node[None, :] - shared  # of columns, which are depths
        path = tl.where(deep <= 0, above[None, :], tl.where(deep <= rest[:, None], kept + deep, 0))
        path = tl.where(held[:, None], path, 0)
        tl.store(tree_paths + at[:, None] * N + node[None, :], path, mask=(own | (node == 0))[:, None])
        tl.store(tree_count + b, kept + 1 + count - shared)

    @triton.jit
    def _keep_text_kernel(  # type: ignore[no-untyped-def]
        record, text, stride, capacity,
        RECORD: tl.constexpr, BASE: tl.constexpr, TOKENS: tl.constexpr, N: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        pdl_wait(PDL)
        pdl_next(PDL)
        b = tl.program_id(0)
        record += b * RECORD
        place = tl.arange(0, N)
        accepted, base = tl.load(record), tl.load(record + BASE)
        token = tl.load(record + TOKENS + place, mask=place <= accepted, other=-1)
        at = base + 1 + place
        tl.store(text + b.to(tl.int64) * stride + at, token, mask=(token >= 0) & (at < capacity))


def draft_text(
    text: Tensor,
    sequences: Sequences,
    trees: Trees,
    exits: Tensor,
    *,
    min_match: int,
    per_match: int,
    max_nodes: int,
    over: bool = False,
    beside: bool = False,
    together: int = PATH - 1,
    pdl: bool = False,
) -> None:
    """Overwrite every active sequence's tree: its root alone where the text suggests nothing.

    Args:
        text: int32 `[B, S]`, tokens by position up to each pending one.
        sequences: of the batch.
        trees: roots are left as they are.
        exits: int32 `[B, 16]`, `FROM_TEXT` for each drafted node, 0 elsewhere.
        min_match, per_match, max_nodes: of `engine/gate.py: Lookup`.
        over: leave the tree that is there where the text suggests nothing.
        beside: of `Lookup`; with `over`, of the tree that is there as many nodes stay as leave room, and the chain is
            hung below the last one that goes its way.
        together: nodes that may be drafted in all.
        pdl: as in `qkv`.

    Raises:
        ValueError: a chain that a tree cannot hold, or a match too long to be told.
    """
    if not (1 <= min_match <= LONGEST and 0 <= max_nodes < PATH):
        raise ValueError(
            f"min_match is {min_match} and max_nodes {max_nodes}, expected 1 to {LONGEST} and 0 to {PATH - 1}"
        )
    _draft_text_kernel[(len(sequences.base),)](
        text, text.stride(0), sequences.active, sequences.base, sequences.end, trees.tokens, trees.parents,
        trees.depths, trees.paths, trees.count, trees.entropies, exits, min_match, per_match, max_nodes,
        N=PATH, LONGEST=LONGEST, MOST_PLACES=MOST_PLACES, FROM_TEXT=FROM_TEXT, OVER=over, BESIDE=beside,
        TOGETHER=together, BLOCK=BLOCK, PDL=pdl, num_warps=WARPS,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def keep_text(record: Tensor, text: Tensor, *, pdl: bool = False) -> None:
    """Write what a round committed to its places in the text.

    Args:
        record: int32 `[B, 96]` of `accept`.
        text: int32 `[B, S]`; tokens beyond S, which end a sequence, are left out.
        pdl: as in `qkv`.
    """
    batch, size = record.shape
    if len(text) != batch:
        raise ValueError(f"a record of {batch} sequences does not fit a text of {len(text)}")
    _keep_text_kernel[(batch,)](
        record, text, text.stride(0), text.shape[1], RECORD=size, BASE=RECORD_BASE, TOKENS=RECORD_TOKENS, N=PATH,
        PDL=pdl, num_warps=1, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def empty_text(batch: int, positions: int, device: torch.device | str) -> Tensor:
    """Room for tokens at so many positions of each sequence."""
    return torch.zeros(batch, positions, dtype=torch.int32, device=device)
