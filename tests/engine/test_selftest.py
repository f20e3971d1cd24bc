"""The start-up self-test: it must see rows that depend on their tile, and the engine must then decode plainly.

Planted bugs seen to fail here: a width, a place or a neighbour that changes one bit, also where rounding hides it.
"""

import pytest
import torch
from skipstone.engine import selftest
from skipstone.engine.engine import Engine
from skipstone.engine.forward import RowTiles
from skipstone.engine.gate import fixed_exit
from skipstone.engine.model import Decoder
from skipstone.engine.selftest import NotDeterministic, find_tiles, rows_agree
from skipstone.kernels.linear import PackedLinear


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


@pytest.fixture
def own_decoder(tiny):
    """`own_decoder(family)`: a decoder in bf16 whose projections no other test shares."""

    def build(family):
        config, weights = tiny(family)
        return Decoder(config, weights, torch.bfloat16)

    return build


def in_another_order(product, few):
    """A product whose rows are summed in another order where at most `few` stand together, in fp32, rounded after it:
    what a matrix library does that has a kernel of its own for few rows."""

    def changed(self, x):
        weight = (self.weight.to_dense() if self.packed else self.weight).float()
        if len(x) <= few:
            x, weight = x.flip(-1), weight.flip(-1)
        out = torch.zeros(len(x), self.out_features)
        for column in range(x.shape[1]):  # one after the other: the order is the program's
            out += x[:, column : column + 1].float() * weight[:, column]
        return (out if self.bias is None else out + self.bias.float()).to(self.dtype)

    return changed


@torch.inference_mode()
@pytest.mark.hazard(23)
@pytest.mark.parametrize("few", [1, 5])
def test_an_order_that_rounding_hides_is_padded_away(few, own_decoder, monkeypatch):
    """Seen to fail with a weight's own outputs on random rows in place of products that cancel: of 48 inputs in bf16
    400,000 outputs show nothing."""
    decoder = own_decoder("gemma2")
    monkeypatch.setattr(PackedLinear, "_product", in_another_order(PackedLinear._product, few))
    assert find_tiles(decoder).least == 1
    layers = [decoder.layers[-1].qkv, decoder.layers[-1].o, decoder.layers[-1].up, decoder.layers[-1].down]
    assert {projection.least_rows for projection in (*layers, decoder.output)} == {few + 1}


@torch.inference_mode()
@pytest.mark.hazard(23)
def test_products_that_depend_on_a_rows_place_are_refused(own_decoder, monkeypatch):
    """Seen to fail while what `find_least_rows` returns was ignored: rounding hides it from whole rows."""
    decoder = own_decoder("llama3")
    whole = in_another_order(PackedLinear._product, 0)

    def by_place(self, x):
        return torch.cat([whole(self, x[:-1]), in_another_order(None, 1)(self, x[-1:])])

    monkeypatch.setattr(PackedLinear, "_product", by_place)
    with pytest.raises(NotDeterministic, match="would not be lossless"):
        find_tiles(decoder)


@torch.inference_mode()
@pytest.mark.hazard(23)
@pytest.mark.parametrize("family", ["gemma2", "llama3"])
def test_attention_that_depends_on_its_width_is_padded_away(family, own_decoder, monkeypatch):
    """One unit in the last place of fp32. Seen to fail with whole rows alone, where rounding to bf16 hides it."""
    decoder = own_decoder(family)
    product = torch.bmm

    def bmm(a, b):
        out = product(a, b)
        return out * (1 + 2**-23) if a.shape[1] < 12 else out

    monkeypatch.setattr("skipstone.kernels.attention.torch.bmm", bmm)
    tiles = find_tiles(decoder)
    assert (tiles.least, tiles.least_attention) == (16, 16)


@torch.inference_mode()
@pytest.mark.hazard(23)
def test_activations_that_depend_on_their_width_are_padded_away(own_decoder, monkeypatch):
    decoder = own_decoder("gemma3")
    activation = decoder._activation

    def changed(x, one):
        out = activation(x, one)
        return out * (1 + 2**-23) if len(x) == 3 else out

    monkeypatch.setattr(decoder, "_activation", changed)
    assert find_tiles(decoder).least == 16
