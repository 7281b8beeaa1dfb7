"""A phase's metrics: updated locally on each rank, combined and computed on rank 0 at its end.

`reduce_states` synchronises their states, those of all metrics and phases at once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from dtrain.errors import UserError
from dtrain.schema.metrics.logits import guesses_logits
from dtrain.schema.metrics.values import Result, named_values, values_of_no_sample

from ..data.batch_tensors import map_tensors
from ..distributed.seeds import rng_kept, seed_everything
from ..distributed.torch_versions import is_of_device
from ..loss.step import describe
from .blocks import Block, fits, only_counts
from .function_metric import FunctionMetric
from .given_metrics import AnyMetric
from .metric_states import MetricStates
from .reduce import LocalState, Value

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": functools.partial(torch.softmax, dim=1),
    "sigmoid": torch.sigmoid,
    "none": lambda predictions: predictions,
}
# What torch and torchmetrics raise at values that do not fit; a failing device is a RuntimeError as well.
_MISFITS = (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError)


class Arguments(NamedTuple):
    """Of a metric's update."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class MetricSet:
    """The metrics of one phase, training or validation, on one rank.

    An epoch is `update` for each batch that has samples here, then `states` to `reduce_states` on all ranks,
    `finish` on rank 0, and `reset`. The metrics are moved to `device` and belong to this set from then on.

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
        self._states = MetricStates(metrics)
        # Updates in which a guessing metric took them for logits. int64, as most sums of classification metrics are.
        self._num_guesses = torch.zeros((), dtype=torch.int64, device=device)
        for part in self._states.parts.values():
            part.distributed_available_fn = _never  # otherwise compute would synchronise by itself
        self._together: dict[str, list[str]] = {}  # by activation: those that are updated with several batches at once
        for name, metric in self._metrics.items():
            if only_counts(metric):
                self._together.setdefault(self._activations[name], []).append(name)
        self._blocks = {each: Block(functools.partial(self._update_together, each)) for each in self._together}
        counting = {name for names in self._together.values() for name in names}
        self._one_by_one = [name for name in metrics if name not in counting]
        self._is_tried = False  # the first batch does not wait for others: what does not fit is to be seen at once

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
        (confusion matrices, means over classes). Those that only count see several batches at once, see `Block`.

        Args:
            arguments: by name, of metrics that get something else than predictions and target: a tuple of them, a
                dict of them by name, or the only one.
            batch: its number, the same on all ranks, of which each has a part of it.
            samples: how many samples this part has, where that is known.
        """
        names: Collection[str] = self._metrics
        if self._blocks and self._is_tried and not arguments and fits(predictions, target):
            names = self._one_by_one
            for activation, block in self._blocks.items():
                block.add(self._activated(self._together[activation][0], predictions, target), target)
        if names:
            predictions, target, own = map_tensors(Tensor.detach, (predictions, target, dict(arguments or {})))
            self._update_each(names, predictions, target, own, samples)
        self._is_tried = True
        self._states.note(batch)

    def _update_each(
        self, names: Collection[str], predictions: Any, target: Any, own: Mapping[str, Any], samples: int | None
    ) -> None:
        activated: dict[str, Any] = {}
        for name in names:
            activation = self._activations[name]
            if name in own:
                args, kwargs = _arguments(own[name])
                if activation != "none":
                    mend = "step gives it arguments of its own, and is to apply the activation itself"
                    self._refuse(name, ValueError(mend), _given(args, kwargs, activation))
                self._update(name, args, kwargs, samples)
            else:
                if activation not in activated:
                    activated[activation] = self._activated(name, predictions, target)
                self._update(name, (activated[activation], target), {}, samples)
        self._look_for_logits(names, predictions, own)

    def _activated(self, name: str, predictions: Any, target: Any) -> Any:
        try:
            return _ACTIVATIONS[self._activations[name]](predictions)
        except _MISFITS as error:
            self._refuse(name, error, _given((predictions, target), {}, self._activations[name]))

    def _update(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], samples: int | None = None) -> None:
        metric = self._metrics[name]
        if isinstance(metric, FunctionMetric):
            metric.samples = samples
        try:
            metric.update(*args, **kwargs)
        except _MISFITS as error:
            self._refuse(name, error, _given(args, kwargs, self._activations[name]))

    def _update_together(self, activation: str, predictions: Tensor, target: Tensor) -> None:
        names = self._together[activation]
        for name in names:
            self._update(name, (predictions, target), {})
        self._look_for_logits(names, predictions, {})

    def _look_for_logits(self, names: Collection[str], predictions: Any, own: Mapping[str, Any]) -> None:
        guessing = [name for name in self._guessing if name in names]
        looked_at = [own[name] for name in guessing if name in own]
        if len(looked_at) < len(guessing):
            looked_at.append((predictions,))
        for given in looked_at:
            args, kwargs = _arguments(given)
            first = next(iter((*args, *kwargs.values())), None)
            if isinstance(first, Tensor) and first.is_floating_point():
                self._num_guesses += ~((first >= 0) & (first <= 1)).all()

    @torch.no_grad()
    def _finish_blocks(self) -> None:
        """Have all metrics see all batches so far."""
        for block in self._blocks.values():
            block.finish()

    def _clear_blocks(self) -> None:
        for block in self._blocks.values():
            block.clear()

    def states(self) -> list[LocalState]:
        """This rank's states, in the same order on all ranks, for `reduce_states`."""
        self._finish_blocks()
        return [LocalState(self._num_guesses, "sum"), *self._states.local()]

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
        self._states.assign(values)
        results: dict[str, Result] = {}
        with rng_kept(self._num_guesses.device) if self._one_by_one else contextlib.nullcontext():
            for name, metric in self._metrics.items():
                if name in self._one_by_one:  # what only counts draws nothing
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
        self._clear_blocks()
        self._num_guesses.zero_()
        self._states.reset()

    def trust(self) -> None:
        """Stop checking arguments, where each check would wait for a GPU."""
        for part in self._states.parts.values():
            if self._num_guesses.device.type != "cpu" and getattr(part, "validate_args", False):
                part.validate_args = False

    def state_dict(self) -> dict[str, Any]:
        """This rank's states, see `MetricStates.state_dict`."""
        self._finish_blocks()
        return {**self._states.state_dict(), "num_guesses": self._num_guesses.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()` or `merge()` of the same metrics, on whatever device it lies."""
        self._clear_blocks()
        self._num_guesses.copy_(state["num_guesses"])
        self._states.load_state_dict(state)

    def merge(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One rank's `state_dict` that stands for those of several, see `MetricStates.merge`."""
        return {**self._states.merge(states), "num_guesses": sum(state["num_guesses"] for state in states)}

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


def _given(args: Sequence[Any], kwargs: Mapping[str, Any], activation: str) -> str:
    names = ("predictions", "target", *map(str, range(2, len(args))))
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    described = ", ".join(f"{name} {describe(value)}" for name, value in named.items())
    return f"; {described}, activation {activation}"
