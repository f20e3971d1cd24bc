"""The GPU's way of attending (`gathered_attention` in fixed tiles of 16), run on the CPU where its shapes prove the
same.

Regimes: every family; trees in batches against solo plain runs, and the tokens of the CPU's own way (fp32: both are
within rounding of each other, and no near-tie stands in these outputs).
"""

import torch
from skipstone.engine.forward import RowTiles
from skipstone.engine.gate import Gate, every
from skipstone.engine.selftest import rows_agree

GATHERED = RowTiles(gathered=True)
NEW = 14


def test_trees_in_batches_equal_solo_plain_and_the_grouped_way(family, engine_of, planned, assert_same_output):
    engine = engine_of(family)
    grouped = [engine.generate([3, 1, 4], max_new_tokens=NEW), engine.generate(list(range(70)), max_new_tokens=NEW)]
    engine.tiles = GATHERED
    assert rows_agree(engine.decoder, GATHERED)
    heads = planned(engine)
    plain = [heads.learn(ids, max_new_tokens=NEW) for ids in ([3, 1, 4], list(range(70)))]
    policy = every((1, 2, 3), Gate(0.3, 1.5), branch=3, max_depth=5)
    outs = engine.generate([[3, 1, 4], list(range(70))], policy=policy, max_new_tokens=NEW)
    for out, expected, other in zip(outs, plain, grouped, strict=True):
        assert_same_output(out, expected)
        assert out.token_ids == other.token_ids
    assert sum(out.stats.num_accepted for out in outs) > 0


def test_stale_slots_are_never_read(engine_of):
    """Seen to fail when hidden positions name their own slot number in place of the row's own slot."""
    engine = engine_of()
    engine.tiles = GATHERED
    expected = engine.generate([3, 1, 4], max_new_tokens=NEW).token_ids
    engine.workspace.cache.k.fill_(float("nan"))
    engine.workspace.cache.v.fill_(float("nan"))
    assert engine.generate([3, 1, 4], max_new_tokens=NEW).token_ids == expected
    assert torch.isnan(engine.workspace.cache.k).any()
