"""Fingerprints: one for every dtype a checkpoint is loaded in, another for every other model."""

from __future__ import annotations

import pytest
import torch
from skipstone.heads import base_fingerprint, tokenizer_sha256
from skipstone.heads.fingerprint import SAMPLES_PER_TENSOR


def make_weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (500, 200), "layers.0.qkv.weight": (60, 200), "layers.1.qkv.weight": (60, 200)}
    shapes |= {"layers.3.qkv.weight": (60, 200), "layers.3.attn_norm.weight": (200,)}
    # spread over many magnitudes, some too small for float16
    return {
        name: (
            torch.randn(shape, generator=generator) * 10 ** torch.empty(shape).uniform_(-7, 0, generator=generator)
        ).to(dtype)
        for name, shape in shapes.items()
    }


def test_one_fingerprint_for_all_loads_of_a_bf16_checkpoint() -> None:
    weights = make_weights()
    prints = {
        base_fingerprint({k: t.to(dtype) for k, t in weights.items()}, 4)
        for dtype in (torch.bfloat16, torch.float32, torch.float16)
    }
    assert len(prints) == 1


def test_one_fingerprint_for_fp32_and_bf16_loads_of_an_fp32_checkpoint() -> None:
    weights = make_weights(torch.float32)
    assert base_fingerprint(weights, 4) == base_fingerprint({k: t.bfloat16() for k, t in weights.items()}, 4)


@pytest.mark.parametrize(
    "name", ["embed.weight", "layers.0.qkv.weight", "layers.3.qkv.weight", "layers.3.attn_norm.weight"]
)
def test_a_changed_tensor_changes_it(name: str) -> None:
    """A fine-tuning step moves nearly all numbers. Catches: a tensor left out."""
    weights = make_weights()
    before = base_fingerprint(weights, 4)
    weights[name] = (weights[name].float() * 1.02).bfloat16()
    assert base_fingerprint(weights, 4) != before


def test_shape_and_layer_count_matter() -> None:
    weights = make_weights()
    before = base_fingerprint(weights, 4)
    assert base_fingerprint({**weights, "embed.weight": weights["embed.weight"].view(200, 500)}, 4) != before
    assert base_fingerprint(weights, 2) != before
    with pytest.raises(ValueError, match="layers.6."):
        base_fingerprint(weights, 7)


def test_long_tensors_are_sampled_over_their_whole_length() -> None:
    weights = make_weights()
    assert weights["embed.weight"].numel() > SAMPLES_PER_TENSOR
    before = base_fingerprint(weights, 4)
    weights["embed.weight"] = weights["embed.weight"].clone()
    weights["embed.weight"][-1] = 1.0
    assert base_fingerprint(weights, 4) != before


class Vocabulary:
    def __init__(self, vocabulary: dict[str, int]) -> None:
        self._vocabulary = vocabulary

    def get_vocab(self) -> dict[str, int]:
        return self._vocabulary


def test_tokenizer_hash_knows_ids_and_not_order() -> None:
    one = tokenizer_sha256(Vocabulary({"a": 0, "é": 1}))
    assert one == tokenizer_sha256(Vocabulary({"é": 1, "a": 0}))
    assert one != tokenizer_sha256(Vocabulary({"a": 1, "é": 0}))
