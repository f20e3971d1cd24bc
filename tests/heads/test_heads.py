"""Heads as modules: what they compute, attached plainly and packed.

Regimes: full and draft vocabulary, with and without soft-cap, rows 1 and 5, fp32 and bf16 bases.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from skipstone.heads import (
    ExitHead,
    HeadSet,
    HeadSpec,
    Projection,
    adapter_config,
    build_head,
    head_kinds,
    register_head,
)
from skipstone.kernels.linear import PackedLinear
from torch import Tensor

V, D, WIDTH = 37, 24, 10
BF16_TOLERANCE = 0.05  # of logits near 1 after two bf16 matmuls whose inputs are rounded to 8 bits


def make_projection(dtype=torch.float32, softcap=None, packed=False, vocab=V) -> Projection:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(vocab, D, generator=generator).mul(D**-0.5).to(dtype)
    gain = torch.rand(D, generator=generator) + 0.5

    def final_norm(x: Tensor) -> Tensor:
        return F.rms_norm(x, (D,), gain, 1e-5).to(dtype)

    return Projection(final_norm, weight, softcap, PackedLinear if packed else None)


def trained(spec: HeadSpec, num_outputs: int = V) -> ExitHead:
    """A head whose parameters are all random, so that none can be forgotten unnoticed."""
    torch.manual_seed(3)
    head = build_head(spec, D, num_outputs)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(5, D, generator=torch.Generator().manual_seed(2)) * 7.0


def test_untrained_adapter_is_the_bare_exit(hidden: Tensor) -> None:
    """LayerSkip's draft is the start of training. Catches: a W_down that is not zero, a gain that is not one."""
    projection = make_projection()
    head = build_head(HeadSpec("adapter", 2, {"width": WIDTH}), D, V)
    head.attach(projection)
    bare = F.linear(projection.final_norm(hidden), projection.head_weight)
    torch.testing.assert_close(head(hidden), bare, rtol=0, atol=2e-5)  # the norm's eps acts at another scale


def test_adapter_follows_its_formula(hidden: Tensor) -> None:
    projection = make_projection()
    head = trained(HeadSpec("adapter", 2, {"width": WIDTH}))
    head.attach(projection)
    plain = hidden / (hidden.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    inner = plain * head.norm
    delta = (F.silu(inner @ head.up[:WIDTH].T) * (inner @ head.up[WIDTH:].T)) @ head.down.T
    expected = projection.final_norm(plain * head.gain + delta) @ projection.head_weight.T
    torch.testing.assert_close(head(hidden), expected, rtol=0, atol=1e-4)


def test_linear_head_starts_as_the_bare_exit(hidden: Tensor) -> None:
    projection = make_projection()
    head = build_head(HeadSpec("linear", 2), D, V)
    head.initialise(projection)
    head.attach(projection)
    bare = F.linear(projection.final_norm(hidden), projection.head_weight)
    torch.testing.assert_close(head(hidden), bare, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "spec", [HeadSpec("adapter", 2, {"width": WIDTH}), HeadSpec("linear", 2)], ids=lambda s: s.kind
)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_equals_plain(
    spec: HeadSpec, softcap: float | None, rows: int, dtype: torch.dtype, hidden: Tensor
) -> None:
    head = trained(spec)
    head.attach(make_projection(dtype, softcap))
    plain = head(hidden[:rows]).float()
    with torch.no_grad():
        head.attach(make_projection(dtype, softcap, packed=True))
        packed = head(hidden[:rows])
    assert packed.dtype == torch.float32
    assert packed.shape == (rows, V)
    torch.testing.assert_close(
        packed, plain, rtol=BF16_TOLERANCE, atol=1e-4 if dtype == torch.float32 else BF16_TOLERANCE
    )
    if softcap is not None:
        assert float(packed.abs().max()) <= softcap


@pytest.mark.parametrize("packed", [False, True])
def test_draft_vocabulary_is_a_choice_of_logits(packed: bool, hidden: Tensor) -> None:
    """The same weights over fewer ids give the full head's logits at those ids. Catches: ids out of order."""
    ids = torch.tensor([30, 2, 17, 5])
    torch.manual_seed(0)
    full = HeadSet(adapter_config([1, 3], D, V, 4, WIDTH, None))
    part = HeadSet(adapter_config([1, 3], D, V, 4, WIDTH, 4), ids)
    for layer in full.exits:
        torch.nn.init.normal_(full.heads[layer].down)
        part.heads[layer].load_state_dict(full.heads[layer].state_dict())
    with torch.no_grad():
        full.attach(make_projection(packed=packed))
        part.attach(make_projection(packed=packed))
        for layer in full.exits:
            torch.testing.assert_close(
                part.logits(layer, hidden), full.logits(layer, hidden)[:, ids], rtol=0, atol=1e-5
            )
    assert part.token_ids(torch.tensor([[0, 3]])).tolist() == [[30, 5]]


def test_lm_head_rows_are_gathered_and_packed_once() -> None:
    """Five exits must not hold five copies of the draft rows."""
    made = []

    def factory(weight: Tensor, bias: Tensor | None) -> PackedLinear:
        made.append(tuple(weight.shape))
        return PackedLinear(weight, bias)

    plain = make_projection()
    heads = HeadSet(adapter_config([1, 2, 3], D, V, 4, WIDTH, 8), torch.arange(8))
    heads.attach(Projection(plain.final_norm, plain.head_weight, None, factory))
    assert made.count((8, D)) == 1
    assert (V, D) not in made


def test_wrong_base_shape_is_refused() -> None:
    head = build_head(HeadSpec("adapter", 2), D, V)
    with pytest.raises(ValueError, match=r"\(36, 24\), expected \(37, 24\)"):
        head.attach(make_projection(vocab=V - 1))


def test_forward_before_attach_says_so(hidden: Tensor) -> None:
    with pytest.raises(RuntimeError, match="attach"):
        build_head(HeadSpec("adapter", 2), D, V)(hidden)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (("nosuch", 2, {}), "unknown head kind 'nosuch'"),
        (("adapter", 2, {"widht": 3}), "unknown options"),
        (("linear", 2, {"width": 3}), "unknown options"),
        (("adapter", 2, {"width": 0}), "width is 0"),
        (("adapter", 0, {}), "exit_layer is 0"),
    ],
)
def test_bad_specs_are_refused(spec: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_head(HeadSpec(*spec), D, V)


def test_registry_refuses_a_taken_kind() -> None:
    assert {"adapter", "linear"} <= set(head_kinds())
    with pytest.raises(ValueError, match="taken"):
        register_head(type("Again", (ExitHead,), {"kind": "adapter"}))


def test_stateless_heads_have_no_state(hidden: Tensor) -> None:
    head = build_head(HeadSpec("adapter", 2), D, V)
    head.attach(make_projection())
    assert head.new_state(3, 64) is None
    assert not head.stateful
    torch.testing.assert_close(head(hidden, None), head(hidden), rtol=0, atol=0)


def test_gradients_reach_every_parameter(hidden: Tensor) -> None:
    head = trained(HeadSpec("adapter", 2, {"width": WIDTH}))
    head.attach(make_projection())
    head(hidden).square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in head.parameters())
