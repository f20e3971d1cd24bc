"""The loss beside its eager twin, values and gradients.

Regimes: whole and draft vocabulary, both remainders, peaked and flat teachers, fp32 and bf16 logits.
"""

from __future__ import annotations

import pytest
import torch
from skipstone.train.losses import LOSSES, LossKind, Remainder, Teacher, distill, distill_reference, kl_to_teacher

V, N = 61, 9
TOLERANCE = 2e-5  # nats; fp32 sums of 61 numbers against fp64
IDS = torch.tensor([60, 3, 17, 5, 40, 11])


def make_logits(scale: float, columns: int = V, seed: int = 0) -> torch.Tensor:
    return torch.randn(N, columns, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "draft"])
@pytest.mark.parametrize("remainder", ["spread", "drop"])
@pytest.mark.parametrize("scale", [0.1, 3.0, 12.0])
@pytest.mark.parametrize("kind", LOSSES)
def test_value_and_gradient_equal_the_eager_twin(
    ids: torch.Tensor | None, remainder: Remainder, scale: float, kind: LossKind
) -> None:
    """Catches: the remainder forgotten, p and q exchanged, a gradient without the 1/sum, top-k's bucket left out."""
    full = make_logits(scale)
    head = make_logits(2.0, V if ids is None else len(ids), seed=1).requires_grad_()
    loss = distill(head, Teacher.of(full, ids, remainder), kind)
    weights = torch.linspace(0.5, 2.0, N)
    (gradient,) = torch.autograd.grad((loss * weights).sum(), head)
    expected = distill_reference(head, full, ids, remainder, kind)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), head)
    torch.testing.assert_close(loss.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=TOLERANCE)


def test_known_values() -> None:
    """p = (1/2, 1/4, 1/4) over three tokens; a head that is uniform over the first two."""
    full = torch.tensor([[2.0, 1.0, 1.0]]).log()
    head = torch.zeros(1, 2)
    ids = torch.tensor([0, 1])
    spread = Teacher.of(full, ids, "spread")
    torch.testing.assert_close(spread.probs, torch.tensor([[0.625, 0.375]]))
    drop = Teacher.of(full, ids, "drop")
    torch.testing.assert_close(drop.probs, torch.tensor([[2 / 3, 1 / 3]]))
    expected = 0.625 * torch.log(torch.tensor(1.25)) + 0.375 * torch.log(torch.tensor(0.75))
    torch.testing.assert_close(kl_to_teacher(head, spread)[0], expected, rtol=0, atol=1e-6)


def test_the_optimum_is_zero_with_zero_gradient() -> None:
    full = make_logits(3.0)
    head = full.clone().requires_grad_()
    loss = kl_to_teacher(head, Teacher.of(full, None))
    (gradient,) = torch.autograd.grad(loss.sum(), head)
    assert float(loss.detach().abs().max()) < TOLERANCE
    assert float(gradient.abs().max()) < TOLERANCE


def test_spread_makes_a_head_unsure_where_it_cannot_say_the_word() -> None:
    full = torch.full((1, V), -20.0)
    full[0, 2] = 20.0  # certain, and outside IDS
    teacher = Teacher.of(full, IDS, "spread")
    torch.testing.assert_close(teacher.probs, torch.full((1, len(IDS)), 1 / len(IDS)))
    assert teacher.best.tolist() == [-1]


def test_best_is_the_place_in_the_draft_vocabulary() -> None:
    full = make_logits(1.0)
    full[0, 40] = 50.0
    assert int(Teacher.of(full, IDS).best[0]) == 4
    assert int(Teacher.of(full, None).best[0]) == 40


def test_bf16_logits_of_a_real_vocabulary() -> None:
    full = torch.randn(3, 49_152, generator=torch.Generator().manual_seed(0)) * 4
    head = (full + torch.randn(3, 49_152, generator=torch.Generator().manual_seed(1))).bfloat16().requires_grad_()
    loss = kl_to_teacher(head, Teacher.of(full, None))
    torch.testing.assert_close(loss.double(), distill_reference(head, full, None), rtol=1e-4, atol=1e-4)
    loss.sum().backward()
    assert head.grad is not None
    assert head.grad.dtype == torch.bfloat16


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="remainder is 'keep'"):
        Teacher.of(make_logits(1.0), IDS, "keep")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(9, 61\), the teacher's \(9, 6\)"):
        kl_to_teacher(make_logits(1.0), Teacher.of(make_logits(1.0), IDS))


def test_total_variation_is_the_chance_of_rejection() -> None:
    """p = (1/2, 1/2), q = (3/4, 1/4): a draft from q is accepted with sum min(p, q) = 3/4."""
    teacher = Teacher.of(torch.zeros(1, 2), None)
    head = torch.tensor([[3.0, 1.0]]).log()
    torch.testing.assert_close(distill(head, teacher, "tv"), torch.tensor([0.25]))


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="loss is 'mse'"):
        distill(torch.zeros(1, 2), Teacher.of(torch.zeros(1, 2), None), "mse")  # type: ignore[arg-type]
