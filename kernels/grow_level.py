"""Chains drafted by exits of the trunk, in device memory: the gate, the node that it adds, the rows of the next pass.

A chain grows token by token, and the exits are asked for a token in turn (`engine/draft.py`). With what the LM head
left per tile of columns (`lm_head`: m = max l, Z, A) of exit k's logits after node d,

    H = log Z - A / Z                     the entropy of the head's distribution, in nats
    c = H,  or  c = c(d) - log max p      the gate's measure: of the token, or of the whole path ("path")

c < stop_k makes the head's token (the argmax of the scores, the lowest id on ties) node d + 1, and c its c(d + 1).
Otherwise exit k + 1 is asked; refused by all, the chain ends. NaN and +inf are refused.

Rows are those of verification, `width` a sequence and row i node i; which are live says what the next pass runs. To the
first exit that is the newest node alone. An exit behind it runs all nodes of the chain from the exit before on: an
ancestor may have stopped there, and its keys are needed now. With one exit the last node of a chain runs there, too,
though nothing is asked about it: then all nodes have been there, and verification goes on from it. One program a
sequence; state that a program reads is written behind a barrier, because its warps are not in step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .grow_tree import Sequences, Trees
from .rows import PATH, Rows

try:
    import triton
    import triton.language as tl

    from .tile import pdl_next, pdl_wait
except ImportError:
    triton = None


@dataclass(frozen=True)
class Chain:
    """How chains grow.

    Attributes:
        exits: exit layers to ask in turn, rising.
        stops: nats from which on each refuses; inf for no gate.
        length: most tokens.
        by_path: gates compare the whole path's measure, not the token's entropy.
    """

    exits: tuple[int, ...]
    stops: tuple[float, ...]
    length: int
    by_path: bool = False

    def __post_init__(self) -> None:
        if not self.exits or list(self.exits) != sorted(set(self.exits)) or self.exits[0] < 1:
            raise ValueError(f"exits are {self.exits}, expected at least one, from 1 on, rising")
        if len(self.stops) != len(self.exits) or not 1 <= self.length < PATH:
            raise ValueError(
                f"{len(self.stops)} stops for {len(self.exits)} exits and length {self.length}, expected one each and "
                f"1 to {PATH - 1}"
            )

    @property
    def max_nodes(self) -> int:
        """Drafted nodes at most."""
        return self.length

    @property
    def gated(self) -> bool:
        """Whether chains may end early."""
        return min(self.stops) < math.inf

    @property
    def reached(self) -> int:
        """Layers that all nodes have run when a chain is complete."""
        return self.exits[0] if len(self.exits) == 1 else 0

    @property
    def num_steps(self) -> int:
        """Steps of a draft at most; with one exit the last one is the last node's way to it."""
        return self.length + (len(self.exits) == 1)

    def row_layers(self, spoke: Sequence[int], num_refused: int) -> int:
        """Layers of rows that a draft ran and verification runs again, from the exit that each of its tokens is from
        and whether another one was refused; every exit behind the first runs the chain so far once more."""
        if self.reached:
            return 0
        total = 0
        for node, last in enumerate([*spoke, *[self.exits[-1]] * num_refused]):
            total += self.exits[0] + (node + 1) * (last - self.exits[0])
        return total


@dataclass(frozen=True)
class Asked:
    """What exits are asked in a pass, at addresses that never change.

    Attributes:
        rows: one a sequence, live where it asks; as `lm_head` takes them.
        runs: int32 `[B]`, whether the sequence has live rows in the pass.
        source: int32 `[R]`, the row of the pass that each stands for.
        nats: fp32 `[B]`, the measure of the path to the newest node.
        num_refused: int32 `[B]`, 1 where all exits refused a node in this round.
        exits: int32 `[B, 16]`, the exit layer that each node is from; 0 of the root.
    """

    rows: Rows
    runs: Tensor
    source: Tensor
    nats: Tensor
    num_refused: Tensor
    exits: Tensor

    @classmethod
    def empty(cls, num_refused: Tensor, exits: Tensor) -> Asked:
        batch, device = len(exits), exits.device
        rows = Rows.empty(-(-batch // 16) * 16, device)
        runs, source = torch.zeros_like(num_refused), torch.zeros_like(rows.live)
        return cls(rows, runs, source, torch.zeros(batch, device=device), num_refused, exits)


def begin_chain_reference(
    chain: Chain, asked: Asked, sequences: Sequences, trees: Trees, rows: Rows, ids: Tensor, width: int
) -> None:
    """The same, sequence by sequence; arguments as `begin_chain`."""
    for b in range(len(sequences.base)):
        n = torch.arange(PATH, dtype=torch.int32)
        trees.tokens[b, 1:], trees.entropies[b], asked.exits[b] = 0, 0.0, 0
        trees.parents[b], trees.depths[b] = n - 1, n
        trees.paths[b] = torch.where(n <= n.unsqueeze(1), n, 0)
        trees.count[b] = int(sequences.active[b] != 0)
        asked.nats[b], asked.num_refused[b] = 0.0, 0
        _lay_reference(b, 0, bool(sequences.active[b]), True, chain, asked, sequences, trees, rows, ids, width)


def grow_chain_reference(
    depth: int, exit_index: int, best_value: Tensor, best_id: Tensor, tile_stats: Tensor, chain: Chain, asked: Asked,
    sequences: Sequences, trees: Trees, rows: Rows, ids: Tensor, width: int,
) -> None:  # fmt: skip
    """The same, sequence by sequence; arguments as `grow_chain`."""
    last = exit_index == len(chain.exits) - 1
    for b in range(len(sequences.base)):
        asks, added = bool(asked.rows.live[b]), False
        if asks:
            top = float(best_value[b].max())
            largest = tile_stats[b, 0].max()
            scale = (tile_stats[b, 0] - largest).exp()
            z, a = (tile_stats[b, 1] * scale).sum(), (tile_stats[b, 2] * scale).sum()
            entropy = float(z.log() + largest - a / z)
            measure = float(asked.nats[b] + z.log()) if chain.by_path else entropy
            added = math.isfinite(top) and measure < chain.stops[exit_index]
        if added:
            node = depth + 1
            trees.tokens[b, node] = int(best_id[b][best_value[b] == top].min())
            trees.entropies[b, node], asked.exits[b, node] = entropy, chain.exits[exit_index]
            trees.count[b], asked.nats[b] = node + 1, measure
        if last:
            asked.num_refused[b] += int(asks and not added)
        runs = int(trees.count[b]) == depth + 2 if last else asks and not added
        _lay_reference(b, depth + 1 if last else depth, runs, last, chain, asked, sequences, trees, rows, ids, width)


def _deepest(chain: Chain, sequences: Sequences, b: int) -> int:
    return min(int(sequences.end[b]) - int(sequences.base[b]) - 2, chain.length)


def _lay_reference(
    b: int, newest: int, runs: bool, first: bool, chain: Chain, asked: Asked, sequences: Sequences, trees: Trees,
    rows: Rows, ids: Tensor, width: int,
) -> None:  # fmt: skip
    base = int(sequences.base[b])
    asks = runs and newest < _deepest(chain, sequences, b)
    runs = runs if chain.reached else asks
    asked.rows.live[b], asked.rows.sequence[b], asked.rows.position[b] = int(asks), b, base + newest
    asked.source[b], asked.runs[b] = b * width + newest, int(runs)
    for node in range(width):
        r = b * width + node
        rows.live[r] = int(runs and (node == newest if first else node <= newest))
        if rows.live[r]:
            rows.sequence[r], rows.base[r], rows.position[r], rows.slot[r] = b, base, base + node, base + node
            rows.path[r], ids[r] = trees.paths[b, node], trees.tokens[b, node]


if triton is not None:

    @triton.jit(do_not_specialize=["num_tiles", "depth", "exit_layer", "length"])
    def _grow_chain_kernel(  # type: ignore[no-untyped-def]
        best_value, best_id, tile_stats, num_tiles, depth, exit_layer, stop, length,
        active_of, base_of, end_of, nats_of, refused, exits_of,
        tree_tokens, tree_parents, tree_depths, tree_paths, tree_count, tree_entropies,
        live_of, sequence_of, position_of, slot_of, base_row, path_of, ids,
        asked_live, asked_sequence, asked_position, runs_of, source,
        WIDTH: tl.constexpr, BEGIN: tl.constexpr, LAST: tl.constexpr, ALONE: tl.constexpr, BY_PATH: tl.constexpr,
        PATH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        pdl_wait(PDL)
        pdl_next(PDL)
        b = tl.program_id(0)
        n = tl.arange(0, PATH)
        i = tl.arange(0, WIDTH)
        base = tl.load(base_of + b)
        deepest = tl.minimum(tl.load(end_of + b) - base - 2, length)
        at_node = b * PATH
        if BEGIN:
            newest = depth
            active = tl.load(active_of + b) != 0
            runs = active
            zero = n * 0
            tl.store(tree_tokens + at_node + n, zero, mask=n > 0)
            tl.store(tree_parents + at_node + n, n - 1)
            tl.store(tree_depths + at_node + n, n)
            path = tl.where(n[None, :] <= n[:, None], n[None, :], 0)
            tl.store(tree_paths + (at_node + n)[:, None] * PATH + n[None, :], path)
            tl.store(tree_entropies + at_node + n, zero.to(tl.float32))
            tl.store(tree_count + b, active.to(tl.int32))
            tl.store(exits_of + at_node + n, zero)
            tl.store(nats_of + b, 0.0)
            tl.store(refused + b, 0)
        else:
            asked = tl.load(asked_live + b) != 0
            count = tl.load(tree_count + b)
            nats = tl.load(nats_of + b)
            num_refused = tl.load(refused + b)
            tile = tl.arange(0, BLOCK)
            real = (tile < num_tiles) & asked
            value = tl.load(best_value + b * num_tiles + tile, mask=real, other=float("-inf"))
            token_of = tl.load(best_id + b * num_tiles + tile, mask=real, other=2147483647)
            parts = tile_stats + b * 3 * num_tiles + tile
            highest = tl.load(parts, mask=real, other=float("-inf"))
            sums = tl.load(parts + num_tiles, mask=real, other=0.0)
            weighted = tl.load(parts + 2 * num_tiles, mask=real, other=0.0)
            top = tl.max(value, 0)
            token = tl.min(tl.where(value == top, token_of, 2147483647), 0)
            largest = tl.max(highest, 0)
            scale = tl.exp(highest - largest)
            z = tl.sum(sums * scale, 0)
            entropy = tl.log(z) + largest - tl.sum(weighted * scale, 0) / z
            measure = nats + tl.log(z) if BY_PATH else entropy
            # a tile with NaN or +inf has +inf as its best; NaN is below nothing
            added = asked & (top > float("-inf")) & (top < float("inf")) & (measure < stop)
            newest = depth
            runs = asked & ~added
            if LAST:
                newest = depth + 1
                runs = added | (count == depth + 2)
        asks = runs & (newest < deepest)
        if not ALONE:
            runs = asks
        live = runs & (i <= newest)
        if BEGIN or LAST:
            live = live & (i == newest)
        known = tl.load(tree_tokens + at_node + i, mask=live, other=0)
        if not BEGIN:
            known = tl.where(added & (i == depth + 1), token, known)
            tl.debug_barrier()  # every warp has read the state
            tl.store(tree_tokens + at_node + depth + 1, token, mask=added)
            tl.store(tree_entropies + at_node + depth + 1, entropy, mask=added)
            tl.store(exits_of + at_node + depth + 1, exit_layer, mask=added)
            tl.store(tree_count + b, depth + 2, mask=added)
            tl.store(nats_of + b, measure, mask=added)
            if LAST:
                tl.store(refused + b, num_refused + (asked & ~added).to(tl.int32))
        row = b * WIDTH + i
        tl.store(live_of + row, live.to(tl.int32))
        tl.store(sequence_of + row, b + i * 0)
        tl.store(position_of + row, base + i)
        tl.store(slot_of + row, base + i)
        tl.store(base_row + row, base + i * 0)
        tl.store(path_of + row[:, None] * PATH + n[None, :], tl.where(n[None, :] <= i[:, None], n[None, :], 0))
        tl.store(ids + row, known)
        tl.store(asked_live + b, asks.to(tl.int32))
        tl.store(asked_sequence + b, b)
        tl.store(asked_position + b, base + newest)
        tl.store(runs_of + b, runs.to(tl.int32))
        tl.store(source + b, b * WIDTH + newest)


def begin_chain(
    chain: Chain,
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
        chain: how chains grow.
        asked: overwritten.
        sequences: of the batch.
        trees: overwritten but for the roots' tokens.
        rows, ids: of the passes, overwritten; row b * width + i is node i of sequence b.
        width: 2, 4, 8 or 16, more than the chain is long.
        pdl: programmatic dependent launch.

    Raises:
        ValueError: sizes that do not fit.
    """
    if width not in (2, 4, 8, 16) or width <= chain.length or len(rows) < len(sequences.base) * width:
        raise ValueError(
            f"width {width} for {len(sequences.base)} sequences and chains of {chain.length} tokens does not go into "
            f"{len(rows)} rows"
        )
    _launch(0, 0, None, chain, asked, sequences, trees, rows, ids, width, pdl)


def grow_chain(
    depth: int,
    exit_index: int,
    best_value: Tensor,
    best_id: Tensor,
    tile_stats: Tensor,
    chain: Chain,
    asked: Asked,
    sequences: Sequences,
    trees: Trees,
    rows: Rows,
    ids: Tensor,
    width: int,
    *,
    pdl: bool = False,
) -> None:
    """Add a node to each chain whose exit is sure, and make the rows of the next pass: of the next exit for chains that
    still ask, or after the last exit of the next token for chains that grew.

    Args:
        depth: of the node that was asked about, 0 up to length - 1.
        exit_index: of the exit that answers.
        best_value, best_id: fp32 and int32 `[R, NT]` of `lm_head` for `asked.rows`.
        tile_stats: fp32 `[R, 3, NT]`, likewise.
        others: as in `begin_chain`.

    Raises:
        ValueError: a depth, an exit or answers that do not fit.
    """
    if not 0 <= depth < chain.length or not 0 <= exit_index < len(chain.exits):
        raise ValueError(f"depth {depth} and exit {exit_index} of {chain.length} tokens from {len(chain.exits)} exits")
    tiles = best_value.shape[1]
    if best_id.shape != best_value.shape or tile_stats.shape != (len(best_value), 3, tiles):
        raise ValueError(
            f"best_value {tuple(best_value.shape)}, best_id {tuple(best_id.shape)} and tile_stats "
            f"{tuple(tile_stats.shape)} are not of the same rows and tiles"
        )
    answer = best_value, best_id, tile_stats
    _launch(depth, exit_index, answer, chain, asked, sequences, trees, rows, ids, width, pdl)


def _launch(
    depth: int, exit_index: int, answer: tuple[Tensor, Tensor, Tensor] | None, chain: Chain, asked: Asked,
    sequences: Sequences, trees: Trees, rows: Rows, ids: Tensor, width: int, pdl: bool,
) -> None:  # fmt: skip
    tiles = 1 if answer is None else answer[0].shape[1]
    block = max(16, triton.next_power_of_2(tiles))
    _grow_chain_kernel[(len(sequences.base),)](
        *((asked.nats, ids, asked.nats) if answer is None else answer), tiles, depth, chain.exits[exit_index],
        float(chain.stops[exit_index]), chain.length, sequences.active, sequences.base, sequences.end,
        asked.nats, asked.num_refused, asked.exits,
        trees.tokens, trees.parents, trees.depths, trees.paths, trees.count, trees.entropies,
        rows.live, rows.sequence, rows.position, rows.slot, rows.base, rows.path, ids,
        asked.rows.live, asked.rows.sequence, asked.rows.position, asked.runs, asked.source,
        WIDTH=width, BEGIN=answer is None, LAST=exit_index == len(chain.exits) - 1,
        ALONE=len(chain.exits) == 1, BY_PATH=chain.by_path, PATH=PATH,
        BLOCK=block, PDL=pdl, num_warps=4 if block <= 1024 else 8, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
