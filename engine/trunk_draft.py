"""Drafting with exits of the trunk on the device: what `draft.draft` does for chains and trees, without the host.

A step is a pass for each exit: the newest level of every tree that still asks runs to the exit, its head speaks, and
`grow_level` answers for the gate. All of it is a fixed sequence of launches on tensors that never move, so it can be
captured in a CUDA graph, chains of fixed length as a whole. Where a gate ends them, or a tree may be full, each step is
a graph of its own and the host waits for it to know whether another one is needed: that takes some 20 us, a step for
nothing several hundred.

With one exit the last level of a tree runs there, too, and verification goes on from the exit: the rows are its own and
ran its own kernels, so they stand where it needs them, bit for bit (design rule 5). With several exits nodes stand at
different layers, and verification starts over.

A block head's layers run behind the trunk's over the same rows, with keys and values of its own at the same slots, so
its entries are committed as the trunk's are (`keep`). Those of nodes that ran to the exit while they were drafted are
there; of rows that only verification took there (plain rounds, several exits) they are made from its states.

Layers that drop small inputs while they draft (`sparsity/teal_step.py`) run apart from verification (`Levels.apart`):
rows that drop inputs gain nothing from tiles, so a pass has those of the newest level alone, and they run to every
exit. What they leave are no keys of the model's, so verification starts over with one exit, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from ..heads.adapter import AdapterHead
from ..heads.base import ExitHead
from ..heads.linear import LinearHead
from ..heads.stateful import BlockHead
from ..kernels.adapter_rows import EPS, adapter_rows
from ..kernels.commit import commit
from ..kernels.embed_rows import embed_rows
from ..kernels.grow_level import Asked, Levels, begin_levels, grow_level
from ..kernels.grow_tree import Sequences, Trees
from ..kernels.layer_shape import LayerShape
from ..kernels.linear import PackedLinear
from ..kernels.publish import publish
from ..kernels.residual_linear import Parts, column_tiles, most_parts, residual_linear
from ..kernels.rows import Rows
from ..kernels.up_linear import up_linear
from .fused import FusedStep, FusedWeights, NormedLinear, plain
from .head_layers import HeadWeights, LayerRows
from .head_memory import HeadMemory
from .model import Decoder
from .speech import Speech
from .tree import MAX_NODES


def speaks_on_device(head: object) -> bool:
    """Whether the kernels here know this head."""
    return isinstance(head, (AdapterHead, BlockHead, LinearHead))


@dataclass(frozen=True)
class _Adapter:
    """An adapter's own part, in front of the model's final norm and LM head."""

    norm: Tensor
    gain: Tensor
    up: Tensor
    down: Tensor
    shape: LayerShape
    stats: Tensor
    act: Tensor
    y: Tensor
    down_stats: Tensor
    parts: Parts


class _BlockRows(LayerRows):
    """A block head's layers over R rows, from their residual streams at its exit."""

    def __init__(self, weights: HeadWeights, num_rows: int, capacity: int, device: torch.device) -> None:
        super().__init__(weights, num_rows, capacity, device)
        self.stats = torch.zeros(num_rows, 2, 1, device=device)
        self.each = torch.arange(num_rows, dtype=torch.int32, device=device)


class _Block:
    """A block head's own part: entries of rows of any pass, in its memory's cache."""

    def __init__(self, memory: HeadMemory, weights: HeadWeights | None, reach: int | None) -> None:
        slots = memory.cache.k.shape[3]
        self.exit_layer, self.memory = memory.head.spec.exit_layer, memory
        self.weights = HeadWeights(memory.head, slots) if weights is None else weights
        self._capacity = slots if reach is None else reach + MAX_NODES
        self._rows: dict[int, _BlockRows] = {}  # by their number: of drafts and plain rounds

    def run(self, rows: Rows, hidden: Tensor, pdl: bool) -> Tensor:
        """Make the entries of rows with these residual streams `[R, D]`; returns their outputs fp32 `[R, D]`."""
        weights, on = self.weights, self._rows.get(len(rows))
        if on is None:
            on = self._rows[len(rows)] = _BlockRows(weights, len(rows), self._capacity, hidden.device)
        norms = ((weights.layers[0].attn_norm, on.x),)
        embed_rows(on.each, rows, hidden, 1.0, on.hidden, norms, on.stats, pdl=pdl)
        on.run(weights, self.memory.cache, rows, on.stats, pdl=pdl)
        return on.hidden


class _Voice:
    """One head's weights and what they make of R rows: `adapter`, `block` or nothing, a norm, a projection."""

    def __init__(
        self, head: ExitHead, decoder: Decoder, shape: LayerShape, num_rows: int, block: _Block | None
    ) -> None:
        projection, config, device = head.attached(), decoder.config, decoder.device
        weight, dtype, width = projection.head_weight, projection.dtype, head.hidden_size
        self.softcap = projection.logit_softcap
        self.adapter: _Adapter | None = None
        self.block = block

        def wide(parameter: Tensor) -> Tensor:
            return parameter.detach().to(device, torch.float32).contiguous()

        if isinstance(head, LinearHead):
            self.eps, self.speaker = EPS, NormedLinear(wide(head.norm), _matrix(head._project), None, None)
            return
        self.eps, self.speaker = config.norm_eps, NormedLinear.of(decoder._final_norm, weight, None)
        if block is not None:
            return
        assert isinstance(head, AdapterHead)
        own = replace(
            shape, intermediate_size=head.width, norm_eps=EPS, layer_norm=False, gated=True, activation="silu"
        )
        self.adapter = _Adapter(
            wide(head.norm), wide(head.gain), _matrix(head._up), _matrix(head._down), own,
            torch.zeros(num_rows, 2, 1, device=device),
            torch.zeros(num_rows, head.width, dtype=dtype, device=device),
            torch.zeros(num_rows, width, device=device),
            torch.zeros(num_rows, 2, column_tiles(width, head.width, dtype), device=device),
            Parts(num_rows, width, most_parts(width, head.width, dtype), device),
        )  # fmt: skip


def _matrix(projection: object) -> Tensor:
    """A head's prepared projection, as the kernels read it."""
    assert isinstance(projection, PackedLinear), "heads for the device are attached with PackedLinear"
    return plain(projection)


class TrunkDraft:
    """Drafts of B sequences by heads behind layers of the trunk.

    Args:
        heads: by exit layer, those of the levels at least; attached.
        decoder: the model's.
        draft_ids: token ids of the heads' outputs, long `[Vd]`, rising; None for all.
        levels: how trees grow.
        step: runs the passes: that of the verification which follows, or one of its own for drafts apart from it.
        width: rows a sequence has in it; apart `levels.lanes`.
        trees: where the drafts go.
        sequences: of the batch.
        seeds: int64 `[B]`.
        options: fp32, the temperature first.
        num_refused: int32 `[B]`, overwritten: nodes that all exits refused.
        exits: int32 `[B, 16]`, overwritten: the exit layer that each node is from.
        row_layers: int32 `[B]`, overwritten: layers of rows that the passes ran.
        memories: of the block heads, by exit layer.
        reach: tokens that a sequence may hold; None: as many as the memories.
        weights: of other drafts on these memories, by exit layer, to be shared; those that are missing are made.

    Attributes:
        stats: of the deferred norm behind the last pass, for a verification that goes on from there.
    """

    def __init__(
        self,
        heads: Mapping[int, ExitHead],
        decoder: Decoder,
        draft_ids: Tensor | None,
        levels: Levels,
        step: FusedStep,
        width: int,
        trees: Trees,
        sequences: Sequences,
        seeds: Tensor,
        options: Tensor,
        num_refused: Tensor,
        exits: Tensor,
        row_layers: Tensor,
        *,
        memories: Mapping[int, HeadMemory] = MappingProxyType({}),
        reach: int | None = None,
        weights: Mapping[int, HeadWeights] = MappingProxyType({}),
    ) -> None:
        self.levels, self.stats = levels, step.stats
        self._heads = [heads[e] for e in levels.exits]
        self._step, self._width, self._pdl = step, width, step.pdl
        self._trees, self._sequences, self._seeds, self._options = trees, sequences, seeds, options
        device = decoder.device
        self._draft_ids = None if draft_ids is None else draft_ids.to(device, torch.int32)
        self._asked = Asked.empty(levels.lanes, num_refused, exits, row_layers)
        num_rows, shape = len(self._asked.rows), step.weights.shape
        blocks = {
            e: _Block(memories[e], weights.get(e), reach)
            for e, head in zip(levels.exits, self._heads, strict=True)
            if isinstance(head, BlockHead)
        }
        self._blocks = list(blocks.values())
        self._voices = [
            _Voice(head, decoder, shape, num_rows, blocks.get(head.spec.exit_layer)) for head in self._heads
        ]
        # the residual stream of all nodes at each exit but the last, for the pass to the next one; apart, it runs on
        self._taps = [] if levels.apart else [torch.zeros_like(step.hidden) for _ in levels.exits[1:]]
        self._speech = Speech(num_rows, levels.branch, self._voices[0].speaker.weight)
        self._hidden = torch.zeros(num_rows, decoder.config.hidden_size, device=device)
        self._each = torch.arange(num_rows, dtype=torch.int32, device=device)
        self._seen = torch.zeros(1, len(exits), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._slot = torch.zeros(1, dtype=torch.int32, device=device)

    @property
    def weights(self) -> dict[int, HeadWeights]:
        """Of the block heads, by exit layer."""
        return {block.exit_layer: block.weights for block in self._blocks}

    def asks(self, heads: Mapping[int, ExitHead], memories: Mapping[int, HeadMemory], weights: FusedWeights) -> bool:
        """Whether these drafts were made for these heads and memories and run these weights."""
        known = all(memories.get(block.exit_layer) is block.memory for block in self._blocks)
        same = all(heads.get(e) is head for e, head in zip(self.levels.exits, self._heads, strict=True))
        return known and same and self._step.weights is weights

    def start(self, sequences: Iterable[int]) -> None:
        """Take over sequences whose prompts the block heads' memories were given. Not to be captured."""
        for sequence in sequences:
            for block in self._blocks:
                block.memory.take_in(sequence)

    def draft(self) -> None:
        """Grow each active sequence's tree."""
        for depth in range(self.levels.num_steps):
            self.step(depth)

    def step(self, depth: int) -> None:
        """Ask about the nodes at one depth, the roots' first."""
        levels, step, taps, speech, pdl = self.levels, self._step, self._taps, self._speech, self._pdl
        place = levels, self._asked, self._sequences, self._trees, step.rows, step.ids, self._width
        if depth == 0:
            begin_levels(*place, pdl=pdl)
        start = 0
        for k, exit_layer in enumerate(levels.exits):
            if k == 0:
                step.embed()
            elif taps:
                step.resume(start, taps[k - 1])
            hidden = step.run(start, exit_layer, {exit_layer: taps[k]} if k < len(taps) else None)
            if (block := self._voices[k].block) is not None:
                hidden = block.run(step.rows, hidden, pdl)
            if depth < levels.max_depth:
                self._speak(self._voices[k], hidden)
                grow_level(depth, k, speech.ids, speech.entropies, speech.surprisals, *place, pdl=pdl)
            start = exit_layer
        self.stats = step.stats
        if levels.gated:
            publish(self._asked.runs, self._seen, self._slot, pdl=pdl)

    def goes_on(self) -> bool:
        """Whether a tree needs another step; waits for the one that was launched last."""
        if self._asked.runs.is_cuda:
            torch.cuda.current_stream().synchronize()
        return bool(self._seen.any())

    def keep(
        self, rows: Rows, taps: Mapping[int, Tensor], record: Tensor, path_nodes: Tensor, num_path: Tensor, reached: int
    ) -> None:
        """Commit the accepted paths' entries of block heads; after every verification, also of plain rounds.

        Args:
            rows: that were verified.
            taps: layer -> fp32 `[R, D]`, their states.
            record, path_nodes, num_path: of `kernels/accept.py`.
            reached: the layer that verification began at.
        """
        for block in self._blocks:
            if block.exit_layer > reached:
                block.run(rows, taps[block.exit_layer], self._pdl)
            cache = block.memory.cache
            commit(cache.k, cache.v, record, path_nodes, num_path, pdl=self._pdl)

    def _speak(self, voice: _Voice, hidden: Tensor) -> None:
        """The head's answers to the nodes that are asked about, from the pass's residual stream, or a block's
        outputs."""
        rows, source, x, pdl = self._asked.rows, self._asked.source, self._speech.x, self._pdl
        speaker, adapter, stats = voice.speaker, voice.adapter, self._speech.stats
        if voice.block is not None:
            own, gain = self._hidden, voice.block.weights.gain  # the first kernel is for outputs times the gain alone
            adapter_rows(hidden, source, gain, gain, rows, x, stats, own, pdl=pdl)
            embed_rows(self._each, rows, own, 1.0, own, ((speaker.norm, x),), stats, pdl=pdl)
        elif adapter is None:
            embed_rows(source, rows, hidden, 1.0, self._hidden, ((speaker.norm, x),), stats, pdl=pdl)
        else:
            adapter_rows(hidden, source, adapter.norm, adapter.gain, rows, x, adapter.stats, adapter.y, pdl=pdl)
            up_linear(x, adapter.stats, adapter.up, None, None, adapter.act, rows, adapter.shape, pdl=pdl)
            stats = adapter.down_stats
            residual_linear(
                adapter.act, adapter.down, None, adapter.y, adapter.y, rows, next_norms=((speaker.norm, x),),
                stats=stats, parts=adapter.parts, pdl=pdl,
            )  # fmt: skip
        self._speech.speak(
            speaker, rows, self._draft_ids, self._options, self._seeds, eps=voice.eps, softcap=voice.softcap,
            stats=stats, pdl=pdl,
        )  # fmt: skip
