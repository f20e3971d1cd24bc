"""Heads with their own keys: what decoding makes entry by entry is what training unrolls at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from skipstone.heads import Entries, HeadSpec, Projection, StatefulHead, build_head, layer_options

D, V, T = 32, 50, 9
SIZES = layer_options(num_heads=4, num_kv_heads=2, head_dim=8, ff=48, rope_theta=1e4, qkv_bias=True)
TOLERANCE = 2e-5  # fp32; sums of at most a few dozen products of size 1


def make(kind: str, depth: int = 1) -> StatefulHead:
    torch.manual_seed(0)
    options = {"depth": depth, **SIZES, **({"taps": (2, 4)} if kind == "recurrent" else {})}
    head = build_head(HeadSpec(kind, 0 if kind == "recurrent" else 2, options), D, V)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    head.attach(Projection(lambda x: F.rms_norm(x, (D,)), torch.randn(V, D)))
    assert isinstance(head, StatefulHead)
    return head


def inputs(head: StatefulHead) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Hidden states, taps and the true contexts of one text."""
    hidden = torch.randn(T, D)
    if not head.taps:
        return hidden, None, None
    taps = torch.randn(T, 2, D)
    return hidden, taps, torch.cat([torch.zeros(1, D), head.context(taps)[:-1]])


@pytest.mark.parametrize(("kind", "depth"), [("block", 1), ("recurrent", 1), ("recurrent", 2)])
@torch.no_grad()
def test_entries_made_one_by_one_equal_the_unrolled_ones(kind: str, depth: int) -> None:
    """Catches: a chain that sees true entries it could not have, own entries missed, contexts one position off."""
    head = make(kind, depth)
    hidden, taps, context = inputs(head)
    steps = head.unroll(hidden.unsqueeze(0), None if taps is None else taps.unsqueeze(0), 4)
    assert len(steps) == (4 if head.taps else 1)
    for root in (0, 4):
        state = head.new_state(2, T + 16)
        out = torch.empty(0)
        for span in (range(0, root), range(root, root + 1)):
            if span:
                part = None if context is None else context[span.start : span.stop]
                out = head.extend(hidden[span.start : span.stop], part, [Entries(1, span, span)], state)
                expected = steps[0][0, span.start : span.stop]
                torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE)
        for step in range(1, 4):
            at = [root + step]
            parent = out[-1:] if head.taps else None
            out = head.extend(hidden[at], parent, [Entries(1, at, at)], state)
            expected = steps[min(step, len(steps) - 1)][0, at]
            torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["block", "recurrent"])
@torch.no_grad()
def test_siblings_and_batch_mates_do_not_see_each_other(kind: str) -> None:
    """Two drafts of one position, in scratch slots, beside another sequence; each equals itself alone."""
    head = make(kind)
    hidden, _, context = inputs(head)
    first = None if context is None else context[:3]

    def prompt(sequence: int) -> list[Entries]:
        return [Entries(sequence, range(3), range(3))]

    alone = []
    for node in (3, 4):
        state = head.new_state(1, 24)
        out = head.extend(hidden[:3], first, prompt(0), state)
        parent = out[-1:] if head.taps else None
        alone.append(head.extend(hidden[node : node + 1], parent, [Entries(0, [3], [3])], state))
    state = head.new_state(2, 24)
    state.k.fill_(1e4)  # stale keys and values in unused slots
    state.v.fill_(1e4)
    head.extend(hidden[5:8], None if context is None else context[5:8], prompt(0), state)
    out = head.extend(hidden[:3], first, prompt(1), state)
    visible = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 1]], dtype=torch.bool)
    rows = torch.cat([hidden[3:5], hidden[8:9]])
    parent = torch.cat([out[-1:], out[-1:], out[:1]]) if head.taps else None
    together = head.extend(rows, parent, [Entries(1, [3, 4], [3, 3], visible), Entries(0, [3], [3])], state)
    torch.testing.assert_close(together[:2], torch.cat(alone), rtol=0, atol=TOLERANCE)


def test_heads_start_from_the_bases_layers() -> None:
    """Names and shapes that fit are taken over; the rest keeps its start. Source -1 takes nothing."""
    weights = {"layers.3.qkv.weight": torch.randn(64, D), "layers.3.o.weight": torch.randn(D + 1, 32)}
    projection = Projection(lambda x: x, torch.randn(V, D))
    for source, taken in ((3, True), (-1, False)):
        head = build_head(HeadSpec("block", 2, {**SIZES, "source": source}), D, V)
        before = dict(head.named_parameters())["layers.0.o.weight"].detach().clone()
        head.initialise(projection, weights)
        after = dict(head.named_parameters())
        assert torch.equal(after["layers.0.qkv.weight"], weights["layers.3.qkv.weight"]) is taken
        assert torch.equal(after["layers.0.o.weight"], before)


@pytest.mark.parametrize(
    ("kind", "exit_layer", "options", "message"),
    [
        ("recurrent", 0, {}, "taps are"),
        ("recurrent", 0, {"taps": (4, 2)}, "taps are"),
        ("recurrent", 0, {"taps": (4,), "depth": 0}, "depth is 0"),
        ("block", 0, {}, "exit_layer is 0"),
        ("block", 2, {"taps": (4,)}, "unknown options"),
    ],
)
def test_wrong_specs_are_refused(kind: str, exit_layer: int, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_head(HeadSpec(kind, exit_layer, options), D, V)


def test_a_deep_head_starts_as_the_shallow_one_and_takes_the_neurons_that_write_most() -> None:
    """Catches: output weights of the second layer left as the base has them, gates of other neurons than their ups."""
    torch.manual_seed(0)
    base = {f"layers.3.{name}.weight": torch.randn(*shape) for name, shape in
            (("qkv", (64, D)), ("o", (D, 32)), ("up", (2 * 96, D)), ("down", (D, 96)))}  # fmt: skip
    base["layers.3.down.weight"][:, 48:] *= 9.0
    projection = Projection(lambda x: x, torch.randn(V, D))
    heads = [build_head(HeadSpec("block", 2, {**SIZES, "ff": 48, "source": 3, "depth": n}), D, V) for n in (1, 2)]
    found = []
    for head in heads:
        head.initialise(projection, base)
        head.attach(projection)
        assert isinstance(head, StatefulHead)
        found.append(head.unroll(torch.randn(1, 6, D, generator=torch.Generator().manual_seed(1)), None, 1)[0])
    torch.testing.assert_close(found[1], found[0])
    own = dict(heads[1].named_parameters())
    assert torch.equal(own["layers.0.down.weight"], base["layers.3.down.weight"][:, 48:])
    assert torch.equal(own["layers.0.up.weight"][:48], base["layers.3.up.weight"][48:96])
    assert torch.equal(own["layers.0.up.weight"][48:], base["layers.3.up.weight"][144:])
    assert not own["layers.1.down.weight"].any() and own["layers.1.up.weight"].any()
