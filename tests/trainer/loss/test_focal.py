"""The losses beside torch's own: their formulas in float64, their gradients, and where they are torch's."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain import FocalLoss, MulticlassFocalLoss, SCELoss, WeightedMean
from dtrain.errors import UserError

torch.manual_seed(0)
LOGITS, BINARY, CLASSES = torch.randn(6, 4).double(), torch.randint(2, (6, 4)).double(), torch.randint(4, (6,))
WEIGHT = [0.2, 1.0, 3.0, 0.7]


def focal(logits: Tensor, target: Tensor, gamma: float, alpha: float | None) -> Tensor:
    """The paper's equation 5, a number at a time."""
    losses = []
    for logit, is_one in zip(logits.flatten().tolist(), target.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-logit))
        p_t = p if is_one else 1 - p
        alpha_t = 1.0 if alpha is None else alpha if is_one else 1 - alpha
        losses.append(-alpha_t * (1 - p_t) ** gamma * math.log(p_t))
    return torch.tensor(losses, dtype=torch.float64).view_as(logits)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.5])
@pytest.mark.parametrize("alpha", [None, 0.25, 0.75])
def test_focal_loss_is_its_formula(gamma, alpha):
    expected = focal(LOGITS, BINARY, gamma, alpha)
    for reduction, value in (("none", expected), ("sum", expected.sum()), ("mean", expected.mean())):
        torch.testing.assert_close(FocalLoss(gamma, alpha, reduction)(LOGITS, BINARY), value, rtol=1e-9, atol=1e-12)


def test_focal_loss_of_easy_and_hard_samples():
    """The values that the tutorials have: p = 0.9 and 0.1, then 0.5, for targets 1 and 0."""
    target = torch.tensor([[1.0], [0.0]])
    assert FocalLoss()(torch.tensor([[0.9], [0.1]]).logit(), target).item() == pytest.approx(0.0005, abs=5e-5)
    assert FocalLoss()(torch.zeros(2, 1), target).item() == pytest.approx(0.0866, abs=5e-5)


def test_without_focus_they_are_torchs():
    for target in (BINARY, torch.rand(6, 4).double()):
        expected = nn.BCEWithLogitsLoss()(LOGITS, target)
        torch.testing.assert_close(FocalLoss(gamma=0.0, alpha=None)(LOGITS, target), expected)
    for weight in (None, torch.tensor(WEIGHT).double()):
        expected = nn.CrossEntropyLoss(weight=weight, ignore_index=2)(LOGITS, CLASSES)
        for loss in (
            MulticlassFocalLoss(0.0, weight, ignore_index=2),
            SCELoss(beta=0.0, weight=weight, ignore_index=2),
        ):
            torch.testing.assert_close(loss(LOGITS, CLASSES), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss_over_classes_is_its_formula(gamma):
    p = LOGITS.softmax(1)[range(6), CLASSES]
    expected = torch.tensor(WEIGHT).double()[CLASSES] * -((1 - p) ** gamma) * p.log()
    torch.testing.assert_close(MulticlassFocalLoss(gamma, WEIGHT, reduction="none")(LOGITS, CLASSES), expected)
    mean = expected.sum() / torch.tensor(WEIGHT).double()[CLASSES].sum()
    torch.testing.assert_close(MulticlassFocalLoss(gamma, WEIGHT)(LOGITS, CLASSES), mean)


def test_symmetric_cross_entropy_is_its_formula():
    """alpha H(q, p) + beta H(p, q), q the target's one-hot vector with 1e-4 for 0."""
    p, q = LOGITS.softmax(1), F.one_hot(CLASSES, 4).double()
    expected = 0.3 * -(q * p.log()).sum(1) + 0.7 * -(p * q.clamp(min=1e-4).log()).sum(1)
    torch.testing.assert_close(SCELoss(0.3, 0.7, reduction="none")(LOGITS, CLASSES), expected)


@pytest.mark.parametrize(
    "loss", [FocalLoss(0.5), FocalLoss(), MulticlassFocalLoss(0.5, WEIGHT), SCELoss(weight=WEIGHT)]
)
def test_gradients_are_those_of_the_values(loss):
    target = BINARY if isinstance(loss, FocalLoss) else CLASSES
    assert torch.autograd.gradcheck(lambda logits: loss(logits, target), LOGITS.clone().requires_grad_())


@pytest.mark.parametrize(
    "loss", [FocalLoss(0.5), FocalLoss(), MulticlassFocalLoss(0.5), MulticlassFocalLoss(), SCELoss()]
)
def test_certain_predictions_have_finite_losses_and_gradients(loss):
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]]).requires_grad_()
    for target in (torch.tensor([0, 1]), torch.tensor([1, 0])):
        wanted = F.one_hot(target).float() if isinstance(loss, FocalLoss) else target
        value = loss(logits, wanted)
        [gradient] = torch.autograd.grad(value, logits)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


def test_pixels():
    logits, target = torch.randn(2, 4, 3, 5).double(), torch.randint(4, (2, 3, 5))
    flat = logits.permute(0, 2, 3, 1).reshape(-1, 4), target.reshape(-1)
    for loss in (MulticlassFocalLoss(), SCELoss()):
        torch.testing.assert_close(loss(logits, target), loss(*flat))


WRONG = {
    "reduction": (lambda: FocalLoss(reduction="sun"), "reduction must be mean, sum or none, not 'sun'"),
    "gamma": (lambda: MulticlassFocalLoss(gamma=-1), "gamma must be at least 0, not -1"),
    "alpha": (lambda: FocalLoss(alpha=2), "alpha must be between 0 and 1, not 2"),
    "log of zero": (lambda: SCELoss(log_zero=4), "log_zero must be below 0, not 4"),
    "classes for numbers": (lambda: FocalLoss()(LOGITS, CLASSES), "for classes by number there is MulticlassFocalLoss"),
    "numbers for classes": (lambda: SCELoss()(LOGITS, BINARY), "SCELoss wants logits (N, C, ...) and class numbers"),
    "one class": (
        lambda: MulticlassFocalLoss()(LOGITS[:, :1], CLASSES),
        "MulticlassFocalLoss wants logits (N, C, ...)",
    ),
    "weights": (lambda: SCELoss(weight=[1.0, 2.0])(LOGITS, CLASSES), "2 weights for 4 classes"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_said(kind):
    make, says = WRONG[kind]
    with pytest.raises(UserError) as error:
        make()
    assert says in str(error.value)


def test_a_loss_of_ones_own_says_its_units():
    class Absolute(WeightedMean):
        def units(self, predictions: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            weights = (target > 0).to(predictions)
            return (predictions - target).abs() * weights, weights

    loss = Absolute()(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, -1.0, 6.0]))
    assert loss.item() == pytest.approx((1 + 3) / 2)
