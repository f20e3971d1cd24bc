"""Text that the base model writes itself, in big batches: what heads are trained and calibrated on.

Throughput matters here and bits do not (this is not the decode step of the one rule): no tiles of 16, no trees. All
rows of a batch stand at the same position in every step, so attention needs no mask and no padding: rows are
sorted by prompt length, prefilled to the shortest prompt, and longer prompts are fed their own next token while others
already write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.model import Decoder
from .data import SelfText

PREFILL_ROWS = 65_536  # tokens per prefill call: bounds the activations


@dataclass(frozen=True)
class Sampling:
    """How text is written.

    Args:
        max_new_tokens: per prompt.
        stop_ids: token ids that end a text; the stop token is kept.
        cache_tokens: KV slots held at once; a batch has cache_tokens / (longest prompt + max_new_tokens) rows,
            at least one. Memory is 2 * L * KV * d numbers a slot.
        seed: of the sampled rows.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    cache_tokens: int = 32_768
    seed: int = 0


@torch.no_grad()
def write_text(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    sampling: Sampling,
    on_tokens: Callable[[int], None] | None = None,
) -> SelfText:
    """Continue every prompt.

    Args:
        prompts: token ids, none empty.
        temperatures: one a prompt; 0 is greedy.
        on_tokens: told how many new tokens each batch of steps wrote.

    Returns:
        Prompts and continuations in the order of `prompts`.
    """
    if any(not prompt for prompt in prompts) or len(temperatures) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, none empty, need as many temperatures, got {len(temperatures)}")
    generator = torch.Generator(decoder.device).manual_seed(sampling.seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts: list[list[int]] = [[] for _ in prompts]
    for members in _groups([(i, len(prompts[i])) for i in order], sampling):
        batch = _Batch(decoder, [prompts[i] for i in members], [temperatures[i] for i in members], sampling, generator)
        for i, text in zip(members, batch.run(on_tokens), strict=True):
            texts[i] = text
    return SelfText.of(texts, [len(prompt) for prompt in prompts], [t == 0.0 for t in temperatures])


def _groups(ordered: Sequence[tuple[int, int]], sampling: Sampling) -> list[list[int]]:
    """Split (index, prompt length), ascending in length, into batches that fit the cache."""
    groups: list[list[int]] = []
    for index, length in ordered:
        rows = sampling.cache_tokens // (length + sampling.max_new_tokens)
        if not groups or len(groups[-1]) >= rows:
            groups.append([])
        groups[-1].append(index)
    return groups


class _Batch:
    """One batch of rows, all at the same position. `alive` maps the rows still in the cache to batch members."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        temperatures: Sequence[float],
        sampling: Sampling,
        generator: torch.Generator,
    ) -> None:
        self.decoder, self.sampling, self.generator = decoder, sampling, generator
        config, device = decoder.config, decoder.device
        lens = [len(prompt) for prompt in prompts]
        self.capacity = min(max(lens) + sampling.max_new_tokens, config.max_context)
        if max(lens) >= self.capacity:
            raise ValueError(f"a prompt of {max(lens)} tokens leaves no room in a context of {config.max_context}")
        self.tokens = torch.zeros(len(prompts), self.capacity, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            self.tokens[row, : len(prompt)] = torch.tensor(prompt)
        self.tokens = self.tokens.to(device)
        self.prompt_lens = torch.tensor(lens, device=device)
        self.ends = (self.prompt_lens + sampling.max_new_tokens).clamp(
            max=self.capacity
        )  # exclusive, shrinks at a stop
        self.temperatures = torch.tensor(temperatures, device=device)
        self.is_sampled = any(temperatures)
        self.stops = torch.tensor(sampling.stop_ids, device=device)
        self.alive = torch.arange(len(prompts), device=device)
        self.shortest = min(lens)
        shape = len(prompts), config.num_kv_heads, self.capacity, config.head_dim
        self.keys = [torch.empty(shape, dtype=decoder.dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.empty(shape, dtype=decoder.dtype, device=device) for _ in range(config.num_layers)]

    def run(self, on_tokens: Callable[[int], None] | None) -> list[list[int]]:
        self._choose(self._prefill(), self.shortest)
        for position in range(self.shortest, self.capacity - 1):
            if (position - self.shortest) % 32 == 0 and not self._compact(position):
                break
            hidden = self.decoder.embed(self.tokens[self.alive, position])
            self._choose(self._step(hidden, position), position + 1)
        tokens, ends, lens = self.tokens.cpu(), self.ends.tolist(), self.prompt_lens.tolist()
        if on_tokens is not None:
            on_tokens(sum(ends) - sum(lens))
        return [tokens[row, :end].tolist() for row, end in enumerate(ends)]

    def _prefill(self) -> Tensor:
        """The shared first `shortest` positions of all rows; returns the last one's hidden state `[R, D]`."""
        length, last = self.shortest, []
        for rows in torch.arange(len(self.alive)).split(max(1, PREFILL_ROWS // length)):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            count = len(rows)

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, part: slice = part, count: int = count) -> Tensor:
                q, k, v = (
                    t.to(self.decoder.dtype).view(count, length, -1, t.shape[-1]).transpose(1, 2) for t in (q, k, v)
                )
                self.keys[layer][part, :, :length], self.values[layer][part, :, :length] = k, v
                out = self._attention(layer, q, k, v, causal=True)
                return out.transpose(1, 2).reshape(count * length, -1, out.shape[-1]).float()

            positions = torch.arange(length, device=self.decoder.device).repeat(count)
            hidden = self.decoder.embed(self.tokens[part, :length].reshape(-1))
            hidden = self.decoder.run_layers(hidden, 0, self.decoder.config.num_layers, positions, attend)
            last.append(hidden.view(count, length, -1)[:, -1].clone())
        return torch.cat(last)

    def _step(self, hidden: Tensor, position: int) -> Tensor:
        rows = len(hidden)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys[:, :, position], values[:, :, position] = k.to(keys.dtype), v.to(keys.dtype)
            window = self.decoder.config.windows[layer]
            seen = slice(0 if window is None else max(0, position + 1 - window), position + 1)
            # query heads of one KV head as rows of one query: each key is read once
            q = q.view(rows, keys.shape[1], -1, q.shape[-1]).to(keys.dtype)
            return (
                self._attention(layer, q, keys[:, :, seen], values[:, :, seen]).reshape(rows, -1, q.shape[-1]).float()
            )

        positions = torch.full((rows,), position, device=hidden.device)
        return self.decoder.run_layers(hidden, 0, self.decoder.config.num_layers, positions, attend)

    def _attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        config = self.decoder.config
        repeat = q.shape[1] // k.shape[1]
        window = config.windows[layer] if causal else None
        visible = None
        if window is not None and window < q.shape[2]:
            at = torch.arange(q.shape[2], device=q.device)
            visible = (at <= at.unsqueeze(1)) & (at > at.unsqueeze(1) - window)
        if config.attention_softcap is None:
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                visible,
                is_causal=causal and visible is None,
                scale=config.attention_scale,
                enable_gqa=repeat > 1,
            )
        if causal and visible is None:
            visible = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = (q * config.attention_scale) @ k.transpose(-1, -2)
        scores = config.attention_softcap * torch.tanh(scores.float() / config.attention_softcap)
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        return scores.softmax(-1).to(v.dtype) @ v

    def _choose(self, hidden: Tensor, position: int) -> None:
        """Write each row's token at `position`: its prompt's own, or a draw."""
        if position >= self.capacity:
            return
        logits = self.decoder.lm_head(self.decoder.final_norm(hidden)).float()
        if self.is_sampled:
            noise = torch.empty_like(logits).exponential_(generator=self.generator)
            noise = noise.clamp_(min=1e-10).log_().neg_()  # a draw of 0 would give inf, and NaN at temperature 0
            # argmax(logits + T g) with Gumbel noise g draws from softmax(logits / T), and is greedy at T = 0
            logits = logits.addcmul_(noise, self.temperatures[self.alive].unsqueeze(1))
        drawn = logits.argmax(-1)
        writes = (position >= self.prompt_lens[self.alive]) & (position < self.ends[self.alive])
        self.tokens[self.alive, position] = torch.where(writes, drawn, self.tokens[self.alive, position])
        stopped = writes & torch.isin(drawn, self.stops)
        ends = self.ends[self.alive]
        self.ends[self.alive] = torch.where(stopped, ends.clamp(max=position + 1), ends)

    def _compact(self, position: int) -> bool:
        """Drop finished rows from the cache once they are a quarter of it. False when none is left."""
        live = self.ends[self.alive] > position + 1
        count = int(live.sum())
        if count == 0:
            return False
        if count <= 0.75 * len(live):
            keep = live.nonzero().squeeze(1)
            for cache in (self.keys, self.values):
                for layer, tensor in enumerate(cache):
                    cache[layer] = tensor[keep]
            self.alive = self.alive[keep]
        return True
