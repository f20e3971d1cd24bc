"""The decoder's configuration: every family difference as data.

`ModelConfig` is what `engine/model.py` reads; `from_hf` translates a `transformers` configuration and refuses
what it does not understand. Nothing here touches weights or devices.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding of one layer: `inv_freq` and the factor on cos and sin.

    `inv_freq` holds rotary_dim / 2 angular frequencies (radians per position), scaling already applied, so a
    row's angle is a function of its own position only (design rule 7).
    """

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer. Sizes count elements; `windows` and `ropes` have one entry a layer."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_context: int
    ropes: tuple[RopeSpec, ...]
    windows: tuple[int | None, ...]  # a row at p sees keys p - window + 1 .. p; None sees all
    attention_scale: float
    norm: str = "rms"  # or "layer"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # Gemma stores weight - 1
    activation: str = "silu"  # or "gelu_tanh", "gelu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k, before rotary
    post_norms: bool = False  # Gemma 2/3: norms on the outputs of attention and MLP too
    parallel_residual: bool = False  # GPT-NeoX: attention and MLP read the same input
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: float = 1.0
    tied_head: bool = False

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.ropes[0].inv_freq)

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads
