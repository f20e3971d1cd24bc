"""The bench of one-row projections: every arm computes what its reference does, and one that does not is not timed.

Planted bug seen to fail here: a threshold that reads everything.
"""

import pytest
import torch
from skipstone.bench import sparse_kernels as bench
from skipstone.bench.device_time import Spread

pytestmark = pytest.mark.interpreter
SMALL = bench.Projection("qkv", 128, (64, 128))


@pytest.fixture(scope="module")
def arms():
    return bench.arms(SMALL, (0.5,), torch.device("cpu"), torch.float32)


def test_every_arm_agrees_with_its_reference(arms):
    assert [arm.name for arm in arms] == [
        *("rows", "sparse 0.5, listed", "sparse 0.5"),
        *("int8", "int8 0.5, listed", "int8 0.5", "int4", "int4 0.5, listed", "int4 0.5"),
    ]
    for arm in arms:
        assert bench.wrong(arm, arm.settings[0]) is None, arm.name
    dense, sparse = arms[0], arms[1]
    assert (dense.expected - sparse.expected).abs().max() > bench.TOLERANCE * dense.expected.abs().max()


def test_settings_that_are_tried_are_few_and_fit():
    found = bench.tried({"COLUMNS": 64, "PARTS": 8, "num_warps": 4}, {"COLUMNS": 64, "PARTS": 8, "num_warps": 4})
    assert found == (
        {"COLUMNS": 64, "PARTS": 8, "num_warps": 4},
        {"COLUMNS": 64, "PARTS": 8, "num_warps": 8},
        {"COLUMNS": 32, "PARTS": 8, "num_warps": 4},
    )
    for k, ends in ((p.inputs, p.ends) for model in bench.MODELS.values() for p in model):
        own = bench.tried(bench.sparse._settings(k, ends))
        assert 2 <= len(own) <= 5 and own[0] == bench.sparse._settings(k, ends)


def test_what_is_wrong_is_not_timed(arms, monkeypatch):
    monkeypatch.setattr(bench, "arms", lambda *args: arms[:4])
    monkeypatch.setattr(bench, "time_us", lambda arm, settings: Spread(1.0, 2.0, 3.0))
    monkeypatch.setattr(bench, "MODELS", {"small": (SMALL,)})
    found = bench.measure("small", (0.5,), torch.device("cpu"))
    assert [row["arm"] for row in found["projections"]] == ["rows", "sparse 0.5, listed", "sparse 0.5", "int8"]
    assert set(found["layer_speedup"].values()) == {1.0} and not found["failed"]
    right = bench.sparse.list_kept
    monkeypatch.setattr(bench.sparse, "list_kept", lambda x, limits, *args, **more: right(x, limits - 9, *args, **more))
    found = bench.measure("small", (0.5,), torch.device("cpu"))
    assert [row["arm"] for row in found["projections"]] == ["rows", "sparse 0.5, listed", "int8"]
    assert {one["arm"] for one in found["failed"]} == {"sparse 0.5"} and "relative error" in found["failed"][0]["why"]


def test_speedups_are_against_the_fastest_dense_arm_of_the_same_bits():
    us = {"cublas": 8.0, "rows": 6.0, "sparse 0.5": 3.0, "int4": 4.0, "int4 0.5, listed": 2.5}
    assert [bench.speedup(arm, us) for arm in ("sparse 0.5", "cublas", "int4 0.5, listed")] == [2.0, 0.75, 1.6]
    assert bench.speedup("int8 0.5", {"int8 0.5": 1.0}) is None
