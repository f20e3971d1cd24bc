"""Early exit: the first confident head writes the token. Lossy: the text need not be the full model's.

At each position the exits are asked in turn (as in CALM, arXiv 2207.07061, by the entropy thresholds of DSSD, arXiv
2407.21082); the first whose entropy is below its threshold writes the token, and the layers beyond it are skipped.
Where no exit is sure the full model writes.

Later tokens attend to every earlier one in every layer, so skipped layers are only put off: a stretch of tokens that
skipped some is the chain below its first one, each node stands where it stopped, and `advance` takes those that wait
along when a later token needs their keys. So all keys and values are the ones that plain decoding would have made for
the same tokens. What is saved is not arithmetic but passes over the weights, one for many tokens in place of one each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from ..heads.head_set import HeadSet
from ..heads.stateful import StatefulHead
from .draft import entropy
from .forward import RowTiles, Working, advance, node_logits
from .gate import DraftPolicy, Gate
from .loop import Machinery, Origin, Released, Request, is_out_of_memory, read_prompts
from .sampling import Context, SamplingError, token_logprobs
from .stopping import Emission
from .tree import MAX_NODES, DraftTree

DEFAULT_ACCURACY = 0.95


def calibrated_exits(heads: HeadSet | None, accuracy: float, exits: Sequence[int] | None = None) -> DraftPolicy:
    """Exits with their thresholds for an accuracy level (0.60..0.99); those never sure at that level are left out.

    Args:
        exits: None asks all whose heads read the trunk alone.

    Raises:
        ValueError: no heads, no such heads, none calibrated, or an accuracy out of range.
    """
    if heads is None:
        raise ValueError("mode 'early_exit' needs exit heads, and this engine has none; load with heads=...")
    asked = [e for e in heads.exits if not isinstance(heads.heads[e], StatefulHead)]
    if not asked:
        raise ValueError(_no_trunk_heads(heads.exits))
    if exits is not None:
        asked = sorted(exits)
    if heads.calibration is None:
        raise ValueError(
            "mode 'early_exit' needs calibrated heads, and these are not; run `skipstone calibrate`, or give a policy"
        )
    lows = {e: heads.calibration.gate(e, accuracy)[0] for e in asked}
    policy = DraftPolicy(tuple(e for e in asked if lows[e] > 0), {e: Gate(low, low) for e, low in lows.items()})
    check_policy(heads, policy)
    return policy


def check_policy(heads: HeadSet | None, policy: DraftPolicy) -> None:
    """Whether a policy can be followed in this mode; its exits, the lower thresholds of its gates and `max_nodes` (how
    many tokens may wait) are.

    Raises:
        ValueError: exits without heads, or whose heads have a memory of their own; a lookup; gates by another measure.
    """
    if policy.lookup is not None:
        raise ValueError("mode 'early_exit' drafts nothing, so its policy takes no lookup")
    if policy.confidence != "entropy":
        raise ValueError(f"mode 'early_exit' has gates by entropy, and this policy's are by {policy.confidence!r}")
    known = {} if heads is None else heads.heads
    missing = sorted(set(policy.exits) - set(known))
    if missing:
        raise ValueError(f"no heads at exits {missing}; this engine has heads at {sorted(known)}")
    stateful = [e for e in policy.exits if isinstance(known[e], StatefulHead)]
    if stateful:
        raise ValueError(_no_trunk_heads(stateful))


def write(on: Machinery, requests: Sequence[Request], policy: DraftPolicy) -> Iterator[Released]:
    """Decode all requests to their ends, one token each a step; a request that fails ends alone, with `error` set.

    A request's tokens do not depend on the others'.

    Yields:
        After each step, what every active request released.

    Raises:
        MemoryError: a step does not fit.
    """
    read_prompts(on, requests)
    works: dict[int, Working] = {}
    while active := [request for request in requests if not request.checker.finished]:
        start = time.perf_counter()
        with torch.inference_mode():
            try:
                for request in active:
                    _begin(on, request, works)
                released = _step(on, active, [works[request.sequence] for request in active], policy)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise MemoryError(f"out of memory in an early-exit step; {on.cache.plan.arithmetic()}") from error
        elapsed = 1e3 * (time.perf_counter() - start)
        for request in active:
            request.statistics.decode_ms += elapsed
        yield released


def _begin(on: Machinery, request: Request, works: dict[int, Working]) -> None:
    """Make a request's pending token the last node of its chain; of a new chain where the last one was committed."""
    work = works.get(request.sequence)
    if work is None or on.cache.lens[request.sequence] > work.base:
        hidden = torch.zeros(MAX_NODES, on.decoder.config.hidden_size, device=on.decoder.device)
        work = Working(request.sequence, request.committed_len, DraftTree(request.pending), hidden)
        works[request.sequence] = work
        on.cache.clear_open(request.sequence)
    else:
        work.tree.add(len(work.tree) - 1, request.pending)
    work.embed_new(on.decoder)


def _step(on: Machinery, requests: Sequence[Request], works: Sequence[Working], policy: DraftPolicy) -> Released:
    """One token for every request."""
    before = [sum(work.reached) for work in works]
    found: dict[int, tuple[int, Origin]] = {}
    # Where as many tokens wait as may, the full model is asked at once.
    asked = [i for i, work in enumerate(works) if len(work.tree) <= policy.max_nodes]
    for exit_layer in policy.exits:
        if not asked:
            break
        rows, entropies = _ask(on, [works[i] for i in asked], exit_layer)
        for i, row, nats in zip(asked, rows, entropies, strict=True):
            if nats < policy.gates[exit_layer].low:
                with suppress(SamplingError):  # the processors left none of this head's tokens: deeper layers may
                    found[i] = _draw(requests[i], row, exit_layer, nats)
        asked = [i for i in asked if i not in found]
    rest = [i for i in range(len(works)) if i not in found]
    failed: dict[int, str] = {}
    if rest:
        _advance(on, [works[i] for i in rest], on.decoder.config.num_layers)
        rows = node_logits(on.decoder, _last_states([works[i] for i in rest]), on.tiles)
        for i, row in zip(rest, rows, strict=True):
            on.cache.commit(works[i].sequence, list(range(len(works[i].tree))))
            try:
                found[i] = _draw(requests[i], row)
            except SamplingError as error:
                failed[i] = str(error)
    released = []
    for i, (request, work) in enumerate(zip(requests, works, strict=True)):
        request.statistics.num_row_layers += sum(work.reached) - before[i]
        released.append((request, _fail(request, failed[i]) if i in failed else _take(request, *found[i])))
    return released


def _advance(on: Machinery, works: Sequence[Working], stop: int) -> None:
    advance(on.decoder, on.cache, [(work, range(len(work.tree))) for work in works], stop, on.tiles)


def _last_states(works: Sequence[Working]) -> Tensor:
    return torch.stack([work.hidden[len(work.tree) - 1] for work in works])


def _ask(on: Machinery, works: Sequence[Working], exit_layer: int) -> tuple[Tensor, list[float]]:
    """What a head says after the last node of each chain: logits `[n, V]` fp32, -inf for tokens outside its
    vocabulary, and their entropies in nats."""
    _advance(on, works, exit_layer)
    logits = in_equal_tiles(on.heads[exit_layer], _last_states(works), on.tiles).float()
    # Row by row: how a sum over many rows is split may depend on their number.
    entropies = torch.cat([entropy(row.unsqueeze(0)) for row in logits]).tolist()
    if on.draft_ids is not None:
        whole = logits.new_full((len(logits), on.decoder.config.vocab_size), -math.inf)
        logits = whole.index_copy_(1, on.draft_ids, logits)
    return logits, entropies


def in_equal_tiles(head: Callable[[Tensor], Tensor], hidden: Tensor, tiles: RowTiles) -> Tensor:
    """A head's logits `[n, Vd]` of rows `[n, D]`, at one shape, so that no row's bits depend on how many there are."""
    if not tiles.deterministic:
        return head(hidden)
    parts = []
    for rows in hidden.split(tiles.least):
        missing = tiles.least - len(rows)
        parts.append(head(torch.cat([rows, rows[-1:].expand(missing, -1)]) if missing else rows)[: len(rows)])
    return torch.cat(parts)


def _draw(
    request: Request, logits: Tensor, exit_layer: int | None = None, nats: float | None = None
) -> tuple[int, Origin]:
    """The sampler's token by these logits `[V]`, with its log-probabilities by them.

    Raises:
        SamplingError: there is none.
    """
    token, num_top = request.sampler.target(logits, Context(request.history)), request.sampler.params.logprobs
    logprobs = None if num_top is None else token_logprobs(logits, token, num_top)
    return token, Origin(exit_layer, nats, logprobs)


def _take(request: Request, token: int, origin: Origin) -> list[Emission]:
    """Take a token into the output as far as it goes; it is the pending one now."""
    before = len(request.checker.token_ids)
    released = request.checker.push([token])
    request.history.extend([token])
    request.origins.append(origin)
    request.statistics.record_step(origin.exit_layer, len(request.checker.token_ids) - before)
    return released


def _fail(request: Request, error: str) -> list[Emission]:
    request.error = error
    return request.checker.finish("error")


def _no_trunk_heads(exits: Sequence[int]) -> str:
    return (
        f"mode 'early_exit' needs heads that read the trunk alone (linear, adapter); those at exits {list(exits)} keep "
        "a memory of verified tokens, and here nothing is verified"
    )
