"""The step specialised to one row computes what the step of tiles computes, without its matrix products.

Planted bugs seen to fail here: a share of k left out, the tile's products left in, settings of o and down swapped.
"""

from dataclasses import replace

import pytest
import torch
from skipstone.bench import one_row
from skipstone.bench import sweep_kernels as sweep
from skipstone.bench.kernel_ops import OPS, Bench, chain_rows
from skipstone.bench.shapes import random_weights, tiny_config
from skipstone.engine.cache import KVCache, plan_cache
from skipstone.engine.fused import FusedStep, FusedWeights
from skipstone.engine.model import Decoder

pytestmark = pytest.mark.interpreter
QWEN = tiny_config("qwen2")
CONFIG = replace(
    QWEN, num_layers=2, hidden_size=40, num_heads=2, num_kv_heads=1, head_dim=16, vocab_size=50, intermediate_size=72,
    ropes=tuple(replace(rope, inv_freq=rope.inv_freq[:8]) for rope in QWEN.ropes[:2]), windows=(None, None),
)  # fmt: skip


@pytest.mark.parametrize("depth", [16, 64])
@pytest.mark.parametrize("name", OPS[:1] + OPS[2:])
def test_operations(name, depth):
    """With k in several blocks, and in one."""
    bench = Bench(CONFIG, torch.device("cpu"), torch.float32, 2, one_row.kernels())
    op = bench.op(name)
    other = op.default | {"BK": depth, "SPLIT": 2}
    assert op.num_rows == 1 and sweep.wrong(op, other, False) is None
    launch, result = (
        Bench(CONFIG, torch.device("cpu"), torch.float32, 2)
        .op(name)
        .prepare(
            {key: 16 if key in ("BN", "BLOCK_P") else value for key, value in op.default.items()} | {"BLOCK_P": 8}
            if name == "qkv"
            else op.default | {"BN": 16, "BK": 16}
        )
    )
    launch(0, False)
    assert len(result()) == 16


def test_whole_step():
    """Hidden row and logits, at a position after some committed keys."""
    decoder = Decoder(CONFIG, random_weights(CONFIG, torch.float32, "cpu"))
    weights, kernels = FusedWeights(decoder), one_row.kernels()
    found = []
    for num_rows, step_of, own in ((16, FusedStep, None), (1, one_row.step_of(), kernels)):
        cache = KVCache(plan_cache(CONFIG, 1, 40, decoder.device, decoder.dtype), decoder.device)
        generator = torch.Generator().manual_seed(3)
        for store in (cache.k, cache.v):
            store.copy_(torch.randn(store.shape, generator=generator))
        step = step_of(weights, cache, num_rows)
        wanted = chain_rows(20 + num_rows, decoder.device, num_rows)
        for name, tensor in vars(step.rows).items():
            tensor.copy_(getattr(wanted, name))
        step.rows.live[1:] = 0
        step.ids[0] = 7
        step.embed()
        step.run(0, CONFIG.num_layers)
        head = weights.head
        logits = torch.zeros(num_rows, CONFIG.vocab_size)
        module = one_row.KERNELS.lm_head if own is None else own.lm_head
        module.lm_head(
            step.x, step.stats, head.weight, head.bias, head.shift, step.rows, eps=CONFIG.norm_eps, logits=logits
        )
        found.append(torch.cat([step.hidden[0], logits[0]]))
    tiles, alone = found
    assert (tiles - alone).abs().max() < 1e-5 * tiles.abs().max()
    for name in one_row.FIRST:
        copy, original = getattr(kernels, name), getattr(one_row.KERNELS, name)
        assert copy is not original and original.BLOCK_ROWS == 16 and copy.BLOCK_ROWS == 1
        names = [product for product in ("rows_product", "normed_rows_product") if hasattr(copy, product)]
        assert names and all(getattr(copy, product) is getattr(one_row, product) for product in names)


def test_settings_are_by_operation():
    best = {name: {"BN": i} for i, name in enumerate(OPS)}
    kept = {name: getattr(one_row.kernels(), name)._settings for name in one_row.FIRST}
    one_row.settle(best, CONFIG.intermediate_size)
    try:
        own = one_row.kernels()
        assert own.table(CONFIG, "o", torch.bfloat16) == best["o"]
        assert own.table(CONFIG, "down", torch.bfloat16) == best["down"]
        assert own.table(CONFIG, "lm_head", torch.bfloat16) == best["lm_head"]
    finally:
        for name, settings in kept.items():
            getattr(one_row.kernels(), name)._settings = settings
