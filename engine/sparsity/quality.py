"""What skipping neurons costs: the loss on a continuation after a prompt that was read densely.

One forward pass over whole texts does what decoding does row by row: the prompt's rows are dense and give the masks,
the rows after them (from the prompt's last token on) have the dropped neurons zeroed. The arithmetic is that of the
reduced projections up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..model import Decoder
from .neurons import down_norms
from .selection import Selection, keep

# By layer, neurons that each text keeps, bool [B, F] -> those that its continuation runs with.
Swap = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Quality:
    """Of the continuations' tokens.

    Attributes:
        losses: -log p of each token, nats, `[B, n]`.
        choices: the likeliest token there, long `[B, n]`.
        kept: by layer, the neurons that each text kept, bool `[B, F]`, or each token `[B, n, F]`; of layers that drop
            some.
        num_layers, num_neurons: of the model.
    """

    losses: Tensor
    choices: Tensor
    kept: dict[int, Tensor]
    num_layers: int
    num_neurons: int

    @property
    def perplexity(self) -> float:
        return math.exp(float(self.losses.double().mean()))

    def agreement(self, other: Quality) -> float:
        """Share of places where both choose the same token."""
        return float((self.choices == other.choices).double().mean())

    @property
    def density(self) -> list[float]:
        """Kept share of neurons, mean over the texts, of each layer."""
        return [float(self.kept[i].double().mean()) if i in self.kept else 1.0 for i in range(self.num_layers)]


def joined(parts: Sequence[Quality]) -> Quality:
    """Of the texts of all parts, in their order."""
    kept = {layer: torch.cat([part.kept[layer] for part in parts]) for layer in parts[0].kept}
    losses, choices = torch.cat([part.losses for part in parts]), torch.cat([part.choices for part in parts])
    return Quality(losses, choices, kept, parts[0].num_layers, parts[0].num_neurons)


class Masks(Protocol):
    """An `mlp` of `Decoder.encode` that drops neurons, and by layer which it kept."""

    kept: dict[int, Tensor]

    def __call__(self, layer: int, normed: Tensor) -> Tensor: ...


class PromptMasks:
    """An `mlp` of `Decoder.encode` over texts of one length: dense and watched up to the prompt's last token but one,
    masked from its last token on."""

    def __init__(
        self, decoder: Decoder, selection: Selection, texts: int, prompt_len: int, swap: Swap | None = None
    ) -> None:
        self.kept: dict[int, Tensor] = {}
        self._decoder, self._selection, self._texts, self._swap = decoder, selection, texts, swap
        self._read, self._norms = prompt_len - 1, down_norms(decoder)

    def __call__(self, layer: int, normed: Tensor) -> Tensor:
        own, options = self._decoder.layers[layer], self._selection.options
        neurons = self._decoder.neurons(own.up, normed)
        if layer >= options.first_dense and self._read >= options.min_tokens:
            by_text = neurons.view(self._texts, -1, neurons.shape[-1])
            self.kept[layer] = kept = torch.stack([self._mask(layer, text[: self._read]) for text in by_text])
            used = kept if self._swap is None else self._swap(layer, kept)
            by_text[:, self._read :] *= used.unsqueeze(1)
        return self._decoder.from_neurons(own.down, neurons)

    def _mask(self, layer: int, neurons: Tensor) -> Tensor:
        weights = self._selection.weigh(neurons)
        kept = keep(self._selection, layer, weights, len(neurons), self._norms[layer])
        return torch.zeros(len(weights), dtype=torch.bool, device=weights.device).index_fill_(0, kept, True)


def measure_quality(
    decoder: Decoder, texts: Tensor, prompt_len: int, selection: Selection | None, swap: Swap | None = None
) -> Quality:
    """Loss on what follows each text's first `prompt_len` tokens.

    Args:
        texts: token ids, long `[B, T]`, T > prompt_len > 1.
        selection: None for the whole model.
        swap: gives the continuations other masks than their own prompt's, for comparison.
    """
    masks = None if selection is None else PromptMasks(decoder, selection, len(texts), prompt_len, swap)
    return measure_masks(decoder, texts, prompt_len, masks)


@torch.inference_mode()
def measure_masks(decoder: Decoder, texts: Tensor, prompt_len: int, masks: Masks | None) -> Quality:
    """`measure_quality` with masks from anywhere; None for the whole model."""
    if not 1 < prompt_len < texts.shape[1]:
        raise ValueError(f"prompt_len is {prompt_len}, expected 2 to {texts.shape[1] - 1} of {texts.shape[1]} tokens")
    config = decoder.config
    states = decoder.encode(texts, [config.num_layers], masks)[config.num_layers]
    losses, choices = [], []
    for hidden, ids in zip(states, texts, strict=True):  # text by text: logits of a large vocabulary take the memory
        logits = decoder.lm_head(decoder.final_norm(hidden[prompt_len - 1 : -1])).float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[prompt_len:], reduction="none"))
        choices.append(logits.argmax(-1))
    kept = {} if masks is None else masks.kept
    return Quality(torch.stack(losses), torch.stack(choices), kept, config.num_layers, config.intermediate_size)
