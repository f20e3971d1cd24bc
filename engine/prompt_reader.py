"""Prompts through the fused kernels of the decode step, in captured graphs: `prefill="fused"`.

A tile is 16 consecutive tokens, a chain whose root is its first token. All tiles of a step store their keys in a layer
before its attention reads them, so a step takes many tiles of one prompt, and a later tile sees an earlier one's keys
in place. A row's bits are its own (docs/kernels.md), so keys depend neither on how a prompt is cut into steps nor on
what pads the last one, and they have decoding's bits. A short prompt costs a decode step or two where the decoder's own
layers cost hundreds of launches; of a long prompt each tile reads all weights again.

Where weights are stored by neuron (TDA) the steps use all neurons, and add up what each of them did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .cache import KVCache
from .device_state import upload
from .fused import FusedStep, FusedWeights
from .graphs import captured, has_dependent_launch
from .head_memory import WAITING
from .tree import MAX_NODES

SIZES = (64, 256)  # tokens of a step
# On an H200 a token costs 14 us for each GB of the layers' weights, at least 10 us; a chunk of up to 512 tokens through
# the decoder's own layers 9 to 12 ms, whatever the model (docs/kernels.md).
GB_AT_ANY_LENGTH, TOKENS_OF_A_GB = 0.9, 700
TAKEN_AT_ONCE = 1024  # tokens of a longer prompt whose states heads take at once: each time costs launches


def longest_for(weights: FusedWeights) -> int | None:
    """Tokens of the longest prompt that is read faster by fused kernels than by the decoder's own layers; None: any."""
    config = weights.config
    width, heads = config.hidden_size, (config.num_heads + config.num_kv_heads) * config.head_dim
    mlp = (3 if config.gated_mlp else 2) * width * config.intermediate_size
    gigabytes = config.num_layers * (2 * width * heads + mlp) * weights.decoder.dtype.itemsize / 1e9
    return None if gigabytes < GB_AT_ANY_LENGTH else round(TOKENS_OF_A_GB / gigabytes)


class PromptReader:
    """Reads prompts into one cache.

    Args:
        weights: of the model.
        cache: where keys and values go.
        reach_of: tokens of a prompt -> tokens that the steps for it reach (see `graphs.Rounds`).
        sizes: tokens of a step, rising multiples of 16.
        longest: tokens of a prompt that is read here; None: any.
    """

    def __init__(
        self,
        weights: FusedWeights,
        cache: KVCache,
        reach_of: Callable[[int], int],
        sizes: Sequence[int] = SIZES,
        longest: int | None = None,
    ) -> None:
        self.weights, self.cache, self.sizes, self._reach_of = weights, cache, tuple(sizes), reach_of
        self.longest = longest
        config = weights.config
        self._squares: Tensor | None = None
        if weights.by_neuron:
            self._squares = torch.zeros(config.num_layers, config.intermediate_size, device=cache.device)
        self._steps: dict[tuple[int, int, tuple[int, ...]], _Step] = {}

    def takes(self, length: int) -> bool:
        """Whether a prompt of so many tokens is read here."""
        return self.longest is None or length <= self.longest

    def read(
        self,
        sequence: int,
        ids: Sequence[int],
        layers: Sequence[int] = (),
        take: Callable[[Mapping[int, Tensor]], None] | None = None,
        first: int = 0,
        squares: Tensor | None = None,
    ) -> None:
        """As `forward.prefill`: `ids` is the prompt without its last token, `take` gets states of `layers`, which the
        next step may overwrite, tiles begin at `first`. To `squares`, fp32 `[L, FF]`, the tokens' squared inner
        activations are added."""
        taps = tuple(sorted(layer for layer in layers if layer))
        at_once = len(ids) - first > WAITING
        kept: list[dict[int, Tensor]] = []
        held = 0
        if squares is not None:
            assert self._squares is not None, "these weights are not stored by neuron"
            self._squares.copy_(squares)
        while first < len(ids):
            left = len(ids) - first
            size = next((s for s in reversed(self.sizes[1:]) if left > s // 2), self.sizes[0])
            chunk = torch.tensor(ids[first : first + size], dtype=torch.int32)
            step = self.step(size, len(ids), taps)
            states = step.run(sequence, first, chunk)
            first += len(chunk)
            held += len(chunk)
            if take is not None:
                if 0 in layers:  # the embeddings, which a step does not keep
                    states[0] = self.weights.decoder.embed(
                        self.step(size, len(ids), taps).step.ids[: len(chunk)].long()
                    )
                if not at_once:  # they are stored, no more
                    take(states)
                    continue
                kept.append({layer: own.clone() for layer, own in states.items()})  # the next step overwrites them
                if first == len(ids) or held >= TAKEN_AT_ONCE:
                    take({layer: torch.cat([own[layer] for own in kept]) for layer in states})
                    kept, held = [], 0
        if squares is not None and self._squares is not None:
            squares.copy_(self._squares)
        self.cache.lens[sequence] = len(ids)

    def step(self, size: int, length: int, taps: tuple[int, ...]) -> _Step:
        """The step of so many tokens for a prompt of `length`, made and captured once."""
        reach = min(self._reach_of(length), self.cache.plan.context)
        key = size, reach, taps
        if key not in self._steps:
            self._steps[key] = _Step(self.weights, self.cache, size, reach, taps, self._squares)
        return self._steps[key]


class _Step:
    """One captured step of `size` tokens of one sequence."""

    def __init__(
        self,
        weights: FusedWeights,
        cache: KVCache,
        size: int,
        reach: int,
        taps: tuple[int, ...],
        squares: Tensor | None,
    ) -> None:
        device = cache.device
        self.step = FusedStep(
            weights, cache, size, reach=reach, pdl=has_dependent_launch(device), settled=False, squares=squares
        )
        self.taps = {layer: torch.zeros(size, weights.config.hidden_size, device=device) for layer in taps}
        self._at = torch.arange(size, dtype=torch.int32, device=device)
        self._tile = self._at // MAX_NODES * MAX_NODES
        self._place = torch.zeros(3, dtype=torch.int32, device=device)  # sequence, first position, number of tokens
        self.step.rows.path.copy_(self._at[:MAX_NODES].expand(size, -1))
        self._graph = captured(self._body, device)

    def run(self, sequence: int, first: int, ids: Tensor) -> dict[int, Tensor]:
        """Returns the residual streams `[n, D]` fp32 of the tapped layers; views, overwritten by the next step."""
        upload(self._place, torch.tensor([sequence, first, len(ids)], dtype=torch.int32))
        upload(self.step.ids[: len(ids)], ids)
        (self._body if self._graph is None else self._graph.replay)()
        return {layer: states[: len(ids)] for layer, states in self.taps.items()}

    def _body(self) -> None:
        rows, (sequence, first, count) = self.step.rows, self._place.split(1)
        torch.lt(self._at, count, out=rows.live)
        rows.sequence.copy_(sequence.expand_as(rows.sequence))
        torch.add(self._at, first, out=rows.position)
        torch.add(self._at, first, out=rows.slot)
        torch.add(self._tile, first, out=rows.base)
        self.step.embed()
        self.step.run(0, self.step.weights.config.num_layers, self.taps)
