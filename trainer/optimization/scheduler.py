"""The learning-rate scheduler: which value it gets, what is saved of it, and whether it lasts as long as the run."""

from __future__ import annotations

import inspect
import sys
import types
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    LRScheduler,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from dtrain.errors import Problem, UserError, first_line
from dtrain.run.folder import Row
from dtrain.schema.metrics.monitor import covers
from dtrain.schema.sections import Fit

from ..distributed.torch_private import milestones_of, schedulers_in

Interval = Literal["epoch", "step"]
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, partial, type)


def is_fed(scheduler: Any) -> bool:
    """Whether its `step` wants a reported value, as ReduceLROnPlateau's does.

    Raises:
        UserError: it wants something else.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        return True
    parameters = inspect.signature(scheduler.step).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if len(needed) > 1 or (needed and any(word in needed[0] for word in ("epoch", "step", "iter", "update"))):
        name = type(scheduler).__name__
        message = f"{name}.step needs {', '.join(needed)}: dtrain calls step(), or step(value) with what is monitored"
        raise UserError(Problem(message, "scheduler"))
    return bool(needed)


@dataclass(frozen=True)
class Scheduling:
    """A scheduler, if there is one, and when it steps.

    Attributes:
        monitor: what it is fed, where it wants a value.
    """

    scheduler: Any = None
    interval: Interval = "epoch"
    monitor: str = ""

    def after_step(self, step: int) -> None:
        """Step with the optimizer, after its step of that number, where that is the interval.

        Raises:
            UserError: the schedule has ended, in a run whose length nobody knew before.
        """
        if self.scheduler is None or self.interval != "step":
            return
        try:
            self.scheduler.step()
        except ValueError as error:
            parts = (part for part, _ in _parts(self.scheduler, sys.maxsize))
            ending = next((part for part in parts if isinstance(part, OneCycleLR)), None)
            if ending is None:
                raise
            message = f"{type(ending).__name__} ended before the run did, at step {step}: {first_line(error)}"
            raise UserError(Problem(message, "scheduler", hint="set total_steps to the steps of all epochs")) from error

    def after_row(self, row: Row, *, epoch_ends: bool) -> None:
        """Step after an epoch, if that is the interval, or as often as there is the value that is wanted."""
        if self.scheduler is None or self.interval != "epoch":
            return
        if not is_fed(self.scheduler):
            if epoch_ends:
                self.scheduler.step()
        elif isinstance(value := row.get(self.monitor), float):
            self.scheduler.step(value)
        elif covers(row, self.monitor):
            message = f"{self.monitor} is no single number, and {type(self.scheduler).__name__} needs one"
            raise UserError(Problem(message, "scheduler"))

    def state_dict(self) -> Any:
        """The scheduler's, without what is code.

        torch's own state_dict of a scheduler is all of its attributes. A function among them is no state: it is there
        again when the scheduler is made again, and stays there when the rest is loaded.
        """
        if self.scheduler is None:
            return None
        state = self.scheduler.state_dict()
        kind = type(self.scheduler)
        if kind.state_dict is LRScheduler.state_dict and kind.load_state_dict is LRScheduler.load_state_dict:
            return {key: value for key, value in state.items() if not isinstance(value, _CODE)}
        return state

    def load_state_dict(self, state: Any) -> None:
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state)


def require_mode(scheduler: Any, monitor: str, known: str | None) -> None:
    """Raise UserError if a scheduler mistakes a better value for a worse one.

    Args:
        known: min or max: whether a lower or a higher `monitor` is better; None if unknown.
    """
    mode = getattr(scheduler, "mode", None)
    if is_fed(scheduler) and known is not None and mode in ("min", "max") and mode != known:
        name, better = type(scheduler).__name__, "lower" if known == "min" else "higher"
        message = f"the mode of {name} is {mode}, but it monitors {monitor}, for which {better} is better"
        hint = f"mode: {known}, or monitor another value (scheduler.monitor, scheduler_monitor)"
        raise UserError(Problem(message, "scheduler", hint=hint))


def check_length(
    scheduler: Any, interval: Interval, fit: Fit, num_steps: int | None, warn: Callable[[str], None]
) -> None:
    """Compare a schedule with the run. No collective.

    Args:
        num_steps: optimizer steps of an epoch, where that is known.
        warn: called for schedules that are probably not intended.

    Raises:
        UserError: the scheduler would raise in the middle of the run.
    """
    run_steps = fit.run_steps(num_steps)
    epochs = fit.epochs if run_steps is None or not num_steps else run_steps // num_steps
    by_interval = {"epoch": epochs, "step": run_steps}
    if (calls := by_interval[interval]) is None:  # a stream
        for part, _ in _parts(scheduler, sys.maxsize):
            if isinstance(part, OneCycleLR):
                ends = f"{type(part).__name__} ends after total_steps {part.total_steps}"
                warn(f"{ends}, and the run with it if there are more {interval}s: their number is not known in advance")
        return
    unit = f"{interval}s"
    other = "step" if interval == "epoch" else "epoch"
    for part, steps in _parts(scheduler, getattr(scheduler, "last_epoch", 0) + calls):
        name = type(part).__name__
        if isinstance(part, OneCycleLR) and steps > part.total_steps:
            mend = f"total_steps: {steps}"
            if part.total_steps == by_interval[other]:
                mend = f"scheduler.interval: {other} (scheduler_interval)"
            message = f"{name} ends after total_steps {part.total_steps}, and this run makes {steps} {unit}: {mend}"
            raise UserError(Problem(message, "scheduler"))
        if isinstance(part, OneCycleLR) and steps < part.total_steps and part.total_steps == by_interval[other]:
            warn(f"{name} makes {steps} of its total_steps {part.total_steps}: is scheduler.interval {other} meant?")
        if isinstance(part, CosineAnnealingLR) and steps > part.T_max:
            warn(f"{name} turns back up after T_max {part.T_max} of {steps} {unit}; T_max: {steps} ends with the run")
        if isinstance(part, PolynomialLR) and steps > part.total_iters:
            warn(f"{name}: the learning rate is 0 after total_iters {part.total_iters} of {steps} {unit}")


def _parts(scheduler: Any, calls: int) -> Iterator[tuple[Any, int]]:
    """The schedulers that one is made of, itself where it is none of others, and how many steps each makes."""
    inner = schedulers_in(scheduler)
    if isinstance(scheduler, SequentialLR):
        milestones = milestones_of(scheduler)
        starts, last = [0, *milestones], bisect_right(milestones, calls)
        for part, start, end in zip(inner, starts, [*(each - 1 for each in milestones), calls], strict=True):
            if start <= starts[last]:
                yield from _parts(part, min(calls, end) - start)
    elif isinstance(scheduler, ChainedScheduler):
        for part in inner:
            yield from _parts(part, calls)
    else:
        yield scheduler, calls
