"""Sums of squared inner activations, against their reference.

Regimes: 1, 17 and all of 48 rows live, in the middle and at the end of tiles; neurons 1, 31, 32, 33, 100; rows that are
not live are NaN; the same rows in one step and in several. Without a GPU in Triton's interpreter, which proves logic
only.

Planted bugs that these tests were seen to catch: sums that begin at zero, a tile's rows taken for the next one's,
squares of a whole step added up before they are added to what is there.
"""

from __future__ import annotations

import pytest
import torch
from skipstone.kernels.neuron_squares import neuron_squares, neuron_squares_reference
from skipstone.kernels.rows import Rows
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.triton
# the interpreter's bf16 arithmetic is wrong, so bf16 is for GPUs only
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else [])


def live_rows(num_rows: int, live: list[int]) -> Rows:
    rows = Rows.empty(num_rows, DEVICE)
    rows.live[live] = 1
    return rows


def drawn(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    values = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(width)) * 3
    return values.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("live", [[16], [*range(17)], [*range(48)]], ids=["one", "a tile and one", "all"])
def test_sums(live: list[int], width: int, dtype: torch.dtype) -> None:
    rows, a = live_rows(48, live), drawn(48, width, dtype)
    a[rows.live == 0] = float("nan")
    out = torch.full((width,), 2.5, device=DEVICE)
    expected = neuron_squares_reference(a, rows, out)
    neuron_squares(a, rows, out)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=0)  # sums of squares in another order


def test_known_values() -> None:
    a = torch.tensor([[1.0, -2.0], [3.0, 0.5]], device=DEVICE).repeat(8, 1)
    out = torch.tensor([10.0, 0.0], device=DEVICE)
    neuron_squares(a, live_rows(16, [0, 1, 2]), out)
    assert out.tolist() == [21.0, 8.25]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_steps(dtype: torch.dtype) -> None:
    """Rows 0 to 70 at once, and in steps of 16, 32 and 32 rows, the last one padded."""
    a = drawn(80, 40, dtype)
    at_once, in_steps = torch.zeros(2, 40, device=DEVICE)
    neuron_squares(a, live_rows(80, list(range(71))), at_once)
    for first, size in ((0, 16), (16, 32), (48, 32)):
        neuron_squares(a[first : first + size], live_rows(size, [r for r in range(size) if first + r < 71]), in_steps)
    assert torch.equal(at_once, in_steps) and bool((at_once > 0).all())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \[R, FF\], \[FF\]"):
        neuron_squares(torch.zeros(16, 8, device=DEVICE), live_rows(16, [0]), torch.zeros(9, device=DEVICE))
