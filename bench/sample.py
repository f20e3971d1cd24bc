"""One answer of each arm, round by round: what was drafted, what of it stood, which exit it came from. Not timed.

Trees are seen through the engine's observer, which only the loop that waits for every round calls; on a GPU that is
the PyTorch path, whose near-ties may fall otherwise than the fused kernels'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..engine.forward import Working
from ..engine.tokenizer import Tokenizer
from .arms import Arm, EngineArm
from .measure import prompt_ids
from .questions import Question

MOST_TOKENS = 48  # on a GPU a round takes tens of ms here


def sample(
    arms: Sequence[Arm], question: Question, tokenizer: Tokenizer, sampling: Mapping[str, Any]
) -> dict[str, Any]:
    """The first turn of a question, decoded by every drafting arm of our engine.

    Returns:
        `question_id`, `prompt` (its text), and `arms`: name -> rounds, each with `tokens` (text, exit layer or None for
        the model's own, entropy in nats of the draft) and `rejected` (the drafted texts that were not accepted);
        `failed`: arms that this could not be shown of, and why.
    """
    ids = prompt_ids(tokenizer, question.turns[:1], ())
    sampling = {**sampling, "max_new_tokens": min(MOST_TOKENS, sampling["max_new_tokens"])}
    drafting = [arm for arm in arms if isinstance(arm, EngineArm) and arm.lossless and arm.speculation is not False]
    shown, failed = {}, {}
    for arm in drafting:
        try:
            shown[arm.name] = _rounds(arm, ids, tokenizer, sampling)
        except (RuntimeError, ValueError, MemoryError) as error:  # a report of an hour's run must not end here
            failed[arm.name] = f"{type(error).__name__}: {error}"
    return {"question_id": question.question_id, "prompt": question.turns[0], "arms": shown, "failed": failed}


def _rounds(arm: EngineArm, ids: list[int], tokenizer: Tokenizer, sampling: Mapping[str, Any]) -> list[dict[str, Any]]:
    trees: list[Any] = []

    def observe(on: Any, works: Sequence[Working], logits: Any) -> None:
        trees.append(works[0].tree)

    engine = arm.engine
    before, engine.observer = engine.observer, observe
    try:
        with engine.stream(ids, **arm.drafting(), **sampling) as stream:
            blocks = []
            while block := stream.next_block():
                blocks.append(block)
    finally:
        engine.observer = before
    rounds = []
    for tree, block in zip(trees, blocks, strict=False):
        node: int | None = 0
        accepted = set()
        for event in block:
            node = None if node is None else tree.child(node, event.token_id)
            if node is not None:
                accepted.add(node)
        rejected = [tokenizer.decode([tree.tokens[n]]) for n in range(1, len(tree)) if n not in accepted]
        tokens = [[event.text, event.exit_layer, event.entropy] for event in block]
        rounds.append({"tokens": tokens, "rejected": rejected})
    return rounds
