"""TDA: thresholds on neuron output norms, one mask a sequence from its prompt (after arXiv 2408.11393, 2405.09274).

Offline, each layer's threshold is the largest at which dropping, token by token, the neurons below it changes the MLP's
output by no more than a target on calibration text: CETT(eps) = mean over tokens of ||sum of the dropped neurons'
outputs|| / ||MLP(x)||. Online, a sequence keeps the neurons whose output norm's root mean square over the prompt's
tokens is above the threshold; a mean, so that a prompt's length does not change the density. The papers' exact formulas
are not public; these are this project's. Thresholds that keep the same share of every layer on the calibration text are
the other way to spread a budget over the layers; docs/sparsity.md has both measured.

A prompt is a small sample, so strengths may be shrunk towards those of the calibration text: as if `prior_tokens`
further tokens with its root mean squares had been read. A longer prompt then counts for more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ...heads.artefact import ArtefactError
from ...heads.fingerprint import BaseIdentity
from ...kernels.linear import PackedLinear
from ..model import Decoder
from .artefact import load_thresholds, save_thresholds
from .neurons import dense_weight, down_norms
from .quality import Quality, measure_quality
from .selection import Count, Layers, MaskOptions, sum_of_squares

Allocation = Literal["cett", "density"]
LEVELS = 32  # quantiles of neuron output norms at which CETT is measured
DEFAULT_CETT = 0.2
SEARCH_STEPS = 7  # bisections of CETT for a budget: to 1/128 of the range


@dataclass(frozen=True, eq=False)
class Tda:
    """Thresholds of one model.

    Args:
        thresholds: of neuron output norms, one a layer, fp32 `[L]`.
        cett, density: the target they were found for, one of them: of every layer's CETT, or of its kept share.
        options: when neurons are skipped.
        base: the model, or None where it has no name (then it cannot be saved).
        calibration: how they were found, for people: JSON types.
        prior: neurons' root mean square output norms over calibration text, fp32 `[L, F]`, to shrink a prompt's to.
        prior_tokens: how many tokens of a prompt the prior counts for.
    """

    thresholds: Tensor
    cett: float | None = None
    density: float | None = None
    options: MaskOptions = MaskOptions()
    base: BaseIdentity | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)
    name: str = "tda"
    prior: Tensor | None = None
    prior_tokens: int = 0

    def __post_init__(self) -> None:
        if self.thresholds.ndim != 1 or not bool((self.thresholds >= 0).all()):
            raise ValueError(f"thresholds are {self.thresholds}, expected one number of at least 0 for each layer")
        if (self.cett is None) == (self.density is None):
            raise ValueError(f"cett is {self.cett} and density is {self.density}: expected one of them")
        for name, value in (("cett", self.cett), ("density", self.density)):
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} is {value}, expected a number between 0 and 1")
        if (self.prior is None) != (self.prior_tokens == 0) or self.prior_tokens < 0:
            raise ValueError(f"prior_tokens is {self.prior_tokens}, expected more than 0 with a prior and 0 without")
        if self.prior is not None and (self.prior.ndim != 2 or len(self.prior) != len(self.thresholds)):
            raise ValueError(f"the prior is {list(self.prior.shape)}, expected [{len(self.thresholds)}, neurons]")

    @property
    def num_layers(self) -> int | None:
        return len(self.thresholds)

    weigh = staticmethod(sum_of_squares)

    def rank(self, layers: Layers, weights: Tensor, num_tokens: int, norms: Tensor) -> tuple[Tensor, Count]:
        strengths = (weights / num_tokens).sqrt() * norms
        if self.prior is not None:
            strengths = shrunk(strengths, num_tokens, self.prior[layers].to(strengths.device), self.prior_tokens)
        thresholds = self.thresholds[layers].to(strengths.device).unsqueeze(-1)
        return strengths, (strengths > thresholds).sum(-1)

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write the folder: config.json, thresholds.safetensors, manifest.json; whole or not at all.

        Raises:
            ValueError: the base is not named.
            FileExistsError: the folder exists and `overwrite` is False.
        """
        config = {
            "method": self.name,
            "num_layers": len(self.thresholds),
            "cett": self.cett,
            "density": self.density,
            "options": asdict(self.options),
            "calibration": dict(self.calibration),
        }
        tensors = {"thresholds": self.thresholds}
        if self.prior is not None:
            config["prior_tokens"], tensors["prior"] = self.prior_tokens, self.prior
        save_thresholds(folder, self.base, config, tensors, overwrite)

    @classmethod
    def load(cls, folder: str | Path, base: BaseIdentity | None = None, allow_base_mismatch: bool = False) -> Tda:
        """Read a folder strictly.

        Args:
            base: the model that will run; None skips that check (inspection).
            allow_base_mismatch: accept thresholds of other weights, a fine-tuned base's for example.

        Raises:
            ArtefactError: damaged, incomplete, unexpected, not finite, another format version, or another base.
        """
        made_for, config, tensors = load_thresholds(folder, base, allow_base_mismatch)
        try:
            method, num_layers = config.pop("method"), config.pop("num_layers")
            options = MaskOptions(**config.pop("options"))
            prior = tensors.pop("prior").float() if "prior" in tensors else None
            if method != "tda" or set(tensors) != {"thresholds"} or tensors["thresholds"].shape != (num_layers,):
                shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
                raise ValueError(f"expected method 'tda' and thresholds [{num_layers}], found {method!r} and {shapes}")
            return cls(tensors["thresholds"].float(), options=options, base=made_for, prior=prior, **config)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError(f"{folder} does not hold TDA thresholds: {error}") from error


def shrunk(strengths: Tensor, num_tokens: int, prior: Tensor, prior_tokens: int) -> Tensor:
    """Root mean squares over `num_tokens` tokens, as if `prior_tokens` more with those of `prior` had been read."""
    share = prior_tokens / (num_tokens + prior_tokens)
    return ((1 - share) * strengths.square() + share * prior.square()).sqrt()


def shipped_for(base: BaseIdentity, root: Path | None = None) -> Tda | None:
    """The thresholds that came with the package for these weights (same fingerprint), or None.

    Args:
        root: where folders of thresholds lie; None is the package's own.
    """
    root = Path(str(resources.files(__package__))) / "pretrained" if root is None else root
    for manifest in sorted(root.glob("*/manifest.json")):
        if json.loads(manifest.read_bytes())["base"]["fingerprint"] == base.fingerprint:
            return Tda.load(manifest.parent, base)
    return None


class CettCurves:
    """An `mlp` of `Decoder.encode` that measures CETT of each layer at quantiles of its neurons' output norms.

    Args:
        num_texts: of one length, in the pass.
        levels: of CETT; each costs a down projection of every token, and densities need none.

    Attributes:
        curves: by layer, thresholds and CETT there, `[levels + 1]` each, from (0, 0) on.
        strengths: by layer, root mean square output norms over each text's tokens, `[B, F]`.
        text_len: tokens of a text.
    """

    def __init__(self, decoder: Decoder, num_texts: int, levels: int = LEVELS) -> None:
        self.curves: list[tuple[Tensor, Tensor]] = []
        self.strengths: list[Tensor] = []
        self.text_len, self._levels = 0, levels
        self._decoder, self._norms, self._num_texts = decoder, down_norms(decoder), num_texts

    def __call__(self, layer: int, normed: Tensor) -> Tensor:
        own, decoder = self._decoder.layers[layer], self._decoder
        neurons = decoder.neurons(own.up, normed)
        out = decoder.from_neurons(own.down, neurons)
        norms = neurons.abs() * self._norms[layer]
        if self._levels:
            self._measure(layer, neurons, norms, out)
        self.text_len = len(normed) // self._num_texts
        self.strengths.append(norms.view(self._num_texts, -1, norms.shape[-1]).square().mean(1).sqrt())
        return out

    def _measure(self, layer: int, neurons: Tensor, norms: Tensor, out: Tensor) -> None:
        own, decoder = self._decoder.layers[layer], self._decoder
        down = own.down if own.down.bias is None else PackedLinear(dense_weight(own.down))
        ordered = norms.flatten().sort().values
        at = torch.arange(1, self._levels + 1, device=norms.device) * (len(ordered) - 1) // self._levels
        thresholds, size = ordered[at], out.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        values = [
            (decoder.from_neurons(down, neurons.masked_fill(norms > eps, 0.0)).float().norm(dim=-1) / size).mean()
            for eps in thresholds
        ]
        zero = thresholds.new_zeros(1)
        self.curves.append((torch.cat([zero, thresholds]), torch.cat([zero, torch.stack(values)])))

    def thresholds(self, cett: float) -> Tensor:
        """`[L]`: of each layer the largest threshold with CETT <= `cett`, on straight lines between the levels."""
        return torch.tensor([_largest(eps, values, cett) for eps, values in self.curves])

    def thresholds_for_density(self, density: float, prior_tokens: int = 0) -> Tensor:
        """`[L]`: of each layer the threshold that `density` of its neurons exceed, over all calibration texts.

        Args:
            prior_tokens: strengths are shrunk towards those of all texts, as `Tda` shrinks a prompt's.
        """
        found = self.strengths
        if prior_tokens:
            prior = self.fixed_strengths()
            found = [shrunk(own, self.text_len, prior[i], prior_tokens) for i, own in enumerate(found)]
        dropped = [strengths.flatten().sort().values for strengths in found]
        return torch.stack([ordered[round((1 - density) * (len(ordered) - 1))] for ordered in dropped])

    def fixed_strengths(self) -> Tensor:
        """`[L, F]`, over all texts: what a fixed pruning ranks by."""
        return torch.stack([strengths.square().mean(0).sqrt() for strengths in self.strengths])


def _largest(thresholds: Tensor, values: Tensor, target: float) -> float:
    below = int((values <= target).nonzero().max())
    if below == len(values) - 1:
        return float(thresholds[below])
    share = (target - float(values[below])) / (float(values[below + 1]) - float(values[below]))
    return float(thresholds[below]) + share * (float(thresholds[below + 1]) - float(thresholds[below]))


@dataclass(frozen=True)
class Budget:
    """What skipping may cost on prompted continuations; exactly one is given.

    Args:
        perplexity: relative increase, 0.03 for 3 %.
        agreement: least share of places where the greedy token is the whole model's.
    """

    perplexity: float | None = None
    agreement: float | None = None

    def __post_init__(self) -> None:
        if (self.perplexity is None) == (self.agreement is None):
            raise ValueError(f"a budget is of perplexity or of agreement, exactly one; got {vars(self)}")
        if self.perplexity is not None and self.perplexity <= 0:
            raise ValueError(f"the perplexity budget is {self.perplexity}, expected a relative increase above 0")
        if self.agreement is not None and not 0 < self.agreement < 1:
            raise ValueError(f"the agreement budget is {self.agreement}, expected a share between 0 and 1")

    def holds(self, sparse: Quality, dense: Quality) -> bool:
        if self.perplexity is not None:
            return sparse.perplexity <= dense.perplexity * (1 + self.perplexity)
        assert self.agreement is not None
        return sparse.agreement(dense) >= self.agreement


@torch.inference_mode()
def measure_curves(decoder: Decoder, texts: Tensor, levels: int = LEVELS) -> CettCurves:
    """CETT of every layer on calibration texts, long `[B, T]`, all in one pass; `levels` 0: strengths alone."""
    found = CettCurves(decoder, len(texts), levels)
    decoder.encode(texts, [decoder.config.num_layers], found)
    return found


def calibrate_tda(
    decoder: Decoder,
    texts: Tensor,
    *,
    cett: float | None = None,
    density: float | None = None,
    budget: Budget | None = None,
    budget_texts: Tensor | None = None,
    allocation: Allocation = "cett",
    prior_tokens: int = 0,
    options: MaskOptions = MaskOptions(),  # noqa: B008 (frozen)
    base: BaseIdentity | None = None,
    on_step: Callable[[str], None] = lambda note: None,
) -> Tda:
    """Find thresholds.

    Args:
        texts: calibration text, token ids long `[B, T]`.
        cett, density: the target, where there is no budget; CETT `DEFAULT_CETT` where none is given.
        budget: find the largest CETT (the least density) within it by bisection instead, measured on `budget_texts`,
            whose first halves are the prompts.
        allocation: what is the same in all layers under a budget.
        prior_tokens: of a density: shrink prompts' strengths towards the texts', see `Tda`; 0: no prior.
        on_step: told what was done.

    Raises:
        ValueError: several targets, a prior without a density, a budget without texts, or one that not even the
            smallest CETT tried keeps.
    """
    if sum(target is not None for target in (cett, density, budget)) > 1:
        raise ValueError(f"cett is {cett}, density is {density}, budget is {budget}: expected one of them")
    if allocation not in get_args(Allocation):
        raise ValueError(f"allocation is {allocation!r}, expected one of {get_args(Allocation)}")
    by_density = density is not None or (budget is not None and allocation == "density")
    if prior_tokens and not by_density:
        raise ValueError(
            f"prior_tokens is {prior_tokens}: a prior moves the density, so give one, or allocation 'density'"
        )
    curves = measure_curves(decoder, texts, 0 if by_density else LEVELS)
    prior = curves.fixed_strengths().cpu() if prior_tokens else None

    def for_density(share: float) -> Tda:
        thresholds = curves.thresholds_for_density(share, prior_tokens).cpu()
        return Tda(thresholds, None, share, options, base, prior=prior, prior_tokens=prior_tokens)

    on_step(f"measured neurons on {texts.numel():,} tokens")
    about: dict[str, Any] = {"num_tokens": texts.numel()}
    if density is not None:
        return replace(for_density(density), calibration=about)
    if budget is None:
        cett = DEFAULT_CETT if cett is None else cett
        return Tda(curves.thresholds(cett), cett, None, options, base, about)
    if budget_texts is None:
        raise ValueError("a budget needs texts to measure it on: give budget_texts")
    half = budget_texts.shape[1] // 2
    dense = measure_quality(decoder, budget_texts, half, None)
    low, high, tried, best = 0.0, 1.0, [], None
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        if allocation == "cett":
            candidate = Tda(curves.thresholds(middle), middle, None, options)
        else:
            candidate = for_density(1 - middle)
        found = measure_quality(decoder, budget_texts, half, candidate)
        holds = budget.holds(found, dense)
        tried.append(_tried(candidate, found, dense))
        on_step(f"{_shown(tried[-1])}, {'within' if holds else 'over'} the budget")
        if holds:
            low, best = middle, candidate
        else:
            high = middle
    if best is None:
        raise ValueError(f"nothing that was tried keeps the budget {vars(budget)}: {'; '.join(map(_shown, tried))}")
    about |= {"budget": vars(budget), "budget_tokens": dense.losses.numel(), "tried": tried}
    return replace(best, base=base, calibration=about)


def _tried(tda: Tda, found: Quality, dense: Quality) -> dict[str, float | None]:
    increase = found.perplexity / dense.perplexity - 1
    if not math.isfinite(increase):
        raise ValueError(f"perplexity is {found.perplexity} and {dense.perplexity}: the model or the text is unusable")
    return {
        "cett": tda.cett,
        "target_density": tda.density,
        "density": sum(found.density) / len(found.density),
        "perplexity_increase": increase,
        "agreement": found.agreement(dense),
    }


def _shown(tried: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in tried.items() if value is not None)


def cut(ids: list[int], length: int, most: int, start: Sequence[int] = ()) -> Tensor:
    """Token ids in texts of one length, long `[at most `most`, length]`, evenly spread over the whole.

    Args:
        start: what every text begins with, the model's BOS: without it some models (Gemma) are lost.

    Raises:
        ValueError: fewer tokens than one text.
    """
    own = length - len(start)
    whole = len(ids) // own
    if whole == 0:
        raise ValueError(f"{len(ids)} tokens of text, expected at least {own}: give a longer text")
    count = min(whole, most)
    return torch.tensor([[*start, *ids[(i * whole // count) * own :][:own]] for i in range(count)])
