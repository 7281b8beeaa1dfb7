"""The states of metrics on one rank: handed to `reduce_states`, set to what it made of them, saved and restored.

torchmetrics keeps the states. A list state comes in the order of a single process, whose batches are cut over the
ranks: each element is noted with its batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_max, dim_zero_mean, dim_zero_min, dim_zero_sum
from torchmetrics.wrappers.abstract import WrapperMetric

from dtrain.errors import UserError

from ..data.batch_tensors import map_tensors
from .given_metrics import AnyMetric, parts_of
from .reduce import LocalState, Part, Reduction, Value, by_batch
from .torchmetrics_private import forget_result, reductions, set_update_count

_ELEMENTWISE: dict[Any, tuple[Reduction, Callable[[Tensor, Tensor], Tensor]]] = {
    dim_zero_sum: ("sum", torch.add),
    dim_zero_max: ("max", torch.maximum),
    dim_zero_min: ("min", torch.minimum),
}


class MetricStates:
    """The states of metrics on one rank, and for each element of a list state the number of the batch that it is from.

    Metrics inside metrics (wrappers, sums of metrics) take part with their own states.

    Attributes:
        parts: the metrics and those inside them, by their paths.
    """

    def __init__(self, metrics: Mapping[str, AnyMetric]) -> None:
        self.parts = {
            f"{name}.{path}".rstrip("."): part
            for name, metric in metrics.items()
            for path, part in parts_of(metric).items()
        }
        self._batches: dict[str, dict[str, list[int]]] = {
            label: {name: [] for name, value in part.metric_state.items() if isinstance(value, list)}
            for label, part in self.parts.items()
        }
        self._num_updates = 0

    def note(self, batch: int) -> None:
        """The metrics were updated: what their lists have gained is of this batch."""
        self._num_updates += 1
        for part, name, batches in self._lists():
            state = getattr(part, name)
            if isinstance(state, list):
                del batches[len(state) :]
                batches.extend([batch] * (len(state) - len(batches)))

    def local(self) -> list[LocalState]:
        """This rank's states, in the same order on all ranks."""
        return [
            _state(part, name, self._is_updated(part), self._batches[label].get(name, ()))
            for label, part, name in self._slots()
        ]

    def assign(self, values: Sequence[Value]) -> None:
        """Set the states to those over all ranks, in the order of `local`, for the metrics to compute of."""
        for (_, part, state), value in zip(self._slots(), values, strict=True):
            _set_state(part, state, value)
        for part in self.parts.values():
            set_update_count(part, max(part.update_count, 1))  # no warning where this rank had no sample
            forget_result(part)  # it may be of this rank's samples, or of fewer

    def reset(self) -> None:
        """Forget all samples."""
        self._num_updates = 0
        for part in self.parts.values():
            part.reset()
        for _, _, batches in self._lists():
            batches.clear()

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
                "batches": _copied(self._batches[label]),
            }
            for label, part in self.parts.items()
        }
        return {"num_updates": self._num_updates, "parts": parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()` or `merge()` of the same metrics, on whatever device it lies."""
        self._num_updates = state["num_updates"]
        for label, part in self.parts.items():
            saved = state["parts"][label]
            set_update_count(part, saved["num_updates"])
            for name, value in _copied({**saved["states"], **saved["memory"]}).items():
                _set_state(part, name, value)
            self._batches[label] = _batches(saved)

    def merge(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One rank's `state_dict` that stands for those of several, given in the order of their ranks.

        With it a run continues on another number of ranks: rank 0 loads it, the others start empty. A state
        that only `compute` can bring together, such as the moments of a correlation, raises a UserError.
        """
        parts = {}
        for label, part in self.parts.items():
            saved = [state["parts"][label] for state in states]
            updated = [each for each in saved if each["updated"]]
            lists = {
                name: by_batch([Part(_batches(each)[name], each["states"][name]) for each in saved])
                for name in self._batches[label]
            }
            parts[label] = {
                "updated": bool(updated),
                "num_updates": sum(each["num_updates"] for each in saved),
                "states": {
                    name: list(lists[name].pieces)
                    if name in lists
                    else _merged([each["states"][name] for each in updated or saved[:1]], reduction, label)
                    for name, reduction in reductions(part).items()
                },
                "batches": {name: list(part.batches) for name, part in lists.items()},
                "memory": saved[0]["memory"],  # of results, which rank 0 alone computes
            }
        return {"num_updates": sum(state["num_updates"] for state in states), "parts": parts}

    def _slots(self) -> Iterator[tuple[str, Metric, str]]:
        """All states: each by its metric, with its label, and its name there."""
        for label, part in self.parts.items():
            for name in part.metric_state:
                yield label, part, name

    def _lists(self) -> Iterator[tuple[Metric, str, list[int]]]:
        """The list states, with the batches of their elements."""
        for label, part in self.parts.items():
            for name, batches in self._batches[label].items():
                yield part, name, batches

    def _is_updated(self, part: Metric) -> bool:
        # A wrapper does not count its own updates.
        return (self._num_updates if isinstance(part, WrapperMetric) else part.update_count) > 0


def _batches(saved: Mapping[str, Any]) -> dict[str, list[int]]:
    """Of a part's list states, the batches of their elements.

    Older checkpoints don't know them: what they hold comes in the order of the ranks, as it did then.
    """
    lists = {name: value for name, value in saved["states"].items() if isinstance(value, list)}
    found = saved.get("batches", {})
    return {name: list(found.get(name, [0] * len(value))) for name, value in lists.items()}


def _memory(metric: Metric) -> dict[str, Tensor]:
    """The tensors that the metric itself keeps beside its states, out of `reset`'s reach."""
    tensors = {name: value for name, value in vars(metric).items() if isinstance(value, Tensor)}
    return {name: value for name, value in tensors.items() if name not in metric.metric_state}


def _state(part: Metric, name: str, updated: bool, batches: Sequence[int]) -> LocalState:
    """A metric's state as torchmetrics means it, but for one thing: a list is given to no function.

    `compute` then finds the list that a single process would have.
    """
    value = part.metric_state[name]
    reduction: Any = reductions(part)[name]
    if isinstance(value, list):
        return LocalState(value, "stack", updated, batches=batches)
    if reduction in _ELEMENTWISE:
        return LocalState(value, _ELEMENTWISE[reduction][0], updated)
    return LocalState(value, "stack", updated, None if reduction is dim_zero_cat else reduction)


def _merged(values: list[Any], reduction: Any, label: str) -> Any:
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
        setattr(part, name, map_tensors(lambda tensor: tensor.to(device), value))
    else:
        setattr(part, name, value.to(part.device))


def _copied(tree: Any) -> Any:
    """Plain containers with copies of their tensors."""
    return map_tensors(lambda tensor: tensor.detach().clone(), tree)
