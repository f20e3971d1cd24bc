"""Trees drafted by exits of the trunk, in device memory: the gate, the nodes that it adds, the rows of the next pass.

A tree grows level by level, and the exits are asked about the nodes of the newest one in turn (`engine/draft.py`). Of
what exit k's head says after node i (`top_candidates`: its best tokens, the entropy H of its distribution and the
surprisal s of its likeliest token, in nats),

    c = H,  or  c = c(i) + s     the gate's measure: of the token, or of the whole path ("path")

c < low_k hangs the best token below the node, low_k <= c < high_k the `branch` best ones, and c becomes their c(j).
Else (NaN too) exit k + 1 is asked; a node that all exits refuse is a leaf. Nodes are numbered as they come: exit by
exit, node by node, best first, as long as there is room; then nothing is asked any more. A chain is branch = 1.

Rows are those of verification, `width` a sequence and row i node i; which are live says what the next pass runs. To the
first exit that is the newest level alone. To an exit behind it go the nodes that are asked and all on their paths, from
the exit before on: an ancestor may have stopped there, and its keys are needed now. With one exit the last level runs
there, too, though nothing is asked about it: then all nodes have been there, and verification goes on from it. Where
drafts run apart from verification, rows are those of the newest level alone, `lanes` a sequence, and all that are asked
run on to every exit, whichever was sure: so their keys are there for the nodes below them.

What is asked about node i of a level is row i of the heads' own, `lanes` a sequence. One program a sequence; state that
it reads is written behind a barrier.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .grow_tree import Sequences, Trees
from .rows import PATH, Rows
from .top_candidates import MOST_CANDIDATES

try:
    import triton
    import triton.language as tl

    from .tile import pdl_next, pdl_wait
except ImportError:
    triton = None


@dataclass(frozen=True)
class Levels:
    """How trees grow, level by level.

    Attributes:
        exits: exit layers to ask in turn, rising.
        gates: of each exit `(low, high)` in nats: below low one token, below high `branch`, else none; inf for no gate.
        branch: children of a node at most.
        max_depth: most tokens one after the other.
        max_nodes: most drafted nodes.
        by_path: gates compare the whole path's measure, not the token's entropy.
        apart: passes run in rows of their own, and verification never goes on from what they leave.
    """

    exits: tuple[int, ...]
    gates: tuple[tuple[float, float], ...]
    branch: int
    max_depth: int
    max_nodes: int
    by_path: bool = False
    apart: bool = False

    def __post_init__(self) -> None:
        if not self.exits or list(self.exits) != sorted(set(self.exits)) or self.exits[0] < 1:
            raise ValueError(f"exits are {self.exits}, expected at least one, from 1 on, rising")
        if len(self.gates) != len(self.exits) or any(low > high for low, high in self.gates):
            raise ValueError(f"gates are {self.gates} for {len(self.exits)} exits, expected (low, high) of each")
        if not 1 <= self.branch <= MOST_CANDIDATES or not 1 <= self.max_depth <= self.max_nodes < PATH:
            raise ValueError(
                f"branch is {self.branch}, max_depth {self.max_depth} and max_nodes {self.max_nodes}, expected 1 to "
                f"{MOST_CANDIDATES} and 1 to {PATH - 1}, as many nodes as levels at least"
            )

    @property
    def gated(self) -> bool:
        """Whether trees may be complete before the last step: refused, or full."""
        most = sum(self.branch**depth for depth in range(1, self.max_depth + 1))
        return self.max_nodes < most or min(high for _, high in self.gates) < math.inf

    @property
    def lanes(self) -> int:
        """Nodes that may be asked about at once in a sequence, as a power of two."""
        most = min(self.branch ** (self.max_depth - 1), self.max_nodes)
        return 1 << (most - 1).bit_length()

    @property
    def reached(self) -> int:
        """Layers that verification need not run: all nodes have run them, its own way, when a tree is complete."""
        return self.exits[0] if len(self.exits) == 1 and not self.apart else 0

    @property
    def num_steps(self) -> int:
        """Steps of a draft at most; where verification goes on from an exit, one is the last level's way to it."""
        return self.max_depth + (self.reached > 0)


@dataclass(frozen=True)
class Asked:
    """What exits are asked in a pass, at addresses that never change.

    Attributes:
        rows: `lanes` a sequence, in a level's order, live where it asks; as `lm_head` takes them.
        runs: int32 `[B]`, whether the sequence has live rows in the pass.
        source: int32 `[R]`, the row of the pass that each stands for.
        nats: fp32 `[B, 16]`, the measure of the path to each node.
        num_refused: int32 `[B]`, nodes that all exits refused in this round.
        exits: int32 `[B, 16]`, the exit layer that each node is from; 0 of the root.
        row_layers: int32 `[B]`, layers of rows that this round's passes run.
    """

    rows: Rows
    runs: Tensor
    source: Tensor
    nats: Tensor
    num_refused: Tensor
    exits: Tensor
    row_layers: Tensor

    @classmethod
    def empty(cls, lanes: int, num_refused: Tensor, exits: Tensor, row_layers: Tensor) -> Asked:
        batch, device = len(exits), exits.device
        rows = Rows.empty(-(-batch * lanes // 16) * 16, device)
        runs, source = torch.zeros_like(num_refused), torch.zeros_like(rows.live)
        nats = torch.zeros(batch, PATH, device=device)
        return cls(rows, runs, source, nats, num_refused, exits, row_layers)


def begin_levels_reference(
    levels: Levels, asked: Asked, sequences: Sequences, trees: Trees, rows: Rows, ids: Tensor, width: int
) -> None:
    """The same, sequence by sequence; arguments as `begin_levels`."""
    for b in range(len(sequences.base)):
        for own in (trees.parents, trees.depths, trees.paths, trees.entropies, asked.exits, asked.nats):
            own[b] = 0
        trees.tokens[b, 1:], trees.parents[b, 0] = 0, -1
        trees.count[b], asked.num_refused[b], asked.row_layers[b] = int(sequences.active[b] != 0), 0, 0
        _lay_level_reference(b, 0, levels, asked, sequences, trees, rows, ids, width)


def grow_level_reference(
    depth: int, exit_index: int, tokens: Tensor, entropies: Tensor, surprisals: Tensor, levels: Levels, asked: Asked,
    sequences: Sequences, trees: Trees, rows: Rows, ids: Tensor, width: int,
) -> None:  # fmt: skip
    """The same, node by node; arguments as `grow_level`."""
    low, high = levels.gates[exit_index]
    for b in range(len(sequences.base)):
        level, refused = _level(b, depth, trees), []
        for lane, node in enumerate(level):
            row = b * levels.lanes + lane
            if not asked.rows.live[row]:
                continue
            measure = float(asked.nats[b, node] + surprisals[row] if levels.by_path else entropies[row])
            wanted = 1 if measure < low else levels.branch if measure < high else 0
            if wanted == 0:
                refused.append(node)
            for token in tokens[row, :wanted].tolist():
                child = int(trees.count[b])
                if token < 0 or child > levels.max_nodes:
                    break
                trees.tokens[b, child], trees.parents[b, child], trees.depths[b, child] = token, node, depth + 1
                trees.paths[b, child] = trees.paths[b, node]
                trees.paths[b, child, depth + 1] = child
                trees.entropies[b, child], asked.nats[b, child] = entropies[row], measure
                asked.exits[b, child] = levels.exits[exit_index]
                trees.count[b] = child + 1
        if exit_index == len(levels.exits) - 1:
            asked.num_refused[b] += len(refused)
            _lay_level_reference(b, depth + 1, levels, asked, sequences, trees, rows, ids, width)
            continue
        ask = refused if trees.count[b] <= levels.max_nodes else []
        if levels.apart:  # rows run on
            for lane, node in enumerate(level):
                asked.rows.live[b * levels.lanes + lane] = int(node in ask)
            continue
        on_paths = {int(trees.paths[b, node, d]) for node in ask for d in range(depth + 1)}
        ran = levels.exits[exit_index + 1] - levels.exits[exit_index]
        _lay_reference(b, depth, level, ask, on_paths, ran, levels, asked, sequences, trees, rows, ids, width)


def _level(b: int, depth: int, trees: Trees) -> list[int]:
    return [node for node in range(int(trees.count[b])) if trees.depths[b, node] == depth]


def _lay_level_reference(
    b: int, depth: int, levels: Levels, asked: Asked, sequences: Sequences, trees: Trees, rows: Rows, ids: Tensor,
    width: int,
) -> None:  # fmt: skip
    """Rows of the pass of a whole level to the first exit."""
    level = _level(b, depth, trees)
    deepest = min(int(sequences.end[b]) - int(sequences.base[b]) - 2, levels.max_depth)
    ask = level if depth < deepest and trees.count[b] <= levels.max_nodes else []
    run = set(level if levels.reached else ask)
    layers = levels.exits[-1 if levels.apart else 0]
    _lay_reference(b, depth, level, ask, run, layers, levels, asked, sequences, trees, rows, ids, width)


def _lay_reference(
    b: int, depth: int, level: list[int], ask: list[int], run: set[int], num_layers: int, levels: Levels, asked: Asked,
    sequences: Sequences, trees: Trees, rows: Rows, ids: Tensor, width: int,
) -> None:  # fmt: skip
    base = int(sequences.base[b])
    asked.runs[b] = int(bool(run))
    asked.row_layers[b] += len(run) * num_layers
    for lane in range(levels.lanes):
        r = b * levels.lanes + lane
        asked.rows.live[r] = int(lane < len(level) and level[lane] in ask)
        if asked.rows.live[r]:
            place = lane if levels.apart else level[lane]
            asked.rows.sequence[r], asked.rows.position[r], asked.source[r] = b, base + depth, b * width + place
    for place in range(width):
        r, node = b * width + place, place
        if levels.apart:
            node = level[place] if place < len(level) else -1
        rows.live[r] = int(node in run)
        if rows.live[r]:
            rows.sequence[r], rows.base[r], rows.slot[r] = b, base, base + node
            rows.position[r] = base + trees.depths[b, node]
            rows.path[r], ids[r] = trees.paths[b, node], trees.tokens[b, node]


if triton is not None:

    @triton.jit(do_not_specialize=["depth", "exit_layer", "max_depth", "max_nodes", "num_layers"])
    def _grow_level_kernel(  # type: ignore[no-untyped-def]
        tokens, entropies, surprisals, depth, exit_layer, low, high, max_depth, max_nodes, num_layers,
        active_of, base_of, end_of, nats_of, refused_of, exits_of, row_layers_of,
        tree_tokens, tree_parents, tree_depths, tree_paths, tree_count, tree_entropies,
        live_of, sequence_of, position_of, slot_of, base_row, path_of, ids,
        asked_live, asked_sequence, asked_position, runs_of, source,
        WIDTH: tl.constexpr, LANES: tl.constexpr, BRANCH: tl.constexpr, BEGIN: tl.constexpr, LAST: tl.constexpr,
        ALONE: tl.constexpr, APART: tl.constexpr, BY_PATH: tl.constexpr, PATH: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        pdl_wait(PDL)
        pdl_next(PDL)
        b = tl.program_id(0)
        n = tl.arange(0, PATH)  # nodes, places on a path, lanes
        at_node = b * PATH + n
        base = tl.load(base_of + b)
        deepest = tl.minimum(tl.load(end_of + b) - base - 2, max_depth)
        if BEGIN:
            count = (tl.load(active_of + b) != 0).to(tl.int32)
            num_refused = 0
            row_layers = 0
            new = n > 0  # what other rounds left is overwritten
            token = tl.load(tree_tokens + at_node, mask=n == 0, other=0)
            parent = tl.where(n == 0, -1, 0)
            depth_of = n * 0
            path = n[:, None] * 0 + n[None, :] * 0
            entropy = n.to(tl.float32) * 0.0
            measure = entropy
            exit_layer = 0
            level = depth
            refused = n < 0
        else:
            before = tl.load(tree_count + b)
            num_refused = tl.load(refused_of + b)
            row_layers = tl.load(row_layers_of + b)
            known = n < before
            depth_of = tl.load(tree_depths + at_node, mask=known, other=-1)
            first = tl.sum((known & (depth_of < depth)).to(tl.int32), 0)
            lane = b * LANES + n - first
            asked = depth_of == depth
            asked = asked & (tl.load(asked_live + lane, mask=asked, other=0) != 0)
            entropy = tl.load(entropies + lane, mask=asked, other=0.0)
            measure = entropy
            if BY_PATH:
                measure = tl.load(surprisals + lane, mask=asked, other=0.0)
                measure += tl.load(nats_of + at_node, mask=asked, other=0.0)
            wanted = tl.where(measure < low, 1, tl.where(measure < high, BRANCH, 0))  # of NaN none
            refused = asked & (wanted == 0)
            children = n * 0
            for c in tl.static_range(BRANCH):
                there = tl.load(tokens + lane * BRANCH + c, mask=asked & (c < wanted), other=-1) >= 0
                children += there.to(tl.int32)
            start = before + tl.sum(tl.where(n[None, :] < n[:, None], children[None, :], 0), 1)
            children = tl.minimum(children, tl.maximum(max_nodes + 1 - start, 0))
            count = before + tl.sum(children, 0)
            # of each new node: the one that it hangs below, and which of its children it is
            new = (n >= before) & (n < count)
            below = (n[:, None] >= start[None, :]) & (n[:, None] < (start + children)[None, :])
            parent = tl.sum(tl.where(below, n[None, :], 0), 1)
            child = n - tl.sum(tl.where(below, start[None, :], 0), 1)
            entropy = tl.sum(tl.where(below, entropy[None, :], 0.0), 1)
            measure = tl.sum(tl.where(below, measure[None, :], 0.0), 1)
            token = tl.load(tree_tokens + at_node, mask=known, other=0)
            own = tokens + (b * LANES + parent - first) * BRANCH + child
            token = tl.where(new, tl.load(own, mask=new, other=0), token)
            depth_of = tl.where(new, depth + 1, depth_of)
            above = (b * PATH + tl.where(new, parent, n))[:, None] * PATH + n[None, :]
            path = tl.load(tree_paths + above, mask=(n < count)[:, None], other=0)
            path = tl.where(new[:, None] & (n[None, :] == depth + 1), n[:, None], path)
            level = depth
            if LAST:
                level = depth + 1
                num_refused += tl.sum(refused.to(tl.int32), 0)

        there = n < count
        in_level = there & (depth_of == level)
        first = tl.sum((there & (depth_of < level)).to(tl.int32), 0)
        room = count <= max_nodes
        if BEGIN or LAST:
            asks = in_level & (level < deepest) & room
            live = asks
            if ALONE:
                live = in_level
        else:
            asks = refused & room
            nodes = tl.sum(tl.where(n[None, :] <= depth_of[:, None], (n[:, None] * 0 + 1) << path, 0), 1)  # as bits
            on_path = asks[None, :] & (((nodes[None, :] >> n[:, None]) & 1) != 0)
            live = tl.max(on_path.to(tl.int32), 1) != 0
        num_live = tl.sum(live.to(tl.int32), 0)

        tl.debug_barrier()  # every warp has read the state
        tl.store(tree_tokens + at_node, token, mask=new)
        if BEGIN:
            new = n >= 0
        tl.store(tree_parents + at_node, parent, mask=new)
        tl.store(tree_depths + at_node, depth_of, mask=new)
        tl.store(tree_paths + at_node[:, None] * PATH + n[None, :], path, mask=new[:, None])
        tl.store(tree_entropies + at_node, entropy, mask=new)
        tl.store(exits_of + at_node, n * 0 + exit_layer, mask=new)
        tl.store(nats_of + at_node, measure, mask=new)
        tl.store(tree_count + b, count)
        tl.store(refused_of + b, num_refused)
        tl.store(row_layers_of + b, row_layers + num_live * num_layers)

        if BEGIN or LAST or not APART:  # apart, the rows that are there run on to the next exit
            is_row = n < WIDTH
            place = n
            if APART:
                place = n - first
                tl.store(live_of + b * WIDTH + n, n * 0, mask=is_row & (n >= tl.sum(in_level.to(tl.int32), 0)))
                is_row = in_level & (place < WIDTH)
            row = b * WIDTH + place
            tl.store(live_of + row, live.to(tl.int32), mask=is_row)
            tl.store(sequence_of + row, n * 0 + b, mask=is_row)
            tl.store(position_of + row, base + tl.maximum(depth_of, 0), mask=is_row)
            tl.store(slot_of + row, base + n, mask=is_row)
            tl.store(base_row + row, n * 0 + base, mask=is_row)
            tl.store(path_of + row[:, None] * PATH + n[None, :], path, mask=is_row[:, None])
            tl.store(ids + row, token, mask=is_row)
            tl.store(runs_of + b, (num_live > 0).to(tl.int32))
        lane = b * LANES + n
        is_lane = n < LANES
        tl.store(asked_live + lane - first, asks.to(tl.int32), mask=in_level & (n < first + LANES))
        tl.store(asked_live + lane, n * 0, mask=is_lane & (n >= tl.sum(in_level.to(tl.int32), 0)))
        tl.store(asked_sequence + lane, n * 0 + b, mask=is_lane)
        tl.store(asked_position + lane, n * 0 + base + level, mask=is_lane)
        if APART:
            first = 0
        tl.store(source + lane, b * WIDTH + tl.minimum(first + n, WIDTH - 1), mask=is_lane)


def begin_levels(
    levels: Levels,
    asked: Asked,
    sequences: Sequences,
    trees: Trees,
    rows: Rows,
    ids: Tensor,
    width: int,
    *,
    pdl: bool = False,
) -> None:
    """Make each active sequence's tree its root alone, and the rows of the first pass.

    Args:
        levels: how trees grow.
        asked: overwritten.
        sequences: of the batch.
        trees: overwritten but for the roots' tokens.
        rows, ids: of the passes, overwritten; row b * width + i is node i of sequence b, or apart node i of its level.
        width: 2, 4, 8 or 16, more than drafted nodes; `levels.lanes` for drafts apart.
        pdl: programmatic dependent launch.

    Raises:
        ValueError: sizes that do not fit.
    """
    batch = len(sequences.base)
    fits = width == levels.lanes if levels.apart else width in (2, 4, 8, 16) and width > levels.max_nodes
    if not fits or len(rows) < batch * width:
        raise ValueError(
            f"width {width} for {batch} sequences and trees of {levels.max_nodes} drafted nodes (apart: "
            f"{levels.apart}) does not go into {len(rows)} rows"
        )
    if len(asked.rows) < batch * levels.lanes:
        raise ValueError(f"{len(asked.rows)} rows are asked, expected {batch} sequences of {levels.lanes} nodes")
    _launch(0, 0, None, levels, asked, sequences, trees, rows, ids, width, pdl)


def grow_level(
    depth: int,
    exit_index: int,
    tokens: Tensor,
    entropies: Tensor,
    surprisals: Tensor,
    levels: Levels,
    asked: Asked,
    sequences: Sequences,
    trees: Trees,
    rows: Rows,
    ids: Tensor,
    width: int,
    *,
    pdl: bool = False,
) -> None:
    """Hang an exit's answers below the nodes asked about, and make the rows of the next pass: of the next exit for
    nodes that it refused, or after the last exit of the next level.

    Args:
        depth: of the nodes that were asked about, 0 up to max_depth - 1.
        exit_index: of the exit that answers.
        tokens: int32 `[R, branch]` of `top_candidates` for `asked.rows`, best first; below 0 is none.
        entropies, surprisals: fp32 `[R]`, nats, likewise.
        others: as in `begin_levels`.

    Raises:
        ValueError: a depth, an exit or answers that do not fit.
    """
    if not 0 <= depth < levels.max_depth or not 0 <= exit_index < len(levels.exits):
        raise ValueError(
            f"depth {depth} and exit {exit_index} of {levels.max_depth} levels from {len(levels.exits)} exits"
        )
    num_rows = len(asked.rows)
    if tokens.shape != (num_rows, levels.branch) or not entropies.shape == surprisals.shape == (num_rows,):
        raise ValueError(
            f"tokens {tuple(tokens.shape)}, entropies {tuple(entropies.shape)} and surprisals "
            f"{tuple(surprisals.shape)}: expected {num_rows} rows of {levels.branch} tokens"
        )
    answer = tokens, entropies, surprisals
    _launch(depth, exit_index, answer, levels, asked, sequences, trees, rows, ids, width, pdl)


def _launch(
    depth: int, exit_index: int, answer: tuple[Tensor, Tensor, Tensor] | None, levels: Levels, asked: Asked,
    sequences: Sequences, trees: Trees, rows: Rows, ids: Tensor, width: int, pdl: bool,
) -> None:  # fmt: skip
    exits, begin = levels.exits, answer is None
    last = exit_index == len(exits) - 1
    num_layers = exits[0] if begin or last else exits[exit_index + 1] - exits[exit_index]
    if levels.apart:
        num_layers = exits[-1] if begin or last else 0
    low, high = (float(nats) for nats in levels.gates[exit_index])
    _grow_level_kernel[(len(sequences.base),)](
        *(answer or (ids, asked.nats, asked.nats)), depth, exits[exit_index], low, high, levels.max_depth,
        levels.max_nodes, num_layers, sequences.active, sequences.base, sequences.end,
        asked.nats, asked.num_refused, asked.exits, asked.row_layers,
        trees.tokens, trees.parents, trees.depths, trees.paths, trees.count, trees.entropies,
        rows.live, rows.sequence, rows.position, rows.slot, rows.base, rows.path, ids,
        asked.rows.live, asked.rows.sequence, asked.rows.position, asked.runs, asked.source,
        WIDTH=width, LANES=levels.lanes, BRANCH=levels.branch, BEGIN=begin, LAST=last, ALONE=levels.reached > 0,
        APART=levels.apart, BY_PATH=levels.by_path, PATH=PATH, PDL=pdl,
        num_warps=1,  # pairs of 16 nodes are eight a thread, and shuffles beat shared memory
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
