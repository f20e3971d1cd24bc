"""What a run would take, found without writing text: memory by arithmetic, a step's time by a few small ones."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ..engine.inventory import num_parameters
from ..engine.model import Decoder
from ..heads import HeadSet
from .choose import choose_heads
from .config import TrainConfig
from .data import SelfText
from .generate import cache_that_fits
from .run import DTYPES, Base, device_type, fresh_heads, load_base
from .trainer import HeadTrainer

TINY_TOKENS, TIMED_STEPS = 512, 3
FOLDER = "untrained"


def dry_run(config: TrainConfig, base: Base | None = None) -> str:
    """Write untrained heads to `out/untrained` and say what training them takes.

    Args:
        base: a loaded base in place of `config.model`.

    Returns:
        The report, a few lines of text.
    """
    device = device_type(config.device)
    base = base or load_base(config.model, DTYPES[config.dtype], device, config.progress)
    decoder = base.decoder
    text = _random_text(config, decoder)
    heads = fresh_heads(config, choose_heads(config, decoder.config), base, text)
    folder = Path(config.out) / FOLDER
    heads.save(folder, overwrite=True)
    HeadSet.load(folder, base.identity)
    tokens = int(text.lens.sum())
    seconds = _step_seconds(config, decoder, heads, text)
    whole = seconds * config.recipe.batch_tokens / tokens
    lines = [
        f"base: {base.identity.model_id}, {num_parameters(decoder):,} parameters, {config.dtype} on {decoder.device}",
        f"heads: {heads.num_parameters:,} parameters, "
        + ", ".join(f"{spec.kind} at {spec.exit_layer}" for spec in heads.config.heads)
        + f", draft vocabulary {heads.config.num_outputs:,} of {heads.config.vocab_size:,}",
        "memory of one process:",
    ]
    items = list(memory(config, decoder, heads))
    lines += [f"  {size / 2**20:10,.1f} MiB  {what}" for what, size in items]
    lines += [
        f"  {sum(size for _, size in items) / 2**20:10,.1f} MiB  at most, text being written and trained on by turns",
        f"step: {seconds:.3f} s for {tokens:,} tokens measured, about {whole:.2f} s for {config.recipe.batch_tokens:,}",
        f"training: about {whole * config.recipe.steps / 60:,.1f} minutes, {config.recipe.steps:,} steps",
        f"untrained heads in {folder}",
    ]
    return "\n".join(lines)


def memory(config: TrainConfig, decoder: Decoder, heads: HeadSet) -> Iterator[tuple[str, int]]:
    """What lies in memory and its bytes, from sizes: the parts that grow with a setting name it."""
    sizes, recipe, size = decoder.config, config.recipe, decoder.dtype.itemsize
    outputs, width = heads.config.num_outputs, sizes.hidden_size
    yield "base", num_parameters(decoder) * size
    if decoder.output.packed:
        yield "LM head, packed", decoder.head_weight.numel() * size
    if heads.draft_ids is not None:
        yield "LM head rows of the draft vocabulary", outputs * width * size
    yield "heads and their gradients (fp32)", heads.num_parameters * 8
    yield "optimiser: two moments (fp32)", heads.num_parameters * 8
    kept = len({sizes.num_layers} | set(heads.layers_read))
    per_layer = (
        4 * width + 3 * (sizes.num_heads + 2 * sizes.num_kv_heads) * sizes.head_dim + 3 * sizes.intermediate_size
    )
    yield "base's activations (batch_tokens)", recipe.batch_tokens * 4 * (kept * width + per_layer)
    stateful = [head for head in heads.heads.values() if head.stateful]
    if stateful:
        steps = max(1, recipe.chain) if any(getattr(head, "taps", ()) for head in stateful) else 1
        each = sum(p.shape[0] for head in stateful for p in head.parameters() if p.ndim == 2)
        yield "heads' activations, attention not counted (batch_tokens, chain)", recipe.batch_tokens * 4 * steps * each
    chunk = min(recipe.chunk_tokens, recipe.batch_tokens)
    yield (
        "logits: the model's, the teacher's, a head's and their gradient (chunk_tokens)",
        chunk * (sizes.vocab_size * (size + 4) + outputs * 4 * 4),
    )
    slot = 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim * size
    yield "KV cache while writing text (cache_tokens)", slot * (config.cache_tokens or cache_that_fits(decoder))


def _random_text(config: TrainConfig, decoder: Decoder) -> SelfText:
    length = min(128, config.recipe.batch_tokens, decoder.config.max_context)
    count = max(1, min(TINY_TOKENS, config.recipe.batch_tokens) // length)
    generator = torch.Generator().manual_seed(config.recipe.seed)
    ids = torch.randint(decoder.config.vocab_size, (count, length), generator=generator)
    return SelfText.of(ids.tolist(), [1] * count, [True] * count)


def _step_seconds(config: TrainConfig, decoder: Decoder, heads: HeadSet, text: SelfText) -> float:
    trainer = HeadTrainer(decoder, {"heads": heads}, text, replace(config.recipe, batch_tokens=int(text.lens.sum())))
    times = []
    for _ in range(1 + TIMED_STEPS):  # the first one warms up
        started = time.perf_counter()
        result = trainer.step()
        result.loss["heads"].tolist()  # waits for the device
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
