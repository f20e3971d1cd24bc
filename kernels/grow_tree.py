"""Best-first draft trees in device memory: the pool of candidates of `engine/best_first.py`, one program a sequence.

A candidate is a drafted token with the log-probability of its whole path. Step by step,

    expand   the nodes chosen last get their children (`top_candidates`), unless their entropy is `stop` or more;
    choose   the likeliest `beam` candidates without children whose children may still enter the tree become rows of
             the head's next pass;

and after the last step `hang` makes the likeliest `max_nodes` the tree that is verified. A chain is beam = branch = 1.

Places number the head's entries of a round: the root's is 0, the i-th row of step s has 1 + (s - 1) beam + i, whether
chosen or not. Candidate 1 + place * branch + c is the c-th child of a place; equal candidates rank by that number, the
order in which `best_first` ranks them, too, and parents come before children.

What is not among the likeliest `max_nodes` of all candidates so far never will be again, so the pool keeps just these,
by rank; a step merges the new children with them. A rank is a count of comparisons over all pairs, no sort. What is
kept is read from one buffer and written to another, and rows are written behind a barrier, because the warps of a
program are not in step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .rows import PATH, Rows

try:
    import triton
    import triton.language as tl

    from .tile import pdl_next, pdl_wait
except ImportError:
    triton = None

MOST_CHILDREN = 48  # of one step
FIELDS = 6  # of a kept candidate: token, parent's place, own place or -1, depth, number, whether it has no children yet


@dataclass(frozen=True)
class Shape:
    """How trees grow; `stop` in nats, inf for no gate. A distribution that is not finite (NaN entropy) is refused."""

    beam: int
    branch: int
    max_depth: int
    max_nodes: int
    stop: float = math.inf

    def __post_init__(self) -> None:
        if not (1 <= self.beam <= 16 and 1 <= self.branch <= 8):
            raise ValueError(f"beam is {self.beam} and branch {self.branch}, expected 1 to 16 and 1 to 8")
        if not (1 <= self.max_depth < PATH and 1 <= self.max_nodes < PATH):
            raise ValueError(f"max_depth is {self.max_depth} and max_nodes {self.max_nodes}, expected 1 to {PATH - 1}")
        if self.beam * self.branch > MOST_CHILDREN:
            raise ValueError(
                f"beam {self.beam} x branch {self.branch}: expected at most {MOST_CHILDREN} children a step"
            )

    @property
    def num_places(self) -> int:
        """Entries that the head makes at most, the root's included."""
        return 1 + self.beam * (self.max_depth - 1)

    @property
    def width(self) -> int:
        """Rows a sequence has in the head's passes."""
        return 1 << (self.beam - 1).bit_length()


@dataclass(frozen=True)
class Sequences:
    """What drafting knows of the batch: int32 `[B]`."""

    active: Tensor
    base: Tensor  # position of the root
    end: Tensor  # absolute length at which the sequence ends


@dataclass(frozen=True)
class Trees:
    """The trees to be verified, by node, int32; node 0 is the root, whose token others write.

    A round ends in a token of the target's own, so no node stands deeper than end - base - 2.
    """

    tokens: Tensor  # [B, 16]
    parents: Tensor  # [B, 16], -1 of the root
    depths: Tensor  # [B, 16]
    paths: Tensor  # [B, 16, 16], the node at each depth on the path to a node, 0 beyond
    count: Tensor  # [B], nodes; 0 for a sequence that is not active
    entropies: Tensor  # [B, 16] fp32, of the distribution a node was drafted from

    @classmethod
    def empty(cls, batch: int, device: torch.device | str) -> Trees:
        tokens, parents, depths = torch.zeros(3, batch, PATH, dtype=torch.int32, device=device).unbind()
        paths = torch.zeros(batch, PATH, PATH, dtype=torch.int32, device=device)
        count = torch.zeros(batch, dtype=torch.int32, device=device)
        return cls(tokens, parents, depths, paths, count, torch.zeros(batch, PATH, device=device))


@dataclass(frozen=True)
class Pool:
    """The candidates of B sequences in one round; made once, at fixed addresses.

    Attributes:
        kept: int32 `[2, B, FIELDS, 16]`, the likeliest candidates by rank; read and written in turns.
        values: fp32 `[2, B, 2, 16]`, their log-probabilities (-inf for none) and entropies.
        paths: int32 `[B, places, 16]`, place of the ancestor at each depth; a root's own row stays 0.
        num_refused: int32 `[B]`, nodes that the gate refused in this round.
        rows: of the head's next pass, `width` a sequence.
        tokens_of_rows, parents_of_rows: int32 `[R]`, the rows' tokens, and their parents' places.
        log_probs_of_rows: fp32 `[R]`, of their whole paths.
    """

    shape: Shape
    kept: Tensor
    values: Tensor
    paths: Tensor
    num_refused: Tensor
    rows: Rows
    tokens_of_rows: Tensor
    parents_of_rows: Tensor
    log_probs_of_rows: Tensor

    @classmethod
    def empty(cls, batch: int, shape: Shape, device: torch.device | str) -> Pool:
        def whole(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        num_rows = -(-batch * shape.width // 16) * 16
        return cls(
            shape, whole(2, batch, FIELDS, PATH), torch.zeros(2, batch, 2, PATH, device=device),
            whole(batch, shape.num_places, PATH), whole(batch), Rows.empty(num_rows, device), whole(num_rows),
            whole(num_rows), torch.zeros(num_rows, device=device),
        )  # fmt: skip


@dataclass
class _Candidate:
    token: int
    above: int
    place: int
    depth: int
    number: int
    opened: int
    log_prob: float
    entropy: float


def grow_tree_reference(
    step: int, tokens: Tensor, log_probs: Tensor, entropies: Tensor, pool: Pool, sequences: Sequences, trees: Trees,
    depth: int | None = None,
) -> None:  # fmt: skip
    """The same, candidate by candidate; arguments as `grow_tree`."""
    shape, rows, turn = pool.shape, pool.rows, step % 2
    num_steps = shape.max_depth if depth is None else depth
    for b in range(len(sequences.base)):
        active, base, end = (int(t[b]) for t in (sequences.active, sequences.base, sequences.end))
        deepest = min(end - base - 2, num_steps)
        found: list[_Candidate] = []
        if step == 0:
            pool.num_refused[b] = 0
        else:
            fields, values = pool.kept[turn, b].T.tolist(), pool.values[turn, b].T.tolist()
            found = [_Candidate(*f, *v) for f, v in zip(fields, values, strict=True) if v[0] > -math.inf]
        first, count = (0, 1) if step == 0 else (1 + (step - 1) * shape.beam, shape.beam)
        for i in range(count):
            place, row = first + i, b * (1 if step == 0 else shape.width) + i
            if not (active and deepest > 0 if step == 0 else rows.live[row]):
                continue
            if not float(entropies[row]) < shape.stop:
                pool.num_refused[b] += 1
                continue
            path = (0.0, 0) if step == 0 else (float(pool.log_probs_of_rows[row]), int(rows.position[row]) - base)
            for c in range(shape.branch):
                own, number = float(log_probs[row, c]), 1 + place * shape.branch + c
                if tokens[row, c] >= 0 and own > -math.inf:
                    total = float(torch.tensor(path[0]) + min(own, 0.0))  # in fp32
                    new = (int(tokens[row, c]), place, -1, path[1] + 1, number, 1, total, float(entropies[row]))
                    found.append(_Candidate(*new))
        found = sorted(found, key=lambda one: (-one.log_prob, one.number))[: shape.max_nodes]
        if step < num_steps - 1:
            _choose_reference(step, b, found, pool, base, deepest)
            for n, one in enumerate(found):
                own_fields = [one.token, one.above, one.place, one.depth, one.number, one.opened]
                pool.kept[1 - turn, b, :, n] = torch.tensor(own_fields, dtype=torch.int32)
                pool.values[1 - turn, b, :, n] = torch.tensor([one.log_prob, one.entropy])
            pool.values[1 - turn, b, 0, len(found) :] = -math.inf
        else:
            _hang_reference(b, found, trees, active)


def _choose_reference(step: int, b: int, found: list[_Candidate], pool: Pool, base: int, deepest: int) -> None:
    shape, rows = pool.shape, pool.rows
    least = found[-1].log_prob if len(found) == shape.max_nodes else -math.inf
    free = [one for one in found if one.opened and one.log_prob > least and one.depth < deepest]
    for i in range(shape.width):
        r, place = b * shape.width + i, 1 + step * shape.beam + i
        rows.live[r] = i < min(len(free), shape.beam)
        if rows.live[r]:
            one = free[i]
            one.place, one.opened = place, 0
            rows.sequence[r], rows.base[r], rows.position[r], rows.slot[r] = b, base, base + one.depth, base + place
            path = [*pool.paths[b, one.above, : one.depth].tolist(), place, *[0] * (PATH - 1 - one.depth)]
            rows.path[r] = pool.paths[b, place] = torch.tensor(path, dtype=torch.int32)
            pool.tokens_of_rows[r], pool.parents_of_rows[r] = one.token, one.above
            pool.log_probs_of_rows[r] = one.log_prob


def _hang_reference(b: int, found: list[_Candidate], trees: Trees, active: int) -> None:
    nodes = {0: 0} | {one.place: 1 + i for i, one in enumerate(found) if one.place > 0}
    trees.count[b] = len(found) + 1 if active else 0
    trees.tokens[b, 1:], trees.parents[b], trees.depths[b], trees.paths[b], trees.entropies[b] = 0, 0, 0, 0, 0.0
    trees.parents[b, 0] = -1
    for i, one in enumerate(found):
        node, parent = 1 + i, nodes[one.above]
        trees.tokens[b, node], trees.parents[b, node], trees.depths[b, node] = one.token, parent, one.depth
        trees.entropies[b, node] = one.entropy
        trees.paths[b, node] = trees.paths[b, parent]
        trees.paths[b, node, one.depth] = node


if triton is not None:

    @triton.jit(do_not_specialize=["first", "max_nodes", "max_depth"])
    def _grow_tree_kernel(  # type: ignore[no-untyped-def]
        cand_tokens, cand_log_probs, cand_entropies, first, max_nodes, max_depth, stop,
        active_of, base_of, end_of, kept, values, kept_next, values_next, paths_of, refused,
        live_of, sequence_of, position_of, slot_of, base_row, path_of, row_tokens, row_parents, row_log_probs,
        tree_tokens, tree_parents, tree_depths, tree_paths, tree_count, tree_entropies,
        BEAM: tl.constexpr, BRANCH: tl.constexpr, PLACES: tl.constexpr, WIDTH: tl.constexpr, MAX_DEPTH: tl.constexpr,
        FIRST: tl.constexpr, LAST: tl.constexpr, PATH: tl.constexpr, FIELDS: tl.constexpr, BLOCK: tl.constexpr,
        PDL: tl.constexpr,
    ):  # fmt: skip
        pdl_wait(PDL)
        pdl_next(PDL)
        b = tl.program_id(0)
        base = tl.load(base_of + b)
        deepest = tl.minimum(tl.load(end_of + b) - base - 2, max_depth)
        active = tl.load(active_of + b) != 0

        # expand: behind the candidates kept, the children of the places chosen last
        j = tl.arange(0, BLOCK)
        lane = (j - PATH) // BRANCH
        child = (j - PATH) % BRANCH
        if FIRST:
            fresh = (j >= PATH) & (lane == 0)
            grown = fresh & active & (deepest > 0)
            row = b + j * 0
            log_prob = tl.zeros([BLOCK], tl.float32)
            depth = tl.full([BLOCK], 1, tl.int32)
        else:
            fresh = (j >= PATH) & (lane < BEAM)
            row = b * WIDTH + lane
            grown = fresh & (tl.load(live_of + row, mask=fresh, other=0) != 0)
            log_prob = tl.load(row_log_probs + row, mask=grown, other=0.0)
            depth = tl.load(position_of + row, mask=grown, other=0) - base + 1
        entropy = tl.load(cand_entropies + row, mask=grown, other=0.0)
        token = tl.load(cand_tokens + row * BRANCH + child, mask=grown, other=-1)
        own = tl.load(cand_log_probs + row * BRANCH + child, mask=grown, other=float("-inf"))
        trusted = entropy < stop  # NaN is not
        added = grown & trusted & (token >= 0) & (own > float("-inf"))
        log_prob = tl.where(added, log_prob + tl.minimum(own, 0.0), float("-inf"))
        above = first + lane
        place = tl.full([BLOCK], -1, tl.int32)
        number = 1 + above * BRANCH + child
        free = added
        num_refused = tl.sum((grown & (child == 0) & ~trusted).to(tl.int32), 0)
        if not FIRST:
            num_refused += tl.load(refused + b)
            older = j < PATH
            own_value = values + b * 2 * PATH + j
            own_kept = kept + b * FIELDS * PATH + j
            log_prob = tl.where(older, tl.load(own_value, mask=older, other=0.0), log_prob)
            older = older & (log_prob > float("-inf"))
            entropy = tl.where(older, tl.load(own_value + PATH, mask=older, other=0.0), entropy)
            token = tl.where(older, tl.load(own_kept, mask=older, other=0), token)
            above = tl.where(older, tl.load(own_kept + PATH, mask=older, other=0), above)
            place = tl.where(older, tl.load(own_kept + 2 * PATH, mask=older, other=0), place)
            depth = tl.where(older, tl.load(own_kept + 3 * PATH, mask=older, other=0), depth)
            number = tl.where(older, tl.load(own_kept + 4 * PATH, mask=older, other=0), number)
            free = added | (older & (tl.load(own_kept + 5 * PATH, mask=older, other=0) != 0))
        tl.store(refused + b, num_refused)

        valid = log_prob > float("-inf")
        better = (log_prob[None, :] > log_prob[:, None]) | (
            (log_prob[None, :] == log_prob[:, None]) & (number[None, :] < number[:, None])
        )
        rank = tl.sum((better & valid[None, :]).to(tl.int32), 1)
        held = valid & (rank < max_nodes)
        num_held = tl.sum(held.to(tl.int32), 0)
        n = tl.arange(0, PATH)

        if not LAST:
            tl.debug_barrier()  # every warp has read the rows of the step before
            # choose: everything may enter while the tree has room
            worst = tl.max(tl.where(held & (rank == max_nodes - 1), log_prob, float("-inf")), 0)
            able = free & held & (log_prob > worst) & (depth < deepest)
            turn = tl.sum((better & able[None, :]).to(tl.int32), 1)
            chosen = able & (turn < BEAM)
            new_place = (1 if FIRST else first + BEAM) + turn
            place = tl.where(chosen, new_place, place)
            to = kept_next + b * FIELDS * PATH + rank
            tl.store(to, token, mask=held)
            tl.store(to + PATH, above, mask=held)
            tl.store(to + 2 * PATH, place, mask=held)
            tl.store(to + 3 * PATH, depth, mask=held)
            tl.store(to + 4 * PATH, number, mask=held)
            tl.store(to + 5 * PATH, (free & ~chosen).to(tl.int32), mask=held)
            to = values_next + b * 2 * PATH + rank
            tl.store(to, log_prob, mask=held)
            tl.store(to + PATH, entropy, mask=held)
            none = tl.full([PATH], float("-inf"), tl.float32)
            tl.store(values_next + b * 2 * PATH + n, none, mask=n >= num_held)

            at_row = b * WIDTH + turn
            tl.store(position_of + at_row, base + depth, mask=chosen)
            tl.store(slot_of + at_row, base + place, mask=chosen)
            tl.store(row_tokens + at_row, token, mask=chosen)
            tl.store(row_parents + at_row, above, mask=chosen)
            tl.store(row_log_probs + at_row, log_prob, mask=chosen)
            known = chosen[:, None] & (n[None, :] < depth[:, None])
            path = tl.load(paths_of + (b * PLACES + above)[:, None] * PATH + n[None, :], mask=known, other=0)
            path = tl.where(n[None, :] == depth[:, None], place[:, None], path)
            tl.store(paths_of + (b * PLACES + place)[:, None] * PATH + n[None, :], path, mask=chosen[:, None])
            tl.store(path_of + at_row[:, None] * PATH + n[None, :], path, mask=chosen[:, None])
            w = b * WIDTH + tl.arange(0, WIDTH)
            num_chosen = tl.sum(chosen.to(tl.int32), 0)
            tl.store(live_of + w, (w - b * WIDTH < num_chosen).to(tl.int32))
            tl.store(sequence_of + w, b + w * 0)
            tl.store(base_row + w, base + w * 0)
        else:
            # hang
            node = tl.where(held, rank + 1, 0)
            is_parent = held[None, :] & (place[None, :] == above[:, None]) & (above[:, None] > 0)
            parent = tl.sum(tl.where(is_parent, node[None, :], 0), 1)
            to = b * PATH + node
            tl.store(tree_tokens + to, token, mask=held)
            tl.store(tree_parents + to, parent, mask=held)
            tl.store(tree_depths + to, depth, mask=held)
            tl.store(tree_entropies + to, entropy, mask=held)
            rest = (n == 0) | (n > num_held)
            zero = n * 0
            tl.store(tree_tokens + b * PATH + n, zero, mask=n > num_held)
            tl.store(tree_parents + b * PATH + n, tl.where(n == 0, -1, 0), mask=rest)
            tl.store(tree_depths + b * PATH + n, zero, mask=rest)
            tl.store(tree_entropies + b * PATH + n, zero.to(tl.float32), mask=rest)
            tl.store(tree_count + b, tl.where(active, num_held + 1, 0))
            # walk up from every node at once
            mine = held[None, :] & (node[None, :] == n[:, None])
            n_parent = tl.sum(tl.where(mine, parent[None, :], 0), 1)
            up = tl.sum(tl.where(mine, depth[None, :], 0), 1)
            on = n
            path = tl.zeros([PATH, PATH], tl.int32)
            for _ in tl.static_range(MAX_DEPTH):
                path = tl.where((n[None, :] == up[:, None]) & (up > 0)[:, None], on[:, None], path)
                on = tl.gather(n_parent, on, 0)
                up = up - 1
            tl.store(tree_paths + (b * PATH + n)[:, None] * PATH + n[None, :], path)


def _settings(num_children: int) -> dict[str, int]:
    """What is kept and the children as one vector, and warps: all pairs of them are compared."""
    block = triton.next_power_of_2(PATH + num_children)
    return {"BLOCK": block, "num_warps": 4 if block > 32 else 1}


def grow_tree(
    step: int,
    tokens: Tensor,
    log_probs: Tensor,
    entropies: Tensor,
    pool: Pool,
    sequences: Sequences,
    trees: Trees,
    depth: int | None = None,
    *,
    pdl: bool = False,
) -> None:
    """Expand what was chosen last; then choose the rows of the next pass, or, after the last step, make the trees.

    Args:
        step: 0 for the root's children (nothing need be cleared before), up to depth - 1.
        tokens, log_probs: int32 and fp32 `[R, branch]`, what the head says after each row, best first; row b after the
            root of sequence b at step 0, `pool.rows` later. A token below 0 is none.
        entropies: fp32 `[R]`, nats.
        pool: the round's candidates; its `rows` are overwritten before the last step.
        sequences: of the batch.
        trees: overwritten at the last step.
        depth: of this round's trees, and its steps; None: the shape's.
        pdl: programmatic dependent launch.

    Raises:
        ValueError: a step or a shape that does not fit.
    """
    shape = pool.shape
    num_steps = shape.max_depth if depth is None else depth
    if not 0 <= step < num_steps <= shape.max_depth:
        raise ValueError(f"step is {step} of {num_steps}, expected 0 to {shape.max_depth - 1}")
    if tokens.shape[1] != shape.branch or tokens.shape != log_probs.shape:
        raise ValueError(f"candidates are {tuple(tokens.shape)}, expected {shape.branch} a row")
    for name, given, dtype in (
        ("tokens", tokens, torch.int32),
        ("log_probs", log_probs, torch.float32),
        ("entropies", entropies, torch.float32),
    ):
        if given.dtype != dtype or not given.is_contiguous():
            raise ValueError(f"{name} are {given.dtype}, expected {dtype} without gaps")
    rows, turn = pool.rows, step % 2
    _grow_tree_kernel[(len(sequences.base),)](
        tokens, log_probs, entropies, 0 if step == 0 else 1 + (step - 1) * shape.beam, shape.max_nodes,
        num_steps, shape.stop, sequences.active, sequences.base, sequences.end,
        pool.kept[turn], pool.values[turn], pool.kept[1 - turn], pool.values[1 - turn], pool.paths, pool.num_refused,
        rows.live, rows.sequence, rows.position, rows.slot, rows.base, rows.path,
        pool.tokens_of_rows, pool.parents_of_rows, pool.log_probs_of_rows,
        trees.tokens, trees.parents, trees.depths, trees.paths, trees.count, trees.entropies,
        BEAM=shape.beam, BRANCH=shape.branch, PLACES=shape.num_places, WIDTH=shape.width, MAX_DEPTH=shape.max_depth,
        FIRST=step == 0, LAST=step == num_steps - 1, PATH=PATH, FIELDS=FIELDS, PDL=pdl,
        **_settings(shape.beam * shape.branch), **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
