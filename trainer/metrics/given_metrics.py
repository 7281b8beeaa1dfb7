"""The metrics that users give: torchmetrics' own, collections of them, and functions of all samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

from torch import nn
from torchmetrics import Metric, MetricCollection

from dtrain.errors import UserError
from dtrain.schema.metrics.unfit import why_unfit

from ..loss.step import describe
from .function_metric import FunctionMetric

AnyMetric: TypeAlias = Metric | MetricCollection
Given: TypeAlias = "Mapping[str, AnyMetric | Callable[..., Any]] | MetricCollection"


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


def keeps_samples(metric: AnyMetric) -> bool:
    """Whether the metric has a list state, which grows with the samples that it sees."""
    states = [value for part in parts_of(metric).values() for value in part.metric_state.values()]
    return any(isinstance(value, list) for value in states)


def parts_of(metric: AnyMetric) -> dict[str, Metric]:
    """The metric itself, at "", and those inside it, by their paths."""
    return {path: part for path, part in metric.named_modules() if isinstance(part, Metric)}
