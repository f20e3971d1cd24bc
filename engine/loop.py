"""The decoding loop: rounds of draft, verify, accept, commit, over a batch of requests.

Plain decoding is the same loop with trees that are only their root. A round is a handful of calls; what passes between
them is a tree, its logits and a committed block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..kernels.flash import FlashAttention
from ..kernels.kept import Kept
from .best_first import best_first
from .cache import KVCache
from .draft import DraftRow, Guesses, Head, draft
from .forward import RowTiles, Working, advance, index_of, node_logits, prefill
from .gate import PLAIN, DraftPolicy, Source
from .head_memory import HeadMemory
from .lookup import TextIndex, chain_from_text, draft_from_text, hang_beside
from .model import Decoder
from .pacing import Pace
from .prompt_reader import PromptReader
from .sampling import Context, History, SamplingError, TargetSampler, TokenLogprobs, token_logprobs
from .sparsity.target import SparseTarget
from .statistics import StatisticsRecorder
from .stopping import Emission, StopChecker
from .tree import FROM_TEXT, MAX_NODES, Acceptance, DraftTree, accept

Mode = Literal["lossless", "early_exit"]
NO_GAIN: Mapping[Source, str] = {"heads": "drafting does not pay", "text": "drafts from the text do not pay"}


@dataclass(frozen=True)
class Origin:
    """How one committed token came about. `exit_layer` and `entropy` are None where no head drafted it (a bonus token)
    or, in early-exit mode, wrote it."""

    exit_layer: int | None
    entropy: float | None
    logprobs: TokenLogprobs | None


@dataclass
class Request:
    """One sequence being decoded.

    The last token of `history` is pending: its keys and values are not in the cache yet.
    """

    sequence: int  # its place in the cache
    history: History
    sampler: TargetSampler
    checker: StopChecker
    statistics: StatisticsRecorder
    mode: Mode = "lossless"
    origins: list[Origin] = field(default_factory=list)  # one a committed new token
    error: str | None = None
    text: TextIndex | None = None  # of the history, once something was drafted from it

    @property
    def pending(self) -> int:
        return self.history.token_ids[-1]

    @property
    def committed_len(self) -> int:
        """Tokens with committed keys and values: all but the pending one."""
        return len(self.history) - 1


Observer = Callable[["Machinery", Sequence[Working], Sequence[Tensor]], None]


@dataclass(frozen=True)
class Machinery:
    """What rounds run on. `heads` maps exit layers to `hidden [N, D] -> logits [N, Vd]`; `draft_ids` long `[Vd]` or
    None. `observer` sees every verified round before it is committed: trees and each tree's logits `[nodes, V]`.
    `memories` are those of the stateful heads, by exit layer; they are kept up by every round, also by plain ones."""

    decoder: Decoder
    cache: KVCache
    tiles: RowTiles
    heads: Mapping[int, Head]
    draft_ids: Tensor | None
    observer: Observer | None = None
    memories: Mapping[int, HeadMemory] = field(default_factory=dict)
    flash: FlashAttention | None = None  # reads prompts; None: torch's attention
    sparse: SparseTarget | None = None  # gives each sequence its own MLPs; None: the model is the target
    reader: Decoder | None = None  # reads prompts; None: `decoder`, the target
    drafter: Decoder | None = None  # runs the layers before an exit, and verification runs them again; None: `decoder`
    prompts: PromptReader | None = None  # reads prompts by the step's own kernels, in place of `reader`
    # takes the neurons that a sequence keeps, by layer, where rounds run on the device; None: it gets MLPs of its own
    keep: Callable[[int, Kept], None] | None = None

    @property
    def kept_layers(self) -> list[int]:
        """Layers whose residual streams the memories read."""
        return sorted({layer for memory in self.memories.values() for layer in memory.layers})

    def take(self, sequence: int, states: Mapping[int, Tensor]) -> None:
        """Hand verified tokens' states, layer -> `[n, D]`, to every memory."""
        for memory in self.memories.values():
            memory.take(sequence, states)


@dataclass(frozen=True)
class Block:
    """What one round gave one request: the accepted path with the bonus, where each token came from, or why it
    ended."""

    tree: DraftTree
    acceptance: Acceptance
    origins: tuple[Origin, ...]
    num_refused: int
    error: str | None = None
    states: Mapping[int, Tensor] = field(default_factory=dict)  # kept layer -> [16, D], by node

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens to commit; the bonus is missing when no token could be drawn there."""
        return self.acceptance.tokens if self.error else self.acceptance.committed


Released = list[tuple[Request, list[Emission]]]


def decode(on: Machinery, requests: Sequence[Request], policy: DraftPolicy, pace: Pace | None) -> Iterator[Released]:
    """Decode all requests to their ends; a request that fails ends alone, with `error` set.

    Args:
        pace: decides round by round which drafts pay; None drafts always.

    Yields:
        After each round, what every active request released.

    Raises:
        MemoryError: not even a plain step fits.
    """
    read_prompts(on, requests)
    max_nodes = policy.max_nodes
    while active := [request for request in requests if not request.checker.finished]:
        start = time.perf_counter()
        with torch.inference_mode():
            for request in active:
                if on.sparse is not None and request.committed_len == on.sparse.next_refresh(request.sequence):
                    read_text(on, request, None)
        if pace is not None:
            pace.place(max(len(request.history) for request in active))
        shape = policy if pace is None else pace.next(policy)
        shape = replace(shape, max_nodes=max_nodes) if max_nodes else PLAIN
        try:
            with torch.inference_mode():
                blocks = play_round(on, active, shape)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if not shape.drafts:
                raise MemoryError(f"out of memory in a plain step; {on.cache.plan.arithmetic()}") from error
            max_nodes //= 2
            if max_nodes == 0:
                on = replace(on, memories={})
            for request in active:
                request.statistics.record_fallback("out of memory")
            continue
        longest = [min(shape.max_depth, shape.max_nodes, request.checker.num_remaining - 1) for request in active]
        with torch.inference_mode():
            released = [(r, _commit(on, r, block)) for r, block in zip(active, blocks, strict=True)]
        elapsed = 1e3 * (time.perf_counter() - start)
        for request in active:
            request.statistics.decode_ms += elapsed
        if pace is not None and policy.drafts:
            committed = sum(len(block.tokens) for block in blocks) / len(blocks)
            keep_pace(pace, active, committed, sources_of(shape, [block.tree for block in blocks]), elapsed)
            if pace.ladder is not None and shape.exits:
                for length, block in zip(longest, blocks, strict=True):
                    if FROM_TEXT not in block.tree.exit_layers:
                        pace.ladder.saw(length, len(block.acceptance.tokens))
        yield released


def read_prompts(on: Machinery, requests: Sequence[Request]) -> None:
    """Prefill every request, one after the other.

    Raises:
        MemoryError: a prompt does not fit.
    """
    for request in requests:
        start = time.perf_counter()
        read_prompt(on, request)
        _synchronise(on.decoder)
        request.statistics.prefill_ms += 1e3 * (time.perf_counter() - start)


def read_prompt(on: Machinery, request: Request) -> None:
    """Prefill a request; on a GPU it may still be running then.

    Raises:
        MemoryError: the prompt does not fit.
    """
    try:
        with torch.inference_mode():
            read_text(on, request, partial(on.take, request.sequence))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # another way through the prompt would give other keys, so there is none to fall back to
        count = request.committed_len
        raise MemoryError(f"out of memory over a prompt of {count} tokens; {on.cache.plan.arithmetic()}") from error


def read_text(on: Machinery, request: Request, take: Callable[[Mapping[int, Tensor]], None] | None) -> None:
    """Read a request's tokens, all but the pending one, through the whole model, and give the sequence the neurons that
    follow. A second reading starts where the first one ended: heads have these tokens, so they take nothing then."""
    sequence, ids = request.sequence, request.history.token_ids[:-1]
    layers = () if take is None else on.kept_layers
    watch = None if on.sparse is None else on.sparse.watch(sequence, again=take is None)
    first = 0 if watch is None else watch.num_rows
    if on.prompts is not None and on.prompts.takes(len(ids)):
        on.prompts.read(sequence, ids, layers, take, first, None if watch is None else watch.weights)
        if watch is not None:
            watch.num_rows = len(ids)
    else:
        prefill(on.reader or on.decoder, on.cache, sequence, ids, layers, take, on.flash, first, watch)
    if on.sparse is None or watch is None:
        return
    lists = on.sparse.finish(watch)
    if on.keep is not None:
        on.keep(sequence, lists)
    else:
        on.cache.mlps[sequence] = on.sparse.mlps(lists)


def play_round(on: Machinery, requests: Sequence[Request], policy: DraftPolicy) -> list[Block]:
    """Draft, verify and accept for every request. Nothing that is committed changes."""
    works = [begin(on, request) for request in requests]
    refused = [0] * len(works)
    if policy.drafts:
        refused = grow(on, requests, works, policy)
        if on.drafter is not None:  # another model's rows: verification must not go on from them (design rule 5)
            for request, work in zip(requests, works, strict=True):
                request.statistics.num_row_layers += sum(work.reached)
                work.start_over(on.decoder)
    logits = verify(on, works)
    if on.observer is not None:
        on.observer(on, works, logits)
    return [
        replace(accept_block(request, work.tree, own, count), states=work.kept)
        for request, work, own, count in zip(requests, works, logits, refused, strict=True)
    ]


def grow(on: Machinery, requests: Sequence[Request], works: Sequence[Working], policy: DraftPolicy) -> list[int]:
    """Draft every request's tree: from the text, and by heads where it suggests nothing, or the rest (`Lookup.beside`).
    Returns per request how many nodes every gate refused."""
    rows = [draft_row(request, work, on.draft_ids) for request, work in zip(requests, works, strict=True)]
    if on.sparse is not None:
        rows = [on.sparse.clip(row) for row in rows]
    chains: list[list[int]] = [[] for _ in rows]  # from the text, beside what heads draft
    if policy.lookup is not None:
        beside = policy.lookup.beside and bool(policy.exits)
        for i, (request, row) in enumerate(zip(requests, rows, strict=True)):
            if request.text is None:
                request.text = TextIndex(policy.lookup.min_match)
            request.text.follow(request.history.token_ids)
            if beside:
                chains[i] = chain_from_text(request.text, policy.lookup, row.max_depth, policy.max_nodes)
                rows[i] = replace(row, room=policy.most_together - len(chains[i]))
            else:
                draft_from_text(row.work.tree, request.text, policy.lookup, row.max_depth, policy.max_nodes)
                row.work.embed_new(on.decoder)
        rows = [row if len(row.work.tree) == 1 else replace(row, max_depth=0) for row in rows]
    if not policy.exits:
        return [0] * len(rows)
    if policy.beam:
        refused = best_first(on.decoder, rows, on.memories[0], policy, on.draft_ids)
    else:
        refused = draft(
            on.drafter or on.decoder, on.cache, rows, on.heads, policy, on.tiles, on.memories, on.draft_ids
        )  # fmt: skip
    for row, chain in zip(rows, chains, strict=True):
        if chain:
            hang_beside(row.work.tree, chain)
            row.work.embed_new(on.decoder)
    return refused


def verify(on: Machinery, works: Sequence[Working]) -> list[Tensor]:
    """Take every node through all layers; the logits `[nodes, V]` of each sequence."""
    todo = [(work, range(len(work.tree))) for work in works]
    advance(on.decoder, on.cache, todo, on.decoder.config.num_layers, on.tiles)
    hidden = torch.cat([work.hidden[: len(work.tree)] for work in works])
    logits = node_logits(on.decoder, hidden, on.tiles)
    return list(logits.split([len(work.tree) for work in works]))


def accept_block(request: Request, tree: DraftTree, logits: Tensor, num_refused: int = 0) -> Block:
    """Follow the target's own tokens down the tree.

    A target is computed only where plain decoding would compute it: at the root and at accepted nodes. If none can be
    drawn there, what was accepted before stands and the request ends.
    """
    errors: list[str] = []

    def target(node: int) -> int:
        try:
            return request.sampler.target(logits[node], Context(request.history, tuple(tree.path_tokens(node))))
        except SamplingError as error:
            errors.append(str(error))
            return TargetSampler.FAILED

    acceptance = accept(tree, target)
    num_top = request.sampler.params.logprobs
    origins = []
    parents = (0, *acceptance.nodes)
    for parent, node, token in zip(parents, (*acceptance.nodes, None), acceptance.committed, strict=True):
        if token == TargetSampler.FAILED:
            break
        logprobs = None if num_top is None else token_logprobs(logits[parent], token, num_top)
        drafted = (None, None) if node is None else (tree.exit_layers[node], tree.entropies[node])
        origins.append(Origin(*drafted, logprobs))
    return Block(tree, acceptance, tuple(origins), num_refused, errors[0] if errors else None)


def begin(on: Machinery, request: Request) -> Working:
    """One sequence's round: a tree that is only its root."""
    hidden = torch.zeros(MAX_NODES, on.decoder.config.hidden_size, device=on.decoder.device)
    kept = {layer: torch.zeros_like(hidden) for layer in on.kept_layers}
    work = Working(request.sequence, request.committed_len, DraftTree(request.pending), hidden, kept=kept)
    work.embed_new(on.decoder)
    on.cache.clear_open(request.sequence)
    return work


def draft_row(request: Request, work: Working, draft_ids: Tensor | None) -> DraftRow:
    """What drafting needs to know of a request."""

    def rank(guesses: Guesses, at: int, path: tuple[int, ...], count: int) -> list[tuple[int, float]]:
        context = Context(request.history, path)
        if request.sampler.is_plain(context):
            return guesses.best[at][:count]
        return request.sampler.candidates(guesses.logits[at], context, draft_ids, count)

    # A round ends in a bonus token, so one draft less than the remaining budget can be used.
    return DraftRow(work, max(0, request.checker.num_remaining - 1), rank)


def _commit(on: Machinery, request: Request, block: Block) -> list[Emission]:
    """Move accepted keys and values into place, hand their states to the heads' memories and take the tokens into the
    output as far as it goes."""
    before = len(request.checker.token_ids)
    released = request.checker.push(block.tokens)
    if block.error is not None and not request.checker.finished:  # what stopped before did not fail
        request.error = block.error
        released += request.checker.finish("error")
    path = [0, *block.acceptance.nodes]
    on.cache.commit(request.sequence, path)
    if on.memories:
        rows = index_of(path, on.decoder.device)
        on.take(request.sequence, {layer: states[rows] for layer, states in block.states.items()})
    request.history.extend(block.tokens)
    request.origins += block.origins
    request.statistics.num_row_layers += len(block.tree) * on.decoder.config.num_layers
    request.statistics.record_round(
        block.tree, block.acceptance, len(request.checker.token_ids) - before, gate_stops=block.num_refused
    )
    return released


def sources_of(policy: DraftPolicy, trees: Sequence[DraftTree]) -> set[Source]:
    """Who was asked for these trees: heads where the text gave nothing, or drafts beside them."""
    from_text = [FROM_TEXT in tree.exit_layers for tree in trees]
    asked: set[Source] = {"text"} if any(from_text) else set()
    both = policy.lookup is not None and policy.lookup.beside
    return asked | {"heads"} if policy.exits and (both or not all(from_text)) else asked


def keep_pace(
    pace: Pace, requests: Sequence[Request], committed: float, sources: Collection[Source], elapsed: float
) -> None:
    """Account for a round of `elapsed` ms that gave each request `committed` tokens on average."""
    before = pace.paused
    pace.round(elapsed, committed, sources)
    for source in pace.paused - before:
        for request in requests:
            request.statistics.record_fallback(NO_GAIN[source])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device or the host has no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _synchronise(decoder: Decoder) -> None:
    if decoder.device.type == "cuda":
        torch.cuda.synchronize(decoder.device)
