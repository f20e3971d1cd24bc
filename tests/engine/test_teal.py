"""TEAL's thresholds: quantiles and allocation against plain computations, decoders that drop inputs, folders, refusals.

Planted bugs seen to fail here: thresholds of k used for v; rows of the first tokens counted in the histograms; weights
of a projection taken by its outputs alone; a sink row thinned out.
"""

import json
import math
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import save_file
from skipstone.engine.engine import Engine
from skipstone.engine.load import identity, load
from skipstone.engine.model import Decoder
from skipstone.engine.pretrained import load_pretrained
from skipstone.engine.sparsity.quality import measure_quality
from skipstone.engine.sparsity.tda import Budget
from skipstone.engine.sparsity.teal import Histograms, Teal, allocate_greedily, calibrate_teal, weights_of
from skipstone.engine.sparsity.teal_recipe import TealRecipe, follow, summary
from skipstone.engine.sparsity.thresholded import RewiredDecoder, TealDecoder, projections
from skipstone.heads.artefact import ArtefactError, write_folder
from skipstone.heads.fingerprint import BaseIdentity

FAMILIES = ["llama_linear", "gemma2", "gpt_neox"]


def texts(vocab_size, count=3, length=40):
    return torch.randint(vocab_size, (count, length), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def decoder(tiny, request):
    return Decoder(*tiny(getattr(request, "param", "llama_linear")))


def inputs(decoder, given):
    """What every projection reads, by layer and name of its store: `[B, T, K]`."""
    seen = {}

    def make(index, name, linear):
        def watch(x):
            seen[index, name] = x.view(*given.shape, -1)
            return linear(x)

        return watch

    with torch.inference_mode():
        RewiredDecoder(decoder, make, lambda positions: None).encode(given, [decoder.config.num_layers])
    return seen


@pytest.mark.parametrize("decoder", FAMILIES, indirect=True)
def test_thresholds_are_quantiles_of_magnitudes(decoder):
    given, sparsities = texts(decoder.config.vocab_size), torch.tensor([0.1, 0.5, 0.9, 1.0])
    histograms, seen = Histograms(decoder, dense_tokens=2), inputs(decoder, given)
    histograms.add(given[:1])
    histograms.add(given[1:])
    own = projections(decoder.config)
    assert (histograms.thresholds(torch.zeros(decoder.config.num_layers, len(own))) == 0).all(), "drops nothing"
    for share in sparsities:
        found = histograms.thresholds(share.expand(decoder.config.num_layers, len(own)))
        for (layer, name), x in seen.items():
            expected = x[:, 2:].abs().flatten().quantile(share)
            for i, (stored, _) in enumerate(own.values()):
                if stored == name:
                    # a bin is 1/64 of an octave wide; quantiles between few values lie anywhere between them
                    assert float(found[layer, i]) == pytest.approx(float(expected), rel=0.02, abs=1e-6)


@pytest.mark.parametrize("decoder", FAMILIES, indirect=True)
@pytest.mark.parametrize("skip", [True, False], ids=["gathered", "zeroed"])
def test_a_thinned_out_layer_against_its_formula(decoder, skip):
    """Each projection on the inputs above its own threshold, and none of another's."""
    config, own = decoder.config, projections(decoder.config)
    thresholds = 0.3 + 0.1 * torch.arange(len(own)).float().expand(config.num_layers, -1)
    sparse = TealDecoder(decoder, thresholds, dense_tokens=1, skip=skip)
    positions = torch.arange(3)
    sparse.run_layers(torch.zeros(3, config.hidden_size), 0, 0, positions, None)
    for stored in ("qkv", "o", "up", "down"):
        linear, thinned = getattr(decoder.layers[1], stored), getattr(sparse.layers[1], stored)
        x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(1))
        expected = linear(x)
        for i, (name, rows) in enumerate(own.values()):
            if name == stored:
                dropped = x.abs() <= thresholds[0, i]
                dropped[0] = False
                expected[:, rows] = linear(x.masked_fill(dropped, 0.0))[:, rows]
        # fp32 sums of at most 100 terms in another order
        torch.testing.assert_close(thinned(x), expected, rtol=1e-5, atol=1e-5)


def test_first_tokens_stay_dense(decoder):
    given = texts(decoder.config.vocab_size, 1)
    high = torch.full((decoder.config.num_layers, 7), 0.5)
    with torch.inference_mode():
        dense = decoder.encode(given, [4])[4][0]
        own = TealDecoder(decoder, high, dense_tokens=6).encode(given, [4])[4][0]
    torch.testing.assert_close(own[:6], dense[:6])
    assert ((own[6:] - dense[6:]).abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize("decoder", FAMILIES, indirect=True)
def test_greedy_levels_hold_and_err_less(decoder):
    """The mean over a layer's weights is the level, sparsities only rise, and layers err less than uniform ones do."""
    given, levels = texts(decoder.config.vocab_size), (0.2, 0.5)
    histograms = Histograms(decoder)
    histograms.add(given)
    found = allocate_greedily(decoder, histograms, given, levels, dense_tokens=0)
    weights = weights_of(decoder.config)
    assert float(weights.sum()) == sum(
        layer.numel() for name, layer in _layer_weights(decoder).items() if name.startswith("layers.0.")
    )
    for own, level in zip(found, levels, strict=True):
        assert (own @ weights / weights.sum()).tolist() == pytest.approx([level] * decoder.config.num_layers)
    assert (found[1] >= found[0]).all() and (found <= 0.95 + 1e-9).all()
    positions, attend = decoder.whole_texts(*given.shape)

    def error(sparsities, layer, hidden):
        thresholds = histograms.thresholds(sparsities)
        run = TealDecoder(decoder, thresholds).run_layers
        return float((run(hidden, layer, layer + 1, positions, attend) - hidden_after).square().sum())

    hidden = decoder.embed(given.flatten())
    for layer in range(decoder.config.num_layers):
        hidden_after = decoder.run_layers(hidden, layer, layer + 1, positions, attend)
        uniform = torch.full_like(found[1], levels[1])
        assert error(found[1], layer, hidden) < error(uniform, layer, hidden)
        hidden = hidden_after


def _layer_weights(decoder):
    return {
        f"layers.{i}.{name}": torch.empty(getattr(layer, name).out_features, getattr(layer, name).in_features)
        for i, layer in enumerate(decoder.layers)
        for name in ("qkv", "o", "up", "down")
    }


@pytest.mark.parametrize("family", ["llama2", "gpt_neox"])
def test_quality_is_measured_on_what_the_engine_decodes(family, tiny):
    """The one-pass loss of a text equals the engine's own log-probabilities, row by row."""
    decoder = Decoder(*tiny(family))
    prompt = texts(decoder.config.vocab_size, 1, 30)[0].tolist()
    given = texts(decoder.config.vocab_size)
    level = calibrate_teal(decoder, given, levels=(0.4,), allocation="uniform").at(0.4)
    out = Engine(decoder, sparsity=level).generate(prompt, max_new_tokens=10, logprobs=1)
    zeroed = TealDecoder(decoder, level.thresholds, dense_tokens=29)
    found = measure_quality(zeroed, torch.tensor([prompt + out.token_ids]), 30, None)
    assert found.choices[0].tolist() == out.token_ids
    # Zeroed inputs against sums over kept channels in fp32, attention in one piece against row by row.
    assert found.losses[0].tolist() == pytest.approx([-entry.logprob for entry in out.logprobs], abs=1e-3)


def test_a_budget_chooses_the_default(decoder):
    given = texts(decoder.config.vocab_size, count=6)
    options = {"allocation": "uniform", "budget_texts": given[3:], "levels": (0.02, 0.05, 0.6)}
    steps = []
    teal = calibrate_teal(decoder, given[:3], budget=Budget(agreement=0.7), on_step=steps.append, **options)
    tried = teal.calibration["tried"]
    keeps = [one["level"] for one in tried if one["agreement"] >= 0.7]
    assert teal.default == teal.at().level == max(keeps) < 0.6 and len(tried) == 3 and len(steps) == 4
    with pytest.raises(ValueError, match="not even level 0.02"):
        calibrate_teal(decoder, given[:3], budget=Budget(agreement=0.999), **options)
    with pytest.raises(ValueError, match="budget_texts"):
        calibrate_teal(decoder, given[:3], budget=Budget(agreement=0.9))
    with pytest.raises(ValueError, match="at most 0.95"):
        calibrate_teal(decoder, given[:3], levels=(0.5, 0.99))
    with pytest.raises(ValueError, match="more than the 50 dense"):
        calibrate_teal(decoder, given[:3], dense_tokens=50)


# ---- folders


@pytest.fixture
def teal():
    thresholds = torch.arange(28.0).reshape(2, 2, 7)
    return Teal((0.25, 0.5), thresholds, thresholds / 100, "greedy", 3, 0.25, BaseIdentity("tiny", "ab" * 32))


def test_a_folder_holds_what_was_saved(teal, tmp_path):
    teal.save(tmp_path / "t")
    found = Teal.load(tmp_path / "t", teal.base)
    assert torch.equal(found.thresholds, teal.thresholds) and torch.equal(found.sparsities, teal.sparsities)
    for name in ("levels", "allocation", "dense_tokens", "default", "base"):
        assert getattr(found, name) == getattr(teal, name)
    assert found.at(0.5).dense_tokens == 3 and torch.equal(found.at(0.5).thresholds, teal.thresholds[1])
    assert found.at().name == "teal 0.25"
    with pytest.raises(FileExistsError):
        teal.save(tmp_path / "t")
    with pytest.raises(ValueError, match=r"the level is 0.3, and these thresholds have \(0.25, 0.5\)"):
        found.at(0.3)


@pytest.mark.hazard(17, 18)
@pytest.mark.parametrize(
    ("tensors", "change", "words"),
    [
        ({"thresholds": math.nan, "sparsities": 0.5}, {}, "NaN"),
        ({"thresholds": -1.0, "sparsities": 0.5}, {}, "at least 0"),
        ({"thresholds": 1.0, "sparsities": 2.0}, {}, "shares from 0 to 1"),
        ({"thresholds": 1.0}, {}, "with thresholds and sparsities"),
        (None, {"method": "tda"}, "method 'teal'"),
        (None, {"levels": [0.5, 0.25]}, "rising"),
        (None, {"levels": [0.5]}, r"expected \[1, L, P\]"),
        (None, {"default": 0.4}, "name one"),
        (None, {"allocation": "best"}, "greedy"),
        (None, {"dense_tokens": -1}, "dense_tokens"),
        (None, {"unknown": 1}, "unknown"),
    ],
)
def test_what_does_not_fit_is_refused(teal, tensors, change, words, tmp_path):
    """Honest hashes around wrong contents."""
    teal.save(tmp_path / "t")
    files = {name: (tmp_path / "t" / name).read_bytes() for name in ("config.json", "thresholds.safetensors")}
    if tensors is not None:
        save_file({name: torch.full((2, 2, 7), value) for name, value in tensors.items()}, tmp_path / "x")
        files["thresholds.safetensors"] = (tmp_path / "x").read_bytes()
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | change).encode()
    write_folder(tmp_path / "t", files, {"format_version": 1, "base": vars(teal.base)}, set(files))
    with pytest.raises(ArtefactError, match=words):
        Teal.load(tmp_path / "t")


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    made = tmp_path_factory.mktemp("teal")
    (made / "text.txt").write_text("a stone skips over the water and the rain falls on the stones. " * 60)
    recipe = TealRecipe(str(tiny_folder), made / "text.txt", made / "out", allocation="uniform")
    found = follow(recipe, torch.float32)
    json.dumps(summary(found), allow_nan=False)
    assert [set(own.values()) for own in summary(found)["sparsities"]] == [{0.1}, {0.25}, {0.4}, {0.5}, {0.65}]
    with pytest.raises(FileExistsError):
        follow(recipe, torch.float32)
    return made / "out"


def test_load_takes_a_folder_or_thresholds(tiny_folder, tiny_heads_folder, folder):
    options = {"dtype": torch.float32, "device": "cpu", "progress": False, "teal": folder, "teal_level": 0.5}
    prompt = "the rain falls on the stones and a stone skips over the water"
    drafting = load(tiny_folder, heads=tiny_heads_folder, draft="teal", **options)
    assert (drafting.verify, drafting.draft) == ("dense", "teal 0.5")
    report = drafting.verify_lossless(prompt, max_new_tokens=8)
    assert report.equal and report.speculative.stats.num_drafted > 0
    # three of the four layers, twice: packed and by input channel
    per_layer = 48 * (48 + 24 + 24 + 48 + 3 * 80)
    assert f"{3 * per_layer * 4 / 2**20:.1f} MiB" in drafting.memory().split("; ")[-1]
    thinned = load(tiny_folder, heads=None, verify="teal", **options)
    assert thinned.verify == thinned.generate(prompt, max_new_tokens=8).verify == "teal 0.5"
    own = load(tiny_folder, heads=None, verify="teal", **options | {"teal": Teal.load(folder)})
    assert own.generate(prompt, max_new_tokens=8).token_ids == thinned.generate(prompt, max_new_tokens=8).token_ids
    assert Teal.load(folder).base == identity(load_pretrained(tiny_folder, torch.float32, progress=False))
    with thinned.stream(prompt, max_new_tokens=2), pytest.raises(RuntimeError, match="open stream"):
        thinned.drop_inputs()
    thinned.drop_inputs()
    assert thinned.verify == thinned.draft == "dense"


def test_what_cannot_be_thinned_out_is_refused(tiny_folder, tiny_heads_folder, folder, tmp_path, engine_of, stateful):
    options = {"heads": None, "dtype": torch.float32, "device": "cpu", "progress": False}
    for given in ({"verify": "teal"}, {"draft": "teal"}, {"teal": folder}, {"teal_level": 0.5}):
        with pytest.raises(ValueError, match="'teal' needs thresholds"):
            load(tiny_folder, **given, **options)
    with pytest.raises(ValueError, match="expected 'dense' or 'teal'"):
        load(tiny_folder, draft="tda", teal=folder, **options)
    with pytest.raises(ValueError, match="these thresholds have no default"):
        load(tiny_folder, draft="teal", teal=folder, **options)
    with pytest.raises(ArtefactError, match="no thresholds at"):
        load(tiny_folder, draft="teal", teal=tmp_path / "none", **options)
    level = Teal.load(folder).at(0.5)
    engine = load(tiny_folder, draft="teal", teal=folder, teal_level=0.5, **options | {"heads": tiny_heads_folder})
    with pytest.raises(ValueError, match="verifies nothing"):
        engine.generate("a stone", mode="early_exit", max_new_tokens=2)
    with pytest.raises(ValueError, match="leave draft='teal' out"):
        engine.drop_inputs(level, level)
    own = engine_of("llama2")
    stateful(own, "recurrent")
    with pytest.raises(ValueError, match="load with heads='adapter'"):
        own.drop_inputs(draft=level)
    with pytest.raises(ValueError, match=r"thresholds are \[2, 7\], expected \[4, 7\]"):
        Engine(own.decoder, sparsity=Teal((0.5,), torch.ones(1, 2, 7), torch.ones(1, 2, 7)).at(0.5))
    own.decoder.device, own.here = torch.device("cuda"), nullcontext
    with pytest.raises(ValueError, match="needs the fused kernels"):
        own.drop_inputs(verify=level)
    own.heads = None
    with pytest.raises(ValueError, match="draft='teal' needs the fused kernels where the model is on cuda"):
        own.drop_inputs(draft=level)
