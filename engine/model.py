"""The decoder: one config-driven transformer whose attention is a strategy.

`run_layers` is the core. It owns norms, projections, rotary and MLP; what a row attends to (a decode step, a prefill
chunk, a whole training sequence) is the caller's `attend`, and a caller may bring its own `mlp` (one that watches or
skips neurons). An exit is a smaller `stop`. The residual stream is fp32, matmuls run in the model's dtype with fp32
accumulation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.attention import full_attention
from ..kernels.huge_pages import settle
from ..kernels.linear import PackedLinear
from .config import ModelConfig, RopeSpec

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Mlp = Callable[[int, Tensor], Tensor]


class Norm:
    """RMSNorm or LayerNorm over the last axis, in fp32."""

    def __init__(self, config: ModelConfig, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight.float() + config.norm_offset
        self.bias = None if bias is None else bias.float()
        self.eps = config.norm_eps
        self.layer_norm = config.norm == "layer"
        # x / rms(x) * w = x / sqrt(sum(x^2) + D eps) * (w sqrt(D)). Constants are tensors: a Python number in an
        # operation is converted at each call, which for one row costs more than the operation.
        self._floor = self.weight.new_full((1,), self.weight.numel() * self.eps)
        self._scaled_weight = self.weight * self.weight.numel() ** 0.5

    def __call__(self, x: Tensor) -> Tensor:
        if self.layer_norm:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        if x.is_cuda:  # one kernel where the lines below are six
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # Spelled out: torch's rms_norm takes three times as long for a single row on the CPU.
        scale = (x * x).sum(-1, keepdim=True).add_(self._floor).rsqrt_()
        return (x * scale).mul_(self._scaled_weight)


class Layer:
    """One transformer layer's parameters; absent parts are None."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], index: int) -> None:
        prefix = f"layers.{index}."

        def norm(name: str, own: ModelConfig = config) -> Norm | None:
            weight = weights.get(f"{prefix}{name}.weight")
            return None if weight is None else Norm(own, weight, weights.get(f"{prefix}{name}.bias"))

        def linear(name: str) -> PackedLinear:
            return PackedLinear(weights[f"{prefix}{name}.weight"], weights.get(f"{prefix}{name}.bias"))

        self.attn_norm, self.mlp_norm = norm("attn_norm"), norm("mlp_norm")
        self.attn_post_norm, self.mlp_post_norm = norm("attn_post_norm"), norm("mlp_post_norm")
        self.q_norm, self.k_norm = norm("q_norm"), norm("k_norm")
        self.qkv, self.o, self.up, self.down = linear("qkv"), linear("o"), linear("up"), linear("down")


class Decoder:
    """A decoder-only model.

    Args:
        config: sizes and family differences.
        weights: canonical names -> tensors (see `engine/weights.py`); converted to `dtype` on `device`.
        dtype: torch.float32, bfloat16 or float16: weights and matmuls.
        device: where it runs.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        weights = {name: tensor.to(self.device, dtype) for name, tensor in weights.items()}
        self.embedding = weights["embed.weight"]
        self.head_weight = weights.get("lm_head.weight", self.embedding)
        self.layers = [Layer(config, weights, i) for i in range(config.num_layers)]
        self._final_norm = Norm(config, weights["final_norm.weight"], weights.get("final_norm.bias"))
        self.output = PackedLinear(self.head_weight, weights.get("lm_head.bias"))
        # Gemma multiplies embeddings by sqrt(D) rounded to the model's dtype, as transformers does.
        self._embed_scale = float(torch.tensor(config.embed_scale, dtype=dtype)) if config.embed_scale != 1.0 else 1.0
        self._activation = (FUSED_ACTIVATIONS if self.device.type == "cuda" else ACTIVATIONS)[config.activation]
        self._one = torch.ones(1, device=self.device)
        # Products in half precision go into fp32 arithmetic as they are: a GPU's operations widen what they read, which
        # gives the bits of a copy made first and saves its launch. On the CPU torch makes that copy all the same.
        self._widens = self.device.type == "cuda"
        projections = [p for layer in self.layers for p in (layer.qkv, layer.o, layer.up, layer.down)]
        settle(projection.weight for projection in (*projections, self.output))
        self._tables: dict[RopeSpec, tuple[Tensor, Tensor]] = {}
        self._rope_rows = 0

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids long `[N]` -> residual stream `[N, D]` fp32."""
        hidden = self.embedding[ids].float()
        return hidden * self._embed_scale if self._embed_scale != 1.0 else hidden

    def run_layers(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        positions: Tensor,
        attend: Attend,
        taps: dict[int, Tensor] | None = None,
        mlp: Mlp | None = None,
    ) -> Tensor:
        """Run layers start..stop-1.

        Args:
            hidden: residual stream `[N, D]` fp32 after `start` layers.
            start, stop: 0 <= start <= stop <= num_layers.
            positions: absolute position of each row, long `[N]`.
            attend: `(layer, q [N, H, d], k [N, KV, d], v [N, KV, d]) -> [N, H, d]`; q and k are fp32, v and the result
                fp32 or the model's dtype.
            taps: exit layers in start + 1..stop as keys; each value is replaced by the residual stream `[N, D]` there.
            mlp: `(layer, normed [N, D] fp32) -> [N, D]` in place of the model's own (`Decoder.mlp`).

        Returns:
            The residual stream `[N, D]` fp32 after `stop` layers.
        """
        rotary, mlp = self.rotary(positions), mlp or self.mlp
        for index in range(start, stop):
            layer, spec = self.layers[index], self.config.ropes[index]
            normed = layer.attn_norm(hidden) if layer.attn_norm else hidden
            attended = self._attention(layer, index, normed, rotary[spec], attend)
            if self.config.parallel_residual:
                assert layer.mlp_norm is not None
                hidden = hidden + attended + mlp(index, layer.mlp_norm(hidden))
            else:
                hidden = hidden + (layer.attn_post_norm(attended.float()) if layer.attn_post_norm else attended)
                out = mlp(index, layer.mlp_norm(hidden) if layer.mlp_norm else hidden)
                hidden = hidden + (layer.mlp_post_norm(out.float()) if layer.mlp_post_norm else out)
            if taps is not None and index + 1 in taps:
                taps[index + 1] = hidden
        return hidden

    def final_norm(self, hidden: Tensor) -> Tensor:
        """Residual stream `[N, D]` fp32 -> normed `[N, D]` in the model's dtype."""
        return self._final_norm(hidden).to(self.dtype)

    def lm_head(self, normed: Tensor) -> Tensor:
        """Normed rows `[N, D]` -> logits `[N, V]` in the model's dtype, soft-capped where the family does."""
        return self.cap_logits(self.output(normed))

    def cap_logits(self, logits: Tensor) -> Tensor:
        """The family's soft-cap on logits, or the logits themselves."""
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits.float() / cap)

    def encode(self, ids: Tensor, at: Sequence[int], mlp: Mlp | None = None) -> dict[int, Tensor]:
        """Causal forward over whole sequences, for training and calibration; decoding never uses it.

        Args:
            ids: long `[B, T]`.
            at: exit layers whose residual stream is wanted; num_layers is the final norm's input.
            mlp: as in `run_layers`.

        Returns:
            exit layer -> `[B, T, D]` fp32.
        """
        batch, length = ids.shape
        positions, attend = self.whole_texts(batch, length)
        hidden, done, states = self.embed(ids.reshape(-1)), 0, {}
        for stop in sorted(set(at)):
            hidden, done = self.run_layers(hidden, done, stop, positions, attend, mlp=mlp), stop
            states[stop] = hidden.view(batch, length, -1)
        return states

    def whole_texts(self, batch: int, length: int) -> tuple[Tensor, Attend]:
        """Positions and causal attention of `batch` texts of `length` tokens each, as `run_layers` takes them."""
        positions, config = torch.arange(length, device=self.device).repeat(batch), self.config

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.to(self.dtype).view(batch, length, -1, t.shape[-1]).transpose(1, 2) for t in (q, k, v))
            window, cap = config.windows[index], config.attention_softcap
            out = full_attention(q, k, v, config.attention_scale, window=window, softcap=cap)
            return out.transpose(1, 2).reshape(batch * length, -1, config.head_dim)

        return positions, attend

    def rotary(self, positions: Tensor) -> dict[RopeSpec, tuple[Tensor, Tensor]]:
        """cos and signed sin of each row, `[N, 1, rotary_dim]` fp32 for each distinct rope of the model.

        Tables grow with the positions asked for; with a full one (`reserve_rotary`) the device is not waited for.
        """
        if self._rope_rows < self.config.max_context + 16:
            self.reserve_rotary(int(positions.max()) + 1)
        return {s: (cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)) for s, (cos, sin) in self._tables.items()}

    def reserve_rotary(self, rows: int) -> None:
        """Make the rotary tables reach `rows` positions. Made in fp64, so a position always reads the same numbers."""
        if rows <= self._rope_rows:
            return
        self._rope_rows = max(rows, min(self.config.max_context + 16, 2 * rows + 1024))
        for spec in set(self.config.ropes):
            angles = torch.outer(
                torch.arange(self._rope_rows, dtype=torch.float64), torch.tensor(spec.inv_freq, dtype=torch.float64)
            )
            cos, sin = angles.cos() * spec.attention_factor, angles.sin() * spec.attention_factor
            table = torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)
            self._tables[spec] = table[0].float().to(self.device), table[1].float().to(self.device)

    def _attention(
        self, layer: Layer, index: int, normed: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend
    ) -> Tensor:
        config = self.config
        num_rows, num_q, num_kv = normed.shape[0], config.num_heads, config.num_kv_heads
        qkv = self._wide(layer.qkv(normed.to(self.dtype))).view(num_rows, num_q + 2 * num_kv, config.head_dim)
        qk, v = qkv.split_with_sizes((num_q + num_kv, num_kv), 1)
        if layer.q_norm is not None and layer.k_norm is not None:
            qk = qk.float()
            qk = torch.cat([layer.q_norm(qk[:, :num_q]), layer.k_norm(qk[:, num_q:])], 1)
        q, k = _rotate(qk, *rotary).split_with_sizes((num_q, num_kv), 1)
        out = attend(index, q, k, v)
        return self._wide(layer.o(out.reshape(num_rows, -1).to(self.dtype)))

    def mlp(self, index: int, normed: Tensor) -> Tensor:
        """A layer's MLP: normed rows `[N, D]` fp32 -> `[N, D]`."""
        layer = self.layers[index]
        return self.from_neurons(layer.down, self.neurons(layer.up, normed))

    def neurons(self, up: PackedLinear, normed: Tensor) -> Tensor:
        """Neurons `[N, F]` fp32 of an MLP whose up projection (gate rows first, where it has a gate) is `up`."""
        hidden = self._wide(up(normed.to(self.dtype)))
        if self.config.gated_mlp:
            gate, hidden = hidden.chunk(2, -1)
            return self._activation(gate.float(), self._one).mul_(hidden)
        return self._activation(hidden.float(), self._one)

    def from_neurons(self, down: PackedLinear, neurons: Tensor) -> Tensor:
        """Neurons `[N, F]` fp32 -> the MLP's output `[N, D]`."""
        return self._wide(down(neurons.to(self.dtype)))

    def _wide(self, product: Tensor) -> Tensor:
        """A product's output as fp32 arithmetic takes it."""
        return product if self._widens else product.float()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first rotary_dim places of each head, fp32; pairs are (i, i + rotary_dim / 2)."""
    width = cos.shape[-1]
    head = x if width == x.shape[-1] else x[..., :width]
    rolled = head.roll(width // 2, -1)
    turned = (head * cos).add_(rolled.mul_(sin) if rolled.dtype == sin.dtype else rolled * sin)
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], -1)


# Activations (of x and a tensor that holds 1) are spelled with operations whose vector and scalar forms agree to the
# bit: torch's fused SiLU and GELU give an element other bits at the ragged end of a vectorised loop than in its
# middle (measured, CPU), so a row's result would depend on its place.


def _silu(x: Tensor, one: Tensor) -> Tensor:
    return x / x.neg().exp_().add_(one)


def _gelu_tanh(x: Tensor, one: Tensor) -> Tensor:
    inner = (x * x).mul_(x).mul_(0.044715).add_(x).mul_(0.7978845608028654)
    return inner.tanh_().add_(one).mul_(x).mul_(0.5)


def _gelu(x: Tensor, one: Tensor) -> Tensor:
    return (x * 0.7071067811865476).erf_().add_(one).mul_(x).mul_(0.5)


ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"silu": _silu, "gelu_tanh": _gelu_tanh, "gelu": _gelu}

# On a GPU an element's place has no effect, and each operation is a pass over memory.
FUSED_ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda x, one: F.silu(x),
    "gelu_tanh": lambda x, one: F.gelu(x, approximate="tanh"),
    "gelu": lambda x, one: F.gelu(x),
}
