"""Rows through tiles: a row has the same bits at every width, place, tree shape and round start (hazard 23).

Regimes: fp32 and bf16; grouped attention and the gathered one of GPUs (here in its fixed tiles of 16); full attention,
sliding windows and soft-caps; bases before, at and after a key group's border (64) and far into the context; rows run
ahead to different layers; tiles shared by several sequences. The reference is plain decoding, one row at a time.

Planted bugs: tests/lossless/test_planted_bugs.py.
"""

import random

import pytest
import torch
from skipstone.engine import forward
from skipstone.engine.cache import KVCache, plan_cache
from skipstone.engine.forward import RowTiles, Working, advance, node_logits, prefill, row_keys
from skipstone.engine.tree import MAX_NODES, DraftTree

FAMILIES = ["llama3", "gemma2", "gpt_neox"]
GATHERED = RowTiles(gathered=True)
BASES = [1, 52, 63, 64, 190]


def text(base, vocab_size, count=2 * MAX_NODES):
    generator = torch.Generator().manual_seed(base)
    return torch.randint(vocab_size, (base + count,), generator=generator).tolist()


class Rounds:
    """One sequence on a cache of its own, prefilled up to `base`; each `verify` runs and may commit a tree."""

    def __init__(self, engine, tiles, ids, base, cache=None, sequence=0):
        decoder = engine.decoder
        self.decoder, self.tiles, self.ids, self.sequence = decoder, tiles, ids, sequence
        plan = plan_cache(decoder.config, 1, min(len(ids), decoder.config.max_context), decoder.device, decoder.dtype)
        self.cache = cache or KVCache(plan, decoder.device)
        prefill(decoder, self.cache, sequence, ids[:base])

    def begin(self, tree):
        self.cache.clear_open(self.sequence)
        hidden = torch.zeros(MAX_NODES, self.decoder.config.hidden_size)
        work = Working(self.sequence, self.cache.lens[self.sequence], tree, hidden)
        work.embed_new(self.decoder)
        return work

    def verify(self, tree, runs=(), commit=None):
        """Hidden rows and logits of all nodes, `[nodes, D + V]`. `runs` are (nodes, layer) to run ahead."""
        work, last = self.begin(tree), self.decoder.config.num_layers
        for nodes, layer in [*runs, (list(range(len(tree))), last)]:
            advance(self.decoder, self.cache, [(work, nodes)], layer, self.tiles)
        rows = work.hidden[: len(tree)]
        if commit is not None:
            self.cache.commit(self.sequence, commit)
        return torch.cat([rows, node_logits(self.decoder, rows, self.tiles).float()], 1)


def chain(tokens):
    return DraftTree.from_lists(tokens, [-1, *range(len(tokens) - 1)])


@pytest.fixture(params=["grouped", "gathered"])
def tiles_of(request):
    return lambda engine: engine.tiles if request.param == "grouped" else GATHERED


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def plain_rows(engine, tiles, ids, base, count):
    rounds = Rounds(engine, tiles, ids, base)
    rows = [rounds.verify(DraftTree(token), commit=[0]) for token in ids[base : base + count]]
    return torch.cat(rows), rounds.cache


@pytest.mark.hazard(23)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_row_at_every_width_place_and_round_start(family, dtype, engine_of, tiles_of):
    engine = engine_of(family, dtype)
    tiles = tiles_of(engine)
    rng = random.Random(1)
    for base in BASES:
        ids = text(base, engine.decoder.config.vocab_size)
        expected, _ = plain_rows(engine, tiles, ids, base, MAX_NODES)
        for width in range(1, MAX_NODES + 1) if base == 52 else (2, 7, 16):
            rounds = Rounds(engine, tiles, ids, base)
            assert torch.equal(rounds.verify(chain(ids[base : base + width])), expected[:width]), (base, width)
        # Rounds that start anywhere: plain up to there, then a chain.
        start = rng.randrange(1, 12)
        rounds = Rounds(engine, tiles, ids, base)
        for token in ids[base : base + start]:
            rounds.verify(DraftTree(token), commit=[0])
        rest = rounds.verify(chain(ids[base + start : base + MAX_NODES]))
        assert torch.equal(rest, expected[start:]), (base, start)


def bushy(tokens, rng, vocab_size):
    """A random tree of 16 nodes that holds `tokens` as one of its paths; also that path's nodes."""
    tree, spine, wanted = DraftTree(tokens[0]), [0], list(tokens[1:])
    while not tree.is_full:
        must = len(wanted) >= tree.max_nodes - len(tree)
        if wanted and (must or rng.random() < 0.4):
            token = wanted.pop(0)
            spine.append(tree.child(spine[-1], token) or tree.add(spine[-1], token))
            continue
        parent, token = rng.randrange(len(tree)), rng.randrange(vocab_size)
        if tree.child(parent, token) is None:
            tree.add(parent, token)
    return tree, spine


@pytest.mark.hazard(6, 8, 23)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, "gemma3"])
def test_row_in_any_tree_run_ahead_anyhow(family, dtype, engine_of, tiles_of):
    """And the committed path's keys and values are plain decoding's, ready for the next round."""
    engine = engine_of(family, dtype)
    tiles, config = tiles_of(engine), engine.decoder.config
    rng = random.Random(2)
    for base in BASES:
        ids = text(base, config.vocab_size)
        expected, plain_cache = plain_rows(engine, tiles, ids, base, 14)
        for _ in range(3):
            depth = rng.randrange(2, 8)
            tree, spine = bushy(ids[base : base + depth], rng, config.vocab_size)
            runs = [(tree.path(rng.randrange(len(tree))), rng.randrange(1, 5)) for _ in range(rng.randrange(4))]
            rounds = Rounds(engine, tiles, ids, base)
            assert torch.equal(rounds.verify(tree, runs, commit=spine)[spine], expected[:depth])
            again = rounds.verify(chain(ids[base + depth : base + 14]), commit=list(range(14 - depth)))
            assert torch.equal(again, expected[depth:])
            for layer in range(config.num_layers):
                for found, wanted in zip(
                    rounds.cache.read(layer, 0, base + 14), plain_cache.read(layer, 0, base + 14), strict=True
                ):
                    assert torch.equal(found, wanted)


@pytest.mark.hazard(24)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_shared_by_sequences(dtype, engine_of, tiles_of):
    """Rows of three sequences in tiles of at most 16, at different layers and lengths."""
    engine = engine_of("gemma2", dtype)
    tiles, decoder = tiles_of(engine), engine.decoder
    plan = plan_cache(decoder.config, 3, 256, decoder.device, decoder.dtype)
    shared = KVCache(plan, decoder.device)
    works, expected = [], []
    for sequence, (base, width) in enumerate([(5, 7), (62, 16), (100, 3)]):
        ids = text(base, decoder.config.vocab_size)
        expected.append(plain_rows(engine, tiles, ids, base, width)[0][:, : decoder.config.hidden_size])
        works.append(Rounds(engine, tiles, ids, base, shared, sequence).begin(chain(ids[base : base + width])))
    advance(decoder, shared, [(works[0], [0, 1, 2]), (works[2], [0])], 2, tiles)
    advance(decoder, shared, [(works[0], [0]), (works[1], list(range(9)))], 3, tiles)
    advance(decoder, shared, [(work, range(len(work.tree))) for work in works], decoder.config.num_layers, tiles)
    for work, wanted in zip(works, expected, strict=True):
        assert torch.equal(work.hidden[: len(wanted)], wanted)


@pytest.mark.hazard(7)
@pytest.mark.parametrize("family", ["mistral", "qwen2_window", "gemma3"])
def test_decoding_across_the_window_agrees_with_a_whole_forward(family, engine_of, tiles_of):
    """Trees cross the window of 8 again and again; the reference sees whole sequences at once."""
    engine = engine_of(family)
    tiles, decoder = tiles_of(engine), engine.decoder
    ids = text(4, decoder.config.vocab_size, 36)
    reference = decoder.encode(torch.tensor([ids]), [decoder.config.num_layers])[decoder.config.num_layers][0]
    rounds, rng, at = Rounds(engine, tiles, ids, 4), random.Random(3), 4
    while at < len(ids):
        depth = min(rng.randrange(1, 9), len(ids) - at)
        tree, spine = bushy(ids[at : at + depth], rng, decoder.config.vocab_size)
        rows = rounds.verify(tree, commit=spine)[spine][:, : decoder.config.hidden_size]
        assert (rows - reference[at : at + depth]).abs().max() < 2e-4 * reference.abs().max()
        at += depth


def test_row_keys_show_each_row_its_own_path():
    """Against a brute-force list: committed positions within the window, then the path."""
    rng = random.Random(5)
    for base in (3, 60, 64, 130):
        for window in (None, 8, 70):
            tree, _ = bushy([1, 2, 3], rng, 50)
            nodes = rng.sample(range(len(tree)), 6)
            keys = row_keys(tree, nodes, base, 64, window, torch.device("cpu"))
            for row, node in enumerate(nodes):
                slots = [*range(base), *(base + ancestor for ancestor in tree.path(node))]
                slots = slots if window is None else slots[-window:]
                masked = keys.stop - keys.hidden.shape[-1]
                seen = [*range(keys.first, masked)]
                for position in range(masked, keys.stop):
                    if not keys.hidden[row, 0, position - masked]:
                        offset = position - keys.open_slot
                        at_slot = keys.order is None or offset < 0
                        seen.append(position if at_slot else keys.open_slot + int(keys.order[row, offset]))
                assert seen == slots
                if keys.path_slots is not None:
                    assert torch.equal(keys.order[row], keys.path_slots[keys.path_of_row[row]])


def test_rope_tables_do_not_depend_on_how_far_they_reach(engine_of):
    """Rule 7: a position reads the same numbers whatever was the longest position so far."""
    for family in ("llama3", "qwen2_window", "gemma3"):
        short, long = engine_of(family, max_context=20), engine_of(family, max_context=5000)
        at = torch.arange(20)
        ends = torch.tensor([4999])
        long.decoder.rotary(ends)
        tables, others = short.decoder.rotary(at), long.decoder.rotary(at)
        for spec, (cos, sin) in tables.items():
            assert torch.equal(cos, others[spec][0]) and torch.equal(sin, others[spec][1])


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_in_chunks(family, engine_of, monkeypatch):
    """Near the whole forward; and what prompts share in whole chunks has equal bits (rule 6)."""
    monkeypatch.setattr(forward, "PREFILL_CHUNK", 16)
    engine = engine_of(family)
    decoder, layers = engine.decoder, range(engine.decoder.config.num_layers)
    ids = text(80, decoder.config.vocab_size)
    long, short = (Rounds(engine, engine.tiles, ids, base) for base in (100, 70))
    reference = decoder.encode(torch.tensor([ids]), [len(layers)])[len(layers)][0]
    row = long.verify(DraftTree(ids[100]))[0, : decoder.config.hidden_size]
    assert (row - reference[100]).abs().max() < 2e-4 * reference.abs().max()
    for layer in layers:
        for one, other in zip(long.cache.read(layer, 0, 64), short.cache.read(layer, 0, 64), strict=True):
            assert torch.equal(one, other)
