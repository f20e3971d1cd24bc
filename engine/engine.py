"""The engine: what a user calls. One model, its heads, one cache, one caller at a time."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from ..heads.base import Projection
from ..heads.head_set import HeadSet
from ..heads.stateful import StatefulHead
from ..kernels.flash import FlashAttention, find_flash
from ..kernels.linear import PackedLinear
from .cache import KVCache, plan_cache
from .device_loop import decode_on_device
from .early_exit import DEFAULT_ACCURACY, calibrated_exits, check_policy, write
from .forward import RowTiles
from .fused import FusedWeights, can_fuse
from .gate import BESIDE, PLAIN, WHOLE, DraftPolicy, Lookup, Source, best_first, calibrated, fixed_exit
from .generation import Generation, LosslessReport, Stream
from .graphs import Rounds, needs_processing, samples_on_device
from .head_memory import HeadMemory, MemoryPlan, plan_memory, scratch_of
from .intake import Intake, Prompt
from .ladder import Ladder
from .loop import Machinery, Mode, Observer, Request, decode, is_out_of_memory
from .model import Decoder
from .pacing import Pace
from .prompt_reader import PromptReader, longest_for
from .sampling import SamplingParams
from .selftest import NotDeterministic, find_tiles, fused_rows_agree
from .sparsity.selection import Selection, sum_of_squares
from .sparsity.target import SparseTarget
from .sparsity.teal import TealLevel
from .sparsity.teal_step import ChannelWeights
from .sparsity.thresholded import TealDecoder
from .stopping import Emission
from .tokenizer import Tokenizer
from .tree import MAX_NODES
from .workspace import Workspace, reach_of

if TYPE_CHECKING:
    from .planner import Plan

Speculation = bool | Literal["always"]
Prefill = Literal["auto", "sdpa", "flash", "fused"]
# What a step's time and drafts depend on: batch, whether rounds run on the device, extra work, texts that are `LONG`.
Way = tuple[int, bool, bool, bool]
CHAIN_LENGTH = 3  # of a head whose drafts cost no trunk layers; longer ones gain little on a CPU (docs/log.md)
TREE = (4, 4, 3)  # beam, branch, depth where a head like that drafts trees; deeper ones cost more than they bring
# Sequences at once from which chains are drafted where fewer draft trees. Measured at 1 and at 8 only (H200, against
# plain decoding): trees of 15 nodes 2.12x and 0.89x, chains of 3 1.76x and 1.25x (at 8 0.71x and 0.94x end to end).
CHAINS_FROM = 4
# Tokens before an answer from which they are, too: more rows read more keys. Measured behind 2,048, 4,096 and 8,192
# tokens (H200): trees 1.50x, 1.26x and 1.06x of plain decoding, chains 1.43x, 1.48x and 1.20x (docs/measured.md).
LONG = 3000
WARM_PROMPT = 300  # tokens: as many as take every way through a prompt
ONE_BY_ONE = (
    "verify='teal' decodes plainly on a GPU: rows that drop different inputs share no reads there, so a draft's "
    "verification costs a step for each token of it. Leave policy and lookup out, or load with verify='dense'"
)


class Engine:
    """Generates with one model, speculatively where that pays.

    Args:
        decoder: the model.
        tokenizer: None allows prompts of token ids only.
        heads: exit heads of this model; None decodes plainly.
        deterministic: False gives up equal bits across widths, trees and batches for passes of any number of rows.
        model_id: for reports.
        fused: decode through fused kernels in CUDA graphs (`engine/graphs.py`); None: where there is a GPU with Triton.
        prefill: what reads prompts: "sdpa" is torch's attention, "flash" the installed flash-attn, "fused" the kernels
            of the decode step (`engine/prompt_reader.py`), which make no masks but TDA's; "auto" is "fused" where these
            decode, up to the length from which "sdpa" was faster (`prompt_reader.longest_for`), else "sdpa".
        sparsity: the target model of plain and speculative decoding: one that skips neurons of each sequence by its
            prompt, or one whose every row drops small inputs (TEAL). None: the whole model.
        draft: the layers before an exit drop small inputs while drafting; verification runs all of them again, so the
            output does not change. None: drafts run the target's own layers, and verification goes on from there.

    Raises:
        ValueError: flash-attn, sparsity or draft was asked for and does not take this model, or these heads, here; the
            message says what to do.

    Attributes:
        warning: why the engine does not speculate, if it does not.
        fused: the weights as the fused kernels take them; None where the reference path decodes.
        fused_refused: whether that is because rows of the fused kernels disagreed in the start-up self-test.
        flash: the flash-attn in use, if it is.
        observer: called with every verified round, see `loop.Machinery`; for measurements.
        policy: how it drafts where it is not told, see `policy_for`; plainly while its rows drop inputs on a GPU.
        workspace: caches, memories and captured rounds of earlier requests; `workspace.most_rounds` shapes of rounds
            (batch, draft, reach) are kept, with more the oldest is made anew.
        plan: where `policy` comes from, if it was planned (`engine/planner.py`).
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer | None = None,
        heads: HeadSet | None = None,
        *,
        deterministic: bool = True,
        model_id: str = "",
        fused: bool | None = None,
        prefill: str = "auto",
        sparsity: Selection | TealLevel | None = None,
        draft: TealLevel | None = None,
    ) -> None:
        if prefill not in get_args(Prefill):
            raise ValueError(f"prefill is {prefill!r}, expected one of {get_args(Prefill)}")
        self.decoder, self.tokenizer, self.heads, self.prefill_option = decoder, tokenizer, heads, prefill
        self.flash: FlashAttention | None = None
        if prefill == "flash":
            config = decoder.config
            self.flash = find_flash(decoder.device, decoder.dtype, config.head_dim, config.attention_softcap)
        self.model_id, self.deterministic = model_id, deterministic
        self._disagreement: str | None = None
        self.observer: Observer | None = None
        # of rows that drop inputs in rounds on the device: all (`teal`), or those that draft (`teal_draft`)
        self._channels: ChannelWeights | None = None
        with torch.inference_mode(), self.here():
            wanted = can_fuse(decoder) and deterministic if fused is None else fused
            skips = sparsity is not None and not isinstance(sparsity, TealLevel)
            self.fused = self._fuse(wanted, skips)  # may store weights another way, so before tiles are looked for
            self.tiles = self._find_tiles()
            self.fused_refused = wanted and self.fused is None
            self._reads_fused = prefill in ("auto", "fused") and self.fused is not None
            if heads is not None:
                projection = Projection(
                    decoder.final_norm, decoder.head_weight, decoder.config.logit_softcap, PackedLinear
                )
                heads.attach(projection)
            self.sparse: SparseTarget | None = None
            if sparsity is not None and not isinstance(sparsity, TealLevel):
                self.sparse = SparseTarget(decoder, sparsity, deterministic)
            if prefill == "fused" and not self._fused_reads():
                raise ValueError(
                    "prefill is 'fused', but the fused kernels do not decode here, which need a GPU with Triton and "
                    "rows that agree, or this target's masks are of another kind than TDA's: leave it out"
                )
            self._thin_out(sparsity if isinstance(sparsity, TealLevel) else None, draft)
        self._policy: DraftPolicy | None = None
        self.plan: Plan | None = None
        self.workspace = Workspace(decoder)
        self._paces: dict[Way, Pace] = {}
        self._lock = threading.Lock()
        self._owner: int | None = None

    @property
    def _intake(self) -> Intake:
        return Intake(self.decoder.config, self.tokenizer, self.decoder.device)

    def _find_tiles(self) -> RowTiles:
        if not self.deterministic:
            return RowTiles(1, 1024, gathered=self.decoder.device.type == "cuda", deterministic=False)
        try:
            return find_tiles(self.decoder)
        except NotDeterministic as error:
            self._disagreement = str(error)
            return RowTiles()

    def _fuse(self, wanted: bool, skips: bool = False) -> FusedWeights | None:
        """The model for fused kernels, if its rows have the same bits in every tile and tree on this machine."""
        weights = FusedWeights(self.decoder, by_neuron=skips) if wanted else None
        return weights if weights is not None and fused_rows_agree(weights) else None

    def _on_device(self, params: Sequence[SamplingParams]) -> FusedWeights | None:
        """The weights of rounds on the device for requests with these options; None: the waiting loop decodes them."""
        weights = self.fused if self.teal is None else self._channels
        if weights is None or weights.by_neuron != (self.sparse is not None):
            return None
        return weights if params and all(map(samples_on_device, params)) else None

    @property
    def _one_by_one(self) -> bool:
        """Whether rows of the target drop inputs in rounds on the device."""
        return self.teal is not None and self._channels is not None

    @property
    def thinned(self) -> ChannelWeights | None:
        """What the layers before an exit draft with in rounds on the device, if not with the target's own weights."""
        return None if self.teal_draft is None else self._channels

    @property
    def by_channel(self) -> ChannelWeights | TealDecoder | None:
        """What holds weights a second time, by input channel, for rows that drop inputs."""
        return self._channels or self._teal_target or self._teal_drafter

    @property
    def policy(self) -> DraftPolicy:
        return self.policy_for(1)

    @policy.setter
    def policy(self, policy: DraftPolicy) -> None:
        self._policy = policy

    def policy_for(self, batch: int, context: int = 0) -> DraftPolicy:
        """How so many sequences at once draft where they are not told, before whose answers stand `context` tokens. A
        policy that was set holds for all of them; a plan, which is for one sequence and short texts, with fused kernels
        for those alone."""
        if self._one_by_one:
            return PLAIN
        if self._policy is not None:
            return self._policy
        if self._disagreement is not None:
            return PLAIN
        fused = self.fused is not None
        if self.plan is not None and not (fused and _is_wide(batch, context)):
            return self.plan.chosen.policy
        return _default_policy(self.heads, fused, batch, context)

    @property
    def warning(self) -> str | None:
        return ONE_BY_ONE if self._one_by_one else self._disagreement

    @property
    def prefill(self) -> str:
        """What reads prompts: "sdpa", "fused", which may end at some length, or "flash" with the package in use."""
        if self.flash is not None:
            return f"flash ({self.flash.name})"
        if not self._fused_reads():
            return "sdpa"
        longest = self._longest_fused()
        return "fused" if longest is None else f"fused up to {longest} tokens, sdpa"

    @property
    def verify(self) -> str:
        """The target model: "dense", or what skips its neurons or drops inputs ("tda", "teal 0.5")."""
        if self.teal is not None:
            return self.teal.name
        return "dense" if self.sparse is None else self.sparse.selection.name

    @property
    def target(self) -> Decoder:
        """The model that runs every row behind a prompt."""
        return self._teal_target or self.decoder

    @property
    def draft(self) -> str:
        """What runs the layers before an exit: the target, "dense" for one, or "teal 0.5"."""
        return self.verify if self.teal_draft is None else self.teal_draft.name

    def drop_inputs(self, verify: TealLevel | None = None, draft: TealLevel | None = None) -> None:
        """Set which rows drop small inputs from now on: all (`verify`), those that draft (`draft`), or none.

        Raises:
            ValueError: both, a GPU without fused kernels, a target that skips neurons there, thresholds of another
                model, or heads whose drafts run no layers.
            NotDeterministic: a row's sums over its kept channels depend on other rows on this machine.
            RuntimeError: a stream of this engine is open in this thread.
        """
        with self._claimed(), torch.inference_mode():
            self._thin_out(verify, draft)

    def _thin_out(self, verify: TealLevel | None, draft: TealLevel | None) -> None:
        decoder = self.decoder
        on_cpu = decoder.device.type == "cpu"
        level, option = (draft, "draft") if verify is None else (verify, "verify")
        if level is not None and not on_cpu and self.fused is None:
            raise ValueError(
                f"{option}='teal' needs the fused kernels where the model is on {decoder.device}: Triton, "
                f"deterministic=True and rows that agree. Load with device='cpu', or with {option}='dense'"
            )
        if draft is not None and self.sparse is not None and self.fused is not None:
            raise ValueError(
                f"draft='teal' drops inputs of the whole model in rounds on the device, and the target there skips "
                f"neurons ({self.sparse.selection.name!r}): load with draft='dense', with verify='dense', or with "
                "device='cpu'"
            )
        if verify is not None and self.sparse is not None:
            raise ValueError(f"the target model is {self.verify!r} already: load with verify='teal' instead")
        if verify is not None and draft is not None:
            raise ValueError("verify='teal' drafts by its own thresholds already: leave draft='teal' out")
        deepest = 0 if self.heads is None else max(self.heads.exits)
        if draft is not None and self.heads is not None and deepest == 0:
            raise ValueError(
                "draft='teal' thins out the layers before an exit, and these heads draft from their own state (exit 0)"
                ": load with heads='adapter', or with a set of heads at exits above 0"
            )
        # On a GPU rounds on the device skip channels; what they leave to the loop that waits runs with inputs zeroed.
        target = None if verify is None else verify.decoder(decoder, skip=on_cpu)
        if target is not None and on_cpu and self.deterministic:
            target.check_rows()
        drafter = None if draft is None else draft.decoder(decoder, num_layers=deepest, skip=on_cpu)
        count = deepest if verify is None else decoder.config.num_layers
        if level is None or self.fused is None:
            self._channels = None
        elif self._channels is None or len(self._channels.channels) != count:
            self._channels = None  # its memory is free again before the next ones are made
            self._channels = ChannelWeights(decoder, level.thresholds, level.dense_tokens, count)
        else:
            self._channels.drop(level.thresholds, level.dense_tokens)
        self.teal, self.teal_draft, self._teal_target, self._teal_drafter = verify, draft, target, drafter

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        mode: Mode = "lossless",
        accuracy: float | None = None,
        speculation: Speculation = True,
        policy: DraftPolicy | None = None,
        lookup: bool | None = None,
        num_return_sequences: int = 1,
        seeds: Sequence[int] | None = None,
        ignore_eos: bool = False,
        **sampling: Any,
    ) -> Any:
        """Continue a prompt, or several at once.

        Args:
            prompt: text, token ids, or a list of either.
            mode: "lossless", or "early_exit": the first exit that is sure writes the token and nothing verifies it
                (`engine/early_exit.py`). Its text need not be the full model's.
            accuracy: of early exit: how often an exit agreed with the full model where it was sure, 0.60 to 0.99; 0.95
                where None.
            speculation: True drafts where it pays, False never, "always" also where it does not.
            policy: how to draft, in place of the calibrated default; it is followed without asking whether it pays. For
                early exit, the exits and their gates, in place of `accuracy`.
            lookup: whether to draft from the text where it repeats itself (`engine/lookup.py`); None: as the policy
                says.
            num_return_sequences: outputs per prompt, each with its own seed.
            seeds: one per output; without it output i has `derive_seed(seed, i)`, and output 0 has `seed` itself.
            ignore_eos: do not stop at the model's own stop ids.
            **sampling: fields of `SamplingParams`; `stop` may be one string, `bad_words` may hold strings,
                `stop_ids` are added to the model's own.

        Returns:
            A `Generation` for one prompt, a list of them (prompt by prompt) for a list or several return sequences.

        Raises:
            ValueError: an option that is unknown or out of range, an empty prompt, ids outside the vocabulary.
            ContextTooLong: a prompt that does not fit.
            MemoryError: not even a plain step fits the memory.
        """
        single, prompts = self._intake.prompts(prompt)
        if num_return_sequences < 1:
            raise ValueError(f"num_return_sequences is {num_return_sequences}, expected at least 1")
        prompts = [ids for ids in prompts for _ in range(num_return_sequences)]
        with self._claimed():
            requests = self._intake.requests(prompts, seeds, ignore_eos, sampling)
            for _ in self._decode(requests, mode, accuracy, speculation, policy, lookup):
                pass
            outputs = [self._finished(request) for request in requests]
        return outputs[0] if single and num_return_sequences == 1 else outputs

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Any:
        """`generate` on a conversation, through the model's chat template.

        Args:
            messages: dicts with "role" and "content".
            **options: as for `generate`.

        Raises:
            ValueError: the model has no chat template; or as `generate`.
        """
        return self.generate(self._intake.needed_tokenizer().encode_chat(messages), **options)

    def stream(
        self,
        prompt: Prompt,
        *,
        mode: Mode = "lossless",
        accuracy: float | None = None,
        speculation: Speculation = True,
        policy: DraftPolicy | None = None,
        lookup: bool | None = None,
        ignore_eos: bool = False,
        **sampling: Any,
    ) -> Stream:
        """`generate` for one prompt, token by token. Closing the stream early ends the sequence ("cancelled").

        The engine is busy until the stream is exhausted or closed; use it as a context manager to be sure.
        """
        single, prompts = self._intake.prompts(prompt)
        if not single:
            raise ValueError("stream takes one prompt; generate takes lists")
        self._claim()
        try:
            with self.here():
                request = self._intake.requests(prompts, None, ignore_eos, sampling)[0]
                rounds = self._decode([request], mode, accuracy, speculation, policy, lookup)
        except BaseException:
            self._release()
            raise
        return Stream(self, request, rounds)

    def warm_up(self, batch: int = 1, **sampling: Any) -> float:
        """Do now what the first requests would wait for: compile kernels, make the cache, and capture rounds of every
        reach that the cache has room for, plain ones and those of the default policy, of every length that a plan moves
        among.

        Args:
            batch: outputs at once of the requests to come.
            **sampling: options like theirs, as for `generate`: filters and penalties run kernels of their own.

        Returns:
            Seconds that it took.
        """
        start = time.perf_counter()
        tokens = min(WARM_PROMPT, self.decoder.config.max_context - 2 * MAX_NODES)
        options = {**sampling, "max_new_tokens": MAX_NODES, "ignore_eos": True}
        usual, long = self.policy_for(batch), self.policy_for(batch, LONG)
        apart = long.drafts and long != usual and self.decoder.config.max_context > LONG
        ladder = self._ladder(usual, batch)
        if ladder is not None:
            usual = dataclasses.replace(usual, max_depth=ladder.longest)
        policies = [PLAIN, *([usual] if usual.drafts else []), *([long] if apart else [])]
        for policy in policies:
            self.generate([[1] * tokens] * batch, policy=policy, **options)
        with self._claimed():
            requests = self._intake.requests([[1]] * batch, None, True, sampling)
            params, cache = requests[0].sampler.params, self.workspace.cache
            fused = self._on_device([params])
            if fused is None or cache is None:
                return time.perf_counter() - start
            for policy in policies:
                reach = LONG if apart and policy is long else 0
                while reach < cache.plan.context:
                    reach = min(reach_of(reach + 1), cache.plan.context)
                    memories = self._memories_for(policy, cache)
                    taps = {layer for memory in memories.values() for layer in memory.layers if layer}
                    if (reader := self._reader_for(cache)) is not None:
                        with torch.inference_mode():
                            for size in reader.sizes:
                                reader.step(size, reach, tuple(sorted(taps)))
                    depths = () if ladder is None or policy is not usual else tuple(ladder.rungs)
                    self._rounds_for(fused, cache, batch, policy, needs_processing(params), reach, depths)
        return time.perf_counter() - start

    def verify_lossless(
        self, prompt: Prompt, *, policy: DraftPolicy | None = None, lookup: bool | None = None, **sampling: Any
    ) -> LosslessReport:
        """Decode one prompt speculatively and plainly with the same seed, and compare token by token.

        Args:
            prompt, policy, lookup, **sampling: as for `generate`.

        Raises:
            ValueError: several prompts or outputs were asked for; or as `generate`.
        """
        if not self._intake.prompts(prompt)[0] or sampling.get("num_return_sequences", 1) != 1:
            raise ValueError("verify_lossless compares one output of one prompt; call it once for each")
        speculative = self.generate(prompt, speculation="always", policy=policy, lookup=lookup, **sampling)
        plain = self.generate(prompt, speculation=False, **sampling)
        pairs = zip(speculative.token_ids, plain.token_ids, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        shorter = min(len(speculative.token_ids), len(plain.token_ids))
        if first is None and len(speculative.token_ids) != len(plain.token_ids):
            first = shorter
        if first is None:
            return LosslessReport(True, speculative, plain)
        # asked for afterwards: log-probabilities come from the loop that waits for every step (`samples_on_device`)
        count = max(2, sampling.get("logprobs") or 0)
        again = self.generate(prompt, speculation=False, **{**sampling, "logprobs": count})
        margin = None
        if again.token_ids[:first] == plain.token_ids[:first] and first < len(again.token_ids):
            best, second = again.logprobs[first].top[:2]
            margin = best[1] - second[1]
        return LosslessReport(False, speculative, plain, first, margin)

    def memory(self, batch: int = 1, context: int | None = None) -> str:
        """Sizes of the KV cache, of the heads' memories and of kept neurons for a batch of a context, in words and
        factors."""
        config = self.decoder.config
        wanted = config.max_context if context is None else context
        cache = plan_cache(config, batch, wanted, self.decoder.device, self.decoder.dtype, check_free=False)
        memories = self.memory_plans(self.policy_for(batch), batch, wanted)
        parts = [cache.arithmetic(), *(f"memory of the head at {e}: {p.arithmetic()}" for e, p in memories.items())]
        parts += [] if self.by_channel is None else [self.by_channel.arithmetic()]
        lists = self.fused is not None
        return "; ".join(parts if self.sparse is None else [*parts, self.sparse.arithmetic(batch, lists)])

    def memory_plans(self, policy: DraftPolicy, batch: int, context: int) -> dict[int, MemoryPlan]:
        """Sizes of the memories that a policy needs, by exit layer of the stateful heads that it asks."""
        heads = {} if self.heads is None else self.heads.heads
        asked = {e: head for e in policy.exits if isinstance(head := heads[e], StatefulHead)}
        scratch, device = scratch_of(policy), self.decoder.device
        return {e: plan_memory(head, batch, context, scratch, device) for e, head in asked.items()}

    def pace(self, batch: int = 1) -> Pace | None:
        """What is known of plain steps and of whether drafting pays, for batches of one size without penalties, filters
        or log-probabilities; None before the first."""
        return self._paces.get((batch, self.fused is not None, False, False))

    def _decode(
        self,
        requests: list[Request],
        mode: Mode,
        accuracy: float | None,
        speculation: Speculation,
        policy: DraftPolicy | None,
        lookup: bool | None = None,
    ) -> Iterator[list[tuple[Request, list[Emission]]]]:
        if mode not in get_args(Mode):
            raise ValueError(f"mode is {mode!r}, expected one of {get_args(Mode)}")
        if lookup and (mode == "early_exit" or speculation is False):
            raise ValueError(
                f"lookup drafts, and mode {mode!r} with speculation={speculation!r} does not: leave it out"
            )
        if mode == "early_exit":
            return self._exit_early(requests, accuracy, speculation, policy)
        if accuracy is not None:
            raise ValueError("accuracy is of mode='early_exit'; lossless drafting takes policy=calibrated(...)")
        if speculation not in (True, False, "always"):
            raise ValueError(f"speculation is {speculation!r}, expected True, False or 'always'")
        chosen = PLAIN if speculation is False else (policy or self.policy_for(len(requests), _written(requests)))
        if lookup is not None:
            chosen = dataclasses.replace(chosen, lookup=(chosen.lookup or Lookup()) if lookup else None)
        if chosen.drafts and self._one_by_one:
            raise ValueError(ONE_BY_ONE)
        if chosen.drafts and self.warning is not None:
            raise NotDeterministic(self.warning)
        if chosen.exits and self.heads is None:
            raise ValueError("a drafting policy was given, but the engine has no heads; load with heads=...")
        missing = [] if self.heads is None else sorted(set(chosen.exits) - set(self.heads.exits))
        if missing:
            raise ValueError(f"no heads at exits {missing}; this head set has {self.heads.exits if self.heads else ()}")
        unfinished = [request for request in requests if not request.checker.finished]
        params = [request.sampler.params for request in unfinished]
        drafter = self._teal_drafter if any(chosen.exits) else None
        waits = self.observer is not None or (drafter is not None and self.thinned is None)
        fused = None if waits else self._on_device(params)
        processed = any(map(needs_processing, params))
        pace = None
        if speculation is True and policy is None:
            slower = processed or any(one.logprobs is not None for one in params)
            way = len(requests), fused is not None, slower, _written(requests) >= LONG
            calibration = None if self.heads is None else self.heads.calibration
            rehearsed = calibration is not None and calibration.rehearsal is not None
            trusted: frozenset[Source] = frozenset({"heads"} if rehearsed else ())
            if way not in self._paces:
                self._paces[way] = Pace(ladder=self._ladder(chosen, len(requests)), trusted=trusted)
            pace = self._paces[way]
            if pace.ladder is not None:  # heads' memories need room for its longest drafts
                chosen = dataclasses.replace(chosen, max_depth=pace.ladder.longest)
        cache = self.workspace.cache_for(len(requests), _longest(requests))
        try:
            memories = self._memories_for(chosen, cache)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            memories, chosen = {}, PLAIN
            for request in requests:
                request.statistics.record_fallback("out of memory")
        on = Machinery(
            self.target,
            cache,
            self.tiles,
            {} if self.heads is None else self.heads.heads,
            None if self.heads is None else self.heads.draft_ids,
            self.observer,
            memories,
            self.flash,
            self.sparse,
            self.decoder,
            drafter,
            self._reader_for(cache),
        )
        if fused is None:
            return decode(on, unfinished, chosen, pace)
        while True:
            try:
                depths = () if pace is None or pace.ladder is None else tuple(pace.ladder.rungs)
                rounds = self._rounds_for(fused, cache, len(requests), chosen, processed, _longest(requests), depths)
                return decode_on_device(on, rounds, unfinished, chosen, pace)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.workspace.rounds = {}  # those of other shapes, too
                if not chosen.drafts:
                    raise MemoryError(f"out of memory for a plain step's buffers; {cache.plan.arithmetic()}") from error
            memories.clear()
            self.workspace.memories, chosen = {}, PLAIN
            for request in requests:
                request.statistics.record_fallback("out of memory")

    def _ladder(self, policy: DraftPolicy, batch: int) -> Ladder | None:
        """Of the plan, which is for one sequence, if this policy is its choice."""
        if self.plan is None or batch > 1 or policy is not self.plan.chosen.policy or not self.plan.rungs:
            return None
        return Ladder(self.plan.rungs)

    def _exit_early(
        self, requests: list[Request], accuracy: float | None, speculation: Speculation, policy: DraftPolicy | None
    ) -> Iterator[list[tuple[Request, list[Emission]]]]:
        if speculation is not True:
            raise ValueError(
                f"speculation is {speculation!r} in mode 'early_exit', which drafts and verifies nothing: leave it out"
            )
        if self.teal_draft is not None:
            raise ValueError(
                "mode 'early_exit' verifies nothing, so there are no drafts for draft='teal' to thin out: load with "
                "verify='teal', or without it"
            )
        if policy is None:
            policy = calibrated_exits(self.heads, DEFAULT_ACCURACY if accuracy is None else accuracy)
        elif accuracy is not None:
            raise ValueError("mode 'early_exit' takes accuracy or policy, and both were given")
        else:
            check_policy(self.heads, policy)
        heads, draft_ids = ({}, None) if self.heads is None else (self.heads.heads, self.heads.draft_ids)
        if self.sparse is not None and self.sparse.selection.options.refresh:
            raise ValueError(
                "mode 'early_exit' puts layers off across the positions where masks are read again: calibrate with "
                "refresh=0, or decode in mode 'lossless'"
            )
        cache = self.workspace.cache_for(len(requests), _longest(requests))
        on = Machinery(
            self.target, cache, self.tiles, heads, draft_ids, flash=self.flash, sparse=self.sparse,
            prompts=self._reader_for(cache),
            reader=self.decoder,
        )  # fmt: skip
        for request in requests:
            request.mode = "early_exit"
        return write(on, [request for request in requests if not request.checker.finished], policy)

    def _memories_for(self, policy: DraftPolicy, cache: KVCache) -> dict[int, HeadMemory]:
        """An empty memory of each stateful head that the policy asks, as large as the cache."""
        plans = self.memory_plans(policy, cache.plan.batch, cache.plan.context)
        return self.workspace.memories_for(plans, cache.plan.batch)

    def _rounds_for(
        self, weights: FusedWeights, cache: KVCache, batch: int, policy: DraftPolicy, processed: bool, context: int,
        depths: Collection[int] = (),
    ) -> Rounds:  # fmt: skip
        return self.workspace.rounds_for(
            weights, cache, self.heads, policy, batch, processed, context, self.thinned, depths
        )

    def _fused_reads(self) -> bool:
        """Whether fused kernels read prompts: those of the target, which may need what they know of neurons."""
        if not self._reads_fused or self.fused is None or self.fused.by_neuron != (self.sparse is not None):
            return False
        return self.sparse is None or self.sparse.selection.weigh is sum_of_squares

    def _reader_for(self, cache: KVCache) -> PromptReader | None:
        """What reads prompts into this cache by fused kernels, if they are to."""
        if not self._fused_reads() or self.fused is None:
            return None
        return self.workspace.reader_for(self.fused, cache, self._longest_fused())

    def _longest_fused(self) -> int | None:
        return None if self.prefill_option == "fused" or self.fused is None else longest_for(self.fused)

    def _finished(self, request: Request) -> Generation:
        checker = request.checker
        count = len(checker.token_ids)
        origins = request.origins[:count]
        with_logprobs = request.sampler.params.logprobs is not None
        assert checker.finish_reason is not None
        return Generation(
            text=checker.text,
            token_ids=list(checker.token_ids),
            finish_reason=checker.finish_reason,
            logprobs=[o.logprobs for o in origins if o.logprobs is not None] if with_logprobs else None,
            stats=request.statistics.snapshot(),
            exit_layers=[origin.exit_layer for origin in origins],
            prompt_ids=request.history.token_ids[: request.history.prompt_len],
            error=request.error,
            mode=request.mode,
            verify=self.verify,
        )

    def _claim(self) -> None:
        """Become the one caller. Another thread waits; the same thread would wait for itself, so it is told."""
        if self._owner == threading.get_ident() and self._lock.locked():
            raise RuntimeError("this engine still has an open stream in this thread; exhaust or close it first")
        self._lock.acquire()
        self._owner = threading.get_ident()

    def _release(self) -> None:
        self._owner = None
        self._lock.release()

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        self._claim()
        try:
            with self.here():
                yield
        finally:
            self._release()

    def here(self) -> AbstractContextManager[Any]:
        """The engine's GPU as the current one: kernels and graphs run on the current one wherever their tensors are."""
        device = self.decoder.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _longest(requests: Sequence[Request]) -> int:
    """Tokens of the longest request, when all its budget is written."""
    return max(len(request.history) + request.checker.num_remaining for request in requests)


def _written(requests: Sequence[Request]) -> int:
    """Tokens of the longest request so far."""
    return max(len(request.history) for request in requests)


def _is_wide(batch: int, context: int) -> bool:
    """Whether rounds of the fused kernels take notably longer with 16 rows a sequence than with few."""
    return batch >= CHAINS_FROM or context >= LONG


def _default_policy(heads: HeadSet | None, fused: bool, batch: int = 1, context: int = 0) -> DraftPolicy:
    """The text drafts where it repeats itself, else heads do. One without trunk layers drafts trees where 16 rows cost
    what one does (fused kernels, few sequences, short texts), else chains; others are asked as their calibration says,
    or not at all.

    With fused kernels the text drafts as many tokens as the rows hold, behind a match of any length: trees share their
    rows with it (docs/log.md). Behind long texts, of four rows, it has to match three tokens in front of a head's
    chains, for heads are better than shorter matches. Trunk exits have none in front, for the host would have to draft,
    and many sequences none at all.
    """
    few = not (fused and _is_wide(batch, context))
    policy = PLAIN
    if heads is not None and 0 in heads.exits:
        policy = best_first(*TREE) if fused and few else fixed_exit(0, CHAIN_LENGTH)
    elif heads is not None and heads.calibration is not None:
        policy = calibrated(heads.calibration)
    if not fused:
        return dataclasses.replace(policy, lookup=Lookup())
    if batch >= CHAINS_FROM or policy.exits not in ((), (0,)):
        return policy
    text = BESIDE if policy.drafts else WHOLE
    if not few:
        text = dataclasses.replace(WHOLE, min_match=3 if policy.drafts else 1, max_nodes=CHAIN_LENGTH)
    return dataclasses.replace(policy, lookup=text)
