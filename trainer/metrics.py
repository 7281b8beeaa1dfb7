"""A phase's metrics: updated locally on each rank, brought together and computed on rank 0 at its end.

torchmetrics keeps the states; `reduce_states` synchronises them, those of all metrics and phases at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_max, dim_zero_mean, dim_zero_min, dim_zero_sum
from torchmetrics.wrappers import Running
from torchmetrics.wrappers.abstract import WrapperMetric

from dtrain.errors import UserError
from dtrain.logits import guesses_logits

from .reduce import Reduction, State, Value
from .step import describe
from .transfer import map_tensors

Result: TypeAlias = "float | list[Any]"

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": functools.partial(torch.softmax, dim=1),
    "sigmoid": torch.sigmoid,
    "none": lambda predictions: predictions,
}
_ELEMENTWISE: dict[Any, tuple[Reduction, Callable[[Tensor, Tensor], Tensor]]] = {
    dim_zero_sum: ("sum", torch.add),
    dim_zero_max: ("max", torch.maximum),
    dim_zero_min: ("min", torch.minimum),
}
# What torch and torchmetrics raise at values that do not fit; a failing device is a RuntimeError as well.
_MISFITS = (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError)


def keeps_samples(metric: Metric) -> bool:
    """Whether the metric has a list state, which grows with the samples that it sees."""
    states = [value for part in _parts(metric).values() for value in part.metric_state.values()]
    return any(isinstance(value, list) for value in states)


class FunctionMetric(Metric):
    """A function `f(predictions, target)` of all samples at once, as scikit-learn's are but for the order.

    It gets CPU tensors, of the predictions and targets of a whole epoch.
    """

    predictions: list[Tensor]
    target: list[Tensor]

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.add_state("predictions", default=[], dist_reduce_fx="cat")
        self.add_state("target", default=[], dist_reduce_fx="cat")

    def update(self, predictions: Tensor, target: Tensor) -> None:
        self.predictions.append(predictions)
        self.target.append(target)

    def compute(self) -> Any:
        value = self.function(dim_zero_cat(self.predictions).cpu(), dim_zero_cat(self.target).cpu())
        return torch.as_tensor(value)


def as_metrics(given: Mapping[str, Metric | Callable[[Tensor, Tensor], Any]]) -> dict[str, Metric]:
    """The metrics by name, functions of (predictions, target) made metrics."""
    return {name: each if isinstance(each, Metric) else FunctionMetric(each) for name, each in given.items()}


class MetricSet:
    """The metrics of one phase, training or validation, on one rank.

    An epoch is `update` for each batch that has samples here, then `states` to `reduce_states` on all ranks,
    `finish` on rank 0, and `reset`. Metrics inside metrics (wrappers, sums of metrics) take part with their
    own states. The metrics are moved to `device` and belong to this set from then on.

    Args:
        activations: for each metric what its predictions go through first: "softmax" (over dim 1), "sigmoid",
            or "none", as without an entry.
    """

    def __init__(
        self, metrics: Mapping[str, Metric], activations: Mapping[str, str | None], device: torch.device | str
    ) -> None:
        self._metrics = {name: metric.to(device) for name, metric in metrics.items()}
        self._activations = {name: activations.get(name) or "none" for name in metrics}
        self._guessing = [
            name for name in metrics if self._activations[name] == "none" and guesses_logits(metrics[name])
        ]
        self._parts = {
            f"{name}.{path}".rstrip("."): part
            for name, metric in metrics.items()
            for path, part in _parts(metric).items()
        }
        self._num_updates = 0
        # Batches that a guessing metric took for logits. int64, as most sums of classification metrics are.
        self._num_guesses = torch.zeros((), dtype=torch.int64, device=device)
        for label, part in self._parts.items():
            if isinstance(part, Running):
                raise UserError(f"metric {label}: Running counts updates, and each rank has its own")
            part.distributed_available_fn = _never  # else compute would synchronise by itself

    @property
    def names(self) -> list[str]:
        """The metrics' own names, whatever number of values each of them reports."""
        return list(self._metrics)

    @torch.no_grad()
    def update(self, predictions: Any, target: Any) -> None:
        """Take in one batch of this rank, which must not be empty. No collective, no wait for the device."""
        predictions, target = map_tensors(Tensor.detach, (predictions, target))
        activated: dict[str, Any] = {}
        for name, metric in self._metrics.items():
            activation = self._activations[name]
            try:
                if activation not in activated:
                    activated[activation] = _ACTIVATIONS[activation](predictions)
                metric.update(activated[activation], target)
            except _MISFITS as error:
                given = f"predictions {describe(predictions)}, target {describe(target)}"
                self._refuse(name, error, f"; {given}, activation {activation}")
        self._num_updates += 1
        if self._guessing and isinstance(predictions, Tensor) and predictions.is_floating_point():
            self._num_guesses += ~((predictions >= 0) & (predictions <= 1)).all()

    def states(self) -> list[State]:
        """This rank's states, in the same order on all ranks, for `reduce_states`."""
        own = [_state(part, name, self._is_updated(part)) for part, name in self._slots()]
        return [State(self._num_guesses, "sum"), *own]

    def finish(self, reduced: Sequence[Value]) -> dict[str, Result]:
        """On rank 0, the results, from what `reduce_states` made of `states()`. `reset` must follow.

        A scalar is a float, a tensor nested lists of floats, and an entry of a dict is called name_key.
        """
        num_guesses, *values = reduced
        if num_guesses:
            raise UserError(
                f"metrics {', '.join(self._guessing)}: some predictions are outside [0, 1], and torchmetrics"
                " would guess for each batch whether it holds logits: set `activation: softmax` or `sigmoid`"
            )
        for (part, state), value in zip(self._slots(), values, strict=True):
            _set_state(part, state, value)
        for part in self._parts.values():
            part._update_count = max(part.update_count, 1)  # no warning where this rank had no sample
            part._computed = None  # what it may remember is of this rank's samples, or of fewer
        results: dict[str, Result] = {}
        for name, metric in self._metrics.items():
            try:
                results |= _flat(name, metric.compute())
            except _MISFITS as error:
                self._refuse(name, error)
        return results

    def reset(self) -> None:
        """Forget all samples."""
        self._num_updates = 0
        self._num_guesses.zero_()
        for part in self._parts.values():
            part.reset()

    def state_dict(self) -> dict[str, Any]:
        """This rank's states, in the middle of an epoch or at its end: copies, in plain containers.

        At its end they still hold what wrappers remember of earlier results, MinMaxMetric for one.
        """
        parts = {
            label: {
                "updated": self._is_updated(part),
                "num_updates": part.update_count,
                "states": _copied(part.metric_state),
                "memory": _copied(_memory(part)),
            }
            for label, part in self._parts.items()
        }
        return {"num_updates": self._num_updates, "num_guesses": _copied(self._num_guesses), "parts": parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()` or `merge()` of the same metrics, on whatever device it lies."""
        self._num_updates = state["num_updates"]
        self._num_guesses.copy_(state["num_guesses"])
        for label, part in self._parts.items():
            saved = state["parts"][label]
            part._update_count = saved["num_updates"]
            for name, value in _copied({**saved["states"], **saved["memory"]}).items():
                _set_state(part, name, value)

    def merge(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One rank's `state_dict` that stands for those of several, given in the order of their ranks.

        With it a run continues on another number of ranks: rank 0 loads it, the others start empty. A state
        that only `compute` can bring together, such as the moments of a correlation, raises a UserError.
        """
        parts = {}
        for label, part in self._parts.items():
            saved = [state["parts"][label] for state in states]
            updated = [each for each in saved if each["updated"]]
            parts[label] = {
                "updated": bool(updated),
                "num_updates": sum(each["num_updates"] for each in saved),
                "states": {
                    name: _merged([each["states"][name] for each in updated or saved[:1]], reduction, label)
                    for name, reduction in part._reductions.items()
                },
                "memory": saved[0]["memory"],  # of results, which rank 0 alone computes
            }
        counts = {key: sum(state[key] for state in states) for key in ("num_updates", "num_guesses")}
        return {**counts, "parts": parts}

    def _slots(self) -> Iterator[tuple[Metric, str]]:
        """All states: each by its metric and its name there."""
        for part in self._parts.values():
            for name in part.metric_state:
                yield part, name

    def _is_updated(self, part: Metric) -> bool:
        # A wrapper does not count its own updates.
        return (self._num_updates if isinstance(part, WrapperMetric) else part.update_count) > 0

    def _refuse(self, name: str, error: Exception, given: str = "") -> NoReturn:
        if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
            raise error
        kind = type(self._metrics[name]).__name__
        raise UserError(f"metric {name} ({kind}) does not fit: {error}{given}") from error


def _never() -> bool:
    return False


def _parts(metric: Metric) -> dict[str, Metric]:
    """The metric itself, at "", and those inside it, by their paths."""
    return {path: part for path, part in metric.named_modules() if isinstance(part, Metric)}


def _memory(metric: Metric) -> dict[str, Tensor]:
    """The tensors that the metric itself keeps beside its states, out of `reset`'s reach."""
    tensors = {name: value for name, value in vars(metric).items() if isinstance(value, Tensor)}
    return {name: value for name, value in tensors.items() if name not in metric.metric_state}


def _state(part: Metric, name: str, updated: bool) -> State:
    """A metric's state as torchmetrics means it, but for one thing: a list is given to no function.

    `compute` then finds the list that a single process would have.
    """
    value = part.metric_state[name]
    reduction: Any = part._reductions[name]
    if isinstance(value, list):
        return State(value, "cat" if reduction is dim_zero_cat else "stack", updated)
    if reduction in _ELEMENTWISE:
        return State(value, _ELEMENTWISE[reduction][0], updated)
    return State(value, "stack", updated, None if reduction is dim_zero_cat else reduction)


def _merged(values: list[Any], reduction: Any, label: str) -> Any:
    if isinstance(values[0], list):
        return [piece for pieces in values for piece in pieces]
    if reduction in _ELEMENTWISE:
        return functools.reduce(_ELEMENTWISE[reduction][1], values)
    all_equal = all(torch.equal(values[0], other) for other in values[1:])
    if len(values) == 1 or (reduction is dim_zero_mean and all_equal):
        return values[0]
    raise UserError(
        f"metric {label} cannot continue in the middle of an epoch on another number of ranks:"
        " what each rank has seen can only be brought together at the end"
    )


def _set_state(part: Metric, name: str, value: Value) -> None:
    if isinstance(value, list):
        device = "cpu" if part.compute_on_cpu else part.device
        setattr(part, name, [piece.to(device) for piece in value])
    else:
        setattr(part, name, value.to(part.device))


def _copied(tree: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), tree)


def _flat(name: str, result: Any) -> dict[str, Result]:
    if not isinstance(result, Mapping):
        return {name: _plain(result)}
    flat: dict[str, Result] = {}
    for key, value in result.items():
        flat |= _flat(f"{name}_{key}", value)
    return flat


def _plain(result: Any) -> Result:
    if isinstance(result, Tensor):
        values: Result = result.double().tolist()
        return values
    if isinstance(result, list | tuple):
        return [_plain(each) for each in result]
    return float(result)
