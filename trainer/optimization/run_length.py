"""How long a run is: the one place that says so, to schedules and to what job.yaml calls `${run.steps}`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dtrain.schema.sections import Fit

Interval = Literal["epoch", "step"]


@dataclass(frozen=True)
class RunLength:
    """A run's length, on any number of ranks: a step is one of the optimizer, for a whole batch.

    Each number is None where it is not known in advance.

    Attributes:
        epochs: those that are completed.
    """

    epochs: int | None
    steps: int | None
    steps_per_epoch: int | None

    @classmethod
    def of(cls, fit: Fit, steps_per_epoch: int | None) -> RunLength:
        """That of a run with these settings."""
        steps, epochs = fit.steps, fit.epochs
        if epochs is not None:
            by_epochs = None if steps_per_epoch is None else epochs * steps_per_epoch
            steps = None if by_epochs is None else min(by_epochs, steps or by_epochs)
        if steps is not None and steps_per_epoch:
            epochs = steps // steps_per_epoch
        return cls(epochs, steps, steps_per_epoch)

    def intervals(self, interval: Interval) -> int | None:
        """How often that interval ends in the run."""
        return self.epochs if interval == "epoch" else self.steps
