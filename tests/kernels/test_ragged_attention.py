"""Attention of rows that each stand at their own position.

Regimes: position 0 (only the row's own key), the cache's last place, lengths at a block's edge and beside it, grouped
heads 1, 3 and 7, head widths that are no power of two, windows inside and across blocks, soft-caps; caches poisoned
with NaN wherever a row must not look. Without a GPU the kernel runs in Triton's interpreter (`TRITON_INTERPRET=1`),
which proves its logic only. Planted bugs that these tests were seen to catch: the window off by one, the mask
`at <= position` (the own key twice), the own key not stored, heads of another group.
"""

from __future__ import annotations

import pytest
import torch
from skipstone.kernels import ragged_attention as op
from skipstone.kernels.ragged_attention import ragged_attention, ragged_attention_reference
from torch import Tensor

ON_GPU = torch.cuda.is_available()
# fp32: sums of up to 200 products in another order. Half: weights rounded to the cache's dtype before their product.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# heads, KV heads, head width, capacity, window, soft-cap
SHAPES = [
    (9, 3, 64, 200, None, None),
    (14, 2, 64, 130, None, None),
    (4, 4, 80, 70, None, 30.0),
    (6, 2, 20, 150, 8, None),
    (4, 1, 128, 150, 65, 4.0),
]


def inputs(shape: tuple, dtype: torch.dtype, poison: bool) -> tuple[list[Tensor], dict]:
    num_heads, num_kv, head_dim, capacity, window, softcap = shape
    device = "cuda" if ON_GPU else "cpu"
    positions = torch.tensor([0, capacity - 1, 1, 15, 16, 63, 64, 65])
    generator = torch.Generator().manual_seed(head_dim)
    # as the decoder hands them over: parts of one projection, so rows have gaps between them
    qkv = torch.randn(len(positions), num_heads + 2 * num_kv, head_dim, generator=generator).to(device)
    q, k, v = qkv.split_with_sizes((num_heads, num_kv, num_kv), 1)
    caches = torch.randn(2, len(positions), num_kv, capacity, head_dim, generator=generator).to(dtype)
    if poison:
        at = torch.arange(capacity)
        hidden = at >= positions.unsqueeze(1)
        if window is not None:
            hidden |= at <= positions.unsqueeze(1) - window
        caches = caches.masked_fill(hidden[None, :, None, :, None], float("nan"))
    keys, values = caches.to(device)
    options = {"scale": head_dim**-0.5, "window": window, "softcap": softcap}
    return [q, k, v, keys, values, positions.to(device)], options


def one_row_at_a_time(given: list[Tensor], options: dict) -> Tensor:
    """fp64, written from the definition."""
    q, k, v, keys, values, positions = (t.cpu() for t in given)
    rows = []
    for r, position in enumerate(positions.tolist()):
        first = 0 if options["window"] is None else max(0, position - options["window"] + 1)
        own = [
            torch.cat([c[r, :, first:position], x[r].to(c.dtype).unsqueeze(1)], 1) for c, x in ((keys, k), (values, v))
        ]
        seen_keys, seen_values = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 0) for x in own)
        scores = torch.einsum("hd,hsd->hs", q[r].to(keys.dtype).double(), seen_keys) * options["scale"]
        if options["softcap"] is not None:
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        rows.append(torch.einsum("hs,hsd->hd", scores.softmax(-1), seen_values))
    return torch.stack(rows)


def check_appended(given: list[Tensor], before: list[Tensor]) -> None:
    """Each row's key and value stand at its position, and nothing else moved."""
    _, k, v, *caches, positions = given
    rows = torch.arange(len(positions), device=positions.device)
    for cache, old, new in zip(caches, before, (k, v), strict=True):
        assert torch.equal(cache[rows, :, positions], new.to(cache.dtype))
        expected = old.clone()
        expected[rows, :, positions] = new.to(cache.dtype)
        assert torch.equal(cache.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_and_cpu_path_follow_the_definition(shape: tuple) -> None:
    for run, poison in ((ragged_attention_reference, True), (ragged_attention, False)):
        given, options = inputs(shape, torch.float32, poison)
        expected, before = one_row_at_a_time(given, options), [t.clone() for t in given[3:5]]
        out = run(*given, **options).cpu()
        assert out.dtype == torch.float32
        assert float((out - expected).abs().max()) < TOLERANCES[torch.float32]
        check_appended(given, before)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_the_reference(shape: tuple, dtype: torch.dtype) -> None:
    given, options = inputs(shape, dtype, poison=True)
    before = [t.clone() for t in given[3:5]]
    out = op.launch(*given, **options)
    assert float((out.cpu() - one_row_at_a_time(given, options)).abs().max()) < TOLERANCES[dtype]
    check_appended(given, before)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [*SHAPES, (32, 8, 128, 4100, None, None), (8, 4, 256, 600, 512, 50.0)])
def test_kernel_on_a_gpu_in_bf16_and_in_a_graph(shape: tuple) -> None:
    """Eagerly, then captured and replayed with other positions: a length baked into the graph gives the old ones."""
    given, options = inputs(shape, torch.bfloat16, poison=True)
    expected = one_row_at_a_time(given, options)
    caches = [t.clone() for t in given[3:5]]
    assert float((op.launch(*given, **options).cpu() - expected).abs().max()) < TOLERANCES[torch.bfloat16]
    positions = given[5].clone()
    given[5].zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op.launch(*given, **options)
    given[5].copy_(positions)
    for cache, fresh in zip(given[3:5], caches, strict=True):
        cache.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    assert float((out.cpu() - expected).abs().max()) < TOLERANCES[torch.bfloat16]


@pytest.mark.triton
def test_shapes_that_do_not_fit_are_refused() -> None:
    given, options = inputs(SHAPES[0], torch.float32, poison=False)
    with pytest.raises(ValueError, match="do not fit a cache"):
        op.launch(given[0][:3], *given[1:], **options)
    with pytest.raises(ValueError, match="equal strides"):
        op.launch(*given[:4], given[4].transpose(2, 3).contiguous().transpose(2, 3), given[5], **options)
