"""Tries an evaluation's metrics on its first samples before training: misfits are found now, not after an epoch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from dtrain.errors import UserError, among
from dtrain.schema.metrics.monitor import monitor_problem
from dtrain.schema.metrics.sets import value_of

from .data.first_batch import first_micro_batch
from .data.indexed import Data
from .fit.data import FitData
from .loss.step import Step
from .metrics.epoch_totals import Tally
from .strategies.base import Parallel

SAMPLES = 4
# Errors that more samples would not cure; others may come from too few samples, or from a single class.
_LASTING = (TypeError, AttributeError, KeyError, ImportError)


def try_metrics(
    model: Parallel, step: Step, data: Data, tally: Tally, warn: Callable[[str], None]
) -> Mapping[str, Any]:
    """What the tally would report for the first samples, if they suffice; without side effects.

    All ranks take part: each evaluates the model on the same samples.

    Raises:
        UserError: a metric can't take such samples, or fails in a way that more of them would not cure.
    """
    micro_batch = first_micro_batch(data, SAMPLES, model.world.device)
    if micro_batch is None:
        return {}
    tally = copy.deepcopy(tally)  # some metrics remember more than `reset` forgets
    with torch.no_grad(), model.preserving_state(), model.evaluating():
        tally.add(model.run(step, micro_batch), micro_batch.samples, 0)
    try:
        return tally.finish([state.value for state in tally.states()])
    except UserError as error:
        if error.__cause__ is None or isinstance(error.__cause__, _LASTING):
            raise
        warn(f"{error}; found on its first {micro_batch.samples} samples, which may be too few")
        return {}


def try_validation(model: Parallel, step: Step, data: FitData, warn: Callable[[str], None]) -> dict[str, Any]:
    """`try_metrics` of each set to validate on. All ranks take part."""
    values: dict[str, Any] = {}
    for each in data.val:
        values |= try_metrics(model, step, each.given, each.tallies[0], warn)
    return values


def require_reported(
    monitor: str, tried: Mapping[str, Any], data: FitData, metrics: Collection[str], warn: Callable[[str], None]
) -> None:
    """Check a validation monitor again, now that its set's first samples have been seen.

    Raises:
        UserError: it is not a single number.
    """
    name = f"val{monitor.removeprefix('ema')}" if monitor.startswith("ema") else monitor  # as of the weights themselves
    metric = value_of(name, [each.tallies[0].phase for each in data.val])
    if not metric or name.removesuffix(metric) + "loss" not in tried:
        return
    if isinstance(tried.get(name), list) or (name not in tried and metric in metrics):
        raise UserError(f"monitor: {monitor_problem(name, {name: tried})}")
    if name in tried:
        return
    if not any(metric.startswith(f"{each}_") for each in metrics):
        raise UserError(f"monitor: nothing is reported as {monitor}; {among(name, list(tried))}")
    # A metric of several values may report it of other samples.
    warn(f"monitor {monitor}: not reported for the first validation samples; {among(name, list(tried))}")
