"""The operations of a decoder layer against their references.

Regimes: 1 to 16 live rows in one or two tiles, dead rows between live ones; widths that are no power of two and no
multiple of a block; biases, LayerNorm (deferred means), norms over heads, partial rotary, wide norms' two readers,
shared tiles (PARTS); grouped heads 1, 3, 4; windows inside and across splits; soft-caps; contexts of one and several
splits; trees whose siblings share a position; everything a row must not see poisoned with NaN. Without a GPU the
kernels run in Triton's interpreter (`TRITON_INTERPRET=1`), which proves their logic only.

Planted bugs that these tests were seen to catch: norms scaled by the other row's r, the mean not taken off, sin of the
wrong half, path read without the base, a window one too long, parts added twice, a key one slot off.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from skipstone.kernels import tile as core
from skipstone.kernels.embed_rows import embed_rows, embed_rows_reference, lay_rows, lay_rows_reference
from skipstone.kernels.kept_list import KeptList, Listing, list_kept
from skipstone.kernels.layer_shape import LayerShape
from skipstone.kernels.qkv import place_qkv, placed_reference, qkv, qkv_reference
from skipstone.kernels.residual_linear import (
    Parts,
    column_tiles,
    post_norm,
    post_norm_reference,
    residual_linear,
    residual_linear_reference,
)
from skipstone.kernels.residual_norm import residual_norm, residual_norm_reference
from skipstone.kernels.rows import Rows
from skipstone.kernels.tree_attention import SPLIT_LEN, AttentionScratch, tree_attention, tree_attention_reference
from skipstone.kernels.up_linear import activate, activated_reference, up_linear, up_linear_reference
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.triton
# the interpreter's bf16 arithmetic is wrong, so bf16 is for GPUs only
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else [])
# Sums in another order (fp32); inputs, weights of attention and results rounded to the dtype (half types).
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LLAMA = LayerShape(96, 80, 6, 2, 16, 16, 1e-5, 0.25)
NEOX = LayerShape(64, 100, 4, 4, 16, 4, 1e-5, 0.25, layer_norm=True, gated=False, activation="gelu")
GEMMA = LayerShape(80, 72, 4, 1, 24, 24, 1e-6, 0.2, softcap=5.0, qk_norm=True, activation="gelu_tanh")
SHAPES = [LLAMA, NEOX, GEMMA]


def near(given: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    expected = expected.to(given.device)
    assert torch.isfinite(given.float()).all()
    error = (given.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-9)
    assert error < TOLERANCES[dtype], f"relative error {error:.2e}"


def drawn(*size: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def some_rows(live: list[int], num_rows: int = 32, context: int = 90) -> Rows:
    """Rows of two sequences at different positions; dead ones hold what would crash if it were used."""
    rows = Rows.empty(num_rows, "cpu")
    for tensor in (rows.sequence, rows.position, rows.slot, rows.base):
        tensor.fill_(10**6)
    for r in live:
        rows.live[r], rows.sequence[r] = 1, r // 16
        rows.position[r] = rows.slot[r] = context - 40 + r
        rows.base[r] = rows.position[r]
    return Rows(*(t.to(DEVICE) for t in (rows.live, rows.sequence, rows.position, rows.slot, rows.base, rows.path)))


def deferred(shape: LayerShape, dtype: torch.dtype, num_rows: int = 32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A residual stream with a mean, a norm weight, and what its producer leaves: x and stats of 3 tiles."""
    hidden, norm = drawn(num_rows, shape.hidden_size, seed=1) + 0.5, drawn(shape.hidden_size, seed=2) + 1.0
    tiles = torch.tensor_split(hidden, 3, 1)
    stats = torch.stack([torch.stack([(t * t).sum(1), t.sum(1)], 1) for t in tiles], 2)
    return hidden, norm, (hidden * norm * core.x_scale(dtype)).to(dtype), stats.contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.activation)
@pytest.mark.parametrize("live", [[0], [3, 15, 16, 31], list(range(32))], ids=["one", "some", "all"])
def test_qkv(shape: LayerShape, dtype: torch.dtype, live: list[int]) -> None:
    context = 90
    rows = some_rows(live, context=context)
    _, _, x, stats = deferred(shape, dtype)
    size = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    weight = drawn(size, shape.hidden_size, seed=3, scale=0.1).to(dtype)
    bias = drawn(size, seed=4).to(dtype)
    shift = drawn(size, seed=5) if shape.layer_norm else None
    qk_norm = (drawn(shape.head_dim, seed=6) + 1, drawn(shape.head_dim, seed=7) + 1) if shape.qk_norm else None
    half = torch.arange(shape.rotary_dim // 2, device=DEVICE) + 1.0
    angles = torch.arange(context, device=DEVICE).unsqueeze(1) / half
    cos, sin = torch.cat([angles.cos()] * 2, 1), torch.cat([-angles.sin(), angles.sin()], 1)
    q_out = torch.full((32, shape.num_heads * shape.head_dim), float("nan"), dtype=dtype, device=DEVICE)
    caches = torch.full((2, 2, shape.num_kv_heads, context, shape.head_dim), float("nan"), dtype=dtype, device=DEVICE)
    qkv(x, stats, weight, bias, shift, qk_norm, cos, sin, q_out, *caches, rows, shape)
    at = rows.position.clamp(max=context - 1)
    q, k, v = qkv_reference(x, stats, weight, bias, shift, qk_norm, cos, sin, at, shape)
    near(q_out[live], q.flatten(1)[live], dtype)
    sequence, slot = rows.sequence[live].long(), rows.slot[live].long()
    near(caches[0][sequence, :, slot], k[live], dtype)
    near(caches[1][sequence, :, slot], v[live], dtype)
    assert int(caches[0].isfinite().sum()) == len(live) * shape.num_kv_heads * shape.head_dim
    dead = [r for r in range(32) if r not in live]
    assert q_out[dead].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.activation)
def test_up(shape: LayerShape, dtype: torch.dtype) -> None:
    live = [0, 5, 31]
    _, _, x, stats = deferred(shape, dtype)
    size = shape.intermediate_size * (2 if shape.gated else 1)
    weight = drawn(size, shape.hidden_size, seed=3, scale=0.1).to(dtype)
    bias = None if shape is LLAMA else drawn(size, seed=4).to(dtype)
    shift = drawn(size, seed=5) if shape.layer_norm else None
    out = torch.full((32, shape.intermediate_size), float("nan"), dtype=dtype, device=DEVICE)
    up_linear(x, stats, weight, bias, shift, out, some_rows(live), shape)
    near(out[live], up_linear_reference(x, stats, weight, bias, shift, shape)[live], dtype)
    assert int(out.isfinite().all(1).sum()) == len(live)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("num_norms", [0, 1, 2])
def test_residual(dtype: torch.dtype, parts: int, num_norms: int) -> None:
    live, width, k = [0, 7, 16, 31], 72, 200
    a, weight = drawn(32, k, seed=1).to(dtype), drawn(width, k, seed=2, scale=0.1).to(dtype)
    bias = drawn(width, seed=3).to(dtype) if num_norms else None
    hidden, norms = drawn(32, width, seed=4), [drawn(width, seed=5 + i) + 1 for i in range(num_norms)]
    xs = [torch.full((32, width), float("nan"), dtype=dtype, device=DEVICE) for _ in norms]
    settings = {"BN": 16, "BK": 32, "SPLIT": 2 if dtype != torch.float32 else 1, "PARTS": parts, "num_warps": 2}
    stats = torch.full((32, 2, 5), float("nan"), device=DEVICE)
    before = None if num_norms == 0 else hidden
    scratch = Parts(32, width, 3, DEVICE)
    for _ in range(2):  # the counters are ready for the next launch
        out = torch.full((32, width), float("nan"), device=DEVICE)
        residual_linear(
            a, weight, bias, before, out, some_rows(live), stats=stats, parts=scratch, settings=settings,
            next_norms=tuple(zip(norms, xs, strict=True)),
        )  # fmt: skip
        y, sums, _ = residual_linear_reference(a, weight, bias, before, None)
        near(out[live], y[live], dtype)
        near(stats[live].sum(-1), sums[live], dtype)
        for norm, x in zip(norms, xs, strict=True):
            near(x[live] / core.x_scale(dtype), (y * norm)[live], dtype)
            assert int(x.isfinite().all(1).sum()) == len(live)
        assert int(out.isfinite().all(1).sum()) == len(live)
    assert not scratch.arrived.any()


@pytest.mark.parametrize(("k", "deal"), [(160, (2, 64, 16)), (200, (2, 64, 64)), (576, (4, 128, 16))])
def test_a_product_dealt_out_at_once_in_two_pieces(k: int, deal: tuple[int, int, int]) -> None:
    """By a residual product and one behind a norm; a table's settings for K that is no power of two."""
    split, block, tail = deal
    live, width, dtype = [0, 7, 16, 31], 40, torch.float16
    settings = {"BN": 16, "BK": block, "SPLIT": split, "TAIL": tail, "num_warps": 2, "num_stages": 1}
    a, weight = drawn(32, k, seed=1).to(dtype), drawn(width, k, seed=2, scale=0.1).to(dtype)
    hidden, out = drawn(32, width, seed=4), torch.full((32, width), float("nan"), device=DEVICE)
    residual_linear(a, weight, None, hidden, out, some_rows(live), settings={**settings, "PARTS": 1})
    near(out[live], (a.float() @ weight.float().T + hidden)[live], dtype)
    masked = torch.full_like(out, float("nan"))
    residual_linear(a, weight, None, hidden, masked, some_rows(live), settings={**settings, "PARTS": 1, "MASK": 1})
    assert torch.equal(masked.nan_to_num(), out.nan_to_num())  # rows that are not live were left alone
    shape = replace(LLAMA, hidden_size=k, intermediate_size=width // 2)
    _, _, x, stats = deferred(shape, dtype)
    act = torch.full((32, width // 2), float("nan"), dtype=dtype, device=DEVICE)
    up_linear(x, stats, weight, None, None, act, some_rows(live), shape, settings=settings)
    near(act[live], up_linear_reference(x, stats, weight, None, None, shape)[live], dtype)


@pytest.mark.parametrize(("k", "hold"), [(160, 64), (200, 32), (104, 64)])
def test_a_product_that_holds_some_weights_before_the_wait(k: int, hold: int) -> None:
    """What is left is a multiple of a block, and is not."""
    live, width, dtype = [0, 7, 16, 31], 40, torch.float16
    settings = {"BN": 16, "BK": 32, "SPLIT": 1, "HOLD": hold, "num_warps": 2, "num_stages": 2}
    weight, shape = (
        drawn(width, k, seed=2, scale=0.1).to(dtype),
        replace(LLAMA, hidden_size=k, intermediate_size=width // 2),
    )
    _, _, x, stats = deferred(shape, dtype)
    act = torch.full((32, width // 2), float("nan"), dtype=dtype, device=DEVICE)
    up_linear(x, stats, weight, None, None, act, some_rows(live), shape, settings=settings)
    near(act[live], up_linear_reference(x, stats, weight, None, None, shape)[live], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_post_norm(dtype: torch.dtype) -> None:
    live, width, k = [0, 7, 31], 72, 64
    a, weight = drawn(32, k, seed=1).to(dtype), drawn(width, k, seed=2, scale=0.1).to(dtype)
    hidden, post, following = drawn(32, width, seed=4), drawn(width, seed=5), drawn(width, seed=6)
    y, y_stats = torch.empty(32, width, device=DEVICE), torch.empty(32, 2, column_tiles(width, k, dtype), device=DEVICE)
    residual_linear(a, weight, None, None, y, some_rows(live), stats=y_stats)
    out, stats = torch.full_like(y, float("nan")), torch.full((32, 2, 3), float("nan"), device=DEVICE)
    x = torch.full((32, width), float("nan"), dtype=dtype, device=DEVICE)
    post_norm(y, y_stats, post, hidden, out, some_rows(live), 1e-6, next_norm=(following, x), stats=stats)
    expected = post_norm_reference(a.float() @ weight.float().T, post, hidden, 1e-6)
    near(out[live], expected[live], dtype)
    near(x[live] / core.x_scale(dtype), (expected * following)[live], dtype)
    near(stats[live].sum(-1)[:, 0], (expected * expected).sum(1)[live], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.activation)
def test_placing_what_was_multiplied(shape: LayerShape, dtype: torch.dtype) -> None:
    """Segments of columns with gaps between them; 4 rows of which 2 are live."""
    live, context, heads, kv, size = [0, 3], 90, shape.num_heads, shape.num_kv_heads, shape.head_dim
    rows = some_rows(live, context=context)
    starts = heads * size + 8, (heads + kv) * size + 16
    y = torch.full((4, (heads + 2 * kv) * size + 20), float("nan"), device=DEVICE)
    products = drawn(4, (heads + 2 * kv) * size, seed=3)
    for at, part in zip((0, *starts), products.split([heads * size, kv * size, kv * size], 1), strict=True):
        y[:, at : at + part.shape[1]] = part
    qk_norm = (drawn(size, seed=6) + 1, drawn(size, seed=7) + 1) if shape.qk_norm else None
    half = torch.arange(shape.rotary_dim // 2, device=DEVICE) + 1.0
    angles = torch.arange(context, device=DEVICE).unsqueeze(1) / half
    cos, sin = torch.cat([angles.cos()] * 2, 1), torch.cat([-angles.sin(), angles.sin()], 1)
    q_out = torch.full((32, heads * size), float("nan"), dtype=dtype, device=DEVICE)
    caches = torch.full((2, 2, kv, context, size), float("nan"), dtype=dtype, device=DEVICE)
    place_qkv(y, starts, qk_norm, cos, sin, q_out, *caches, rows, shape)
    at = rows.position[:4].clamp(max=context - 1)
    q, k, v = placed_reference(products, qk_norm, cos, sin, at, shape)
    near(q_out[live], q.flatten(1)[live], dtype)
    sequence, slot = rows.sequence[live].long(), rows.slot[live].long()
    near(caches[0][sequence, :, slot], k[live], dtype)
    near(caches[1][sequence, :, slot], v[live], dtype)
    assert int(caches[0].isfinite().sum()) == len(live) * kv * size
    assert int(q_out.isfinite().all(1).sum()) == len(live)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.activation)
def test_activating_what_was_multiplied(shape: LayerShape, dtype: torch.dtype) -> None:
    live, wide = [0, 3], shape.intermediate_size
    y = torch.full((4, 2 * wide + 20), float("nan"), device=DEVICE)
    gate, up = drawn(2, 4, wide, seed=3).unbind()
    y[:, :wide], y[:, wide + 12 : 2 * wide + 12] = gate, up
    out = torch.full((32, wide), float("nan"), dtype=dtype, device=DEVICE)
    activate(y, wide + 12, out, some_rows(live), shape)
    products = torch.cat([gate, up], 1) if shape.gated else gate
    near(out[live], activated_reference(products, shape)[live], dtype)
    assert int(out.isfinite().all(1).sum()) == len(live)
    listing = some_listing(4, wide, 1)
    activate(y, wide + 12, out, some_rows(live), shape, listing=listing)
    as_listed(listing, out, live)


def some_listing(count: int, width: int, segments: int) -> Listing:
    """Thresholds of rows among others', as a step keeps them, and lists full of what nobody may read."""
    limits = 0.2 + 0.3 * torch.rand(count, 7, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    lists = KeptList.empty(width, segments, DEVICE, rows=count)
    lists.entries.fill_(0x7FC00000)
    lists.runs.fill_(1 << 20)
    return Listing(limits[:, 2 : 2 + segments], lists)


def as_listed(listing: Listing, x: torch.Tensor, live: list[int]) -> None:
    """The live rows' lists are those that `list_kept` makes of what was written; each one's thresholds are its own."""
    for row in live:
        found, expected = listing.lists.row(row), some_listing(1, x.shape[1], listing.limits.shape[1]).lists.row(0)
        list_kept(x[row], listing.limits[row], expected)
        assert torch.equal(found.runs, expected.runs)
        own = expected.entries != 0x7FC00000
        assert torch.equal(found.entries[own], expected.entries[own])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 72, 128, 300])
@pytest.mark.parametrize(
    ("num_added", "post", "num_norms", "layer_norm"),
    [(0, False, 1, False), (1, False, 1, False), (1, True, 1, False), (2, False, 2, True), (1, False, 0, False)],
)
def test_norms_that_are_not_deferred(
    num_added: int, post: bool, num_norms: int, layer_norm: bool, width: int, dtype: torch.dtype
) -> None:
    live, count = [0, 3], 5
    hidden = drawn(32, width, seed=1) + 0.5
    added = [drawn(count, width, seed=2 + i) for i in range(num_added)]
    weight = drawn(width, seed=5) + 1 if post else None
    norms = [(drawn(width, seed=6 + i) + 1, drawn(width, seed=8 + i) if layer_norm else None) for i in range(num_norms)]
    xs = [torch.full((32, width), float("nan"), dtype=dtype, device=DEVICE) for _ in norms]
    readers = tuple((w, b, x) for (w, b), x in zip(norms, xs, strict=True))
    stream, expected_x = residual_norm_reference(hidden[:count], added, weight, norms, 1e-5, layer_norm)
    out = torch.full_like(hidden, float("nan"))
    rows = some_rows(live)
    residual_norm(hidden, out, added, rows, count, 1e-5, norms=readers, post=weight, layer_norm=layer_norm)
    assert int(out.isfinite().all(1).sum()) == (len(live) if added else 0)
    if added:
        near(out[live], stream[live], torch.float32)
    for x, expected in zip(xs, expected_x, strict=True):
        near(x[live], expected[live], dtype)
        assert int(x.isfinite().all(1).sum()) == len(live)
    listings = [some_listing(count, width, 3 - i) for i in range(num_norms)]
    residual_norm(
        hidden, out, added, rows, count, 1e-5, norms=readers, listings=listings, post=weight, layer_norm=layer_norm
    )
    for listing, x in zip(listings, xs, strict=True):
        as_listed(listing, x, live)
    residual_norm(hidden, hidden, added, rows, count, 1e-5, post=weight)  # in place
    near(hidden[live], stream[live], torch.float32)


def test_what_a_residual_norm_does_not_do_is_refused() -> None:
    hidden, rows = drawn(32, 8), some_rows([0])
    with pytest.raises(ValueError, match="post norm: True"):
        residual_norm(hidden, hidden, [hidden, hidden], rows, 1, 1e-5, post=hidden[0])
    readers = (hidden[0], None, hidden), (hidden[0], hidden[1], hidden)
    with pytest.raises(ValueError, match="the other has none"):
        residual_norm(hidden, hidden, [], rows, 1, 1e-5, norms=readers)
    with pytest.raises(ValueError, match="1 listings for 0 norms"):
        residual_norm(hidden, hidden, [], rows, 1, 1e-5, listings=[some_listing(1, 8, 1)])


def tree_rows(base: int, parents: list[int], width: int = 16) -> tuple[Rows, list[int]]:
    """One sequence's tree as rows, at cache row 1."""
    depths, paths = [0], [[0]]
    for node, parent in enumerate(parents[1:], 1):
        depths.append(depths[parent] + 1)
        paths.append([*paths[parent], node])
    padded = torch.zeros(2, 16, 16, dtype=torch.int32)
    for node, path in enumerate(paths):
        padded[1, node, : len(path)] = torch.tensor(path)
    depth = torch.zeros(2, 16, dtype=torch.int32)
    depth[1, : len(depths)] = torch.tensor(depths)
    count = torch.tensor([0, len(parents)], dtype=torch.int32)
    bases = torch.tensor([0, base], dtype=torch.int32)
    rows, _ = lay_rows_reference(depth, depth, padded, count, bases, width)
    return Rows(
        *(t.to(DEVICE) for t in (rows.live, rows.sequence, rows.position, rows.slot, rows.base, rows.path))
    ), depths


def test_what_may_be_asked_for() -> None:
    small, large = torch.zeros(8, 4, dtype=torch.float16), torch.empty(core.ASK_UP_TO + 2, 1, dtype=torch.uint8)
    assert core.asked(small, True, (2, 3))[0] is small and core.asked(small, True, (2, 3))[1:] == (64, 16)
    assert (
        core.asked(small, False, (1,)) == core.asked(None, True, (1,)) == core.asked(large, True, (1,)) == (None, 0, 0)
    )
    assert core.asked(core.beginning(large), True, (7, 9))[1] == core.ASK_UP_TO and len(core.beginning(small)) == 8


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [3, 500, 8000])
def test_asking_ahead_changes_no_bits(rows: int) -> None:
    """Of what is asked for: less than a program's share, and more than all of them ask for at once."""
    shape, dtype = LLAMA, torch.bfloat16
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no instruction for it")
    later = drawn(rows, 264).to(dtype)
    weight, a = drawn(shape.hidden_size, 320, seed=1).to(dtype), drawn(16, 320, seed=2).to(dtype)
    live = Rows.empty(16, DEVICE)
    live.live.fill_(1)
    plain, asking = torch.zeros(2, 16, shape.hidden_size, device=DEVICE).unbind()
    residual_linear(a, weight, None, None, plain, live, pdl=True)
    residual_linear(a, weight, None, None, asking, live, pdl=True, later=later)
    torch.cuda.synchronize()
    assert torch.equal(plain, asking)


CHAIN = list(range(-1, 15))
BUSHY = [-1, 0, 0, 0, 1, 1, 2, 4, 4, 7, 3, 9, 9, 11]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", [0, 13, 250, SPLIT_LEN * 2 - 3, SPLIT_LEN * 4 - 3])
@pytest.mark.parametrize("shape", [LLAMA, GEMMA], ids=["llama", "gemma"])
@pytest.mark.parametrize("window", [None, 8, 300])
def test_attention(dtype: torch.dtype, base: int, shape: LayerShape, window: int | None) -> None:
    rows, depths = tree_rows(base, BUSHY)
    context = base + 16
    live = rows.live.nonzero().squeeze(1).tolist()
    caches = drawn(2, 2, shape.num_kv_heads, context + 5, shape.head_dim, seed=1).to(dtype)
    caches[:, 0], caches[:, 1, :, base + len(BUSHY) :] = float("nan"), float("nan")
    q = drawn(len(rows), shape.num_heads * shape.head_dim, seed=2).to(dtype)
    out = torch.full_like(q, float("nan"))
    scratch = AttentionScratch(len(rows), context, shape, DEVICE)
    tree_attention(q, *caches, out, scratch, rows, shape, window)
    near(out[live], tree_attention_reference(q, *caches, rows, shape, window)[live], dtype)
    assert int(out.isfinite().all(1).sum()) == len(BUSHY) == len(depths)
    assert not scratch.arrived.any()


def test_a_row_has_the_same_bits_in_every_tree() -> None:
    """The last token of one path: in a chain, in a bushy tree, and as the root of a later round (rule 3)."""
    dtype, base, shape = torch.float16, SPLIT_LEN - 2, LLAMA
    path = [0, 1, 4, 7, 9]  # nodes of BUSHY
    keys = drawn(2, 2, shape.num_kv_heads, base + 16, shape.head_dim, seed=1).to(dtype)
    q = drawn(1, shape.num_heads * shape.head_dim, seed=2).to(dtype)

    def attend(base: int, parents: list[int], node: int, slots: dict[int, int]) -> Tensor:
        rows, _ = tree_rows(base, parents)
        caches = torch.full_like(keys, float("nan"))
        caches[:, :, :, : SPLIT_LEN - 2] = keys[:, :, :, : SPLIT_LEN - 2]
        for position, slot in slots.items():
            caches[:, :, :, slot] = keys[:, :, :, position]
        queries = torch.zeros(len(rows), q.shape[1], dtype=dtype, device=DEVICE)
        queries[16 + node] = q
        live = rows.live.clone().zero_()
        live[16 + node] = 1
        alone = Rows(live, rows.sequence, rows.position, rows.slot, rows.base, rows.path)
        out = torch.zeros_like(queries)
        tree_attention(queries, *caches, out, AttentionScratch(len(rows), base + 16, shape, DEVICE), alone, shape)
        return out[16 + node]

    in_tree = attend(base, BUSHY, 9, {base + i: base + node for i, node in enumerate(path)})
    in_chain = attend(base, CHAIN[:5], 4, {base + i: base + i for i in range(5)})
    as_root = attend(base + 4, [-1], 0, {base + i: base + i for i in range(5)})
    assert torch.equal(in_tree, in_chain) and torch.equal(in_tree, as_root)
    assert in_tree.abs().sum() > 0


@pytest.mark.parametrize("width", [1, 4, 16])
def test_rows_of_trees(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    tokens, depths = torch.randint(0, 50, (2, 5, 16), generator=generator, dtype=torch.int32).to(DEVICE)
    paths = torch.randint(0, 16, (5, 16, 16), generator=generator, dtype=torch.int32).to(DEVICE)
    count = torch.tensor([3, 0, 16, 1, 2], dtype=torch.int32, device=DEVICE)
    base = torch.tensor([7, 9, 0, 30, 100], dtype=torch.int32, device=DEVICE)
    expected, ids = lay_rows_reference(tokens, depths, paths, count, base, width)
    rows, found = Rows.empty(len(expected), DEVICE), torch.full_like(ids, 99)
    lay_rows(tokens, depths, paths, count, base, rows, found, width)
    keep = expected.live.bool()
    assert torch.equal(rows.live, expected.live)
    for name in ("sequence", "position", "slot", "base", "path"):
        assert torch.equal(getattr(rows, name)[keep], getattr(expected, name)[keep]), name
    assert torch.equal(found[keep], ids[keep])


@pytest.mark.parametrize("dtype", DTYPES)
def test_embeddings(dtype: torch.dtype) -> None:
    live, width = [0, 9, 31], 72
    rows, embedding = some_rows(live), drawn(40, width).to(dtype)
    ids = torch.randint(0, 40, (32,), dtype=torch.int32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    norms = drawn(width, seed=1), drawn(width, seed=2)
    hidden, stats = torch.full((32, width), float("nan"), device=DEVICE), torch.empty(32, 2, 1, device=DEVICE)
    xs = [torch.empty(32, width, dtype=dtype, device=DEVICE) for _ in norms]
    embed_rows(ids, rows, embedding, 3.0, hidden, tuple(zip(norms, xs, strict=True)), stats)
    h, *expected = embed_rows_reference(ids, rows.live, embedding, 3.0, norms)
    near(hidden[live], h[live], dtype)
    for x, wanted in zip(xs, expected, strict=True):
        near(x[live] / core.x_scale(dtype), wanted[live], dtype)
    near(stats[live, 0, 0], (h * h).sum(1)[live], dtype)
    near(stats[live, 1, 0], h.sum(1)[live], torch.float16)
