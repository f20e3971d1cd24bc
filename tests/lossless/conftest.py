"""What targets that leave something out are held to: a batch with drafts equals every prompt alone and plainly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from skipstone.engine.gate import DraftPolicy
from skipstone.engine.sparsity.target import SparseTarget


class Runs:
    """Runs of one length, seen whole.

    Args:
        new: new tokens of each.
        policies: what `differing` tries unless told otherwise.
    """

    def __init__(self, new: int, policies: Mapping[str, DraftPolicy]) -> None:
        self.new, self.policies = new, policies

    def observe(self, engine: Any, given: Sequence[list[int]], **options: Any) -> list[Any]:
        """Everything that must not depend on drafting or batch mates: what a user sees, committed keys and values."""
        outs, seen = engine.generate(given, max_new_tokens=self.new, logprobs=1, **options), []
        for i, out in enumerate(outs):
            length = len(out.prompt_ids) + len(out.token_ids) - 1
            stores = [
                torch.stack(engine.workspace.cache.read(layer, i, length))
                for layer in range(engine.decoder.config.num_layers)
            ]
            seen.append((out.token_ids, out.logprobs, out.error, torch.stack(stores).clone()))
        return seen

    def solo(self, engine: Any, heads: Any, given: Sequence[list[int]], sampling: Mapping[str, Any]) -> list[Any]:
        """Each prompt alone and plainly; planned heads learn from it what is right.

        They are asked in every round of that run, also where a refresh leaves no room for a draft: none is made.
        """
        found = []
        for i, ids in enumerate(given):
            if heads is not None:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(SparseTarget, "clip", lambda target, row: row)
                    heads.learn(ids, seed=i, max_new_tokens=self.new, **sampling)
            found += self.observe(engine, [ids], seeds=[i], speculation=False, **sampling)
        return found

    def differing(
        self,
        engine: Any,
        given: Sequence[list[int]],
        expected: Sequence[Any],
        sampling: Mapping[str, Any],
        policies: Mapping[str, DraftPolicy] | None = None,
    ) -> set[str]:
        """Policies whose batch differs from the solo plain runs."""
        seeds, found = list(range(len(given))), set()
        for name, policy in (self.policies if policies is None else policies).items():
            seen = self.observe(engine, given, seeds=seeds, policy=policy, **sampling)
            for own, plain in zip(seen, expected, strict=True):
                if own[:3] != plain[:3] or not torch.equal(own[3], plain[3]):
                    found.add(name)
        return found


@pytest.fixture
def runs(request: pytest.FixtureRequest) -> Runs:
    """Of the test module's NEW tokens and POLICIES."""
    return Runs(request.module.NEW, request.module.POLICIES)
