"""What `doctor` says of the fused kernels: in use, refused by their self-test, or not here at all.

The rest of `doctor` is tested through the command line (tests/test_cli.py).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from skipstone.bench import doctor
from skipstone.kernels import tile


def test_fused_kernels_are_reported(engine_of: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug that this was seen to catch: a refusal told as kernels that are not there."""
    engine = engine_of()
    version = "no Triton" if tile.triton is None else f"Triton {tile.triton.__version__}"
    check = doctor.fused_kernels(engine)
    assert check.status == "skipped" and check.detail.startswith(f"{version}, on cpu: the reference path decodes")

    engine.fused = object()
    check = doctor.fused_kernels(engine)
    assert check.status == "ok" and check.detail.endswith("programmatic dependent launch off")
    monkeypatch.setattr(doctor, "has_dependent_launch", lambda device: True)
    assert doctor.fused_kernels(engine).detail.endswith("programmatic dependent launch on")

    engine.fused, engine.fused_refused = None, True
    check = doctor.fused_kernels(engine)
    assert check.status == "failed" and "rows differ in their bits" in check.detail
    monkeypatch.setattr(tile, "triton", None)
    assert doctor.fused_kernels(engine).detail.startswith("no Triton: ")


@pytest.mark.parametrize(
    ("alone", "status", "detail"), [(3.0, "ok", "3x as fast"), (0.5, "warning", "OMP_NUM_THREADS=1")]
)
def test_threads_that_do_not_help_are_told(
    alone: float, status: str, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of its own: a step takes 1 s with two threads, `alone` with one."""
    number, clock = [2], [0.0]

    def step() -> None:
        clock[0] += alone if number[0] == 1 else 1.0

    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: number[0])
    monkeypatch.setattr(doctor.torch, "set_num_threads", lambda count: number.__setitem__(0, count))
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: clock[0])
    check = doctor.threads(step)
    assert check.status == status and detail in check.detail
    assert number == [2]
