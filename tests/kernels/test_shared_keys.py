"""Keys that all rows of a sequence see are read once for all of them, and no bit tells.

Regimes: chains, stars and bushy trees; 1, 2, 4, 8 and 16 rows a sequence, several sequences in a tile, several tiles of
one sequence, dead rows between live ones; starts at a split's edge and beside it, rows of one tree on both sides of an
edge, also of one where splits get shorter or longer; windows inside, across and shorter than splits; soft-cap; 1, 3, 6
and 7 query heads a KV head. Unused slots hold NaN. Splits are short here (32), and long (256, as in use) in the tests
for GPUs.

Planted bugs that these tests were seen to catch: a split closed one position too early, or one position too near to a
window's edge; rows of other sequences, or dead ones, taken for mates; a mate's parts counted from this row's position;
the next query head's queries; rows with splits of another length taken for mates.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from skipstone.kernels import tree_attention as op
from skipstone.kernels.embed_rows import lay_rows_reference
from skipstone.kernels.layer_shape import LayerShape
from skipstone.kernels.rows import Rows
from skipstone.kernels.tree_attention import AttentionScratch, tree_attention, tree_attention_reference
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.triton
DTYPES = [torch.bfloat16, torch.float16] if ON_GPU else [torch.float16]  # the interpreter's bf16 is wrong
TOLERANCES = {torch.float16: 4e-3, torch.bfloat16: 3e-2}  # weights and results rounded to the dtype
SHORT = 32
SMALL = {"BLOCK": SHORT, "num_warps": 2, "num_stages": 1}
CHAIN = list(range(-1, 15))
STAR = [-1, *[0] * 12]
BUSHY = [-1, 0, 0, 0, 1, 1, 2, 4, 4, 7, 3, 9, 9, 11]
# rows a sequence, then (tree, start) of each
BATCHES = {
    "chain": (16, [(CHAIN, 2 * SHORT)]),
    "edge": (16, [(CHAIN, 3 * SHORT - 3)]),
    "bushy": (16, [(BUSHY, 2 * SHORT + 5)]),
    "star": (16, [(STAR, 2 * SHORT - 2), (CHAIN[:5], SHORT)]),
    "eights": (8, [(BUSHY[:8], 70), (CHAIN[:5], 70), ([-1], 90), (CHAIN[:8], 31)]),
    "fours": (4, [(CHAIN[:4], 40), (STAR[:4], 40), (CHAIN[:3], 32), (STAR[:4], 95)]),
    "twos": (2, [(CHAIN[:2], 31 + b) for b in range(3)]),
    "longer": (16, [(CHAIN, 4 * SHORT - 7)]),
    "long": (8, [(BUSHY[:8], 4 * SHORT + 37), (CHAIN[:8], 4 * SHORT - 2)]),
}


@pytest.fixture
def dots(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of products, where they are interpreted."""
    count = [0]
    if not ON_GPU:
        from triton.runtime.interpreter import InterpreterBuilder

        plain = InterpreterBuilder.create_dot

        def create_dot(*args):  # type: ignore[no-untyped-def]
            count[0] += 1
            return plain(*args)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    return count


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "SPLIT_LEN", SHORT)


def shape_of(group: int, num_kv: int, head_dim: int = 16, softcap: float | None = None) -> LayerShape:
    return LayerShape(16, 16, group * num_kv, num_kv, head_dim, head_dim, 1e-5, head_dim**-0.5, softcap=softcap)


def rows_of(batch: Sequence[tuple[list[int], int]], width: int) -> Rows:
    """Trees (parents of their nodes) at their starts, as a step lays them."""
    depths, paths = (torch.zeros(len(batch), *size, dtype=torch.int32) for size in ((16,), (16, 16)))
    for b, (parents, _) in enumerate(batch):
        path: list[list[int]] = []
        for node, parent in enumerate(parents):
            path.append([node] if parent < 0 else [*path[parent], node])
            depths[b, node] = len(path[node]) - 1
            paths[b, node, : len(path[node])] = torch.tensor(path[node])
    count, base = torch.tensor([[len(parents), start] for parents, start in batch], dtype=torch.int32).T.contiguous()
    return moved(lay_rows_reference(depths, depths, paths, count, base, width)[0])


def moved(rows: Rows, **changed: Tensor) -> Rows:
    return Rows(*(t.to(DEVICE) for t in (vars(rows) | changed).values()))


class Case:
    """Rows, queries, and a cache with NaN in all slots that hold no node."""

    def __init__(self, rows: Rows, shape: LayerShape, dtype: torch.dtype, window: int | None = None) -> None:
        self.rows, self.shape, self.window, self.live = rows, shape, window, rows.live.bool()
        self.context = int(rows.base.max()) + 16
        generator = torch.Generator().manual_seed(0)
        size = int(rows.sequence.max()) + 1, shape.num_kv_heads, self.context + 3, shape.head_dim
        self.caches = torch.randn(2, *size, generator=generator).to(DEVICE, dtype)
        for sequence in range(size[0]):
            of = self.live & (rows.sequence == sequence)
            used = int(rows.slot[of].max()) + 1 if of.any() else 0
            self.caches[:, sequence, :, used:] = float("nan")
        self.q = torch.randn(len(rows), shape.num_heads * shape.head_dim, generator=generator).to(DEVICE, dtype)
        self.q[~self.live] = float("nan")

    def attend(self, share: bool, live: Tensor | None = None, settings: dict[str, int] | None = None) -> Tensor:
        rows = self.rows if live is None else moved(self.rows, live=live.int())
        out = torch.full_like(self.q, float("nan"))
        scratch = AttentionScratch(len(rows), self.context, self.shape, DEVICE)
        for part in (scratch.acc, scratch.largest, scratch.total):
            part.fill_(float("nan"))
        tree_attention(
            self.q, *self.caches, out, scratch, rows, self.shape, self.window, share=share, settings=settings
        )
        assert not scratch.arrived.any()
        assert torch.equal(out.isfinite().all(1), rows.live.bool())
        return out

    def check(self, alone: Sequence[int] = (), settings: dict[str, int] | None = None) -> None:
        """The same bits shared and not, and of these live rows each by itself; near the reference."""
        shared, own = self.attend(True, settings=settings), self.attend(False, settings=settings)
        different = (shared != own).any(1) & self.live
        assert not different.any(), f"rows {different.nonzero().flatten().tolist()}"
        for i in alone:
            r = int(self.live.nonzero()[i])
            one = torch.arange(len(self.rows), device=DEVICE) == r
            assert torch.equal(self.attend(True, one, settings)[r], shared[r]), r
        expected = tree_attention_reference(self.q, *self.caches, self.rows, self.shape, self.window)[self.live.cpu()]
        error = (shared[self.live].cpu().double() - expected).abs().max() / expected.abs().max()
        assert error < TOLERANCES[self.q.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "window"), [(1, None), (3, 67)])
@pytest.mark.parametrize("name", BATCHES)
def test_bits_do_not_tell(name: str, group: int, window: int | None, dtype: torch.dtype, short_splits: None) -> None:
    width, batch = BATCHES[name]
    Case(rows_of(batch, width), shape_of(group, 1), dtype, window).check([-1], SMALL)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "num_kv", "softcap"), [(6, 1, 5.0), (7, 2, None)])
def test_more_heads(group: int, num_kv: int, softcap: float | None, dtype: torch.dtype, short_splits: None) -> None:
    """And blocks shorter than a split."""
    width, batch = BATCHES["bushy"]
    case = Case(rows_of(batch, width), shape_of(group, num_kv, softcap=softcap), dtype)
    case.check([0, -1], SMALL | {"BLOCK": SHORT // 2})


@pytest.mark.interpreter
@pytest.mark.parametrize(("name", "window"), [("edge", None), ("bushy", 67), ("eights", None)])
def test_last_programs_first(
    name: str, window: int | None, short_splits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever program comes last puts the parts together; the interpreter runs them in one order, here the other."""
    from triton.runtime.interpreter import InterpreterBuilder

    width, batch = BATCHES[name]
    case = Case(rows_of(batch, width), shape_of(3, 1), torch.float16, window)
    expected = case.attend(False, settings=SMALL)

    def set_grid_idx(self, x: int, y: int, z: int) -> None:  # type: ignore[no-untyped-def]
        self.grid_idx = tuple(n - 1 - i for n, i in zip(self.grid_dim, (x, y, z), strict=True))

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", set_grid_idx)
    assert torch.equal(case.attend(True, settings=SMALL)[case.live], expected[case.live])


@pytest.mark.parametrize("window", [8, 47, 48, 49, 64, 79, 80, 81])
def test_windows_of_all_lengths(window: int, short_splits: None) -> None:
    """A chain's first and last row begin to see 15 positions apart."""
    Case(rows_of([(CHAIN, 2 * SHORT)], 16), shape_of(1, 1), torch.float16, window).check([0, -1], SMALL)


def test_dead_rows_between_live_ones(short_splits: None) -> None:
    rows = rows_of([(STAR, 70), (STAR, 70)], 16)
    live = rows.live * (torch.arange(len(rows), device=DEVICE) % 3 != 1)
    Case(moved(rows, live=live.int()), shape_of(3, 1), torch.float16).check([0, 3, -1], SMALL)


def test_tiles_of_one_prompt(short_splits: None) -> None:
    """As a prompt is read: 16 tokens a tile, each tile a chain on what the tiles before it have just stored."""
    at = torch.arange(48, dtype=torch.int32)
    path = torch.arange(16, dtype=torch.int32).repeat(48, 1)
    rows = Rows((at < 41).int(), torch.zeros_like(at), 60 + at, 60 + at, 60 + at // 16 * 16, path)
    Case(moved(rows), shape_of(3, 1), torch.float16).check([0, 15, 16, -1], SMALL)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "group", "window", "expected"),
    [
        ("chain", 3, None, 4 * 3 + 16),  # four closed splits by three heads; each row's own keys
        ("chain", 1, None, 4 * 1 + 16),
        ("bushy", 7, None, 4 * 7 + 14),
        ("bushy", 7, 60, 2 * 7 + 13 * 3 + 2),  # two splits are not in everybody's window, one not in the last node's
        ("fours", 3, None, 2 * (2 * 3 + 4) + 3 * 3 + (5 * 3 + 1 + 3 * 2)),  # three mates are too few: each by itself
        ("longer", 6, None, 7 * 6 + 7 * 1 + 3 * 6 + 9 * 2),  # seven mates with short splits, nine with long ones
    ],
)
def test_products_are_saved(
    name: str, group: int, window: int | None, expected: int, dots: list[int], short_splits: None
) -> None:
    width, batch = BATCHES[name]
    case = Case(rows_of(batch, width), shape_of(group, 1), torch.float16, window)
    case.attend(True, settings=SMALL)
    assert dots[0] == 3 * expected


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", [250, 512, 1023, 4096])
@pytest.mark.parametrize(
    ("group", "num_kv", "head_dim", "window", "softcap"),
    [
        (3, 3, 64, None, None),
        (7, 2, 64, None, None),
        (6, 2, 128, 700, None),
        (1, 4, 80, None, None),
        (2, 4, 256, 512, 50.0),
    ],
)
def test_on_a_gpu(
    group: int, num_kv: int, head_dim: int, window: int | None, softcap: float | None, base: int, dtype: torch.dtype
) -> None:
    """Real sizes and settings; every row also alone."""
    shape = shape_of(group, num_kv, head_dim, softcap)
    for width, batch in (
        (16, [(CHAIN, base)]),
        (16, [(BUSHY, base)]),
        (8, [(BUSHY[:8], base - 7 * b) for b in range(5)]),
    ):
        case = Case(rows_of(batch, width), shape, dtype, window)
        case.check(range(int(case.live.sum())))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_one_graph_shares_and_does_not() -> None:
    """What is shared is decided when a graph runs, not when it is captured."""
    shape, rows = shape_of(3, 3, 64), rows_of([(CHAIN, 1024)], 16)
    case = Case(rows, shape, torch.bfloat16)
    out, scratch = torch.zeros_like(case.q), AttentionScratch(16, case.context, shape, DEVICE)
    case.q.nan_to_num_(0.0)
    rows.live.zero_()
    graph = torch.cuda.CUDAGraph()
    tree_attention(case.q, *case.caches, out, scratch, rows, shape)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        tree_attention(case.q, *case.caches, out, scratch, rows, shape)
    for count, base in ((1, 1024), (16, 1024), (9, 700), (16, 100)):
        wanted = rows_of([(CHAIN[:count], base)], 16)
        for name, tensor in vars(rows).items():
            tensor.copy_(getattr(wanted, name))
        for _ in range(3):
            graph.replay()
        case.rows, case.live = rows, rows.live.bool()
        assert torch.equal(out[case.live], case.attend(False)[case.live])
