"""A decode step's operations one by one, over as many copies of their weights as no cache can hold.

For tuning and for looking at a single kernel. Everything an operation writes is poisoned first, so a result that was
never written shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.config import ModelConfig
from ..kernels import lm_head as lm_head_op
from ..kernels import qkv as qkv_op
from ..kernels import residual_linear as residual_op
from ..kernels import tree_attention as attention_op
from ..kernels import up_linear as up_op
from ..kernels.layer_shape import LayerShape
from ..kernels.rows import PATH, Rows

Settings = dict[str, int]
Launch = Callable[[int, bool], None]  # (copy of the weights, programmatic launch)
Prepare = Callable[[Settings], tuple[Launch, Callable[[], Tensor]]]
OPS = ("qkv", "attention", "o", "up", "down", "lm_head")
NUM_ROWS = 16
COLD_BYTES = 200_000_000  # of weights between two reads of the same ones: several times the L2
MOST_PARTS = 8


@dataclass(frozen=True)
class Kernels:
    """Modules whose launchers are called, and the rows of their tiles."""

    qkv: Any = qkv_op
    attention: Any = attention_op
    residual: Any = residual_op
    up: Any = up_op
    lm_head: Any = lm_head_op
    num_rows: int = NUM_ROWS

    def table(self, config: ModelConfig, name: str, dtype: torch.dtype) -> Settings:
        """What an operation's own table says, a product's tail too if it has none, but for what one operation alone
        cannot tell, of which all rows are live: the moment at which it lets the next kernel go, what it holds of longer
        weights meanwhile, and whether it leaves rows alone that are not live."""
        if name in ("o", "down"):
            own = self.residual._settings(*weight_shape(config, name), dtype)
        elif name == "lm_head":
            own = self.lm_head._settings(config.vocab_size, dtype)
        else:
            own = getattr(self, name)._settings(layer_shape(config), dtype)
        whole = {"TAIL": 0, **own} if "BK" in own else own
        return {key: value for key, value in whole.items() if key not in ("EARLY", "HOLD", "MASK")}


@dataclass(frozen=True)
class Op:
    """One operation of one model, ready to be launched with any settings.

    Attributes:
        name, sizes: what it is; together the key of a table.
        num_bytes: weights (or keys and values) that a call reads.
        copies: how many sets of them there are.
        default: the table's own settings.
        prepare: poisons what will be written and allocates what the settings want; gives the launch, and what it left
            for comparison, by row.
    """

    name: str
    sizes: dict[str, int]
    num_bytes: int
    copies: int
    default: Settings
    rows: Rows
    prepare: Prepare

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    def set_live(self, count: int) -> None:
        self.rows.live.copy_((torch.arange(self.num_rows) < count).int())


def chain_rows(context: int, device: torch.device, num_rows: int = NUM_ROWS) -> Rows:
    """Rows of a chain that ends at position context - 1."""
    at = torch.arange(num_rows, dtype=torch.int32)
    base = torch.full_like(at, context - num_rows)
    path = torch.arange(PATH, dtype=torch.int32).repeat(num_rows, 1)
    tensors = (torch.ones_like(at), torch.zeros_like(at), base + at, base + at, base, path)
    return Rows(*(t.to(device) for t in tensors))


def layer_shape(config: ModelConfig) -> LayerShape:
    """The sizes that the kernels take."""
    return LayerShape(
        config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads, config.head_dim,
        config.rotary_dim, config.norm_eps, config.attention_scale, config.attention_softcap, config.norm == "layer",
        config.qk_norm, config.gated_mlp, config.activation,
    )  # fmt: skip


KERNELS = Kernels()


class Bench:
    """Tensors that operations of one model share, and the operations.

    Args:
        config: of a model with RMSNorm and no biases but QKV's.
        cold_bytes: distinct bytes of weights; workers that only compile take few.
        kernels: to be called.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        cold_bytes: int = COLD_BYTES,
        kernels: Kernels = KERNELS,
    ) -> None:
        self.kernels, self.num_rows = kernels, kernels.num_rows
        self.config, self.shape, self.device, self.dtype = config, layer_shape(config), device, dtype
        self.generator = torch.Generator(device).manual_seed(0)
        self.pool = self._random(max(1, cold_bytes // dtype.itemsize))

    def op(self, name: str, context: int = 0) -> Op:
        """An operation by its name; `context` is attention's."""
        if name == "attention":
            return self._attention(context)
        return {"qkv": self._qkv, "up": self._up, "lm_head": self._lm_head}.get(name, lambda: self._residual(name))()

    def _random(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(size, generator=self.generator, device=self.device, dtype=dtype or self.dtype)

    def _nan(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full(size, float("nan"), device=self.device, dtype=dtype or self.dtype)

    def _copies(self, rows: int, columns: int) -> list[Tensor]:
        """Matrices that are parts of one pool (or the only one, where it is larger)."""
        size = rows * columns
        if size > self.pool.numel():
            self.pool = self._random(size)
        count = self.pool.numel() // size
        return list((self.pool[: count * size] * columns**-0.5).view(count, rows, columns))

    def _input(self, width: int) -> tuple[Tensor, Tensor]:
        """x and its stats."""
        hidden = self._random(self.num_rows, width, dtype=torch.float32)
        stats = torch.stack([torch.stack([(t * t).sum(1), t.sum(1)], 1) for t in hidden.split(16, 1)], 2)
        return hidden.to(self.dtype), stats.contiguous()

    def _made(self, name: str, copies: list[Tensor], rows: Rows, prepare: Prepare, context: int = 0) -> Op:
        sizes, default = sizes_of(self.config, name, context), self.kernels.table(self.config, name, self.dtype)
        return Op(name, sizes, copies[0].nbytes, len(copies), default, rows, prepare)

    def _qkv(self) -> Op:
        shape, rows = self.shape, chain_rows(64, self.device, self.num_rows)
        width, k = weight_shape(self.config, "qkv")
        weights, (x, stats) = self._copies(width, k), self._input(k)
        bias = self._random(width) if self.config.qkv_bias else None
        cos, sin = self._random(2, 64, shape.rotary_dim, dtype=torch.float32).unbind()

        def prepare(settings: Settings) -> tuple[Launch, Callable[[], Tensor]]:
            caches = self._nan(2, 1, shape.num_kv_heads, 64, shape.head_dim)
            keys, values = caches.unbind()
            out = self._nan(self.num_rows, shape.num_heads * shape.head_dim)

            def launch(copy: int, pdl: bool) -> None:
                self.kernels.qkv.qkv(
                    x, stats, weights[copy], bias, None, None, cos, sin, out, keys, values, rows, shape, pdl=pdl,
                    settings=settings,
                )  # fmt: skip

            return launch, lambda: torch.cat(
                [out, *caches[:, 0, :, 64 - self.num_rows :].transpose(1, 2).flatten(2)], 1
            )

        return self._made("qkv", weights, rows, prepare)

    def _up(self) -> Op:
        rows, (width, k) = chain_rows(64, self.device, self.num_rows), weight_shape(self.config, "up")
        weights, (x, stats) = self._copies(width, k), self._input(k)

        def prepare(settings: Settings) -> tuple[Launch, Callable[[], Tensor]]:
            out = self._nan(self.num_rows, self.shape.intermediate_size)

            def launch(copy: int, pdl: bool) -> None:
                self.kernels.up.up_linear(
                    x, stats, weights[copy], None, None, out, rows, self.shape, pdl=pdl, settings=settings
                )  # fmt: skip

            return launch, out.clone

        return self._made("up", weights, rows, prepare)

    def _residual(self, name: str) -> Op:
        rows, (width, k) = chain_rows(64, self.device, self.num_rows), weight_shape(self.config, name)
        weights, (a, _) = self._copies(width, k), self._input(k)
        hidden, norm = self._random(self.num_rows, width, dtype=torch.float32), self._random(width, dtype=torch.float32)
        parts = self.kernels.residual.Parts(self.num_rows, width, MOST_PARTS, self.device)

        def prepare(settings: Settings) -> tuple[Launch, Callable[[], Tensor]]:
            stats = self._nan(self.num_rows, 2, -(-width // settings["BN"]), dtype=torch.float32)
            out, x_next = self._nan(self.num_rows, width, dtype=torch.float32), self._nan(self.num_rows, width)

            def launch(copy: int, pdl: bool) -> None:
                self.kernels.residual.residual_linear(
                    a, weights[copy], None, hidden, out, rows, next_norms=((norm, x_next),), stats=stats, parts=parts,
                    pdl=pdl, settings=settings,
                )  # fmt: skip

            return launch, lambda: torch.cat([out, x_next.float(), stats.sum(2)], 1)

        return self._made(name, weights, rows, prepare)

    def _lm_head(self) -> Op:
        rows, (vocab, width) = chain_rows(64, self.device, self.num_rows), weight_shape(self.config, "lm_head")
        weights, (x, stats) = self._copies(vocab, width), self._input(width)
        options, seeds = (torch.zeros(8, device=self.device, dtype=t) for t in (torch.float32, torch.int64))

        def prepare(settings: Settings) -> tuple[Launch, Callable[[], Tensor]]:
            value = self._nan(self.num_rows, -(-vocab // settings["BN"]), dtype=torch.float32)
            best = torch.zeros_like(value, dtype=torch.int32)

            def launch(copy: int, pdl: bool) -> None:
                self.kernels.lm_head.lm_head(
                    x, stats, weights[copy], None, None, rows, eps=self.shape.norm_eps, options=options, seeds=seeds,
                    best_value=value, best_id=best, pdl=pdl, settings=settings,
                )  # fmt: skip

            return launch, lambda: value.amax(1, keepdim=True)

        return self._made("lm_head", weights, rows, prepare)

    def _attention(self, context: int) -> Op:
        shape, rows = self.shape, chain_rows(context, self.device, self.num_rows)
        slots = -(-context // 64) * 64
        caches = [
            copy.view(2, 1, shape.num_kv_heads, slots, shape.head_dim)
            for copy in self._copies(2 * shape.num_kv_heads * slots, shape.head_dim)
        ]
        scratch = self.kernels.attention.AttentionScratch(self.num_rows, context, shape, self.device)
        q = self._random(self.num_rows, shape.num_heads * shape.head_dim)

        def prepare(settings: Settings) -> tuple[Launch, Callable[[], Tensor]]:
            out = self._nan(*q.shape)

            def launch(copy: int, pdl: bool) -> None:
                keys, values = caches[copy].unbind()
                self.kernels.attention.tree_attention(
                    q, keys, values, out, scratch, rows, shape, pdl=pdl, settings=settings
                )

            return launch, out.clone

        return self._made("attention", caches, rows, prepare, context)


def weight_shape(config: ModelConfig, name: str) -> tuple[int, int]:
    """Rows and columns of an operation's weight."""
    wide, heads = config.intermediate_size, config.num_heads
    return {
        "qkv": ((heads + 2 * config.num_kv_heads) * config.head_dim, config.hidden_size),
        "o": (config.hidden_size, heads * config.head_dim),
        "up": ((2 if config.gated_mlp else 1) * wide, config.hidden_size),
        "down": (config.hidden_size, wide),
        "lm_head": (config.vocab_size, config.hidden_size),
    }[name]


def sizes_of(config: ModelConfig, name: str, context: int = 0) -> dict[str, int]:
    """The key of an operation in a table."""
    if name == "attention":
        return {"KV": config.num_kv_heads, "G": config.group_size, "d": config.head_dim, "context": context}
    width, k = weight_shape(config, name)
    return {"N": width, "K": k}


def combinations(choices: Mapping[str, Sequence[int]]) -> list[Settings]:
    """Every combination of the choices."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def attention_grid() -> list[Settings]:
    """Settings of attention worth a try."""
    return combinations({"BLOCK": (32, 64, 128, 256), "num_warps": (2, 4, 8, 16), "num_stages": (1, 2, 3, 4)})
