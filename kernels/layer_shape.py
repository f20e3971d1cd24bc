"""Sizes and kinds of one transformer layer, as its kernels take them. Data only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """Attributes: element counts; `rotary_dim` of each head is rotated, pairs are (i, i + rotary_dim / 2).

    `layer_norm` is LayerNorm, else RMSNorm; `qk_norm` an RMSNorm over each head of q and k; `gated` an MLP of
    act(gate) * up, else act(up); `softcap` caps attention scores (None: no cap).
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    norm_eps: float
    attention_scale: float
    softcap: float | None = None
    layer_norm: bool = False
    qk_norm: bool = False
    gated: bool = True
    activation: str = "silu"  # or "gelu_tanh", "gelu"

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads
