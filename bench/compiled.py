"""Greedy decoding through torch.compile over a static cache, a token a CUDA graph: a user's loop without an engine.

gpt-fast's scheme with draw and counters inside the graph, so that the host does nothing but replay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.config import ModelConfig
from ..engine.engine import Engine
from ..engine.model import Decoder
from ..engine.pretrained import Pretrained
from .arms import PLAIN_ARM, Outcome
from .device_time import capture

# Roundings of bf16 on random weights of a real model's shape give 0.02; a wrong mask, rope or layout an error near 1.
TOLERANCE = 0.05
LEAST_CONTEXT = 512  # slots of a cache; they double from here, for attention reads all of them at every token


class StaticDecoder(torch.nn.Module):
    """A Llama or Qwen2 over a static KV cache, for torch.compile: fixed shapes, no branches, nothing read back.

    Args:
        config: of a model with RMSNorm, rotary positions, gated MLP and full attention.
        weights: canonical, on their device, in the dtype to compute in.
        context: slots of the cache.

    Raises:
        ValueError: a config with more to it than that.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], context: int) -> None:
        super().__init__()
        if config.family not in ("llama", "qwen2") or any(config.windows) or len(set(config.ropes)) > 1:
            raise ValueError(f"a {config.family} model of this kind is not written here; expected a Llama or Qwen2")
        self.config = config
        embedding = weights["embed.weight"]
        slots = torch.arange(context, device=embedding.device)
        frequencies = torch.tensor(config.ropes[0].inv_freq, device=embedding.device)
        angles = torch.outer(slots.float(), frequencies).repeat(1, 2)
        buffers = {"slots": slots, "cos": angles.cos(), "sin": angles.sin(), **weights}
        for index in range(config.num_layers):  # one buffer a layer: a mutated view of a larger one may be copied whole
            for name in ("k_cache", "v_cache"):
                cache = embedding.new_zeros(config.num_kv_heads, context, config.head_dim)
                buffers[f"layers.{index}.{name}"] = cache
        for name, buffer in buffers.items():
            self.register_buffer(name.replace(".", "_"), buffer, persistent=False)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Token ids and absolute positions, long `[T]` each -> logits `[T, V]`; their keys and values are cached."""
        config, hidden = self.config, self._get("embed.weight")[ids]
        rotary = self._get("cos")[positions].unsqueeze(1), self._get("sin")[positions].unsqueeze(1)
        # A KV head's queries are rows of one product: no copy of keys for each query head.
        visible = (self._get("slots") <= positions.unsqueeze(1)).repeat(config.group_size, 1)
        for index in range(config.num_layers):
            at = f"layers.{index}."
            normed = self._norm(hidden, f"{at}attn_norm")
            hidden = hidden + self._attention(normed, at, positions, rotary, visible)
            gate, up = self._linear(self._norm(hidden, f"{at}mlp_norm"), f"{at}up").chunk(2, -1)
            hidden = hidden + self._linear(F.silu(gate) * up, f"{at}down")
        return self._linear(self._norm(hidden, "final_norm"), "embed" if config.tied_head else "lm_head")

    def next_token(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The likeliest token after each row, long `[T]`."""
        return self(ids, positions).argmax(-1)

    def _attention(
        self, x: Tensor, at: str, positions: Tensor, rotary: tuple[Tensor, Tensor], visible: Tensor
    ) -> Tensor:
        config, rows = self.config, len(x)
        heads, kv = config.num_heads, config.num_kv_heads
        q, k, v = self._linear(x, f"{at}qkv").view(rows, -1, config.head_dim).split([heads, kv, kv], 1)
        q, k = _rotate(q, *rotary), _rotate(k, *rotary)
        keys, values = self._get(f"{at}k_cache"), self._get(f"{at}v_cache")
        keys[:, positions] = k.transpose(0, 1)
        values[:, positions] = v.transpose(0, 1)
        grouped = q.view(rows, kv, config.group_size, -1).permute(1, 2, 0, 3).reshape(1, kv, -1, config.head_dim)
        out = F.scaled_dot_product_attention(
            grouped, keys.unsqueeze(0), values.unsqueeze(0), attn_mask=visible, scale=config.attention_scale
        )
        out = out.view(kv, config.group_size, rows, -1).permute(2, 0, 1, 3).reshape(rows, -1)
        return self._linear(out, f"{at}o")

    def _get(self, name: str) -> Any:
        return getattr(self, name.replace(".", "_"), None)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._get(f"{name}.weight"), self._get(f"{name}.bias"))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config.norm_eps)
        return (wide * scale).to(x.dtype) * self._get(f"{name}.weight")


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


class CompiledLoop:
    """Greedy decoding of one sequence whose step is compiled; `self.new` holds the tokens.

    Args:
        decoder: on the GPU.
        prompt: long `[T]`, to warm up with.
        num_new: most tokens to write.
        in_graph: the step, the draw and the counters in one CUDA graph; False runs torch.compile's own graphs from
            Python.
    """

    def __init__(self, decoder: StaticDecoder, prompt: Tensor, num_new: int, in_graph: bool) -> None:
        from torch._inductor import config as inductor_config

        self.decoder, self.prompt = decoder, prompt
        self.token, self.position, self.index = (prompt.new_zeros(1) for _ in range(3))
        self.new = prompt.new_zeros(num_new)
        inductor_config.coordinate_descent_tuning = True  # as gpt-fast sets it
        mode = None if in_graph else "reduce-overhead"
        self.next_token = torch.compile(decoder.next_token, mode=mode, fullgraph=True, dynamic=False)
        self.read_prompt()
        self.graph = capture(self._step) if in_graph else None
        for _ in range(3):
            self.advance()

    def read_prompt(self) -> None:
        """Fill the cache and draw the first token, not compiled."""
        tokens = self.decoder.next_token(self.prompt, torch.arange(len(self.prompt), device=self.prompt.device))
        self.token.copy_(tokens[-1:])
        self.position.fill_(len(self.prompt))
        self.index.fill_(1)
        self.new[:1].copy_(self.token)

    def advance(self) -> None:
        """One more token."""
        if self.graph is not None:
            self.graph.replay()
            return
        torch.compiler.cudagraph_mark_step_begin()
        self._step()

    def _step(self) -> None:
        token = self.next_token(self.token, self.position)
        self.new.index_copy_(0, self.index, token)
        self.token.copy_(token)
        self.position.add_(1)
        self.index.add_(1)

    def token_us(self) -> float:
        """Wall time a token, from the first to the last."""
        self.read_prompt()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(len(self.new) - 1):
            self.advance()
        torch.cuda.synchronize()
        return 1e6 * (time.perf_counter() - start) / (len(self.new) - 1)

    def write(self, prompt: Tensor, num_new: int, stop_ids: Collection[int]) -> tuple[list[int], float]:
        """Tokens up to a stop id, and the seconds from the first to the last of them.

        The host looks at a token while the next one is on its way, so it waits for none; what was begun behind a stop
        id is dropped.
        """
        on_gpu, self.prompt = prompt.is_cuda, prompt
        seen = torch.zeros(num_new, dtype=self.new.dtype, pin_memory=on_gpu)
        events = [torch.cuda.Event() for _ in range(num_new if on_gpu else 0)]
        self.read_prompt()
        tokens, launched = [int(self.token)], 1
        start = end = time.perf_counter()
        while len(tokens) < num_new and tokens[-1] not in stop_ids:
            while launched < min(num_new, len(tokens) + 2):
                self.advance()
                seen[launched : launched + 1].copy_(self.token, non_blocking=True)
                if on_gpu:
                    events[launched].record()
                launched += 1
            if on_gpu:
                events[len(tokens)].synchronize()
            tokens.append(int(seen[len(tokens)]))
            end = time.perf_counter()
        if on_gpu:
            torch.cuda.synchronize()
        return tokens, end - start


@torch.no_grad()
def check(decoder: StaticDecoder, reference: Any, prompt: Tensor) -> float:
    """Relative error of the static decoder's logits against transformers', prompt and one cached step.

    Raises:
        RuntimeError: they are not the same model.
    """
    return differ(decoder, reference(prompt.unsqueeze(0)).logits[0], prompt)


@torch.no_grad()
def differ(decoder: StaticDecoder, expected: Tensor, prompt: Tensor) -> float:
    """As `check`, against logits `[T, V]`."""
    expected = expected.float()
    positions = torch.arange(len(prompt), device=prompt.device)
    found = torch.cat([decoder(prompt[:-1], positions[:-1]), decoder(prompt[-1:], positions[-1:])]).float()
    error = float((found - expected).norm() / expected.norm())
    if not error < TOLERANCE:
        raise RuntimeError(f"the static decoder's logits are wrong by {error:.3g}, not timing them")
    return error


def same_model(config: ModelConfig, weights: Mapping[str, Tensor]) -> float:
    """Relative error of the static decoder's logits against our decoder's, both of these weights in fp32.

    In bf16 trained weights make rows of unusual tokens differ by as much as a wrong model does: the static decoder's
    residual stream is bf16, ours fp32 (SmolLM2-135M on tokens 3 to 39, CPU: 0.38, and 2e-5 in fp32).

    Raises:
        RuntimeError: they are not the same model.
    """
    wide = {name: weight.float() for name, weight in weights.items()}
    device, last = wide["embed.weight"].device, config.num_layers
    own, prompt = Decoder(config, wide, torch.float32, device), torch.arange(3, 40, device=device)
    with torch.inference_mode():
        hidden = own.encode(prompt.unsqueeze(0), [last])[last][0]
        return differ(StaticDecoder(config, wide, LEAST_CONTEXT), own.lm_head(own.final_norm(hidden)), prompt)


class CompiledArm:
    """The loop as a baseline: one compiled and captured step for each size of the cache, made where it is first needed
    and not timed.

    Args:
        loaded: whose weights.
        engine: of the same model, on a GPU.
    """

    name, lossless, plain = "compile", False, PLAIN_ARM

    def __init__(self, loaded: Pretrained, engine: Engine) -> None:
        device = engine.decoder.device
        self.engine, self.config = engine, loaded.config
        self.weights = {name: weight.to(device, engine.decoder.dtype) for name, weight in loaded.weights.items()}
        self._loops: dict[int, CompiledLoop] = {}
        self._make: Callable[..., CompiledLoop] = partial(CompiledLoop, in_graph=True)

    def run(self, prompt_ids: list[int], sampling: Mapping[str, Any]) -> Outcome:
        if sampling.get("temperature"):
            raise ValueError(f"baseline 'compile' is greedy, temperature is {sampling['temperature']}: leave one out")
        num_new, tokenizer = int(sampling["max_new_tokens"]), self.engine.tokenizer
        with torch.no_grad(), self.engine.here():
            loop = self._loop(len(prompt_ids) + num_new)
            start = time.perf_counter()
            prompt = torch.tensor(prompt_ids, device=self.engine.decoder.device)
            stop_ids = () if tokenizer is None else tokenizer.stop_ids
            token_ids, seconds = loop.write(prompt, num_new, stop_ids)
        wall = time.perf_counter() - start
        text = "" if tokenizer is None else tokenizer.decode(token_ids)
        return Outcome(text, token_ids, 1e3 * wall, 1e3 * seconds, len(token_ids) - 1)

    def describe(self) -> dict[str, Any]:
        return {"program": "torch.compile", "graph": True, "caches": sorted(self._loops)}

    def _loop(self, tokens: int) -> CompiledLoop:
        context = LEAST_CONTEXT
        while context < tokens:
            context *= 2
        found = self._loops.get(context)
        if found is None:
            if not self._loops:
                same_model(self.config, self.weights)
            decoder = StaticDecoder(self.config, self.weights, context)
            prompt = torch.arange(3, 40, device=self.engine.decoder.device)
            self._loops[context] = found = self._make(decoder, prompt, context)
        return found
