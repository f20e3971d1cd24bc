"""The host's side of rounds on the device: what to launch next, and what became of it.

The host runs a round or two behind the device. The device ends sequences by itself at stop ids and at their budget;
what only the host can see (stop strings, a closed stream) it tells the device, and rounds that were in flight by then
are overshoot: their records are dropped. So the text is the one of the loop that waits for every round
(`engine/loop.py`), whose trees, acceptance and statistics these are.

Where neurons are skipped and masks are read again (`sparsity/target.py`), the position of the next reading is the end
that the device knows: it clips drafts there and stops. The host reads the text once no round is in flight, and the
sequence goes on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..heads.base import ExitHead
from ..heads.stateful import BlockHead, RecurrentHead
from ..kernels.draft_text import LONGEST
from ..kernels.grow_level import Levels
from ..kernels.grow_tree import Shape
from .device_draft import RecurrentDraft
from .gate import PLAIN, DraftPolicy, Lookup, Source
from .graphs import AHEAD, BY_HEADS, Kind, Moment, Record, Rounds, Start, Ticket, elapsed_ms
from .loop import (
    Machinery,
    Origin,
    Released,
    Request,
    begin,
    grow,
    is_out_of_memory,
    keep_pace,
    read_prompt,
    read_text,
    sources_of,
)
from .pacing import Pace
from .stopping import Emission
from .tree import FROM_TEXT, MAX_NODES, Acceptance, DraftTree
from .trunk_draft import TrunkDraft, speaks_on_device

MOST_WAITING = 16  # pairs that a drafting round's head takes in; more are taken in by rounds of their own
MOST_UNREAD = 40  # pairs that may wait while drafting is paused


def shape_of(policy: DraftPolicy, heads: Mapping[int, ExitHead], apart: bool = False) -> Shape | Levels | None:
    """How heads' trees grow on the device; None where the host has to grow them. `apart`: the layers before an exit
    are not verification's own while they draft.

    A recurrent head at exit 0 drafts best-first trees, and chains whose gate says extend or stop, by itself; adapters,
    linear and block heads behind layers of the trunk draft chains and trees, by either measure of their gates; block
    heads not apart, since their layers take the trunk's tiles. The text drafts with recurrent heads alone.
    """
    if policy.lookup is not None:
        shape = shape_of(replace(policy, lookup=None), heads, apart)
        return shape if isinstance(shape, Shape) and text_of(policy) is not None else None
    if not policy.exits or not policy.max_nodes or not policy.max_depth:
        return None
    gates = [policy.gates[e] for e in policy.exits]
    length = min(policy.max_depth, policy.max_nodes)
    branch = policy.most_children
    try:
        if all(speaks_on_device(heads.get(e)) for e in policy.exits):
            if apart and any(isinstance(heads[e], BlockHead) for e in policy.exits):
                return None
            most = min(policy.max_nodes, sum(branch**depth for depth in range(1, length + 1)))
            limits = tuple((gate.low, gate.high) for gate in gates)
            return Levels(policy.exits, limits, branch, length, most, policy.confidence == "path", apart)
        if branch > 1 and not policy.beam:
            return None
        if policy.exits != (0,) or not isinstance(heads.get(0), RecurrentHead) or policy.confidence != "entropy":
            return None
        size = 1, 1, length, length
        if policy.beam:
            size = policy.beam, policy.branch, policy.max_depth, policy.max_nodes
        return Shape(*size, stop=gates[0].high)
    except ValueError:  # larger than the device's pools
        return None


def text_of(policy: DraftPolicy) -> Lookup | None:
    """The chains from the text that can be drafted on the device; None: none, or the host drafts."""
    text = policy.lookup
    if text is None or text.branch > 1 or text.min_match > LONGEST or not policy.max_nodes:
        return None
    return replace(text, max_nodes=min(text.max_nodes, policy.max_nodes))


KIND_OF: dict[tuple[Source, ...], Kind] = {("heads",): "draft", ("text",): "text", ("text", "heads"): "both"}


def kinds_of(rounds: Rounds, policy: DraftPolicy) -> list[Kind]:
    """The rounds that decoding by a policy launches, of which sources may pause."""
    if not policy.drafts:
        return ["plain"]
    if rounds.draft is None and rounds.text is None:
        return ["plain", "given"]
    heads: list[Kind] = ["draft", "absorb"] if isinstance(rounds.draft, RecurrentDraft) else ["draft"]
    text: list[Kind] = ["text"] if rounds.draft is None else ["text", "both"]
    return ["plain", *(heads if rounds.draft is not None else []), *(text if rounds.text is not None else [])]


@dataclass
class _Queue:
    """Rounds in flight, and an upper bound of the pairs that wait for the head."""

    rounds: Rounds
    tickets: deque[Ticket]
    waiting: int = MOST_WAITING

    def launch(self, kind: Kind, depth: int | None = None) -> None:
        if isinstance(self.rounds.draft, RecurrentDraft):
            most = 1 if kind == "plain" else MAX_NODES  # that this round adds
            limit = MOST_WAITING if kind in BY_HEADS else MOST_UNREAD + 1 - most
            while self.waiting > limit:
                self.rounds.replay("absorb")
                self.waiting -= MOST_WAITING
            self.waiting = MOST_WAITING if kind in BY_HEADS else self.waiting + most
        self.tickets.append(self.rounds.launch(kind, depth))


def decode_on_device(
    on: Machinery, rounds: Rounds, requests: Sequence[Request], policy: DraftPolicy, pace: Pace | None
) -> Iterator[Released]:
    """As `loop.decode`, for requests whose options the device samples by (`graphs.samples_on_device`).

    Args:
        rounds: of this batch and cache, the policy's kinds prepared; `rounds.draft` drafts it, or the host does and
            gives trees.
    """
    by_host = policy.drafts and rounds.draft is None and rounds.text is None
    if on.sparse is not None:
        on = replace(on, keep=rounds.keep)
    read: list[tuple[Request, Moment, Moment]] = []
    for request in requests:  # nobody waits until the first round's end
        start = rounds.now()
        read_prompt(on, request)
        read.append((request, start, rounds.now()))
    with torch.inference_mode():
        rounds.begin([_start(on, request) for request in requests])
        if isinstance(rounds.draft, RecurrentDraft):
            texts = {request.sequence: request.history.token_ids for request in requests}
            rounds.draft.start(on.memories[0], texts, partial(rounds.replay, "absorb"))
        elif rounds.draft is not None:
            rounds.draft.start([request.sequence for request in requests])
    rounds.start_clock()
    queue = _Queue(rounds, deque())
    given: dict[int, _Given] = {}
    stopped: list[Request] = []  # whose texts are read again before they go on
    try:
        while active := [request for request in requests if not request.checker.finished]:
            with torch.inference_mode():
                room = max(request.checker.num_remaining for request in active)
                # a host that drafts, or feeds memories from a round's states, has to see each round's end first
                ahead = 1 if by_host else AHEAD
                if pace is not None:
                    pace.place(max(len(request.history) for request in active))
                while not stopped and len(queue.tickets) < min(ahead, room):
                    shape = PLAIN if room <= 1 else policy if pace is None else pace.next(policy)
                    try:
                        given = _launch(on, queue, active, shape, by_host)
                    except (RuntimeError, MemoryError) as error:
                        if not (by_host and shape.drafts and is_out_of_memory(error)):
                            raise
                        policy = replace(policy, max_nodes=policy.max_nodes // 2)
                        if policy.max_nodes == 0:
                            policy, by_host, on = PLAIN, False, replace(on, memories={})
                        for request in active:
                            request.statistics.record_fallback("out of memory")
                ticket = queue.tickets.popleft()
                records, elapsed = ticket.wait()
                for request, start, end in read:
                    request.statistics.prefill_ms += elapsed_ms(start, end)
                read.clear()
                released, num_tokens, trees = [], 0, []
                for request in active:
                    record = records[request.sequence]
                    request.statistics.decode_ms += elapsed
                    if record is None and request in stopped:
                        continue
                    if record is None:
                        released.append((request, _lose(request)))
                        continue
                    if by_host:
                        record = _feed(on, rounds, ticket.kind, request, record, given.get(request.sequence))
                    trees.append(record.tree)
                    if pace is not None and pace.ladder is not None and ticket.kind in BY_HEADS:
                        assert ticket.depth is not None
                        length = min(ticket.depth, policy.max_nodes, _end(on, request) - len(request.history) - 1)
                        if FROM_TEXT in record.tree.exit_layers:
                            pace.ladder.saw_text(length, len(record.tokens))
                        else:
                            pace.ladder.saw(length, len(record.nodes))
                    if ticket.kind == "draft" and isinstance(rounds.draft, TrunkDraft):
                        again = record.row_layers - rounds.draft.levels.reached * len(record.tree)
                        request.statistics.num_row_layers += again  # what verification did not go on from
                    released.append((request, _commit(on, request, record)))
                    num_tokens += len(record.tokens)
                    if request.checker.finished and record.status == 0:
                        rounds.drop(request.sequence)
                    if not request.checker.finished and record.status == 2:
                        stopped.append(request)
                if stopped and not queue.tickets:
                    for request in stopped:
                        read_text(on, request, None)
                        rounds.resume(request.sequence, _end(on, request))
                    stopped, queue.waiting = [], MOST_UNREAD
            if pace is not None and policy.drafts:
                asked: set[Source] = {"heads"} if ticket.kind == "draft" else set()
                if ticket.kind == "text":  # its rows cost something wherever it suggests nothing, too
                    asked = {"text"}
                elif ticket.kind == "both":
                    asked = sources_of(policy, trees)
                elif ticket.kind == "given":
                    asked = sources_of(shape, [own.tree for own in given.values()])
                keep_pace(pace, active, num_tokens / len(active), asked, elapsed)
            left = time.perf_counter()
            yield released
            # what the device waits for a host that drafts is decoding's time, for a slow reader of the output it is not
            if by_host or 1e3 * (time.perf_counter() - left) > elapsed:
                rounds.start_clock()
    finally:
        for request in requests:
            rounds.drop(request.sequence)


@dataclass(frozen=True)
class _Given:
    """A tree from the host, and how many nodes its gates refused."""

    tree: DraftTree
    num_refused: int


def _launch(
    on: Machinery, queue: _Queue, active: Sequence[Request], policy: DraftPolicy, by_host: bool
) -> dict[int, _Given]:
    """Start the next round; returns the trees that the host drafted for it, by sequence."""
    if policy.drafts and not by_host:
        queue.launch(KIND_OF[policy.sources], policy.max_depth)
        return {}
    works = [begin(on, request) for request in active] if policy.drafts else []
    refused = grow(on, active, works, policy) if works else []
    if not sources_of(policy, [work.tree for work in works]):  # the text suggests nothing, or nothing was asked
        queue.launch("plain")
        return {}
    queue.rounds.give({work.sequence: work.tree for work in works})
    queue.launch("given")
    for request, work in zip(active, works, strict=True):  # the round runs all layers of all nodes again
        request.statistics.num_row_layers += sum(work.reached)
    return {work.sequence: _Given(work.tree, count) for work, count in zip(works, refused, strict=True)}


def _feed(on: Machinery, rounds: Rounds, kind: Kind, request: Request, record: Record, given: _Given | None) -> Record:
    """Keep up the cache's lengths, and the memories of heads that the host asks; returns the record with what only the
    host knows of its own tree."""
    on.cache.lens[request.sequence] += len(record.nodes) + 1
    if on.memories:
        each = rounds.rows_each(kind)
        path = [0, *record.nodes]
        rows = torch.tensor([request.sequence * each + node for node in path], device=on.cache.device)
        states = {layer: states[rows] for layer, states in rounds.taps[each].items()}
        if 0 in on.kept_layers:  # the embeddings, which a round does not keep
            ids = torch.tensor([record.tree.tokens[node] for node in path], device=on.cache.device)
            states[0] = on.decoder.embed(ids)
        on.take(request.sequence, states)
    return record if given is None else replace(record, tree=given.tree, num_refused=given.num_refused)


def _start(on: Machinery, request: Request) -> Start:
    history = request.history
    return Start(request.sequence, history.token_ids, history.prompt_len, _end(on, request), request.sampler.params)


def _end(on: Machinery, request: Request) -> int:
    """The length at which the device stops: where the budget ends, or with as many tokens committed as its text is read
    again at (and one pending)."""
    end = len(request.history) + request.checker.num_remaining
    again = None if on.sparse is None else on.sparse.next_refresh(request.sequence)
    return end if again is None else min(end, again + 1)


def _commit(on: Machinery, request: Request, record: Record) -> list[Emission]:
    """Take a round's tokens into the output as far as it goes."""
    tree, tokens = record.tree, record.tokens
    failed = record.status == 3
    acceptance = Acceptance(record.nodes, tokens[:-1], tokens[-1])
    kept = tokens[:-1] if failed else tokens
    before = len(request.checker.token_ids)
    released = request.checker.push(kept)
    if failed and not request.checker.finished:  # a stop string before it is the host's to see
        position = len(request.history) + len(kept)
        request.error = (
            f"no token can be drawn at position {position}: the model's logits hold NaN or +inf, or every token is "
            "banned; check the weights, the dtype (float16 overflows where bfloat16 does not) and the options"
        )
        released += request.checker.finish("error")
    elif record.status != 0 and not request.checker.finished and not _stops_to_read(on, request, record):
        released += _lose(request)
    request.history.extend(kept)
    request.origins += [Origin(tree.exit_layers[node], tree.entropies[node], None) for node in record.nodes]
    if not failed:
        request.origins.append(Origin(None, None, None))
    request.statistics.num_row_layers += len(tree) * on.decoder.config.num_layers
    grown = len(request.checker.token_ids) - before
    request.statistics.record_round(tree, acceptance, grown, gate_stops=record.num_refused)
    return released


def _stops_to_read(on: Machinery, request: Request, record: Record) -> bool:
    """Whether a sequence stands, after this record, where its text is read again."""
    again = None if on.sparse is None else on.sparse.next_refresh(request.sequence)
    return record.status == 2 and request.committed_len + len(record.tokens) == again


def _lose(request: Request) -> list[Emission]:
    """End a request that the device has ended and the host has not: both read the same tokens, so one of them is wrong.
    The others of its batch go on."""
    request.error = (
        f"the device ended this sequence after {len(request.checker.token_ids)} new tokens, the host did not: its "
        "state was overwritten, or this is a bug; set engine.fused = None to decode without it"
    )
    return request.checker.finish("error")
