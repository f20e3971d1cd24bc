"""The target model of an engine that skips neurons: every sequence with neurons of its own, as MLPs that hold copies of
their weights, or on a GPU as lists that its kernels follow (`kernels/kept.py`).

A prompt is read densely; what its tokens' neurons did gives the sequence one mask a layer, and from then on its rows
run the kept neurons only: plain steps, drafts and verification alike, which is why they still agree token for token.
A refresh reads the tokens since the last reading once more, through the whole model and over the dense keys before
them, at fixed absolute positions (design rule 9). So keys, values and masks there are a function of the tokens, the
prompt's length and the position, never of rounds or batch mates; rounds are clipped where a refresh falls.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...kernels.kept import Kept
from ...kernels.linear import PackedLinear
from ..draft import DraftRow
from ..model import Decoder
from ..tree import MAX_NODES
from .neurons import ReducedMlp, down_norms
from .rows import least_rows
from .selection import Selection, keep_lists, on_device


class Watch:
    """The model's MLP, and what the neurons of the rows that pass did; an `mlp` of `Decoder.run_layers`.

    Attributes:
        weights: fp32 `[L, F]`, what the selection's `weigh` said of all rows, or who reads them another way adds.
        num_rows: how many rows passed.
    """

    def __init__(self, decoder: Decoder, selection: Selection, sequence: int, before: Watch | None = None) -> None:
        self.sequence, self._decoder, self._selection = sequence, decoder, selection
        size = decoder.config.num_layers, decoder.config.intermediate_size
        # Sums of before are copied: a reading that fails half way leaves them as they were.
        self.weights: Tensor = torch.zeros(size, device=decoder.device) if before is None else before.weights.clone()
        self.num_rows: int = 0 if before is None else before.num_rows

    def __call__(self, layer: int, normed: Tensor) -> Tensor:
        own = self._decoder.layers[layer]
        neurons = self._decoder.neurons(own.up, normed)
        if layer >= self._selection.options.first_dense:
            self.weights[layer] += self._selection.weigh(neurons)
        if layer == self._decoder.config.num_layers - 1:
            self.num_rows += len(normed)
        return self._decoder.from_neurons(own.down, neurons)


class SparseTarget:
    """Reads texts and makes the MLPs that follow.

    Args:
        deterministic: measure how many rows each shape of a reduced projection needs beside a row for equal bits
            (`rows.least_rows`), once a shape.

    Raises:
        ValueError: more dense layers than the model has, or thresholds of another number of layers.
    """

    def __init__(self, decoder: Decoder, selection: Selection, deterministic: bool = True) -> None:
        _check(selection, decoder)
        self.decoder, self.selection, self.deterministic = decoder, on_device(selection, decoder.device), deterministic
        self._norms = torch.stack(down_norms(decoder))
        self._least: dict[tuple[int, int], int] = {}
        self._watches: dict[int, Watch] = {}

    def watch(self, sequence: int, again: bool = False) -> Watch:
        """What a reading runs through; `again` goes on from the sequence's last one."""
        return Watch(self.decoder, self.selection, sequence, self._watches[sequence] if again else None)

    def finish(self, watch: Watch) -> Kept:
        """The neurons kept, by layer, by a text that was read to its end; a second reading goes on from here."""
        self._watches[watch.sequence] = watch
        return keep_lists(self.selection, watch.weights, watch.num_rows, self._norms)

    def mlps(self, lists: Kept) -> dict[int, ReducedMlp]:
        """MLPs of these neurons, by layer."""
        return {layer: self._reduced(layer, own) for layer, own in _by_layer(lists).items()}

    def kept(self, watch: Watch) -> dict[int, Tensor]:
        """The neurons that a text keeps, long `[k]`, of each layer that drops some."""
        return _by_layer(keep_lists(self.selection, watch.weights, watch.num_rows, self._norms))

    def next_refresh(self, sequence: int) -> int | None:
        """How many tokens of a sequence are committed when its text is read again; None: never."""
        step = self.selection.options.refresh
        return None if step == 0 else (self._watches[sequence].num_rows // step + 1) * step

    def clip(self, row: DraftRow) -> DraftRow:
        """A row whose drafts end where its text is read again."""
        at = self.next_refresh(row.work.sequence)
        return row if at is None else replace(row, max_depth=min(row.max_depth, at - 1 - row.work.base))

    def arithmetic(self, batch: int, lists: bool = False) -> str:
        """The most that kept neurons take, in words and factors: every sequence has copies of the weights it reads, or
        only lists where the device skips what is not on them."""
        config, itemsize = self.decoder.config, self.decoder.dtype.itemsize
        if lists:
            size = config.num_layers * batch * (config.intermediate_size + 1) * 4
            return (
                f"lists of kept neurons {config.num_layers} layers x {batch} sequences x "
                f"({config.intermediate_size} + 1) x 4 bytes = {size / 2**20:.1f} MiB"
            )
        layers = config.num_layers - self.selection.options.first_dense
        matrices = 3 if config.gated_mlp else 2
        size = batch * layers * matrices * config.hidden_size * config.intermediate_size * itemsize
        return (
            f"kept neurons at most {batch} sequences x {layers} layers x {matrices} x {config.hidden_size} x "
            f"{config.intermediate_size} x {itemsize} bytes = {size / 2**20:.1f} MiB"
        )

    def density(self, sequence: int) -> list[float]:
        """Kept share of each layer's neurons in a sequence that was read."""
        size, kept = self.decoder.config.intermediate_size, self.kept(self._watches[sequence])
        return [len(kept[layer]) / size if layer in kept else 1.0 for layer in range(self.decoder.config.num_layers)]

    def _reduced(self, layer: int, kept: Tensor) -> ReducedMlp:
        mlp = ReducedMlp(self.decoder, layer, kept)
        if self.deterministic:
            for projection in (mlp.up, mlp.down):
                projection.least_rows = self._least_rows(projection)
        return mlp

    def _least_rows(self, projection: PackedLinear) -> int:
        shape = projection.out_features, projection.in_features
        if shape not in self._least:
            self._least[shape] = least_rows(projection, MAX_NODES)
        return self._least[shape]


def _by_layer(lists: Kept) -> dict[int, Tensor]:
    own = enumerate(zip(lists.ids.long(), lists.count.tolist(), strict=True))
    return {layer: ids[:count] for layer, (ids, count) in own if count < len(ids)}


def _check(selection: Selection, decoder: Decoder) -> None:
    dense, layers = selection.options.first_dense, decoder.config.num_layers
    if dense > layers:
        raise ValueError(f"first_dense is {dense}, the model has {layers} layers")
    if selection.num_layers not in (None, layers):
        raise ValueError(f"{selection.name} was made for {selection.num_layers} layers, the model has {layers}")
