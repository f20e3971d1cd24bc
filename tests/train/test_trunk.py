"""The fused forward of plain models says what the decoder's own says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from skipstone.engine.model import Decoder
from skipstone.train.trunk import encode, encode_fused, is_plain


@pytest.mark.parametrize("name", ["llama3", "qwen2"])
def test_states_are_the_decoders(tiny: Callable, name: str) -> None:
    """Catches: positions that run on into the second text, a bias left out, a state taken one layer late."""
    decoder = Decoder(*tiny(name))
    assert is_plain(decoder)
    ids = torch.randint(decoder.config.vocab_size, (3, 21), generator=torch.Generator().manual_seed(0))
    at = [0, 1, 3, decoder.config.num_layers]
    wanted, found = decoder.encode(ids, at), encode_fused(decoder, ids, at)
    assert sorted(found) == sorted(wanted) == sorted(set(at))
    for layer in at:
        torch.testing.assert_close(found[layer], wanted[layer], rtol=1e-4, atol=1e-4)


def test_other_models_take_the_decoders_own_way(tiny: Callable, families: list[str]) -> None:
    plain = {name for name in families if is_plain(Decoder(*tiny(name)))}
    assert not plain & {"gemma1", "gemma2", "gemma3", "qwen3", "neox", "pythia"}
    decoder = Decoder(*tiny("llama3"))  # on the CPU too
    ids = torch.zeros(1, 3, dtype=torch.long)
    assert torch.equal(encode(decoder, ids, [1])[1], decoder.encode(ids, [1])[1])
