"""Losses besides torch's own: focal and symmetric cross entropy, from logits, exact in any number of parts."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain.errors import UserError

Reduction = Literal["mean", "sum", "none"]


class WeightedMean(nn.Module, abc.ABC):
    """A loss that is the weighted mean of its units' losses: of samples, pixels, tokens.

    Over several ranks and micro-batches the sums of both travel, so that the mean is that of the whole batch. A
    subclass has `units`; torch's CrossEntropyLoss, which dtrain knows, is another of the kind.

    Args:
        reduction: "mean", divided by the weights' sum; "sum"; or "none": each unit's loss times its weight.
    """

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise UserError(f"{type(self).__name__}: reduction must be mean, sum or none, not {reduction!r}")
        self.reduction = reduction

    @abc.abstractmethod
    def units(self, predictions: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Each unit's loss times its weight, and the weights, in one shape. A unit that doesn't count weighs 0."""

    def forward(self, predictions: Tensor, target: Tensor) -> Tensor:
        losses, weights = self.units(predictions, target)
        if self.reduction == "none":
            return losses
        return losses.sum() if self.reduction == "sum" else losses.sum() / weights.sum()


class FocalLoss(WeightedMean):
    """Binary focal loss from logits: cross entropy that focuses on what is not learnt yet.

    With p = sigmoid(logit): -alpha (1 - p)^gamma log(p) for target 1, -(1 - alpha) p^gamma log(1 - p) for 0; for a
    target between, both in its proportion. (Lin et al., Focal Loss for Dense Object Detection, ICCV 2017.)

    Shapes: predictions and target of any, the same; target in [0, 1], of any dtype.

    Args:
        gamma: how strongly easy samples are discounted; 0 is cross entropy.
        alpha: the weight of target 1, of 0 the rest; None weighs both 1.
    """

    def __init__(self, gamma: float = 2.0, alpha: float | None = 0.75, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        if gamma < 0:
            raise UserError(f"FocalLoss: gamma must be at least 0, not {gamma}")
        if alpha is not None and not 0 <= alpha <= 1:
            raise UserError(f"FocalLoss: alpha must be between 0 and 1, not {alpha}")
        self.gamma = gamma
        self.alpha = alpha

    def units(self, predictions: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if predictions.shape != target.shape:
            raise UserError(
                f"FocalLoss needs a target of the predictions' shape {tuple(predictions.shape)}, not "
                f"{tuple(target.shape)}; for classes by number there is MulticlassFocalLoss"
            )
        target = target.to(predictions.dtype)
        log_p, log_1_minus_p = F.logsigmoid(predictions), F.logsigmoid(-predictions)
        # Powers by way of the logarithm: the gradient of (1 - p)^gamma itself is infinite at p = 1 for gamma < 1.
        positive = -torch.exp(self.gamma * log_1_minus_p) * log_p
        negative = -torch.exp(self.gamma * log_p) * log_1_minus_p
        weights = (1.0, 1.0) if self.alpha is None else (self.alpha, 1 - self.alpha)
        losses = weights[0] * target * positive + weights[1] * (1 - target) * negative
        return losses, torch.ones_like(losses)


class _OverClasses(WeightedMean):
    """A loss over class numbers, with torch's CrossEntropyLoss' `weight` and `ignore_index`.

    Shapes: predictions (N, C) or (N, C, ...), logits; target (N) or (N, ...), class numbers.
    """

    weight: Tensor | None

    def __init__(self, weight: Tensor | Sequence[float] | None, ignore_index: int, reduction: Reduction) -> None:
        super().__init__(reduction)
        self.register_buffer("weight", None if weight is None else torch.as_tensor(weight, dtype=torch.float32))
        self.ignore_index = ignore_index

    def units(self, predictions: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        name, classes = type(self).__name__, predictions.shape[1] if predictions.dim() > 1 else 0
        if classes < 2 or target.shape != (len(predictions), *predictions.shape[2:]) or target.is_floating_point():
            raise UserError(
                f"{name} wants logits (N, C, ...) and class numbers (N, ...), it got {predictions.dtype} "
                f"{tuple(predictions.shape)} and {target.dtype} {tuple(target.shape)}"
            )
        if self.weight is not None and len(self.weight) != classes:
            raise UserError(f"{name}: {len(self.weight)} weights for {classes} classes")
        counts = target != self.ignore_index
        chosen = target.where(counts, 0).long()
        weights = torch.ones_like(predictions[:, 0]) if self.weight is None else self.weight.to(predictions)[chosen]
        weights = weights * counts
        return weights * self.of_classes(predictions, chosen.unsqueeze(1)).squeeze(1), weights

    @abc.abstractmethod
    def of_classes(self, logits: Tensor, target: Tensor) -> Tensor:
        """Each unit's loss, of shape (N, 1, ...) as `target`."""


class MulticlassFocalLoss(_OverClasses):
    """Focal loss over classes, from logits: -(1 - p)^gamma log(p), p the target's softmax (Lin et al., ICCV 2017).

    Args:
        gamma: how strongly easy samples are discounted; 0 is CrossEntropyLoss.
        weight: of each class, shape (C); the mean is divided by the targets' weights, as torch's is.
        ignore_index: a target that doesn't count.
    """

    def __init__(
        self,
        gamma: float = 2.0,
        weight: Tensor | Sequence[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(weight, ignore_index, reduction)
        if gamma < 0:
            raise UserError(f"MulticlassFocalLoss: gamma must be at least 0, not {gamma}")
        self.gamma = gamma

    def of_classes(self, logits: Tensor, target: Tensor) -> Tensor:
        whole = logits.logsumexp(1, keepdim=True)
        others = logits.scatter(1, target, -math.inf).logsumexp(1, keepdim=True)
        return -torch.exp(self.gamma * (others - whole)) * (logits.gather(1, target) - whole)


class SCELoss(_OverClasses):
    """Symmetric cross entropy, from logits, for labels that are partly wrong.

    alpha CE(target, p) + beta CE(p, target), of which the second, with log(0) taken for `log_zero`, is
    -log_zero (1 - p). (Wang et al., Symmetric Cross Entropy for Robust Learning with Noisy Labels, ICCV 2019.)

    Args:
        alpha, beta: weights of the two.
        log_zero: the paper has -4; the default is the logarithm of 1e-4.
        weight, ignore_index: as MulticlassFocalLoss'.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        log_zero: float = math.log(1e-4),
        weight: Tensor | Sequence[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(weight, ignore_index, reduction)
        if log_zero >= 0:
            raise UserError(f"SCELoss: log_zero must be below 0, not {log_zero}")
        self.alpha, self.beta, self.log_zero = alpha, beta, log_zero

    def of_classes(self, logits: Tensor, target: Tensor) -> Tensor:
        log_p = logits.log_softmax(1).gather(1, target)
        return self.log_zero * self.beta * torch.expm1(log_p) - self.alpha * log_p
