"""What one micro-batch does: the model's predictions, and its loss as a sum over weight units.

Sums, since those of parts add up to that of the whole, where means do not: the gradient of a batch is the gradient
of the sum over all ranks and micro-batches, divided by the whole batch's weight.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from dtrain.errors import UserError, first_line

from .data import MicroBatch
from .losses import WeightedMean
from .seeds import rng_kept

UserStep = Callable[[nn.Module, Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What a step found.

    Attributes:
        total: the loss times its weight, a scalar with a graph.
        weight: the number of units of which the loss is the mean; None for samples, whose number every rank knows.
        predictions: what the metrics compare with `target`.
        metrics: by name, arguments of metrics that compare something else.
    """

    total: Tensor
    weight: Tensor | None
    predictions: Any
    target: Any
    metrics: Mapping[str, Any] = field(default_factory=dict)


Step = Callable[[nn.Module, MicroBatch], Outcome]


def supervised_step(loss_fn: Callable[[Any, Any], Tensor]) -> Step:
    """The model maps features to predictions; `loss_fn(predictions, target)`; on `(features, target)` samples.

    Raises:
        UserError: a loss that gives no single number, so that no sum can be made of it.
    """
    total_loss = _total_loss(loss_fn)

    def step(model: nn.Module, micro_batch: MicroBatch) -> Outcome:
        data = micro_batch.data
        if not isinstance(data, (tuple, list)) or len(data) != 2:
            raise UserError(
                f"a sample must be (features, target), this dataset's batches are {describe(data)}; "
                "for anything else write `step: {_target_: module.function}`"
            )
        features, target = data
        predictions = model(features)
        try:
            total, weight = total_loss(predictions, target, micro_batch)
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            _refuse(loss_fn, predictions, target, error)
            raise
        return Outcome(total, weight, predictions, target)

    return _without_trace(step)


def _refuse(loss_fn: Any, predictions: Any, target: Any, error: Exception) -> None:
    """Raise UserError where a loss of torch's has met what it was not made for; nothing where it is the user's."""
    is_torchs = type(loss_fn).__module__ == nn.CrossEntropyLoss.__module__
    if not is_torchs or isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
        return
    mend = "; BCEWithLogitsLoss takes logits" if isinstance(loss_fn, nn.BCELoss) and _is_logits(predictions) else ""
    given = f"predictions {describe(predictions)}, target {describe(target)}"
    raise UserError(f"the loss {describe(loss_fn)} does not fit: {first_line(error)}; {given}{mend}") from error


def _is_logits(predictions: Any) -> bool:
    return isinstance(predictions, Tensor) and not bool(((predictions >= 0) & (predictions <= 1)).all())


def user_step(function: UserStep) -> Step:
    """A user's `function(model, batch) -> {loss, predictions, target, weight, metrics}`; only the loss is needed."""

    def step(model: nn.Module, micro_batch: MicroBatch) -> Outcome:
        result = function(model, micro_batch.data)
        if not isinstance(result, Mapping) or not isinstance(result.get("loss"), Tensor):
            raise UserError(
                f"step must return a dict with a tensor `loss`, it returned {describe(result)}; "
                "keys: loss, predictions, target, weight, metrics"
            )
        loss = _scalar(result["loss"], "the loss")
        weight = result.get("weight")
        if weight is None:
            total = loss * micro_batch.samples
        else:
            weight = torch.as_tensor(weight, dtype=torch.float64, device=loss.device).detach()
            weight = _scalar(weight, "step's weight")
            # The mean of no units is nan in most ways to write it, where their sum is 0.
            total = loss.where(weight != 0, 0.0) * weight.to(loss.dtype)
        metrics = result.get("metrics", {})
        if not isinstance(metrics, Mapping):
            raise UserError(
                f"step's `metrics` must be a dict of arguments by metrics' names, it is {describe(metrics)}"
            )
        return Outcome(total, weight, result.get("predictions"), result.get("target"), metrics)

    return _without_trace(step)


def _without_trace(step: Step) -> Step:
    """A filler's loss and weight become 0: its gradients are zeros, and its sums add nothing."""

    def wrapped(model: nn.Module, micro_batch: MicroBatch) -> Outcome:
        outcome = step(model, micro_batch)
        if micro_batch.samples:
            return outcome
        weight = None if outcome.weight is None else torch.zeros_like(outcome.weight)
        return replace(outcome, total=outcome.total * 0.0, weight=weight)

    return wrapped


TotalLoss = Callable[[Any, Any, MicroBatch], tuple[Tensor, "Tensor | None"]]


def _total_loss(loss_fn: Callable[[Any, Any], Tensor]) -> TotalLoss:
    loss_fn = _as_module(loss_fn)
    reduction = getattr(loss_fn, "reduction", "mean")
    if reduction == "none":
        raise UserError(f"{describe(loss_fn)} has reduction='none' and gives no single loss; use 'mean'")

    begun = False
    unchecked = type(loss_fn).__module__ != nn.CrossEntropyLoss.__module__  # torch's own are known to be means

    def mean(predictions: Any, target: Any, part: MicroBatch) -> tuple[Tensor, Tensor | None]:
        nonlocal unchecked, begun
        if not begun and isinstance(loss_fn, nn.BCELoss) and _is_logits(predictions):  # a GPU would not survive it
            raise ValueError("predictions are not all in [0, 1]")
        begun = True
        loss = _scalar(loss_fn(predictions, target), "the loss")
        if unchecked and part.samples > 1 and not part.is_whole and torch.is_grad_enabled():
            unchecked = False
            _require_sum_of_parts(loss_fn, reduction, predictions, target, part.samples)
        # A loss that sums is not divided by the batch's size, so it is multiplied by it beforehand.
        return loss * (part.batch_samples if reduction == "sum" else part.samples), None

    if isinstance(loss_fn, WeightedMean) and reduction == "mean":
        units = loss_fn.units

        def mean_of_units(predictions: Any, target: Any, part: MicroBatch) -> tuple[Tensor, Tensor | None]:
            losses, weights = units(predictions, target)
            return losses.sum(), weights.sum(dtype=torch.float64)

        return mean_of_units
    if not isinstance(loss_fn, (nn.CrossEntropyLoss, nn.NLLLoss)) or reduction != "mean":
        return mean
    if type(loss_fn).forward not in (nn.CrossEntropyLoss.forward, nn.NLLLoss.forward):
        return mean  # a subclass that computes something of its own

    summed = copy.copy(loss_fn)
    summed.reduction = "sum"

    def weighted_mean(predictions: Any, target: Any, part: MicroBatch) -> tuple[Tensor, Tensor | None]:
        if torch.is_floating_point(target):  # class probabilities: torch takes the mean over samples
            return mean(predictions, target, part)
        return summed(predictions, target), _class_weight(summed, target)

    return weighted_mean


@torch.no_grad()
def _require_sum_of_parts(loss_fn: Any, reduction: str, predictions: Any, target: Any, samples: int) -> None:
    """Raise UserError where a batch's loss is not the mean (or the sum) of its samples', as a contrastive one.

    Seen on one batch cut in two. A loss that draws random numbers, or whose arguments don't begin with the samples,
    is believed.
    """
    tensors = [leaf for leaf in tree_leaves((predictions, target)) if isinstance(leaf, Tensor)]
    if not tensors or any(tensor.ndim == 0 or len(tensor) != samples for tensor in tensors):
        return
    loss_fn = copy.deepcopy(loss_fn) if isinstance(loss_fn, nn.Module) else loss_fn  # it may count its calls
    cut = samples // 2

    def of(begin: int, end: int) -> float:
        part = tree_map_only(Tensor, lambda tensor: tensor[begin:end], (predictions, target))
        return float(loss_fn(*part)) * (1 if reduction == "sum" else end - begin) / samples

    with rng_kept(tensors[0].device):
        whole, again = of(0, samples), of(0, samples)
        parts = of(0, cut), of(cut, samples)
    is_coarse = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors)
    if whole == again and not math.isclose(whole, sum(parts), rel_tol=2e-2 if is_coarse else 1e-3, abs_tol=1e-6):
        kind = "sum" if reduction == "sum" else "mean"
        raise UserError(
            f"the loss {describe(loss_fn)} of {samples} samples is {whole:.6g}, but its parts of {cut} and "
            f"{samples - cut} make {sum(parts):.6g}: it is no {kind} over samples, and can't be computed in parts, on "
            "several ranks or in micro-batches; write it as a `step` that returns its `weight`, or train in one process"
        )


def _as_module(loss_fn: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    """`torch.nn.functional`'s losses over classes, also with arguments bound by partial, as the modules they are."""
    bound = loss_fn if isinstance(loss_fn, functools.partial) else functools.partial(loss_fn)
    if bound.func is F.cross_entropy and not bound.args:
        return nn.CrossEntropyLoss(**bound.keywords)
    if bound.func is F.nll_loss and not bound.args:
        return nn.NLLLoss(**bound.keywords)
    return loss_fn


def _class_weight(loss_fn: nn.CrossEntropyLoss | nn.NLLLoss, target: Tensor) -> Tensor:
    """What torch divides the summed loss by: the targets that count, each with its class's weight. Float64."""
    counts = target != loss_fn.ignore_index
    if loss_fn.weight is None:
        return counts.sum(dtype=torch.float64)
    classes = target.where(counts, torch.zeros_like(target)).long()
    return (loss_fn.weight[classes] * counts).sum(dtype=torch.float64)


def _scalar(value: Tensor, name: str) -> Tensor:
    if value.numel() != 1:
        raise UserError(f"{name} must be one number, it has shape {tuple(value.shape)}")
    return value.reshape(()).to(torch.promote_types(value.dtype, torch.float32))  # sums need more than 16 bits


def describe(value: Any) -> str:
    """What a value is, in a few words for a message."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, Mapping):
        return f"a dict with keys {', '.join(map(str, value))}"
    return getattr(value, "__name__", type(value).__name__)
