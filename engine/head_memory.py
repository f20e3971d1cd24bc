"""What a stateful head remembers of the sequences it drafts for: the caller's side of `heads/stateful.py`.

The head has one true entry per verified token, made from the full model's states there. Those come from prefill and
from every verification, plain ones too (`take`), and wait until the head next speaks: then it takes them in together
with the round's root, in one pass. Drafted nodes get scratch slots behind the root, which the next round overwrites.

Slots fill up one after another, so every slot below the last one was written by this very request: what an earlier
one left is never read (design rule 4). Nothing here is read by verification (rule 10).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..heads.stateful import Entries, StatefulHead
from .forward import Working
from .gate import DraftPolicy
from .tree import MAX_NODES

WAITING = 128  # verified tokens that wait at most, before the head takes them in although nobody asked it


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes of a head's memory, known before a byte is allocated."""

    batch: int
    context: int
    scratch: int
    slot_bytes: int
    state_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.batch * ((self.context + self.scratch) * self.slot_bytes + (1 + WAITING) * self.state_bytes)

    def arithmetic(self) -> str:
        """The size in words and factors, for reports and errors."""
        return (
            f"{self.batch} sequences x ({self.context + self.scratch} slots x {self.slot_bytes:,} bytes + "
            f"{1 + WAITING} waiting states x {self.state_bytes:,} bytes)"
        )


def plan_memory(head: StatefulHead, batch: int, context: int, scratch: int, device: torch.device) -> MemoryPlan:
    """Size the memory of one head for `batch` sequences of `context` tokens and `scratch` draft entries each."""
    one = head.new_state(1, 1, device)
    slot_bytes = (one.k.numel() + one.v.numel()) * one.k.element_size()
    return MemoryPlan(batch, context, scratch, slot_bytes, 4 * len(layers_of(head)) * head.hidden_size)


def layers_of(head: StatefulHead) -> tuple[int, ...]:
    """Layers after which the head reads a verified token's residual stream."""
    return tuple(sorted({head.spec.exit_layer, *head.taps}))


def scratch_of(policy: DraftPolicy) -> int:
    """Entries of one round at most, the root's included."""
    return MAX_NODES


@dataclass
class _Round:
    """The draft entries of one sequence in one round, in the order they were made."""

    work: Working
    place: dict[int, int] = field(default_factory=dict)  # node -> its place among them; the root is the first
    sees: list[list[int]] = field(default_factory=list)  # of each entry, the places on its path


class HeadMemory:
    """One stateful head's cache, and the verified states that it has not taken in yet, for all sequences of a batch."""

    def __init__(self, head: StatefulHead, plan: MemoryPlan, device: torch.device) -> None:
        self.head, self.plan = head, plan
        self.layers = layers_of(head)
        self.cache = head.new_state(plan.batch, plan.context + plan.scratch, device)
        width = head.hidden_size
        # By layer, of each sequence: the state of the last token taken in, and of those that wait.
        self._states = {layer: torch.zeros(plan.batch, 1 + WAITING, width, device=device) for layer in self.layers}
        self._out = torch.zeros(plan.batch, plan.scratch, width, device=device)  # the round's entries
        self._lengths, self._waiting, self._made = [0] * plan.batch, [0] * plan.batch, [0] * plan.batch
        self._rounds: list[_Round | None] = [None] * plan.batch

    def restart(self, sequence: int) -> None:
        """Forget a sequence."""
        self._lengths[sequence] = self._waiting[sequence] = self._made[sequence] = 0
        self._rounds[sequence] = None
        for states in self._states.values():
            states[sequence, 0].zero_()

    def length(self, sequence: int) -> int:
        """Verified tokens that the head knows of, taken in or waiting."""
        return self._lengths[sequence] + self._waiting[sequence]

    def take(self, sequence: int, states: Mapping[int, Tensor]) -> None:
        """Keep the full model's states of the next verified tokens.

        Args:
            states: layer -> `[n, D]` fp32, for all of `layers`.
        """
        num_rows = len(states[self.layers[0]])
        for first in range(0, num_rows, WAITING):
            count = min(WAITING, num_rows - first)
            if self._waiting[sequence] + count > WAITING:
                self._take_in(sequence)
            at = 1 + self._waiting[sequence]
            for layer in self.layers:
                self._states[layer][sequence, at : at + count] = states[layer][first : first + count]
            self._waiting[sequence] += count

    def speak(self, asked: Sequence[tuple[Working, Sequence[int]]]) -> Tensor:
        """Draft logits `[N, num_outputs]` of nodes, sequence by sequence, each node after its own path.

        Every node asked, and its ancestors, must have kept its state at the head's exit (`Working.kept`).
        """
        rounds = [self._round(work) for work, _ in asked]
        while missing := [
            (own, nodes)
            for own, (work, wanted) in zip(rounds, asked, strict=True)
            if (nodes := _next_missing(own, wanted))
        ]:
            self._extend(missing)
        sequences = [work.sequence for work, nodes in asked for _ in nodes]
        places = [own.place[node] for own, (_, nodes) in zip(rounds, asked, strict=True) for node in nodes]
        return self.head.draft_logits(self._out[sequences, places])

    def _round(self, work: Working) -> _Round:
        own = self._rounds[work.sequence]
        if own is None or own.work is not work:
            if self.length(work.sequence) != work.base:
                raise RuntimeError(
                    f"sequence {work.sequence} has {work.base} verified tokens, its head was given "
                    f"{self.length(work.sequence)}: every verification must be followed by take()"
                )
            own = self._rounds[work.sequence] = _Round(work)
        return own

    def _extend(self, level: Sequence[tuple[_Round, list[int]]]) -> None:
        """Make the entries of nodes whose parents have theirs."""
        exit_layer = self.head.spec.exit_layer
        hidden, contexts, entries, starts = [], [], [], []
        for own, nodes in level:
            work, sequence = own.work, own.work.sequence
            if nodes == [0]:
                true, context = self._true_rows(sequence)
                hidden += [true, work.kept[exit_layer][:1]]
                slots = range(work.base - len(true), work.base + 1)
                entries.append(Entries(sequence, slots, slots))
                own.place[0], own.sees = 0, [[0]]
            else:
                hidden.append(work.kept[exit_layer][nodes])
                parents = [own.place[work.tree.parents[node]] for node in nodes]
                context = self._out[sequence, parents]
                for node, parent in zip(nodes, parents, strict=True):
                    own.place[node] = len(own.sees)
                    own.sees.append([*own.sees[parent], len(own.sees)])
                entries.append(_entries(own, nodes))
            contexts.append(context)
            starts.append(len(entries[-1].slots) - len(nodes))
        context = torch.cat(contexts) if self.head.taps else None
        out = self.head.extend(torch.cat(hidden), context, entries, self.cache)
        at = 0
        for (own, nodes), start, made in zip(level, starts, entries, strict=True):
            sequence, first = own.work.sequence, own.place[nodes[0]]
            self._out[sequence, first : first + len(nodes)] = out[at + start : at + len(made.slots)]
            at += len(made.slots)
            if nodes == [0]:
                self._settle(sequence)
                self._made[sequence] = self._lengths[sequence] + 1

    def _true_rows(self, sequence: int) -> tuple[Tensor, Tensor]:
        """States at the exit `[n, D]` of the waiting tokens without an entry, and `[n + 1, D]` contexts: theirs and the
        next token's."""
        first, count = self._lengths[sequence], self._waiting[sequence]
        # the last round's root has its entry already; a root that is asked again after a failed round gets it anew
        done = min(self._made[sequence] - first, count)
        hidden = self._states[self.head.spec.exit_layer][sequence, 1 + done : 1 + count]
        if not self.head.taps:
            return hidden, hidden[:0]
        taps = torch.stack([self._states[layer][sequence, done : 1 + count] for layer in self.head.taps], 1)
        context = self.head.context(taps)
        if first + done == 0:
            context[0] = 0.0
        return hidden, context

    def _take_in(self, sequence: int) -> None:
        """Make the entries of all tokens that wait."""
        hidden, context = self._true_rows(sequence)
        last = self._lengths[sequence] + self._waiting[sequence]
        slots = range(last - len(hidden), last)
        if len(hidden):
            entries = [Entries(sequence, slots, slots)]
            self.head.extend(hidden, context[:-1] if self.head.taps else None, entries, self.cache)
        self._settle(sequence)
        self._made[sequence] = last

    def _settle(self, sequence: int) -> None:
        count, self._waiting[sequence] = self._waiting[sequence], 0
        self._lengths[sequence] += count
        if count:
            for states in self._states.values():
                states[sequence, 0] = states[sequence, count]


def _next_missing(own: _Round, nodes: Sequence[int]) -> list[int]:
    """Nodes on the paths to `nodes` that have no entry although their parents have one."""
    tree, found = own.work.tree, set()
    for node in nodes:
        while node not in own.place:
            if node == 0 or tree.parents[node] in own.place:
                found.add(node)
                break
            node = tree.parents[node]
    return sorted(found)


def _entries(own: _Round, nodes: Sequence[int]) -> Entries:
    base, depths = own.work.base, own.work.tree.depths
    places = [own.place[node] for node in nodes]
    positions = [base + depths[node] for node in nodes]
    if len(own.sees[-1]) == len(own.sees):  # a chain sees all slots before it
        return Entries(own.work.sequence, [base + place for place in places], positions)
    visible = torch.zeros(len(nodes), base + len(own.sees), dtype=torch.bool)
    visible[:, :base] = True
    for row, place in zip(visible, places, strict=True):
        row[[base + seen for seen in own.sees[place]]] = True
    device = own.work.hidden.device
    return Entries(own.work.sequence, [base + place for place in places], positions, visible.to(device))
