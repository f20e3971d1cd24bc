"""The start-up self-test: it must see rows that depend on their tile, and the engine must then decode plainly.

Planted bugs seen to fail here: a width, a place or a neighbour that changes one bit.
"""

import pytest
import torch
from skipstone.engine import selftest
from skipstone.engine.engine import Engine
from skipstone.engine.forward import RowTiles
from skipstone.engine.gate import fixed_exit
from skipstone.engine.selftest import NotDeterministic, find_tiles, rows_agree


@pytest.fixture
def decoder(engine_of):
    return engine_of("qwen3").decoder


def disturb(monkeypatch, decoder, change):
    """Wrap the decoder's layers: `change(out, positions)` returns what they give."""
    original = decoder.run_layers

    def run_layers(hidden, start, stop, positions, attend, taps=None, mlp=None):
        return change(original(hidden, start, stop, positions, attend, taps, mlp), positions)

    monkeypatch.setattr(decoder, "run_layers", run_layers, raising=False)


def by_width(out, positions):
    return out * (1 + 1e-6) if len(out) > 1 else out


def by_place(out, positions):
    return out * (1 + 1e-6 * torch.arange(len(out)).unsqueeze(1))


def by_neighbour(out, positions):
    return out + 1e-6 * out.roll(1, 0)


def by_siblings(out, positions):
    return out * (1 + 1e-6) if len(set(positions.tolist())) < len(positions) else out


@torch.inference_mode()
@pytest.mark.hazard(23)
@pytest.mark.parametrize(
    "tiles", [RowTiles(least=1), RowTiles(), RowTiles(gathered=True)], ids=["any", "16", "gathered"]
)
def test_rows_that_agree_pass(tiles, decoder):
    assert rows_agree(decoder, tiles)


@torch.inference_mode()
@pytest.mark.hazard(23)
@pytest.mark.parametrize("change", [by_width, by_place, by_neighbour, by_siblings])
def test_rows_that_depend_on_their_tile_are_seen(change, decoder, monkeypatch):
    disturb(monkeypatch, decoder, change)
    assert not rows_agree(decoder, RowTiles(least=1))


@torch.inference_mode()
@pytest.mark.hazard(23)
def test_a_width_that_changes_bits_is_padded_away(decoder, monkeypatch):
    """Only single rows differ: tiles of a fixed 16 never hold one alone."""
    disturb(monkeypatch, decoder, by_width)
    assert find_tiles(decoder).least == 16


@pytest.mark.hazard(23)
def test_an_engine_without_deterministic_rows_decodes_plainly(engine_of, planned, monkeypatch):
    decoder = engine_of("qwen3").decoder
    expected = engine_of("qwen3").generate([1, 2, 3], max_new_tokens=8).token_ids
    with monkeypatch.context() as patch:
        patch.setattr(selftest, "rows_agree", lambda decoder, tiles: False)
        engine = Engine(decoder)
    assert "speculation=False" in engine.warning
    planned(engine, "right", exits=(2,))
    assert engine.generate([1, 2, 3], max_new_tokens=8).token_ids == expected
    with pytest.raises(NotDeterministic, match="would not be lossless"):
        engine.generate([1, 2, 3], max_new_tokens=8, policy=fixed_exit(2, 4))
    assert engine.generate([1, 2, 3], max_new_tokens=8, speculation=False).token_ids == expected
