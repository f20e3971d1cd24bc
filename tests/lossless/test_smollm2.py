"""SmolLM2-135M in bf16: speculative equals plain, chain and tree, greedy and sampled.

Its widths (576, 1536, 49152) are no toy's: matrix libraries choose other kernels for them. The drafts come from heads
that know the plain output and are often wrong (`PlannedHeads`), so that every shape of round occurs.
"""

import pytest
import torch
from skipstone.engine import pretrained
from skipstone.engine.gate import Gate, every, fixed_exit
from skipstone.engine.load import load

NAME = "smollm2-135m-instruct"
PROMPTS = ["Rainbows form when", "def median(values):\n    "]
NEW = 24
TREES = every((8, 16, 24), Gate(0.3, 1.5), branch=3, max_depth=6)


@pytest.fixture(scope="module")
def engine():
    if not pretrained.is_available(NAME):
        pytest.skip("SmolLM2's weights package is not installed: " + pretrained.install_command(NAME))
    return load(NAME, heads=None, dtype=torch.bfloat16, device="cpu", progress=False)


@pytest.mark.hazard(13, 23, 24)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.95}], ids=["greedy", "sampled"])
def test_speculative_equals_plain(sampling, engine, planned, assert_same_output):
    assert engine.warning is None, "rows should agree on this machine"
    heads = planned(engine, exits=(8, 16, 24))
    plain = [heads.learn(text, seed=i, max_new_tokens=NEW, logprobs=1, **sampling) for i, text in enumerate(PROMPTS)]
    for policy in (fixed_exit(16, 5), TREES):
        outs = engine.generate(PROMPTS, seeds=[0, 1], policy=policy, max_new_tokens=NEW, logprobs=1, **sampling)
        for out, expected in zip(outs, plain, strict=True):
            assert_same_output(out, expected)
        assert 0 < sum(out.stats.num_accepted for out in outs) < sum(out.stats.num_drafted for out in outs)
    stream = engine.stream(PROMPTS[0], seed=0, policy=TREES, max_new_tokens=NEW, logprobs=1, **sampling)
    assert "".join(event.text for event in stream) == plain[0].text
    assert_same_output(stream.result, plain[0])
