"""Bugs planted into the engine, one at a time; the comparison that guards the one rule must see each of them.

The comparison: tokens, logprobs and the committed keys and values, bit for bit, of speculative against plain decoding,
for chains and trees, greedy and sampled, over prompts on both sides of a key group's border. It is clean without a
bug (first test), so what it finds is the bug.
"""

import dataclasses

import pytest
import torch
from skipstone.engine import cache as cache_module
from skipstone.engine import draft as draft_module
from skipstone.engine import forward, loop
from skipstone.engine.gate import Gate, every, fixed_exit
from skipstone.engine.sampling import Context
from skipstone.engine.tree import Acceptance

PROMPTS = [[4, 9, 2], list(range(5, 64))]
NEW = 16
OPTIONS = {"max_new_tokens": NEW, "logprobs": 1}
SAMPLED = {"temperature": 0.8}
POLICIES = {"chain": fixed_exit(2, 6), "trees": every((1, 2, 3), Gate(0.3, 1.5), branch=3, max_depth=6)}


def observe(engine, prompts, **options):
    """Everything that must not depend on drafting: tokens, logprobs, committed keys and values by layer."""
    outs = engine.generate(prompts, **OPTIONS, **options)
    cache, seen = engine.workspace.cache, []
    for i, out in enumerate(outs):
        length = len(prompts[i]) + len(out.token_ids) - 1
        stores = [torch.stack(cache.read(layer, i, length)) for layer in range(engine.decoder.config.num_layers)]
        seen.append((out.token_ids, out.logprobs, torch.stack(stores), out.error))
    return seen


def differences(engine, heads, sampling):
    """Which policies differ from plain decoding, and in what."""
    heads.known.clear()
    for i, ids in enumerate(PROMPTS):
        heads.learn(ids, seed=i, **OPTIONS, **sampling)
    options = {"seeds": list(range(len(PROMPTS))), **sampling}
    plain = observe(engine, PROMPTS, speculation=False, **options)
    found = set()
    for name, policy in POLICIES.items():
        for one, other in zip(observe(engine, PROMPTS, policy=policy, **options), plain, strict=True):
            if one[0] != other[0]:
                found.add((name, "tokens"))
            if one[1] != other[1]:
                found.add((name, "logprobs"))
            if one[2].shape != other[2].shape or not torch.equal(one[2], other[2]):
                found.add((name, "cache"))
            if one[3] != other[3]:
                found.add((name, "error"))
    return found


@pytest.fixture(params=["llama2", "gemma2"])
def setting(request, engine_of, planned):
    engine = engine_of(request.param)
    return engine, planned(engine)


@pytest.mark.hazard(6, 23)
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_without_a_bug_nothing_differs(setting, sampling):
    assert differences(*setting, sampling) == set()


def first_children(tree, target):
    nodes = [0]
    while children := tree.children(nodes[-1]):
        nodes.append(children[0])
    return Acceptance(tuple(nodes[1:]), tuple(tree.tokens[node] for node in nodes[1:]), target(nodes[-1]))


@pytest.mark.hazard(15)
def test_accept_all_is_caught(setting, monkeypatch):
    monkeypatch.setattr(loop, "accept", first_children)
    assert {("chain", "tokens"), ("trees", "tokens")} <= differences(*setting, {})


def change_keys(monkeypatch, change):
    original = forward.row_keys

    def changed(tree, nodes, base, group, window, device):
        return change(original(tree, nodes, base, group, window, device), tree, nodes, base, group)

    monkeypatch.setattr(forward, "row_keys", changed)


@pytest.mark.hazard(23)
def test_tail_keys_out_of_order_are_caught(setting, monkeypatch):
    """Two committed keys of the open group change places, for tree rows only: the same numbers in another order."""

    def swap(keys, tree, nodes, base, group):
        if keys.order is None or base % group < 2:
            return keys
        order, paths = keys.order.clone(), keys.path_slots.clone()
        order[:, [0, 1]], paths[:, [0, 1]] = order[:, [1, 0]], paths[:, [1, 0]]
        return dataclasses.replace(keys, order=order, path_slots=paths)

    change_keys(monkeypatch, swap)
    found = differences(*setting, {})
    assert {("trees", "cache"), ("trees", "logprobs")} <= found
    assert not any(name == "chain" for name, _ in found)


@pytest.mark.hazard(23)
def test_a_path_in_the_wrong_order_is_caught(setting, monkeypatch):
    """The values of a path's last two nodes change places, their weights do not."""

    def swap(keys, tree, nodes, base, group):
        at = base % group
        if keys.path_slots is None or at + 2 >= keys.path_slots.shape[1]:
            return keys
        paths = keys.path_slots.clone()
        paths[:, [at, at + 1]] = paths[:, [at + 1, at]]
        return dataclasses.replace(keys, path_slots=paths)

    change_keys(monkeypatch, swap)
    assert {("trees", "tokens"), ("trees", "cache")} <= differences(*setting, {})


@pytest.mark.hazard(6)
def test_a_stale_slot_read_is_caught(setting, monkeypatch):
    """Each row sees one position more than its own: its child's key, or whatever a rejected draft left there."""

    def one_too_long(keys, tree, nodes, base, group):
        hidden = keys.hidden.clone()
        first = keys.stop - hidden.shape[-1]
        for row, node in enumerate(nodes):
            at = base + tree.depths[node] + 1
            if at < keys.stop:
                hidden[row, 0, at - first] = False
        return dataclasses.replace(keys, hidden=hidden)

    change_keys(monkeypatch, one_too_long)
    assert {("chain", "tokens"), ("trees", "tokens")} <= differences(*setting, {})


@pytest.mark.hazard(25)
def test_noise_keyed_by_round_is_caught(setting, monkeypatch):
    monkeypatch.setattr(Context, "position", property(lambda context: len(context.history)))
    assert {("chain", "tokens"), ("trees", "tokens")} <= differences(*setting, SAMPLED)
    assert differences(*setting, {}) == set(), "greedy decoding has no noise: only the sampled comparison sees it"


@pytest.mark.hazard(6)
def test_commit_without_gather_is_caught(setting, monkeypatch):
    def by_length(cache, sequence, path):
        cache.lens[sequence] += len(path)

    monkeypatch.setattr(cache_module.KVCache, "commit", by_length)
    found = differences(*setting, {})
    assert {("trees", "tokens"), ("trees", "cache")} <= found
    assert not any(name == "chain" for name, _ in found), "a chain's nodes already stand in their places"


@pytest.mark.hazard(6)
def test_gather_that_writes_before_it_has_read_is_caught(setting, monkeypatch):
    """Paths rise, so moving node by node from the last backwards overwrites what is still to be moved."""

    def backwards(cache, sequence, path):
        base = cache.lens[sequence]
        for store in (cache.k[:, sequence], cache.v[:, sequence]):
            for place, node in reversed(list(enumerate(path))):
                store[:, :, base + place] = store[:, :, base + node]
        cache.lens[sequence] = base + len(path)

    monkeypatch.setattr(cache_module.KVCache, "commit", backwards)
    assert ("trees", "cache") in differences(*setting, {}) | differences(*setting, SAMPLED)


@pytest.mark.hazard(8)
def test_draft_keys_missing_in_deeper_layers_are_caught(setting, monkeypatch):
    """A node goes to a deeper exit than its parent, whose keys there nobody has computed."""
    monkeypatch.setattr(draft_module, "_with_ancestors", lambda tree, nodes: sorted(nodes))
    found = differences(*setting, {})
    assert {("trees", "logprobs"), ("trees", "cache")} <= found
    assert not any(name == "chain" for name, _ in found)


@pytest.mark.hazard(8)
def test_verification_that_trusts_a_draft_too_far_is_caught(setting, monkeypatch):
    """Nodes that a draft took to some layer are taken for one layer further."""
    original = loop.draft

    def optimistic(decoder, cache, rows, *rest):
        refused = original(decoder, cache, rows, *rest)
        for row in rows:
            row.work.reached = [layer + 1 if 0 < layer < 3 else layer for layer in row.work.reached]
        return refused

    monkeypatch.setattr(loop, "draft", optimistic)
    assert {("chain", "cache"), ("trees", "cache")} <= differences(*setting, {})


@pytest.mark.hazard(7)
def test_positions_by_node_instead_of_depth_are_caught(setting, monkeypatch):
    """Siblings share a position; counting nodes gives the same for a chain and another for every tree."""
    original = forward.Decoder.run_layers

    def run_layers(decoder, hidden, start, stop, positions, attend, taps, mlp):
        if 1 < len(positions) < 17 and len(set(positions.tolist())) < len(positions):
            positions = positions[0] + torch.arange(len(positions))
        return original(decoder, hidden, start, stop, positions, attend, taps, mlp)

    monkeypatch.setattr(forward.Decoder, "run_layers", run_layers)
    assert ("trees", "tokens") in differences(*setting, {})


@pytest.mark.hazard(23)
def test_a_width_that_changes_bits_is_caught(setting, monkeypatch):
    """One part in a million, in every tile of more than one row: tokens stay, bits do not."""
    original = forward.Decoder.run_layers

    def run_layers(decoder, hidden, start, stop, positions, attend, taps, mlp):
        out = original(decoder, hidden, start, stop, positions, attend, taps, mlp)
        return out * (1 + 1e-6) if 1 < len(positions) < 17 else out

    monkeypatch.setattr(forward.Decoder, "run_layers", run_layers)
    found = differences(*setting, {})
    assert {("chain", "cache"), ("trees", "cache"), ("chain", "logprobs")} <= found


@pytest.mark.hazard(24)
def test_rows_that_read_a_neighbours_cache_are_caught(setting, monkeypatch):
    """The last sequence of a batch reads the first one's keys."""
    engine, heads = setting
    original = cache_module.KVCache.of_sequence
    options = {"seeds": [0, 1]}
    solo = [observe(engine, [ids], speculation=False, seeds=[i]) for i, ids in enumerate(PROMPTS)]
    together = observe(engine, PROMPTS, speculation=False, **options)
    assert [rows[0][:2] for rows in solo] == [row[:2] for row in together]
    monkeypatch.setattr(cache_module.KVCache, "of_sequence", lambda cache, sequence: original(cache, 0))
    together = observe(engine, PROMPTS, speculation=False, **options)
    assert solo[1][0][0] != together[1][0]


@pytest.mark.hazard(14)
def test_values_left_in_stale_slots_are_caught(setting, monkeypatch):
    """Without the zeroing before a round a NaN in an unused slot reaches every row: zero times NaN."""
    engine, _ = setting
    engine.generate(PROMPTS[0], **OPTIONS)
    engine.workspace.cache.v.fill_(float("nan"))
    monkeypatch.setattr(cache_module.KVCache, "clear_open", lambda cache, sequence: None)
    assert engine.generate(PROMPTS[0], **OPTIONS).finish_reason == "error"
