"""Rounds: acceptance at the sampler, rows that end at different times, lengths of every sequence apart.

Planted bugs seen to fail here: a finished row that is decoded on; a token drawn at a rejected node; a failed draw that
takes the accepted tokens with it.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from skipstone.engine import loop
from skipstone.engine.gate import Gate, every, fixed_exit
from skipstone.engine.sampling import History, SamplingParams, TargetSampler
from skipstone.engine.tree import DraftTree

TREES = every((1, 2, 3), Gate(0.3, 1.5), branch=3, max_depth=6)
VOCAB = 20


def request_for(prompt, **params):
    return SimpleNamespace(history=History(prompt), sampler=TargetSampler(SamplingParams(**params), VOCAB))


def rows(*tokens):
    """Logits that say these tokens; None is a row of NaN."""
    logits = torch.zeros(len(tokens), VOCAB)
    for row, token in zip(logits, tokens, strict=True):
        if token is None:
            row.fill_(math.nan)
        else:
            row[token] = 5.0
    return logits


def tree():
    """3 -> (4 -> 5, 6 -> 7)"""
    drafted = DraftTree(3)
    for parent, token in ((0, 4), (0, 6), (1, 5), (2, 7)):
        drafted.add(parent, token, exit_layer=2, entropy=0.1)
    return drafted


@pytest.mark.parametrize(
    ("targets", "committed", "nodes"),
    [
        ((4, 5, 0, 9, 0), (4, 5, 9), (1, 3)),
        ((6, 5, 7, 9, 8), (6, 7, 8), (2, 4)),
        ((4, 7, 7, 9, 8), (4, 7), (1,)),
        ((9, 5, 7, 9, 8), (9,), ()),
    ],
)
def test_the_block_is_the_agreeing_path(targets, committed, nodes):
    block = loop.accept_block(request_for([1, 2, 3], logprobs=1), tree(), rows(*targets))
    assert block.tokens == committed and block.acceptance.nodes == nodes and block.error is None
    assert [o.exit_layer for o in block.origins] == [2] * len(nodes) + [None]
    assert [o.logprobs.token_id for o in block.origins] == list(committed)


@pytest.mark.hazard(14)
@pytest.mark.parametrize(
    ("targets", "kept", "position"),
    [((None, 5, 7, 9, 8), (), 3), ((4, None, 7, 9, 8), (4,), 4), ((4, 5, None, None, None), (4, 5), 5)],
)
def test_a_row_without_a_token_ends_the_block_there(targets, kept, position):
    block = loop.accept_block(request_for([1, 2, 3], logprobs=0), tree(), rows(*targets))
    assert block.tokens == kept and len(block.origins) == len(kept)
    assert f"position {position}" in block.error


@pytest.mark.hazard(14)
def test_rejected_rows_may_hold_anything(monkeypatch):
    block = loop.accept_block(request_for([1, 2, 3]), tree(), rows(4, 8, None, None, None))
    assert block.tokens == (4, 8) and block.error is None


@pytest.mark.hazard(10)
def test_a_processor_is_asked_along_the_accepted_path_only():
    prefixes = []

    def processor(prefix, logits):
        prefixes.append(prefix)
        return logits

    loop.accept_block(request_for([1, 2, 3], logits_processor=processor), tree(), rows(6, 5, 7, 9, 8))
    assert prefixes == [[1, 2, 3], [1, 2, 3, 6], [1, 2, 3, 6, 7]]


@pytest.mark.hazard(6, 24)
def test_rows_end_at_different_times(engine_of, planned, monkeypatch):
    """Stop ids end the rows of a batch in different rounds; the others go on as if alone, and no ended row is run."""
    engine = engine_of()
    heads = planned(engine)
    prompts = [[1, 2, 3], [50] * 40, [9], [7, 7, 100]]
    free = [heads.learn(ids, max_new_tokens=30).token_ids for ids in prompts]
    stop_ids = [free[0][3], free[1][11]]
    plain = [engine.generate(ids, speculation=False, max_new_tokens=30, stop_ids=stop_ids) for ids in prompts]
    active, original = [], loop.play_round
    monkeypatch.setattr(
        loop,
        "play_round",
        lambda on, requests, policy: (active.append([r.sequence for r in requests]), original(on, requests, policy))[1],
    )
    for policy in (TREES, fixed_exit(2, 5), None):
        active.clear()
        outs = engine.generate(prompts, policy=policy, max_new_tokens=30, stop_ids=stop_ids)
        for i, (out, expected) in enumerate(zip(outs, plain, strict=True)):
            assert out.token_ids == expected.token_ids and out.finish_reason == expected.finish_reason
            assert out.stats.num_verifications == sum(i in sequences for sequences in active)
        assert len({out.stats.num_verifications for out in outs}) > 1


@pytest.mark.hazard(6)
def test_committed_lengths_are_each_rows_own(engine_of, planned):
    engine = engine_of()
    heads = planned(engine)
    prompts = [[4] * 3, [5] * 9, [6]]
    for ids in prompts:
        heads.learn(ids, max_new_tokens=20)
    requests = engine._intake.requests(prompts, None, False, {"max_new_tokens": 20})
    for released in engine._decode(requests, "lossless", None, "always", TREES):
        for request, _ in released:
            assert engine.workspace.cache.lens[request.sequence] == request.committed_len
            assert len(request.origins) == request.history.num_new >= len(request.checker.token_ids)
    assert len(set(engine.workspace.cache.lens[:3])) == 3


def test_nothing_to_generate_runs_nothing(engine_of, monkeypatch):
    engine = engine_of()
    monkeypatch.setattr(loop, "prefill", lambda *args: pytest.fail("no prefill is needed"))
    out = engine.generate([1, 2], max_new_tokens=0)
    assert out.token_ids == [] and out.finish_reason == "length" and out.stats.num_verifications == 0
