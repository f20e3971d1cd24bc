"""Running rows of draft trees through the decoder, and prompts through prefill.

A *row* is one node of one sequence's tree. `advance` takes nodes of any sequences from the layer that each has
reached up to `stop`, in tiles of at most 16 rows. Because a row's bits do not depend on the tile it runs in
(`engine/selftest.py` checks that on the machine), a node that a draft took to layer 12 is the very row that
verification needs there and goes on from 12 (design rule 5).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..kernels.attention import (
    GATHER_CHUNK,
    RowKeys,
    decode_attention,
    full_attention,
    gathered_attention,
    read_views,
    visible_keys,
    without_plans,
)
from ..kernels.flash import FlashAttention
from .cache import KVCache, Writer
from .model import Decoder, Mlp
from .tree import MAX_NODES, DraftTree

PREFILL_CHUNK = 512  # absolute boundaries, so a prompt's bits depend on the prompt only


@dataclass(frozen=True)
class RowTiles:
    """How rows are padded so that every row has the same bits in every tile.

    Attributes:
        least: fewest rows of a tile; shorter ones are padded with copies of their last row.
        most: most rows of a tile; equal to `least` where the shape must never change (CUDA).
        least_attention: the same lower bound for rows times query heads per KV head in attention's products.
        gathered: attention of all rows of a tile at once by `gathered_attention`, whose products have one fixed shape
            a row (CUDA: there every launch counts).
        deterministic: False drops padding, so bits depend on how many rows run together.
    """

    least: int = MAX_NODES
    most: int = MAX_NODES
    least_attention: int = 4
    gathered: bool = False
    deterministic: bool = True


@dataclass
class Working:
    """The nodes of one sequence in one round: which layer each has reached, and its residual stream there.

    `kept` are residual streams that outlive the pass, by layer: of every node that has reached it.
    """

    sequence: int
    base: int
    tree: DraftTree
    hidden: Tensor  # [16, D] fp32
    reached: list[int] = field(default_factory=list)
    kept: dict[int, Tensor] = field(default_factory=dict)  # layer -> [16, D] fp32

    def embed_new(self, decoder: Decoder) -> None:
        """Give nodes that were added since the last call their embedding."""
        first, last = len(self.reached), len(self.tree)
        if first < last:
            ids = torch.tensor(self.tree.tokens[first:last], device=self.hidden.device)
            self.hidden[first:last] = decoder.embed(ids)
            if 0 in self.kept:
                self.kept[0][first:last] = self.hidden[first:last]
            self.reached += [0] * (last - first)

    def start_over(self, decoder: Decoder) -> None:
        """Forget what layers made of the nodes: they stand at their embeddings again, and their keys and values will be
        written anew before anything reads them."""
        self.reached.clear()
        self.embed_new(decoder)


def advance(
    decoder: Decoder, cache: KVCache, work: Sequence[tuple[Working, Sequence[int]]], stop: int, tiles: RowTiles
) -> None:
    """Take the given nodes of each sequence to `stop` layers; nodes already there stay as they are."""
    todo = [(w, node) for w, nodes in work for node in nodes if w.reached[node] < stop]
    marks = sorted({w.reached[node] for w, node in todo}) + [stop]
    for start, end in zip(marks, marks[1:], strict=False):
        rows = [(w, node) for w, node in todo if w.reached[node] == start]
        for tile in _tiles(rows, tiles.most):
            _run_tile(decoder, cache, tile, start, end, tiles)


def node_logits(decoder: Decoder, hidden: Tensor, tiles: RowTiles) -> Tensor:
    """Logits `[w, V]` of rows `[w, D]` that ran all layers, padded like every other step."""
    parts = []
    for rows in hidden.split(tiles.most):
        count = len(rows)
        if tiles.deterministic and count < tiles.least:
            rows = torch.cat([rows, rows[-1:].expand(tiles.least - count, -1)])
        parts.append(decoder.lm_head(decoder.final_norm(rows))[:count])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _tiles(rows: list[tuple[Working, int]], most: int) -> list[list[tuple[Working, int]]]:
    """Split rows into tiles; a sequence has at most 16 rows and is never split, so a layer's keys are complete."""
    tiles: list[list[tuple[Working, int]]] = []
    by_sequence: dict[int, list[tuple[Working, int]]] = {}
    for w, node in rows:
        by_sequence.setdefault(w.sequence, []).append((w, node))
    for part in by_sequence.values():
        if tiles and len(tiles[-1]) + len(part) <= most:
            tiles[-1] += part
        else:
            tiles.append(list(part))
    return tiles


def _run_tile(
    decoder: Decoder, cache: KVCache, tile: list[tuple[Working, int]], start: int, end: int, tiles: RowTiles
) -> None:
    spans = []
    for first, (w, _) in enumerate(tile):
        if not first or tile[first - 1][0] is not w:
            nodes = [node for other, node in tile if other is w]
            spans.append(Span(decoder, cache, w, nodes, first, tiles))
    num_rows = len(tile)
    hidden = torch.cat([span.work.hidden[span.index] for span in spans])
    positions = [span.work.base + span.work.tree.depths[node] for span in spans for node in span.nodes]
    padding = tiles.least - num_rows
    if tiles.deterministic and padding > 0:
        hidden = torch.cat([hidden, hidden[-1:].expand(padding, -1)])
        positions += positions[-1:] * padding

    def attend_by_span(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if len(spans) == 1 and len(q) == num_rows:
            return spans[0].attend(layer, q, k, v)
        outs = [span.attend(layer, q[span.rows], k[span.rows], v[span.rows]) for span in spans]
        if len(q) > num_rows:
            outs.append(outs[-1][-1:].expand(len(q) - num_rows, -1, -1))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    attend = _GatheredRows(cache, spans, len(hidden)).attend if tiles.gathered else attend_by_span
    at = torch.tensor(positions, device=decoder.device)
    taps = dict.fromkeys({layer for span in spans for layer in span.work.kept if start < layer <= end}, hidden)
    hidden = decoder.run_layers(hidden, start, end, at, attend, taps, _own_mlps(decoder, cache, spans))
    for span in spans:
        span.work.hidden[span.index] = hidden[span.rows]
        for layer in taps:
            span.work.kept[layer][span.index] = taps[layer][span.rows]
        for node in span.nodes:
            span.work.reached[node] = end


def _own_mlps(decoder: Decoder, cache: KVCache, spans: Sequence[Span]) -> Mlp | None:
    """The MLP of a tile's rows, each sequence's by its own neurons, never by the union of the batch's (rule 9); None
    where all run the model's."""
    own = [cache.mlps[span.work.sequence] for span in spans]
    if not any(own):
        return None

    def mlp(layer: int, normed: Tensor) -> Tensor:
        if not any(layer in mlps for mlps in own):
            return decoder.mlp(layer, normed)
        # All rows of the tile, also where only some need it: a decoder's projections may know rows by their place.
        whole = normed if all(layer in mlps for mlps in own) else decoder.mlp(layer, normed)
        outs = []
        for span, mlps in zip(spans, own, strict=True):
            outs.append(mlps[layer](normed[span.rows]) if layer in mlps else whole[span.rows])
        if len(normed) > spans[-1].rows.stop:
            outs.append(outs[-1][-1:].expand(len(normed) - spans[-1].rows.stop, -1))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    return mlp


def index_of(places: Sequence[int], device: torch.device) -> slice | Tensor:
    """An index that selects these places; a slice, which copies nothing to the device, where they follow each other."""
    if list(places) == list(range(places[0], places[0] + len(places))):
        return slice(places[0], places[0] + len(places))
    return torch.tensor(list(places), device=device)


class Span:
    """The rows of one sequence in one tile: where they write and what they see, for all layers of a pass."""

    def __init__(
        self, decoder: Decoder, cache: KVCache, work: Working, nodes: list[int], first: int, tiles: RowTiles
    ) -> None:
        self.config, self.cache, self.work, self.nodes, self.tiles = decoder.config, cache, work, nodes, tiles
        self.rows = slice(first, first + len(nodes))
        self.index = index_of(nodes, decoder.device)
        want = -(-tiles.least_attention // self.config.group_size)
        self.padding = max(0, want - len(nodes)) if tiles.deterministic else 0
        self._seen: dict[int | None, tuple[RowKeys, list[tuple[Tensor, tuple[Tensor, ...]]]]] = {}

    @cached_property
    def _write(self) -> Writer:
        return self.cache.writer(self.work.sequence, [self.work.base + node for node in self.nodes])

    @cached_property
    def _scale(self) -> Tensor:
        return torch.full((1,), self.config.attention_scale, device=self.cache.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._write(layer, k, v)
        window, config = self.config.windows[layer], self.config
        if window not in self._seen:
            nodes = self.nodes + self.nodes[-1:] * self.padding
            keys = row_keys(self.work.tree, nodes, self.work.base, self.cache.group, window, q.device)
            self._seen[window] = keys, read_views(*self.cache.of_sequence(self.work.sequence), keys)
        if self.padding:
            q = (
                torch.cat([q, q[-1:].expand(self.padding, -1, -1)])
                if len(q) > 1
                else q.expand(1 + self.padding, -1, -1)
            )
        keys, views = self._seen[window]
        out = decode_attention(q, *views[layer], keys, self._scale, config.attention_softcap)
        return out[: len(self.nodes)] if self.padding else out


class _GatheredRows:
    """All rows of one tile, of any sequences, for `gathered_attention`; rows beyond the spans' repeat the last one."""

    def __init__(self, cache: KVCache, spans: Sequence[Span], num_rows: int) -> None:
        self.cache, self.config = cache, spans[0].config
        rows = [(span.work, node) for span in spans for node in span.nodes]
        device, count = cache.device, len(rows)
        rows += rows[-1:] * (num_rows - count)
        positions = torch.tensor([work.base + work.tree.depths[node] for work, node in rows])
        width = -(-(int(positions.max()) + 1) // GATHER_CHUNK) * GATHER_CHUNK
        key_at = torch.arange(width)
        own = torch.tensor([work.base + node for work, node in rows])
        slots = torch.where(key_at <= positions.unsqueeze(1), key_at, own.unsqueeze(1))
        for row, (work, node) in enumerate(rows):
            path = work.tree.path(node)
            slots[row, work.base : work.base + len(path)] = torch.tensor(path) + work.base
        self._key_at, self._positions = key_at.to(device), positions.to(device).unsqueeze(1)
        self._slots, self._sequences = slots.to(device), torch.tensor([w.sequence for w, _ in rows], device=device)
        self._hidden: dict[int | None, Tensor] = {}
        written = own[:count].to(device)
        self._target = self._sequences[:count], written

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sequences, slots = self._target
        self.cache.write_rows(layer, sequences, slots, k[: len(slots)], v[: len(slots)])
        window = self.config.windows[layer]
        if window not in self._hidden:
            hidden = self._key_at > self._positions
            if window is not None:
                hidden |= self._key_at <= self._positions - window
            self._hidden[window] = hidden
        return gathered_attention(
            q, self.cache.k[layer], self.cache.v[layer], self._sequences, self._slots, self._hidden[window],
            self.config.attention_scale, self.config.attention_softcap,
        )  # fmt: skip


def row_keys(
    tree: DraftTree, nodes: Sequence[int], base: int, group: int, window: int | None, device: torch.device
) -> RowKeys:
    """What the rows of `nodes` see: the committed prefix and their own root-to-leaf path."""
    open_slot = base // group * group
    stop = -(-(base + len(tree)) // group) * group
    positions = [base + tree.depths[node] for node in nodes]
    first = 0 if window is None else min(max(0, min(positions) - window + 1) // group * group, open_slot)
    at = torch.tensor(positions).unsqueeze(1)
    key_at = torch.arange(open_slot if window is None else first, stop)
    hidden = key_at > at
    if window is not None:
        hidden |= key_at <= at - window
    hidden = hidden.unsqueeze(1).to(device)
    if tree.is_chain:
        return RowKeys(group, first, stop, open_slot, hidden)
    offset = base - open_slot
    paths = [tree.path(leaf) for leaf in tree.leaves()]
    path_slots = torch.arange(stop - open_slot).repeat(len(paths), 1)
    for row, path in zip(path_slots, paths, strict=True):
        row[offset : offset + len(path)] = torch.tensor(path) + offset
        row[offset + len(path) :] = offset  # past the path's end: any finite slot
    path_of_row = torch.tensor([next(i for i, path in enumerate(paths) if node in path) for node in nodes])
    order = path_slots[path_of_row]
    return RowKeys(
        group, first, stop, open_slot, hidden, order.to(device), path_slots.to(device), path_of_row.to(device)
    )


def prefill(
    decoder: Decoder,
    cache: KVCache,
    sequence: int,
    ids: Sequence[int],
    layers: Sequence[int] = (),
    take: Callable[[Mapping[int, Tensor]], None] | None = None,
    flash: FlashAttention | None = None,
    first: int = 0,
    mlp: Mlp | None = None,
) -> None:
    """Fill the cache with a prompt's tokens, alone and in chunks at fixed absolute boundaries (rule 6).

    Args:
        ids: the prompt without its last token, which is the first round's pending token. May be empty.
        layers, take: after each chunk `take` is given its residual streams `[n, D]` fp32 after these layers.
        flash: attention by flash-attn; None: torch's.
        first: tokens whose keys the cache has and keeps; chunks count from there.
        mlp: as in `Decoder.run_layers`.
    """
    config = decoder.config
    for start in range(first, len(ids), PREFILL_CHUNK):
        chunk = torch.tensor(ids[start : start + PREFILL_CHUNK], device=decoder.device)
        positions = torch.arange(start, start + len(chunk), device=decoder.device)
        attend = _Chunk(decoder, cache, sequence, start, len(chunk), flash).attend
        hidden = decoder.embed(chunk)
        taps = dict.fromkeys(layers, hidden)
        with without_plans(decoder.device):
            decoder.run_layers(hidden, 0, config.num_layers, positions, attend, taps, mlp)
        if take is not None:
            take(taps)
    cache.lens[sequence] = len(ids)


class _Chunk:
    """Attention of one prefill chunk in all layers: rows at positions first .. first + count - 1."""

    def __init__(
        self, decoder: Decoder, cache: KVCache, sequence: int, first: int, count: int, flash: FlashAttention | None
    ) -> None:
        self.config, self.cache, self.sequence, self.flash = decoder.config, cache, sequence, flash
        self.first, self.count = first, count
        self._write = cache.writer(sequence, list(range(first, first + count)))
        self._visible: dict[int | None, Tensor] = {}  # one mask for all layers of a window

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._write(layer, k, v)
        config, stop, window = self.config, self.first + self.count, self.config.windows[layer]
        keys, values = (t.unsqueeze(0) for t in self.cache.read(layer, self.sequence, stop))
        q = q.transpose(0, 1).unsqueeze(0).to(keys.dtype)
        options = config.attention_scale, self.first, window, config.attention_softcap
        if self.flash is not None:
            return self.flash(q, keys, values, *options)[0].transpose(0, 1)
        if window not in self._visible and (self.first or window is not None or config.attention_softcap is not None):
            self._visible[window] = visible_keys(self.first, self.count, stop, window, q.device)
        return full_attention(q, keys, values, *options, self._visible.get(window))[0].transpose(0, 1)
