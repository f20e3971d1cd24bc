"""Lists of the channels that a row keeps, against the reference, entry by entry.

Regimes: K of one channel, no multiple of a chunk, of several chunks; one to three thresholds; runs that fill up behind
a chunk and behind groups; all kept; nothing kept; a chunk of which nothing is kept; a NaN; -0; poisoned lists.

Planted bugs seen to fail here: no empty entries behind a group; a group's start without the empty ones of those before
it; the first threshold for all; a chunk's channels from 0.
"""

from __future__ import annotations

import pytest
import torch
from skipstone.kernels.kept_list import RUN, KeptList, list_kept, list_kept_reference
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.triton


def poisoned(k: int, segments: int, group: int | None = None) -> KeptList:
    lists = KeptList.empty(k, segments, DEVICE, group)
    lists.entries.fill_(0x7FC00000)
    lists.runs.fill_(-(1 << 30))
    return lists


def channels(lists: KeptList, x: Tensor) -> list[list[list[int]]]:
    """What `list_kept_reference` gives; the values are looked at on the way."""
    found = []
    for entries, runs in zip(lists.entries.cpu().split(1), lists.runs.tolist(), strict=True):
        own = []
        for chunk, count in zip(entries.view(-1, lists.chunk), runs, strict=True):
            listed = chunk[: count * RUN]
            ks, values = (listed >> 32), listed.to(torch.int32).view(torch.float32)
            expected = torch.where(ks < 0, 0.0, x.float().cpu()[ks.clamp_min(0)])
            assert torch.equal(values.view(torch.int32), expected.view(torch.int32))
            own.append(ks.tolist())
        found.append(own)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("k", [1, 127, 300, 2049])
def test_lists(k: int, group: int | None, dtype: torch.dtype) -> None:
    x = torch.randn(k, generator=torch.Generator().manual_seed(k)).to(dtype).to(DEVICE)
    if k == 300:
        x[128:256] = 0.1  # a chunk of which nothing is kept
        x[3], x[290] = torch.nan, -0.0
    limits = torch.tensor([0.4, 0.9, -1.0], device=DEVICE)  # the last keeps all
    lists = poisoned(k, 3, group)
    list_kept(x, limits, lists)
    assert channels(lists, x) == list_kept_reference(x, limits, lists.chunk, lists.group)


def test_known_lists() -> None:
    x = torch.zeros(200, device=DEVICE)
    x[[1, 5, 40, 130]] = torch.tensor([2.0, -3.0, 1.0, torch.nan], device=DEVICE)
    lists = poisoned(200, 2, 32)
    list_kept(x, torch.tensor([0.5, 2.0], device=DEVICE), lists)
    rest = [-1] * 8
    assert channels(lists, x) == [
        [[1, 5, *rest[:6], 40, *rest[:7]], [130, *rest[:7]]],
        [[5, *rest[:7]], [130, *rest[:7]]],
    ]
    list_kept(x.nan_to_num(0.0), torch.tensor([9.0, 9.0], device=DEVICE), lists)
    assert (lists.runs == 0).all()


def test_what_has_no_room_is_refused() -> None:
    lists = KeptList.empty(300, 2, DEVICE)
    with pytest.raises(ValueError, match="the lists are 2 of 3 chunks of 128"):
        list_kept(torch.ones(400, device=DEVICE), torch.ones(2, device=DEVICE), lists)
    with pytest.raises(ValueError, match="3 thresholds"):
        list_kept(torch.ones(300, device=DEVICE), torch.ones(3, device=DEVICE), lists)
