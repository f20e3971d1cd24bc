"""Moving weights into huge pages: the contents stay, foreign systems are left alone."""

import sys
import threading

import pytest
import torch
from skipstone.kernels import huge_pages
from skipstone.kernels.huge_pages import PAGE, settle, use_huge_pages
from skipstone.kernels.linear import PackedLinear


def huge_bytes(weight: torch.Tensor) -> int:
    """Bytes in huge pages of the mappings that the tensor lies in; others of the process come and go meanwhile."""
    start, found, inside = weight.data_ptr(), 0, False
    with open("/proc/self/smaps", encoding="ascii") as lines:
        for line in lines:
            words = line.split()
            if "-" in words[0] and not words[0].endswith(":"):
                first, last = (int(word, 16) for word in words[0].split("-"))
                inside = first < start + weight.nbytes and start < last
            elif inside and words[0] == "AnonHugePages:":
                found += 1024 * int(words[1])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_keep_their_bits(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2048, 1024, generator=generator).to(dtype)
    linear, x = PackedLinear(weight), torch.randn(3, 1024, generator=generator).to(dtype)
    before, copy = linear(x), weight.clone()
    use_huge_pages([linear.weight, weight])
    assert torch.equal(linear(x), before) and torch.equal(weight, copy)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's interface")
def test_says_how_much_was_moved():
    weight = torch.randn(4 * PAGE // 4)
    moved = use_huge_pages([weight])
    if not moved:
        pytest.skip("this kernel moves nothing on request")
    # the tensor touches four or five pages, the outer ones perhaps beyond its mapping
    assert 3 * PAGE <= moved <= 5 * PAGE and huge_bytes(weight) >= moved - 2 * PAGE


def test_other_systems_and_devices_are_left_alone(monkeypatch):
    assert use_huge_pages([torch.empty(8, device="meta")]) == 0
    monkeypatch.setattr(sys, "platform", "darwin")
    assert use_huge_pages([torch.zeros(4 * PAGE)]) == 0


def test_only_large_models_are_moved(monkeypatch):
    moved = threading.Event()
    monkeypatch.setattr(huge_pages, "use_huge_pages", lambda weights: moved.set())
    settle([torch.zeros(1000)])
    assert not moved.wait(0.2)
    settle(torch.empty(huge_pages.LEAST // 8, dtype=torch.float32) for _ in range(2))
    assert moved.wait(10)
