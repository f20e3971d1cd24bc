"""TEAL: thresholds on the inputs of every projection, by magnitude (arXiv 2408.14690).

A row drops the inputs with |x| <= t, and the weights of their channels are not read (`thresholded.py`). A projection's
t is the p-quantile of |x| over calibration text, p its sparsity (section 4.1). Which projection gets which p at a level
(the mean over a layer's weights): all the same ("uniform"), or by Algorithm 1 ("greedy"), layer by layer: from 0 on,
step by step the projection is pushed that adds least to ||layer(X) - layer_p(X)||. The paper's steps drop equally many
weights whatever the projection; with grouped heads k and v are so small that one such step drops them whole, so steps
are at most `MOST_STEP` here and errors (squared, as those of different projections add up) are compared per dropped
weight.

Quantiles come from histograms of logarithmic bins, 64 an octave, so any amount of text takes the same memory and no
range has to be known before; they are exact to 0.8 %.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ...heads.artefact import ArtefactError
from ...heads.fingerprint import BaseIdentity
from ...kernels.linear import PackedLinear
from ..config import ModelConfig
from ..model import Decoder
from .artefact import load_thresholds, save_thresholds
from .quality import measure_quality
from .tda import Budget
from .thresholded import INPUTS, Projection, RewiredDecoder, TealDecoder, projections

Allocation = Literal["greedy", "uniform"]
LEVELS = (0.10, 0.25, 0.40, 0.50, 0.65)
DENSE_TOKENS = 4  # attention sinks are the first token in most models; a few more cost nothing
STEP = 0.0125  # of a layer's weights, dropped in one step of the allocation
MOST_STEP = 0.1  # of one projection's inputs
MOST_SPARSITY = 0.95  # of one projection's inputs
SHIFT, NUM_BINS = 17, 0x7F800000 >> 17  # bins are fp32 magnitudes without their last 17 bits


@dataclass(frozen=True, eq=False)
class TealLevel:
    """What an engine runs by: thresholds `[L, P]` of one level (see `thresholded.projections`)."""

    level: float
    thresholds: Tensor
    dense_tokens: int = DENSE_TOKENS

    @property
    def name(self) -> str:
        return f"teal {self.level:g}"

    def decoder(self, decoder: Decoder, num_layers: int | None = None, skip: bool = False) -> TealDecoder:
        """A decoder that drops inputs in its first layers."""
        return TealDecoder(decoder, self.thresholds, self.dense_tokens, num_layers, skip)


@dataclass(frozen=True, eq=False)
class Teal:
    """Thresholds of one model at several levels.

    Args:
        levels: shares of a layer's weights that are not read, rising.
        thresholds: of |x|, fp32 `[levels, L, P]`, P as in `thresholded.projections`.
        sparsities: dropped share of each projection's inputs on the calibration text, likewise.
        allocation: how a level was spread over a layer's projections.
        dense_tokens: rows at positions below drop nothing.
        default: the level to take where none is named; None: name one.
        base: the model, or None where it has no name (then it cannot be saved).
        calibration: how they were found, for people: JSON types.
    """

    levels: tuple[float, ...]
    thresholds: Tensor
    sparsities: Tensor
    allocation: Allocation = "greedy"
    dense_tokens: int = DENSE_TOKENS
    default: float | None = None
    base: BaseIdentity | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if list(self.levels) != sorted(set(self.levels)) or not all(0 < level < 1 for level in self.levels):
            raise ValueError(f"levels are {self.levels}, expected rising numbers between 0 and 1")
        if self.thresholds.ndim != 3 or len(self.thresholds) != len(self.levels):
            raise ValueError(f"thresholds are {list(self.thresholds.shape)}, expected [{len(self.levels)}, L, P]")
        if self.sparsities.shape != self.thresholds.shape:
            raise ValueError(f"sparsities {list(self.sparsities.shape)} and thresholds differ in shape")
        if not bool((self.thresholds >= 0).all()) or not bool(((self.sparsities >= 0) & (self.sparsities <= 1)).all()):
            raise ValueError("thresholds must be at least 0, and sparsities shares from 0 to 1")
        if self.allocation not in get_args(Allocation):
            raise ValueError(f"allocation is {self.allocation!r}, expected one of {get_args(Allocation)}")
        if isinstance(self.dense_tokens, bool) or not isinstance(self.dense_tokens, int) or self.dense_tokens < 0:
            raise ValueError(f"dense_tokens is {self.dense_tokens!r}, expected an integer of at least 0")
        if self.default is not None:
            self.at(self.default)

    def at(self, level: float | None = None) -> TealLevel:
        """The thresholds of one level; None: the default.

        Raises:
            ValueError: no such level, or no default.
        """
        wanted = self.default if level is None else level
        if wanted is None:
            raise ValueError(f"no level was given and these thresholds have no default; they have {self.levels}")
        for own, thresholds in zip(self.levels, self.thresholds, strict=True):
            if abs(own - wanted) < 1e-6:
                return TealLevel(own, thresholds, self.dense_tokens)
        raise ValueError(f"the level is {wanted}, and these thresholds have {self.levels}: name one, or calibrate it")

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write the folder: config.json, thresholds.safetensors, manifest.json; whole or not at all.

        Raises:
            ValueError: the base is not named.
            FileExistsError: the folder exists and `overwrite` is False.
        """
        config = {
            "method": "teal",
            "levels": list(self.levels),
            "allocation": self.allocation,
            "dense_tokens": self.dense_tokens,
            "default": self.default,
            "calibration": dict(self.calibration),
        }
        tensors = {"thresholds": self.thresholds, "sparsities": self.sparsities}
        save_thresholds(folder, self.base, config, tensors, overwrite)

    @classmethod
    def load(cls, folder: str | Path, base: BaseIdentity | None = None, allow_base_mismatch: bool = False) -> Teal:
        """Read a folder strictly; arguments and errors as `artefact.load_thresholds`."""
        made_for, config, tensors = load_thresholds(folder, base, allow_base_mismatch)
        try:
            method, levels = config.pop("method"), tuple(config.pop("levels"))
            if method != "teal" or set(tensors) != {"thresholds", "sparsities"}:
                raise ValueError(
                    f"expected method 'teal' with thresholds and sparsities, found {method!r} with {set(tensors)}"
                )
            return cls(levels, tensors["thresholds"].float(), tensors["sparsities"].float(), base=made_for, **config)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError(f"{folder} does not hold TEAL thresholds: {error}") from error


class Histograms:
    """How often each magnitude came, of every layer's four inputs.

    Args:
        dense_tokens: rows at positions below are not counted.
    """

    def __init__(self, decoder: Decoder, dense_tokens: int = 0) -> None:
        self.config, self._dense_tokens = decoder.config, dense_tokens
        self.counts = torch.zeros(decoder.config.num_layers, len(INPUTS), NUM_BINS, dtype=torch.long)
        self._counted: Tensor | None = None
        self._decoder = RewiredDecoder(decoder, self._watched, self._begin)

    @torch.inference_mode()
    def add(self, texts: Tensor) -> None:
        """Count the inputs of texts, long `[B, T]`, all in one pass."""
        self._decoder.encode(texts, [self.config.num_layers])

    def thresholds(self, sparsities: Tensor) -> Tensor:
        """Quantiles of |x|: shares `[L, P]` -> fp32 `[L, P]`."""
        return torch.stack([self.of_layer(layer, own) for layer, own in enumerate(sparsities)])

    def of_layer(self, layer: int, sparsities: Tensor) -> Tensor:
        """Quantiles of one layer: shares `[P]` -> fp32 `[P]`. Straight lines inside a bin.

        Raises:
            ValueError: nothing was counted.
        """
        places = [INPUTS.index(stored) for stored, _ in projections(self.config).values()]
        below = self.counts[layer].cumsum(1).double()[places]
        if not bool((below[:, -1] > 0).all()):
            raise ValueError("no input was counted: calibration texts must be longer than dense_tokens")
        target = sparsities.double().cpu() * below[:, -1]
        at = torch.searchsorted(below, target.unsqueeze(1)).clamp_max(NUM_BINS - 1)
        inside = self.counts[layer, places].gather(1, at)
        start = below.gather(1, at) - inside
        share = ((target.unsqueeze(1) - start) / inside.clamp_min(1)).clamp(0, 1)
        low, high = _edges(at), _edges(at + 1)
        return (low + (high - low) * share).squeeze(1).float()

    def _begin(self, positions: Tensor) -> None:
        self._counted = positions >= self._dense_tokens

    def _watched(self, index: int, name: str, linear: PackedLinear) -> Projection:
        own = self.counts[index, INPUTS.index(name)]

        def watch(x: Tensor) -> Tensor:
            bits = x[self._counted].float().abs().view(torch.int32) >> SHIFT
            if bool((bits >= NUM_BINS).any()):
                raise ValueError(f"layer {index} reads Inf or NaN in {name}: the model or the text is unusable")
            own.add_(torch.bincount(bits.flatten(), minlength=NUM_BINS).cpu())
            return linear(x)

        return watch


def _edges(bins: Tensor) -> Tensor:
    return (bins << SHIFT).to(torch.int32).view(torch.float32).double()


def weights_of(config: ModelConfig) -> Tensor:
    """Weights of each projection of a layer, fp64 `[P]`."""
    inputs = {"qkv": config.hidden_size, "o": config.num_heads * config.head_dim}
    inputs |= {"up": config.hidden_size, "down": config.intermediate_size}
    own = projections(config).values()
    return torch.tensor([inputs[stored] * (rows.stop - rows.start) for stored, rows in own], dtype=torch.float64)


@torch.inference_mode()
def allocate_greedily(
    decoder: Decoder,
    histograms: Histograms,
    texts: Tensor,
    levels: Sequence[float],
    dense_tokens: int = DENSE_TOKENS,
    on_step: Callable[[str], None] = lambda note: None,
) -> Tensor:
    """Sparsities `[levels, L, P]` fp64 whose mean over each layer's weights is the level.

    Args:
        texts: what errors are measured on, long `[B, T]`; each layer reads what the whole model gives it.

    What a push adds is measured anew only for the projection that seems best, until the best one has been measured
    since the last push: pushes elsewhere change it little.
    """
    config, weights = decoder.config, weights_of(decoder.config)
    share = weights / weights.sum()
    steps = (STEP / share).clamp_max(MOST_STEP)
    sparse = TealDecoder(decoder, torch.full((config.num_layers, len(weights)), -1.0), dense_tokens)
    positions, attend = decoder.whole_texts(*texts.shape)
    hidden, found = decoder.embed(texts.reshape(-1)), []
    for layer in range(config.num_layers):

        def run(on: Decoder, layer: int = layer, hidden: Tensor = hidden) -> Tensor:
            return on.run_layers(hidden, layer, layer + 1, positions, attend)

        want = run(sparse)

        def error(sparsities: Tensor, layer: int = layer, run: Any = run, want: Tensor = want) -> float:
            sparse.thresholds[layer] = histograms.of_layer(layer, sparsities)
            return float((run(sparse) - want).square().sum(dtype=torch.float64))

        found.append(_push(error, share, steps, levels))
        hidden = run(decoder)
        on_step(f"layer {layer + 1} of {config.num_layers} allocated")
    return torch.stack(found, 1)


def _push(error: Callable[[Tensor], float], share: Tensor, steps: Tensor, levels: Sequence[float]) -> Tensor:
    """One layer's sparsities at each level, `[levels, P]`."""
    now, reached, at_levels = torch.zeros_like(share), 0.0, []
    adds: list[tuple[float, bool]] = [(-float("inf"), False)] * len(share)  # per dropped weight; measured since?

    def pushed(i: int, most: float) -> Tensor:
        step = min(float(steps[i]), MOST_SPARSITY - float(now[i]), most / float(share[i]))
        return now.index_add(0, torch.tensor([i]), torch.tensor([step], dtype=now.dtype))

    for level in levels:
        while level - float(now @ share) > 1e-9:
            open_ = [i for i in range(len(share)) if MOST_SPARSITY - float(now[i]) > 1e-9]
            best = min(open_, key=lambda i: adds[i][0])
            if not adds[best][1]:
                wanted = pushed(best, 1.0)
                adds[best] = (error(wanted) - reached) / float((wanted - now) @ share), True
                continue
            now = pushed(best, level - float(now @ share))
            reached = error(now)
            adds = [(value, False) for value, _ in adds]
        at_levels.append(now.clone())
    return torch.stack(at_levels)


@torch.inference_mode()
def calibrate_teal(
    decoder: Decoder,
    texts: Tensor,
    *,
    levels: Sequence[float] = LEVELS,
    allocation: Allocation = "greedy",
    error_texts: Tensor | None = None,
    budget: Budget | None = None,
    budget_texts: Tensor | None = None,
    dense_tokens: int = DENSE_TOKENS,
    base: BaseIdentity | None = None,
    on_step: Callable[[str], None] = lambda note: None,
) -> Teal:
    """Find thresholds.

    Args:
        texts: calibration text, token ids long `[B, T]`, T > dense_tokens; quantiles are of all their tokens.
        error_texts: what "greedy" measures a layer's error on; `texts` where None.
        budget: make the largest level within it the default.
        budget_texts: every level's loss is measured on them where given (their first halves are prompts); a budget
            needs them.
        on_step: told what was done.

    Raises:
        ValueError: levels out of range; a budget without texts, or one that not even the smallest level keeps.
    """
    if budget is not None and budget_texts is None:
        raise ValueError("a budget needs texts to measure it on: give budget_texts")
    if texts.shape[1] <= dense_tokens:
        raise ValueError(f"texts have {texts.shape[1]} tokens, expected more than the {dense_tokens} dense ones")
    levels = tuple(sorted(levels))
    if not all(0 < level <= MOST_SPARSITY for level in levels):
        raise ValueError(f"levels are {levels}, expected shares above 0 and at most {MOST_SPARSITY}")
    histograms = Histograms(decoder, dense_tokens)
    for text in texts:
        histograms.add(text.unsqueeze(0))
    on_step(f"counted the inputs of {texts.numel():,} tokens")
    config = decoder.config
    if allocation == "greedy":
        measured = texts if error_texts is None else error_texts
        sparsities = allocate_greedily(decoder, histograms, measured, levels, dense_tokens, on_step)
    else:
        size = config.num_layers, len(projections(config))
        sparsities = torch.stack([torch.full(size, level, dtype=torch.float64) for level in levels])
    thresholds = torch.stack([histograms.thresholds(own) for own in sparsities])
    about: dict[str, Any] = {"num_tokens": texts.numel(), "projections": list(projections(config))}
    found = Teal(levels, thresholds, sparsities.float(), allocation, dense_tokens, None, base, about)
    if budget_texts is None:
        return found
    tried = []
    half = budget_texts.shape[1] // 2
    dense = measure_quality(decoder, budget_texts, half, None)
    default = None
    for level in levels:
        sparse = TealDecoder(decoder, found.at(level).thresholds, max(dense_tokens, half - 1))
        quality = measure_quality(sparse, budget_texts, half, None)
        increase, agreement = quality.perplexity / dense.perplexity - 1, quality.agreement(dense)
        tried.append({"level": level, "perplexity_increase": increase, "agreement": agreement})
        on_step(f"level {level:g}: perplexity {100 * increase:+.2f} %, greedy agreement {agreement:.3f}")
        if budget is not None and budget.holds(quality, dense):
            default = level
    if budget is not None:
        about["budget"] = vars(budget)
        if default is None:
            raise ValueError(f"not even level {levels[0]:g} keeps the budget {vars(budget)}: {tried}")
    about |= {"budget_tokens": dense.losses.numel(), "tried": tried}
    return Teal(levels, thresholds, sparsities.float(), allocation, dense_tokens, default, base, about)
