"""Training from a model and a prompt file to a calibrated head set: `train(TrainConfig(...))`.

The output folder:

    text.safetensors   what the model wrote (train and held-out), reused when a run goes on
    checkpoints/       see `checkpoint`
    heads/             the artefact
    report.json        settings, versions, data, curve, held-out results
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file

from ..engine.model import Decoder
from ..engine.pretrained import load_pretrained
from ..engine.tokenizer import Tokenizer
from ..heads import BaseIdentity, HeadSet, HeadSetConfig, HeadSpec, base_fingerprint, tokenizer_sha256
from .calibrate import calibrate
from .checkpoint import newest_checkpoint, save_checkpoint
from .data import SelfText, encode_chat, frequent_ids, is_held_out, read_prompts
from .generate import Sampling, write_text
from .measure import inference_projection, measure, simulate_chain, training_projection
from .trainer import HeadTrainer, Recipe, StepResult

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run is made of.

    Args:
        model: name, hub id, folder or GGUF file of the base.
        prompts: JSON-lines file of prompts, see `data.read_prompts`.
        out: output folder. A run that was interrupted there goes on.
        exits: exit layers.
        kind: head kind; width: of adapters.
        draft_vocab: ids a head can draft, None for all.
        max_prompts, max_prompt_tokens: prompts beyond are left out.
        max_new_tokens: written per prompt; every prompt is continued greedily and once at `temperature`.
        held_out_percent: of prompts, by hash, never trained on.
        cache_tokens: KV slots held at once while writing.
        eval_every, eval_texts: held-out check while training, steps and texts.
        save_every, keep: checkpoints, steps and number.
        progress: a progress bar on stderr.
    """

    model: str
    prompts: str
    out: str
    exits: tuple[int, ...]
    kind: str = "adapter"
    width: int = 192
    draft_vocab: int | None = 8_192
    max_prompts: int | None = None
    max_prompt_tokens: int = 640
    max_new_tokens: int = 256
    temperature: float = 0.8
    held_out_percent: float = 3.0
    cache_tokens: int = 32_768
    eval_every: int = 250
    eval_texts: int = 64
    save_every: int = 250
    keep: int = 2
    device: str = "cpu"
    dtype: str = "bf16"
    progress: bool = True
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        if not self.exits:
            raise ValueError("exits is empty, expected at least one exit layer")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected one of {sorted(_DTYPES)}")
        if not 0 < self.held_out_percent < 100:
            raise ValueError(f"held_out_percent is {self.held_out_percent}, expected above 0 and below 100")


@dataclass(frozen=True)
class Base:
    """The frozen model and what a head set must know of it."""

    decoder: Decoder
    tokenizer: Tokenizer
    identity: BaseIdentity


def load_base(model: str, dtype: torch.dtype, device: str, progress: bool = True) -> Base:
    """Load the base and take its fingerprint from the weights as they were read."""
    pretrained = load_pretrained(model, dtype, progress=progress)
    identity = BaseIdentity(
        pretrained.model_id,
        base_fingerprint(pretrained.weights, pretrained.config.num_layers),
        tokenizer_sha256(pretrained.tokenizer),
        pretrained.revision,
    )
    return Base(Decoder(pretrained.config, pretrained.weights, dtype, device), pretrained.tokenizer, identity)


def train(config: TrainConfig, base: Base | None = None) -> HeadSet:
    """Write text, train, calibrate, save.

    Args:
        config: the run.
        base: a loaded base in place of `config.model`.

    Returns:
        The calibrated heads, attached for inference, also saved in `out/heads`.

    Raises:
        ValueError: settings that do not fit the model or each other; a loss that is not finite.
    """
    started = time.monotonic()
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    base = base or load_base(config.model, _DTYPES[config.dtype], config.device, config.progress)
    decoder = base.decoder
    _claim(out, config, base)
    text, held_out = _text_for(config, base, out)
    heads = _fresh_heads(config, base, text)
    trainer = HeadTrainer(decoder, {"heads": heads}, text, config.recipe)
    checkpoint = newest_checkpoint(out / "checkpoints")
    if checkpoint is not None:
        trainer.restore(checkpoint)
    curve = _loop(config, trainer, heads, held_out, out, [] if checkpoint is None else checkpoint.values["curve"])
    provenance = _provenance(config, base, text, held_out)
    heads.config = replace(heads.config, training=provenance)
    heads.save(out / "heads", overwrite=True)
    # What is measured is what was stored: rounded weights, packed as in decoding.
    heads = HeadSet.load(out / "heads", base.identity).attach(inference_projection(decoder))
    heads.calibration = calibrate(decoder, heads, held_out, config.recipe.batch_tokens, config.recipe.chunk_tokens)
    heads.save(out / "heads", overwrite=True, card=card(heads))
    report = {"run": provenance, "curve": curve, "minutes": (time.monotonic() - started) / 60}
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return heads


def card(heads: HeadSet) -> str:
    """The README of a trained set: what it is, how it was made, how good it is on held-out text."""
    assert heads.base is not None and heads.calibration is not None
    training = heads.config.training
    rows = [
        f"| {layer} | {e.agreement:.3f} | {e.top_k[1]:.3f} | {e.top_k[3]:.3f} | {e.gates[0.90].low:.3f} | "
        f"{e.gates[0.90].coverage:.3f} |"
        for layer, e in sorted(heads.calibration.exits.items())
    ]
    return "\n".join(
        [
            f"# Exit heads for {heads.base.model_id}",
            "",
            f"{heads.num_parameters:,} parameters at {len(heads.exits)} exits of {heads.config.num_layers} layers; "
            f"draft vocabulary {heads.config.num_outputs:,} of {heads.config.vocab_size:,} ids.",
            "",
            f"Trained on {training.get('written_tokens', 0):,} tokens that the model itself wrote, "
            f"{training.get('config', {}).get('recipe', {}).get('steps', 0):,} steps, KL to the full model.",
            f"Measured on {heads.calibration.source}. The last two columns are of the tokens that earlier exits "
            "refused.",
            "",
            "| exit layer | agreement | in top 2 | in top 4 | entropy gate at 0.90 (nats) | coverage at 0.90 |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _claim(out: Path, config: TrainConfig, base: Base) -> None:
    """Record the settings, or refuse a folder that another run began."""
    # where it runs and what it shows may change between runs; what it computes may not
    free = ("out", "progress", "device", "keep", "save_every")
    settings = {k: v for k, v in asdict(config).items() if k not in free}
    record = json.loads(json.dumps({"config": settings, "base": base.identity.fingerprint}))
    path = out / "run.json"
    if path.exists():
        found = json.loads(path.read_text())
        if found != record:
            other = sorted(k for k in settings if found["config"].get(k) != record["config"][k])
            raise ValueError(
                f"{out} holds a run with other settings ({', '.join(other) or 'another base'}): "
                "continue it with the same ones, or choose another output folder"
            )
        return
    path.write_text(json.dumps(record, indent=1) + "\n")


def _text_for(config: TrainConfig, base: Base, out: Path) -> tuple[SelfText, SelfText]:
    """The training and held-out text, written now or read from an earlier start of this run."""
    path = out / "text.safetensors"
    if not path.exists():
        written = _write(config, base)
        work = path.with_suffix(".tmp")
        tensors = {f"{split}.{k}": t for split, text in written.items() for k, t in text.tensors().items()}
        save_file({k: t.contiguous() for k, t in tensors.items()}, work)
        os.replace(work, path)
    stored = load_file(path)
    train_split, held_out = (
        SelfText.from_tensors({k.removeprefix(f"{split}."): t for k, t in stored.items() if k.startswith(f"{split}.")})
        for split in ("train", "held_out")
    )
    return train_split, held_out


def _write(config: TrainConfig, base: Base) -> dict[str, SelfText]:
    prompts = read_prompts(config.prompts)[: config.max_prompts]
    encoded = [
        (encode_chat(base.tokenizer, prompt), is_held_out(prompt, config.held_out_percent)) for prompt in prompts
    ]
    longest = min(config.max_prompt_tokens, base.decoder.config.max_context - config.max_new_tokens)
    encoded = [(ids, held) for ids, held in encoded if 0 < len(ids) <= longest]
    splits = {
        "train": [ids for ids, held in encoded if not held],
        "held_out": [ids for ids, held in encoded if held],
    }
    for name, chosen in splits.items():
        if not chosen:
            raise ValueError(
                f"no prompts for the {name} split among {len(prompts)} (of at most {longest} tokens): "
                "give more prompts, or change held_out_percent or max_prompt_tokens"
            )
    stops = tuple(base.tokenizer.stop_ids)
    total = 2 * sum(len(chosen) for chosen in splits.values()) * config.max_new_tokens
    written: dict[str, SelfText] = {}
    with _bar(config, "writing text", total) as bar:
        for number, (name, chosen) in enumerate(splits.items()):
            sampling = Sampling(config.max_new_tokens, stops, config.cache_tokens, config.recipe.seed * 2 + number)
            temperatures = [0.0] * len(chosen) + [config.temperature] * len(chosen)
            written[name] = write_text(base.decoder, chosen * 2, temperatures, sampling, bar.advance)
    return written


def _fresh_heads(config: TrainConfig, base: Base, text: SelfText) -> HeadSet:
    sizes = base.decoder.config
    options = {"width": config.width} if config.kind == "adapter" else {}
    specs = tuple(HeadSpec(config.kind, layer, options) for layer in config.exits)
    draft_vocab = config.draft_vocab
    if draft_vocab is not None and draft_vocab >= sizes.vocab_size:
        draft_vocab = None
    ids = None
    if draft_vocab is not None:
        ids = frequent_ids(text, draft_vocab, sizes.vocab_size, base.tokenizer.stop_ids)
    set_config = HeadSetConfig(sizes.hidden_size, sizes.vocab_size, sizes.num_layers, specs, draft_vocab)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.recipe.seed)
        heads = HeadSet(set_config, ids, base.identity)
    heads.initialise(training_projection(base.decoder))
    return heads


def _loop(
    config: TrainConfig,
    trainer: HeadTrainer,
    heads: HeadSet,
    held_out: SelfText,
    out: Path,
    curve: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    recipe = config.recipe
    members = list(range(min(config.eval_texts, len(held_out))))
    with _bar(config, "training", recipe.steps, trainer.step_number) as bar:
        while trainer.step_number < recipe.steps:
            result = trainer.step()
            at = trainer.step_number
            bar.step(result)
            last = at == recipe.steps
            if at % config.eval_every == 0 or last:
                curve.append(_evaluate(config, trainer, heads, held_out, members, result))
                bar.held_out(curve[-1])
            if at % config.save_every == 0 or last:
                _require_finite(result, at)
                tensors, values = trainer.state()
                save_checkpoint(out / "checkpoints", at, tensors, {**values, "curve": curve}, config.keep)
    return curve


def _evaluate(
    config: TrainConfig,
    trainer: HeadTrainer,
    heads: HeadSet,
    held_out: SelfText,
    members: list[int],
    result: StepResult,
) -> dict[str, Any]:
    decoder, recipe = trainer.decoder, config.recipe
    found = measure(
        decoder, heads, held_out, members, recipe.batch_tokens, recipe.chunk_tokens, decoder.device.type == "cuda"
    )
    right = {layer: rank == 0 for layer, rank in found.rank.items()}
    return {
        "step": trainer.step_number,
        "loss": dict(zip(map(str, heads.exits), result.loss["heads"].tolist(), strict=True)),
        "agreement": {str(layer): float(r.mean()) for layer, r in right.items()},
        "tokens_per_verification": {str(layer): simulate_chain(r, found.text) for layer, r in right.items()},
    }


def _require_finite(result: StepResult, step: int) -> None:
    for name, loss in result.loss.items():
        if not bool(torch.isfinite(loss).all()):
            raise ValueError(f"the loss of {name} is {loss.tolist()} at step {step}: lower lr (checkpoints are kept)")


def _provenance(config: TrainConfig, base: Base, text: SelfText, held_out: SelfText) -> dict[str, Any]:
    settings = asdict(config)
    settings["prompts"] = Path(config.prompts).name  # a shipped card shows no folder of this machine
    settings["model"] = base.identity.model_id
    del settings["out"]
    return {
        "config": settings,
        "written_tokens": text.num_written,
        "texts": len(text),
        "held_out_texts": len(held_out),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


class _Bar:
    """The progress line: tokens/s, loss and agreement of this stretch, the last held-out result."""

    def __init__(self, progress: Progress, label: str, total: int, done: int) -> None:
        self._progress = progress
        self._task = progress.add_task(label, total=total, completed=done, note="")
        self._tokens, self._since, self._held_out = 0, time.monotonic(), ""

    def advance(self, count: int) -> None:
        self._tokens += count
        self._progress.update(self._task, advance=count, note=f"{self._rate():,.0f} tokens/s")

    def step(self, result: StepResult) -> None:
        self._tokens += result.num_tokens
        if self._progress.disable:
            return  # reading the loss would wait for the device
        loss = " ".join(f"{x:.2f}" for x in result.loss["heads"].tolist())
        agreement = " ".join(f"{x:.2f}" for x in result.agreement["heads"].tolist())
        note = f"{self._rate():,.0f} tokens/s  loss {loss}  agreement {agreement}{self._held_out}"
        self._progress.update(self._task, advance=1, note=note)

    def held_out(self, entry: dict[str, Any]) -> None:
        shown = " ".join(f"{x:.2f}" for x in entry["tokens_per_verification"].values())
        self._held_out = f"  held-out tokens per verification {shown}"

    def _rate(self) -> float:
        return self._tokens / max(1e-6, time.monotonic() - self._since)


@contextmanager
def _bar(config: TrainConfig, label: str, total: int, done: int = 0) -> Iterator[_Bar]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=not config.progress) as progress:
        yield _Bar(progress, label, total, done)
