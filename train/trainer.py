"""Training heads on a frozen base: one forward of the base a step feeds every exit of every set.

Heads are independent problems: each has its own loss, gradient and clipping, so that a head's weights do not depend
on which others train beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.model import Decoder
from ..heads import HeadSet
from .checkpoint import Checkpoint
from .data import SelfText, make_batch, plan_batches
from .losses import Remainder, Teacher, kl_to_teacher
from .measure import training_projection


@dataclass(frozen=True)
class Recipe:
    """How heads are trained.

    Args:
        steps: optimiser steps.
        batch_tokens: tokens of the base's forward in one step, filling included.
        lr: peak learning rate, reached after `warmup` steps, falling along a cosine to `lr * final_lr`.
        clip: largest gradient norm of each head.
        remainder: what happens to the mass outside the draft vocabulary, see `losses`.
        chunk_tokens: tokens whose `[chunk, V]` logits are alive at once; bounds memory, not the result.
        seed: of the heads' start and the order of the data.
    """

    steps: int = 1000
    batch_tokens: int = 32_768
    lr: float = 2e-3
    final_lr: float = 0.02
    warmup: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    remainder: Remainder = "spread"
    chunk_tokens: int = 4_096
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens", "chunk_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.lr <= 0 or self.clip <= 0 or self.warmup < 0 or not 0 <= self.final_lr <= 1:
            raise ValueError(
                f"lr {self.lr}, clip {self.clip}, warmup {self.warmup}, final_lr {self.final_lr}: out of range"
            )

    def lr_at(self, step: int) -> float:
        """Learning rate of optimiser step `step`, from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        floor = self.lr * self.final_lr
        return floor + 0.5 * (self.lr - floor) * (1.0 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True)
class StepResult:
    """What one step saw. Tensors stay on the device: reading them waits for it.

    Attributes:
        num_tokens: drafted positions that were trained on.
        loss, agreement: set name -> `[exits]` fp32, means over those positions, exits ascending.
    """

    num_tokens: int
    loss: dict[str, Tensor]
    agreement: dict[str, Tensor]


class HeadTrainer:
    """Trains one or several head sets side by side.

    Args:
        decoder: the frozen base.
        sets: name -> head set; they may differ in exits, kinds and draft vocabulary.
        text: the training split.
        recipe: see `Recipe`.
    """

    def __init__(self, decoder: Decoder, sets: Mapping[str, HeadSet], text: SelfText, recipe: Recipe) -> None:
        if not len(text):
            raise ValueError("the training split holds no texts: give more prompts or a smaller held-out share")
        self.decoder, self.sets, self.text, self.recipe = decoder, dict(sets), text, recipe
        projection = training_projection(decoder)
        for heads in self.sets.values():
            heads.attach(projection)
        parameters = [p for _, p in self.named_parameters()]
        self.optimizer = torch.optim.AdamW(
            parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)
        )
        self.step_number = 0
        self._epoch, self._cursor = 0, 0
        self._plan = self._plan_epoch(0)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, heads in self.sets.items():
            for layer, head in heads.heads.items():
                for parameter_name, parameter in head.named_parameters():
                    yield f"{name}.exit.{layer}.{parameter_name}", parameter

    def step(self) -> StepResult:
        """One optimiser step on the next batch."""
        decoder = self.decoder
        batch = make_batch(self.text, self._next_members(), decoder.device)
        layers = sorted({layer for heads in self.sets.values() for layer in heads.exits})
        final = decoder.config.num_layers
        with torch.no_grad():
            states = decoder.encode(batch.ids, [*layers, final])
        rows = batch.drafted.reshape(-1).nonzero().squeeze(1)
        hidden = {layer: state.flatten(0, 1)[rows] for layer, state in states.items()}
        del states
        sums = {name: torch.zeros(2, len(h.exits), device=decoder.device) for name, h in self.sets.items()}
        self.optimizer.zero_grad(set_to_none=True)
        for first in range(0, len(rows), self.recipe.chunk_tokens):
            part = {layer: state[first : first + self.recipe.chunk_tokens] for layer, state in hidden.items()}
            self._backward(part, part.pop(final), sums, len(rows))
        self._update()
        loss = {name: total[0] / len(rows) for name, total in sums.items()}
        agreement = {name: total[1] / len(rows) for name, total in sums.items()}
        return StepResult(len(rows), loss, agreement)

    def _backward(self, part: dict[int, Tensor], last: Tensor, sums: dict[str, Tensor], total: int) -> None:
        """Add one chunk's gradients; its logits die with it."""
        with torch.no_grad():
            full = self.decoder.lm_head(self.decoder.final_norm(last))
        teachers: dict[int | None, Teacher] = {}
        for name, heads in self.sets.items():
            key = None if heads.draft_ids is None else id(heads.draft_ids)
            if key not in teachers:
                with torch.no_grad():
                    teachers[key] = Teacher.of(full, heads.draft_ids, self.recipe.remainder)
            teacher = teachers[key]
            for place, layer in enumerate(heads.exits):
                with torch.autocast(
                    self.decoder.device.type, torch.bfloat16, enabled=self.decoder.device.type == "cuda"
                ):
                    logits = heads.logits(layer, part[layer])
                loss = kl_to_teacher(logits, teacher).sum()
                (loss / total).backward()
                sums[name][0, place] += loss.detach()
                sums[name][1, place] += (logits.detach().argmax(-1) == teacher.best).sum()

    def _update(self) -> None:
        for heads in self.sets.values():
            for head in heads.heads.values():
                torch.nn.utils.clip_grad_norm_(head.parameters(), self.recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr_at(self.step_number)
        self.optimizer.step()
        self.step_number += 1

    def _plan_epoch(self, epoch: int) -> list[list[int]]:
        seed = self.recipe.seed * 1_000_003 + epoch
        return plan_batches(self.text.lens.tolist(), self.recipe.batch_tokens, seed)

    def _next_members(self) -> list[int]:
        if self._cursor == len(self._plan):
            self._epoch, self._cursor = self._epoch + 1, 0
            self._plan = self._plan_epoch(self._epoch)
        members = self._plan[self._cursor]
        self._cursor += 1
        return members

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Tensors and values from which `restore` goes on bit for bit."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.named_parameters():
            tensors[f"{name}:value"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{name}:{key}"] = value
        return tensors, {"step": self.step_number, "epoch": self._epoch, "cursor": self._cursor}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint of the same run.

        Raises:
            ValueError: its tensors are not those of these heads.
        """
        expected = {f"{name}:value": p for name, p in self.named_parameters()}
        found = {k: t for k, t in checkpoint.tensors.items() if k.endswith(":value")}
        wrong = sorted(k for k in set(expected) | set(found) if _shape(expected.get(k)) != _shape(found.get(k)))
        if wrong:
            raise ValueError(
                f"the checkpoint of step {checkpoint.step} does not fit these heads: {wrong[:4]}; "
                "continue with the settings it was made with, or choose another output folder"
            )
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                parameter.copy_(checkpoint.tensors[f"{name}:value"])
            prefix = f"{name}:"
            kept = {k.removeprefix(prefix): t for k, t in checkpoint.tensors.items() if k.startswith(prefix)}
            del kept["value"]
            self.optimizer.state[parameter] = {
                k: t.clone() if k == "step" else t.to(parameter.device, copy=True) for k, t in kept.items()
            }
        values = checkpoint.values
        self.step_number, self._epoch, self._cursor = values["step"], values["epoch"], values["cursor"]
        self._plan = self._plan_epoch(self._epoch)


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)
