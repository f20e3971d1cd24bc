"""Batches of few shapes, and a training step of each shape as one CUDA graph.

A step is some thousand small launches, which takes the host longer than the arithmetic takes a GPU (measured: 150 ms
whatever the batch). A captured step is one launch, but its shapes cannot vary. So texts are grouped by length in steps
of 64; a batch of length T has batch_tokens // T rows and room for R drafted positions, R fitted to the texts of
that length. Places that stay empty are rows of age -1, which nothing counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import SelfText

FINE, COARSE, FINE_UP_TO = 64, 128, 512  # lengths of batches are multiples of these
ROWS_STEP = 256  # drafted positions of a batch are a multiple of it
ROOM = 1.04  # of a batch's drafted positions, over the mean: fewer batches are closed early for want of it
AHEAD = 2  # steps that the host may be ahead of the device


@dataclass(frozen=True)
class Shape:
    """Texts, their padded length, and drafted positions of a batch."""

    num_texts: int
    length: int
    num_rows: int


@dataclass(frozen=True)
class FixedBatch:
    """Tensors of a shape's sizes, on the CPU.

    Attributes:
        ids: long `[B, T]`, filled up with zeros.
        rows: long `[R]`, drafted positions as places in `[B * T]`; 0 where there is none.
        age: long `[R]`, drafted positions before it in its text; -1 where there is none.
        total: fp32 `[]`, how many there are.
    """

    ids: Tensor
    rows: Tensor
    age: Tensor
    total: Tensor


def padded_length(length: int) -> int:
    step = FINE if length <= FINE_UP_TO else COARSE
    return -(-length // step) * step


def plan_shapes(text: SelfText, batch_tokens: int, seed: int) -> list[tuple[Shape, list[int]]]:
    """One epoch: batches in random order, each with its texts.

    A length's last, half empty batch is left out where there are others: other texts are in it in each epoch.

    Raises:
        ValueError: a text does not fit a batch.
    """
    lens = text.lens
    drafted = (lens - text.prompt_lens).clamp(min=0)
    if len(text) == 0 or padded_length(int(lens.max())) > batch_tokens:
        longest = padded_length(int(lens.max())) if len(text) else 0
        raise ValueError(f"the longest of {len(text)} texts fills {longest} places, batch_tokens is {batch_tokens}")
    generator = torch.Generator().manual_seed(seed)
    by_length: dict[int, list[int]] = {}
    for index in torch.randperm(len(text), generator=generator).tolist():
        by_length.setdefault(padded_length(int(lens[index])), []).append(index)
    batches: list[tuple[Shape, list[int]]] = []
    for length in sorted(by_length):
        members, most = by_length[length], batch_tokens // length
        counts = drafted[members]
        wanted = max(float(counts.float().mean()) * most * ROOM, float(counts.max()))
        room = -(-int(wanted) // ROWS_STEP) * ROWS_STEP
        shape, found = Shape(most, length, room), []
        held: list[int] = []
        rows = 0
        for index, count in zip(members, counts.tolist(), strict=True):
            if len(held) == most or rows + count > room:
                found.append((shape, held))
                held, rows = [], 0
            held.append(index)
            rows += count
        if not found or 2 * len(held) > most:
            found.append((shape, held))
        batches += found
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def fixed_batch(text: SelfText, members: Sequence[int], shape: Shape) -> FixedBatch:
    """The texts side by side in a shape that holds them."""
    ids = torch.zeros(shape.num_texts, shape.length, dtype=torch.long)
    rows, ages = [], []
    for place, index in enumerate(members):
        own = text.text(index)
        ids[place, : len(own)] = own.long()
        first = int(text.prompt_lens[index]) - 1
        rows.append(torch.arange(place * shape.length + first, place * shape.length + len(own) - 1))
        ages.append(torch.arange(len(own) - 1 - first))
    found, count = torch.cat(rows), sum(map(len, rows))
    padded = torch.zeros(shape.num_rows, dtype=torch.long)
    age = torch.full((shape.num_rows,), -1, dtype=torch.long)
    padded[:count], age[:count] = found, torch.cat(ages)
    return FixedBatch(ids, padded, age, torch.tensor(float(count)))


class StepGraphs:
    """Runs `work` on batches of fixed shapes: on a GPU from one graph a shape, elsewhere directly.

    Args:
        work: `(ids, rows, age, total) -> sums`; adds to the gradients of `parameters`, which are set to zero before.
            It must ask the device for nothing.
        parameters: whose gradients keep their place in memory.
    """

    def __init__(
        self, work: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], parameters: Sequence[torch.nn.Parameter]
    ) -> None:
        self._work, self._parameters = work, list(parameters)
        self._device = self._parameters[0].device
        self._graphs: dict[Shape, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self._ends: deque[torch.cuda.Event] = deque()
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)
        if self._device.type == "cuda":
            self._stream, self._pool = torch.cuda.Stream(self._device), torch.cuda.graph_pool_handle()

    def __call__(self, shape: Shape, batch: FixedBatch) -> Tensor:
        """Gradients of one batch; returns what `work` counted."""
        given = [batch.ids, batch.rows, batch.age, batch.total]
        if self._device.type != "cuda":
            return self._run(given)
        self._wait()
        if shape not in self._graphs:
            self._capture(shape, given)
        graph, inputs, sums = self._graphs[shape]
        for place, value in zip(inputs, given, strict=True):
            place.copy_(value.pin_memory(), non_blocking=True)
        graph.replay()
        # the next graph may use the same memory
        return sums.clone()

    def stepped(self) -> None:
        """The optimiser's launches for the last batch are queued."""
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self._ends.append(event)

    def _wait(self) -> None:
        while len(self._ends) > AHEAD:
            self._ends.popleft().synchronize()

    def _run(self, given: Sequence[Tensor]) -> Tensor:
        torch._foreach_zero_([p.grad for p in self._parameters if p.grad is not None])
        return self._work(*given)

    def _capture(self, shape: Shape, given: Sequence[Tensor]) -> None:
        inputs = [value.to(self._device, copy=True) for value in given]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._run(inputs)  # compiles kernels and picks algorithms, which a capture cannot
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            sums = self._run(inputs)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._graphs[shape] = graph, inputs, sums
