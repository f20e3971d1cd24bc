"""Drafting with a recurrent head on the device: what `best_first` and `HeadMemory` do, without the host.

A drafting round is `absorb` (the pairs that wait become entries of the head, the pending token's the last of them),
then `draft` (logits, candidates, the next entries, step by step, and the trees); after the verification `keep` lets the
accepted path's states wait. Each is a fixed sequence of launches on tensors that never move, so all of them can be
captured in a CUDA graph. A round drafts as many steps as its shape says, or fewer (`depth`); a gate shapes the trees
but does not end it early.

The head's layers run through the same kernels as the decoder's, with drafted entries as rows: slot base + place (see
`kernels/grow_tree.py`). Entries of verified tokens are made from the full model's states and overwrite draft entries
(design rule 10); nothing here is read by verification.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..heads.stateful import RecurrentHead
from ..kernels.grow_tree import Pool, Sequences, Shape, Trees, grow_tree
from ..kernels.head_rows import RING, absorb_rows, context_rows, enter_rows, keep_states, leave_rows
from ..kernels.residual_linear import column_tiles, residual_linear
from ..kernels.rows import Rows
from .device_state import upload
from .fused import NormedLinear
from .head_layers import HeadWeights, LayerRows
from .head_memory import HeadMemory
from .model import Decoder
from .speech import Speech
from .tree import MAX_NODES


class RecurrentWeights(HeadWeights):
    """And what a recurrent head's layers run on."""

    def __init__(self, head: RecurrentHead, positions: int) -> None:
        super().__init__(head, positions)
        self.token_norm, self.context_norm = self.wide(head.token_norm), self.wide(head.context_norm)
        self.fuse, self.join = self.cast(head.fuse), self.cast(head.join)


class _Pass(LayerRows):
    """Buffers of one pass of the head over R rows: tokens and contexts, joined, and the layers."""

    def __init__(self, weights: RecurrentWeights, num_rows: int, capacity: int, device: torch.device) -> None:
        width, dtype = weights.shape.hidden_size, weights.dtype
        super().__init__(weights, num_rows, capacity, device, (2 * width, weights.fuse.shape[1]))
        self.both = torch.zeros(num_rows, 2 * width, dtype=dtype, device=device)
        self.stats = torch.zeros(num_rows, 2, column_tiles(width, 2 * width, dtype), device=device)


class RecurrentDraft:
    """Drafts of B sequences by the recurrent head at exit 0.

    Args:
        head: attached.
        memory: the head's; its cache is used from where `start` finds it on.
        decoder: the model's.
        draft_ids: token ids of the head's outputs, long `[Vd]`, rising; None for all.
        shape: of the trees; 1 x 1 is a chain.
        batch: B.
        trees: where the drafts go.
        sequences: of the batch. `base` must be the pending token's position when `absorb` or `draft` runs.
        seeds: int64 `[B]`.
        options: fp32, the temperature first.
        pdl: programmatic dependent launch (Hopper and newer).
        reach: tokens that a sequence may hold; None: as many as the memory.
        weights: of other drafts on this memory, to be shared; None makes them.

    Raises:
        ValueError: a head at another exit, or a memory too small for the batch or the shape.
    """

    def __init__(
        self,
        head: RecurrentHead,
        memory: HeadMemory,
        decoder: Decoder,
        draft_ids: Tensor | None,
        shape: Shape,
        batch: int,
        trees: Trees,
        sequences: Sequences,
        seeds: Tensor,
        options: Tensor,
        pdl: bool = False,
        *,
        reach: int | None = None,
        weights: RecurrentWeights | None = None,
    ) -> None:
        if head.spec.exit_layer != 0 or memory.head is not head:
            raise ValueError(
                f"{head.kind} head at exit {head.spec.exit_layer}, expected one at exit 0 and its own memory"
            )
        if batch > memory.plan.batch or len(sequences.base) != batch:
            raise ValueError(
                f"batch is {batch}, memory is planned for {memory.plan.batch}, lengths are {sequences.base}"
            )
        if shape.num_places > memory.plan.scratch:
            raise ValueError(
                f"{memory.plan.scratch} draft entries planned, the shape makes {shape.num_places}: plan the memory for "
                "the policy (head_memory.scratch_of)"
            )
        self.taps, self.shape, self.pdl = head.taps, shape, pdl
        self.trees, self.sequences, self._seeds, self._options = trees, sequences, seeds, options
        self._decoder, self._cache, self._projection = decoder, memory.cache, head.attached()
        device, width = decoder.device, head.hidden_size
        slots = memory.cache.k.shape[3]
        capacity = slots if reach is None else reach + MAX_NODES
        self.weights = RecurrentWeights(head, slots) if weights is None else weights
        # the model's final norm before its LM head's rows of the draft vocabulary
        self._speaker = NormedLinear.of(decoder._final_norm, self._projection.head_weight, None)
        self._draft_ids = None if draft_ids is None else draft_ids.to(device, torch.int32)

        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._ring = torch.zeros(batch, RING, len(self.taps), width, device=device)
        self._waiting = torch.zeros(batch, RING, dtype=torch.int32, device=device)
        self._outputs = torch.zeros(batch, shape.num_places, width, device=device)

        num_rows = batch * MAX_NODES
        self._taken = Rows.empty(num_rows, device)
        self._taken_ids, places = torch.zeros(2, num_rows, dtype=torch.int32, device=device).unbind()
        self._taken_places = places.copy_(torch.arange(num_rows) % MAX_NODES)
        self._last_row = torch.zeros(batch, dtype=torch.int32, device=device)
        self._states = torch.zeros(num_rows, len(self.taps) * width, dtype=decoder.dtype, device=device)
        self._contexts = torch.zeros(num_rows, width, device=device)
        self._absorbing = _Pass(self.weights, num_rows, capacity, device)

        self._root = Rows.empty(-(-batch // 16) * 16, device)
        head_weight = self._projection.head_weight
        self._root_speech = Speech(len(self._root), shape.branch, head_weight)
        self.pool = Pool.empty(batch, shape, device)
        self._growing = _Pass(self.weights, len(self.pool.rows), capacity, device)
        self._speech = Speech(len(self.pool.rows), shape.branch, head_weight)

    def draws_on(self, memory: HeadMemory) -> bool:
        """Whether these drafts were made for this memory."""
        return memory.cache is self._cache

    def start(
        self,
        memory: HeadMemory,
        texts: Mapping[int, Sequence[int]],
        absorb: Callable[[], object] | None = None,
    ) -> None:
        """Take over sequences whose prompts the head's memory was given; their pending tokens are the trees' roots.

        Not to be captured.

        Args:
            texts: sequence -> all token ids, the pending one last; no other sequence drafts until the next `start`.
            absorb: what runs `absorb`, a captured one; None calls it.

        Raises:
            ValueError: not the memory that this was made for.
        """
        if not self.draws_on(memory):
            raise ValueError("this is another memory than the one that the drafts were made for: make them anew")
        self.lengths.copy_(self.sequences.base + 1)  # nothing waits but for these
        layers = [memory.layers.index(tap) for tap in self.taps]
        some = slice(layers[0], layers[-1] + 1) if layers == list(range(layers[0], layers[-1] + 1)) else layers
        # Pairs of a token and the states of the one before it; before the first token states are zero, and so is the
        # context made of them. The pending token's pair is the last.
        pairs: dict[int, tuple[int, Tensor, Tensor]] = {}
        for sequence, ids in texts.items():
            entries, states = memory.hand_over(sequence)
            tokens = torch.zeros(len(ids) - entries, dtype=torch.int32, device=self.lengths.device)
            upload(tokens, torch.tensor(ids[entries:], dtype=torch.int32))
            pairs[sequence] = entries, states, tokens
            self.lengths[sequence] = entries
        longest = max(len(tokens) for _, _, tokens in pairs.values())
        for first in range(0, longest, RING):
            needed = 0
            for sequence, (entries, states, tokens) in pairs.items():
                last = min(first + RING, len(tokens))
                at = (entries + first) % RING  # of the ring's places, which these pairs go round once at most
                turn = first + RING - at
                for low, high, to in ((first, min(last, turn), at), (turn, last, 0)):
                    if low < high:
                        self._ring[sequence, to : to + high - low] = states[low:high, some]
                        self._waiting[sequence, to : to + high - low] = tokens[low:high]
                left = 0 if last < len(tokens) else MAX_NODES  # so many may wait for the first drafting round
                needed = max(needed, -(-(last - first - left) // MAX_NODES))
            for _ in range(needed):
                (self.absorb if absorb is None else absorb)()
        for sequence in texts:
            memory.taken_over(sequence)

    def absorb(self) -> None:
        """Take in each active sequence's oldest waiting pairs, 16 at most.

        Before `draft`, no more than 16 may wait, so that the last one is the pending token's.
        """
        rows, weights, pdl = self._taken, self.weights, self.pdl
        absorb_rows(
            self.sequences.active, self.sequences.base, self.lengths, self._waiting, MAX_NODES, rows, self._taken_ids,
            self._last_row, self._root, pdl=pdl,
        )  # fmt: skip
        context_rows(self._ring, rows, self._states, pdl=pdl)
        residual_linear(
            self._states, weights.fuse, None, None, self._contexts, rows, parts=self._absorbing.parts, pdl=pdl
        )
        contexts = self._contexts.view(-1, MAX_NODES, self._contexts.shape[1])
        self._run(self._absorbing, rows, self._taken_ids, self._taken_places, contexts)
        speech = self._root_speech
        leave_rows(
            self._absorbing.hidden, weights.gain, self._speaker.norm, rows, self._last_row, self._outputs, speech.x,
            speech.stats, pdl=pdl,
        )  # fmt: skip

    def draft(self, depth: int | None = None) -> None:
        """Grow each active sequence's tree below its root, `depth` levels at most; None: the shape's."""
        pool, speech, pdl = self.pool, self._speech, self.pdl
        self._speak(self._root_speech, self._root)
        self._grow(0, self._root_speech, depth)
        for step in range(1, self.shape.max_depth if depth is None else depth):
            self._run(self._growing, pool.rows, pool.tokens_of_rows, pool.parents_of_rows, self._outputs)
            leave_rows(
                self._growing.hidden, self.weights.gain, self._speaker.norm, pool.rows, None, self._outputs, speech.x,
                speech.stats, pdl=pdl,
            )  # fmt: skip
            self._speak(speech, pool.rows)
            self._grow(step, speech, depth)

    def keep(
        self, taps: Mapping[int, Tensor], record: Tensor, path_nodes: Tensor, num_path: Tensor, width: int
    ) -> None:
        """Let the accepted paths' states wait; after every verification, also of plain rounds.

        Args:
            taps: layer -> fp32 `[R, D]`, the full model's states of the verified rows.
            record, path_nodes, num_path: of `kernels/accept.py`.
            width: rows a sequence has in this verification.
        """
        states = [taps[layer] for layer in self.taps]
        keep_states(states, record, path_nodes, num_path, width, self._ring, self._waiting, pdl=self.pdl)

    def _run(self, on: _Pass, rows: Rows, ids: Tensor, places: Tensor, contexts: Tensor) -> None:
        """Entries of the rows; `on.hidden` holds their outputs then."""
        weights, pdl = self.weights, self.pdl
        enter_rows(
            ids, places, self._decoder.embedding, self._decoder._embed_scale, weights.token_norm, contexts,
            weights.context_norm, rows, on.both, pdl=pdl,
        )  # fmt: skip
        residual_linear(
            on.both, weights.join, None, None, on.hidden, rows, next_norms=((weights.layers[0].attn_norm, on.x),),
            stats=on.stats, means=False, parts=on.parts, pdl=pdl,
        )  # fmt: skip
        on.run(weights, self._cache, rows, on.stats, pdl=pdl)

    def _speak(self, on: Speech, rows: Rows) -> None:
        """Candidates after the rows."""
        config = self._decoder.config
        on.speak(
            self._speaker, rows, self._draft_ids, self._options, self._seeds, eps=config.norm_eps,
            softcap=config.logit_softcap, pdl=self.pdl,
        )  # fmt: skip

    def _grow(self, step: int, on: Speech, depth: int | None) -> None:
        grow_tree(step, on.ids, on.log_probs, on.entropies, self.pool, self.sequences, self.trees, depth, pdl=self.pdl)
