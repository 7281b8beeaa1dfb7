"""The user's own step: a function of the model and a batch, which returns its loss, or yields one after another."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.errors import UserError, among

from ..data.batch_tensors import map_tensors, tensors
from ..data.indexed import MicroBatch
from .logs import read_logs
from .step import Outcome, Step, as_units, describe, fillers_count_nothing, of_samples, scalar, weighted

KEYS = ("loss", "predictions", "target", "weight", "metrics", "log")
UserStep = Callable[[nn.Module, Any], Mapping[str, Any] | Iterator[Mapping[str, Any]]]
_END = object()


def user_step(function: UserStep) -> Step:
    """A user's `function(model, batch)`, which returns a dict with some of KEYS, or yields several; see `LossByLoss`.

    Only the loss is needed.
    """
    if _is_generator(function):
        return LossByLoss(function)
    reader = _Reader("return", KEYS)

    @functools.wraps(function, updated=())
    def step(model: nn.Module, micro_batch: MicroBatch) -> Outcome:
        return reader.read(function(model, micro_batch.data), model, micro_batch)

    return fillers_count_nothing(step)


def _is_generator(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return any(map(inspect.isgeneratorfunction, (function, getattr(function, "__call__", None))))  # noqa: B004  # an object's may be one


class LossByLoss:
    """A step that yields its losses: from each is learned before the next is asked for, as in a loop of one's own.

    What it yields is what a step returns, and under `optimizer` the name of the one that learns from the loss, where
    there are several. Called as any step, it gives all losses of a micro-batch with nothing learned in between, as
    evaluation needs them.

    Args:
        computed: what turns the computation of a loss into one in some precision.
    """

    def __init__(self, function: UserStep, computed: Callable[[Step], Step] = lambda step: step) -> None:
        self.__wrapped__ = function  # as functools.wraps has it
        self._readers: list[_Reader] = []  # for each of the losses
        self._computed = computed

    def computed_by(self, computed: Callable[[Step], Step]) -> LossByLoss:
        """This, with each loss computed so."""
        return LossByLoss(self.__wrapped__, computed)

    def __call__(self, model: nn.Module, micro_batch: MicroBatch) -> Outcome:
        losses = self.begin()
        found: list[Outcome] = []
        while True:
            outcome = losses.compute(model, micro_batch)
            if losses.is_over:
                return together(found, micro_batch)
            found.append(outcome)

    def begin(self) -> Losses:
        """The losses of a micro-batch."""
        return Losses(self.__wrapped__, self._readers, self._computed)


class Losses:
    """The losses of one micro-batch, one after the other.

    Attributes:
        is_over: whether there was none left when one was last asked for.
        compute: as a step, the next one; without meaning where there is none.
    """

    def __init__(self, function: UserStep, readers: list[_Reader], computed: Callable[[Step], Step]) -> None:
        self._function = function
        self._readers = readers
        self._results: Any = None
        self._number = 0
        self.is_over = False
        self.compute = computed(fillers_count_nothing(self._compute))

    def _compute(self, model: nn.Module, micro_batch: MicroBatch) -> Outcome:
        if self._results is None:
            self._results = self._function(model, micro_batch.data)
        result = next(self._results, _END)
        if result is _END:
            self.is_over = True
            return Outcome(torch.zeros(()), None, None, None)
        if self._number == len(self._readers):
            self._readers.append(_Reader("yield", (*KEYS, "optimizer")))
        reader, self._number = self._readers[self._number], self._number + 1
        return reader.read(result, model, micro_batch)


def together(losses: Sequence[Outcome], micro_batch: MicroBatch) -> Outcome:
    """What is reported of a micro-batch's losses: the last one as the loss, and that of each optimizer under its name.

    Raises:
        UserError: there is none, or two log the same name.
    """
    if not losses:
        raise UserError("step yielded no loss")
    logs: dict[str, tuple[Tensor, Tensor]] = {}
    sums: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for loss in losses:
        for name, logged in (loss.logs or {}).items():
            if name in logs:
                raise UserError(f"step logs {name} with two of its losses: call one of them otherwise")
            logs[name] = logged
        if loss.optimizer is not None:
            total = loss.total.detach().double()
            units = as_units(micro_batch.samples, total.device) if loss.weight is None else loss.weight
            sums.setdefault(f"{loss.optimizer}_loss", []).append((total, units))
    for name, found in sums.items():
        if name in logs:
            raise UserError(f"step logs {name}, as the loss of the optimizer is called: give it another name")
        totals, weights = (torch.stack(each).sum() for each in zip(*found, strict=True))
        logs[name] = (totals / weights, weights)
    believed = [loss.believed for loss in losses if loss.believed is not None]
    compared = next((loss for loss in reversed(losses) if loss.predictions is not None), losses[-1])
    return replace(
        losses[-1],
        predictions=compared.predictions,
        target=compared.target,
        believed=torch.stack(believed).sum() if believed else None,
        metrics={name: arguments for loss in losses for name, arguments in loss.metrics.items()},
        logs=logs,
        optimizer=None,
    )


def detached(outcome: Outcome) -> Outcome:
    """The outcome without the graph that led to it."""
    parts = {name: map_tensors(Tensor.detach, getattr(outcome, name)) for name in ("predictions", "target", "metrics")}
    believed = None if outcome.believed is None else outcome.believed.detach()
    return replace(outcome, total=outcome.total.detach(), believed=believed, **parts)


class _Reader:
    """Reads what a user's step returns, or one of the losses that it yields.

    Args:
        does: return or yield.
        keys: those that the dict may have.
    """

    def __init__(self, does: str, keys: Sequence[str]) -> None:
        self._does, self._keys = does, keys
        self._weighs: dict[bool, bool] = {}  # whether there was a weight, by whether the model trains

    def read(self, result: Any, model: nn.Module, micro_batch: MicroBatch) -> Outcome:
        result = _checked(result, self._does, self._keys)
        loss, weight = scalar(result["loss"], "the step's loss"), result.get("weight")
        if self._weighs.setdefault(model.training, weight is not None) is not (weight is not None):
            does = self._does
            raise UserError(f"the step {does}ed a `weight` for some batches but not for others: {does} it for all")
        known = None if weight is None else _as_weight(weight, loss.device)
        if known is not None:
            total, units = weighted(loss, known)
            if not (isinstance(weight, int | float) and weight):  # which is 0, or unknown before the device has done it
                _zero_gradients(result.get("predictions"), known)
        else:
            mend = f"let the step {self._does} its `weight`, of how many units its loss is the mean"
            total, units = of_samples(loss, micro_batch, mend)
        metrics = result.get("metrics", {})
        if not isinstance(metrics, Mapping):
            raise UserError(f"step's `metrics` must be a dict of arguments by metric, it is {describe(metrics)}")
        logs: Mapping[str, tuple[Tensor, Tensor]] = {}
        if "log" in result:
            logs = read_logs(result["log"], as_units(micro_batch.samples, loss.device) if known is None else known)
        optimizer = result.get("optimizer")
        if not isinstance(optimizer, str | None):
            raise UserError(f"step's `optimizer` must be the name of one, it is {describe(optimizer)}")
        return Outcome(
            total,
            units,
            result.get("predictions"),
            result.get("target"),
            believed=total if weight is None else None,
            metrics=metrics,
            logs=logs,
            optimizer=optimizer,
        )


def _checked(result: Any, does: str, keys: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(result, Mapping) or "loss" not in result:
        raise UserError(
            f"step must {does} a dict with a `loss`, it {does}ed {describe(result)}; keys: {', '.join(keys)}"
        )
    for key in result:
        if key not in keys:
            raise UserError(f"step {does}ed the unknown key {key!r}; {among(str(key), keys)}")
    loss = result["loss"]
    if not isinstance(loss, Tensor):
        mend = "; `.item()` loses its gradient" if isinstance(loss, float) else ""
        raise UserError(f"the step's loss must be a tensor, it is {describe(loss)}{mend}")
    return result


def _as_weight(weight: Any, device: torch.device) -> Tensor:
    try:
        units = as_units(weight, device)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"the step's weight must be a number, it is {describe(weight)}") from None
    return scalar(units, "the step's weight")


def _zero_gradients(predictions: Any, weight: Tensor) -> None:
    """Keep the mean of no units from returning nan: 0/0 has a nan gradient, whatever it is multiplied by."""
    for tensor in tensors(predictions):
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: gradient.where((weight != 0).to(gradient.device), 0.0))
