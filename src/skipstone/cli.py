"""The `skipstone` command: results on stdout, progress and reports on stderr.

Exit codes: 0 done; 1 a request failed, or a check or comparison did; 2 what was given cannot be used; 130 Ctrl-C.
Whatever needs torch is imported inside the commands, so that help and usage errors come at once.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer

from . import __version__

if TYPE_CHECKING:
    from .engine.engine import Engine
    from .engine.gate import DraftPolicy
    from .engine.generation import Generation, Stream

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Faster text from a language model, with no second model and exactly the same output.",
)

sparsity_app = typer.Typer(no_args_is_help=True, help="What skipping weights (TDA, TEAL) costs and saves.")
app.add_typer(sparsity_app, name="sparsity")

DEFAULT_MODEL = "smollm2-135m-instruct"
FAILED, REFUSED, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
DEFAULT_LENGTH = 4

Model = Annotated[str, typer.Option(help="A packaged model's name, a hub id, a folder or a .gguf file.")]
Heads = Annotated[
    str,
    typer.Option(
        help="'default' (the shipped set), 'recurrent' or 'adapter' (of several), a folder, 'none', or 'bare' "
        "(no training; needs --exit)."
    ),
]
Dtype = Annotated[str, typer.Option(help="bf16, fp16 or fp32: weights and matmuls.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; a GPU is taken if there is one.")]
Prefill = Annotated[
    str,
    typer.Option(
        help="What reads prompts: sdpa, flash (flash-attn, GPU, half), fused (GPU), or auto: fused where it can."
    ),
]
Verify = Annotated[
    str,
    typer.Option(
        help="The target model: dense; tda: each sequence skips neurons by its prompt; teal: each row drops small "
        "inputs, on a GPU without drafts (both lossy)."
    ),
]
Sparsity = Annotated[
    Path | None, typer.Option(help="Of --verify tda: a folder of calibrate --sparsity tda; by default the shipped one.")
]
Draft = Annotated[
    str,
    typer.Option(help="What runs the layers before an exit: dense, or teal: they drop small inputs (lossless)."),
]
TealFolder = Annotated[
    Path | None, typer.Option("--teal", help="Of --draft teal, --verify teal: a folder of calibrate --sparsity teal.")
]
TealLevel = Annotated[
    float | None, typer.Option(help="Of --teal: share of the weights that are not read; the folder's default.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int, typer.Option(help="0 is off.")]
TopP = Annotated[float, typer.Option(help="1 is off.")]
MinP = Annotated[float, typer.Option(help="0 is off.")]
RepetitionPenalty = Annotated[float, typer.Option(help="1 is off.")]
PresencePenalty = Annotated[float, typer.Option(help="0 is off.")]
FrequencyPenalty = Annotated[float, typer.Option(help="0 is off.")]
LogitBias = Annotated[list[str] | None, typer.Option(metavar="ID=BIAS", help="May be given again.")]
BadWord = Annotated[list[str] | None, typer.Option(help="Text never written; may be given again.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the output; may be given again.")]
StopId = Annotated[list[int] | None, typer.Option(help="Token id that ends the output; may be given again.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Do not stop at the model's own stop ids.")]
MinNewTokens = Annotated[int, typer.Option()]
MaxNewTokens = Annotated[int, typer.Option()]
Seed = Annotated[int, typer.Option()]
NoSpeculation = Annotated[bool, typer.Option("--no-speculation", help="Plain decoding.")]
Always = Annotated[bool, typer.Option("--always-speculate", help="Draft also where it does not pay.")]
FromText = Annotated[
    bool | None,
    typer.Option(
        "--lookup/--no-lookup",
        help="Draft from the text where it repeats itself; the default, but in front of trunk exits on a GPU.",
    ),
]
Mode = Annotated[
    str, typer.Option(help="lossless, or early_exit: the first sure exit writes the token, unverified (lossy).")
]
Accuracy = Annotated[
    float | None,
    typer.Option(help="Gate: draft (early_exit: write) where the heads were right this often, 0.60 to 0.99."),
]
Exit = Annotated[int | None, typer.Option(help="LayerSkip's scheme: always draft from this exit layer.")]
Length = Annotated[int | None, typer.Option(min=1, max=15, help="Most tokens drafted in a row.")]
Branch = Annotated[int | None, typer.Option(min=1, max=15, help="Candidates where a head is unsure; 1 drafts chains.")]
System = Annotated[str | None, typer.Option(help="A system message for the chat template.")]

P = ParamSpec("P")
R = TypeVar("R")


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? instead of failing
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what `timeout` and batch systems send: as Ctrl-C
    app()


def command(function: Callable[P, R], to: typer.Typer = app) -> Callable[P, R]:
    """Register a command; what it refuses or cannot do becomes one sentence and an exit code."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            result = function(*args, **kwargs)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            # The reader has left. What still waits in the buffer must not raise a second time at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit(BROKEN_PIPE) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except (ValueError, OSError) as error:
            raise _ended(error, REFUSED) from error
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, typer.Exit | typer.Abort):
                raise
            raise _ended(error, FAILED) from error

    return to.command()(run)


def _ended(error: Exception, code: int) -> typer.Exit:
    note(f"skipstone: {str(error) or type(error).__name__}")
    return typer.Exit(code)


def note(text: str) -> None:
    """A line for the user that is no result."""
    print(text, file=sys.stderr, flush=True)


def print_json(document: Any, indent: int | None = 1) -> None:
    """One JSON document on stdout."""
    print(json.dumps(document, ensure_ascii=False, allow_nan=False, indent=indent), flush=True)


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"skipstone {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Faster text from a language model, with no second model and exactly the same output."""


@command
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from stdin.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message: use the chat template.")
    ] = False,
    system: System = None,
    model: Model = DEFAULT_MODEL,
    heads: Heads = "default",
    dtype: Dtype = "bf16",
    device: Device = None,
    prefill: Prefill = "auto",
    verify: Verify = "dense",
    sparsity: Sparsity = None,
    draft: Draft = "dense",
    teal: TealFolder = None,
    teal_level: TealLevel = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    logit_bias: LogitBias = None,
    bad_word: BadWord = None,
    stop: Stop = None,
    stop_id: StopId = None,
    ignore_eos: IgnoreEos = False,
    min_new_tokens: MinNewTokens = 0,
    max_new_tokens: MaxNewTokens = 128,
    seed: Seed = 0,
    logprobs: Annotated[int | None, typer.Option(min=0, help="Log-probabilities, and of the N likeliest too.")] = None,
    mode: Mode = "lossless",
    no_speculation: NoSpeculation = False,
    always_speculate: Always = False,
    lookup: FromText = None,
    accuracy: Accuracy = None,
    exit_layer: Annotated[
        int | None, typer.Option("--exit", help="Always draft from this exit layer (LayerSkip).")
    ] = None,
    length: Length = None,
    branch: Branch = None,
    as_json: AsJson = False,
    trace: Annotated[Path | None, typer.Option(help="Write one JSON line a token to this file.")] = None,
) -> None:
    """Continue a text. An explicit --accuracy, --exit, --length or --branch is followed also where it does not pay."""
    if system is not None and not chat:
        raise ValueError("--system needs --chat: only a chat template has a place for it")
    text = sys.stdin.read() if prompt == "-" else prompt
    sampling = _sampling(locals()) | {"ignore_eos": ignore_eos, "logprobs": logprobs}
    engine = _load(model, heads, dtype, device, prefill, exit_layer, verify, sparsity, draft, teal, teal_level)
    drafting = _drafting(engine, mode, no_speculation, always_speculate, lookup, accuracy, exit_layer, length, branch)
    messages = [{"role": "system", "content": system}] if system is not None else []
    given: Any = text
    if chat:
        given = _tokenizer(engine).encode_chat([*messages, {"role": "user", "content": text}])
    out, interrupted = _stream(engine, given, {**drafting, **sampling}, as_json, trace)
    if as_json:
        print_json(_answer(engine, out, drafting, interrupted) | {"prompt": text})
    if out.error is not None and not interrupted:
        note(f"skipstone: the request failed: {out.error}")
    if interrupted or out.finish_reason == "error":
        raise typer.Exit(INTERRUPTED if interrupted else FAILED)


@command
def chat(
    system: System = None,
    model: Model = DEFAULT_MODEL,
    heads: Heads = "default",
    dtype: Dtype = "bf16",
    device: Device = None,
    prefill: Prefill = "auto",
    verify: Verify = "dense",
    sparsity: Sparsity = None,
    draft: Draft = "dense",
    teal: TealFolder = None,
    teal_level: TealLevel = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    stop: Stop = None,
    max_new_tokens: MaxNewTokens = 512,
    seed: Seed = 0,
    mode: Mode = "lossless",
    no_speculation: NoSpeculation = False,
    always_speculate: Always = False,
    lookup: FromText = None,
    accuracy: Accuracy = None,
    exit_layer: Annotated[
        int | None, typer.Option("--exit", help="Always draft from this exit layer (LayerSkip).")
    ] = None,
    length: Length = None,
    branch: Branch = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document a line, one for each answer.")
    ] = False,
) -> None:
    """Talk with the model. /reset forgets the conversation, /exit or the input's end leaves; piped lines are turns."""
    sampling = _sampling(locals())
    engine = _load(model, heads, dtype, device, prefill, exit_layer, verify, sparsity, draft, teal, teal_level)
    drafting = _drafting(engine, mode, no_speculation, always_speculate, lookup, accuracy, exit_layer, length, branch)
    start = [{"role": "system", "content": system}] if system is not None else []
    messages, failed = list(start), False
    if not _tokenizer(engine).has_chat_template:
        raise ValueError(f"{model} has no chat template (a base model?); use skipstone generate")
    interactive = sys.stdin.isatty()
    if interactive:
        note("/reset forgets the conversation, /exit leaves, Ctrl-C stops an answer")
    for line in _turns(interactive):
        if line == "/reset":
            messages = list(start)
            continue
        ids = _tokenizer(engine).encode_chat([*messages, {"role": "user", "content": line}])
        try:
            out, interrupted = _stream(engine, ids, {**drafting, **sampling}, as_json, None)
        except ValueError as error:  # too long, for example: the conversation can go on after /reset
            if not interactive:
                raise
            note(f"skipstone: {error}")
            continue
        if as_json:
            print_json(_answer(engine, out, drafting, interrupted) | {"prompt": line}, indent=None)
        messages += [{"role": "user", "content": line}, {"role": "assistant", "content": out.text}]
        if out.error is not None and not interrupted:
            note(f"skipstone: the request failed: {out.error}")
            failed = True
        if interrupted and not interactive:
            raise typer.Exit(INTERRUPTED)
    if failed:
        raise typer.Exit(FAILED)


@command
def inspect(
    model: Model = DEFAULT_MODEL,
    heads: Heads = "default",
    dtype: Dtype = "bf16",
    device: Device = None,
    prefill: Prefill = "auto",
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a sequence; the model's own by default.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Model, memory and heads: sizes, exits, agreement, thresholds by accuracy."""
    engine = _load(model, heads, dtype, device, prefill)
    from .engine.inventory import inventory

    found = inventory(engine, batch, context)
    if as_json:
        print_json(found)
        return
    from .bench.tables import print_inventory

    print_inventory(found)


@command
def doctor(
    model: Model = DEFAULT_MODEL,
    heads: Heads = "default",
    dtype: Dtype = "bf16",
    device: Device = None,
    prefill: Prefill = "auto",
    no_transformers: Annotated[
        bool, typer.Option("--no-transformers", help="Leave out the comparison that loads the weights twice.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Versions, device, and whether decoding is exact on this machine. Exit code 1 if a check fails."""
    from .bench.environment import describe_device, versions
    from .bench.tables import print_environment

    engine = _load(model, heads, dtype, device, prefill)
    from .bench.doctor import examine

    installed, place = versions(), describe_device(engine.decoder.device)
    if not as_json:
        print_environment(installed, place)
    checks = []
    for check in examine(engine, model, not no_transformers):
        checks.append(check)
        if not as_json:
            print(f"{check.status:8}{check.name}: {check.detail}", flush=True)
    failed = any(check.status == "failed" for check in checks)
    if as_json:
        about = {"model": model, "dtype": dtype, "versions": installed, "device": place}
        print_json({**about, "ok": not failed, "checks": [vars(check) for check in checks]})
    if failed:
        raise typer.Exit(FAILED)


@command
def calibrate(
    prompts: Annotated[
        Path | None, typer.Option(help="Of heads: JSON lines with 'prompt' or Spec-Bench's 'turns', .gz too.")
    ] = None,
    model: Model = DEFAULT_MODEL,
    heads: Annotated[str, typer.Option(help="A head set's folder, or 'default' (the shipped set).")] = "default",
    out: Annotated[
        Path | None, typer.Option(help="Write the calibrated set here; by default --heads itself is updated.")
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for pictures (PNG) and their numbers (CSV).")] = None,
    max_prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts to decode, evenly over the file.")] = 128,
    max_new_tokens: MaxNewTokens = 64,
    held_out_percent: Annotated[
        float | None,
        typer.Option(help="Share of the prompts that training left out, by hash; 100: it never read this file."),
    ] = None,
    accuracy: Annotated[float, typer.Option(help="Gates while measuring, 0.60 to 0.99.")] = 0.75,
    batch: Annotated[int | None, typer.Option(min=1, help="Prompts decoded side by side.")] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            help="tda: find thresholds for --verify tda instead, on --text, into --out; teal: for --draft teal and "
            "--verify teal."
        ),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Of --sparsity: a plain text file, wikitext-2 for one.")] = None,
    cett: Annotated[
        float | None,
        typer.Option(help="Of --sparsity: relative change of an MLP's output that dropping may make; 0.2."),
    ] = None,
    density: Annotated[float | None, typer.Option(help="Of --sparsity: kept share of neurons, in every layer.")] = None,
    max_perplexity_increase: Annotated[
        float | None, typer.Option(help="Of --sparsity: find the target within this budget, 0.03 for 3 %.")
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(help="Of --sparsity: likewise, share of greedy tokens that stay the whole model's.")
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            help="Of tda under a budget: what is the same in all layers, cett or density; of teal: how a level is "
            "spread over a layer's projections, greedy or uniform. The first of each by default."
        ),
    ] = None,
    prior_tokens: Annotated[
        int,
        typer.Option(
            min=0, help="Of tda by density: the text's own strengths count for so many tokens of a prompt; 0: no prior."
        ),
    ] = 0,
    dense_tokens: Annotated[int, typer.Option(help="Of teal: first tokens of a text that drop nothing.")] = 4,
    first_dense: Annotated[int, typer.Option(help="Of --sparsity: layers at the bottom that keep all neurons.")] = 1,
    min_tokens: Annotated[int, typer.Option(help="Of --sparsity: shorter prompts stay dense.")] = 16,
    refresh: Annotated[int, typer.Option(help="Of --sparsity: tokens after which masks are read again; 0: never.")] = 0,
    dtype: Dtype = "bf16",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure exit heads on drafted prefixes of held-out prompts and store the gates that follow; or, with --sparsity,
    the thresholds below which neurons are skipped."""
    if sparsity is not None:
        if sparsity not in ("tda", "teal"):
            raise ValueError(f"--sparsity is {sparsity!r}, expected 'tda' or 'teal'")
        if text is None or out is None or prompts is not None:
            raise ValueError(f"--sparsity {sparsity} reads --text and writes --out; --prompts is of heads")
        targets = {
            "cett": cett, "density": density, "perplexity": max_perplexity_increase, "agreement": min_agreement,
        }  # fmt: skip
        if sparsity == "teal":
            _calibrate_teal(model, text, out, targets, allocation, dense_tokens, dtype, device, as_json)
            return
        allocation = "cett" if allocation is None else allocation
        masks = {"first_dense": first_dense, "min_tokens": min_tokens, "refresh": refresh}
        _calibrate_tda(model, text, out, targets, allocation, prior_tokens, masks, dtype, device, as_json)
        return
    if prompts is None:
        raise ValueError("--prompts is missing: held-out prompts to calibrate heads on (or give --sparsity)")
    if any(given is not None for given in (text, cett, density, max_perplexity_increase, min_agreement)):
        raise ValueError("--text, --cett, --density and budgets need --sparsity")
    from .bench.tables import print_calibration
    from .train.plots import plot_calibration, require_matplotlib
    from .train.recalibrate import Settings, recalibrate

    if plots is not None:
        require_matplotlib()
    settings = Settings(
        model, heads, str(prompts), None if out is None else str(out), max_prompts=max_prompts,
        max_new_tokens=max_new_tokens, held_out_percent=held_out_percent, accuracy=accuracy, batch=batch,
        device=device, dtype=_dtype(dtype), progress=sys.stderr.isatty(),
    )  # fmt: skip
    found = recalibrate(settings)
    if found.folder is None:
        note("nothing was written: the shipped set stays as it is; give --out for a copy with this calibration")
    drawn = [] if plots is None else [str(path) for path in plot_calibration(found.calibration, plots)]
    summary = found.summary() | {"plots": drawn}
    if as_json:
        print_json(summary)
    else:
        print_calibration(summary)


def _calibrate_tda(
    model: str,
    text: Path,
    out: Path,
    targets: dict[str, float | None],
    allocation: str,
    prior_tokens: int,
    masks: dict[str, int],
    dtype: str,
    device: str | None,
    as_json: bool,
) -> None:
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"targets {given} were given, expected at most one of --cett, --density and the two budgets")
    if device not in (None, "cpu"):
        raise ValueError(f"--device is {device!r}: thresholds are found on the CPU for now")
    from .engine.sparsity.recipe import Recipe, follow
    from .engine.sparsity.selection import MaskOptions
    from .engine.sparsity.tda import Budget

    budget = Budget(**given) if given.keys() & {"perplexity", "agreement"} else None
    recipe = Recipe(
        model, text, out, cett=given.get("cett"), density=given.get("density"), budget=budget,
        allocation=allocation, prior_tokens=prior_tokens, options=MaskOptions(**masks),  # type: ignore[arg-type]
    )  # fmt: skip
    found = follow(recipe, _dtype(dtype), note)
    if as_json:
        print_json(found)
        return
    target = f"CETT {found['cett']:.4f}" if found["cett"] is not None else f"density {found['density']:.4f}"
    print(f"{found['folder']}: thresholds of {len(found['thresholds'])} layers, {target}")
    print(f"use: skipstone generate --verify tda --sparsity {shlex.quote(str(out))} ...")


def _calibrate_teal(
    model: str,
    text: Path,
    out: Path,
    targets: dict[str, float | None],
    allocation: str | None,
    dense_tokens: int,
    dtype: str,
    device: str | None,
    as_json: bool,
) -> None:
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) > 1 or given.keys() & {"cett", "density"}:
        raise ValueError(
            f"targets {given} were given: --sparsity teal finds several levels, and takes at most one budget, for the "
            "default among them"
        )
    from .engine.sparsity.tda import Budget
    from .engine.sparsity.teal_recipe import TealRecipe, follow, summary

    recipe = TealRecipe(
        model, text, out, allocation=allocation or "greedy",  # type: ignore[arg-type]
        dense_tokens=dense_tokens, budget=Budget(**given) if given else None, device=device or "cpu",
    )  # fmt: skip
    found = follow(recipe, _dtype(dtype), note)
    if as_json:
        print_json({"folder": str(out), "model": model, **summary(found)})
        return
    print(f"{out}: thresholds at levels {', '.join(f'{level:g}' for level in found.levels)}, {found.allocation}")
    level = "" if found.default is not None else " --teal-level 0.4"
    print(f"use: skipstone generate --draft teal --heads adapter --teal {shlex.quote(str(out))}{level} ...")


@command
def plan(
    model: Model = DEFAULT_MODEL,
    heads: Annotated[
        str, typer.Option(help="As elsewhere; of several, 'recurrent,adapter', or 'all' shipped ones: the best wins.")
    ] = "default",
    dtype: Dtype = "bf16",
    device: Device = None,
    prefill: Prefill = "auto",
    seconds: Annotated[float, typer.Option(min=0, help="To measure for; two rounds at least.")] = 5.0,
    check: Annotated[
        int, typer.Option(min=0, help="Answer so many questions with the best policies, and compare.")
    ] = 0,
    arms: Annotated[int, typer.Option(min=0, help="Of --check: policies beside plain and the chosen; 0 is all.")] = 3,
    prompts: Annotated[Path | None, typer.Option(help="Of --check: questions; the built-in ones by default.")] = None,
    max_new_tokens: MaxNewTokens = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Of --check: every answer this often.")] = 3,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Of --check: begin no question after it; every policy answers one.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
    no_keep: Annotated[bool, typer.Option("--no-keep", help="Do not keep the plan for later loads.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure this machine and choose how to draft; later loads of the same model and heads follow the plan."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from .bench.tables import print_plan
    from .engine import planner

    questions = []
    if check:  # before minutes are spent
        from .bench.questions import built_in, choose, read_questions

        questions = choose(built_in() if prompts is None else read_questions(prompts), None, check)
    plans = {}
    for name, own in _engines(model, heads, dtype, device, prefill):
        note(f"measuring this machine for {seconds:g} s or a little more, with heads {name}")
        plans[name] = own, planner.plan(own, seconds)
    rivals: dict[str, dict[str, Any]] = {}
    for name, (_, made) in plans.items():
        path = None if no_keep else planner.store_plan(made)
        rivals[name] = planner.to_document(made) | {"kept": None if path is None else str(path), "check": None}
    best = max(plans, key=lambda name: plans[name][1].chosen.tokens_per_second)
    engine, made = plans[best]
    document = {**rivals[best], "heads": best}
    document["rivals"] = {
        name: {key: rivals[name][key] for key in ("chosen", "expected_speedup", "kept")}
        | {"tokens_per_second": found.chosen.tokens_per_second}
        for name, (_, found) in plans.items()
    }
    if check:
        from .bench.measure import now_and_then
        from .bench.plan_check import check as measured

        document["check"] = measured(
            engine, made, questions, arms=arms or None, max_new_tokens=max_new_tokens, repeats=repeats,
            seconds=math.inf if minutes is None else 60 * minutes, on_step=now_and_then(),
        )  # fmt: skip
    if as_json:
        print_json(document)
    else:
        print_plan(document)
    if document["check"] and document["check"]["different"]:
        raise typer.Exit(FAILED)


def _engines(model: str, heads: str, dtype: str, device: str | None, prefill: str) -> Iterator[tuple[str, Engine]]:
    """An engine for each head set named, over the same weights."""
    names = [name.strip() for name in heads.split(",") if name.strip()]
    if names == ["all"]:
        from .engine.load import shipped_kinds

        names = [kind for kind in shipped_kinds(model, _dtype(dtype)) if kind != "tda"]
        if not names:
            raise ValueError(f"no heads are shipped for {model}: give --heads, one or more folders")
    if not names:
        raise ValueError(f"--heads is {heads!r}, expected one or more head sets, comma-separated")
    first = _load(model, names[0], dtype, device, prefill)
    yield names[0], first
    for name in names[1:]:
        from .bench.arms import with_heads
        from .engine.load import load_heads

        yield name, with_heads(first, load_heads(model, name, _dtype(dtype)))


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def train(context: typer.Context) -> None:
    """Train exit heads for a model, on text that the model writes itself."""
    # One list of options for flags, TOML files and `python -m skipstone.train`: train/config.py reads them.
    from .train.__main__ import main as run

    raise typer.Exit(run(context.args))


@command
def bench(
    prompts: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[PROMPTS | compare A.json B.json]",
            help="JSON lines with question_id, category and turns; a built-in set by default. Or two documents of "
            "--out: what changed beyond noise?",
        ),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            help="Of plain, default, always, lookup[:NODES[:MATCH]], suffix (drafts from the text; FORM+lookup: else "
            "heads, FORM+beside: both), tree:BEAM:BRANCH:DEPTH[:NODES], accuracy:LEVEL[:LENGTH[:EXIT+EXIT]], "
            "likely:LEVEL[:LENGTH[:EXIT+EXIT]] (by the probability of the whole draft), fixed:EXIT:LENGTH, "
            "bare:EXIT:LENGTH, "
            "early:LEVEL[:EXIT+EXIT] (early exit, lossy); FORM@HEADS: another head set, FORM%TARGET skips weights: "
            "tda[:SHARE], teal[:LEVEL] (lossy), teal-draft[:LEVEL]. To sweep: LEVEL 0.6-0.95, LENGTH 1-6, EXIT * (all "
            "that have heads). all: everything that makes sense for these heads.",
        ),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="hf, hf-lookup, hf-early-exit (transformers), compile (torch.compile, GPU); again for more."),
    ] = None,
    baseline_limit: Annotated[
        int | None,
        typer.Option(help="Slow arms (baselines; on a GPU what the host drafts) answer so many questions, evenly."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions that are answered side by side.")] = 1,
    tasks: Annotated[str | None, typer.Option(help="Only these tasks or categories, comma-separated.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions in all, evenly over the tasks.")] = None,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Every answer this often; the median is reported.")] = 3,
    replay: Annotated[
        bool, typer.Option("--replay", help="Count fixed: and bare: arms from one plain run: exact, and not timed.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Where a decode step's time goes, in place of questions and arms.")
    ] = False,
    context: Annotated[
        str | None,
        typer.Option(
            help="Prompt lengths in tokens, 512,1k,2k,4k,8k: every question behind so much text. Of --profile: one "
            "number."
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="A folder for run.json, run.csv, report.html and plots. Started again with the same options, a run "
            "that was stopped goes on where it was."
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Begin no question after it; with --report the next run goes on.")
    ] = None,
    remark: Annotated[str, typer.Option("--note", help="On the circumstances; stands in the report.")] = "",
    model: Model = DEFAULT_MODEL,
    heads: Heads = "default",
    dtype: Dtype = "bf16",
    device: Device = None,
    prefill: Prefill = "auto",
    verify: Verify = "dense",
    sparsity: Sparsity = None,
    draft: Draft = "dense",
    teal: TealFolder = None,
    teal_level: TealLevel = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON document to this file too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Plain against speculative decoding. Exit code 1 if any answer differs from plain decoding's."""
    from .bench.contexts import parse_sizes
    from .bench.questions import built_in, choose, read_questions

    if prompts and str(prompts[0]) == "compare":
        _compare(prompts[1:], out, as_json)
        return
    if prompts and len(prompts) > 1:
        raise ValueError(f"{len(prompts)} prompt files were given, expected one, or: compare A.json B.json")
    source = prompts[0] if prompts else None
    if out is not None and not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if profile:
        if verify != "dense":
            raise ValueError(f"--profile times the whole model's steps, and --verify is {verify!r}: leave one out")
        (size,) = (64,) if context is None else parse_sizes(context)[:1]
        _profile(_load(model, heads, dtype, device, prefill), size, out, as_json)
        return
    chosen_tasks = None if tasks is None else [task.strip() for task in tasks.split(",") if task.strip()]
    questions = choose(built_in() if source is None else read_questions(source), chosen_tasks, limit)
    # thresholds that the engine itself does not take are for arms
    of_engine = (verify == "tda", "teal" in (verify, draft))
    own_tda, own_teal = (path if taken else None for path, taken in zip((sparsity, teal), of_engine, strict=True))
    engine = _load(model, heads, dtype, device, prefill, None, verify, own_tda, draft, own_teal, teal_level)
    from .bench.run import Settings, run
    from .bench.tables import print_bench

    settings = Settings(
        model=model,
        heads=heads,
        prompts="built-in" if source is None else source.name,
        command=shlex.join(["skipstone", *sys.argv[1:]]),
        arms=arms,
        baselines=tuple(baseline or []),
        baseline_limit=baseline_limit,
        batch=batch,
        sparsity=None if sparsity is None or own_tda else str(sparsity),
        teal=None if teal is None or own_teal else str(teal),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        repeats=repeats,
        replay=replay,
        context=() if context is None else parse_sizes(context),
        minutes=minutes,
        note=remark,
    )
    if report is not None:
        report.mkdir(parents=True, exist_ok=True)
    document = run(engine, questions, settings, journal=None if report is None else report / "journal.jsonl")
    if report is not None:
        from .bench.pages import write_report

        for path in write_report(document, report):
            note(f"wrote {path}")
    if out is not None:
        out.write_text(json.dumps(document, allow_nan=False) + "\n", encoding="utf-8")
    if as_json:
        print_json(document, indent=None)
    else:
        print_bench(document)
    for problem in document["problems"]:
        note(f"skipstone: {problem}")
    if document["problems"]:
        raise typer.Exit(FAILED)
    if document["interrupted"]:
        raise typer.Exit(INTERRUPTED)


@functools.partial(command, to=sparsity_app)
def report(
    text: Annotated[
        Path, typer.Option(help="Plain text, wikitext-2 for one: its first half calibrates, its second is measured.")
    ],
    out: Annotated[Path | None, typer.Option(help="A folder for report.json and pictures (PNG).")] = None,
    no_pictures: Annotated[bool, typer.Option("--no-pictures", help="Draw none: matplotlib is not needed.")] = False,
    methods: Annotated[
        str,
        typer.Option(
            help="Of tda, prior (TDA, shrunk), griffin, fixed (pruning), top-k (TDA's strengths, same share), "
            "predictor (each token's, guessed by trained networks), exact (each token's own strongest), teal."
        ),
    ] = "tda,griffin,fixed,teal",
    densities: Annotated[str, typer.Option(help="Kept shares of neurons.")] = "0.9,0.75,0.5",
    prior_tokens: Annotated[int, typer.Option(min=1, help="Of prior: as of calibrate.")] = 128,
    teal: TealFolder = None,
    levels: Annotated[str, typer.Option(help="Of TEAL: shares of the weights that are not read.")] = "0.25,0.4,0.5",
    windows: Annotated[int, typer.Option(help="Texts whose loss is measured.")] = 12,
    prompt_len: Annotated[int, typer.Option(help="Tokens of a window that are read densely.")] = 256,
    length: Annotated[int, typer.Option(help="Tokens of a window, its prompt included.")] = 384,
    calibration_texts: Annotated[int, typer.Option(help="Of 256 tokens.")] = 8,
    predictor_texts: Annotated[int, typer.Option(help="Of predictor: of 256 tokens, to train on.")] = 64,
    predictor_rank: Annotated[int, typer.Option(help="Of predictor: width between its two matrices.")] = 128,
    predictor_epochs: Annotated[int, typer.Option(help="Of predictor: passes over its texts.")] = 4,
    questions: Annotated[int, typer.Option(help="Maths questions, and Python functions (at most 64); 0: none.")] = 16,
    difficulty: Annotated[
        str, typer.Option(help="Of the maths questions: easy, medium, hard; one that the whole model half knows.")
    ] = "medium",
    no_claims: Annotated[bool, typer.Option("--no-claims", help="Leave inertia and uncertainty out.")] = False,
    repeats: Annotated[int, typer.Option(help="Timed runs of each setting; 0: none.")] = 5,
    long: Annotated[int, typer.Option(help="Tokens of long texts that are read and written; 0: none.")] = 0,
    long_texts: Annotated[int, typer.Option(min=1, help="How many.")] = 2,
    write: Annotated[
        str | None, typer.Option(help="Settings that answer and write long texts: 'tda 0.75,teal uniform 0.4'; all.")
    ] = None,
    max_perplexity_increase: Annotated[float, typer.Option(help="What the chosen setting may cost.")] = 0.03,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
    model: Model = DEFAULT_MODEL,
    dtype: Dtype = "bf16",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """The whole model against TDA, TEAL, GRIFFIN and a fixed pruning: speed, loss, agreement, tasks, long texts."""
    if out is not None:
        from .train.plots import require_matplotlib

        if not no_pictures:
            require_matplotlib()
        if (out / "report.json").exists():
            raise FileExistsError(f"{out / 'report.json'} exists; choose another folder")
    from .bench.sparsity_report import report as measured
    from .bench.sparsity_settings import Options
    from .bench.sparsity_views import plot_sparsity, print_sparsity

    wanted = Options(
        methods=tuple(_words(methods)), densities=_shares("--densities", densities), prior_tokens=prior_tokens,
        levels=_shares("--levels", levels), windows=windows, prompt_len=prompt_len, length=length,
        calibration_texts=calibration_texts, predictor_texts=predictor_texts, predictor_rank=predictor_rank,
        predictor_epochs=predictor_epochs, questions=questions, difficulty=difficulty, claims=not no_claims,
        repeats=repeats, long=long, long_texts=long_texts,
        write=None if write is None else tuple(_words(write)), max_perplexity_increase=max_perplexity_increase,
    )  # fmt: skip
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    engine = _load(model, "none", dtype, device, "sdpa")
    from .engine.load import load_teal

    thresholds = None if teal is None else load_teal(model, teal, _dtype(dtype))
    shown = [Path(word).name if "/" in word else word for word in sys.argv[1:]]  # without this machine's folders
    about = {"command": shlex.join(["skipstone", *shown])}

    def save(document: Mapping[str, Any]) -> None:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            beside = out / "report.json.part"
            beside.write_text(json.dumps({**about, **document}, allow_nan=False) + "\n", encoding="utf-8")
            beside.replace(out / "report.json")

    document = about | measured(engine, text, wanted, thresholds, note, save)
    save(document)
    if out is not None:
        for written in [out / "report.json", *([] if no_pictures else plot_sparsity(document, out))]:
            note(f"wrote {written}")
    if as_json:
        print_json(document, indent=None)
    else:
        print_sparsity(document)
    if document["failed"]:
        raise typer.Exit(1)


def _words(given: str) -> list[str]:
    return [word.strip() for word in given.split(",") if word.strip()]


def _shares(option: str, given: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in _words(given))
    except ValueError:
        raise ValueError(f"{option} is {given!r}, expected numbers such as 0.75,0.5") from None


def _compare(paths: list[Path], out: Path | None, as_json: bool) -> None:
    if len(paths) != 2:
        raise ValueError(f"compare takes two documents that --out or --report wrote, {len(paths)} were given")
    from .bench.compare import compare, read_document
    from .bench.tables import print_comparison

    found = compare(*map(read_document, paths))
    if out is not None:
        out.write_text(json.dumps(found, allow_nan=False) + "\n", encoding="utf-8")
    if as_json:
        print_json(found)
    else:
        print_comparison(found)


def _profile(engine: Engine, context: int, out: Path | None, as_json: bool) -> None:
    from .bench.profile import profile
    from .bench.tables import print_profile

    found = profile(engine, context)
    if out is not None:
        out.write_text(json.dumps(found, allow_nan=False) + "\n", encoding="utf-8")
    if as_json:
        print_json(found)
    else:
        print_profile(found)


def _load(
    model: str,
    heads: str,
    dtype: str,
    device: str | None,
    prefill: str,
    bare_exit: int | None = None,
    verify: str = "dense",
    sparsity: Path | None = None,
    draft: str = "dense",
    teal: Path | None = None,
    teal_level: float | None = None,
) -> Engine:
    """The engine; says on stderr why it will not speculate, if so."""
    from .engine.load import load

    if heads == "bare" and bare_exit is None:
        raise ValueError("--heads bare needs --exit: which layer's hidden state to read")
    wanted = None if heads in ("none", "bare") else heads
    engine = load(
        model, heads=wanted, dtype=_dtype(dtype), device=device, prefill=prefill, verify=verify, sparsity=sparsity,
        draft=draft, teal=teal, teal_level=teal_level,
    )  # fmt: skip
    if heads == "bare" and bare_exit is not None:
        from .bench.arms import with_bare_heads

        engine = with_bare_heads(engine, [bare_exit])
    if engine.warning is not None:
        note(f"no speculation: {engine.warning}")
    elif engine.heads is None and heads == "default":
        note("no exit heads are shipped for this model; give --heads, or --heads bare with --exit")
    return engine


def _dtype(name: str) -> Any:
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if name not in dtypes:
        raise ValueError(f"--dtype is {name!r}, expected one of {', '.join(dtypes)}")
    return dtypes[name]


def _drafting(
    engine: Engine,
    mode: str,
    never: bool,
    always: bool,
    lookup: bool | None,
    accuracy: float | None,
    exit_layer: int | None,
    length: int | None,
    branch: int | None,
) -> dict[str, Any]:
    """`mode`, `accuracy`, `speculation`, `policy` and `lookup` for the engine."""
    if mode != "lossless":
        shaped_otherwise = never or always or any(x is not None for x in (lookup, exit_layer, length, branch))
        if shaped_otherwise:
            raise ValueError(
                f"--mode {mode} drafts nothing: of the options that shape drafts it takes --accuracy alone"
            )
        return {"mode": mode, "accuracy": accuracy, "speculation": True, "policy": None}
    shaped = [value is not None for value in (accuracy, exit_layer, length, branch)]
    if never:
        if always or lookup or any(shaped):
            raise ValueError("--no-speculation excludes the options that shape drafts")
        return {"speculation": False, "policy": None}
    policy: DraftPolicy | None = None
    if any(shaped):
        policy = _policy(engine, accuracy, exit_layer, length, branch)
    return {"speculation": "always" if always else True, "policy": policy, "lookup": lookup}


def _policy(
    engine: Engine, accuracy: float | None, exit_layer: int | None, length: int | None, branch: int | None
) -> DraftPolicy:
    from .engine.gate import DEFAULT_ACCURACY, DraftPolicy, calibrated, fixed_exit

    if exit_layer is not None:
        if accuracy is not None or branch is not None:
            raise ValueError("--exit drafts always and in chains: it excludes --accuracy and --branch")
        return fixed_exit(exit_layer, DEFAULT_LENGTH if length is None else length)
    if engine.heads is None or engine.heads.calibration is None:
        raise ValueError("--accuracy, --length and --branch need calibrated heads, and this model has none here")
    return calibrated(
        engine.heads.calibration,
        accuracy=DEFAULT_ACCURACY if accuracy is None else accuracy,
        branch=branch or 1,
        max_depth=DraftPolicy.max_depth if length is None else length,
    )


def _sampling(given: dict[str, Any]) -> dict[str, Any]:
    """Fields of `SamplingParams` from a command's options, by name; checked before a model is loaded."""
    plain = (
        "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
        "min_new_tokens", "max_new_tokens", "seed",
    )  # fmt: skip
    found = {name: given[name] for name in plain if name in given}
    found["logit_bias"] = dict(_bias(entry) for entry in given.get("logit_bias") or ())
    found["stop"], found["stop_ids"] = tuple(given.get("stop") or ()), tuple(given.get("stop_id") or ())
    from .engine.sampling import SamplingParams

    SamplingParams(**found)
    return found | {"bad_words": list(given.get("bad_word") or ())}


def _bias(entry: str) -> tuple[int, float]:
    token, _, bias = entry.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise ValueError(f"--logit-bias is {entry!r}, expected ID=BIAS such as 42=-5 or 42=-inf") from None


def _tokenizer(engine: Engine) -> Any:
    if engine.tokenizer is None:
        raise ValueError("this model has no tokenizer, so it cannot read text")
    return engine.tokenizer


def _stream(
    engine: Engine, prompt: Any, options: dict[str, Any], quiet: bool, trace: Path | None
) -> tuple[Generation, bool]:
    """Stream one answer to stdout (unless quiet) and to the trace; whether Ctrl-C ended it."""
    from .bench.transcript import Transcript, last_line
    from .engine.tree import FROM_TEXT

    policy = options["policy"] or engine.policy
    from_text = policy.lookup is not None if options.get("lookup") is None else options["lookup"]
    exits = (FROM_TEXT, *policy.exits) if from_text else policy.exits
    if "mode" in options:
        exits = engine.heads.exits if engine.heads else ()
    transcript = None if quiet else Transcript(sys.stdout, exits)
    paced = _is_paced(options)
    interrupted = False
    with _tracing(trace) as write, engine.stream(prompt, **options) as stream:
        try:
            for event in stream:
                if transcript is not None:
                    transcript.event(event)
                write(event)
        except KeyboardInterrupt:
            interrupted = True
    out = _result(stream)
    if transcript is not None:
        transcript.finish(out.text)
        if transcript.tinted and out.stats.tokens_by_exit:
            from rich.console import Console

            Console(stderr=True, highlight=False).print(transcript.legend(out.mode))
    note(last_line(out, engine, paced) if not interrupted else f"interrupted; {last_line(out, engine, paced)}")
    return out, interrupted


def _is_paced(options: dict[str, Any]) -> bool:
    """Whether the engine decides round by round if drafting pays."""
    return "mode" not in options and options["speculation"] is True and options["policy"] is None


def _result(stream: Stream) -> Generation:
    assert stream.result is not None
    return stream.result


@contextmanager
def _tracing(path: Path | None) -> Iterator[Callable[[Any], None]]:
    if path is None:
        yield lambda event: None
        return
    from .bench.transcript import trace_record

    count = 0
    with open(path, "w", encoding="utf-8") as lines:

        def write(event: Any) -> None:
            nonlocal count
            lines.write(json.dumps(trace_record(count, event), ensure_ascii=False) + "\n")
            lines.flush()
            count += 1

        yield write


def _answer(engine: Engine, out: Generation, drafting: dict[str, Any], interrupted: bool) -> dict[str, Any]:
    """One answer in types that strict JSON holds."""
    from .bench.report import strict
    from .bench.transcript import speed

    answer = {
        "schema_version": 1,
        "model": engine.model_id,
        "mode": out.mode,
        "verify": out.verify,
        "draft": engine.draft,
        "text": out.text,
        "token_ids": out.token_ids,
        "prompt_ids": out.prompt_ids,
        "finish_reason": "cancelled" if interrupted else out.finish_reason,
        "error": out.error,
        "exit_layers": out.exit_layers,
        "logprobs": None if out.logprobs is None else [vars(entry) for entry in out.logprobs],
        "stats": out.stats.to_dict(),
        **speed(out, engine, _is_paced(drafting)),
    }
    return dict(strict(answer))


def _turns(interactive: bool) -> Iterator[str]:
    """What the user says, line by line, until /exit or the end."""
    while True:
        if interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            if interactive:
                note("")
            return
        line = line.strip()
        if line == "/exit":
            return
        if line:
            yield line
