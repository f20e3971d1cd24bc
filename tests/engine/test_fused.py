"""What replaces spelled-out operations on a GPU computes the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from skipstone.engine.cache import KVCache, plan_cache
from skipstone.engine.forward import prefill
from skipstone.engine.model import ACTIVATIONS, FUSED_ACTIVATIONS, Decoder

# Both are fp32 with a few roundings each, of values up to 12.
TOLERANCE = 3e-6


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_fused_activation_equals_the_spelled_one(name: str) -> None:
    x = torch.linspace(-12, 12, 1001)
    one = torch.ones(1)
    assert float((FUSED_ACTIVATIONS[name](x, one) - ACTIVATIONS[name](x, one)).abs().max()) < TOLERANCE
    assert FUSED_ACTIVATIONS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_products_that_operations_widen_have_the_bits_of_widened_copies(
    tiny: Callable, family: str, dtype: torch.dtype
) -> None:
    """A prompt's keys, values and final states, with a GPU's half-precision cache. Planted bugs that this was seen to
    catch: rotary's product in place, the gate's activation in half precision, a post norm of what was not widened."""
    config, weights = tiny(family)
    found = []
    for widens in (False, True):
        decoder = Decoder(config, weights, dtype)
        decoder._widens = widens
        plan = plan_cache(config, 1, 64, decoder.device, dtype)
        cache, states = KVCache(dataclasses.replace(plan, dtype=dtype), decoder.device), {}
        prefill(decoder, cache, 0, [(17 * i + 2) % 199 for i in range(40)], [config.num_layers], states.update)
        found.append((cache.k, cache.v, states[config.num_layers]))
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


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
