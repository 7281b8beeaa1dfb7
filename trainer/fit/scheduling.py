"""The learning-rate scheduler of a fit: what it looks at, and whether it suits the fit's length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dtrain.schema.sections import Fit

from ..metrics.early_stopping import Best
from ..metrics.phases import PhaseMetrics, require_monitor
from ..optimization.run_length import RunLength
from ..optimization.scheduler import Scheduling, check_length, require_mode
from .data import FitData


def scheduling_of_fit(
    given: Scheduling,
    best: Best,
    data: FitData,
    fit: Fit,
    metrics: PhaseMetrics,
    warn: Callable[[str], None],
    *,
    may_log: bool,
) -> Scheduling:
    """The scheduler, which looks at what decides about the best weights where it wasn't told what to look at.

    Args:
        may_log: whether a step of the user's own may report values that nobody knows yet.

    Raises:
        UserError: it can't be used in this fit.
    """
    scheduling = replace(given, monitor=given.monitor or best.monitor)
    length = RunLength.of(fit, data.train.num_steps)
    if scheduling.scheduler is not None:
        watched = scheduling.monitor
        require_monitor(watched, data.tallies, may_log=may_log)
        loss = "min" if watched.endswith("_loss") else None
        known = best.mode if watched == best.monitor else loss or metrics.better(watched, data.tallies)
        require_mode(scheduling.scheduler, watched, known)
        check_length(scheduling.scheduler, scheduling.interval, length, warn)
    return scheduling.begin(length)
