"""The learning-rate schedulers of a run: one, or one for each of several optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dtrain.run.folder import Row

from ..checkpoint.codec import require_data
from .run_length import Interval, RunLength
from .scheduler import Schedule


class Scheduling:
    """Schedules by the names of the optimizers whose rates they change; that of a single optimizer is called "".

    What a checkpoint has of a single one is that schedule's own state; of named ones, the states by name.
    """

    def __init__(self, schedules: Mapping[str, Schedule] | None = None) -> None:
        self.schedules = dict(schedules or {})

    @classmethod
    def of(
        cls,
        scheduler: Any,
        interval: Interval | Mapping[str, Interval] = "epoch",
        monitor: str | Mapping[str, str | None] | None = None,
    ) -> Scheduling:
        """That of a scheduler, or of several by name; so are their intervals and monitors, unless one is for all."""
        if scheduler is None:
            return cls()
        by_name = scheduler if isinstance(scheduler, Mapping) else {"": scheduler}
        intervals = interval if isinstance(interval, Mapping) else dict.fromkeys(by_name, interval)
        monitors = monitor if isinstance(monitor, Mapping) else dict.fromkeys(by_name, monitor)
        found = {
            name: Schedule(each, intervals.get(name, "epoch"), monitors.get(name) or "")
            for name, each in by_name.items()
        }
        return cls(found)

    def begin(self, length: RunLength) -> Scheduling:
        """This, in a run of that length; see `Schedule.begin`."""
        return self.map(lambda schedule: schedule.begin(length))

    def map(self, function: Callable[[Schedule], Schedule]) -> Scheduling:
        """This, with other schedules in their places."""
        return Scheduling({name: function(each) for name, each in self.schedules.items()})

    def after_step(self, step: int) -> None:
        """Make the steps that follow on an optimizer step of that number."""
        for each in self.schedules.values():
            each.after_step(step)

    def after_row(self, row: Row, *, epoch_ends: bool) -> None:
        """Make the steps that follow on a row, or on an epoch."""
        for each in self.schedules.values():
            each.after_row(row, epoch_ends=epoch_ends)

    @property
    def monitors(self) -> list[str]:
        """The values that they may look at."""
        return [each.monitor for each in self.schedules.values()]

    @property
    def kind(self) -> str | None:
        """The classes whose state no other class can load."""
        kinds = {name: type(each.scheduler).__name__ for name, each in self.schedules.items()}
        return ", ".join(f"{name}: {kind}" if name else kind for name, kind in kinds.items()) or None

    def require_savable(self) -> None:
        """Raise UserError if a checkpoint can't hold a state."""
        for each in self.schedules.values():
            require_data("scheduler", each.scheduler, each.state_dict())

    def state_dict(self) -> Any:
        return self._of_each(Schedule.state_dict)

    def beginning_state(self) -> Any:
        """What tells a run that goes on whether its schedules are those that it began with."""
        return self._of_each(Schedule.beginning_state)

    def load_state_dict(self, state: Any, beginning: Any = None) -> None:
        """Continue with the schedules of a run that had that `beginning_state`; see `Schedule.load_state_dict`."""
        for name, each in self.schedules.items():
            own = (state[name], beginning and beginning[name]) if name else (state, beginning)
            each.load_state_dict(*own)

    def _of_each(self, function: Callable[[Schedule], Any]) -> Any:
        found = {name: function(each) for name, each in self.schedules.items()}
        return found.get("", found or None)
