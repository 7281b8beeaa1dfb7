"""The learning-rate schedulers of a fit: what they look at, and whether they suit the fit's length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dtrain.schema.sections import Fit

from ..metrics.early_stopping import Best
from ..metrics.phases import PhaseMetrics, require_monitor
from ..optimization.run_length import RunLength
from ..optimization.scheduler import Schedule, check_length, require_mode
from ..optimization.scheduling import Scheduling
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
    """The schedulers, which look at what decides about the best weights where they weren't told what to look at.

    Args:
        may_log: whether a step of the user's own may report values that nobody knows yet.

    Raises:
        UserError: one can't be used in this fit.
    """
    length = RunLength.of(fit, data.train.num_steps)

    def suited(schedule: Schedule) -> Schedule:
        watched = schedule.monitor or best.monitor
        require_monitor(watched, data.tallies, may_log=may_log)
        loss = "min" if watched.endswith("_loss") else None
        known = best.mode if watched == best.monitor else loss or metrics.better(watched, data.tallies)
        require_mode(schedule.scheduler, watched, known)
        check_length(schedule.scheduler, schedule.interval, length, warn)
        return replace(schedule, monitor=watched)

    return given.map(suited).begin(length)
