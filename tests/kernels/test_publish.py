"""A round's report in the ring's next slot, and nothing else there.

Regimes: reports shorter and longer than a block, rings of one and several slots, twice around; on a GPU the ring is
pinned memory, written from a captured graph.

Planted bugs seen to fail here: a slot that stays, one that runs past the last, the end of a long report left out.
"""

from __future__ import annotations

import pytest
import torch
from skipstone.kernels.publish import publish, publish_reference

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


@pytest.mark.triton
@pytest.mark.parametrize(("size", "slots"), [(97, 4), (600, 3), (256, 1)])
def test_reports_go_around_the_ring(size: int, slots: int) -> None:
    report = torch.zeros(size, dtype=torch.int32, device=DEVICE)
    ring = torch.full((slots, size), -7, dtype=torch.int32, pin_memory=ON_GPU)
    expected, slot = ring.clone(), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    expected_slot = slot.clone()
    run = lambda: publish(report, ring, slot)  # noqa: E731
    if ON_GPU:
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
        ring.fill_(-7)
        slot.zero_()
    for number in range(2 * slots + 1):
        report.copy_(torch.arange(size, dtype=torch.int32) + 1000 * number)
        run()
        publish_reference(report, expected, expected_slot)
        if ON_GPU:
            torch.cuda.synchronize()
        assert torch.equal(ring, expected) and torch.equal(slot, expected_slot)


@pytest.mark.triton
def test_a_ring_that_does_not_fit_is_refused() -> None:
    report = torch.zeros(8, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="does not fit"):
        publish(report, torch.zeros(2, 9, dtype=torch.int32, device=DEVICE), report[:1])
