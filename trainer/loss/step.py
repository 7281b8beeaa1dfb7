"""What one micro-batch does: the model's predictions, and its loss as a sum over weight units.

Sums, since those of parts add up to that of the whole, where means do not: the gradient of a batch is the gradient
of the sum over all ranks and micro-batches, divided by the whole batch's weight.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.errors import UserError, first_line

from ..data.batch_samples import ways_to_take
from ..data.batch_tensors import tensors
from ..data.indexed import MicroBatch
from ..distributed.torch_versions import is_of_device
from .loss_trial import Pairs, try_loss
from .losses import WeightedMean
from .units import as_module, class_weight, count_units, is_torchs, is_weighted, mixes_samples


@dataclass(frozen=True)
class Outcome:
    """A step's result.

    Attributes:
        total: the loss times its weight, a scalar with a graph.
        weight: the number of units that the loss is the mean over; None for samples, whose number every rank knows.
        predictions: what the metrics compare with `target`.
        believed: the total, where its loss is taken as the mean over samples only because nothing says otherwise.
        metrics: by name, arguments of metrics that compare something else.
        logs: by name, values to report the means of, each with its weight; None where no step of the user's made it.
        optimizer: the name of the one that learns from this loss; None where the step has not said one.
    """

    total: Tensor
    weight: Tensor | None
    predictions: Any
    target: Any
    believed: Tensor | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    logs: Mapping[str, tuple[Tensor, Tensor]] | None = None
    optimizer: str | None = None


Step = Callable[[nn.Module, MicroBatch], Outcome]


def supervised_step(loss_fn: Callable[[Any, Any], Tensor]) -> Step:
    """The model maps features to predictions; `loss_fn(predictions, target)`; on `(features, target)` samples.

    Raises:
        UserError: the loss is not a single number, so it can't be turned into a sum.
    """
    loss_fn = as_module(loss_fn)
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

    return fillers_count_nothing(step)


def _refuse(loss_fn: Any, predictions: Any, target: Any, error: Exception) -> None:
    """Raise UserError if one of torch's losses failed on its input."""
    is_users = type(loss_fn).__module__ != nn.CrossEntropyLoss.__module__
    if is_users or is_of_device(error):
        return
    mend = "; BCEWithLogitsLoss takes logits" if isinstance(loss_fn, nn.BCELoss) and _is_logits(predictions) else ""
    if isinstance(error, TypeError) and "argument" in str(error):
        mend = "; a loss that takes more than predictions and target is called in a `step`"
    if isinstance(predictions, Mapping):
        mend = "; a model that returns a dict is trained by a `step`, which takes its loss or its logits from it"
    given = _given(predictions, target)
    raise UserError(f"the loss {describe(loss_fn)} does not fit: {first_line(error)}; {given}{mend}") from error


def _given(predictions: Any, target: Any) -> str:
    return f"predictions {describe(predictions)}, target {describe(target)}"


def _is_logits(predictions: Any) -> bool:
    return isinstance(predictions, Tensor) and not bool(((predictions >= 0) & (predictions <= 1)).all())


def weighted(loss: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """The mean times its weight. The mean of no units is nan however it is written, but their sum is 0."""
    return loss.where(weight != 0, 0.0) * weight.to(loss.dtype), weight


def as_units(units: Any, device: torch.device) -> Tensor:
    """How many units a loss is the mean over, as a float64 tensor on the device; made without waiting for it."""
    if isinstance(units, int | float):
        return torch.full((), float(units), dtype=torch.float64, device=device)
    return torch.as_tensor(units, dtype=torch.float64).detach().to(device, non_blocking=True)


def of_samples(loss: Tensor, part: MicroBatch, mend: str) -> tuple[Tensor, Tensor | None]:
    """The mean over samples times their number, which the other ranks know where the batch is regular.

    Raises:
        UserError: a batch is split whose parts have an unknown number of samples.
    """
    if part.is_regular:
        return loss * part.samples, None
    require_rows(part, mend)
    return weighted(loss, as_units(part.samples, loss.device))


def require_rows(part: MicroBatch, mend: str) -> None:
    """Raise UserError if a batch is split and only the user can know how many units this part has."""
    if part.is_regular or part.is_whole or not part.samples or ways_to_take(part.data, part.samples):
        return
    shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors(part.data))
    raise UserError(
        f"{part.samples} samples, a part of a batch, have become tensors of shapes {shapes or '(none)'}: the collate "
        "function, or the loader, does not make a row or an entry of each, so that dtrain can't know how much this "
        f"part's loss counts; {mend}"
    )


def require_graph(outcome: Outcome) -> None:
    """Raise UserError if nothing can be learned from the loss."""
    if not outcome.total.requires_grad:
        raise UserError(
            "the loss does not depend on the model: something was detached on the way to it (detach(), item(), "
            "numpy, torch.no_grad, argmax), and nothing can be learned from it"
        )


def fillers_count_nothing(step: Step) -> Step:
    """A filler's loss and weight become 0: its gradients are zeros, and its sums add nothing."""

    @functools.wraps(step)
    def wrapped(model: nn.Module, micro_batch: MicroBatch) -> Outcome:
        outcome = step(model, micro_batch)
        if micro_batch.samples:
            return outcome
        weight = None if outcome.weight is None else torch.zeros_like(outcome.weight)
        return replace(outcome, total=outcome.total * 0.0, weight=weight)

    return wrapped


TotalLoss = Callable[[Any, Any, MicroBatch], tuple[Tensor, "Tensor | None"]]


def _total_loss(loss_fn: Callable[[Any, Any], Tensor]) -> TotalLoss:
    reduction = getattr(loss_fn, "reduction", "mean")
    if reduction == "none":
        raise UserError(f"{describe(loss_fn)} has reduction='none', which gives no single loss; use 'mean'")
    if isinstance(loss_fn, WeightedMean) and reduction == "mean":
        units = loss_fn.units

        def mean_of_units(predictions: Any, target: Any, part: MicroBatch) -> tuple[Tensor, Tensor | None]:
            losses, weights = units(predictions, target)
            return losses.sum(), weights.sum(dtype=torch.float64)

        return mean_of_units
    return _of_torchs(loss_fn, reduction) if is_torchs(loss_fn) else _of_users(loss_fn, reduction)


def _of_torchs(loss_fn: Any, reduction: str) -> TotalLoss:
    summed = copy.copy(loss_fn)
    summed.reduction = "sum"
    begun = False

    def total(predictions: Any, target: Any, part: MicroBatch) -> tuple[Tensor, Tensor | None]:
        nonlocal begun
        if (
            not begun and isinstance(loss_fn, nn.BCELoss) and _is_logits(predictions)
        ):  # on a GPU it would end the process
            raise ValueError("predictions are not all in [0, 1]")
        begun = True
        if reason := mixes_samples(loss_fn, predictions, target):
            raise UserError(f"the loss {describe(loss_fn)} {reason}; {_given(predictions, target)}")
        if reduction == "sum":  # it is not divided by the batch's size, so it is multiplied by it beforehand
            return scalar(loss_fn(predictions, target), "the loss") * part.batch_samples, None
        if is_weighted(loss_fn, target):
            return summed(predictions, target), class_weight(summed, target)
        loss = scalar(loss_fn(predictions, target), "the loss")
        if part.is_regular:  # as many units for each sample
            return loss * part.samples, None
        return weighted(loss, as_units(count_units(loss_fn, predictions, target), loss.device))

    return total


def _of_users(loss_fn: Callable[[Any, Any], Tensor], reduction: str) -> TotalLoss:
    name, is_sum = describe(loss_fn), reduction == "sum"
    calls, may_be_tried, pairs = 0, True, Pairs()

    def total(predictions: Any, target: Any, part: MicroBatch) -> tuple[Tensor, Tensor | None]:
        nonlocal calls, may_be_tried
        loss = loss_fn(predictions, target)
        if not isinstance(loss, Tensor):
            raise UserError(f"the loss {name} must return a tensor, it returned {describe(loss)}")
        loss = scalar(loss, "the loss")
        if may_be_tried and part.samples and not part.is_whole:
            calls += 1
            if calls & (calls - 1) == 0:  # the 1st, 2nd, 4th, 8th: it waits for the device
                given, samples = pairs.of((predictions, target), part.samples)
                may_be_tried = try_loss(loss_fn, name, is_sum, given, samples)
        if is_sum:
            return loss * part.batch_samples, None
        return of_samples(loss, part, "derive the loss from dtrain.WeightedMean, or write a `step` with a `weight`")

    return total


def scalar(value: Tensor, name: str) -> Tensor:
    if value.numel() != 1:
        raise UserError(f"{name} must be one number, it has shape {tuple(value.shape)}")
    return value.reshape(()).to(torch.promote_types(value.dtype, torch.float32))  # sums need more than 16 bits


def describe(value: Any) -> str:
    """What a value is, in a few words for a message."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, bool | int | float):
        return f"the {type(value).__name__} {value}"
    if isinstance(value, Mapping):
        return f"a dict with keys {', '.join(map(str, value))}"
    return getattr(value, "__name__", type(value).__name__)
