"""Speculative output equals plain output on every family's tiny model.

Regimes: fp32 and bf16; greedy and T = 0.8 with every filter; several exits with gates that extend, branch and stop
(heads that are mostly right, sometimes wrong, of two minds or NaN: `PlannedHeads`); a fixed exit; ragged prompts on
both sides of a key group's border (64) and of every sliding window (8), each row of a batch against its solo plain run
(hazards 7, 8, 24).

Planted bug seen to fail here: a draft node taken to a deeper exit than its parent, whose keys there are then missing.
"""

import pytest
import torch
from skipstone.engine.gate import Gate, every, fixed_exit

LENGTHS = (5, 61, 77)
NEW = 14
SAMPLED = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01}
DECIDING = Gate(0.3, 1.5)  # certain: extend; two or three candidates: branch; nine: stop


def prompts(vocab_size, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.hazard(7, 8, 24)
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_of_trees_equals_solo_plain(family, dtype, sampling, engine_of, planned, assert_same_output):
    engine = engine_of(family, dtype)
    heads = planned(engine)
    given = prompts(engine.decoder.config.vocab_size)
    seeds = [11, 12, 13]
    plain = [
        heads.learn(ids, max_new_tokens=NEW, seed=seed, logprobs=2, **sampling)
        for ids, seed in zip(given, seeds, strict=True)
    ]
    policy = every((1, 2, 3), DECIDING, branch=3, max_depth=6)
    outs = engine.generate(given, seeds=seeds, policy=policy, max_new_tokens=NEW, logprobs=2, **sampling)
    for out, expected in zip(outs, plain, strict=True):
        assert_same_output(out, expected)
    assert sum(out.stats.num_accepted for out in outs) > NEW, "the heads should often be right"
    assert len({layer for out in outs for layer in out.exit_layers}) > 2, "several exits should have spoken"
    chain = engine.generate(
        given[1], seed=seeds[1], policy=fixed_exit(2, 4), max_new_tokens=NEW, logprobs=2, **sampling
    )
    assert_same_output(chain, plain[1])
