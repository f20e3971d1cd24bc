"""Heads that remember: one or a few transformer layers with their own keys and values.

    block      runs on the exit's hidden state of each token, and sees those of the tokens before it.
    recurrent  runs on the token's own input (its embedding, or an early layer) joined with a *context*: what the
               full model knew one token earlier where that is verified, the head's own output where it is a draft.

An *entry* is one token of one sequence: its key and value in the head's cache and its output, from which the draft
logits come. Entries of verified tokens are made from the full model's states ("true"); those of drafted tokens are
overwritten by true ones when the token is committed (design rule 10). Nothing here may change what is written, only how
much is accepted.

Recurrent drafting and its unrolled training follow the line of EAGLE (arXiv 2401.15077; training on own outputs:
arXiv 2503.01840).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.attention import fused_attention, without_plans
from ..kernels.chain_attention import chain_attention, chain_attention_reference
from .base import ExitHead, HeadSpec, Projection, register_head, rms_normalise

Product = Callable[[Tensor], Tensor]


@dataclass
class HeadCache:
    """Keys and values of one head: `k, v [layers, B, KV, capacity, d]`, in the head's matmul dtype.

    Slot i of a sequence holds position i's true entry; slots beyond the true ones are scratch for drafts.
    """

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Entries:
    """The rows that one sequence gives to a call of `StatefulHead.extend`.

    Attributes:
        sequence: its row in the cache.
        slots: where each row's key and value go.
        positions: absolute position of each row's token.
        visible: bool `[n, S]` over the first S slots (S > every slot written); None: a row sees slots up to its own.
    """

    sequence: int
    slots: Sequence[int]
    positions: Sequence[int]
    visible: Tensor | None = None


class StatefulHead(ExitHead):
    """Common parts of `block` and `recurrent`: the layers, their cache, decoding and training passes.

    Options: `depth`, transformer layers; `num_heads`, `num_kv_heads`, `head_dim`, `ff`, `rope_theta`, `qkv_bias`:
    their sizes, normally those of the base's layers (`layer_options`); `source`, the base layer whose weights the first
    layer starts from, -1 for a random start (further layers follow it, but for their output weights, which start at
    zero: a deep head starts as the shallow one).
    """

    stateful = True
    options: ClassVar[Mapping[str, Any]] = {
        "depth": 1,
        "num_heads": 8,
        "num_kv_heads": 8,
        "head_dim": 64,
        "ff": 1024,
        "rope_theta": 10_000.0,
        "qkv_bias": False,
        "source": -1,
    }

    def __init__(self, spec: HeadSpec, hidden_size: int, num_outputs: int) -> None:
        super().__init__(spec, hidden_size, num_outputs)
        chosen = {**self.options, **spec.options}
        if int(chosen["depth"]) < 1:
            raise ValueError(f"{self.kind} head: depth is {chosen['depth']}, expected at least 1")
        self.source = int(chosen["source"])
        sizes = _Sizes(*(int(chosen[name]) for name in ("num_heads", "num_kv_heads", "head_dim", "ff")))
        bias = bool(chosen["qkv_bias"])
        self.layers = nn.ModuleList(_Layer(hidden_size, sizes, bias) for _ in range(int(chosen["depth"])))
        self.gain = nn.Parameter(torch.ones(hidden_size))
        half = torch.arange(0, sizes.head_dim, 2, dtype=torch.float64) / sizes.head_dim
        self._inv_freq = (float(chosen["rope_theta"]) ** -half).float()
        self._sizes = sizes
        self._products: list[dict[str, Product]] | None = None

    @property
    def taps(self) -> tuple[int, ...]:
        """Exit layers whose true states make up a verified token's context, ascending; empty where there is none."""
        return ()

    def initialise(self, projection: Projection, weights: Mapping[str, Tensor] | None = None) -> None:
        """Take over the base's layers `source`, `source + 1`, ... as far as names and shapes fit; of a wider MLP than
        the head's, the neurons that write most.

        Args:
            weights: canonical names -> tensors of the base (`engine/weights.py`), norm weights as they multiply (the
                family's offset added); None keeps the random start.
        """
        if weights is None or self.source < 0:
            return
        for offset, layer in enumerate(self._layers()):
            prefix = f"layers.{self.source + offset}."
            if prefix + "o.weight" not in weights:  # past the base's last layer
                prefix = f"layers.{self.source}."
            own = {name: weights[prefix + name] for name, _ in layer.named_parameters() if prefix + name in weights}
            if {"up.weight", "down.weight"} <= set(own):
                own |= _fit_mlp(own["up.weight"], own["down.weight"], layer.sizes.ff)
            with torch.no_grad():
                for name, parameter in layer.named_parameters():
                    if name in own and own[name].shape == parameter.shape:
                        parameter.copy_(own[name])
                    if offset and name in ("o.weight", "down.weight"):
                        parameter.zero_()

    def attach(self, projection: Projection) -> None:
        super().attach(projection)
        projection.prepare()
        self._inv_freq = self._inv_freq.to(projection.head_weight.device)
        self._products = None
        if projection.linear is not None:
            self._products = [layer.products(self._packed) for layer in self._layers()]

    def new_state(self, num_rows: int, capacity: int, device: torch.device | str = "cpu") -> HeadCache:
        """An empty cache for `num_rows` sequences of `capacity` slots (true entries and scratch)."""
        shape = len(self.layers), num_rows, self._sizes.num_kv_heads, capacity, self._sizes.head_dim
        # fp32 on the CPU for the same reason as the model's own cache there; zeros, so that no stale NaN is ever read
        dtype = torch.float32 if torch.device(device).type == "cpu" else self.attached().dtype
        return HeadCache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    def context(self, taps: Tensor) -> Tensor:
        """A verified token's context from the full model's states at it.

        Args:
            taps: `[N, len(self.taps), D]` fp32.

        Returns:
            `[N, D]` fp32.
        """
        raise NotImplementedError(f"{self.kind} heads have no context")

    def enter(self, hidden: Tensor, context: Tensor | None) -> Tensor:
        """The layers' input `[..., D]` fp32 from a token's own hidden state and the context of the token before it."""
        return hidden

    def extend(
        self,
        hidden: Tensor,
        context: Tensor | None,
        entries: Sequence[Entries],
        state: HeadCache,
        outputs: bool = True,
    ) -> Tensor:
        """Make entries; within a sequence, rows may see each other as `visible` says.

        Args:
            hidden: each row's residual stream after `exit_layer` layers, `[N, D]` fp32, sequences one after another.
            context: `[N, D]` fp32: `context(taps of the token before)` where that is verified (zeros for position 0),
                the output of the parent's entry where it is a draft. None for kinds without `taps`.
            entries: where the rows stand, N in all.
            outputs: False leaves out what only outputs need, the last layer's attention and MLP; then what is returned
                means nothing.

        Returns:
            The entries' outputs `[N, D]` fp32, for `draft_logits` and as context of drafted children.
        """
        out = self.enter(hidden, context)
        positions = torch.tensor([p for e in entries for p in e.positions], device=out.device)
        rotary = self._rotary(positions)
        reaches = [_Reach(e, out.device) for e in entries]
        for index, layer in enumerate(self._layers()):
            products = None if self._products is None else self._products[index]
            q, k, v = layer.project(out, rotary, products)
            needed = outputs or index + 1 < len(self.layers)
            attended, first = [], 0
            for own, reach in zip(entries, reaches, strict=True):
                rows = slice(first, first + len(own.slots))
                first += len(own.slots)
                keys, values = state.k[index, own.sequence], state.v[index, own.sequence]
                # a NaN shows in the row's own output; stored, it would reach rows that must not see it
                keys[:, reach.place] = k[rows].transpose(0, 1).nan_to_num(0.0, 0.0, 0.0).to(keys.dtype)
                values[:, reach.place] = v[rows].transpose(0, 1).nan_to_num(0.0, 0.0, 0.0).to(values.dtype)
                if needed:
                    seen = keys[:, : reach.num_slots], values[:, : reach.num_slots]
                    attended.append(_attend(q[rows], *seen, reach.mask))
            if needed:
                out = layer.finish(out, torch.cat(attended), products)
        return out

    def draft_logits(self, out: Tensor) -> Tensor:
        """Entries' outputs `[N, D]` fp32 -> draft logits `[N, num_outputs]`."""
        return self.attached().logits(rms_normalise(out, None) * self.gain)

    def forward(self, hidden: Tensor, state: Any = None) -> Tensor:
        raise RuntimeError(f"{self.kind} heads keep state: call extend and draft_logits")

    def unroll(self, hidden: Tensor, taps: Tensor | None, num_steps: int) -> list[Tensor]:
        """Entries of whole sequences as drafting would make them, for training and measuring; differentiable.

        Result s (from 0) at position u is the entry of token u as the (s + 1)-th of a chain: its context is result
        s - 1 at u - 1 (the true context for s = 0); it sees the true entries up to u - s and the chain's own between.
        With the true tokens as drafts this is exact for every chain that is accepted so far.

        Args:
            hidden: residual stream after `exit_layer` layers, `[B, T, D]` fp32.
            taps: true states `[B, T, len(self.taps), D]` fp32, or None for kinds without.
            num_steps: chain length; kinds without a context give one result, theirs do not depend on it.

        Returns:
            `[B, T, D]` fp32 each; positions u < s belong to no chain and mean nothing.
        """
        true = None if taps is None else _shift(self.context(taps.flatten(0, 1)).view(hidden.shape))
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        rotary = self._rotary(positions)
        steps: list[Tensor] = []
        keys: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.layers]  # by layer, by step
        for step in range(num_steps if self.taps else 1):
            out = self.enter(hidden, true if step == 0 else _shift(steps[-1]))
            for layer, made in zip(self._layers(), keys, strict=True):
                q, k, v = layer.project(out, rotary, None)
                made.append((k, v))
                out = layer.finish(out, _attend_unrolled(q, made), None)
            steps.append(out)
        return steps

    def _packed(self, weight: Tensor) -> Product:
        """An inference product for fp32 inputs."""
        product, dtype = self.prepared(weight), self.attached().dtype
        return lambda x: product(x.to(dtype))

    def _layers(self) -> list[_Layer]:
        return [layer for layer in self.layers if isinstance(layer, _Layer)]

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin `[N, 1, d]` fp32."""
        angles = positions.unsqueeze(-1).float() * self._inv_freq
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], -1).unsqueeze(-2), torch.cat([-sin, sin], -1).unsqueeze(-2)


@register_head
class BlockHead(StatefulHead):
    """Transformer layers on the exit's hidden state, with keys and values of their own."""

    kind = "block"


@register_head
class RecurrentHead(StatefulHead):
    """Drafts on from its own state, without trunk layers per draft token when `exit_layer` is 0.

    Options beside those of `StatefulHead`: `taps`, the exit layers whose states of the last verified token are joined
    into the first context (num_layers is the final norm's input).
    """

    kind = "recurrent"
    least_exit = 0
    options = {**StatefulHead.options, "taps": ()}

    def __init__(self, spec: HeadSpec, hidden_size: int, num_outputs: int) -> None:
        super().__init__(spec, hidden_size, num_outputs)
        self._taps = tuple(int(layer) for layer in spec.options.get("taps", ()))
        if not self._taps or list(self._taps) != sorted(set(self._taps)) or self._taps[0] < 1:
            raise ValueError(f"recurrent head: taps are {self._taps}, expected rising exit layers, at least one")
        self.token_norm = nn.Parameter(torch.ones(hidden_size))
        self.context_norm = nn.Parameter(torch.ones(hidden_size))
        # the deepest state alone at the start: what an untrained head should draft from
        self.fuse = nn.Parameter(torch.cat([torch.zeros(hidden_size, (len(self._taps) - 1) * hidden_size),
                                            torch.eye(hidden_size)], 1))  # fmt: skip
        self.join = nn.Parameter(torch.cat([torch.eye(hidden_size), torch.eye(hidden_size)], 1))
        self._fuse: Product | None = None
        self._join: Product | None = None

    @property
    def taps(self) -> tuple[int, ...]:
        return self._taps

    def attach(self, projection: Projection) -> None:
        super().attach(projection)
        packed = projection.linear is not None
        self._fuse = self._packed(self.fuse) if packed else None
        self._join = self._packed(self.join) if packed else None

    def context(self, taps: Tensor) -> Tensor:
        normed = rms_normalise(taps, None).flatten(1)
        return _apply(self._fuse, normed, self.fuse)

    def enter(self, hidden: Tensor, context: Tensor | None) -> Tensor:
        assert context is not None
        both = torch.cat([rms_normalise(hidden, self.token_norm), rms_normalise(context, self.context_norm)], -1)
        return _apply(self._join, both, self.join)


@dataclass(frozen=True)
class _Sizes:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ff: int


class _Layer(nn.Module):
    """A pre-norm layer: grouped-query attention and a gated SiLU MLP. Parameters have the base's canonical names."""

    def __init__(self, hidden_size: int, sizes: _Sizes, qkv_bias: bool) -> None:
        super().__init__()
        self.sizes = sizes
        num_qkv = (sizes.num_heads + 2 * sizes.num_kv_heads) * sizes.head_dim
        self.attn_norm = _Weight(torch.ones(hidden_size))
        self.mlp_norm = _Weight(torch.ones(hidden_size))
        self.qkv = _Weight(_random(num_qkv, hidden_size), torch.zeros(num_qkv) if qkv_bias else None)
        self.o = _Weight(_random(hidden_size, sizes.num_heads * sizes.head_dim) * 0.1)
        self.up = _Weight(_random(2 * sizes.ff, hidden_size))
        self.down = _Weight(_random(hidden_size, sizes.ff) * 0.1)

    def products(self, packed: Callable[[Tensor], Product]) -> dict[str, Product]:
        """Inference projections of the four matrices."""
        return {name: packed(getattr(self, name).weight) for name in ("qkv", "o", "up", "down")}

    def project(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], products: dict[str, Product] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`x [..., D]` -> q `[..., H, d]`, k and v `[..., KV, d]`, q and k rotated."""
        s = self.sizes
        qkv = self._product("qkv", rms_normalise(x, self.attn_norm.weight), products)
        if self.qkv.bias is not None:
            qkv = qkv + self.qkv.bias
        qkv = qkv.view(*x.shape[:-1], s.num_heads + 2 * s.num_kv_heads, s.head_dim)
        qk, v = qkv.split([s.num_heads + s.num_kv_heads, s.num_kv_heads], -2)
        low, high = qk.chunk(2, -1)
        qk = qk * rotary[0] + torch.cat([high, low], -1) * rotary[1]
        q, k = qk.split([s.num_heads, s.num_kv_heads], -2)
        return q, k, v

    def finish(self, x: Tensor, attended: Tensor, products: dict[str, Product] | None) -> Tensor:
        """Output projection, MLP and both residuals: `attended [..., H, d]` -> `[..., D]`."""
        x = x + self._product("o", attended.flatten(-2), products)
        gate, up = self._product("up", rms_normalise(x, self.mlp_norm.weight), products).chunk(2, -1)
        return x + self._product("down", F.silu(gate) * up, products)

    def _product(self, name: str, x: Tensor, products: dict[str, Product] | None) -> Tensor:
        weight = getattr(self, name).weight
        return _apply(None if products is None else products[name], x, weight)


class _Weight(nn.Module):
    """Only there so that parameters are named as in the base: `qkv.weight`, `qkv.bias`."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)


def layer_options(
    num_heads: int, num_kv_heads: int, head_dim: int, ff: int, rope_theta: float, qkv_bias: bool
) -> dict[str, Any]:
    """The options of a stateful head whose layers have the base's sizes."""
    return {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "ff": ff,
        "rope_theta": rope_theta,
        "qkv_bias": qkv_bias,
    }


def _fit_mlp(up: Tensor, down: Tensor, ff: int) -> dict[str, Tensor]:
    """The `ff` neurons of a gated MLP (`up [2 F, D]`, gates first, `down [D, F]`) with the largest output weights, in
    their order; nothing where F is not larger."""
    width = down.shape[1]
    if ff >= width or up.shape[0] != 2 * width:
        return {}
    kept = down.float().norm(dim=0).topk(ff).indices.sort().values
    return {"up.weight": torch.cat([up[kept], up[width + kept]]), "down.weight": down[:, kept]}


def _random(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns) * columns**-0.5


def _apply(packed: Product | None, x: Tensor, weight: Tensor) -> Tensor:
    """`x [..., K] @ weight.T` in fp32: through the packed inference product, or differentiable."""
    if packed is None:
        return F.linear(x, weight).float()
    return packed(x.reshape(-1, x.shape[-1])).float().view(*x.shape[:-1], -1)


def _shift(x: Tensor) -> Tensor:
    """`[B, T, ...]` moved one position later; position 0, which has none before it, gets zeros."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


class _Reach:
    """Where one sequence's rows are written and what they see, for all layers of a call, without asking the device."""

    def __init__(self, own: Entries, device: torch.device) -> None:
        first, count = own.slots[0], len(own.slots)
        in_a_row = list(own.slots) == list(range(first, first + count))
        self.place: slice | Tensor = slice(first, first + count)
        if not in_a_row:
            self.place = torch.tensor(list(own.slots), device=device)
        self.num_slots, self.mask = max(own.slots) + 1, own.visible
        if own.visible is not None:
            self.num_slots = own.visible.shape[1]
        elif count > 1:
            slots = torch.tensor(list(own.slots), device=device)
            self.mask = torch.arange(self.num_slots, device=device) <= slots.unsqueeze(1)


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """`q [n, H, d]` over `keys, values [KV, S, d]` as `mask [n, S]` says (None: all) -> `[n, H, d]` fp32."""
    q = q.transpose(0, 1).unsqueeze(0).to(keys.dtype)
    with without_plans(q.device):
        out = fused_attention(q, keys.unsqueeze(0), values.unsqueeze(0), mask)
    return out[0].transpose(0, 1).float()


def _attend_unrolled(q: Tensor, made: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The newest step's queries `[B, T, H, d]` over true keys and the chain's own, `made` of each step."""
    if q.is_cuda:
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else q.dtype
        if dtype in (torch.bfloat16, torch.float16):  # what flash attention takes
            return chain_attention(q, made, dtype)
    return chain_attention_reference(q, made)
