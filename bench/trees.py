"""Shapes of draft trees at equal budgets, replayed: chains, a fixed shape, best first, best first by calibrated
probabilities.

A head at exit 0 is asked for a wide pool of candidates at every token of plainly decoded questions
(`train/rehearse.py`); each shape takes its nodes from the pools. Fixed shapes and calibration maps are fitted on other
prompts. Counts only: no clock, so the load of the machine does not matter.

    python -m skipstone.bench.trees QUESTIONS --fit PROMPTS [--model M] [--limit N] [--budgets 3,7,15]
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch

from ..engine.load import load
from ..train.data import encode_chat, is_held_out, read_prompts
from ..train.recalibrate import HELD_OUT_PERCENT
from ..train.rehearse import WIDE, Candidates, Rehearsed, Score, own_log_probs, play_trees, rehearse
from .questions import choose, read_questions

Key = Callable[[Candidates, int], Hashable]
P_EDGES = (-6.0, -5.0, -4.0, -3.5, -3.0, -2.5, -2.0, -1.6, -1.3, -1.0, -0.8, -0.6, -0.4, -0.25, -0.12, -0.05, -0.01)
NATS_EDGES = (1.0, 2.0, 3.0, 4.0, 5.0)
PRIOR = 4.0  # observations that the head's own probability counts as


def by_probability(pool: Candidates, one: int) -> Hashable:
    """Depth and the head's probability, in bins."""
    return min(pool.depths[one], 4), sum(pool.log_probs[one] >= edge for edge in P_EDGES)


def by_entropy(pool: Candidates, one: int) -> Hashable:
    """Depth, entropy in bins, and the place among siblings: no probability."""
    return min(pool.depths[one], 4), sum(pool.entropies[one] >= edge for edge in NATS_EDGES), min(pool.ranks[one], 3)


def by_both(pool: Candidates, one: int) -> Hashable:
    """Depth, probability and entropy."""
    return by_probability(pool, one), sum(pool.entropies[one] >= edge for edge in NATS_EDGES)


def by_place(pool: Candidates, one: int) -> Hashable:
    """The ranks on the way from the root: the same tree in every round."""
    ranks = []
    while one:
        ranks.append(pool.ranks[one])
        one = pool.parents[one]
    return tuple(ranks)


@dataclass(frozen=True)
class Map:
    """How often a candidate of one kind is right where its parent is.

    Args:
        key: a candidate's kind.
        prior: observations that the head's own probability counts as; 0 leaves it out.
    """

    key: Key
    prior: float = PRIOR
    seen: Counter[Hashable] = field(default_factory=Counter)
    right: Counter[Hashable] = field(default_factory=Counter)

    def fit(self, pools: Sequence[Candidates]) -> Score:
        """Count; returns log-probabilities by the counts."""
        for pool in pools:
            for one in range(1, len(pool.parents)):
                if pool.right[pool.parents[one]]:
                    kind = self.key(pool, one)
                    self.seen[kind] += 1
                    self.right[kind] += pool.right[one]
        return self.score

    def score(self, pool: Candidates) -> list[float]:
        found = [0.0]
        for one in range(1, len(pool.parents)):
            kind, own = self.key(pool, one), math.exp(pool.log_probs[one])
            share = (self.right[kind] + self.prior * own + 0.02) / (self.seen[kind] + self.prior + 0.04)
            found.append(math.log(min(1.0, share)))
        return found


def chain_tokens(found: Rehearsed, length: int) -> float:
    """Tokens per verification of greedy chains."""
    start = rounds = 0
    for text in found.lengths:
        at = 0
        while at < text:
            at += min(found.chain_right[start + at], length, text - at - 1) + 1
            rounds += 1
        start += text
    return start / rounds


def compare(fitted: Rehearsed, found: Rehearsed, budgets: Sequence[int]) -> dict[str, dict[int, float]]:
    """Shape -> nodes -> tokens per verification on `found`; maps and the fixed shape come from `fitted`."""
    scores: dict[str, Score] = {
        "fixed shape": Map(by_place, prior=0.0).fit(fitted.pools),
        "own probabilities": own_log_probs,
        "map of p": Map(by_probability).fit(fitted.pools),
        "entropy and rank": Map(by_entropy, prior=0.0).fit(fitted.pools),
        "map of p and entropy": Map(by_both).fit(fitted.pools),
    }
    longest = max(found.chain_right, default=0)
    table = {"chain": {nodes: chain_tokens(found, min(nodes, max(1, longest))) for nodes in budgets}}
    for name, score in scores.items():
        own = [play_trees(found, WIDE.max_depth, n, beam=WIDE.beam, branch=WIDE.branch, score=score) for n in budgets]
        table[name] = {nodes: counts.tokens for nodes, counts in zip(budgets, own, strict=True)}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens per verification of tree shapes at equal budgets, replayed.")
    parser.add_argument("questions", help="JSON lines with question_id, category and turns")
    parser.add_argument("--fit", required=True, help="prompts for maps and the fixed shape; held-out ones are used")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--heads", default="recurrent")
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--budgets", default="2,3,5,7,11,15")
    given = parser.parse_args()
    engine = load(given.model, heads=given.heads, plan="none", progress=False)
    if engine.tokenizer is None or engine.heads is None or 0 not in engine.heads.exits:
        raise SystemExit(f"--heads {given.heads} has no head at exit 0: there are no best-first trees to compare")
    asked = choose(read_questions(given.questions), None, given.limit)
    fit = [text for text in read_prompts(given.fit) if is_held_out(text, HELD_OUT_PERCENT)]
    found = []
    for texts in (fit, [question.turns[0] for question in asked]):
        ids = [ids for text in texts if 0 < len(ids := encode_chat(engine.tokenizer, text)) <= 640][: given.limit]
        with torch.inference_mode():
            found.append(rehearse(engine, ids, max_new_tokens=given.max_new_tokens))
    budgets = [int(part) for part in given.budgets.split(",")]
    table = compare(found[0], found[1], budgets)
    print(json.dumps({"tokens": sum(found[1].lengths), "tokens_per_verification": table}, indent=1))


if __name__ == "__main__":
    main()
