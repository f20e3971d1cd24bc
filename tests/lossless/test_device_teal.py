"""Plain decoding of rows that drop inputs, in rounds on the device: the loop that waits has the same tokens.

Without a GPU the rounds run kernel by kernel in Triton's interpreter, on few layers and for few tokens, against the
CPU's own path, which skips channels; on a GPU they are captured graphs, in bf16, too, and the loop that waits zeroes
inputs. Greedy tokens are compared in fp32, where only a near-tie could differ; keys of batches to the bit.

Planted bugs seen to fail here: thresholds of the level before; dense rows thinned out; the first sequence's thresholds
for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from skipstone.engine.fused import FusedWeights
from skipstone.engine.gate import fixed_exit, from_text
from skipstone.engine.graphs import Rounds
from skipstone.engine.sparsity.teal import TealLevel
from skipstone.engine.sparsity.teal_step import TealStep
from skipstone.engine.sparsity.thresholded import projections

ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.triton
PROMPTS = [[4, 9, 2], list(range(5, 24))]
SEEDS = [5, 6]
NEW = 24 if ON_GPU else 5
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8},
    "processed": {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2, "min_new_tokens": 2, "stop_ids": [3]},
}


def level(engine: Any, share: float = 0.5, dense_tokens: int = 4) -> TealLevel:
    own = len(projections(engine.decoder.config))
    at = share * torch.linspace(0.5, 1.0, own).repeat(engine.decoder.config.num_layers, 1)
    return TealLevel(share, at, dense_tokens)


@pytest.fixture
def thinned(engine_of: Callable) -> Callable:
    """`thinned(family="llama2", dtype=float32)` -> an engine that drops inputs in rounds on the device."""

    def build(family: str = "llama2", dtype: torch.dtype = torch.float32) -> Any:
        engine = engine_of(
            family, dtype, num_layers=4 if ON_GPU else 1, max_context=250, device="cuda" if ON_GPU else "cpu"
        )
        with torch.inference_mode():
            engine.fused = FusedWeights(engine.decoder)
        engine.drop_inputs(level(engine))
        return engine

    return build


def decoded(engine: Any, given: list[list[int]] = PROMPTS, **options: Any) -> tuple[list[Any], list[torch.Tensor]]:
    """Outputs, and the committed keys and values of the last layer."""
    outs = engine.generate(given, max_new_tokens=NEW, **options)
    last = engine.decoder.config.num_layers - 1
    lengths = [len(out.prompt_ids) + len(out.token_ids) - 1 for out in outs]
    return outs, [torch.stack(engine.workspace.cache.read(last, i, n)).clone() for i, n in enumerate(lengths)]


def waiting(engine: Any, **options: Any) -> list[list[int]]:
    """Tokens of the loop that waits for every step."""
    channels, engine._channels = engine._channels, None
    try:
        outs = engine.generate(PROMPTS, seeds=SEEDS, speculation=False, max_new_tokens=NEW, **options)
    finally:
        engine._channels = channels
    return [out.token_ids for out in outs]


@pytest.mark.hazard(6, 24)
@pytest.mark.parametrize("dtype", [torch.float32] + ([torch.bfloat16] if ON_GPU else []), ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_batches_equal_solo_and_the_loop_that_waits(name: str, dtype: torch.dtype, thinned: Callable) -> None:
    engine = thinned(dtype=dtype)
    together, keys = decoded(engine, seeds=SEEDS, **OPTIONS[name])
    assert all(out.error is None and out.verify == "teal 0.5" and out.stats.num_drafted == 0 for out in together)
    assert (
        all(isinstance(rounds.steps[1], TealStep) for rounds in engine.workspace.rounds.values())
        and engine.workspace.rounds
    )
    if dtype == torch.float32:
        assert [out.token_ids for out in together] == waiting(engine, **OPTIONS[name])
    for i in range(len(PROMPTS)):
        (alone,), (own,) = decoded(engine, PROMPTS[i : i + 1], seeds=SEEDS[i : i + 1], **OPTIONS[name])
        assert alone.token_ids == together[i].token_ids and torch.equal(own, keys[i])


@pytest.mark.parametrize("family", ["llama_linear", "qwen2", "qwen3", "gemma2", "gpt_neox"])
def test_families(family: str, thinned: Callable) -> None:
    """Biases, norms over heads, soft-caps, post norms, LayerNorm and a parallel residual, up to the draw."""
    engine = thinned(family)
    assert [out.token_ids for out in decoded(engine, seeds=SEEDS)[0]] == waiting(engine)


def test_one_capture_serves_every_threshold(thinned: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other levels, other dense tokens: the same rounds, prepared once; each as a new engine has it."""
    engine, captured = thinned(), []
    original = Rounds._capture
    monkeypatch.setattr(Rounds, "_capture", lambda rounds, kind: captured.append(kind) or original(rounds, kind))
    seen = []
    for own in (level(engine), level(engine, 0.8), level(engine, 0.8, dense_tokens=0), level(engine, 0.0)):
        engine.drop_inputs(own)
        seen.append(decoded(engine, PROMPTS[:1])[1][0])
    assert captured == ["plain"]
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i]), "levels should matter"
    fresh = thinned()
    fresh.drop_inputs(level(engine, 0.8))
    assert torch.equal(decoded(fresh, PROMPTS[:1])[1][0], seen[1])
    # nothing dropped is the whole model, by other kernels
    engine.drop_inputs()
    dense = decoded(engine, PROMPTS[:1])[1][0]
    torch.testing.assert_close(dense, seen[3], rtol=2e-4, atol=2e-4)


def test_speculation_is_refused_and_said_why(thinned: Callable) -> None:
    """Asked for it is refused; what the engine drafts by itself is left out, until the whole model is back."""
    engine = thinned()
    chain, usual = fixed_exit(1, 3), from_text()
    engine.policy = usual
    assert not engine.policy.drafts and "drop different inputs" in engine.warning
    assert "by input channel" in engine.memory(1, 64).split("; ")[-1]
    for options in ({"policy": chain}, {"lookup": True}):
        with pytest.raises(ValueError, match="decodes plainly on a GPU"):
            engine.generate(PROMPTS[0], max_new_tokens=2, **options)
    assert engine.generate(PROMPTS[0], max_new_tokens=2, speculation="always").stats.num_drafted == 0
    engine.drop_inputs()
    assert engine.policy is usual and engine.warning is None and "channel" not in engine.memory(1, 64)
