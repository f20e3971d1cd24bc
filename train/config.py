"""What a training run is made of, and how it is asked for: a TOML file, flags, or both (flags win).

The fields of `TrainConfig` and `Recipe` are the options: a field's type says how its flag is read, the text beside it
is its help. A TOML file has the same names, all in one table; `options` is a table of its own:

    model = "smollm2-135m-instruct"
    kind = "adapter"
    exits = [6, 12, 18]
    steps = 2000
    [options]
    width = 192
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

Dtype = Literal["bf16", "fp32", "fp16"]
Remainder = Literal["spread", "drop"]  # see `losses`
LossKind = Literal["kl", "topk", "ce", "tv"]
LOSSES: tuple[LossKind, ...] = ("kl", "topk", "ce", "tv")


CHAIN_MOST = 15  # drafted tokens of one round


@dataclass(frozen=True)
class Recipe:
    """How heads are trained."""

    steps: Annotated[int, "optimiser steps, of all rounds together"] = 1000
    minutes: Annotated[
        float | None, "end after so long even if steps are left; the learning rate then falls with the clock, and no "
        "two runs are equal"
    ] = None  # fmt: skip
    batch_tokens: Annotated[int, "tokens of the base's forward in one step of all processes, filling included"] = 32_768
    lr: Annotated[float, "peak learning rate, reached after the warmup, falling along a cosine"] = 2e-3
    final_lr: Annotated[float, "share of the peak that the learning rate ends at"] = 0.02
    warmup: Annotated[int, "steps"] = 50
    weight_decay: Annotated[float, "of AdamW"] = 0.01
    clip: Annotated[float, "largest gradient norm of each head"] = 1.0
    loss: Annotated[LossKind, "what is minimised against the full model's distribution"] = "kl"
    sharpen: Annotated[float, "share of the target that is moved to the full model's argmax, 0 to 1"] = 0.0
    remainder: Annotated[Remainder, "what becomes of the mass outside the draft vocabulary"] = "spread"
    chain: Annotated[int, "steps that recurrent heads are unrolled for: as many as they will draft in a row"] = 5
    # drafts there are never accepted, but at the start of training nearly all are such
    unreached: Annotated[float, "weight of a chain's places whose earlier tokens the head has wrong, 0 to 1"] = 1.0
    chunk_tokens: Annotated[int, "tokens whose [chunk, V] logits are alive at once; bounds memory only"] = 4_096
    graphs: Annotated[bool, "on one GPU: batches of few shapes, a step of each shape one CUDA graph"] = True
    seed: Annotated[int, "of the text, the heads' start and the order of the data"] = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss is {self.loss!r}, expected one of {LOSSES}")
        for name in ("steps", "batch_tokens", "chunk_tokens", "chain"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.chain > CHAIN_MOST:
            raise ValueError(f"chain is {self.chain}, expected at most {CHAIN_MOST}, the drafted tokens of one round")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"minutes is {self.minutes}, expected above 0, or None")
        shares = (self.final_lr, self.unreached, self.sharpen)
        if self.lr <= 0 or self.clip <= 0 or self.warmup < 0 or not all(0 <= share <= 1 for share in shares):
            raise ValueError(
                f"lr {self.lr}, clip {self.clip}, warmup {self.warmup}, final_lr {self.final_lr}, "
                f"unreached {self.unreached}, sharpen {self.sharpen}: out of range"
            )

    def lr_at(self, step: int, done: float | None = None) -> float:
        """Learning rate of optimiser step `step`, from 0.

        Args:
            done: share of the run that is over, where the clock may end it.
        """
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        if self.minutes is not None and done is not None:
            progress = max(progress, done)
        floor = self.lr * self.final_lr
        return floor + 0.5 * (self.lr - floor) * (1.0 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run is made of. A run that was interrupted in `out` goes on where it was saved."""

    model: Annotated[str, "base model: a packaged model's name, a hub id, a folder or a .gguf file"]
    out: Annotated[str, "output folder; an interrupted run there goes on"]
    prompts: Annotated[
        str | None, "prompts: JSON lines, Spec-Bench's, or a hub data set; or plain text (.txt); .gz too; or none: the "
        "model writes its own"
    ] = None  # fmt: skip
    kind: Annotated[str, "kind of head: linear, adapter, block or recurrent"] = "adapter"
    exits: Annotated[tuple[int, ...] | None, "exit layers, such as 6,12,18; chosen from the model's depth"] = None
    options: Annotated[Mapping[str, Any], "an option of the head kind, such as width=192; may be given again"] = field(
        default_factory=dict
    )
    draft_vocab: Annotated[int, "ids that a head can draft, the most frequent ones; 0 for all"] = 8_192
    train_vocab: Annotated[
        int | None, "ids that losses see, 0 for all; heads are restricted to draft_vocab of them afterwards"
    ] = None  # fmt: skip
    text_from: Annotated[str | None, "folder of another run, whose text and held-out text are used"] = None
    rounds: Annotated[int, "text is written and trained on this many times, each time from another seed"] = 1
    max_prompts: Annotated[int | None, "use only the first prompts of the file"] = None
    prompts_per_round: Annotated[
        int | None, "prompts of a round, the next ones each time; all of the file, or 4,000 of the model's own"
    ] = None
    max_prompt_tokens: Annotated[int, "longer prompts are left out"] = 640
    max_new_tokens: Annotated[int, "tokens written after a prompt"] = 256
    text_minutes: Annotated[
        float | None, "begin no more texts of a round after so long; later copies are left out, no two runs are equal"
    ] = None  # fmt: skip
    copies: Annotated[int, "texts written after each prompt"] = 2
    greedy_fraction: Annotated[float, "of these texts, at most 1 / copies: greedy ones do not vary"] = 0.5
    temperature: Annotated[float, "of the other texts"] = 0.8
    held_out_percent: Annotated[float, "of the prompts, by hash, never trained on"] = 3.0
    cache_tokens: Annotated[int | None, "KV slots held while writing; 32,768 on the CPU, half a GPU's free memory"] = (
        None
    )
    eval_every: Annotated[int, "steps between looks at held-out text"] = 250
    eval_texts: Annotated[int, "held-out texts of such a look"] = 64
    save_every: Annotated[int, "steps between checkpoints"] = 250
    keep: Annotated[int, "checkpoints kept"] = 2
    device: Annotated[str | None, "cpu or cuda; a GPU is taken if there is one"] = None
    dtype: Annotated[Dtype, "of the base: weights and matmuls"] = "bf16"
    shard_base: Annotated[bool, "spread the base's layers over the processes; needs text that is there already"] = False
    tracker: Annotated[str | None, "also log to this tracker of Accelerate, such as tensorboard"] = None
    progress: Annotated[bool, "progress on stderr"] = True
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        if self.exits is not None and not self.exits:
            raise ValueError("exits is empty, expected at least one exit layer, or None for a choice by depth")
        if self.dtype not in get_args(Dtype):
            raise ValueError(f"dtype is {self.dtype!r}, expected one of {', '.join(get_args(Dtype))}")
        if not 0 < self.held_out_percent < 100:
            raise ValueError(f"held_out_percent is {self.held_out_percent}, expected above 0 and below 100")
        if self.draft_vocab < 0:
            raise ValueError(f"draft_vocab is {self.draft_vocab}, expected at least 1, or 0 for all ids")
        if self.train_vocab is not None and self.train_vocab < 0:
            raise ValueError(f"train_vocab is {self.train_vocab}, expected at least 1, 0 for all ids, or None")
        if self.rounds > 1 and (self.text_from is not None or self.recipe.minutes is not None):
            raise ValueError(f"rounds is {self.rounds}, expected 1 with text_from or minutes")
        if not 1 <= self.rounds <= self.recipe.steps:
            raise ValueError(f"rounds is {self.rounds}, expected 1 to the number of steps, {self.recipe.steps}")
        for name in ("max_new_tokens", "max_prompt_tokens", "copies", "eval_every", "eval_texts", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True)
class Option:
    """One field as an option: its type without None, its help, its default (MISSING where it must be given)."""

    name: str
    kind: Any
    help: str
    default: Any

    @property
    def flag(self) -> str:
        # singular, because each use gives one
        return "--option" if self.name == "options" else f"--{self.name.replace('_', '-')}"

    def read(self, text: str) -> Any:
        """A flag's text as a value.

        Raises:
            ValueError: it cannot be read as the option's type.
        """
        if get_origin(self.kind) is tuple:
            return tuple(int(part) for part in text.split(","))
        if get_origin(self.kind) is Literal:
            return self.check(text)
        return self.kind(text)

    def check(self, value: Any) -> Any:
        """A TOML value as the option's.

        Raises:
            ValueError: it has another type.
        """
        origin, given = get_origin(self.kind), type(value)
        if origin is tuple:
            if given is list and all(type(part) is int for part in value):
                return tuple(value)
        elif origin is Literal:
            if value in get_args(self.kind):
                return value
        elif origin is not None:  # a mapping
            if given is dict:
                return value
        elif given is self.kind or (self.kind is float and given is int):
            return self.kind(value)
        raise ValueError(f"{self.name} is {value!r}, expected {self.expected}")

    @property
    def expected(self) -> str:
        if get_origin(self.kind) is tuple:
            return "integers"
        if get_origin(self.kind) is Literal:
            return "one of " + ", ".join(get_args(self.kind))
        return "a table" if get_origin(self.kind) is not None else str(self.kind.__name__)


def options() -> dict[str, Option]:
    """Every option by name: the run's, then the recipe's."""
    found: dict[str, Option] = {}
    for owner in (TrainConfig, Recipe):
        hints = get_type_hints(owner, include_extras=True)
        for entry in fields(owner):
            if entry.name != "recipe":
                found[entry.name] = _option(entry, hints[entry.name])
    return found


def parse(arguments: Sequence[str]) -> tuple[TrainConfig, bool]:
    """Command line -> settings, and whether it asks for a dry run.

    Raises:
        ValueError: an unknown option or key, a value of another type, no model or no output folder.
        SystemExit: after --help.
    """
    known = options()
    given = vars(_parser(known).parse_args(arguments))
    path, dry_run = given.pop("config", None), given.pop("dry_run")
    flags = {name: _pairs(value) if name == "options" else value for name, value in given.items()}
    from_file = {} if path is None else read_toml(Path(path))
    # one option of the kind on the command line replaces that one, not the file's whole table
    if "options" in flags:
        flags["options"] = {**from_file.get("options", {}), **flags["options"]}
    return make_config({**from_file, **flags}), dry_run


def read_toml(path: Path) -> dict[str, Any]:
    """Options in a TOML file, checked by name and type.

    Raises:
        ValueError: not TOML, an unknown key, or a value of another type.
    """
    known = options()
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    for name in document:
        if name not in known:
            raise ValueError(f"{path}: unknown key {name!r}{_nearest(name, known)}")
    try:
        return {name: known[name].check(value) for name, value in document.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def make_config(values: Mapping[str, Any]) -> TrainConfig:
    """Settings from options by name."""
    missing = [o.flag for o in options().values() if o.default is MISSING and o.name not in values]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given, as flags or in the --config file")
    shared = {entry.name for entry in fields(Recipe)}
    recipe = Recipe(**{name: value for name, value in values.items() if name in shared})
    return TrainConfig(**{name: value for name, value in values.items() if name not in shared}, recipe=recipe)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parser(known: Mapping[str, Option]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="skipstone train",
        allow_abbrev=False,
        description="Train exit heads for a model, on text that the model writes itself. Several processes: torchrun "
        "--nproc-per-node N -m skipstone.train, with the same options.",
    )
    add = parser.add_argument
    add("--config", metavar="FILE", default=argparse.SUPPRESS, help="a TOML file of these options; flags win")
    add("--dry-run", action="store_true", help="say what the run takes, write untrained heads, and end")
    for option in known.values():
        text = option.help
        if option.default not in (MISSING, None, True, False, {}):
            text += f" (default {option.default})"
        settings: dict[str, Any] = {"dest": option.name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if option.kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif option.name == "options":
            settings |= {"action": "append", "metavar": "KEY=VALUE"}
        elif get_origin(option.kind) is Literal:
            settings["choices"] = get_args(option.kind)
        else:
            settings |= {"type": _reader(option), "metavar": option.name.rsplit("_", 1)[-1].upper()}
        add(option.flag, **settings)
    return parser


def _reader(option: Option) -> Any:
    def read(text: str) -> Any:
        try:
            return option.read(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} given, expected {option.expected}") from None

    return read


def _option(entry: Field[Any], hint: Any) -> Option:
    kind, text = (get_args(hint)[0], get_args(hint)[1]) if get_origin(hint) is Annotated else (hint, "")
    named = [part for part in get_args(kind) if part is not NoneType]
    if NoneType in get_args(kind):
        kind = named[0]
    default = entry.default
    if entry.default_factory is not MISSING:
        default = entry.default_factory()
    return Option(entry.name, kind, text, default)


def _pairs(given: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE texts; a value is JSON where it reads as such (numbers, lists, true), text otherwise."""
    found = {}
    for entry in given:
        key, separator, text = entry.partition("=")
        if not separator or not key:
            raise ValueError(f"--option is {entry!r}, expected KEY=VALUE such as width=192")
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
    return found


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), known, 1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
