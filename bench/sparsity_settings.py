"""The settings that `skipstone sparsity report` compares: the whole model, and others that skip some of its weights."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..engine.engine import Engine
from ..engine.model import Decoder
from ..engine.sparsity.quality import Quality, joined, measure_quality
from ..engine.sparsity.selection import MaskOptions, Selection
from ..engine.sparsity.target import SparseTarget
from ..engine.sparsity.tda import CettCurves, Tda
from ..engine.sparsity.teal import Teal, TealLevel, calibrate_teal
from ..engine.sparsity.thresholded import TealDecoder
from .sparsity import Windows, baselines
from .sparsity_predictor import Guess, TokenTarget, exact, train_predictors
from .tasks import STORIES

METHODS = {  # -> its name in `baselines`, where it is one
    "tda": None,
    "prior": None,
    "griffin": "griffin, uniform",
    "fixed": "fixed, uniform",
    "top-k": "tda strengths, uniform",
    "predictor": None,
    "exact": None,
    "teal": None,
}
DENSE = "dense"
MOST_WINDOWS = 32  # read in one pass: neurons of all their tokens are in memory
DIFFICULTIES = tuple(STORIES)
CALIBRATION_LENGTH, TEAL_SHARE = 256, 4  # TEAL reads 4 times TDA's texts, as in `calibrate`


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        methods: of `METHODS`.
        densities: of TDA, and through it of its baselines.
        prior_tokens: of "prior", TDA with strengths shrunk towards the calibration text's.
        levels: of TEAL.
        windows, prompt_len, length: of the text's second half, and how long they are; thresholds come from the first.
        calibration_texts: of 256 tokens.
        predictor_texts, predictor_rank, predictor_epochs: of "predictor": texts of 256 tokens, the width between its
            two matrices, passes over the texts.
        questions: of each task; 0: none.
        difficulty: of sums, of `tasks.STORIES`: one that the whole model is neither always nor never right at.
        claims: also measure what TDA rests on: inertia and uncertainty.
        repeats: timed runs of each setting; 0: none.
        long: tokens of long texts; 0: none.
        long_texts: how many.
        write: settings that answer and write long texts beside the whole model, by name; None: all.
        max_perplexity_increase: what the chosen setting may cost, as a share.
    """

    methods: tuple[str, ...] = ("tda", "griffin", "fixed", "teal")
    densities: tuple[float, ...] = (0.9, 0.75, 0.5)
    prior_tokens: int = 128
    levels: tuple[float, ...] = (0.25, 0.4, 0.5)
    windows: int = 12
    prompt_len: int = 256
    length: int = 384
    calibration_texts: int = 8
    predictor_texts: int = 64
    predictor_rank: int = 128
    predictor_epochs: int = 4
    questions: int = 16
    difficulty: str = "medium"
    claims: bool = True
    repeats: int = 5
    long: int = 0
    long_texts: int = 2
    write: tuple[str, ...] | None = None
    max_perplexity_increase: float = 0.03

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods:
            raise ValueError(f"methods are {list(self.methods)}, expected some of {', '.join(METHODS)}")
        misspelt = [name for name in self.write or () if name.split(" ")[0] not in (DENSE, "tda", *self.methods)]
        if misspelt:  # before the text is read, which takes minutes; `those_that_write` knows the rest of the names
            raise ValueError(
                f"write names {misspelt}, expected a method that is measured and its share, as in 'tda 0.75'"
            )
        if self.difficulty not in DIFFICULTIES:
            raise ValueError(f"difficulty is {self.difficulty!r}, expected one of {', '.join(DIFFICULTIES)}")
        for name, shares in (("densities", self.densities), ("levels", self.levels)):
            if not all(0 < share < 1 for share in shares):
                raise ValueError(f"{name} are {list(shares)}, expected numbers between 0 and 1")
        leasts = {"windows": 2, "calibration_texts": 1, "questions": 0, "repeats": 0, "long": 0}
        leasts |= {"predictor_texts": 1, "predictor_rank": 1, "predictor_epochs": 0}
        for name, least in leasts.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")
        if not 1 < self.prompt_len < self.length:
            raise ValueError(
                f"prompt_len is {self.prompt_len}, expected 2 to {self.length - 1} of {self.length} tokens"
            )


@dataclass(frozen=True, eq=False)
class Setting:
    """A target model: the whole one, or one that skips neurons or drops inputs."""

    name: str
    method: str
    level: float | None = None
    target: SparseTarget | TealLevel | TokenTarget | None = None

    @property
    def selection(self) -> Selection | None:
        return self.target.selection if isinstance(self.target, SparseTarget) else None

    @property
    def decodes(self) -> bool:
        """The engine can decode with it."""
        return not isinstance(self.target, TokenTarget)

    def read(self, decoder: Decoder, windows: Windows) -> Quality:
        """The loss on the windows' continuations, `MOST_WINDOWS` in a pass."""
        if isinstance(self.target, TealLevel):
            decoder = TealDecoder(decoder, self.target.thresholds, dense_tokens=windows.prompt_len - 1)
        parts = [
            self.target.read(decoder, Windows(texts, windows.prompt_len))
            if isinstance(self.target, TokenTarget)
            else measure_quality(decoder, texts, windows.prompt_len, self.selection)
            for texts in windows.texts.split(MOST_WINDOWS)
        ]
        return joined(parts)

    def rows(self, decoder: Decoder) -> Decoder:
        """What every row behind a prompt runs through, but for neurons that its text drops."""
        return self.target.decoder(decoder) if isinstance(self.target, TealLevel) else decoder

    def use(self, engine: Engine) -> None:
        """Make it the engine's target from now on."""
        engine.sparse = None
        engine.drop_inputs(verify=self.target if isinstance(self.target, TealLevel) else None)
        engine.sparse = self.target if isinstance(self.target, SparseTarget) else None


WHOLE = Setting(DENSE, DENSE)


def measure_settings(
    decoder: Decoder,
    windows: Windows,
    options: Options,
    curves: CettCurves,
    texts: Tensor,
    predictor_texts: Tensor,
    teal: Teal | None,
    on_step: Callable[[str], None],
) -> Iterator[tuple[Setting, Quality]]:
    """Every setting with its loss, the whole model first; uniform TEAL is calibrated on `texts`, predictors are trained
    on theirs, long `[B, T]`."""

    def read(setting: Setting) -> tuple[Setting, Quality]:
        on_step(f"reading with {setting.name}")
        return setting, setting.read(decoder, windows)

    yield read(WHOLE)
    others = {METHODS[method]: method for method in options.methods if METHODS[method] is not None}
    by_token: dict[str, Mapping[float, Guess]] = {}
    if "predictor" in options.methods:
        on_step(f"training predictors on {predictor_texts.numel():,} tokens")
        by_token["predictor"] = train_predictors(
            decoder, predictor_texts, options.densities, MaskOptions().first_dense, options.predictor_rank,
            options.predictor_epochs,
        )  # fmt: skip
    if "exact" in options.methods:
        by_token["exact"] = dict.fromkeys(options.densities, exact)
    for density in options.densities if set(options.methods) != {"teal"} else ():
        tda = Tda(curves.thresholds_for_density(density).cpu(), density=density)
        found = read(Setting(f"tda {density:g}", "tda", density, SparseTarget(decoder, tda)))
        if "tda" in options.methods:
            yield found
        if "prior" in options.methods:
            thresholds = curves.thresholds_for_density(density, options.prior_tokens).cpu()
            prior = curves.fixed_strengths().cpu()
            shrunk = Tda(thresholds, density=density, prior=prior, prior_tokens=options.prior_tokens)
            yield read(Setting(f"prior {density:g}", "prior", density, SparseTarget(decoder, shrunk)))
        for place, selection in baselines(decoder, tda, found[1], curves).items():
            if place in others:
                method = others[place]
                yield read(Setting(f"{method} {density:g}", method, density, SparseTarget(decoder, selection)))
        first = tda.options.first_dense
        share = statistics.fmean(found[1].density[first:])
        for method, guesses in by_token.items():
            yield read(Setting(f"{method} {density:g}", method, density, TokenTarget(guesses[density], share, first)))
    if "teal" in options.methods and options.levels:
        uniform = calibrate_teal(decoder, texts, levels=options.levels, allocation="uniform")
        for level in options.levels:
            for kind, own in (("uniform", uniform), (None if teal is None else teal.allocation, teal)):
                if own is not None and any(abs(level - known) < 1e-6 for known in own.levels):
                    method = f"teal {kind}"
                    yield read(Setting(f"{method} {level:g}", method, level, own.at(level)))


def those_that_write(settings: Sequence[Setting], options: Options) -> list[Setting]:
    """The settings that write, the whole model first."""
    names = [setting.name for setting in settings]
    if options.write is None:
        return list(settings)
    unknown = [name for name in options.write if name not in names]
    if unknown:
        raise ValueError(f"write names {unknown}, expected settings that are measured: {', '.join(names[1:])}")
    return [setting for setting in settings if setting.name == DENSE or setting.name in options.write]
