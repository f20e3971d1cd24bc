"""What replaces spelled-out operations on a GPU computes the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from skipstone.engine.model import ACTIVATIONS, FUSED_ACTIVATIONS, Decoder

# Both are fp32 with a few roundings each, of values up to 12.
TOLERANCE = 3e-6


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_fused_activation_equals_the_spelled_one(name: str) -> None:
    x = torch.linspace(-12, 12, 1001)
    one = torch.ones(1)
    assert float((FUSED_ACTIVATIONS[name](x, one) - ACTIVATIONS[name](x, one)).abs().max()) < TOLERANCE
    assert FUSED_ACTIVATIONS.keys() == ACTIVATIONS.keys()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_a_gpu_computes_what_the_cpu_does(tiny: Callable, family: str) -> None:
    config, weights = tiny(family)
    ids = torch.randint(0, config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(0))
    states = [
        Decoder(config, weights, device=device).encode(ids.to(device), [config.num_layers])[config.num_layers].cpu()
        for device in ("cpu", "cuda")
    ]
    assert float((states[0] - states[1]).abs().max()) < 1e-3 * float(states[0].abs().max())
