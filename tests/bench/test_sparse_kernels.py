"""The bench of one-row projections: every arm computes what its reference does, and one that does not is not timed.

Planted bug seen to fail here: a threshold that reads everything.
"""

import pytest
import torch
from skipstone.bench import sparse_kernels as bench
from skipstone.bench.device_time import Spread

pytestmark = pytest.mark.interpreter
SMALL = bench.Projection("qkv", 128, (512, 1024))


@pytest.fixture(scope="module")
def arms():
    return bench.arms(SMALL, (0.5,), torch.device("cpu"), torch.float32)


def test_every_arm_agrees_with_its_reference(arms):
    assert [arm.name for arm in arms] == ["rows", "channels", "sparse 0.5", "int8", "int8 0.5", "int4", "int4 0.5"]
    for arm in arms:
        assert bench.wrong(arm, arm.settings[0]) is None, arm.name
        assert all(512 % s["BN"] == 0 for s in arm.settings if arm.kind != "rows")
    dense, sparse = arms[1], arms[2]
    assert (dense.expected - sparse.expected).abs().max() > bench.TOLERANCE * dense.expected.abs().max()


def test_what_is_wrong_is_not_timed(arms, monkeypatch):
    monkeypatch.setattr(bench, "arms", lambda *args: [arms[1], arms[2], arms[3]])
    monkeypatch.setattr(bench, "time_us", lambda arm, settings: Spread(1.0, 2.0, 3.0))
    monkeypatch.setattr(bench, "MODELS", {"small": (SMALL,)})
    found = bench.measure("small", (0.5,), torch.device("cpu"))
    assert [row["arm"] for row in found["projections"]] == ["channels", "sparse 0.5", "int8"]
    assert found["layer_speedup"] == {"channels": 1.0, "sparse 0.5": 1.0, "int8": 1.0} and not found["failed"]
    reads_all = bench.sparse_linear
    monkeypatch.setattr(
        bench, "sparse_linear", lambda x, w, limits, *args, **more: reads_all(x, w, None, *args, **more)
    )
    found = bench.measure("small", (0.5,), torch.device("cpu"))
    assert [row["arm"] for row in found["projections"]] == ["channels", "int8"]
    assert {one["arm"] for one in found["failed"]} == {"sparse 0.5"} and "relative error" in found["failed"][0]["why"]


def test_speedups_are_against_the_fastest_dense_arm_of_the_same_bits():
    us = {"cublas": 8.0, "rows": 6.0, "channels": 9.0, "sparse 0.5": 3.0, "int4": 4.0, "int4 0.5": 2.5}
    assert [bench.speedup(arm, us) for arm in ("sparse 0.5", "cublas", "int4 0.5")] == [2.0, 0.75, 1.6]
    assert bench.speedup("int8 0.5", {"int8 0.5": 1.0}) is None
