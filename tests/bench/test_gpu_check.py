"""The check of bits finds whatever depends on more than a row's own tokens and position.

Most of it runs against a stand-in whose logits are a function of the row's tokens; each planted bug breaks that in one
way and must show in its own case. One run goes through the fused kernels, in Triton's interpreter.
"""

import random
from dataclasses import replace

import pytest
import torch
from skipstone.bench import gpu_check
from skipstone.bench.gpu_check import FusedRows, bits, bushy, chain_of, describe, main
from skipstone.bench.shapes import random_weights, tiny_config
from skipstone.engine.model import Decoder

VOCAB = 60


class Cache:
    """Committed lengths and tokens."""

    def __init__(self, batch):
        self.lens, self.tokens, self.trees = [0] * batch, [[] for _ in range(batch)], {}

    def commit(self, sequence, path):
        tree = self.trees[sequence]
        self.tokens[sequence] = self.tokens[sequence][: self.lens[sequence]] + [tree.tokens[node] for node in path]
        self.lens[sequence] += len(path)


class Stub:
    """Rows whose logits follow from their own tokens; `bug` is (sequence, node, tree, width, trees) -> anything that
    must not matter."""

    def __init__(self, bug=lambda **_: 0, batch=3):
        self.cache, self.bug = Cache(batch), bug
        self.decoder = type("Decoder", (), {"config": type("Config", (), {"vocab_size": VOCAB})})

    def read(self, sequence, ids):
        self.cache.tokens[sequence], self.cache.lens[sequence] = list(ids), len(ids)

    def rewind(self, sequence, base):
        self.cache.lens[sequence] = base

    def verify(self, trees, width):
        self.cache.trees = dict(trees)
        found = {}
        for sequence, tree in trees.items():
            base = self.cache.lens[sequence]
            rows = []
            for node in range(len(tree)):
                path = [tree.tokens[i] for i in tree.path(node)]
                known = (*self.cache.tokens[sequence][:base], *path)
                salt = self.bug(sequence=sequence, node=node, tree=tree, width=width, trees=trees, base=base)
                generator = torch.Generator().manual_seed(hash((known, salt)))
                rows.append(torch.randn(5, generator=generator))
            found[sequence] = torch.stack(rows)
        return found

    def reference(self, tree):
        return self.verify({0: tree}, 16)[0] + 1e-6


def wrong_cases(rows, **options):
    return {finding.case for finding in bits(rows, bases=(1, 20), **options) if finding.different}


def test_rows_that_depend_on_their_own_tokens_pass():
    found = {finding.case: finding for finding in bits(Stub(), bases=(1, 20))}
    assert not any(finding.different for finding in found.values())
    assert found["width"].rows == 2 * sum(size * sum(w >= size for w in (1, 2, 4, 8, 16)) for size in range(1, 17))
    assert all(finding.rows for finding in found.values()) and 0 < found["reference"].worst < 1e-4


@pytest.mark.parametrize(
    ("case", "bug"),
    [
        ("width", lambda width, **_: width == 4),
        ("width", lambda tree, **_: len(tree) == 3),
        ("start", lambda base, node, width, **_: width == 16 and base not in (1, 20) and node == 3),
        ("tree", lambda tree, **_: not tree.is_chain),
        ("tree", lambda tree, node, **_: node != tree.depths[node]),
        ("batch", lambda trees, **_: len(trees) > 1),
    ],
)
def test_planted_bugs_show_in_their_case(case, bug):
    assert case in wrong_cases(Stub(bug))


def test_a_commit_that_does_not_gather_shows():
    rows = Stub()
    commit = rows.cache.commit
    rows.cache.commit = lambda sequence, path: commit(sequence, list(range(len(path))))
    assert wrong_cases(rows) == {"after a tree"}


def test_what_is_wrong_is_described():
    finding = gpu_check.Finding("tree")
    finding.compare(torch.ones(3, 2), torch.ones(3, 2), "here")
    finding.compare(torch.ones(3, 2), torch.tensor([[1.0, 1], [1, 2], [1, float("nan")]]), "there")
    assert (finding.rows, finding.different, finding.first) == (6, 2, "there")
    findings = [{**vars(finding), "pdl": True}]
    text = describe({"model": "m", "dtype": "bfloat16", "seconds": 1.0, "findings": findings})
    assert "6 rows compared" in text and "tree, pdl True: 2 of 6 rows; first at there" in text


def test_random_trees_hold_their_path():
    for seed in range(20):
        tree, spine = bushy([7, 8, 9, 7], random.Random(seed), VOCAB)
        assert (
            len(tree) == 16 and [tree.tokens[node] for node in spine] == [7, 8, 9, 7] and tree.path(spine[-1]) == spine
        )


@pytest.mark.interpreter
def test_fused_kernels_in_the_interpreter(monkeypatch):
    for name, value in {"WIDTHS": (1, 16), "NUM_PLAIN": 5, "SIZES": (1, 3), "NUM_STARTS": 1}.items():
        monkeypatch.setattr(gpu_check, name, value)
    config = replace(
        tiny_config("llama"), num_layers=1, hidden_size=32, num_heads=2, num_kv_heads=1, vocab_size=40,
        intermediate_size=32, ropes=tiny_config("llama").ropes[:1], windows=(None,),
    )  # fmt: skip
    with torch.inference_mode():
        rows = FusedRows(Decoder(config, random_weights(config, torch.float32, "cpu")), 2, 60, pdl=False)
        found = bits(rows, bases=(15,), num_trees=1)
    assert all(finding.rows and not finding.different for finding in found)
    assert 0 < found[-1].worst < gpu_check.TOLERANCES[torch.float32]


def test_bad_requests_are_refused():
    with pytest.raises(SystemExit, match="unknown steps"):
        main(["--steps", "bit"])
    with pytest.raises(SystemExit, match="needs --prompts"):
        main(["--steps", "lossless"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="sees none"):
            main([])
    assert chain_of([4, 5]).is_chain
