"""Rounds on the device: draft, verify, accept and commit as one CUDA graph, replayed without waiting for the host.

All state of a batch lies at fixed addresses: trees, lengths, seeds, options. A round ends by writing a record of what
it did; the host reads records from pinned memory a round or two behind (`engine/device_loop.py`). Plain decoding is
the round whose trees are only their roots, through the same kernels at width 1, so both have the same bits. Only where
a gate may end the trees of trunk exits are a round's drafts graphs of their own, a step each (`trunk_draft.py`).

On the CPU (Triton's interpreter, in tests) the same calls run one after the other without a graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..kernels.accept import RECORD, accept
from ..kernels.commit import commit
from ..kernels.draw import Penalties, count_tokens, pick, process_and_draw
from ..kernels.embed_rows import lay_rows
from ..kernels.grow_tree import Sequences, Trees
from ..kernels.kept import Kept
from ..kernels.lm_head import lm_head, num_tiles
from ..kernels.publish import publish
from .cache import KVCache
from .device_draft import RecurrentDraft
from .device_state import fill, upload
from .fused import FusedStep, FusedWeights
from .gate import Lookup
from .sampling import SamplingParams
from .sparsity.teal_step import ChannelWeights, TealStep
from .text_draft import TextDraft
from .tree import FROM_TEXT, MAX_NODES, DraftTree
from .trunk_draft import TrunkDraft

# who drafts: nobody, heads, the text, the text and heads where it suggests nothing, the host; "absorb" drafts nothing
Kind = Literal["plain", "draft", "text", "both", "given", "absorb"]
Moment = Any  # an event on a GPU, else ms of the CPU's clock
BY_HEADS = ("draft", "both")
AHEAD = 2  # rounds in flight at most
NUM_STOPS = 16  # stop ids at most


def elapsed_ms(start: Moment, end: Moment) -> float:
    """Between two moments that are past."""
    return float(end - start if isinstance(end, float) else start.elapsed_time(end))


def samples_on_device(params: SamplingParams) -> bool:
    """Whether the kernels draw for these options; a caller's own processor, log-probabilities and bad words of several
    tokens need the host at every token."""
    single = all(len(word) == 1 for word in params.bad_words)
    return params.logits_processor is None and params.logprobs is None and single and len(params.stop_ids) <= NUM_STOPS


def needs_processing(params: SamplingParams) -> bool:
    """Whether anything but the temperature stands between logits and the draw."""
    filters = params.temperature > 0 and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)
    masked = params.min_new_tokens > 0 and len(params.stop_ids) > 0
    return filters or masked or params.has_processors


def has_dependent_launch(device: torch.device) -> bool:
    """Whether kernels may start before the one in front has ended (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@dataclass(frozen=True)
class Start:
    """Where one sequence stands when decoding begins: token ids so far, the last of them pending, its options."""

    sequence: int
    token_ids: Sequence[int]
    prompt_len: int
    end: int  # length at which it ends at the latest
    params: SamplingParams


@dataclass(frozen=True)
class Record:
    """What one round did to one sequence."""

    status: int  # 0 goes on, 1 a stop id is among the tokens, 2 its end is reached, 3 no token could be drawn
    tokens: tuple[int, ...]  # accepted ones, then the target's own
    nodes: tuple[int, ...]  # accepted nodes below the root
    tree: DraftTree
    num_refused: int = 0  # nodes that the gate refused
    row_layers: int = 0  # layers of rows that drafting ran, of exits of the trunk

    @classmethod
    def read(
        cls,
        values: Sequence[int],
        entropies: Sequence[float],
        exit_layers: Sequence[int],
        num_refused: int = 0,
        row_layers: int = 0,
    ) -> Record | None:
        """From a row of `kernels/accept.py` and the exit layer of each node; None for a sequence that took no part."""
        accepted = values[0]
        if accepted < 0:
            return None
        if FROM_TEXT in exit_layers[: values[2]]:
            num_refused = 0
        tree = DraftTree(values[36])
        for node in range(1, values[2]):
            exit_layer = exit_layers[node]
            entropy = None if exit_layer == FROM_TEXT else entropies[node]
            tree.add(values[52 + node], values[36 + node], exit_layer=exit_layer, entropy=entropy)
        tokens, nodes = tuple(values[4 : 5 + accepted]), tuple(values[21 : 21 + accepted])
        return cls(values[1], tokens, nodes, tree, num_refused, row_layers)


class Ticket:
    """A round that was launched. `wait` gives its records."""

    def __init__(self, rounds: Rounds, kind: Kind, depth: int | None, slot: int, since: Moment) -> None:
        self._rounds, self.kind, self.depth, self._slot, self._since = rounds, kind, depth, slot, since
        self.end = rounds.now()

    def wait(self) -> tuple[list[Record | None], float]:
        """Records by sequence, and the milliseconds since the round before ended, or since `start_clock` if that was
        later."""
        if not isinstance(self.end, float):
            self.end.synchronize()
        elapsed = elapsed_ms(self._since, self.end)
        numbers, exits, *counts = self._rounds.read(self._slot)
        refused, row_layers = (own.tolist() if self.kind in BY_HEADS else [0] * len(own) for own in counts)
        if self.kind == "draft" and self._rounds.text is not None:
            exits = torch.zeros_like(exits)  # what the text left there
        entropies = numbers[:, 68 : 68 + MAX_NODES].view(torch.float32).tolist()
        rows = zip(numbers.tolist(), entropies, exits.tolist(), refused, row_layers, strict=True)
        return [Record.read(*row) for row in rows], elapsed


def captured(body: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph | None:
    """A body without effect, as a CUDA graph; None on a CPU, where it has to be called."""
    if device.type != "cuda":
        return None
    # Compiles what is not compiled yet. On the caller's own stream: once a process has run kernels on a few streams,
    # every kernel of every graph starts 0.3 us later (docs/kernels.md).
    body()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph


class Rounds:
    """Rounds of one batch shape.

    Args:
        weights: of the model.
        cache: the KV cache.
        batch: B, sequences 0..B-1 of the cache.
        processed: whether options other than the temperature are applied (`needs_processing`).
        width: rows a sequence has in a round that drafts: 2, 4, 8 or 16. Where weights are stored by neuron every round
            has 16: a tile has one list of neurons, so its rows are of one sequence.
        taps: layers whose residual streams are kept for heads that read them.
        draft: makes the heads' part that drafts on the device, of these rounds' state; None where none does.
        text: chains that the text drafts on the device. With neither, trees that the host gives are verified.
        reach: tokens that a sequence may hold in these rounds; None: as many as the cache. Attention launches programs
            for all of it, so short requests run in rounds of a short reach.
        pdl: programmatic dependent launch; None where the GPU has it.
    """

    def __init__(
        self,
        weights: FusedWeights,
        cache: KVCache,
        batch: int,
        *,
        processed: bool = False,
        width: int = MAX_NODES,
        taps: Sequence[int] = (),
        draft: Callable[[Rounds], RecurrentDraft | TrunkDraft] | None = None,
        text: Lookup | None = None,
        reach: int | None = None,
        pdl: bool | None = None,
    ) -> None:
        self.weights, self.cache = weights, cache
        self.width = MAX_NODES if weights.by_neuron else width
        self.reach = cache.plan.context if reach is None else reach
        device, config = cache.device, weights.config
        on_gpu = device.type == "cuda"
        self.pdl = has_dependent_launch(device) if pdl is None else pdl
        self.batch, self.processed = batch, processed
        self.trees = Trees.empty(batch, device)

        def whole(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.sequences = Sequences(whole(batch), whole(batch), whole(batch))
        self.min_end, self.seeds = whole(batch), whole(batch, dtype=torch.int64)
        self.stop_ids, self.options = whole(NUM_STOPS).fill_(-1), torch.zeros(8, device=device)
        self.top_k = whole(1)
        # all that the host reads, side by side
        self._report = whole(batch * (RECORD + MAX_NODES + 2))
        self.record, self.exits, self.num_refused, self.row_layers = self._parts_of(self._report)
        self.path_nodes, self.num_path = whole(batch, MAX_NODES), whole(batch)
        vocab = config.vocab_size
        self.penalties = Penalties.empty(batch, vocab, device) if processed else None
        self.taps: dict[int, dict[int, Tensor]] = {}  # rows a sequence -> layer -> [R, D]
        self.steps: dict[int, FusedStep] = {}
        self._targets: dict[int, Tensor] = {}
        self._outputs: dict[int, tuple[Tensor, ...]] = {}
        head = weights.head.weight
        for rows_each in {self.rows_each("plain"), self.width}:
            rows = -(-batch * rows_each // 16) * 16
            if isinstance(weights, ChannelWeights):
                step: FusedStep = TealStep(weights, cache, batch * rows_each, reach=self.reach, pdl=self.pdl)
            else:
                step = FusedStep(weights, cache, rows, reach=self.reach, pdl=self.pdl)
            self.steps[rows_each] = step
            self.taps[rows_each] = {layer: torch.zeros(rows, config.hidden_size, device=device) for layer in taps}
            self._targets[rows_each] = whole(rows)
            if processed:
                self._outputs[rows_each] = (torch.zeros(rows, vocab, device=device),)
            else:
                tiles = num_tiles(vocab, head.dtype)
                self._outputs[rows_each] = torch.zeros(rows, tiles, device=device), whole(rows, tiles)
        self.text: TextDraft | None = None
        if text is not None:
            self.text = TextDraft(text, batch, self.reach, self.trees, self.exits, self.sequences, self.pdl)
        self.draft = None if draft is None else draft(self)
        if isinstance(self.draft, RecurrentDraft):
            self.draft.pool = replace(self.draft.pool, num_refused=self.num_refused)
        self._graphs: dict[Kind, torch.cuda.CUDAGraph | None] = {}  # None: kernel by kernel, on the CPU
        self._shorter: dict[tuple[Kind, int], torch.cuda.CUDAGraph | None] = {}  # with heads' trees of fewer levels
        self._steps: list[torch.cuda.CUDAGraph | None] = []  # of drafts that end early, in front of "draft"
        # a slot is read before it is written again
        self._ring = torch.zeros(AHEAD + 2, len(self._report), dtype=torch.int32, pin_memory=on_gpu)
        self._slot, self._next_slot = 0, whole(1)  # the host's count and the device's
        self._since = self.now()

    def rows_each(self, kind: Kind) -> int:
        """Rows that a sequence has in such a round."""
        return 1 if kind == "plain" and not self.weights.by_neuron else self.width

    def keep(self, sequence: int, lists: Kept) -> None:
        """Set the neurons that a sequence uses from the next round on, by layer."""
        neurons = self.steps[self.width].kept
        assert neurons is not None, "these weights are not stored by neuron"
        neurons.copy(sequence, lists)

    def prepare(self, kinds: Sequence[Kind], depths: Collection[int] = ()) -> None:
        """Capture rounds, of a recurrent head's drafts also such with trees of these depths; before `begin`, because a
        captured round must find no sequence active."""
        missing = [kind for kind in kinds if kind not in self._graphs]
        shorter: list[tuple[Kind, int]] = []
        if isinstance(self.draft, RecurrentDraft):
            some = [depth for depth in depths if depth < self.draft.shape.max_depth]
            shorter = [(kind, depth) for kind in kinds if kind in BY_HEADS for depth in some]
            shorter = [key for key in shorter if key not in self._shorter]
        if not missing and not shorter:
            return
        self.sequences.active.zero_()
        self.trees.count.zero_()
        if "draft" in missing and isinstance(self.draft, TrunkDraft) and self.draft.levels.gated:
            for depth in range(self.draft.levels.num_steps):
                self._steps.append(captured(partial(self.draft.step, depth), self.cache.device))
        for kind in missing:
            self._graphs[kind] = self._capture(kind)
        for kind, depth in shorter:
            self._shorter[kind, depth] = self._capture(kind, depth)

    def begin(self, starts: Sequence[Start]) -> None:
        """Take over sequences whose prompts are in the cache; all others are idle.

        Raises:
            ValueError: a sequence that may grow beyond these rounds' reach.
        """
        if (longest := max(start.end for start in starts)) > self.reach:
            raise ValueError(f"a sequence may grow to {longest} tokens, these rounds reach {self.reach}")
        count = self.batch
        active, base, end, min_end, pending = ([0] * count for _ in range(5))
        seeds = [0] * count
        for start in starts:
            b = start.sequence
            active[b], base[b], end[b] = 1, len(start.token_ids) - 1, start.end
            min_end[b] = start.prompt_len + start.params.min_new_tokens
            pending[b] = start.token_ids[-1]
            seeds[b] = start.params.seed if start.params.seed < 2**63 else start.params.seed - 2**64
        for target, values in (
            (self.sequences.active, active), (self.sequences.base, base), (self.sequences.end, end),
            (self.min_end, min_end), (self.seeds, seeds), (self.trees.tokens[:, 0], pending),
            (self.trees.count, active), (self._next_slot, [self._slot]),
        ):  # fmt: skip
            upload(target, torch.tensor(values, dtype=target.dtype))
        for zeroed in (self.trees.depths, self.trees.paths, self.trees.parents[:, 1:]):
            zeroed.zero_()
        self.trees.parents[:, 0] = -1
        params = starts[0].params
        stops = list(params.stop_ids) + [-1] * (NUM_STOPS - len(params.stop_ids))
        upload(self.stop_ids, torch.tensor(stops, dtype=torch.int32))
        upload(
            self.options,
            torch.tensor(
                [
                    params.temperature,
                    params.top_p,
                    params.min_p,
                    params.repetition_penalty,
                    params.presence_penalty,
                    params.frequency_penalty,
                    0.0,
                    0.0,
                ]
            ),
        )
        if self.text is not None:
            self.text.start({start.sequence: start.token_ids for start in starts})
        self.top_k.fill_(min(params.top_k, self.weights.config.vocab_size))
        if self.penalties is not None:
            bias = dict(params.logit_bias)
            bias |= {word[0]: float("-inf") for word in params.bad_words}
            self.penalties.start([(s.sequence, list(s.token_ids), s.prompt_len) for s in starts], bias)

    def now(self) -> Moment:
        """When the device gets here."""
        if self.cache.device.type != "cuda":
            return 1e3 * time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start_clock(self) -> None:
        """The next round's time counts from here."""
        self._since = self.now()

    def launch(self, kind: Kind, depth: int | None = None) -> Ticket:
        """Start a round, with trees of at most `depth` levels (`prepare`; None: the shape's). At most `AHEAD` may be
        unread, or their records are overwritten."""
        self.replay(kind, depth)  # where it fails, the device has not moved on either
        slot, self._slot = self._slot, (self._slot + 1) % len(self._ring)
        ticket = Ticket(self, kind, depth, slot, self._since)
        self._since = ticket.end
        return ticket

    def read(self, slot: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Records `[B, 96]`, exit layers of nodes `[B, 16]`, refused nodes `[B]` and layers of rows that drafting ran
        `[B]` of a round that has ended."""
        return self._parts_of(self._ring[slot])

    def _parts_of(self, report: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch = self.batch
        records, exits, refused, row_layers = report.split([batch * RECORD, batch * MAX_NODES, batch, batch])
        return records.view(batch, RECORD), exits.view(batch, MAX_NODES), refused, row_layers

    def replay(self, kind: Kind, depth: int | None = None) -> None:
        """Enqueue a round that `prepare` has made. Of one that verifies, the report goes to the ring's next slot."""
        if kind == "draft" and self._steps:
            self._draft_step_by_step()
        if depth is not None and (kind, depth) not in self._shorter:
            depth = None
        graph = None
        if self.cache.device.type == "cuda":
            graph = self._graphs[kind] if depth is None else self._shorter[kind, depth]
        if graph is None:
            self._body(kind, depth)
        else:
            graph.replay()

    def _draft_step_by_step(self) -> None:
        assert isinstance(self.draft, TrunkDraft)
        for depth, graph in enumerate(self._steps):
            if depth and not self.draft.goes_on():
                return
            if graph is None:
                self.draft.step(depth)
            else:
                graph.replay()

    def give(self, trees: Mapping[int, DraftTree]) -> None:
        """The trees that a "given" round verifies, by sequence; others stay out."""
        fill(self.trees, trees)

    def resume(self, sequence: int, end: int) -> None:
        """Go on with a sequence that stands at its end, up to another one."""
        self.sequences.end[sequence : sequence + 1].fill_(end)
        self.sequences.active[sequence : sequence + 1].fill_(1)
        self.trees.count[sequence : sequence + 1].fill_(1)

    def drop(self, sequence: int) -> None:
        """End a sequence on the device, after the rounds in flight."""
        self.sequences.active[sequence : sequence + 1].zero_()
        self.trees.count[sequence : sequence + 1].zero_()

    def _capture(self, kind: Kind, depth: int | None = None) -> torch.cuda.CUDAGraph | None:
        return captured(partial(self._body, kind, depth), self.cache.device)

    def _body(self, kind: Kind, depth: int | None = None) -> None:
        if kind == "draft" and isinstance(self.draft, TrunkDraft):
            if not self._steps:
                self.draft.draft()
            self._verify(self.width, self.draft.levels.reached)
            return
        heads = 0
        if kind == "absorb" or kind in BY_HEADS:
            assert isinstance(self.draft, RecurrentDraft)
            self.draft.absorb()
            if kind == "absorb":
                return
            self.draft.draft(depth)
            heads = self.draft.shape.max_nodes
        if kind in ("text", "both"):
            assert self.text is not None
            self.text.draft(heads)
        self._verify(self.rows_each(kind))

    def _verify(self, rows_each: int, reached: int = 0) -> None:
        """Every node through all layers that it has not `reached` while it was drafted, the target's token after each,
        the accepted path into place."""
        step, weights, trees, seq, pdl = self.steps[rows_each], self.weights, self.trees, self.sequences, self.pdl
        config, taps, targets = weights.config, self.taps[rows_each], self._targets[rows_each]
        lay_rows(
            trees.tokens, trees.depths, trees.paths, trees.count, seq.base, step.rows, step.ids, rows_each, pdl=pdl
        )
        if reached:
            assert isinstance(self.draft, TrunkDraft)
            step.stats = self.draft.stats
        else:
            step.embed()
        step.run(reached, config.num_layers, taps, just_laid=reached > 0)
        head = weights.head
        project = partial(
            lm_head, step.x, step.stats, head.weight, head.bias, head.shift, step.rows,
            eps=config.norm_eps, softcap=config.logit_softcap, pdl=pdl,
        )  # fmt: skip
        if self.penalties is None:
            best_value, best_id = self._outputs[rows_each]
            project(options=self.options, seeds=self.seeds, best_value=best_value, best_id=best_id)
            pick(best_value, best_id, step.rows, targets, pdl=pdl)
        else:
            (logits,) = self._outputs[rows_each]
            project(logits=logits)
            process_and_draw(
                logits, step.rows, self.penalties, trees.tokens, self.options, self.top_k, self.seeds, self.stop_ids,
                self.min_end, targets, pdl=pdl,
            )  # fmt: skip
        accept(
            targets, trees, seq, self.min_end, self.stop_ids, self.record, self.path_nodes, self.num_path, rows_each,
            pdl=pdl,
        )  # fmt: skip
        commit(self.cache.k, self.cache.v, self.record, self.path_nodes, self.num_path, pdl=pdl)
        if self.penalties is not None:
            count_tokens(self.record, self.penalties, pdl=pdl)
        if isinstance(self.draft, RecurrentDraft):
            self.draft.keep(taps, self.record, self.path_nodes, self.num_path, rows_each)
        elif self.draft is not None:
            self.draft.keep(step.rows, taps, self.record, self.path_nodes, self.num_path, reached)
        if self.text is not None:
            self.text.keep(self.record)
        publish(self._report, self._ring, self._next_slot, pdl=pdl)
