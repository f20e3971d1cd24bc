"""Loss and density by position, on long texts that are read and on long texts that a setting writes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.model import Decoder
from ..engine.sparsity.neurons import down_norms
from ..engine.sparsity.quality import measure_quality
from ..engine.sparsity.selection import Selection, keep
from ..engine.sparsity.teal import TealLevel, weights_of
from ..engine.sparsity.thresholded import Projection, RewiredDecoder, projections
from ..engine.stopping import StopChecker
from ..engine.tokenizer import Tokenizer
from ..kernels.linear import PackedLinear
from .sparsity import Windows
from .sparsity_answers import write
from .sparsity_settings import Setting

BLOCK = 128  # tokens of a long text that are averaged
GRAM = 4


def long_texts(
    decoder: Decoder,
    tokenizer: Tokenizer,
    settings: Sequence[Setting],
    windows: Windows,
    on_step: Callable[[str], None],
) -> dict[str, Any]:
    """Loss and density by position, in blocks of `BLOCK` tokens.

    `read`: of a long text's continuation, the loss. `written`: of greedily written text, its loss under the whole model
    and the share of its `GRAM`-grams that are new; a text that repeats itself has little of both.
    """
    prompts, tokens = windows.texts[:, : windows.prompt_len], windows.texts.shape[1] - windows.prompt_len
    block = min(BLOCK, tokens)
    found: dict[str, Any] = {}
    for setting in settings:
        on_step(f"long texts with {setting.name}")
        read = setting.read(decoder, windows).losses.cpu()
        checkers = [StopChecker(tokenizer.detokenizer(), max_new_tokens=tokens) for _ in prompts]
        write(decoder, setting, prompts.tolist(), checkers)
        written = torch.tensor([checker.token_ids for checker in checkers], device=prompts.device)
        judged = measure_quality(decoder, torch.cat([prompts, written], 1), windows.prompt_len, None)
        found[setting.name] = {
            "read_nats": _blocks(read, block),
            "written_nats": _blocks(judged.losses.cpu(), block),
            "written_new": _blocks(torch.tensor([new_grams(own) for own in written.tolist()]), block),
            **_by_position(decoder, setting, windows, block),
        }
    return {"tokens": tokens, "block": block, "texts": len(prompts), "settings": found}


def _blocks(values: Tensor, block: int) -> list[list[float]]:
    """Means by block, `[texts, T]` -> `[texts, ceil(T / block)]`."""
    return rounded(torch.stack([part.double().mean(1) for part in values.split(block, 1)], 1), 4)


def new_grams(ids: Sequence[int]) -> list[float]:
    """Of each token, whether the gram that it ends stands there for the first time; 1 where there is none yet."""
    seen: set[tuple[int, ...]] = set()
    found = []
    for end in range(1, len(ids) + 1):
        gram = tuple(ids[max(0, end - GRAM) : end])
        found.append(float(len(gram) < GRAM or gram not in seen))
        seen.add(gram)
    return found


def _by_position(decoder: Decoder, setting: Setting, windows: Windows, block: int) -> dict[str, Any]:
    texts, prompt_len = windows.texts, windows.prompt_len
    if isinstance(setting.target, TealLevel):
        shares = weights_read(decoder, setting.target, texts)[:, prompt_len:]
        return {"density": [statistics.fmean(own) for own in zip(*_blocks(shares, block), strict=True)]}
    if setting.selection is None:
        return {}
    rereading = Rereading(decoder, setting.selection, len(texts), range(prompt_len - 1, texts.shape[1], block))
    with torch.inference_mode():
        decoder.encode(texts, [decoder.config.num_layers], rereading)
    return {"density": rereading.means(rereading.density), "covered": rereading.means(rereading.covered)}


class Rereading:
    """An `mlp` of `Decoder.encode`, of the whole model: what the masks would be if texts were read to later places.

    Args:
        places: numbers of tokens, rising; the first is the prompt's.

    Attributes:
        density: by place, kept share of each text and layer.
        covered: likewise, the share of the mask there that the first place's mask has too.
    """

    def __init__(self, decoder: Decoder, selection: Selection, num_texts: int, places: Iterable[int]) -> None:
        self._decoder, self._selection, self._num_texts = decoder, selection, num_texts
        self._norms = down_norms(decoder)
        self.density: dict[int, list[float]] = {place: [] for place in places}
        self.covered: dict[int, list[float]] = {place: [] for place in self.density}

    def __call__(self, layer: int, normed: Tensor) -> Tensor:
        own = self._decoder.layers[layer]
        neurons = self._decoder.neurons(own.up, normed)
        if layer >= self._selection.options.first_dense:
            for text in neurons.view(self._num_texts, -1, neurons.shape[-1]):
                self._read(layer, text)
        return self._decoder.from_neurons(own.down, neurons)

    def means(self, values: Mapping[int, list[float]]) -> list[float]:
        """By place, over texts and layers."""
        return [round(statistics.fmean(own), 4) for own in values.values()]

    def _read(self, layer: int, neurons: Tensor) -> None:
        weights, read, first = neurons.new_zeros(neurons.shape[-1]), 0, None
        for place in self.density:
            weights, read = weights + self._selection.weigh(neurons[read:place]), place
            kept = set(keep(self._selection, layer, weights, place, self._norms[layer]).tolist())
            first = first or kept
            self.density[place].append(len(kept) / len(weights))
            self.covered[place].append(len(first & kept) / len(kept))


@torch.inference_mode()
def weights_read(decoder: Decoder, level: TealLevel, texts: Tensor) -> Tensor:
    """The share of all layers' weights that each row would read, fp32 `[B, T]`, by the whole model's inputs."""
    own, weights = projections(decoder.config), weights_of(decoder.config)
    shares = weights / weights.sum() / decoder.config.num_layers
    found = torch.zeros(texts.numel(), device=decoder.device)

    def make(index: int, name: str, linear: PackedLinear) -> Projection:
        places = [i for i, (stored, _) in enumerate(own.values()) if stored == name]

        def watch(x: Tensor) -> Tensor:
            strengths = x.float().abs()
            for i in places:
                limit = level.thresholds[index, i].to(x.device)
                found.add_((strengths > limit).float().mean(-1), alpha=float(shares[i]))
            return linear(x)

        return watch

    RewiredDecoder(decoder, make, lambda positions: None).encode(texts, [decoder.config.num_layers])
    return found.view(texts.shape).cpu()


def rounded(values: Tensor, digits: int) -> list[list[float]]:
    """Rows of numbers for a document."""
    return [[round(value, digits) for value in row] for row in values.tolist()]
