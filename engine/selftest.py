"""The start-up self-test: in which tiles a row has the same bits, measured on this machine with this model.

Losslessness rests on one property: a row's result does not depend on how many rows run beside it, on its place among
them, or on the tree it belongs to. Which widths have it depends on the matrix library, so it is measured and not
assumed: every projection is padded to the narrowest width from which all wider ones agree bit for bit, and whole rows
are then run in several groupings. If not even the
fixed tile of 16 agrees, the engine decodes plainly and says so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.embed_rows import lay_rows
from ..kernels.grow_tree import Trees
from ..kernels.lm_head import lm_head
from ..kernels.tree_attention import SPLIT_LEN
from .cache import KVCache, plan_cache
from .device_state import fill
from .forward import RowTiles, Span, Working, advance, node_logits
from .fused import FusedStep, FusedWeights
from .model import Decoder
from .tree import MAX_NODES, DraftTree

PREFIX = 120  # committed keys in the test: more than one group of positions, and the chain reaches into another
LONG_PREFIX = SPLIT_LEN + 14  # on a GPU: a split whose keys attention reads once for several rows
LAYERS = 2  # layers run end to end; all layers of a model have the same shapes


class NotDeterministic(RuntimeError):
    """No tile gives a row the same bits in every place on this machine."""


def find_tiles(decoder: Decoder) -> RowTiles:
    """The narrowest padding that keeps every row's bits on this machine; also sets it for every projection.

    Raises:
        NotDeterministic: rows disagree even in tiles of exactly 16.
    """
    if decoder.device.type == "cuda":
        # Other widths take other cuBLAS kernels: one shape for everything.
        candidates = [RowTiles(gathered=True)]
    else:
        candidates = [RowTiles(least=1), RowTiles(least=MAX_NODES, least_attention=MAX_NODES)]
        if not _pad_projections(decoder):
            candidates = []  # a row's place among 16 shows in a product
    for tiles in candidates:
        if parts_agree(decoder, tiles) and rows_agree(decoder, tiles):
            return tiles
    raise NotDeterministic(
        f"rows of a {MAX_NODES}-row tile differ in their bits on {decoder.device} with {decoder.dtype}: speculation "
        "would not be lossless here. Decode with speculation=False, or set deterministic=False and accept near-ties"
    )


def _pad_projections(decoder: Decoder) -> bool:
    """Measure the least row count of each kind of projection, on the first layer, and set it for all layers; returns
    whether a row's place is without effect in all of them."""
    agree = decoder.output.find_least_rows(MAX_NODES)
    for name in ("qkv", "o", "up", "down"):
        measured = getattr(decoder.layers[0], name)
        agree &= measured.find_least_rows(MAX_NODES)
        for layer in decoder.layers:
            getattr(layer, name).least_rows = measured.least_rows
    return agree


def parts_agree(decoder: Decoder, tiles: RowTiles) -> bool:
    """Whether what runs in fp32 between the products gives a row the same bits at every width that these tiles have."""
    if tiles.gathered:
        return True  # every product has one shape, whole rows show the rest
    config, layer = decoder.config, decoder.layers[0]
    generator = torch.Generator().manual_seed(2)
    one = torch.ones(1, device=decoder.device)
    norms = [n for n in (layer.attn_norm, layer.mlp_norm, layer.attn_post_norm, layer.mlp_post_norm) if n is not None]
    pieces: list[tuple[Callable[[Tensor], Tensor], int]] = [(norm, config.hidden_size) for norm in norms]
    pieces.append((lambda x: decoder._activation(x, one), config.intermediate_size))
    for piece, width in pieces:
        x = 2 * torch.randn(MAX_NODES, width, generator=generator).to(decoder.device)
        full = piece(x.clone())
        counts = range(tiles.least, MAX_NODES)
        if not all(torch.equal(piece(x[-count:].clone()), full[-count:]) for count in counts):
            return False
        if not torch.equal(piece(x.flip(0)).flip(0), full):
            return False
    return all(_attention_agrees(decoder, tiles, config.windows.index(window)) for window in set(config.windows))


def _attention_agrees(decoder: Decoder, tiles: RowTiles, layer: int) -> bool:
    """A layer's attention of a chain's rows: at every width, inside a bushy tree, and alone as plain decoding has
    them, whose rounds start at the row."""
    config = decoder.config
    generator = torch.Generator().manual_seed(3)
    sizes = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    q, k, v = (torch.randn(MAX_NODES, heads, config.head_dim, generator=generator) for heads in sizes)
    chain, bushy, spine = _trees(config.vocab_size)
    cache, base = _filled_cache(decoder, 1)

    def attend(tree: DraftTree, start: int, nodes: list[int], rows: list[int]) -> Tensor:
        cache.lens[0] = start
        cache.clear_open(0)
        work = Working(0, start, tree, torch.zeros(MAX_NODES, config.hidden_size))
        return Span(decoder, cache, work, nodes, 0, tiles).attend(layer, q[rows], k[rows], v[rows])

    each = list(range(MAX_NODES))
    plain = torch.cat([attend(DraftTree(chain.tokens[i]), base + i, [0], [i]) for i in each])
    if not torch.equal(attend(chain, base, each, each), plain):
        return False
    for count in range(1, MAX_NODES):  # the rows before them are in the cache
        last = each[-count:]
        if not torch.equal(attend(chain, base, last, last), plain[-count:]):
            return False
    rows = [0] * len(bushy)
    for row, node in enumerate(spine):
        rows[node] = row
    return torch.equal(attend(bushy, base, list(range(len(bushy))), rows)[spine], plain[: len(spine)])


def rows_agree(decoder: Decoder, tiles: RowTiles) -> bool:
    """Whether a chain's rows have the same bits run one by one, all at once, and inside a bushy tree."""
    stop = min(LAYERS, decoder.config.num_layers)
    chain, bushy, spine = _trees(decoder.config.vocab_size)
    one_by_one = _run(decoder, tiles, chain, [[node] for node in range(MAX_NODES)], stop)
    at_once = _run(decoder, tiles, chain, [list(range(MAX_NODES))], stop)
    in_pairs = _run(decoder, tiles, chain, [list(range(i, i + 2)) for i in range(0, MAX_NODES, 2)], stop)
    in_tree = _run(decoder, tiles, bushy, [list(range(len(bushy)))], stop)[spine]
    same = torch.equal(one_by_one, at_once) and torch.equal(one_by_one, in_pairs)
    return same and torch.equal(one_by_one[: len(spine)], in_tree)


def fused_rows_agree(weights: FusedWeights) -> bool:
    """The same of the fused kernels: one by one as plain decoding runs them, all at once, in a bushy tree, and beside
    another sequence's."""
    chain, bushy, spine = _trees(weights.config.vocab_size)
    one_by_one = torch.cat([_run_fused(weights, [chain], 1, i) for i in range(MAX_NODES)])
    at_once = _run_fused(weights, [chain], MAX_NODES)
    in_tree = _run_fused(weights, [bushy], MAX_NODES)[spine]
    beside = _run_fused(weights, [chain, bushy], MAX_NODES)[MAX_NODES:][spine]
    same = torch.equal(one_by_one, at_once) and torch.equal(one_by_one[: len(spine)], in_tree)
    return same and torch.equal(in_tree, beside)


def _run_fused(weights: FusedWeights, trees: list[DraftTree], width: int, first: int = 0) -> Tensor:
    """Final hidden rows and logits `[trees * width, D + V]`. With width 1, node `first` of a chain as the root that it
    is in plain decoding, after the nodes before it."""
    config, decoder = weights.config, weights.decoder
    stop = min(LAYERS, config.num_layers)
    cache, base = _filled_cache(decoder, len(trees))
    rows_each = MAX_NODES if weights.by_neuron else width  # a list of neurons is a tile's
    size = -(-len(trees) * rows_each // MAX_NODES) * MAX_NODES
    step = FusedStep(weights, cache, size)
    if step.kept is not None:
        some = torch.arange(0, config.intermediate_size, 2, device=decoder.device)
        for tile in range(len(trees)):
            step.kept.keep(tile, dict.fromkeys(range(1, stop), some))
    logits = torch.zeros(size, config.vocab_size, device=decoder.device)
    for node in range(first + 1) if width == 1 else [0]:
        state = Trees.empty(len(trees), decoder.device)
        at = torch.full((len(trees),), base + node, dtype=torch.int32, device=decoder.device)
        fill(state, {b: DraftTree(tree.tokens[node]) if width == 1 else tree for b, tree in enumerate(trees)})
        lay_rows(state.tokens, state.depths, state.paths, state.count, at, step.rows, step.ids, rows_each)
        step.embed()
        step.run(0, stop)
    head = weights.head
    lm_head(
        step.x, step.stats, head.weight, head.bias, head.shift, step.rows, eps=config.norm_eps,
        softcap=config.logit_softcap, logits=logits,
    )  # fmt: skip
    return (
        torch.cat([step.hidden, logits], 1)
        .view(-1, rows_each, logits.shape[1] + config.hidden_size)[: len(trees), :width]
        .flatten(0, 1)
    )


def _trees(vocab_size: int) -> tuple[DraftTree, DraftTree, list[int]]:
    """A chain of 16, a bushy tree that holds its first half, and the nodes where."""
    tokens = [(7 * i + 3) % vocab_size for i in range(MAX_NODES)]
    chain = DraftTree(tokens[0])
    for token in tokens[1:]:
        chain.add(len(chain) - 1, token)
    bushy = DraftTree(tokens[0])
    spine = [0]
    for token in tokens[1 : MAX_NODES // 2]:
        bushy.add(spine[-1], (token + 1) % vocab_size)
        spine.append(bushy.add(spine[-1], token))
    return chain, bushy, spine


def _filled_cache(decoder: Decoder, batch: int) -> tuple[KVCache, int]:
    """A cache whose sequences hold the same keys and values, and how many."""
    prefix = LONG_PREFIX if decoder.device.type == "cuda" else PREFIX
    context = min(prefix + MAX_NODES, decoder.config.max_context)
    cache = KVCache(plan_cache(decoder.config, batch, context, decoder.device, decoder.dtype), decoder.device)
    generator = torch.Generator().manual_seed(1)
    for store in (cache.k, cache.v):
        store.copy_(torch.randn(store.shape[2:], generator=generator).to(store.dtype).expand_as(store))
    return cache, context - MAX_NODES


def _run(decoder: Decoder, tiles: RowTiles, tree: DraftTree, batches: list[list[int]], stop: int) -> Tensor:
    """Final hidden rows and logits of a tree's nodes, run in the given batches: `[nodes, D + V]`."""
    config = decoder.config
    cache, base = _filled_cache(decoder, 1)
    cache.lens[0] = base
    cache.clear_open(0)
    work = Working(0, base, tree, torch.zeros(MAX_NODES, config.hidden_size, device=decoder.device))
    work.embed_new(decoder)
    logits = []
    for nodes in batches:
        advance(decoder, cache, [(work, nodes)], stop, tiles)
        logits.append(node_logits(decoder, work.hidden[nodes], tiles))
    return torch.cat([work.hidden[: len(tree)], torch.cat(logits).float()], 1)
