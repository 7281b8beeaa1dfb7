"""A phase's metrics: updated locally on each rank, combined and computed on rank 0 at its end.

torchmetrics keeps the states; `reduce_states` synchronises them, those of all metrics and phases at once. A list state
comes in the order of a single process, whose batches are cut over the ranks: each element is noted with its batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_max, dim_zero_mean, dim_zero_min, dim_zero_sum
from torchmetrics.wrappers.abstract import WrapperMetric

from dtrain.errors import UserError
from dtrain.schema.metrics.logits import guesses_logits
from dtrain.schema.metrics.unfit import why_unfit
from dtrain.schema.metrics.values import Result, named_values, values_of_no_sample

from ..data.batch_tensors import map_tensors
from ..distributed.seeds import rng_kept, seed_everything
from ..distributed.torch_versions import is_of_device
from ..loss.step import describe
from .function_metric import FunctionMetric
from .reduce import Part, Reduction, State, Value, in_order
from .torchmetrics_private import forget_result, reductions, set_update_count

AnyMetric: TypeAlias = Metric | MetricCollection
Given: TypeAlias = "Mapping[str, AnyMetric | Callable[..., Any]] | MetricCollection"

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


def keeps_samples(metric: AnyMetric) -> bool:
    """Whether the metric has a list state, which grows with the samples that it sees."""
    states = [value for part in _parts(metric).values() for value in part.metric_state.values()]
    return any(isinstance(value, list) for value in states)


def as_metrics(given: Given) -> dict[str, AnyMetric]:
    """The metrics by name: of a collection its own, under its names; functions made metrics.

    Raises:
        UserError: it is not a metric, or can't be one over several ranks.
    """
    return {name: _as_metric(name, each) for name, each in given.items()}


def _as_metric(name: str, given: Any) -> AnyMetric:
    if reason := None if isinstance(given, type) else why_unfit(given):
        raise UserError(f"metric {name}: {reason}")
    if isinstance(given, MetricCollection):
        # Members that agree after the first update, perhaps by chance, would share their states from then on.
        members = dict(given.items(keep_base=True, copy_state=False))
        return MetricCollection(cast(Any, members), prefix=given.prefix, postfix=given.postfix, compute_groups=False)
    if isinstance(given, Metric):
        return given
    if not callable(given) or isinstance(given, (nn.Module, type)):
        raise UserError(f"metric {name}: {describe(given)} is neither a torchmetrics metric nor a function")
    return FunctionMetric(given)


class Arguments(NamedTuple):
    """Of a metric's update."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


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
        self, metrics: Mapping[str, AnyMetric], activations: Mapping[str, str | None], device: torch.device | str
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
        # Of each element of a list state, the number of the batch that it is from.
        self._batches: dict[str, dict[str, list[int]]] = {
            label: {name: [] for name, value in part.metric_state.items() if isinstance(value, list)}
            for label, part in self._parts.items()
        }
        self._num_updates = 0
        # Batches that a guessing metric took for logits. int64, as most sums of classification metrics are.
        self._num_guesses = torch.zeros((), dtype=torch.int64, device=device)
        for part in self._parts.values():
            part.distributed_available_fn = _never  # otherwise compute would synchronise by itself

    @property
    def names(self) -> list[str]:
        """The metrics' own names, whatever number of values each of them reports."""
        return list(self._metrics)

    def values_of_no_sample(self, name: str) -> dict[str, Result] | None:
        """The metric's values by name, where they can be known before the first sample."""
        return values_of_no_sample(name, self._metrics[name])

    @torch.no_grad()
    def update(
        self,
        predictions: Any,
        target: Any,
        arguments: Mapping[str, Any] | None = None,
        *,
        batch: int = 0,
        samples: int | None = None,
    ) -> None:
        """Add one batch of this rank, which must not be empty. No collective.

        Some metrics wait for the device: to see whether their arguments are right, until they `trust`, or to count
        (confusion matrices, means over classes).

        Args:
            arguments: by name, of metrics that get something else than predictions and target: a tuple of them, a
                dict of them by name, or the only one.
            batch: its number, the same on all ranks, of which each has a part of it.
            samples: how many samples this part has, where that is known.
        """
        predictions, target, own = map_tensors(Tensor.detach, (predictions, target, dict(arguments or {})))
        activated: dict[str, Any] = {}
        for name, metric in self._metrics.items():
            args, kwargs = _arguments(own[name]) if name in own else Arguments((predictions, target), {})
            activation = self._activations[name]
            if isinstance(metric, FunctionMetric):
                metric.samples = samples
            try:
                if name not in own:
                    if activation not in activated:
                        activated[activation] = _ACTIVATIONS[activation](predictions)
                    args = activated[activation], target
                elif activation != "none":
                    raise ValueError("step gives it arguments of its own, and is to apply the activation itself")
                metric.update(*args, **kwargs)
            except _MISFITS as error:
                self._refuse(name, error, f"; {_described(args, kwargs)}, activation {activation}")
        self._num_updates += 1
        self._note(batch)
        self._look_for_logits(predictions, own)

    def _note(self, batch: int) -> None:
        for part, name, batches in self._lists():
            state = getattr(part, name)
            if isinstance(state, list):
                del batches[len(state) :]
                batches.extend([batch] * (len(state) - len(batches)))

    def _look_for_logits(self, predictions: Any, own: Mapping[str, Any]) -> None:
        looked_at = [own[name] for name in self._guessing if name in own]
        if len(looked_at) < len(self._guessing):
            looked_at.append((predictions,))
        for given in looked_at:
            args, kwargs = _arguments(given)
            first = next(iter((*args, *kwargs.values())), None)
            if isinstance(first, Tensor) and first.is_floating_point():
                self._num_guesses += ~((first >= 0) & (first <= 1)).all()

    def states(self) -> list[State]:
        """This rank's states, in the same order on all ranks, for `reduce_states`."""
        own = [
            _state(part, name, self._is_updated(part), self._batches[label].get(name, ()))
            for label, part, name in self._slots()
        ]
        return [State(self._num_guesses, "sum"), *own]

    def finish(self, reduced: Sequence[Value]) -> dict[str, Result]:
        """On rank 0, the results, from what `reduce_states` made of `states()`. `reset` must follow.

        A scalar is a float, a tensor nested lists of floats, and an entry of a dict is called name_key. What a metric
        draws while it computes is the same at any number of ranks, and leaves no trace.
        """
        num_guesses, *values = reduced
        if num_guesses:
            raise UserError(
                f"metrics {', '.join(self._guessing)}: some predictions are outside [0, 1], so torchmetrics"
                " would guess for each batch whether it holds logits: set `activation: softmax` or `sigmoid`"
            )
        for (_, part, state), value in zip(self._slots(), values, strict=True):
            _set_state(part, state, value)
        for part in self._parts.values():
            set_update_count(part, max(part.update_count, 1))  # no warning where this rank had no sample
            forget_result(part)  # it may be of this rank's samples, or of fewer
        results: dict[str, Result] = {}
        with rng_kept(self._num_guesses.device):
            for name, metric in self._metrics.items():
                seed_everything(0)
                try:
                    reported = named_values(name, metric.compute())
                except (*_MISFITS, UserError) as error:
                    self._refuse(name, error)
                if clash := results.keys() & reported.keys():
                    raise UserError(f"metric {name}: another metric reports {', '.join(sorted(clash))} too")
                results |= reported
        return results

    def reset(self) -> None:
        """Forget all samples."""
        self._num_updates = 0
        self._num_guesses.zero_()
        for part in self._parts.values():
            part.reset()
        for _, _, batches in self._lists():
            batches.clear()

    def trust(self) -> None:
        """Stop checking arguments, where each check would wait for a GPU."""
        for part in self._parts.values():
            if self._num_guesses.device.type != "cpu" and getattr(part, "validate_args", False):
                part.validate_args = False

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
            for label, part in self._parts.items()
        }
        return {"num_updates": self._num_updates, "num_guesses": _copied(self._num_guesses), "parts": parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()` or `merge()` of the same metrics, on whatever device it lies."""
        self._num_updates = state["num_updates"]
        self._num_guesses.copy_(state["num_guesses"])
        for label, part in self._parts.items():
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
        for label, part in self._parts.items():
            saved = [state["parts"][label] for state in states]
            updated = [each for each in saved if each["updated"]]
            lists = {
                name: in_order([Part(_batches(each)[name], each["states"][name]) for each in saved])
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
        counts = {key: sum(state[key] for state in states) for key in ("num_updates", "num_guesses")}
        return {**counts, "parts": parts}

    def _slots(self) -> Iterator[tuple[str, Metric, str]]:
        """All states: each by its metric, with its label, and its name there."""
        for label, part in self._parts.items():
            for name in part.metric_state:
                yield label, part, name

    def _lists(self) -> Iterator[tuple[Metric, str, list[int]]]:
        """The list states, with the batches of their elements."""
        for label, part in self._parts.items():
            for name, batches in self._batches[label].items():
                yield part, name, batches

    def _is_updated(self, part: Metric) -> bool:
        # A wrapper does not count its own updates.
        return (self._num_updates if isinstance(part, WrapperMetric) else part.update_count) > 0

    def _refuse(self, name: str, error: Exception, given: str = "") -> NoReturn:
        if is_of_device(error):
            raise error
        metric = self._metrics[name]
        kind = describe(metric.function if isinstance(metric, FunctionMetric) else metric)
        raise UserError(f"metric {name} ({kind}) does not fit: {error}{given}") from error


def _never() -> bool:
    return False


def _arguments(given: Any) -> Arguments:
    if isinstance(given, Arguments):
        return given
    if isinstance(given, Mapping):
        return Arguments((), dict(given))
    return Arguments(given if isinstance(given, tuple) else (given,), {})


def _described(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    names = ("predictions", "target", *map(str, range(2, len(args))))
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    return ", ".join(f"{name} {describe(value)}" for name, value in named.items())


def _batches(saved: Mapping[str, Any]) -> dict[str, list[int]]:
    """Of a part's list states, the batches of their elements.

    Older checkpoints don't know them: what they hold comes in the order of the ranks, as it did then.
    """
    lists = {name: value for name, value in saved["states"].items() if isinstance(value, list)}
    found = saved.get("batches", {})
    return {name: list(found.get(name, [0] * len(value))) for name, value in lists.items()}


def _parts(metric: AnyMetric) -> dict[str, Metric]:
    """The metric itself, at "", and those inside it, by their paths."""
    return {path: part for path, part in metric.named_modules() if isinstance(part, Metric)}


def _memory(metric: Metric) -> dict[str, Tensor]:
    """The tensors that the metric itself keeps beside its states, out of `reset`'s reach."""
    tensors = {name: value for name, value in vars(metric).items() if isinstance(value, Tensor)}
    return {name: value for name, value in tensors.items() if name not in metric.metric_state}


def _state(part: Metric, name: str, updated: bool, batches: Sequence[int]) -> State:
    """A metric's state as torchmetrics means it, but for one thing: a list is given to no function.

    `compute` then finds the list that a single process would have.
    """
    value = part.metric_state[name]
    reduction: Any = reductions(part)[name]
    if isinstance(value, list):
        return State(value, "stack", updated, batches=batches)
    if reduction in _ELEMENTWISE:
        return State(value, _ELEMENTWISE[reduction][0], updated)
    return State(value, "stack", updated, None if reduction is dim_zero_cat else reduction)


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
    return map_tensors(lambda tensor: tensor.detach().clone(), tree)
