"""torch's losses: how many units each is the mean over, and which shapes it takes for one sample's."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed.torch_versions import LINEAR_CROSS_ENTROPY

Loss = Callable[[Any, Any], Tensor]
Units = Callable[[Tensor, Tensor], int]


def _elements(predictions: Tensor, target: Tensor) -> int:
    return math.prod(torch.broadcast_shapes(predictions.shape, target.shape))


def _rows(predictions: Tensor, target: Tensor) -> int:
    return len(predictions)


def _labels(predictions: Tensor, target: Tensor) -> int:
    return predictions.shape[:-1].numel()


def _distributions(predictions: Tensor, target: Tensor) -> int:
    return target.numel() // target.size(1)


_BY_ELEMENTS: dict[type[nn.Module], Loss] = {
    nn.MSELoss: F.mse_loss,
    nn.L1Loss: F.l1_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
    nn.HuberLoss: F.huber_loss,
    nn.BCELoss: F.binary_cross_entropy,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
    nn.PoissonNLLLoss: F.poisson_nll_loss,
    nn.KLDivLoss: F.kl_div,
    nn.SoftMarginLoss: F.soft_margin_loss,
    nn.HingeEmbeddingLoss: F.hinge_embedding_loss,
}
_BY_CLASSES: dict[type[nn.Module], tuple[Loss, Units]] = {
    nn.CrossEntropyLoss: (F.cross_entropy, _distributions),
    nn.NLLLoss: (F.nll_loss, _rows),
    nn.MultiMarginLoss: (F.multi_margin_loss, _rows),
    nn.MultiLabelMarginLoss: (F.multilabel_margin_loss, _rows),
    nn.MultiLabelSoftMarginLoss: (F.multilabel_soft_margin_loss, _labels),
}
_MODULES = {function: kind for kind, function in _BY_ELEMENTS.items()}
_MODULES |= {function: kind for kind, (function, _) in _BY_CLASSES.items()}
# By their forward methods: a subclass with its own is the user's loss.
_UNITS: dict[Any, Units] = {kind.forward: _elements for kind in _BY_ELEMENTS}
_UNITS |= {kind.forward: units for kind, (_, units) in _BY_CLASSES.items()}
_COMPARED = {kind.forward for kind in _BY_ELEMENTS}
_OVER_CLASSES = {kind.forward for kind in _BY_CLASSES}
_UNITS |= {kind.forward: _distributions for kind in LINEAR_CROSS_ENTROPY}
_CLASSIFYING: tuple[type[nn.Module], ...] = (nn.CrossEntropyLoss, nn.NLLLoss, *LINEAR_CROSS_ENTROPY)
_BY_TARGETS = {kind.forward for kind in _CLASSIFYING}


def as_module(loss_fn: Loss) -> Loss:
    """`torch.nn.functional`'s losses, also with arguments bound by partial, as the modules they are."""
    bound = loss_fn if isinstance(loss_fn, functools.partial) else functools.partial(loss_fn)
    kind: Any = _MODULES.get(bound.func)
    if kind is None or bound.args or ("weight" in bound.keywords and kind in (nn.MSELoss, nn.L1Loss, nn.HuberLoss)):
        return loss_fn  # the functions of these three know weights, of which their modules know nothing
    module: Loss = kind(**bound.keywords)
    return module


def is_torchs(loss_fn: Loss) -> bool:
    """Whether it is one of torch's losses, whose mean is known to be over units."""
    return getattr(type(loss_fn), "forward", None) in _UNITS


def is_weighted(loss_fn: Loss, target: Any) -> bool:
    """Whether its mean is over class numbers that count, each with its class's weight; not over probabilities."""
    return getattr(type(loss_fn), "forward", None) in _BY_TARGETS and not torch.is_floating_point(target)


def count_units(loss_fn: Any, predictions: Tensor, target: Tensor) -> int:
    """How many units one of torch's losses is the mean over, if it weights them equally."""
    if loss_fn.reduction == "batchmean":
        return len(predictions)
    return _UNITS[type(loss_fn).forward](predictions, target)


def class_weight(loss_fn: Any, target: Tensor) -> Tensor:
    """What torch divides the summed loss by: the targets that count, each with its class's weight. Float64."""
    counts = target != (-100 if loss_fn.ignore_index is None else loss_fn.ignore_index)
    if loss_fn.weight is None:
        return counts.sum(dtype=torch.float64)
    classes = target.where(counts, torch.zeros_like(target)).long()
    weights: Tensor = loss_fn.weight[classes] * counts
    return weights.sum(dtype=torch.float64)


def mixes_samples(loss_fn: Any, predictions: Any, target: Any) -> str:
    """Why torch would misread which numbers of a batch belong to one sample, and the remedy; empty if it would not.

    Such a loss differs with the size of the batch, so it can't be put together from parts.
    """
    forward = getattr(type(loss_fn), "forward", None)
    if not (isinstance(predictions, Tensor) and isinstance(target, Tensor)):
        return ""
    if forward in _OVER_CLASSES and predictions.ndim < 2:
        return (
            "takes predictions of one dimension for the classes of a single sample: they must be [N, classes]; for a "
            "number a sample there is BCEWithLogitsLoss"
        )
    if forward not in _COMPARED or predictions.shape == target.shape:
        return ""
    if predictions.ndim == target.ndim > 0 and len(predictions) == len(target):
        return ""
    return f"would compare samples with each other's targets: give both the same shape{_squeezed(predictions, target)}"


def _squeezed(predictions: Tensor, target: Tensor) -> str:
    for name, larger, smaller in (("predictions", predictions, target), ("target", target, predictions)):
        if larger.ndim > 1 and larger.shape[-1] == 1 and larger.shape[:-1] == smaller.shape:
            return f", {name}.squeeze({larger.ndim - 1})"
    return ""
