"""Drafting with exits of the trunk on the device: what `draft.draft` does for chains, without the host.

A step is a pass for each exit: the newest node of every chain that still asks runs to the exit, its head speaks, and
`grow_chain` answers for the gate. All of it is a fixed sequence of launches on tensors that never move, so it can be
captured in a CUDA graph, chains of fixed length as a whole. Where a gate ends them, each step is a graph of its own and
the host waits for it to know whether another one is needed: that takes some 20 us, a step for nothing several hundred.

With one exit the last node of a chain runs there, too, and verification goes on from the exit: the rows are its own and
ran its own kernels, so they stand where it needs them, bit for bit (design rule 5). With several exits nodes stand at
different layers, and verification starts over.

Layers that drop small inputs while they draft (`sparsity/teal_step.py`) run apart from verification (`Chain.apart`):
rows that drop inputs gain nothing from tiles, so a sequence has one, its newest node's, which runs to every exit. What
it leaves is no key of the model's, so verification starts over with one exit, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..heads.adapter import AdapterHead
from ..heads.base import ExitHead
from ..heads.linear import LinearHead
from ..kernels.adapter_rows import EPS, adapter_rows
from ..kernels.embed_rows import embed_rows
from ..kernels.grow_chain import Asked, Chain, begin_chain, grow_chain
from ..kernels.grow_tree import Sequences, Trees
from ..kernels.layer_shape import LayerShape
from ..kernels.linear import PackedLinear
from ..kernels.lm_head import lm_head, num_tiles
from ..kernels.publish import publish
from ..kernels.residual_linear import Parts, column_tiles, most_parts, residual_linear
from ..kernels.up_linear import up_linear
from .fused import FusedStep, FusedWeights, NormedLinear, plain
from .model import Decoder


def speaks_on_device(head: object) -> bool:
    """Whether the kernels here know this head."""
    return isinstance(head, (AdapterHead, LinearHead))


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


class _Voice:
    """One head's weights and what they make of R rows: `adapter` or nothing, a norm, a projection."""

    def __init__(self, head: ExitHead, decoder: Decoder, shape: LayerShape, num_rows: int) -> None:
        projection, config, device = head.attached(), decoder.config, decoder.device
        weight, dtype, width = projection.head_weight, projection.dtype, head.hidden_size
        self.softcap = projection.logit_softcap
        self.adapter: _Adapter | None = None

        def wide(parameter: Tensor) -> Tensor:
            return parameter.detach().to(device, torch.float32).contiguous()

        if isinstance(head, LinearHead):
            self.eps, self.speaker = EPS, NormedLinear(wide(head.norm), _matrix(head._project), None, None)
            return
        assert isinstance(head, AdapterHead)
        self.eps, self.speaker = config.norm_eps, NormedLinear.of(decoder._final_norm, weight, None)
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
    """Drafts of B sequences by stateless heads behind layers of the trunk.

    Args:
        heads: by exit layer, those of the chain at least; attached.
        decoder: the model's.
        draft_ids: token ids of the heads' outputs, long `[Vd]`, rising; None for all.
        chain: how chains grow.
        step: runs the passes: that of the verification which follows, or one of its own for chains drafted apart.
        width: rows a sequence has in it, 1 apart.
        trees: where the drafts go.
        sequences: of the batch.
        seeds: int64 `[B]`.
        options: fp32, the temperature first.
        num_refused: int32 `[B]`, overwritten: whether all exits refused a node.
        exits: int32 `[B, 16]`, overwritten: the exit layer that each node is from.

    Attributes:
        stats: of the deferred norm behind the last pass, for a verification that goes on from there.
    """

    def __init__(
        self,
        heads: Mapping[int, ExitHead],
        decoder: Decoder,
        draft_ids: Tensor | None,
        chain: Chain,
        step: FusedStep,
        width: int,
        trees: Trees,
        sequences: Sequences,
        seeds: Tensor,
        options: Tensor,
        num_refused: Tensor,
        exits: Tensor,
    ) -> None:
        self.chain, self.stats = chain, step.stats
        self._heads = [heads[e] for e in chain.exits]
        self._step, self._width, self._pdl = step, width, step.pdl
        self._trees, self._sequences, self._seeds, self._options = trees, sequences, seeds, options
        device, size = decoder.device, decoder.config.hidden_size
        self._draft_ids = None if draft_ids is None else draft_ids.to(device, torch.int32)
        self._asked = Asked.empty(num_refused, exits)
        num_rows, shape = len(self._asked.rows), step.weights.shape
        self._voices = [_Voice(head, decoder, shape, num_rows) for head in self._heads]
        # the residual stream of all nodes at each exit but the last, for the pass to the next one; apart, it runs on
        self._taps = [] if chain.apart else [torch.zeros_like(step.hidden) for _ in chain.exits[1:]]
        head_weight = self._voices[0].speaker.weight
        self._x = torch.zeros(num_rows, size, dtype=head_weight.dtype, device=device)
        self._stats, self._hidden = (
            torch.zeros(num_rows, 2, 1, device=device),
            torch.zeros(num_rows, size, device=device),
        )
        tiles = num_tiles(len(head_weight), head_weight.dtype)
        self._best_value = torch.zeros(num_rows, tiles, device=device)
        self._best_id = torch.zeros(num_rows, tiles, dtype=torch.int32, device=device)
        self._tile_stats = torch.zeros(num_rows, 3, tiles, device=device)
        self._seen = torch.zeros(1, len(exits), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._slot = torch.zeros(1, dtype=torch.int32, device=device)

    def asks(self, heads: Mapping[int, ExitHead], weights: FusedWeights) -> bool:
        """Whether these drafts were made for these heads and run these weights."""
        same = all(heads.get(e) is head for e, head in zip(self.chain.exits, self._heads, strict=True))
        return same and self._step.weights is weights

    def draft(self) -> None:
        """Grow each active sequence's chain."""
        for depth in range(self.chain.num_steps):
            self.step(depth)

    def step(self, depth: int) -> None:
        """Ask about the nodes at one depth, the roots' first."""
        chain, step, taps, pdl = self.chain, self._step, self._taps, self._pdl
        place = chain, self._asked, self._sequences, self._trees, step.rows, step.ids, self._width
        if depth == 0:
            begin_chain(*place, pdl=pdl)
        start = 0
        for k, exit_layer in enumerate(chain.exits):
            if k == 0:
                step.embed()
            elif taps:
                step.resume(start, taps[k - 1])
            hidden = step.run(start, exit_layer, {exit_layer: taps[k]} if k < len(taps) else None)
            if depth < chain.length:
                self._speak(self._voices[k], hidden)
                grow_chain(depth, k, self._best_value, self._best_id, self._tile_stats, *place, pdl=pdl)
            start = exit_layer
        self.stats = step.stats
        if chain.gated:
            publish(self._asked.runs, self._seen, self._slot, pdl=pdl)

    def goes_on(self) -> bool:
        """Whether a chain needs another step; waits for the one that was launched last."""
        if self._asked.runs.is_cuda:
            torch.cuda.current_stream().synchronize()
        return bool(self._seen.any())

    def _speak(self, voice: _Voice, hidden: Tensor) -> None:
        """The head's answers to the nodes that are asked about, from the pass's residual stream."""
        rows, source, pdl = self._asked.rows, self._asked.source, self._pdl
        speaker, adapter, stats = voice.speaker, voice.adapter, self._stats
        if adapter is None:
            embed_rows(source, rows, hidden, 1.0, self._hidden, ((speaker.norm, self._x),), stats, pdl=pdl)
        else:
            adapter_rows(hidden, source, adapter.norm, adapter.gain, rows, self._x, adapter.stats, adapter.y, pdl=pdl)
            up_linear(self._x, adapter.stats, adapter.up, None, None, adapter.act, rows, adapter.shape, pdl=pdl)
            stats = adapter.down_stats
            residual_linear(
                adapter.act, adapter.down, None, adapter.y, adapter.y, rows, next_norms=((speaker.norm, self._x),),
                stats=stats, parts=adapter.parts, pdl=pdl,
            )  # fmt: skip
        lm_head(
            self._x, stats, speaker.weight, speaker.bias, speaker.shift, rows, eps=voice.eps, softcap=voice.softcap,
            ids=self._draft_ids, options=self._options, seeds=self._seeds, best_value=self._best_value,
            best_id=self._best_id, tile_stats=self._tile_stats, pdl=pdl,
        )  # fmt: skip
