"""The learning-rate scheduler: which value it gets, what is saved of it, and whether it lasts as long as the run."""

from __future__ import annotations

import copy
import inspect
import sys
import types
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from dtrain.errors import Problem, UserError, first_line
from dtrain.run.folder import Row
from dtrain.schema.metrics.monitor import covers

from ..checkpoint.codec import flatten, require_data
from ..distributed.torch_private import milestones_of, schedulers_in
from .run_length import Interval, RunLength

_LENGTHS = {
    CosineAnnealingLR: "T_max",
    OneCycleLR: "total_steps",
    PolynomialLR: "total_iters",
    LinearLR: "total_iters",
}  # what they call the steps that they last
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
class Beginning:
    """A schedule as a run begins it.

    Attributes:
        state: the scheduler's, before its first step.
        rates: the learning rates then, of each parameter group.
    """

    length: RunLength
    state: Any
    rates: list[Any]


@dataclass(frozen=True)
class Schedule:
    """A scheduler, and when it steps.

    Attributes:
        monitor: what it is fed, where it wants a value.
        beginning: how the run begins it; None before there is a run.
    """

    scheduler: Any
    interval: Interval = "epoch"
    monitor: str = ""
    beginning: Beginning | None = None

    def __post_init__(self) -> None:
        if self.interval == "step" and is_fed(self.scheduler):
            name = type(self.scheduler).__name__
            raise UserError(f"{name} needs an epoch's result: it can't have the interval step")

    def begin(self, length: RunLength) -> Schedule:
        """This, in a run of that length, from the scheduler's present state on.

        Raises:
            UserError: a checkpoint can't hold that state.
        """
        state = self.state_dict()
        require_data("scheduler", self.scheduler, state)
        optimizer = getattr(self.scheduler, "optimizer", None)
        rates = [copy.deepcopy(group["lr"]) for group in getattr(optimizer, "param_groups", ())]
        return replace(self, beginning=Beginning(length, copy.deepcopy(state), rates))

    def after_step(self, step: int) -> None:
        """Step with the optimizer, after its step of that number, where that is the interval.

        Raises:
            UserError: the schedule has ended, in a run whose length nobody knew before.
        """
        if self.interval != "step":
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
        if self.interval != "epoch":
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
        state = self.scheduler.state_dict()
        kind = type(self.scheduler)
        if kind.state_dict is LRScheduler.state_dict and kind.load_state_dict is LRScheduler.load_state_dict:
            return {key: value for key, value in state.items() if not isinstance(value, _CODE)}
        return state

    def beginning_state(self) -> Any:
        """What tells a run that goes on whether its schedule is the one that it began with."""
        if self.beginning is None:
            return None
        return {"length": asdict(self.beginning.length), "state": self.beginning.state}

    def load_state_dict(self, state: Any, beginning: Any = None) -> None:
        """Continue with the schedule of a run that had that `beginning_state`.

        torch's state holds the schedule's length too. Where it has changed with the run's, the schedule continues at
        the same place of its new curve, as if it had had this length from the start.
        """
        self.scheduler.load_state_dict(state)
        if beginning is not None and self.beginning is not None and self._has_changed(beginning):
            self._replay(self.beginning)

    def _has_changed(self, before: Any) -> bool:
        now = self.beginning_state()
        is_replayable = isinstance(self.scheduler, LRScheduler) and not is_fed(self.scheduler)
        return is_replayable and now["length"] != before["length"] and not _same(now["state"], before["state"])

    def _replay(self, beginning: Beginning) -> None:
        """Make the scheduler's steps once more from the beginning."""
        done, all_steps = _steps_made(self.scheduler), beginning.length.intervals(self.interval)
        done = done if all_steps is None else min(done, all_steps)
        self.scheduler.load_state_dict(copy.deepcopy(beginning.state))
        for group, rate in zip(self.scheduler.optimizer.param_groups, beginning.rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the optimizer has not made a step before
            for _ in range(done - _steps_made(self.scheduler)):
                self.scheduler.step()


def _steps_made(scheduler: Any) -> int:
    """Also of a chain, which does not count them itself."""
    inner = schedulers_in(scheduler)
    made: int = scheduler.last_epoch if hasattr(scheduler, "last_epoch") else _steps_made(inner[0])
    return made


def _same(one: Any, other: Any) -> bool:
    """Whether two states that checkpoints can hold are equal."""
    ones, others = flatten(one), flatten(other)
    return ones.keys() == others.keys() and all(torch.equal(ones[name].cpu(), others[name].cpu()) for name in ones)


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


def check_length(scheduler: Any, interval: Interval, length: RunLength, warn: Callable[[str], None]) -> None:
    """Compare a schedule with the run. No collective.

    Args:
        warn: called for schedules that are probably not intended.

    Raises:
        UserError: the scheduler would raise in the middle of the run.
    """
    if (calls := length.intervals(interval)) is None:  # a stream
        for part, _ in _parts(scheduler, sys.maxsize):
            if isinstance(part, OneCycleLR):
                ends = f"{type(part).__name__} ends after total_steps {part.total_steps}"
                warn(f"{ends}, and the run with it if there are more {interval}s: their number is not known in advance")
        return
    other: Interval = "step" if interval == "epoch" else "epoch"
    for part, steps in _parts(scheduler, getattr(scheduler, "last_epoch", 0) + calls):
        is_others = isinstance(part, OneCycleLR) and part.total_steps == length.intervals(other)
        _require_room(part, steps, f"{interval}s", other if is_others else None)
        for line in _misfits(part, steps, f"{interval}s", other if is_others else None):
            warn(f"{type(part).__name__}{line}")


def _require_room(part: Any, steps: int, unit: str, meant: Interval | None) -> None:
    """Raise UserError if a schedule raises after fewer steps. `meant`: the interval whose length it has instead."""
    if isinstance(part, OneCycleLR) and steps > part.total_steps:
        mend = f"scheduler.interval: {meant} (scheduler_interval)" if meant else f"total_steps: {steps}"
        name = type(part).__name__
        message = f"{name} ends after total_steps {part.total_steps}, and this run makes {steps} {unit}: {mend}"
        raise UserError(Problem(message, "scheduler"))


def _misfits(part: Any, steps: int, unit: str, meant: Interval | None) -> Iterator[str]:
    """What is probably not intended of a schedule that makes so many steps; its name goes before."""
    if isinstance(part, MultiStepLR | SequentialLR):
        milestones = milestones_of(part) if isinstance(part, SequentialLR) else part.milestones.elements()
        if missed := [str(each) for each in sorted(milestones) if each >= steps]:
            yield f" never gets past milestone {', '.join(missed)} in {steps} {unit}"
    if isinstance(part, CosineAnnealingLR) and steps > part.T_max:
        yield f" turns back up after T_max {part.T_max} of {steps} {unit}; T_max: {steps} ends with the run"
    if isinstance(part, PolynomialLR) and steps > part.total_iters:
        yield f": the learning rate is 0 after total_iters {part.total_iters} of {steps} {unit}"
    name = next((name for kind, name in _LENGTHS.items() if isinstance(part, kind)), None)
    whole = 0 if name is None else getattr(part, name)
    if meant and steps < whole:
        yield f" makes {steps} of its {name} {whole}: is scheduler.interval {meant} meant?"
    elif steps + 1 < whole:  # in a sequence one that lasts until a milestone steps once less
        yield f" makes {steps} of its {name} {whole} {unit} and stops halfway; {name}: {steps} ends with the run"


def _parts(scheduler: Any, calls: int) -> Iterator[tuple[Any, int]]:
    """A scheduler, unless it is a chain, and those that it is made of, with how many steps each makes."""
    inner = schedulers_in(scheduler)
    if not isinstance(scheduler, ChainedScheduler):
        yield scheduler, calls
    if isinstance(scheduler, SequentialLR):
        milestones = milestones_of(scheduler)
        starts, last = [0, *milestones], bisect_right(milestones, calls)
        for part, start, end in zip(inner, starts, [*(each - 1 for each in milestones), calls], strict=True):
            if start <= starts[last]:
                yield from _parts(part, min(calls, end) - start)
    else:
        for part in inner:
            yield from _parts(part, calls)
