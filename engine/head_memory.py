"""What a stateful head remembers of the sequences it drafts for: the caller's side of `heads/stateful.py`.

The head has one true entry per verified token, made from the full model's states there. Those come from prefill and
from every verification, plain ones too (`take`), and wait until the head next speaks: then it takes them in together
with the round's root, in one pass. Drafted nodes get scratch slots behind the root, which the next round overwrites.

Slots fill up one after another, so every slot below the last one was written by this very request: what an earlier
one left is never read (design rule 4). Nothing here is read by verification (rule 10).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..heads.stateful import Entries, StatefulHead
from .forward import Working, index_of
from .gate import DraftPolicy
from .tree import MAX_NODES

WAITING = 256  # verified tokens that wait at most, before the head takes them in although nobody asked it


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes of a head's memory, known before a byte is allocated.

    `context` is tokens a sequence may hold, `scratch` the draft entries of one round, its root's included.
    """

    head: StatefulHead
    batch: int
    context: int
    scratch: int
    slot_bytes: int

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers after which the head reads a verified token's residual stream."""
        return tuple(sorted({self.head.spec.exit_layer, *self.head.taps}))

    @property
    def num_bytes(self) -> int:
        slots = (self.context + self.scratch) * self.slot_bytes
        states = (1 + WAITING) * len(self.layers) + self.scratch
        return self.batch * (slots + 4 * self.head.hidden_size * states)

    def holds(self, other: MemoryPlan) -> bool:
        """Whether a memory of this size serves where the other one is asked for."""
        return replace(self, scratch=other.scratch) == other and self.scratch >= other.scratch

    def arithmetic(self) -> str:
        """The size in words and factors, for reports and errors."""
        return (
            f"{self.batch} sequences x ({self.context + self.scratch} slots x {self.slot_bytes:,} bytes + "
            f"({1 + WAITING} x {len(self.layers)} + {self.scratch}) states x {self.head.hidden_size} x 4 bytes) = "
            f"{self.num_bytes / 2**20:.1f} MiB"
        )


def plan_memory(head: StatefulHead, batch: int, context: int, scratch: int, device: torch.device) -> MemoryPlan:
    """Size the memory of one head for `batch` sequences of `context` tokens and `scratch` draft entries each."""
    one = head.new_state(1, 1, device)
    slot_bytes = (one.k.numel() + one.v.numel()) * one.k.element_size()
    return MemoryPlan(head, batch, context, scratch, slot_bytes)


def scratch_of(policy: DraftPolicy) -> int:
    """Entries of one round at most, the root's included."""
    return max(MAX_NODES, 1 + policy.beam * (policy.max_depth - 1))


@dataclass
class Paths:
    """The entries of one sequence in one round, by place: the order in which they were made, the root's first.

    Place i stands at slot base + i; the entries that it sees are those on its own path, `paths[i]`, root first.
    """

    sequence: int
    base: int  # position of the root
    paths: list[list[int]] = field(default_factory=list)

    def depth(self, place: int) -> int:
        return len(self.paths[place]) - 1


Level = Sequence[tuple[Paths, Sequence[int]]]


class HeadMemory:
    """One stateful head's cache, and the verified states that it has not taken in yet, for all sequences of a batch."""

    def __init__(self, plan: MemoryPlan, device: torch.device) -> None:
        self.plan, self.head, self.layers = plan, plan.head, plan.layers
        self.cache = self.head.new_state(plan.batch, plan.context + plan.scratch, device)
        width = self.head.hidden_size
        # Of each sequence: the states of the last token taken in, and of those that wait, after each layer.
        self._all = torch.zeros(plan.batch, 1 + WAITING, len(self.layers), width, device=device)
        self._states = {layer: self._all[:, :, i] for i, layer in enumerate(self.layers)}
        self._out = torch.zeros(plan.batch, plan.scratch, width, device=device)  # the round's entries, by place
        self._lengths, self._waiting, self._made = [0] * plan.batch, [0] * plan.batch, [0] * plan.batch
        self._rounds: list[_Round | None] = [None] * plan.batch

    def restart(self, sequence: int) -> None:
        """Forget a sequence."""
        self._lengths[sequence] = self._waiting[sequence] = self._made[sequence] = 0
        self._rounds[sequence] = None
        self._all[sequence, 0].zero_()

    def length(self, sequence: int) -> int:
        """Verified tokens that the head knows of, taken in or waiting."""
        return self._lengths[sequence] + self._waiting[sequence]

    def take(self, sequence: int, states: Mapping[int, Tensor]) -> None:
        """Keep the full model's states of the next verified tokens.

        Args:
            states: layer -> `[n, D]` fp32, for all of `layers`.
        """
        count = len(states[self.layers[0]])
        if self._waiting[sequence] + count > WAITING:
            self.take_in(sequence)
        if count > WAITING:  # of a prompt: at once
            before = ((layer, own[sequence, :1]) for layer, own in self._states.items())
            self.take_in(sequence, {layer: torch.cat([last, states[layer]]) for layer, last in before})
            return
        at = 1 + self._waiting[sequence]
        for layer in self.layers:
            self._states[layer][sequence, at : at + count] = states[layer]
        self._waiting[sequence] += count

    def hand_over(self, sequence: int) -> tuple[int, Tensor]:
        """For a caller that makes the entries by itself from here on, and says `taken_over` once it has read this.

        Returns:
            How many tokens have entries, and `[1 + n, layers, D]` fp32: the states of the last of them (zeros before
            any), then of those that wait, after each of `layers`.
        """
        return self._lengths[sequence], self._all[sequence, : 1 + self._waiting[sequence]]

    def taken_over(self, sequence: int) -> None:
        """The tokens that waited have entries."""
        count = self._waiting[sequence]
        if count:
            self._all[sequence, 0] = self._all[sequence, count]
        self._waiting[sequence] = 0
        self._lengths[sequence] += count
        self._made[sequence] = self._lengths[sequence]

    def open(self, works: Sequence[Working]) -> list[Paths]:
        """Make the entries of what waits and of each sequence's root, in one pass."""
        exit_layer = self.head.spec.exit_layer
        hidden, contexts, entries = [], [], []
        for work in works:
            if self.length(work.sequence) != work.base:
                raise RuntimeError(
                    f"sequence {work.sequence} has {work.base} verified tokens, its head was given "
                    f"{self.length(work.sequence)}: every verification must be followed by take()"
                )
            true, context = self._true_rows(work.sequence, self._waiting_states(work.sequence))
            hidden += [true, work.kept[exit_layer][:1]]
            contexts.append(context)
            slots = range(work.base - len(true), work.base + 1)
            entries.append(Entries(work.sequence, slots, slots))
        out = self.head.extend(torch.cat(hidden), torch.cat(contexts) if self.head.taps else None, entries, self.cache)
        last = -1
        for work, made in zip(works, entries, strict=True):
            last += len(made.slots)
            self._out[work.sequence, 0] = out[last]
            self._settle(work.sequence, self._waiting_states(work.sequence))
            self._made[work.sequence] = self._lengths[work.sequence] + 1
        return [Paths(work.sequence, work.base, [[0]]) for work in works]

    def grow(self, level: Level, hidden: Tensor) -> None:
        """Make draft entries, at the next places of each sequence.

        Args:
            level: of each sequence the parents' places, one a new entry.
            hidden: the new entries' residual streams at the head's exit `[N, D]` fp32, in the same order.
        """
        context = self.outputs(level) if self.head.taps else None
        firsts = [len(own.paths) for own, _ in level]
        entries = [_grow(own, parents, hidden.device) for own, parents in level]
        out = self.head.extend(hidden, context, entries, self.cache)
        rows = out.split([len(parents) for _, parents in level])
        for (own, _), first, made in zip(level, firsts, rows, strict=True):
            self._out[own.sequence, first : first + len(made)] = made

    def outputs(self, level: Level) -> Tensor:
        """Outputs `[N, D]` of the entries at these places."""
        parts = [self._out[own.sequence, index_of(places, self._out.device)] for own, places in level]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def speak(self, asked: Sequence[tuple[Working, Sequence[int]]]) -> Tensor:
        """Draft logits `[N, num_outputs]` of tree nodes, sequence by sequence, each after its own path.

        Every node asked, and its ancestors, must have kept its state at the head's exit (`Working.kept`).
        """
        closed = [work for work, _ in asked if not self._is_open(work)]
        for work, paths in zip(closed, self.open(closed) if closed else [], strict=True):
            self._rounds[work.sequence] = _Round(work, paths, {0: 0})
        rounds = [own for work, _ in asked if (own := self._rounds[work.sequence]) is not None]
        wanted = [nodes for _, nodes in asked]
        while missing := [(own, new) for own, nodes in zip(rounds, wanted, strict=True) if (new := own.missing(nodes))]:
            exit_layer = self.head.spec.exit_layer
            hidden = torch.cat([own.work.kept[exit_layer][index_of(nodes, self._out.device)] for own, nodes in missing])
            self.grow([(own.paths, own.add(nodes)) for own, nodes in missing], hidden)
        places = [(own.paths, [own.place[node] for node in nodes]) for own, nodes in zip(rounds, wanted, strict=True)]
        return self.head.draft_logits(self.outputs(places))

    def _is_open(self, work: Working) -> bool:
        own = self._rounds[work.sequence]
        return own is not None and own.work is work

    def _waiting_states(self, sequence: int) -> dict[int, Tensor]:
        """Layer -> `[1 + n, D]`: of the last token taken in, and of those that wait."""
        return {layer: own[sequence, : 1 + self._waiting[sequence]] for layer, own in self._states.items()}

    def _true_rows(self, sequence: int, states: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Of `states` as `_waiting_states` gives them: those at the exit `[n, D]` of the tokens without an entry, and
        `[n + 1, D]` contexts: theirs and the next token's."""
        own, first = states[self.head.spec.exit_layer], self._lengths[sequence]
        # the last round's root has its entry already; a root that is asked again after a failed round gets it anew
        done = min(self._made[sequence] - first, len(own) - 1)
        hidden = own[1 + done :]
        if not self.head.taps:
            return hidden, hidden[:0]
        context = self.head.context(torch.stack([states[layer][done:] for layer in self.head.taps], 1))
        if first + done == 0:
            context[0] = 0.0
        return hidden, context

    def take_in(self, sequence: int, states: Mapping[int, Tensor] | None = None) -> None:
        """Make the entries of all tokens that wait, or of those with these states while none waits.

        Args:
            states: layer -> `[1 + n, D]` fp32: of the last token taken in, and of those without an entry.
        """
        states = self._waiting_states(sequence) if states is None else states
        hidden, context = self._true_rows(sequence, states)
        self._settle(sequence, states)
        last = self._made[sequence] = self._lengths[sequence]
        slots = range(last - len(hidden), last)
        if len(hidden):
            entries = [Entries(sequence, slots, slots)]
            self.head.extend(hidden, context[:-1] if self.head.taps else None, entries, self.cache, outputs=False)

    def _settle(self, sequence: int, states: Mapping[int, Tensor]) -> None:
        """These are taken in and none waits; the last state stays, as context of the token after it."""
        count = len(states[self.layers[0]]) - 1
        self._waiting[sequence] = 0
        self._lengths[sequence] += count
        if count:
            for layer, own in self._states.items():
                own[sequence, 0] = states[layer][count]


@dataclass
class _Round:
    """The entries of a tree's nodes; a node that another exit answered may have none."""

    work: Working
    paths: Paths
    place: dict[int, int]

    def missing(self, nodes: Sequence[int]) -> list[int]:
        """Nodes on the paths to `nodes` that have no entry although their parents have one."""
        parents, found = self.work.tree.parents, set()
        for node in nodes:
            while node not in self.place:
                if parents[node] in self.place:
                    found.add(node)
                    break
                node = parents[node]
        return sorted(found)

    def add(self, nodes: Sequence[int]) -> list[int]:
        """Give nodes the next places. Returns their parents'."""
        parents = [self.place[self.work.tree.parents[node]] for node in nodes]
        for node in nodes:
            self.place[node] = len(self.place)
        return parents


def _grow(own: Paths, parents: Sequence[int], device: torch.device) -> Entries:
    """The next places of a sequence, below these parents."""
    first = len(own.paths)
    for parent in parents:
        own.paths.append([*own.paths[parent], len(own.paths)])
    new = range(first, len(own.paths))
    slots, positions = [own.base + place for place in new], [own.base + own.depth(place) for place in new]
    if len(own.paths[-1]) == len(own.paths):  # a chain: each sees all slots before it
        return Entries(own.sequence, slots, positions)
    visible = torch.zeros(len(parents), own.base + len(own.paths), dtype=torch.bool)
    visible[:, : own.base] = True
    for row, place in zip(visible, new, strict=True):
        row[[own.base + seen for seen in own.paths[place]]] = True
    return Entries(own.sequence, slots, positions, visible.to(device))
