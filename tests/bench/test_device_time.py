"""Times on the device that need one."""

from __future__ import annotations

import pytest
import torch
from skipstone.bench.device_time import clock_mhz


@pytest.mark.gpu
def test_the_clock_is_one_that_a_gpu_runs_at() -> None:
    assert 200 < clock_mhz(torch.device("cuda")) < 4000
