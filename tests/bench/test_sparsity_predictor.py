"""A trained predictor of neurons on the tiny model: it learns, and its masks and unions are what they are called.

Planted bugs seen to fail here: it learns the weakest neurons; the union is of all texts' rows; a mask on the prompt; a
neuron's strength without its column's norm.
"""

from __future__ import annotations

import pytest
import torch
from skipstone.bench.sparsity import Windows
from skipstone.bench.sparsity_predictor import (
    DEPTH,
    PATHS,
    TokenTarget,
    about_tokens,
    draft_trees,
    exact,
    found_of_strongest,
    train_predictors,
    union_over_rows,
)
from skipstone.engine.load import load
from skipstone.engine.sparsity.neurons import dense_weight
from skipstone.engine.sparsity.quality import measure_quality
from skipstone.engine.sparsity.tda import measure_curves

SHARE = 0.5


@pytest.fixture(scope="module")
def decoder(tiny_folder):
    return load(tiny_folder, heads=None, dtype=torch.float32, device="cpu", progress=False).decoder


@pytest.fixture(scope="module")
def windows():
    return Windows(torch.randint(320, (4, 48), generator=torch.Generator().manual_seed(0)), 16)


def test_it_learns_its_text_better_than_a_fixed_pruning(decoder, windows):
    trained, untrained = (
        train_predictors(decoder, windows.texts, (SHARE,), 0, rank=16, epochs=epochs)[SHARE] for epochs in (150, 0)
    )
    fixed = measure_curves(decoder, windows.texts, levels=0).fixed_strengths()
    target = TokenTarget(trained, SHARE, 0)
    rows = about_tokens(decoder, windows, {"trained": target, "exact": TokenTarget(exact, SHARE, 0)}, fixed)
    own = rows["trained"]
    assert own["found_of_strongest"] > own["found_by_fixed"] + 0.1
    assert rows["exact"]["found_of_strongest"] == 1 and "parameters" not in rows["exact"]
    start = found_of_strongest(decoder, windows, {"": TokenTarget(untrained, SHARE, 0)})[""]
    assert SHARE < start < own["found_of_strongest"], "without training it knows how often neurons are active"
    config = decoder.config
    size = config.num_layers * 16 * (config.hidden_size + config.intermediate_size)
    assert own["multiply_adds"] == size and own["parameters"] > size and own["training_cpu_seconds"] > 0
    assert own["share_of_neurons"] == pytest.approx(
        16 * (config.hidden_size + config.intermediate_size) / (3 * config.hidden_size * config.intermediate_size)
    )


def test_the_same_seed_learns_the_same(decoder, windows):
    rows = torch.randn(5, decoder.config.hidden_size, generator=torch.Generator().manual_seed(1))
    once, again = (train_predictors(decoder, windows.texts, (SHARE,), 1, 4, 1)[SHARE] for _ in range(2))
    assert torch.equal(once(1, rows, rows), again(1, rows, rows)) and 0 not in once.networks


def test_masks_are_of_the_rows_behind_the_prompt(decoder, windows):
    dense = measure_quality(decoder, windows.texts, windows.prompt_len, None)
    whole = TokenTarget(exact, 1.0, 0).read(decoder, windows)
    assert torch.equal(whole.losses, dense.losses) and whole.density == [1.0] * decoder.config.num_layers
    half = TokenTarget(exact, SHARE, 1).read(decoder, windows)
    assert set(half.kept) == set(range(1, decoder.config.num_layers))
    behind = windows.texts.shape[1] - windows.prompt_len + 1
    assert all(kept.shape[:2] == (4, behind) for kept in half.kept.values())
    assert half.density == [1.0] + [SHARE] * (decoder.config.num_layers - 1)
    # Of the weakest neurons the loss is another one, so the mask is used.
    weakest = TokenTarget(lambda layer, normed, norms: -norms, SHARE, 1).read(decoder, windows)
    near, far = ((found.losses - dense.losses).abs().mean() for found in (half, weakest))
    assert 0 < near < far


def test_strongest_is_by_output_norm(decoder, windows):
    masks, seen = TokenTarget(exact, SHARE, 0).masks(decoder, 4, windows.prompt_len), {}

    def watch(layer, normed):
        seen[layer] = decoder.neurons(decoder.layers[layer].up, normed)
        return masks(layer, normed)

    with torch.inference_mode():
        decoder.encode(windows.texts, [1], watch)
        row = seen[0].view(4, windows.texts.shape[1], -1)[2, -1]
        outputs = row * dense_weight(decoder.layers[0].down).float()  # [D, F]: what each neuron adds
    count = round(SHARE * len(row))
    strong = set(outputs.norm(dim=0).topk(count).indices.tolist())
    assert set(masks.kept[0][2, -1].nonzero().flatten().tolist()) == strong


def test_only_rows_behind_the_prompt_change(decoder, windows):
    last, masks = decoder.config.num_layers, TokenTarget(exact, SHARE, 0).masks(decoder, 4, windows.prompt_len)
    with torch.inference_mode():
        plain, masked = (decoder.encode(windows.texts, [last], mlp)[last] for mlp in (None, masks))
    read = windows.prompt_len - 1
    torch.testing.assert_close(masked[:, :read], plain[:, :read])
    assert not torch.allclose(masked[:, read:], plain[:, read:], atol=1e-3)


def test_trees_and_the_union_over_their_rows(decoder, windows):
    prompts = windows.texts[:2, :12]
    trees = draft_trees(decoder, prompts)
    assert trees.shape == (2 * PATHS, 12 + DEPTH) and torch.equal(trees[PATHS, :12], prompts[1])
    last = decoder.config.num_layers
    with torch.inference_mode():
        states = decoder.final_norm(decoder.encode(trees, [last])[last])
    choices = decoder.lm_head(states).argmax(-1)
    assert torch.equal(choices[:, 12:-1], trees[:, 13:]), "greedy behind the first token"
    assert torch.equal(choices[::PATHS, 11], trees[::PATHS, 12]), "the likeliest path is the first"
    assert len(set(trees[:PATHS, 12].tolist())) == PATHS
    union = union_over_rows(decoder, trees, TokenTarget(exact, SHARE, 0))
    assert union["1"] == pytest.approx(SHARE) and union["1"] < union["4"] < union["8"] < union["16"] <= 1
    same = TokenTarget(lambda layer, normed, norms: torch.arange(norms.shape[-1]).expand(norms.shape), SHARE, 0)
    assert union_over_rows(decoder, trees, same)["16"] == pytest.approx(SHARE), "one mask adds up to itself"
    alone = [union_over_rows(decoder, own, TokenTarget(exact, SHARE, 0))["16"] for own in trees.split(PATHS)]
    assert union["16"] == pytest.approx(sum(alone) / 2, abs=1e-6), "trees are not added up"
