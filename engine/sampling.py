"""Which token the target emits at one place: a pure function of a logits row, the row's own path and its position.

A token is `argmax(log p + g)` in fp32, ties to the lowest id, with `p` the processed distribution and `g` the noise of
`kernels/noise.py` for (seed, absolute position), 0 when greedy. Nothing else enters: not the draft's length, not the
row's place in the tree, not its neighbours. `p` is never normalised, because a constant does not move an argmax.

Every row is processed alone, as a [V] tensor: PyTorch splits reductions and sorts by the whole tensor's shape, so the
same row may get other bits in a [w, V] call than in a [1, V] one. Only comparisons (the greedy argmax) run on all rows
at once.

Order of the processors, as in transformers:
 1. logit bias (added)
 2. repetition penalty, over prompt and generated tokens: logits below 0 times it, others divided by it
 3. presence and frequency penalty, over generated tokens only (as OpenAI and vLLM define them; transformers has none)
 4. bad words: the last token of a listed sequence is banned when the ones before it end the prefix
 5. stop ids banned while fewer than `min_new_tokens` new tokens stand on the row's path
 6. the caller's logits processor
and, unless greedy (temperature 0),
 7. temperature
 8. top-k: everything below the k-th largest logit goes; ties with it stay
 9. top-p: in order of falling probability, equal ones by rising id, a token stays if the mass strictly before it is
    below top_p; the mass is summed in fp64
10. min-p: a token stays if its probability is at least min_p times the largest

"Generated" is everything after the prompt, including the drafted tokens on the row's own path (hazards 10 and 11).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels.noise import gumbel_noise, gumbel_noise_at
from .tree import DraftTree

LogitsProcessor = Callable[[list[int], Tensor], Tensor]
"""(prompt and generated token ids up to this node, its logits [V] fp32) -> logits [V]. Must depend on these alone."""

ARGMAX_BLOCK = 1024
NOISE_ROWS_KEPT = 32  # two rounds' positions
# Below this share of the vocabulary, noise for the kept ids alone is cheaper than a full row.
FEW_IDS_SHARE = 8


class SamplingError(ArithmeticError):
    """No token can be drawn from a row. Ends the one request; `position` is where its token would have stood."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position


class NonFiniteLogits(SamplingError):
    """The model's logits hold NaN or +inf, or are -inf everywhere."""


class NoTokenLeft(SamplingError):
    """The processors banned every token, or a caller's processor returned NaN or +inf."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn and when the output ends; validated on construction.

    Args:
        temperature: 0 is greedy; the top-k, top-p and min-p filters apply only above 0.
        top_k: 0 is off.
        top_p: in (0, 1]; 1 is off.
        min_p: in [0, 1]; 0 is off.
        repetition_penalty: above 0; 1 is off.
        presence_penalty: subtracted once from each generated token's logit.
        frequency_penalty: subtracted as often as the token was generated.
        logit_bias: token id -> added logit, finite or -inf.
        bad_words: token id sequences that are never completed.
        min_new_tokens: stop ids are banned before.
        max_new_tokens: budget of new tokens.
        stop_ids: token ids that end the output.
        stop: strings that end the output and are not part of it.
        logprobs: None for none, n for the chosen token's and the n most likely ones'.
        seed: of the noise, in [0, 2**64).
        logits_processor: see `LogitsProcessor`; called for one node at a time with that node's own prefix.

    Raises:
        ValueError: a value out of range, with the value.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: Sequence[Sequence[int]] = ()
    min_new_tokens: int = 0
    max_new_tokens: int = 128
    stop_ids: Collection[int] = ()
    stop: Sequence[str] = ()
    logprobs: int | None = None
    seed: int = 0
    logits_processor: LogitsProcessor | None = None

    def __post_init__(self) -> None:
        _require(_finite(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "at least 0")
        _require(_whole(self.top_k), "top_k", self.top_k, "a whole number of at least 0 (0 is off)")
        _require(_finite(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (1 is off)")
        _require(_finite(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "0 to 1 (0 is off)")
        positive = _finite(self.repetition_penalty) and self.repetition_penalty > 0
        _require(positive, "repetition_penalty", self.repetition_penalty, "above 0 (1 is off)")
        _require(_finite(self.presence_penalty), "presence_penalty", self.presence_penalty, "a finite number")
        _require(_finite(self.frequency_penalty), "frequency_penalty", self.frequency_penalty, "a finite number")
        _require(isinstance(self.logit_bias, Mapping), "logit_bias", self.logit_bias, "a mapping of token id to bias")
        for token_id, bias in self.logit_bias.items():
            allowed = _whole(token_id) and (_finite(bias) or bias == -math.inf)
            _require(allowed, f"logit_bias[{token_id!r}]", bias, "a token id of at least 0 with a finite bias or -inf")
        for word in self.bad_words:
            _require(_token_ids(word) and len(word) > 0, "a bad word", word, "a non-empty sequence of token ids")
        _require(_whole(self.max_new_tokens), "max_new_tokens", self.max_new_tokens, "a whole number of at least 0")
        in_budget = _whole(self.min_new_tokens) and self.min_new_tokens <= self.max_new_tokens
        _require(in_budget, "min_new_tokens", self.min_new_tokens, f"0 to max_new_tokens ({self.max_new_tokens})")
        _require(_token_ids(self.stop_ids), "stop_ids", self.stop_ids, "a collection of token ids of at least 0")
        strings = not isinstance(self.stop, str) and all(isinstance(string, str) and string for string in self.stop)
        _require(strings, "stop", self.stop, "a sequence of non-empty strings")
        _require(self.logprobs is None or _whole(self.logprobs), "logprobs", self.logprobs, "None or at least 0")
        _require(_whole(self.seed) and self.seed < 2**64, "seed", self.seed, "a whole number in [0, 2**64)")
        # Copies, so that a caller's later change to its list cannot reach a running sequence.
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        object.__setattr__(self, "bad_words", tuple(tuple(word) for word in self.bad_words))
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        object.__setattr__(self, "stop", tuple(self.stop))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_processors(self) -> bool:
        """Whether anything besides `min_new_tokens` changes logits before the draw."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
            or bool(self.logit_bias)
            or bool(self.bad_words)
            or self.logits_processor is not None
        )


class History:
    """Prompt and committed new tokens of one sequence, with the counts that the penalties read.

    The last committed token is the pending one, the next tree's root.
    """

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self.token_ids: list[int] = list(prompt_ids)
        self.prompt_len = len(self.token_ids)
        self.counts: Counter[int] = Counter()  # of generated tokens
        self.seen: set[int] = set(self.token_ids)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_new(self) -> int:
        return len(self.token_ids) - self.prompt_len

    def extend(self, token_ids: Sequence[int]) -> None:
        """Commit tokens."""
        self.token_ids.extend(token_ids)
        self.counts.update(token_ids)
        self.seen.update(token_ids)


@dataclass(frozen=True)
class Context:
    """Where one token is drawn: after `history` and the drafted tokens `path` below it, oldest first."""

    history: History
    path: tuple[int, ...] = ()

    @property
    def position(self) -> int:
        """Absolute position of the token to be drawn (its index in the sequence)."""
        return len(self.history) + len(self.path)

    @property
    def num_new(self) -> int:
        """New tokens on this path before the one to be drawn."""
        return self.history.num_new + len(self.path)

    def prefix(self) -> list[int]:
        """Prompt and generated ids before the token to be drawn; a fresh list."""
        return [*self.history.token_ids, *self.path]

    def tail(self, length: int) -> tuple[int, ...]:
        """The last `length` ids before the token to be drawn; fewer if there are no more."""
        missing = length - len(self.path)
        if missing <= 0:
            return self.path[len(self.path) - length :]
        return (*self.history.token_ids[-missing:], *self.path)


@dataclass(frozen=True)
class TokenLogprobs:
    """Raw log-probabilities (nats, before any processor) at one place: the token's own and the most likely ones'."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def tree_contexts(tree: DraftTree, history: History) -> list[Context]:
    """The context of every node of a tree whose root is the last token of `history`."""
    return [Context(history, tuple(tree.path_tokens(node))) for node in range(len(tree))]


class TargetSampler:
    """Draws the target's tokens, and the drafts' with the same noise, for one sequence.

    Args:
        params: how.
        vocab_size: V, the length of a logits row.
        device: of the logits.

    Raises:
        ValueError: a token id in `params` outside the vocabulary.
    """

    FAILED = -1
    """Stands in `targets` for a row from which no token can be drawn."""

    def __init__(self, params: SamplingParams, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self.params = params
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        ids = [*params.logit_bias, *params.stop_ids, *(token for word in params.bad_words for token in word)]
        if ids and max(ids) >= vocab_size:
            raise ValueError(
                f"token id {max(ids)} in logit_bias, bad_words or stop_ids, expected ids below vocab_size {vocab_size}"
            )
        self._noise: dict[int, Tensor] = {}
        self._stop_ids = torch.tensor(params.stop_ids, dtype=torch.int64, device=self.device)
        self._bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=self.device)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=self.device)

    def target(self, logits: Tensor, context: Context) -> int:
        """The token that the target emits.

        Args:
            logits: [V], any float dtype; unchanged.
            context: where.

        Raises:
            NonFiniteLogits: NaN or +inf in the row, or -inf everywhere.
            NoTokenLeft: the processors left nothing.
        """
        if self.is_plain(context):
            token = greedy_tokens(logits.unsqueeze(0))[0]
            if token < 0:
                raise _non_finite(context)
            return token
        return self._draw(logits.to(torch.float32, copy=True), context)

    def targets(self, logits: Tensor, contexts: Sequence[Context]) -> list[int]:
        """The target's token for each of the w rows; row i equals `target(logits[i], contexts[i])`.

        A row that gives no token yields `FAILED` and disturbs no other: a fault counts only if the accepted path
        reaches it (`target` on that row then raises with the reason).

        Args:
            logits: [w, V], any float dtype; unchanged.
            contexts: one a row.

        Raises:
            ValueError: another number of contexts than rows.
        """
        if len(contexts) != logits.shape[0]:
            raise ValueError(f"{len(contexts)} contexts given for {logits.shape[0]} rows of logits, expected one a row")
        if all(map(self.is_plain, contexts)):
            return greedy_tokens(logits)
        tokens = []
        for row, context in zip(logits, contexts, strict=True):
            try:
                tokens.append(self.target(row, context))
            except SamplingError:
                tokens.append(self.FAILED)
        return tokens

    def candidates(
        self, logits: Tensor, context: Context, ids: Tensor | None = None, count: int = 1
    ) -> list[tuple[int, float]]:
        """A draft's tokens: the same processors and the same noise on a draft head's logits.

        Args:
            logits: [V], or [Vd] over a draft vocabulary.
            context: where.
            ids: [Vd] int64, ascending: token id of each entry of `logits`; None for the whole vocabulary.
            count: siblings wanted.

        Returns:
            At most `count` token ids, the one the head would emit first, with their log-probabilities by a softmax of
            the processed scores with their noise: under this noise the target's token is fixed, and how near the head's
            scores are to the target's is what is not known. Empty where no token can be drawn (the draft ends there).
        """
        scores = logits.to(torch.float32, copy=True)
        if ids is not None:
            if not _drawable(scores.max()):
                return []
            scores = torch.full((self.vocab_size,), -math.inf, device=scores.device).index_copy_(0, ids, scores)
        try:
            scores, kept = self._perturbed(scores, context)
        except SamplingError:
            return []
        best = scores.log_softmax(-1).topk(min(count, len(scores)))
        tokens = best.indices if kept is None else kept[best.indices]
        pairs = zip(tokens.tolist(), best.values.tolist(), strict=True)
        return [(token, log_prob) for token, log_prob in pairs if log_prob > -math.inf]

    def is_plain(self, context: Context) -> bool:
        """Whether the token drawn is the largest logit's: neither noise nor a processor acts there."""
        masked = context.num_new < self.params.min_new_tokens and len(self.params.stop_ids) > 0
        return self.params.is_greedy and not self.params.has_processors and not masked

    def _draw(self, scores: Tensor, context: Context) -> int:
        """The token drawn from raw logits [V] fp32, which are overwritten."""
        scores, kept = self._perturbed(scores, context)
        place = greedy_tokens(scores.unsqueeze(0))[0]
        return place if kept is None else int(kept[place])

    def _perturbed(self, scores: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """Processed scores with their noise, whose argmax is the token, and the ids they belong to (None: all)."""
        scores = self._process_(scores, context)
        if self.params.is_greedy:
            return scores, None
        # Subtracting the maximum keeps the precision of fp32 for the tokens that matter.
        scores = scores.sub_(scores.max()).div_(self.params.temperature)
        ids = self._kept_ids(scores)
        if ids is None:
            return scores + self._noise_row(context.position), None
        return scores[ids] + self._noise_at(context.position, ids), ids

    def _process_(self, scores: Tensor, context: Context) -> Tensor:
        params, history = self.params, context.history
        if not _drawable(scores.max()):
            raise _non_finite(context)
        if params.logit_bias:
            scores[self._bias_ids] += self._bias
        if params.repetition_penalty != 1:
            seen = self._ids(history.seen.union(context.path))
            values = scores[seen]
            scores[seen] = torch.where(
                values < 0, values * params.repetition_penalty, values / params.repetition_penalty
            )
        if params.presence_penalty != 0 or params.frequency_penalty != 0:
            counts = history.counts + Counter(context.path) if context.path else history.counts
            generated = self._ids(counts)
            penalty = torch.tensor(list(counts.values()), dtype=torch.float32, device=scores.device)
            # Product and sum apart: a fused multiply-add in a vector body but not in its tail would depend on place.
            scores[generated] -= penalty.mul_(params.frequency_penalty).add_(params.presence_penalty)
        for word in params.bad_words:
            if context.tail(len(word) - 1) == word[:-1]:
                scores[word[-1]] = -math.inf
        if context.num_new < params.min_new_tokens:
            scores[self._stop_ids] = -math.inf
        if params.logits_processor is not None:
            scores = self._call_processor(params.logits_processor, scores, context)
        if not _drawable(scores.max()):
            raise NoTokenLeft(
                f"after the processors no token can be drawn at position {context.position}: every logit is -inf, or "
                "one is NaN or +inf; loosen bad_words, logit_bias, min_new_tokens or the logits_processor",
                context.position,
            )
        return scores

    def _call_processor(self, processor: LogitsProcessor, scores: Tensor, context: Context) -> Tensor:
        result = processor(context.prefix(), scores)
        if not isinstance(result, Tensor) or result.shape != scores.shape:
            given = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"logits_processor returned {given}, expected a tensor of shape {tuple(scores.shape)}")
        # A copy: the caller may return a tensor of its own, which is overwritten below.
        return result.to(device=scores.device, dtype=torch.float32, copy=True)

    def _kept_ids(self, scores: Tensor) -> Tensor | None:
        """Ids that the filters keep, ascending; None for all. `scores` [V]: over temperature, maximum 0."""
        params = self.params
        ids = None
        if 0 < params.top_k < len(scores):
            ids = (scores >= scores.topk(params.top_k).values[-1]).nonzero().squeeze(-1)
        if params.top_p < 1:
            ids = _top_p_ids(scores, ids, params.top_p)
        if params.min_p > 0:
            floor = math.log(params.min_p)
            ids = (scores >= floor).nonzero().squeeze(-1) if ids is None else ids[scores[ids] >= floor]
        return ids

    def _noise_row(self, position: int) -> Tensor:
        """Noise of the whole vocabulary; kept, because drafting and verification ask for the same positions."""
        row = self._noise.get(position)
        if row is None:
            if len(self._noise) >= NOISE_ROWS_KEPT:
                del self._noise[min(self._noise)]
            row = self._noise[position] = gumbel_noise(self.params.seed, position, self.vocab_size, self.device)
        return row

    def _noise_at(self, position: int, ids: Tensor) -> Tensor:
        if position not in self._noise and len(ids) * FEW_IDS_SHARE < self.vocab_size:
            return gumbel_noise_at(self.params.seed, position, ids)
        return self._noise_row(position)[ids]

    def _ids(self, ids: Counter[int] | set[int]) -> Tensor:
        return torch.tensor(list(ids), dtype=torch.int64, device=self.device)


def greedy_tokens(logits: Tensor) -> list[int]:
    """The first largest entry of each row, or -1 for a row with NaN or +inf or without a finite entry.

    Two stages, block maxima and then the winning block, because `Tensor.argmax` over a vocabulary is ten times slower
    on a CPU than `amax`. Comparisons only, so the rows' number and the dtype change nothing.

    Args:
        logits: [w, V], any float dtype; unchanged.
    """
    if logits.device.type != "cpu":
        best = logits.argmax(-1, keepdim=True)
        valid = logits.gather(-1, best).isfinite()
        return torch.where(valid, best, TargetSampler.FAILED).squeeze(-1).tolist()
    vocab_size = logits.shape[1]
    num_blocks = vocab_size // ARGMAX_BLOCK
    body = num_blocks * ARGMAX_BLOCK
    maxima = [logits[:, :body].unflatten(1, (num_blocks, ARGMAX_BLOCK)).amax(-1)] if num_blocks else []
    if body < vocab_size:
        maxima.append(logits[:, body:].amax(-1, keepdim=True))
    # amax and argmax both let NaN win, so a NaN anywhere surfaces as the row's largest value.
    largest, blocks = torch.cat(maxima, dim=1).max(dim=-1)
    tokens = []
    for row, (value, block) in enumerate(zip(largest.tolist(), blocks.tolist(), strict=True)):
        if not math.isfinite(value):
            tokens.append(TargetSampler.FAILED)
            continue
        start = block * ARGMAX_BLOCK
        tokens.append(start + int(logits[row, start : start + ARGMAX_BLOCK].argmax()))
    return tokens


def token_logprobs(logits: Tensor, token_id: int, num_top: int = 0) -> TokenLogprobs:
    """Log-probabilities of the raw distribution, from one row alone so that no other row changes a bit.

    Args:
        logits: [V] of the model, before any processor.
        token_id: the chosen token.
        num_top: how many of the most likely tokens to list, most likely first, equal ones by rising id.
    """
    logprobs = logits.to(torch.float32).log_softmax(-1)
    top: list[tuple[int, float]] = []
    if num_top > 0:
        floor = logprobs.topk(min(num_top, len(logprobs))).values[-1]
        ids = (logprobs >= floor).nonzero().squeeze(-1)
        order = logprobs[ids].sort(descending=True, stable=True).indices[:num_top]
        top = list(zip(ids[order].tolist(), logprobs[ids[order]].tolist(), strict=True))
    return TokenLogprobs(int(token_id), float(logprobs[token_id]), tuple(top))


def _top_p_ids(scores: Tensor, ids: Tensor | None, top_p: float) -> Tensor:
    """Ids kept by top-p among `ids` (all when None), ascending."""
    weights = scores.exp() if ids is None else scores[ids].exp()
    needed = top_p * float(weights.sum(dtype=torch.float64))
    if ids is None:
        # A sort of the whole vocabulary takes milliseconds. Tokens are kept from the most likely on, so any upper part
        # that holds the mass holds every kept token.
        for depth in (2.0, 4.0, 6.0, 8.0, 12.0, 16.0, math.inf):
            upper = scores >= -depth
            if float(weights.mul(upper).sum(dtype=torch.float64)) >= needed:
                break
        ids = upper.nonzero().squeeze(-1)
    order = scores[ids].sort(descending=True, stable=True)
    weights = order.values.exp().to(torch.float64)
    before = weights.cumsum(0) - weights
    return ids[order.indices[before < needed]].sort().values


def _non_finite(context: Context) -> NonFiniteLogits:
    return NonFiniteLogits(
        f"the model's logits for position {context.position} hold NaN or +inf, or are -inf everywhere; check the "
        "weights and the dtype (float16 overflows where bfloat16 and float32 do not)",
        context.position,
    )


def _drawable(largest: Tensor) -> bool:
    """Whether a row with this maximum (NaN if any entry is) has a token to draw."""
    return math.isfinite(largest.item())


def _finite(value: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _token_ids(values: object) -> bool:
    return isinstance(values, Collection) and not isinstance(values, str) and all(map(_whole, values))


def _require(condition: bool, name: str, given: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {given!r}, expected {expected}")
