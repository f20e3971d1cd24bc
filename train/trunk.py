"""The frozen base over whole texts, for training: `Decoder.encode` with fewer passes over memory.

Between the products of a layer the decoder keeps fp32 and spells its operations out, as decoding's bits demand; over
thousands of rows on a GPU these passes take longer than the products. Models of the plain kind (RMSNorm, gated SiLU,
whole rotary, nothing after attention and MLP) go through `kernels/trunk_rows.py`, all others through `Decoder.encode`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.model import Decoder
from ..kernels.trunk_rows import rms_norm, rotate, silu_mul


def encode(decoder: Decoder, ids: Tensor, at: Sequence[int]) -> dict[int, Tensor]:
    """As `Decoder.encode`, without gradients; on a GPU by fused operations."""
    if decoder.device.type == "cuda" and is_plain(decoder):
        return encode_fused(decoder, ids, at)
    return decoder.encode(ids, at)


def is_plain(decoder: Decoder) -> bool:
    """Whether `encode_fused` knows everything that this model does."""
    config = decoder.config
    return (
        type(decoder) is Decoder
        and config.norm != "layer"
        and config.gated_mlp
        and config.activation == "silu"
        and not config.parallel_residual
        and config.attention_softcap is None
        and all(window is None for window in config.windows)
        and len(set(config.ropes)) == 1
        and 2 * len(config.ropes[0].inv_freq) == config.head_dim
        and all(
            layer.q_norm is None
            and layer.k_norm is None
            and layer.attn_post_norm is None
            and layer.mlp_post_norm is None
            and layer.attn_norm is not None
            and layer.mlp_norm is not None
            for layer in decoder.layers
        )
    )


@torch.no_grad()
def encode_fused(decoder: Decoder, ids: Tensor, at: Sequence[int]) -> dict[int, Tensor]:
    """`Decoder.encode` of a plain model."""
    config, dtype = decoder.config, decoder.dtype
    batch, length = ids.shape
    num_q, num_kv, d = config.num_heads, config.num_kv_heads, config.head_dim
    (cos, sin) = next(iter(decoder.rotary(torch.arange(length, device=ids.device)).values()))
    cos, sin = cos.squeeze(1), sin.squeeze(1)
    hidden, states, wanted = decoder.embed(ids.reshape(-1)), {}, set(at)
    if 0 in wanted:
        states[0] = hidden.view(batch, length, -1)
    for index, layer in enumerate(decoder.layers[: max(wanted)]):
        assert layer.attn_norm is not None and layer.mlp_norm is not None
        normed = rms_norm(hidden, layer.attn_norm.weight, layer.attn_norm.eps, dtype)
        qkv = rotate(layer.qkv(normed).view(-1, num_q + 2 * num_kv, d), cos, sin, num_q + num_kv)
        q, k, v = qkv.view(batch, length, -1, d).transpose(1, 2).split([num_q, num_kv, num_kv], 1)
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=config.attention_scale, enable_gqa=num_q != num_kv
        )
        hidden = hidden + layer.o(out.transpose(1, 2).reshape(batch * length, -1))
        normed = rms_norm(hidden, layer.mlp_norm.weight, layer.mlp_norm.eps, dtype)
        hidden = hidden + layer.down(silu_mul(layer.up(normed)))
        if index + 1 in wanted:
            states[index + 1] = hidden.view(batch, length, -1)
    return states
