"""Training heads on a frozen base: one forward of the base a step feeds every exit of every set.

Heads are independent problems: each has its own loss, gradient and clipping, so that a head's weights do not depend
on which others train beside it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.model import Decoder
from ..heads import ExitHead, HeadSet, StatefulHead
from .checkpoint import Checkpoint
from .config import CHAIN_MOST, Recipe
from .data import SelfText, make_batch, plan_batches
from .distributed import ALONE, Ranks
from .fixed_shapes import Shape, StepGraphs, fixed_batch, plan_shapes
from .losses import Teacher, distill_and_choose
from .measure import training_projection
from .trunk import encode


@dataclass(frozen=True)
class StepResult:
    """What one step saw. Tensors stay on the device: reading them waits for it.

    Attributes:
        num_tokens: drafted positions that were trained on, of all processes.
        loss, agreement: set name -> `[exits]` fp32, means over those positions, exits ascending. Of a recurrent head
            the loss is the mean over its chain's steps, the agreement that of the first.
        reached: set name -> `[exits, chain]` fp32, share of positions with the first 1, 2, ... tokens of a chain from
            there right: cumulative acceptance. Stateless heads have their agreement in the first place and zeros.
    """

    num_tokens: int
    loss: dict[str, Tensor]
    agreement: dict[str, Tensor]
    reached: dict[str, Tensor]


class HeadTrainer:
    """Trains one or several head sets side by side.

    Args:
        decoder: the frozen base.
        sets: name -> head set; they may differ in exits, kinds and draft vocabulary.
        text: the training split.
        recipe: see `Recipe`.
        ranks: the processes that share each batch's texts; all must make the same calls.
        fixed: batches of few shapes (see `fixed_shapes`); None: on one GPU, where the recipe allows it.
    """

    def __init__(
        self,
        decoder: Decoder,
        sets: Mapping[str, HeadSet],
        text: SelfText,
        recipe: Recipe,
        ranks: Ranks = ALONE,
        fixed: bool | None = None,
    ) -> None:
        if not len(text):
            raise ValueError("the training split holds no texts: give more prompts or a smaller held-out share")
        self.decoder, self.sets, self.text, self.recipe, self.ranks = decoder, dict(sets), text, recipe, ranks
        projection = training_projection(decoder)
        for heads in self.sets.values():
            heads.attach(projection)
        parameters = [p for _, p in self.named_parameters()]
        on_gpu = decoder.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, betas=(0.9, 0.98), fused=on_gpu
        )
        self.step_number = 0
        # seconds: until the last checkpoint taken over, and when the first step after it began
        self._elapsed, self._since = 0.0, 0.0
        self._epoch, self._cursor = 0, 0
        if fixed is None:
            fixed = recipe.graphs and on_gpu and ranks.size == 1 and recipe.batch_tokens >= 64
        if fixed and ranks.size > 1:
            raise ValueError(f"batches of fixed shapes are for one process, this is one of {ranks.size}")
        self._graphs: StepGraphs | None = None
        if fixed:
            decoder.reserve_rotary(decoder.config.max_context + 16)
            self._graphs = StepGraphs(self._work, parameters)
        self._plan = self._plan_epoch(0)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, heads in self.sets.items():
            for layer, head in heads.heads.items():
                for parameter_name, parameter in head.named_parameters():
                    yield f"{name}.exit.{layer}.{parameter_name}", parameter

    @property
    def progress(self) -> float:
        """How much of the run is done, 0 to 1: by steps, or by the clock where that is further."""
        recipe = self.recipe
        done = self.step_number / recipe.steps
        return min(1.0, done if recipe.minutes is None else max(done, self.seconds / (60.0 * recipe.minutes)))

    def step(self) -> StepResult:
        """One optimiser step on the next batch."""
        if not self._since:
            self._since = time.monotonic()
        shape, members = self._next_members()
        if self._graphs is not None and shape is not None:
            batch = fixed_batch(self.text, members, shape)
            sums = self._graphs(shape, batch)
            self._update()
            self._graphs.stepped()
            return self._result(sums, int(batch.total))
        own = self.ranks.share(members)
        texts = make_batch(self.text, own or members[:1], self.decoder.device)
        rows = texts.drafted.reshape(-1).nonzero().squeeze(1)[: None if own else 0]
        total = self.ranks.total(len(rows))
        age = (texts.drafted.cumsum(1) - 1).reshape(-1)[rows]
        self.optimizer.zero_grad(set_to_none=True)
        sums = self._work(texts.ids, rows, age, total)
        self.ranks.add_gradients(parameter for _, parameter in self.named_parameters())
        self.ranks.add([sums])
        self._update()
        return self._result(sums, total)

    def _work(self, ids: Tensor, rows: Tensor, age: Tensor, total: int | Tensor) -> Tensor:
        """Add the gradients of some texts.

        Args:
            ids: long `[B, T]`.
            rows: long `[R]`, drafted positions as places in `[B * T]`.
            age: long `[R]`, drafted positions before each in its text; -1: it does not count.
            total: drafted positions of the whole batch.

        Returns:
            What each head's `_Run` counted, `[heads, 4, CHAIN_MOST]`, set after set.
        """
        decoder = self.decoder
        final = decoder.config.num_layers
        layers = {final} | {layer for heads in self.sets.values() for layer in heads.layers_read}
        with torch.no_grad():
            states = encode(decoder, ids, sorted(layers))
        last = states[final].flatten(0, 1)[rows]
        with self._autocast():
            runs = [
                _Run(name, head, _outputs(head, states, rows, self.recipe.chain), self.recipe.chunk_tokens)
                for name, heads in self.sets.items()
                for head in heads.heads.values()
            ]
        del states
        for first in range(0, len(rows), self.recipe.chunk_tokens):
            self._backward(runs, last[first : first + self.recipe.chunk_tokens], age, first, total)
        for run in runs:
            run.finish()
        return torch.stack([run.sums for run in runs])

    def read(self, text: SelfText) -> None:
        """Go on with other text, from the start of a new epoch."""
        self.text = text
        self._epoch, self._cursor = self._epoch + 1, 0
        self._plan = self._plan_epoch(self._epoch)

    def _backward(self, runs: list[_Run], last: Tensor, age: Tensor, first: int, total: int | Tensor) -> None:
        """Add one chunk's gradients; its logits die with it."""
        with torch.no_grad():
            full = self.decoder.lm_head(self.decoder.final_norm(last))
        own_age = age[first : first + len(last)]
        teachers: dict[int | None, Teacher] = {}
        for run in runs:
            draft_ids = self.sets[run.name].draft_ids
            key = None if draft_ids is None else id(draft_ids)
            if key not in teachers:
                with torch.no_grad():
                    teachers[key] = Teacher.of(full, draft_ids, self.recipe.remainder, self.recipe.sharpen)
            teacher = teachers[key]
            for step, leaf in run.chunk(first):
                with self._autocast():
                    logits = run.logits(leaf)
                valid = own_age >= step
                loss, best = distill_and_choose(logits, teacher, self.recipe.loss)
                right = (best == teacher.best) & valid
                reached = run.reach(step, first, right)
                weight = torch.where(reached, 1.0, self.recipe.unreached) * valid
                ((loss * weight).sum() / total / run.num_steps).backward()
                run.count(step, (loss.detach() * valid).sum(), valid.sum(), right.sum(), (reached & right).sum())

    def _result(self, counted: Tensor, num_rows: int) -> StepResult:
        loss: dict[str, Tensor] = {}
        agreement: dict[str, Tensor] = {}
        reached: dict[str, Tensor] = {}
        sizes = [len(heads.heads) for heads in self.sets.values()]
        for name, sums in zip(self.sets, counted.split(sizes), strict=True):  # [exits, 4, chain]
            count = sums[:, 1].clamp(min=1.0)
            loss[name] = sums[:, 0].sum(1) / count.where(sums[:, 1] > 0, 0.0).sum(1)
            agreement[name] = sums[:, 2, 0] / count[:, 0]
            reached[name] = sums[:, 3] / count
        return StepResult(num_rows, loss, agreement, reached)

    def _autocast(self) -> torch.autocast:
        device = self.decoder.device.type
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    def _update(self) -> None:
        for heads in self.sets.values():
            for head in heads.heads.values():
                torch.nn.utils.clip_grad_norm_(head.parameters(), self.recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr_at(self.step_number, self.progress)
        self.optimizer.step()
        self.step_number += 1

    @property
    def seconds(self) -> float:
        """Time spent training; where the clock may end the run, with what passed before its checkpoint."""
        return self._elapsed + (time.monotonic() - self._since if self._since else 0.0)

    def _plan_epoch(self, epoch: int) -> list[tuple[Shape | None, list[int]]]:
        seed = self.recipe.seed * 1_000_003 + epoch
        if self._graphs is not None:
            return [(shape, members) for shape, members in plan_shapes(self.text, self.recipe.batch_tokens, seed)]
        return [(None, members) for members in plan_batches(self.text.lens.tolist(), self.recipe.batch_tokens, seed)]

    def _next_members(self) -> tuple[Shape | None, list[int]]:
        if self._cursor == len(self._plan):
            self._epoch, self._cursor = self._epoch + 1, 0
            self._plan = self._plan_epoch(self._epoch)
        planned = self._plan[self._cursor]
        self._cursor += 1
        return planned

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Tensors and values from which `restore` goes on bit for bit."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.named_parameters():
            tensors[f"{name}:value"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{name}:{key}"] = value
        values = {"step": self.step_number, "epoch": self._epoch, "cursor": self._cursor}
        if self.recipe.minutes is not None:  # nothing else depends on the clock
            values["milliseconds"] = int(1e3 * self.seconds)
        return tensors, values

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
        on_gpu = self.decoder.device.type == "cuda"  # where the fused optimiser counts its steps too
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                parameter.copy_(checkpoint.tensors[f"{name}:value"])
            prefix = f"{name}:"
            kept = {k.removeprefix(prefix): t for k, t in checkpoint.tensors.items() if k.startswith(prefix)}
            del kept["value"]
            self.optimizer.state[parameter] = {
                k: t.clone() if k == "step" and not on_gpu else t.to(parameter.device, copy=True)
                for k, t in kept.items()
            }
        values = checkpoint.values
        self.step_number, self._epoch, self._cursor = values["step"], values["epoch"], values["cursor"]
        self._elapsed, self._since = values.get("milliseconds", 0) / 1e3, 0.0
        self._plan = self._plan_epoch(self._epoch)


class _Run:
    """One head's part of a step: its outputs at the drafted rows, cut into chunks whose gradients meet again.

    `outputs` are one tensor `[N, D]` a step of its chain (one for stateless heads, whose "output" is the hidden state
    that they read).
    """

    def __init__(self, name: str, head: ExitHead, outputs: list[Tensor], chunk_tokens: int) -> None:
        self.name, self.head, self.outputs = name, head, outputs
        self.num_steps, self.chunk_tokens = len(outputs), chunk_tokens
        self.sums = outputs[0].new_zeros(4, CHAIN_MOST)
        self._leaves = [[part.detach().requires_grad_(o.requires_grad) for part in o.split(chunk_tokens)]
                        for o in outputs]  # fmt: skip
        # reached[s] at a row: the chain that started s rows earlier was right in its first s tokens
        self._reached = torch.ones(self.num_steps, len(outputs[0]), dtype=torch.bool, device=outputs[0].device)

    def chunk(self, first: int) -> Iterator[tuple[int, Tensor]]:
        """Each step's leaf for the chunk that starts at row `first`."""
        for step, leaves in enumerate(self._leaves):
            yield step, leaves[first // self.chunk_tokens]

    def logits(self, leaf: Tensor) -> Tensor:
        return self.head.draft_logits(leaf) if isinstance(self.head, StatefulHead) else self.head(leaf)

    def reach(self, step: int, first: int, right: Tensor) -> Tensor:
        """Which of these rows a chain can reach at `step`; `right` opens the next row's next step."""
        last = first + len(right)
        own = self._reached[step, first:last]
        if step + 1 < self.num_steps:
            # never across texts: a text's first rows are too young for later steps
            following = self._reached[step + 1, first + 1 : last + 1]
            following &= (own & right)[: len(following)]
        return own

    def count(self, step: int, loss: Tensor, valid: Tensor, right: Tensor, reached: Tensor) -> None:
        self.sums[:, step] += torch.stack([loss, valid.float(), right.float(), reached.float()])

    def finish(self) -> None:
        """Carry the chunks' gradients back through the unrolled layers."""
        pairs = [
            (output, torch.cat([leaf.grad for leaf in leaves if leaf.grad is not None]))
            for output, leaves in zip(self.outputs, self._leaves, strict=True)
            if output.requires_grad and len(output)
        ]
        if pairs:
            torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])


def _outputs(head: ExitHead, states: Mapping[int, Tensor], rows: Tensor, chain: int) -> list[Tensor]:
    """What the head's logits are made from at the given rows of `[B * T]`, a tensor `[N, D]` for each step."""
    hidden = states[head.spec.exit_layer]
    if not isinstance(head, StatefulHead):
        return [hidden.flatten(0, 1)[rows]]
    taps = torch.stack([states[layer] for layer in head.taps], 2) if head.taps else None
    return [out.flatten(0, 1)[rows] for out in head.unroll(hidden, taps, chain)]


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)
