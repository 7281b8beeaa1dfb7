"""When a fit reports, validates and saves. The same on all ranks, but for what a clock decides, on which they agree."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import NamedTuple

from dtrain.errors import Problem, UserError
from dtrain.schema.interval import Interval, seconds

from ..checks.arguments import Settings
from ..distributed.wishes import Wish
from ..optimization.run_length import RunLength
from .progress import Position


class Due(NamedTuple):
    """What is due after a step.

    Attributes:
        report: of the training since the last one.
    """

    report: bool
    validation: bool
    checkpoint: bool

    @property
    def row(self) -> bool:
        """Whether there is something to write a row of."""
        return self.report or self.validation

    @property
    def anything(self) -> bool:
        return self.report or self.validation or self.checkpoint


class Cadence:
    """What is due, by the settings.

    Args:
        validates: whether there is something to validate.
        num_steps: optimizer steps of an epoch, where that is known.

    Raises:
        UserError: what is asked for comes after the run's end.
    """

    def __init__(self, settings: Settings, *, validates: bool, num_steps: int | None) -> None:
        fit, checkpoint = settings.fit, settings.checkpoint
        self._report, self._validation = Interval.of(fit.report_every), Interval.of(fit.validate_every)
        self._checkpoint = Interval.of(checkpoint.every)
        self._validates = validates
        self._save_every_s, self._max_s = seconds(checkpoint.every), seconds(fit.max_time)
        self._began = self._saved_at = time.monotonic()
        if not validates and fit.validate_every != "epoch":
            raise UserError(Problem("there is nothing to validate: give val_data", "fit.validate_every"))
        length = RunLength.of(fit, num_steps).steps
        for name, interval in (("report_every", self._report), ("validate_every", self._validation)):
            _require_within(f"fit.{name}", interval, length, num_steps)

    def due(self, position: Position, asked: Collection[Wish], *, epoch_ends: bool, run_ends: bool) -> Due:
        """What is due after the last step, or asked for; what has been done there isn't."""
        step, epoch = position.step, position.epoch if epoch_ends else 0

        def is_over(interval: Interval | None) -> bool:
            return run_ends or (interval is not None and interval.is_over(step, epoch))

        return Due(
            report=position.reported != step and is_over(self._report),
            validation=self._validates
            and position.validated != step
            and (Wish.VALIDATE in asked or is_over(self._validation)),
            checkpoint=Wish.SAVE in asked or is_over(self._checkpoint),
        )

    @property
    def is_time_to_save(self) -> bool:
        """Whether the last checkpoint is so long ago that another is due, by this rank's clock."""
        return self._save_every_s is not None and time.monotonic() - self._saved_at >= self._save_every_s

    def saved(self) -> None:
        """A checkpoint has been made now."""
        self._saved_at = time.monotonic()

    @property
    def is_time_up(self) -> bool:
        """Whether this launch has trained for as long as it may, by this rank's clock."""
        return self._max_s is not None and time.monotonic() - self._began >= self._max_s


def _require_within(path: str, interval: Interval | None, length: int | None, num_steps: int | None) -> None:
    if interval is None or length is None:
        return
    first = interval.count if interval.unit == "step" else interval.count * (num_steps or 0)
    if first > length and interval != Interval(1, "epoch"):
        raise UserError(Problem(f"{interval} never comes: this run has {length} steps", path))
