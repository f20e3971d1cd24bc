"""Acceptance on the device: each sequence's own tokens down its draft tree, and the state that the next round finds.

From the root, the walk goes to the child that is the target's token at its parent, as long as there is one
(`engine/tree.py: accept`). A node is reached iff each token on its path below the root is the target at the node
before, so one program a sequence compares all paths at once; siblings differ in their tokens, so the nodes reached form
one path, and its deepest node, n below the root, gives the bonus token.

With the root pending at position `base`, the accepted tokens stand at base + 1 .. base + n, the bonus at base + n + 1,
where it is pending next. As in `engine/stopping.py`, which reads the same tokens on the host and has the last word:

    stop    a committed token is a stop id and stands in min_end <= position < end
    end     n + 1 new tokens make the sequence base + n + 2 long, the pending bonus included, and that is `end` or more
    failed  the target at the deepest node is -1: no token could be drawn there. What was accepted before stands.

in this order: a stop in the last place before `end` is a stop, and what an accepted token ended did not fail. Tokens
beyond `end` are in the record; the host does not look at them.

record, int32 [B, 96], all that the host reads of a round:
    0        n; -1 for a sequence that takes no part (active or tree_count is 0), the rest of whose row is stale
    1        0 goes on, 1 stop, 2 end, 3 failed
    2, 3     tree_count and base before
    4..19    committed tokens, n accepted ones and the bonus (-1 if failed), then -1
    20..35   nodes of the path, 0 first, then -1
    36..51   tree_tokens, 52..67 tree_parents, 68..83 tree_entropies as bits; -1, -1 and 0 beyond the tree
    84..95   0
"""

from __future__ import annotations

from torch import Tensor

from .grow_tree import Sequences, Trees
from .rows import PATH

try:
    import triton
    import triton.language as tl

    from .tile import pdl_next, pdl_wait
except ImportError:
    triton = None

RECORD = 96
RECORD_BASE, RECORD_TOKENS = 3, 4  # where it has the committed length before the round, and the tokens
RUNNING, STOP, END, FAILED = 0, 1, 2, 3


def accept_reference(
    targets: list[int], tokens: list[int], parents: list[int], base: int, end: int, min_end: int, stop_ids: list[int]
) -> tuple[list[int], list[int], int]:
    """(path nodes, committed tokens, status) of one tree, by walking it; arguments as `accept`, one entry a node."""
    path = [0]
    while True:
        children = [i for i in range(1, len(tokens)) if parents[i] == path[-1] and tokens[i] == targets[path[-1]]]
        if not children:
            break
        path.append(children[0])
    committed = [tokens[node] for node in path[1:]] + [targets[path[-1]]]
    status = RUNNING
    for position, token in enumerate(committed, base + 1):
        if token < 0:
            status = FAILED
            break
        if position < end and position >= min_end and token in stop_ids:
            status = STOP
            break
        if position + 1 >= end:
            status = END
            break
    return path, committed, status


if triton is not None:

    @triton.jit(do_not_specialize=["width", "num_stops"])
    def _accept_kernel(  # type: ignore[no-untyped-def]
        targets, tree_tokens, tree_parents, tree_depths, tree_paths, tree_count, tree_entropies,
        active_of, base_of, end_of, min_end_of, stop_ids, record, path_nodes, num_path,
        width, num_stops, RECORD: tl.constexpr, N: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        pdl_wait(PDL)
        pdl_next(PDL)
        b = tl.program_id(0)
        place = tl.arange(0, N)
        record += b * RECORD
        tree_tokens += b * N
        tree_paths += b * N * N
        count = tl.load(tree_count + b)
        base = tl.load(base_of + b)
        if (count == 0) | (tl.load(active_of + b) == 0):
            header = tl.where(place == 0, -1, tl.where(place == 3, base, 0))
            tl.store(record + place, header, mask=place < 4)
            tl.store(path_nodes + b * N + place, place * 0)
            tl.store(num_path + b, 0)
            return

        inside = place < count
        end = tl.load(end_of + b)
        min_end = tl.load(min_end_of + b)
        targets += b * width
        depths = tl.load(tree_depths + b * N + place, mask=inside, other=0)
        # [node, depth]: is the token there the target of the node before?
        on_path = (place[None, :] >= 1) & (place[None, :] <= depths[:, None]) & inside[:, None]
        to_node = tree_paths + place[:, None] * N + place[None, :]
        node = tl.load(to_node, mask=on_path, other=0)
        before = tl.load(to_node - 1, mask=on_path, other=0)
        token = tl.load(tree_tokens + node, mask=on_path, other=0)
        target = tl.load(targets + before, mask=on_path, other=0)
        reached = (tl.min((token == target).to(tl.int32), 1) != 0) & inside
        num_accepted = tl.max(tl.where(reached, depths, 0), 0)
        leaf = tl.min(tl.where(reached & (depths == num_accepted), place, N), 0)

        path = tl.load(tree_paths + leaf * N + place, mask=place <= num_accepted, other=-1)
        child = tl.load(tree_paths + leaf * N + place + 1, mask=place < num_accepted, other=0)
        bonus = tl.load(targets + leaf)
        committed = tl.load(tree_tokens + child, mask=place < num_accepted, other=-1)
        committed = tl.where(place == num_accepted, bonus, committed)
        tokens = tl.load(tree_tokens + place, mask=inside, other=-1)
        parents = tl.load(tree_parents + b * N + place, mask=inside, other=-1)
        entropies = tl.load(tree_entropies + b * N + place, mask=inside, other=0.0)

        position = base + 1 + place
        may_stop = (committed >= 0) & (position >= min_end) & (position < end)
        stops = place * 0
        for i in range(0, num_stops):
            stops |= (committed == tl.load(stop_ids + i)).to(tl.int32)
        stopped = tl.max(tl.where(may_stop, stops, 0), 0) != 0
        new_base = base + num_accepted + 1
        length = new_base + tl.where(bonus >= 0, 1, 0)
        status = tl.where(stopped, 1, tl.where(length >= end, 2, tl.where(bonus < 0, 3, 0)))

        tail = tl.where(place == 2, count, tl.where(place == 3, base, 0))
        header = tl.where(place == 0, num_accepted, tl.where(place == 1, status, tail))
        tl.store(record + place, header, mask=place < 4)
        tl.store(record + 4 + place, committed)
        tl.store(record + 4 + N + place, path)
        tl.store(record + 4 + 2 * N + place, tokens)
        tl.store(record + 4 + 3 * N + place, parents)
        tl.store(record + 4 + 4 * N + place, entropies.to(tl.int32, bitcast=True))
        tl.store(record + 4 + 5 * N + place, place * 0, mask=place < RECORD - 4 - 5 * N)
        tl.store(path_nodes + b * N + place, tl.maximum(path, 0))
        tl.store(num_path + b, num_accepted + 1)

        tl.debug_barrier()  # all threads have read the state before one of them changes it
        tl.store(base_of + b, new_base)
        tl.store(tree_tokens, tl.maximum(bonus, 0))
        tl.store(active_of + b, tl.where(status == 0, 1, 0))
        tl.store(tree_count + b, tl.where(status == 0, 1, 0))


def _settings() -> dict[str, int]:
    """Warps: 16 paths of 16 nodes are eight a thread, and shuffles beat shared memory."""
    return {"num_warps": 1}


def accept(
    targets: Tensor,
    trees: Trees,
    sequences: Sequences,
    min_end: Tensor,
    stop_ids: Tensor,
    record: Tensor,
    path_nodes: Tensor,
    num_path: Tensor,
    width: int,
    *,
    pdl: bool = False,
) -> None:
    """Walk every sequence's tree, write its record and move its state on to the next round.

    Args:
        targets: int32 `[R]`, the target's token after each row; row b * width + node.
        trees: verified ones. The root becomes the bonus token (0 if there is none) and the tree only its root, or no
            tree at all where the sequence has ended.
        sequences: `base` grows by n + 1; `active` ends with any status but 0.
        min_end: int32 `[B]`, stop ids at positions below do not end a sequence.
        stop_ids: int32 `[S]`, padded with -1.
        record: int32 `[B, 96]`, overwritten, see the module.
        path_nodes, num_path: int32 `[B, 16]` and `[B]`, overwritten: the accepted path with the root, then 0; n + 1, or
            0 for a sequence that took no part.
        width: rows a sequence has in this step.
        pdl: start before the kernel before has ended.

    Raises:
        ValueError: tensors that do not fit.
    """
    batch = trees.count.shape[0]
    if record.shape != (batch, RECORD) or path_nodes.shape != (batch, PATH) or num_path.shape != (batch,):
        raise ValueError(
            f"record {tuple(record.shape)}, path_nodes {tuple(path_nodes.shape)} and num_path {tuple(num_path.shape)} "
            f"do not fit {batch} sequences"
        )
    if targets.shape[0] < batch * width:
        raise ValueError(f"{targets.shape[0]} targets given, expected {batch} sequences of {width} rows")
    _accept_kernel[(batch,)](
        targets, trees.tokens, trees.parents, trees.depths, trees.paths, trees.count, trees.entropies,
        sequences.active, sequences.base, sequences.end, min_end, stop_ids, record, path_nodes, num_path,
        width, len(stop_ids), RECORD=RECORD, N=PATH, PDL=pdl, **_settings(), **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
