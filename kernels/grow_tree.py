"""Best-first draft trees in device memory: the pool of candidates of `engine/best_first.py`, one program a sequence.

A candidate is a drafted token with the log-probability of its whole path. Step by step,

    expand   the nodes chosen last get their children (`top_candidates`), unless their entropy is `stop` or more;
    choose   the likeliest `beam` candidates without children whose children may still enter the tree become rows of
             the head's next pass;

and after the last step `hang` makes the likeliest `max_nodes` the tree that is verified. A chain is beam = branch = 1.

Places number the head's entries of a round: the root's is 0, the i-th row of step s has 1 + (s - 1) beam + i, whether
chosen or not. Candidate 1 + place * branch + c is the c-th child of a place, candidate 0 the root; so parents come
before children, and equal candidates rank in the order of `best_first`, which decides by index too. A candidate that
does not exist has log-probability -inf.

A rank is a count of comparisons over all pairs of candidates, no sort: at most 128 candidates. Nothing that a program
reads is written by the same launch (`opened` is double-buffered), because warps of a program are not in step.
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

    from .tile import pdl_begin, pdl_wait
except ImportError:
    triton = None

MOST_CANDIDATES = 128


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
        if self.num_candidates > MOST_CANDIDATES:
            raise ValueError(
                f"beam {self.beam}, branch {self.branch} and depth {self.max_depth} make {self.num_candidates} "
                f"candidates, expected at most {MOST_CANDIDATES}; take a smaller one of them"
            )

    @property
    def num_places(self) -> int:
        """Entries that the head makes at most, the root's included."""
        return 1 + self.beam * (self.max_depth - 1)

    @property
    def num_candidates(self) -> int:
        return 1 + self.branch * self.num_places

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
    """The candidates of B sequences in one round, `[B, P]` int32 or fp32 by index; made once, at fixed addresses.

    Attributes:
        opened: `[2, B, P]`, 1 where a candidate has no children yet; read and written in turns.
        by_place: `[B, places]`, candidate at each place of the head, -1 for none.
        paths: `[B, places, 16]`, place of the ancestor at each depth; a root's own row stays 0.
        num_refused: `[B]`, nodes that the gate refused in this round.
        rows: of the head's next pass, `width` a sequence.
        tokens_of_rows, parents_of_rows: `[R]`, the rows' tokens, and where their parents' outputs stand among
            `[B * places]`.
    """

    shape: Shape
    tokens: Tensor
    parents: Tensor
    depths: Tensor
    log_probs: Tensor
    entropies: Tensor
    opened: Tensor
    by_place: Tensor
    paths: Tensor
    num_refused: Tensor
    rows: Rows
    tokens_of_rows: Tensor
    parents_of_rows: Tensor

    @classmethod
    def empty(cls, batch: int, shape: Shape, device: torch.device | str) -> Pool:
        def whole(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        num_rows = -(-batch * shape.width // 16) * 16
        size = batch, shape.num_candidates
        return cls(
            shape, whole(*size), whole(*size), whole(*size), torch.zeros(size, device=device),
            torch.zeros(size, device=device), whole(2, *size), whole(batch, shape.num_places),
            whole(batch, shape.num_places, PATH), whole(batch), Rows.empty(num_rows, device), whole(num_rows),
            whole(num_rows),
        )  # fmt: skip

    @property
    def num_rows(self) -> int:
        return len(self.rows)


def grow_tree_reference(
    step: int, tokens: Tensor, log_probs: Tensor, entropies: Tensor, pool: Pool, sequences: Sequences, trees: Trees
) -> None:
    """The same, candidate by candidate; arguments as `grow_tree`."""
    shape = pool.shape
    for b in range(len(sequences.base)):
        active, base, end = (int(t[b]) for t in (sequences.active, sequences.base, sequences.end))
        deepest = min(end - base - 2, shape.max_depth)
        if step == 0:
            pool.log_probs[b] = -math.inf
            pool.num_refused[b] = 0
        first, count = (0, 1) if step == 0 else (1 + (step - 1) * shape.beam, shape.beam)
        for i in range(count):
            place, row = first + i, b * (1 if step == 0 else shape.width) + i
            parent = int(pool.by_place[b, place]) if step else 0 if active and deepest > 0 else -1
            if parent < 0:
                continue
            if not float(entropies[row]) < shape.stop:
                pool.num_refused[b] += 1
                continue
            path = (float(pool.log_probs[b, parent]), int(pool.depths[b, parent])) if step else (0.0, 0)
            for c in range(shape.branch):
                one, own = 1 + place * shape.branch + c, float(log_probs[row, c])
                if tokens[row, c] >= 0 and own > -math.inf:
                    pool.tokens[b, one], pool.parents[b, one] = tokens[row, c], parent
                    pool.log_probs[b, one], pool.depths[b, one] = path[0] + min(own, 0.0), path[1] + 1
                    pool.entropies[b, one] = entropies[row]
        values = pool.log_probs[b].tolist()
        order = sorted((j for j, v in enumerate(values) if j and v > -math.inf), key=lambda j: -values[j])
        if step < shape.max_depth - 1:
            _choose_reference(step, b, order, pool, base, deepest)
        else:
            _hang_reference(b, order, pool, trees, active)


def _choose_reference(step: int, b: int, order: list[int], pool: Pool, base: int, deepest: int) -> None:
    shape, rows = pool.shape, pool.rows
    values = pool.log_probs[b].tolist()
    least = values[order[shape.max_nodes - 1]] if len(order) >= shape.max_nodes else -math.inf
    done = {int(one) for one in pool.by_place[b, 1 : 1 + step * shape.beam]}
    free = [j for j in order if j not in done and values[j] > least and pool.depths[b, j] < deepest]
    for i in range(shape.beam):
        r, place = b * shape.width + i, 1 + step * shape.beam + i
        pool.by_place[b, place] = free[i] if i < len(free) else -1
        rows.live[r] = i < len(free)
        if i < len(free):
            one = free[i]
            depth, above = int(pool.depths[b, one]), (one - 1) // shape.branch
            rows.sequence[r], rows.base[r], rows.position[r], rows.slot[r] = b, base, base + depth, base + place
            path = [*pool.paths[b, above, :depth].tolist(), place, *[0] * (PATH - 1 - depth)]
            rows.path[r] = pool.paths[b, place] = torch.tensor(path, dtype=torch.int32)
            pool.tokens_of_rows[r], pool.parents_of_rows[r] = pool.tokens[b, one], b * shape.num_places + above


def _hang_reference(b: int, order: list[int], pool: Pool, trees: Trees, active: int) -> None:
    nodes = {0: 0} | {one: 1 + i for i, one in enumerate(order[: pool.shape.max_nodes])}
    trees.count[b] = len(nodes) if active else 0
    trees.tokens[b, 1:], trees.parents[b], trees.depths[b], trees.paths[b], trees.entropies[b] = 0, 0, 0, 0, 0.0
    trees.parents[b, 0] = -1
    for one, node in nodes.items():
        if node:
            parent, depth = nodes[int(pool.parents[b, one])], int(pool.depths[b, one])
            trees.tokens[b, node], trees.parents[b, node], trees.depths[b, node] = pool.tokens[b, one], parent, depth
            trees.entropies[b, node] = pool.entropies[b, one]
            trees.paths[b, node] = trees.paths[b, parent]
            trees.paths[b, node, depth] = node


if triton is not None:

    @triton.jit(do_not_specialize=["first", "max_nodes", "max_depth"])
    def _grow_tree_kernel(  # type: ignore[no-untyped-def]
        cand_tokens, cand_log_probs, cand_entropies, first, max_nodes, max_depth, stop,
        active_of, base_of, end_of,
        tokens_of, parents_of, depths_of, log_probs_of, entropies_of, opened, opened_next, by_place, paths_of, refused,
        live_of, sequence_of, position_of, slot_of, base_row, path_of, row_tokens, row_parents,
        tree_tokens, tree_parents, tree_depths, tree_paths, tree_count, tree_entropies,
        BEAM: tl.constexpr, BRANCH: tl.constexpr, NUM: tl.constexpr, PLACES: tl.constexpr, WIDTH: tl.constexpr,
        MAX_DEPTH: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, PATH: tl.constexpr, BLOCK: tl.constexpr,
        PDL: tl.constexpr,
    ):  # fmt: skip
        pdl_begin(PDL)
        pdl_wait(PDL)
        b = tl.program_id(0)
        base = tl.load(base_of + b)
        deepest = tl.minimum(tl.load(end_of + b) - base - 2, max_depth)
        active = tl.load(active_of + b) != 0
        j = tl.arange(0, BLOCK)
        at = b * NUM + j
        place = tl.where(j > 0, (j - 1) // BRANCH, -1)
        child = j - 1 - place * BRANCH

        # expand: children of the places chosen last
        lane = place - first
        if FIRST:
            fresh = (j > 0) & (place == 0)
            parent = tl.zeros_like(j)
            grown = fresh & active & (deepest > 0)
            above = tl.zeros([BLOCK], tl.float32)
            depth = tl.full([BLOCK], 1, tl.int32)
            row = b + tl.zeros_like(j)
        else:
            fresh = (lane >= 0) & (lane < BEAM) & (j < NUM)
            parent = tl.load(by_place + b * PLACES + place, mask=fresh, other=-1)
            grown = fresh & (parent >= 0)
            above = tl.load(log_probs_of + b * NUM + parent, mask=grown, other=0.0)
            depth = tl.load(depths_of + b * NUM + parent, mask=grown, other=0) + 1
            row = b * WIDTH + lane
        entropy = tl.load(cand_entropies + row, mask=grown, other=0.0)
        token = tl.load(cand_tokens + row * BRANCH + child, mask=grown, other=-1)
        own = tl.load(cand_log_probs + row * BRANCH + child, mask=grown, other=float("-inf"))
        trusted = entropy < stop  # NaN is not
        added = grown & trusted & (token >= 0) & (own > float("-inf"))
        fresh_log_prob = tl.where(added, above + tl.minimum(own, 0.0), float("-inf"))
        tl.store(tokens_of + at, token, mask=fresh)
        tl.store(parents_of + at, parent, mask=fresh)
        tl.store(depths_of + at, depth, mask=fresh)
        tl.store(log_probs_of + at, fresh_log_prob, mask=fresh)
        tl.store(entropies_of + at, entropy, mask=fresh)
        num_refused = tl.sum((grown & (child == 0) & ~trusted).to(tl.int32), 0)

        older = (j > 0) & (place < first)
        if FIRST:
            log_prob = fresh_log_prob
            free = added
        else:
            num_refused += tl.load(refused + b)
            log_prob = tl.where(fresh, fresh_log_prob, tl.load(log_probs_of + at, mask=older, other=float("-inf")))
            token = tl.where(fresh, token, tl.load(tokens_of + at, mask=older, other=0))
            depth = tl.where(fresh, depth, tl.load(depths_of + at, mask=older, other=0))
            free = added | (older & (tl.load(opened + at, mask=older, other=0) != 0))
        tl.store(refused + b, num_refused)
        valid = log_prob > float("-inf")
        better = (log_prob[None, :] > log_prob[:, None]) | (
            (log_prob[None, :] == log_prob[:, None]) & (j[None, :] < j[:, None])
        )
        rank = tl.sum((better & valid[None, :]).to(tl.int32), 1)

        if not LAST:
            # choose: -inf while the tree still has room
            worst = tl.max(tl.where(valid & (rank == max_nodes - 1), log_prob, float("-inf")), 0)
            free = free & valid & (log_prob > worst) & (depth < deepest)
            turn = tl.sum((better & free[None, :]).to(tl.int32), 1)
            chosen = free & (turn < BEAM)
            tl.store(opened_next + at, (free & ~chosen).to(tl.int32), mask=(fresh | older) & (j < NUM))
            next_first = 1 if FIRST else first + BEAM
            at_place = b * PLACES + next_first + turn
            at_row = b * WIDTH + turn
            tl.store(by_place + at_place, j, mask=chosen)
            tl.store(position_of + at_row, base + depth, mask=chosen)
            tl.store(slot_of + at_row, base + next_first + turn, mask=chosen)
            tl.store(row_tokens + at_row, token, mask=chosen)
            tl.store(row_parents + at_row, b * PLACES + place, mask=chosen)
            i = tl.arange(0, PATH)
            known = chosen[:, None] & (i[None, :] < depth[:, None])
            path = tl.load(paths_of + (b * PLACES + place)[:, None] * PATH + i[None, :], mask=known, other=0)
            path = tl.where(i[None, :] == depth[:, None], (next_first + turn)[:, None], path)
            tl.store(paths_of + at_place[:, None] * PATH + i[None, :], path, mask=chosen[:, None])
            tl.store(path_of + at_row[:, None] * PATH + i[None, :], path, mask=chosen[:, None])
            w = tl.arange(0, WIDTH)
            num_chosen = tl.sum(chosen.to(tl.int32), 0)
            tl.store(by_place + b * PLACES + next_first + w, -1 + w * 0, mask=(w >= num_chosen) & (w < BEAM))
            tl.store(live_of + b * WIDTH + w, (w < num_chosen).to(tl.int32))
            tl.store(sequence_of + b * WIDTH + w, b + w * 0)
            tl.store(base_row + b * WIDTH + w, base + w * 0)
        else:
            # hang
            if not FIRST:
                parent = tl.where(fresh, parent, tl.load(parents_of + at, mask=older, other=0))
                entropy = tl.where(fresh, entropy, tl.load(entropies_of + at, mask=older, other=0.0))
            kept = valid & (rank < max_nodes)
            node = tl.where(kept, rank + 1, 0)
            hit = parent[:, None] == j[None, :]
            above_node = tl.sum(tl.where(hit, node[None, :], 0), 1)
            n = tl.arange(0, PATH)
            mine = kept[None, :] & (node[None, :] == n[:, None])
            n_parent = tl.sum(tl.where(mine, above_node[None, :], 0), 1)
            n_depth = tl.sum(tl.where(mine, depth[None, :], 0), 1)
            n_token = tl.sum(tl.where(mine, token[None, :], 0), 1)
            n_entropy = tl.sum(tl.where(mine, entropy[None, :], 0.0), 1)
            at_node = b * PATH + n
            tl.store(tree_tokens + at_node, n_token, mask=n > 0)
            tl.store(tree_parents + at_node, tl.where(n == 0, -1, n_parent))
            tl.store(tree_depths + at_node, n_depth)
            tl.store(tree_entropies + at_node, n_entropy)
            count = tl.sum(kept.to(tl.int32), 0) + 1
            tl.store(tree_count + b, tl.where(active, count, 0))
            # walk up from every node at once
            up = n_depth
            on = n
            path = tl.zeros([PATH, PATH], tl.int32)
            for _ in tl.static_range(MAX_DEPTH):
                path = tl.where((n[None, :] == up[:, None]) & (up > 0)[:, None], on[:, None], path)
                on = tl.sum(tl.where(on[:, None] == n[None, :], n_parent[None, :], 0), 1)
                up = up - 1
            tl.store(tree_paths + at_node[:, None] * PATH + n[None, :], path)


def _settings(num_candidates: int) -> dict[str, int]:
    """Candidates as a vector, and warps: all pairs of them are compared."""
    block = max(16, triton.next_power_of_2(num_candidates))
    return {"BLOCK": block, "num_warps": 8 if block > 64 else 4 if block > 32 else 1}


def grow_tree(
    step: int,
    tokens: Tensor,
    log_probs: Tensor,
    entropies: Tensor,
    pool: Pool,
    sequences: Sequences,
    trees: Trees,
    *,
    pdl: bool = False,
) -> None:
    """Expand what was chosen last; then choose the rows of the next pass, or, after the last step, make the trees.

    Args:
        step: 0 for the root's children (nothing need be cleared before), up to max_depth - 1.
        tokens, log_probs: int32 and fp32 `[R, branch]`, what the head says after each row, best first; row b after the
            root of sequence b at step 0, `pool.rows` later. A token below 0 is none.
        entropies: fp32 `[R]`, nats.
        pool: the round's candidates; its `rows` are overwritten before the last step.
        sequences: of the batch.
        trees: overwritten at the last step.
        pdl: programmatic dependent launch.

    Raises:
        ValueError: a step or a shape that does not fit.
    """
    shape = pool.shape
    if not 0 <= step < shape.max_depth:
        raise ValueError(f"step is {step}, expected 0 to {shape.max_depth - 1}")
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
        shape.max_depth, shape.stop, sequences.active, sequences.base, sequences.end,
        pool.tokens, pool.parents, pool.depths, pool.log_probs, pool.entropies, pool.opened[turn],
        pool.opened[1 - turn], pool.by_place, pool.paths, pool.num_refused,
        rows.live, rows.sequence, rows.position, rows.slot, rows.base, rows.path,
        pool.tokens_of_rows, pool.parents_of_rows,
        trees.tokens, trees.parents, trees.depths, trees.paths, trees.count, trees.entropies,
        BEAM=shape.beam, BRANCH=shape.branch, NUM=shape.num_candidates, PLACES=shape.num_places, WIDTH=shape.width,
        MAX_DEPTH=shape.max_depth, FIRST=step == 0, LAST=step == shape.max_depth - 1, PATH=PATH, PDL=pdl,
        **_settings(shape.num_candidates), **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
