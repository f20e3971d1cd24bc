"""Text that the base model writes itself: what heads are trained and calibrated on.

Throughput matters here and bits do not (this is not the decode step of the one rule): no tiles of 16, no trees, but
continuous batching. A fixed number of slots, each with its own position and its own KV region; a slot whose text has
ended takes the next prompt. All state of a step lives on the device, so on a GPU the step is one CUDA graph,
replayed some times between two looks of the host.

A text is a function of its prompt, its temperature, the seed and its index (noise is keyed by position, see
`kernels/noise.py`), and of its company only as far as the last bits of a product depend on the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.model import Decoder
from ..kernels.attention import full_attention
from ..kernels.gumbel_argmax import gumbel_argmax
from ..kernels.noise import derive_seeds
from ..kernels.ragged_attention import ragged_attention
from .data import SelfText, plan_batches

PREFILL_TOKENS = 16_384  # of a prefill call, filling included: bounds the activations
LOGITS_AT_ONCE = 1 << 27  # numbers; rows beyond are projected in a second call
MAX_ROWS = 4_096  # more rows raise memory, hardly throughput
REPLAYS = 16  # steps between two looks of the host on a GPU
CPU_STEPS = 1  # the same on the CPU, where a look costs nothing
CPU_CACHE_TOKENS = 32_768


@dataclass(frozen=True)
class Sampling:
    """How text is written.

    Args:
        max_new_tokens: per prompt.
        stop_ids: token ids that end a text; the stop token is kept.
        cache_tokens: KV slots held at once, for cache_tokens / (longest prompt + max_new_tokens) rows, at least one.
            Memory is 2 * L * KV * d numbers a slot. None: half of a GPU's free memory, 32,768 on the CPU.
        seed: of the sampled rows.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    cache_tokens: int | None = None
    seed: int = 0


@torch.no_grad()
def write_text(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    sampling: Sampling,
    on_tokens: Callable[[int], None] | None = None,
    keep_going: Callable[[], bool] | None = None,
    numbers: Sequence[int] | None = None,
) -> SelfText:
    """Continue every prompt.

    Args:
        prompts: token ids, none empty.
        temperatures: one a prompt; 0 is greedy.
        on_tokens: told how many new tokens were written since the last call.
        keep_going: asked before prompts are begun. Once it says no, texts under way are finished and prompts not yet
            begun are left out of the result; prompts are begun in their order.
        numbers: each prompt's index in the whole, where these are a part of it; noise is keyed by it.

    Returns:
        Prompts and continuations in the order of `prompts`.

    Raises:
        ValueError: an empty prompt, a prompt that fills the context, or another number of temperatures.
    """
    if any(not prompt for prompt in prompts) or len(temperatures) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, none empty, need as many temperatures, got {len(temperatures)}")
    longest = max((len(prompt) for prompt in prompts), default=0)
    capacity = min(longest + sampling.max_new_tokens, decoder.config.max_context)
    if longest >= capacity:
        raise ValueError(f"a prompt of {longest} tokens leaves no room in a context of {decoder.config.max_context}")
    cache_tokens = sampling.cache_tokens or cache_that_fits(decoder)
    slots = _Slots(decoder, min(len(prompts), MAX_ROWS, max(1, cache_tokens // capacity)), capacity, sampling)
    seeds = derive_seeds(sampling.seed, len(prompts) if numbers is None else max(numbers, default=0) + 1)
    seeds = seeds if numbers is None else seeds[list(numbers)]
    texts: dict[int, Tensor] = {}
    begun = 0
    while True:
        if keep_going is not None and begun < len(prompts) and not keep_going():
            prompts = prompts[:begun]
        free = slots.free()
        # a few prompts at a time would leave the device idle between small launches
        if begun < len(prompts) and len(free) >= -(-slots.num_rows // 8):
            members = list(range(begun, min(len(prompts), begun + len(free))))
            slots.fill(free, members, prompts, temperatures, seeds)
            begun += len(members)
        if begun == len(prompts) and not slots.shrink():
            break
        written = slots.run()
        texts.update(slots.finished())
        if on_tokens is not None:
            on_tokens(written)
    lens = [len(prompt) for prompt in prompts]
    return SelfText.join([texts[i] for i in range(begun)], lens, [t == 0.0 for t in temperatures[:begun]])


def cache_that_fits(decoder: Decoder) -> int:
    """KV slots where `Sampling.cache_tokens` is None."""
    config = decoder.config
    if decoder.device.type != "cuda":
        return CPU_CACHE_TOKENS
    slot = 2 * config.num_layers * config.num_kv_heads * config.head_dim * decoder.dtype.itemsize
    return int(torch.cuda.mem_get_info(decoder.device)[0] // 2 // slot)


class _Slots:
    """The rows of the batch. A slot without a text stands at position 0, where a step costs it next to nothing.

    Attributes (all on the device, R slots, C capacity):
        token, position: long `[R]`, what the next step feeds, and where.
        length, end: long `[R]`, tokens of the text so far, and where it ends at the latest.
        alive: bool `[R]`, the text goes on.
        texts: int32 `[R, C + 1]`; the last column takes what slots without a text write.
        keys, values: `[R, KV, C, d]` a layer.
    """

    def __init__(self, decoder: Decoder, num_rows: int, capacity: int, sampling: Sampling) -> None:
        self.decoder, self.num_rows, self.capacity, self.sampling = decoder, num_rows, capacity, sampling
        config, device = decoder.config, decoder.device
        self.members: list[int | None] = [None] * num_rows  # which text a slot holds
        self.token, self.position, self.length, self.end, self.seed = torch.zeros(
            5, num_rows, dtype=torch.long, device=device
        ).unbind()
        self.alive = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.temperature = torch.zeros(num_rows, device=device)
        self.texts = torch.zeros(num_rows, capacity + 1, dtype=torch.int32, device=device)
        self.stops = torch.tensor(sampling.stop_ids, dtype=torch.long, device=device)
        shape = num_rows, config.num_kv_heads, capacity, config.head_dim
        # zeros: PyTorch's attention multiplies what it masks by 0, so it must be finite
        self.keys, self.values = (
            [torch.zeros(shape, dtype=decoder.dtype, device=device) for _ in range(config.num_layers)] for _ in range(2)
        )
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            decoder.reserve_rotary(config.max_context + 16)

    def free(self) -> list[int]:
        return [slot for slot, member in enumerate(self.members) if member is None]

    def fill(
        self,
        free: Sequence[int],
        members: Sequence[int],
        prompts: Sequence[Sequence[int]],
        temperatures: Sequence[float],
        seeds: Tensor,
    ) -> None:
        """Give texts `members` to free slots: all of a prompt but its last token is prefilled, that one is fed next."""
        device = self.decoder.device
        lens = [len(prompts[i]) for i in members]
        for group in plan_batches(lens, max(PREFILL_TOKENS, *lens), None):
            chosen = [members[j] for j in group]
            slots = torch.tensor([free[j] for j in group], device=device)
            rows = [torch.tensor(prompts[i]) for i in chosen]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
            ends = torch.tensor([lens[j] for j in group], device=device)
            self.texts[slots, : ids.shape[1]] = ids.int()
            self.token[slots] = ids.gather(1, ends.unsqueeze(1) - 1).squeeze(1)
            self.position[slots] = ends - 1
            self.length[slots] = ends
            self.end[slots] = (ends + self.sampling.max_new_tokens).clamp(max=self.capacity)
            self.temperature[slots] = torch.tensor([float(temperatures[i]) for i in chosen], device=device)
            self.seed[slots] = seeds[chosen].to(device)
            self.alive[slots] = True
            if ids.shape[1] > 1:
                self._prefill(slots, ids[:, :-1])
            for j in group:
                self.members[free[j]] = members[j]

    def run(self) -> int:
        """Some steps; the tokens that they wrote."""
        before = int(self.length[self.alive].sum())
        was_alive = self.alive.clone()
        if self.decoder.device.type != "cuda":
            for _ in range(CPU_STEPS):
                self._step()
        else:
            if self.graph is None:
                self._step()  # compiles kernels, which a capture cannot
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self._step()
            for _ in range(REPLAYS):
                self.graph.replay()
        return int(self.length[was_alive].sum()) - before

    def finished(self) -> dict[int, Tensor]:
        """Texts that have ended, member -> int32 `[T]` on the CPU; their slots are free again."""
        alive, lens = self.alive.tolist(), self.length.tolist()
        done = [slot for slot, member in enumerate(self.members) if member is not None and not alive[slot]]
        if not done:
            return {}
        rows = self.texts[torch.tensor(done, device=self.decoder.device)].cpu()
        found: dict[int, Tensor] = {}
        for slot, row in zip(done, rows, strict=True):
            member = self.members[slot]
            assert member is not None
            found[member] = row[: lens[slot]].clone()
            self.members[slot] = None
        return found

    def shrink(self) -> bool:
        """With no prompt left, drop slots without a text once they are many. False when none holds a text."""
        held = [slot for slot, member in enumerate(self.members) if member is not None]
        # on a GPU another number of rows is another graph, so only a quarter is worth it
        if held and len(held) <= self.num_rows * (0.25 if self.decoder.device.type == "cuda" else 0.75):
            index = torch.tensor(held, device=self.decoder.device)
            for name in ("token", "position", "length", "end", "seed", "alive", "temperature", "texts"):
                setattr(self, name, getattr(self, name)[index])
            for cache in (self.keys, self.values):
                for layer, tensor in enumerate(cache):
                    cache[layer] = tensor[: len(held)].copy_(tensor[index])
            self.members = [self.members[slot] for slot in held]
            self.num_rows, self.graph = len(held), None
        return bool(held)

    def _step(self) -> None:
        """One token for every slot. Nothing here may ask the device for a value: it is captured."""
        decoder = self.decoder
        hidden = decoder.embed(self.token)
        hidden = decoder.run_layers(hidden, 0, decoder.config.num_layers, self.position, self._attend)
        at = self.position + 1
        drawn = self._choose(decoder.final_norm(hidden), at)
        column = torch.where(self.alive, at, self.capacity)
        self.texts.scatter_(1, column.unsqueeze(1), drawn.int().unsqueeze(1))
        self.length.copy_(torch.where(self.alive, at + 1, self.length))
        self.alive &= ~((drawn.unsqueeze(1) == self.stops).any(1) | (at + 1 >= self.end))
        self.position.copy_(torch.where(self.alive, at, 0))
        self.token.copy_(drawn)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        config = self.decoder.config
        return ragged_attention(
            q, k, v, self.keys[layer], self.values[layer], self.position,
            config.attention_scale, config.windows[layer], config.attention_softcap,
        )  # fmt: skip

    def _choose(self, normed: Tensor, at: Tensor) -> Tensor:
        step = max(1, LOGITS_AT_ONCE // self.decoder.config.vocab_size)
        parts = [slice(first, first + step) for first in range(0, self.num_rows, step)]
        logits = (self.decoder.lm_head(normed[part]) for part in parts)
        drawn = [
            gumbel_argmax(x, self.temperature[part], self.seed[part], at[part])
            for x, part in zip(logits, parts, strict=True)
        ]
        return drawn[0] if len(drawn) == 1 else torch.cat(drawn)

    def _prefill(self, slots: Tensor, ids: Tensor) -> None:
        """Keys and values of `ids [N, T]`, filled up on the right: what stands beyond a prompt is overwritten before
        any row sees it."""
        decoder, config = self.decoder, self.decoder.config
        count, length = ids.shape

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.to(decoder.dtype).view(count, length, -1, t.shape[-1]).transpose(1, 2) for t in (q, k, v))
            self.keys[layer][slots, :, :length], self.values[layer][slots, :, :length] = k, v
            window, softcap = config.windows[layer], config.attention_softcap
            out = full_attention(q, k, v, config.attention_scale, window=window, softcap=softcap)
            return out.transpose(1, 2).reshape(count * length, -1, config.head_dim)

        positions = torch.arange(length, device=ids.device).repeat(count)
        decoder.run_layers(decoder.embed(ids.reshape(-1)), 0, config.num_layers, positions, attend)
