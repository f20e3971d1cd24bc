"""Accepted keys and values moved into place.

Regimes: identity paths, a jump at every place, 16 nodes, paths that overlap their destination; sequences of other
lengths, without a path, and beyond the record; head widths 20 (no power of two), 64 and 128; fp32, fp16, bf16 (bits are
copied); caches that are views. Slots that no path names hold NaN and keep their bits. Without a GPU the kernel runs in
Triton's interpreter, which proves its logic only (a barrier left out shows on a GPU alone).

Planted bugs that these tests were seen to catch: rows moved one after the other from the last to the first; the base
after the round; the path of the first sequence for all; values left behind.
"""

from __future__ import annotations

import pytest
import torch
from skipstone.kernels.commit import commit, commit_reference

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
PATHS = [[0, 2, 3, 7], [], [0], [0, 1, 2], [0, 1, 5], list(range(16)), [0, *range(2, 16)], [0, 15]]


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [20, 64, 128])
def test_rows_move_and_nothing_else(head_dim: int, dtype: torch.dtype) -> None:
    batch, num_slots = len(PATHS), 60
    generator = torch.Generator().manual_seed(head_dim)
    whole = torch.randn(2, 3, batch + 1, 2, num_slots, head_dim, generator=generator).to(dtype).to(DEVICE)
    bases = [0, 3, 44, 5, 16, 44, 20, 31]
    for b, (base, path) in enumerate(zip(bases, PATHS, strict=True)):
        unused = [slot for slot in range(num_slots) if slot - base not in [*path, *range(len(path))]]
        whole[:, :, b, :, unused] = float("nan")
    expected = whole.clone()
    for b, (base, path) in enumerate(zip(bases, PATHS, strict=True)):
        for cache in expected:
            if path:
                commit_reference(cache, b, base, path)
    record = torch.full((batch, 96), 9, dtype=torch.int32, device=DEVICE)
    record[:, 3] = torch.tensor(bases)
    path_nodes = torch.full((batch, 16), 13, dtype=torch.int32, device=DEVICE)
    for b, path in enumerate(PATHS):
        path_nodes[b, : len(path)] = torch.tensor(path)
    num_path = torch.tensor([len(path) for path in PATHS], dtype=torch.int32, device=DEVICE)
    commit(whole[0], whole[1], record, path_nodes, num_path)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(whole.view(bits), expected.view(bits))
    # by hand: the third accepted row of sequence 0 was node 3
    assert PATHS[0][2] == 3 and not torch.isnan(whole[:, :, 0, :, 0:4]).any()


@pytest.mark.triton
def test_caches_that_do_not_fit_are_refused() -> None:
    cache = torch.zeros(1, 1, 1, 20, 16, device=DEVICE)
    record = torch.zeros(2, 96, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="a record of 2 sequences"):
        commit(cache, cache, record, record[:, :16], record[:, 0])
    with pytest.raises(ValueError, match="equal shapes and strides"):
        commit(cache, cache[..., :8], record, record[:, :16], record[:, 0])
