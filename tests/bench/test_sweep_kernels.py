"""The tuner launches every operation as it is, and only settings whose results hold are reported.

Times need a GPU; here the kernels run in Triton's interpreter, in fp32. Planted bugs seen to fail here: a finalist
whose result is off, one whose row has other bits when it is alone, an output that was never written.
"""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from skipstone.bench import sweep_kernels as sweep
from skipstone.bench.kernel_ops import KERNELS, OPS, Bench
from skipstone.bench.shapes import SHAPES, shape_config, tiny_config
from skipstone.bench.sweep_kernels import Search
from skipstone.kernels import tile

CONFIG = replace(tiny_config("qwen2"), vocab_size=300, hidden_size=96, intermediate_size=80)
CONTEXT = 70


@pytest.fixture(scope="module")
def bench():
    return Bench(CONFIG, torch.device("cpu"), torch.float32, cold_bytes=400_000)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", OPS)
def test_every_operation_runs_with_other_settings(name, bench):
    op = bench.op(name, CONTEXT if name == "attention" else 0)
    table = KERNELS.table(CONFIG, name, torch.float32)
    other = table | ({"BLOCK": 16} if name == "attention" else {"BLOCK_P": 16} if name == "qkv" else {"BN": 32})
    if "PARTS" in table:
        other["PARTS"] = 2
    assert op.copies * op.num_bytes <= 400_000 or op.copies == 1
    assert sweep.wrong(op, other, False) is None


@pytest.mark.interpreter
def test_wrong_results_are_out(bench, monkeypatch):
    monkeypatch.setattr(sweep, "time_us", lambda op, settings, *_: 1.0 + settings["BN"])
    op = bench.op("o")
    good, off, shaky, silent = (op.default | {"BN": n} for n in (16, 32, 64, 128))

    def prepare(settings):
        start, result = op.prepare(settings)

        def launch(copy, pdl):  # the interpreter knows no programmatic launch
            start(copy, False)

        if settings == silent:
            return (lambda copy, pdl: None), result
        if settings == off:
            return launch, lambda: 1.1 * result()
        if settings == shaky:
            return launch, lambda: result() + 1e-6 * op.rows.live.sum()
        return launch, result

    search = Search({}, Counter())
    search.time(op, [off, shaky, silent, good])
    assert search.ranked == [good, off, shaky, silent]
    monkeypatch.setattr(sweep, "FINALISTS", 4)
    found = search.finish(replace(op, prepare=prepare))
    assert [row["settings"] for row in found["finalists"]] == [good] and found["table"] == found["best"]
    assert [reason.split()[-1] for reason in sorted(found["failures"])] == ["16", "0.1", "nan"]
    json.dumps(found, allow_nan=False)
    first, *reasons = sweep.report("tiny", found)
    assert "best of 4" in first and len(reasons) == 3


@pytest.mark.interpreter
def test_settings_that_fail_are_counted(bench, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of resources")

    monkeypatch.setattr(sweep, "time_us", fail)
    search, op = Search({}, Counter()), bench.op("down")
    search.time(op, [op.default, op.default])
    assert search.failures == {"RuntimeError: out of resources": 2} and search.ranked == []


@pytest.mark.skipif(tile.triton is None, reason="tables are those of Triton kernels")
@pytest.mark.parametrize("num_rows", [16, 1])
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("model", SHAPES)
def test_grids(model, name, num_rows):
    """Settings have the names that the operation's table has; a sample starts with the table's own."""
    config, (kernels, grid_of) = shape_config(model), sweep.kernels_of(num_rows)
    grid, table = grid_of(config, name), kernels.table(config, name, torch.bfloat16)
    assert len(grid) == len({str(settings) for settings in grid}) > 20
    assert all(settings.keys() == table.keys() for settings in grid)
    drawn = sweep.draw(grid, table, 20)
    assert drawn[0] == table and len(drawn) == 21 and table not in drawn[1:]
    near = sweep.neighbours(grid, grid[len(grid) // 2])
    assert near and grid[len(grid) // 2] not in near and all(settings in grid for settings in near)


@pytest.mark.interpreter
def test_a_whole_sweep(monkeypatch, capsys):
    """Sample, neighbours of its best, finals: each compiled first; what does not compile is never timed."""
    monkeypatch.setattr(sweep, "Bench", lambda *_, **__: Bench(CONFIG, torch.device("cpu"), torch.float32, 2))
    monkeypatch.setattr(sweep, "time_us", lambda op, settings, *_: 1.0 + abs(settings["BLOCK"] - 50))
    monkeypatch.setattr(sweep, "wrong", lambda *_: None)
    monkeypatch.setattr(sweep, "bandwidth", lambda device: {"best": 1.0})
    monkeypatch.setattr(sweep, "describe_device", lambda device: {"name": "none"})
    compiled = []

    def compile_one(task, deadline):
        compiled.append(task)
        return "too large" if task[3]["BLOCK"] == 64 and task[3]["num_warps"] == 8 else None

    class Pool:
        def map(self, function, jobs, chunksize):
            return [function(job) for job in jobs]

    monkeypatch.setattr(sweep, "compile_one", compile_one)
    args = type("Args", (), {"most": 30, "near": 5, "seconds": 1.0, "rows": 16})
    found = sweep.sweep([("tiny", "attention", 40), ("tiny", "attention", CONTEXT)], {"tiny": CONFIG}, args, Pool())
    one, other = found["ops"]
    assert one["best"]["settings"]["BLOCK"] == 64 and one["best"]["settings"]["num_warps"] != 8
    assert {task[4] for task in compiled} == {True, False}
    timed = [str(s) for _, s in one["all"]]
    first = [str(task[3]) for task in compiled if task[:3] == ("tiny", "attention", 40) and task[4]]
    assert set(timed) <= set(first) and len(first) == len(set(first)) == 1 + 30 + 5
    assert other["sizes"]["context"] == CONTEXT and json.dumps(found, allow_nan=False)
    assert "us: 16 rows, pdl 15.00" in capsys.readouterr().out


@pytest.mark.interpreter
def test_a_worker_says_why_a_setting_fails(monkeypatch):
    monkeypatch.setattr(sweep, "_configs", {})
    monkeypatch.setattr(sweep, "_ops", {})
    sweep._begin({"tiny": CONFIG}, 16)
    monkeypatch.setattr(sweep, "Bench", lambda *_, **__: Bench(CONFIG, torch.device("cpu"), torch.float32, 2))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    table = KERNELS.table(CONFIG, "up", torch.float32)
    later = float("inf")
    assert sweep.compile_one(("tiny", "up", 0, table, False), later) is None
    assert "Error" in sweep.compile_one(("tiny", "up", 0, table | {"BN": 24}, False), later)
    assert sweep.compile_one(("tiny", "up", 0, table, False), 0.0) == "out of time"
