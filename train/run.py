"""Training from a model to a calibrated head set: `train(TrainConfig(...))`.

The output folder:

    run.json               settings, versions, device: written first
    held_out.safetensors   what the model wrote after held-out prompts
    text.safetensors       what it wrote to train on, of the current round only
    checkpoints/           see `checkpoint`
    heads/                 the artefact
    report.json            settings, versions, data, curve, held-out results: written last
"""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.model import Decoder
from ..engine.pretrained import load_pretrained
from ..engine.tokenizer import Tokenizer
from ..heads import (
    BaseIdentity,
    HeadSet,
    HeadSetConfig,
    HeadSpec,
    StatefulHead,
    base_fingerprint,
    tokenizer_sha256,
)
from .calibrate import NUM_PROMPTS, calibrate, measuring_engine
from .chains import measure_chains
from .checkpoint import newest_checkpoint, save_checkpoint
from .choose import choose_heads
from .config import Recipe, TrainConfig
from .data import SelfText, evenly, frequent_ids
from .distributed import ALONE, Ranks, processes
from .measure import inference_projection, measure, simulate_chain, training_projection
from .progress import Bar, Tracker, bar
from .run_text import RunText
from .stop import Stopped, StopSignals
from .trainer import HeadTrainer, StepResult

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Where a run computes and what it shows may change when it goes on; what it computes may not.
FREE = {"out", "progress", "device", "keep", "save_every", "tracker", "shard_base"}
_PACKAGES = ("skipstone", "torch", "transformers", "safetensors", "numpy")


@dataclass(frozen=True)
class Base:
    """The frozen model and what a head set must know of it; `weights` are its tensors by canonical name, for heads that
    start from its layers (empty where none does)."""

    decoder: Decoder
    tokenizer: Tokenizer
    identity: BaseIdentity
    weights: Mapping[str, Tensor] = field(default_factory=dict)


def load_base(
    model: str, dtype: torch.dtype, device: str, progress: bool = True, ranks: Ranks = ALONE, shard: bool = False
) -> Base:
    """Load the base and take its fingerprint from the weights as they were read.

    Args:
        ranks: the processes; the first reads before the others do.
        shard: spread the layers over the processes, see `sharded`.
    """
    pretrained = ranks.first(lambda: load_pretrained(model, dtype, progress=progress))
    identity = BaseIdentity(
        pretrained.model_id,
        base_fingerprint(pretrained.weights, pretrained.config.num_layers),
        tokenizer_sha256(pretrained.tokenizer),
        pretrained.revision,
    )
    if shard:
        from .sharded import ShardedDecoder

        decoder: Decoder = ShardedDecoder(pretrained.config, pretrained.weights, dtype, device, ranks)
    else:
        decoder = Decoder(pretrained.config, pretrained.weights, dtype, device)
    return Base(decoder, pretrained.tokenizer, identity, pretrained.weights)


def train(config: TrainConfig, base: Base | None = None) -> HeadSet:
    """Write text, train, calibrate, save; among several processes where a launcher started them.

    Args:
        config: the run.
        base: a loaded base in place of `config.model`.

    Returns:
        The calibrated heads, attached for inference, also saved in `out/heads`.

    Raises:
        ValueError: settings that do not fit the model or each other; a loss that is not finite.
        Stopped: SIGTERM or Ctrl-C; what was trained is saved, the same settings go on from there.
    """
    started = time.monotonic()
    with processes(device_type(config.device)) as ranks, StopSignals() as stop:
        if ranks.rank:
            config = replace(config, progress=False, tracker=None)
        run = _Run(config, base, ranks, stop)
        try:
            run.all_rounds()
            return run.finish(started)
        finally:
            run.close()


def device_type(device: str | None) -> str:
    """cpu or cuda, as asked for or as there is.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if found == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch {torch.__version__} sees no GPU")
    return found


def card(heads: HeadSet) -> str:
    """The README of a trained set: what it is, how it was made, how good it is on held-out text."""
    assert heads.base is not None and heads.calibration is not None
    training = heads.config.training
    recipe = training.get("config", {}).get("recipe", {})
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
            f"{training.get('steps', 0):,} steps, loss '{recipe.get('loss', 'kl')}' against the full model.",
            f"Measured on {heads.calibration.source}. The last two columns are of the tokens that earlier exits "
            "refused.",
            "",
            "| exit layer | agreement | in top 2 | in top 4 | entropy gate at 0.90 (nats) | coverage at 0.90 |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


class _Run:
    """One run in one process: its text, its trainer, and what a checkpoint holds beside the trainer's state."""

    def __init__(self, config: TrainConfig, base: Base | None, ranks: Ranks, stop: StopSignals) -> None:
        self.config, self.ranks, self.stop = config, ranks, stop
        self.out = Path(config.out)
        self.out.mkdir(parents=True, exist_ok=True)
        if config.shard_base and ranks.size == 1:
            raise ValueError("--shard-base spreads the base over processes, and this is one: start it with torchrun")
        self.tracker = None if config.tracker is None else Tracker(config.tracker, self.out, asdict(config))
        if base is None:
            place = ranks.place(device_type(config.device))
            dtype, shard = DTYPES[config.dtype], config.shard_base
            base = load_base(config.model, dtype, place, config.progress, ranks, shard)
        self.decoder, self.identity = base.decoder, base.identity
        self.stop_ids = base.tokenizer.stop_ids
        specs = choose_heads(config, base.decoder.config)
        if ranks.rank == 0:
            claim(self.out, config, base, specs, ranks)
        checkpoint = newest_checkpoint(self.out / "checkpoints")
        step = 0 if checkpoint is None else checkpoint.step
        if ranks.total(step) != step * ranks.size:
            raise ValueError(f"processes found different checkpoints in {self.out}: all must share that folder")
        kept = {"curve": [], "written_tokens": {}} if checkpoint is None else checkpoint.values
        self.curve: list[dict[str, Any]] = kept["curve"]
        self.written: dict[str, int] = kept["written_tokens"]
        self.seen: int = kept.get("seen_tokens", 0)  # drafted positions trained on
        self.text = RunText(config, base, ranks, self.out)
        self.held_out = self.text.held_out()
        text = self._text_at(step)
        draft_ids = None if checkpoint is None else checkpoint.tensors.get("draft_ids")
        self.heads = fresh_heads(config, specs, base, text, draft_ids)
        self.trainer = HeadTrainer(base.decoder, {"heads": self.heads}, text, config.recipe, ranks)
        if checkpoint is not None:
            self.trainer.restore(checkpoint)
            if 0 < step == self._starts()[self._round(step)]:
                self.trainer.read(text)

    def all_rounds(self) -> None:
        """Train from where the trainer stands to the last step."""
        recipe = self.config.recipe
        while self.trainer.progress < 1.0:
            end = self._starts()[self._round(self.trainer.step_number) + 1]
            label = "training" if self.config.rounds == 1 else f"training, round {self._round(end - 1) + 1}"
            with (
                self.stop.deferred(),
                bar(self.config.progress, label, recipe.steps, self.trainer.step_number) as shown,
            ):
                self._train_until(end, shown)
            if end < recipe.steps and self.trainer.progress < 1.0:
                self.trainer.read(self._text_at(end))

    def finish(self, started: float) -> HeadSet:
        """Store the heads, calibrate what was stored, report. Process 0 does it, the others wait and load."""
        folder, projection = self.out / "heads", inference_projection(self.decoder)
        if self.ranks.rank == 0:
            facts = self._facts()
            heads = self._restricted()
            heads.config = replace(heads.config, training=facts)
            heads.save(folder, overwrite=True)
            if not self.config.shard_base:
                # What is measured is what was stored: rounded weights, packed as in decoding.
                heads = HeadSet.load(folder, self.identity).attach(projection)
                held_out = self.held_out
                greedy = evenly([i for i in range(len(held_out)) if held_out.greedy[i]], NUM_PROMPTS)
                prompts = [held_out.text(i)[: int(held_out.prompt_lens[i])].tolist() for i in greedy]
                engine, shown = measuring_engine(self.decoder, heads), self.config.progress
                _, heads.calibration = calibrate(engine, prompts, stop_ids=self.stop_ids, progress=shown)
                heads.save(folder, overwrite=True, card=card(heads))
            report = {"run": facts, "curve": self.curve, "minutes": (time.monotonic() - started) / 60}
            (self.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        self.ranks.wait()
        return HeadSet.load(folder, self.identity).attach(projection)

    def _restricted(self) -> HeadSet:
        """The trained heads on the draft vocabulary, where losses saw another one."""
        count = self.config.draft_vocab
        if self.config.train_vocab is None or not 0 < count < self.heads.config.num_outputs:
            return self.heads
        sizes = self.decoder.config
        ids = frequent_ids(self.trainer.text, count, sizes.vocab_size, self.stop_ids)
        return self.heads.restricted(ids)

    def close(self) -> None:
        if self.tracker is not None:
            self.tracker.close()

    def _train_until(self, end: int, shown: Bar) -> None:
        config, trainer = self.config, self.trainer
        while trainer.step_number < end and trainer.progress < 1.0:
            result = trainer.step()
            at = trainer.step_number
            self.seen += result.num_tokens
            shown.step(result)
            if self.tracker is not None:
                self.tracker.step(at, self.heads.exits, result)
            # asked together, so that all processes end after the same step
            stopped = self.ranks.total(int(self.stop.requested is not None)) > 0
            ends = trainer.progress >= 1.0
            if at % config.eval_every == 0 or ends:
                self._evaluate(result, shown)
            if at % config.save_every == 0 or at == end or ends or stopped:
                self._save(result)
            if stopped:
                who = self.stop.requested or "another process"
                raise Stopped(f"stopped by {who}, saved at step {at:,} of {config.recipe.steps:,}")

    def _evaluate(self, result: StepResult, shown: Bar) -> None:
        if self.ranks.rank and not self.config.shard_base:  # spread layers are gathered by all processes together
            return
        recipe = self.config.recipe
        members = list(range(min(self.config.eval_texts, len(self.held_out))))
        found = look(self.decoder, self.heads, self.held_out, members, recipe)
        loss = dict(zip(map(str, self.heads.exits), result.loss["heads"].tolist(), strict=True))
        self.curve.append({"step": self.trainer.step_number, "seen_tokens": self.seen, "loss": loss, **found})
        shown.held_out(self.curve[-1])
        if self.tracker is not None:
            self.tracker.held_out(self.curve[-1])

    def _save(self, result: StepResult) -> None:
        at = self.trainer.step_number
        for name, loss in result.loss.items():
            if not bool(torch.isfinite(loss).all()):
                raise ValueError(f"the loss of {name} is {loss.tolist()} at step {at}: lower lr (checkpoints are kept)")
        if self.ranks.rank:
            return
        tensors, values = self.trainer.state()
        if self.heads.draft_ids is not None:
            tensors["draft_ids"] = self.heads.draft_ids  # of the first round's text, which is gone in later ones
        more = {"curve": self.curve, "written_tokens": self.written, "seen_tokens": self.seen}
        save_checkpoint(self.out / "checkpoints", at, tensors, {**values, **more}, self.config.keep)

    def _text_at(self, step: int) -> SelfText:
        index = self._round(step)
        text = self.text.of_round(index)
        self.written[str(index)] = text.num_written
        return text

    def _round(self, step: int) -> int:
        """The round that the step after `step` belongs to."""
        starts = self._starts()
        return max(r for r in range(self.config.rounds) if starts[r] <= step)

    def _starts(self) -> list[int]:
        """The step that each round starts from, and the last one's end."""
        rounds, steps = self.config.rounds, self.config.recipe.steps
        return [r * steps // rounds for r in range(rounds + 1)]

    def _facts(self) -> dict[str, Any]:
        """Where the heads come from. A shipped card shows no folder of this machine."""
        on_gpu = self.decoder.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.decoder.device) if on_gpu else 0  # 0: not measured
        settings = asdict(self.config)
        for name in ("prompts", "text_from"):
            settings[name] = None if settings[name] is None else Path(settings[name]).name
        settings["model"] = self.identity.model_id
        del settings["out"]
        return {
            "config": settings,
            "steps": self.trainer.step_number,
            "seen_tokens": self.seen,
            "training_seconds": round(self.trainer.seconds, 1),
            "peak_gib": round(peak / 2**30, 2),
            "written_tokens": sum(self.written.values()),
            "texts": len(self.trainer.text),
            "held_out_texts": len(self.held_out),
            **environment(self.ranks, self.decoder.device),
        }


def look(
    decoder: Decoder, heads: HeadSet, text: SelfText, members: Sequence[int], recipe: Recipe
) -> dict[str, dict[str, float]]:
    """Agreement and simulated tokens per verification of each exit on some texts, by layer.

    Heads without state draft `CHAIN` tokens from their exit, recurrent ones as many as they were unrolled for.
    """
    agreement: dict[str, float] = {}
    tokens: dict[str, float] = {}
    plain = [layer for layer, head in heads.heads.items() if not isinstance(head, StatefulHead)]
    sizes = recipe.batch_tokens, recipe.chunk_tokens
    for layer in heads.exits:
        if layer not in plain:
            chains = measure_chains(decoder, heads, layer, text, recipe.chain, members, *sizes)
            agreement[str(layer)] = chains.cumulative[0]
            tokens[str(layer)] = chains.tokens_per_verification(recipe.chain)
    if plain:
        found = measure(decoder, heads, text, members, *sizes, decoder.device.type == "cuda")
        for layer, rank in found.rank.items():
            agreement[str(layer)] = float((rank == 0).mean())
            tokens[str(layer)] = simulate_chain(rank == 0, found.text)
    return {"agreement": agreement, "tokens_per_verification": tokens}


def fresh_heads(
    config: TrainConfig, specs: tuple[HeadSpec, ...], base: Base, text: SelfText, draft_ids: Tensor | None = None
) -> HeadSet:
    """Untrained heads; their draft vocabulary is `draft_ids`, or the text's most frequent ids."""
    sizes = base.decoder.config
    wanted = config.draft_vocab if config.train_vocab is None else config.train_vocab
    draft_vocab = wanted if 0 < wanted < sizes.vocab_size else None
    if draft_vocab is not None and draft_ids is None:
        draft_ids = frequent_ids(text, draft_vocab, sizes.vocab_size, base.tokenizer.stop_ids)
    set_config = HeadSetConfig(sizes.hidden_size, sizes.vocab_size, sizes.num_layers, specs, draft_vocab)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.recipe.seed)
        heads = HeadSet(set_config, draft_ids, base.identity)
    heads.initialise(training_projection(base.decoder), _as_they_multiply(base))
    return heads


def _as_they_multiply(base: Base) -> dict[str, Tensor]:
    offset = base.decoder.config.norm_offset
    return {name: t.float() + offset if "norm" in name and offset else t for name, t in base.weights.items()}


def claim(out: Path, config: TrainConfig, base: Base, specs: Sequence[HeadSpec], ranks: Ranks) -> None:
    """Record the settings, or refuse a folder that another run began."""
    heads = [{"kind": s.kind, "exit_layer": s.exit_layer, "options": dict(s.options)} for s in specs]
    record = {"config": asdict(config), "heads": heads, "base": vars(base.identity)}
    record = json.loads(json.dumps({**record, **environment(ranks, base.decoder.device)}))
    path = out / "run.json"
    if path.exists():
        found = json.loads(path.read_text())
        before, now = found["config"], record["config"]
        other = sorted(k for k in {*before, *now} - FREE if before.get(k) != now.get(k))
        if other or found["base"]["fingerprint"] != record["base"]["fingerprint"]:
            raise ValueError(
                f"{out} holds a run with other settings ({', '.join(other) or 'another base'}): "
                "continue it with the same ones, or choose another output folder"
            )
    path.write_text(json.dumps(record, indent=1) + "\n")


def environment(ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Versions, revision and device, for reports."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {package: metadata.version(package) for package in _PACKAGES}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "git_revision": git_revision(),
        "device": f"{device.type}: {name}",
        "processes": ranks.size,
    }


def git_revision() -> str | None:
    """The commit of this source, with -dirty where it was changed since; None where it is no checkout."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        # an installed copy may lie inside somebody else's repository, which does not track this file
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True, timeout=10)
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
