"""A fit's progress: its position, what it has reported, and what each rank's heartbeat shows of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from dtrain.run.folder import Row
from dtrain.run.heartbeat import Beat, Heartbeat, Phase
from dtrain.schema.sections import Fit

from ..distributed.wishes import Wish
from ..metrics.early_stopping import Best
from ..metrics.speed import Speed
from .data import FitData


@dataclass
class Position:
    """The fit continues with batch `step_in_epoch` (from 0) of `epoch` (from 1)."""

    epoch: int = 1
    step_in_epoch: int = 0
    step: int = 0  # optimizer steps since the run began
    reported: int = 0  # the step after which training was last reported
    validated: int = 0  # the step after which the model was last validated

    @property
    def has_row(self) -> bool:
        """Whether a row was made after the last step."""
        return self.step > 0 and self.step in (self.reported, self.validated)


class Progress:
    """The same on all ranks, but for what has been measured in this process. No collective anywhere.

    Attributes:
        rows: those made so far.
        asked: what a rank's clock or a callback has asked for, and is not done yet.
        is_ended: whether a callback has asked for the end.
        rates: the learning rates of the last step done: lr, and lr_NAME of each of several optimizers.
        samples_done, steps_done: over all ranks, since this process began.
        speed: of the training since the last report, in this process.
        step_s, checkpoint_s: how long the last step, and the last checkpoint, took.
        loss: the last one that this rank has looked at.
    """

    def __init__(self, fit: Fit, best: Best, data: FitData, heartbeat: Heartbeat) -> None:
        self._max_epochs, self._max_steps = fit.epochs, fit.steps
        self.best = best
        self.heartbeat = heartbeat
        self._data = data
        self.position = Position()
        self.rows: list[Row] = []
        self.rates: dict[str, float | Tensor] = {"lr": math.nan}
        self.samples_done = self.steps_done = 0
        self.asked: set[Wish] = set()
        self.is_ended = False
        self.speed = Speed()
        self.step_s = self.checkpoint_s = 0.0
        self.loss = math.nan

    @property
    def is_over(self) -> bool:
        """Whether no step is left to do."""
        return self.is_ended or self.is_long_enough or self.best.verdict is not None

    @property
    def is_long_enough(self) -> bool:
        """Whether all of its epochs, or its steps, are done."""
        position, epochs, steps = self.position, self._max_epochs, self._max_steps
        is_at_end = steps is not None and position.step >= steps and position.has_row
        return is_at_end or (epochs is not None and position.epoch > epochs)

    def ends(self, *, epoch_ends: bool) -> bool:
        """Whether no other step is to follow on the last one, with which an epoch ends or not."""
        position, epochs, steps = self.position, self._max_epochs, self._max_steps
        is_last_epoch = epoch_ends and epochs is not None and position.epoch >= epochs
        return is_last_epoch or (steps is not None and position.step >= steps)

    @property
    def is_at_epochs_end(self) -> bool:
        """Whether no step is left of this epoch, as far as that is known before the next batch is asked for."""
        return self.position.step_in_epoch == self._data.train.num_steps

    @property
    def epoch(self) -> float:
        """How many epochs are done: within one a fraction, where it is known how long one is."""
        position, steps = self.position, self._data.train.num_steps
        if not position.step_in_epoch or not steps:
            return position.epoch - 1
        return position.epoch if self.is_at_epochs_end else position.epoch - 1 + position.step_in_epoch / steps

    def end_step(self, samples: int, seconds: float) -> None:
        """Record a finished step with this many samples over all ranks."""
        self.samples_done += samples
        self.speed.add(samples)
        self.steps_done += 1
        self.position.step += 1
        self.position.step_in_epoch += 1
        self.step_s = seconds

    def end_report(self, *, training: bool, validation: bool) -> None:
        """Note of what a row has been made after the last step."""
        if training:
            self.position.reported = self.position.step
        if validation:
            self.position.validated = self.position.step

    def end_epoch(self) -> None:
        """Move on to the next epoch."""
        self.position = replace(self.position, epoch=self.position.epoch + 1, step_in_epoch=0)

    def enter(self, phase: Phase) -> None:
        """Show the phase that this rank enters within the same step."""
        self.heartbeat.enter(phase)

    def beat(self, phase: Phase = Phase.LOADING, validated: int = 0, num_batches: int | None = None) -> None:
        """Show this rank's position.

        Args:
            validated: batches, while it validates, of `num_batches` of the set.
        """
        position, steps = self.position, self._data.train.num_steps
        if self._max_steps is not None:  # of a stream without an end, the run's steps are those of its only epoch
            steps = min(steps or self._max_steps, position.step_in_epoch + self._max_steps - position.step)
        if validated:
            steps = num_batches
        epochs, is_past = self._epochs(), not position.step_in_epoch and self.is_over
        self.heartbeat.beat(
            Beat(
                epoch=min(position.epoch - is_past, epochs),  # the last one, at the end
                epochs=epochs,
                step=position.step,
                step_in_epoch=validated or position.step_in_epoch,
                steps_in_epoch=steps or 0,
                samples=float(self.samples_done),
                loss=self.loss,
                phase=phase,
                stop_s=self.step_s + self.checkpoint_s,
            )
        )

    def _epochs(self) -> int:
        """How many epochs there will be, also if only the number of steps is given; at least those begun."""
        if self._max_steps is None or not (steps := self._data.train.num_steps):
            return self._max_epochs or self.position.epoch
        by_steps = -(-self._max_steps // steps)
        return by_steps if self._max_epochs is None else min(by_steps, self._max_epochs)

    def state_dict(self) -> dict[str, Any]:
        """Its part of a checkpoint."""
        return {
            "place": asdict(self.position),
            "rows": self.rows,
            "rates": {name: float(rate) for name, rate in self.rates.items()},
            "best": self.best.state_dict(),
            "asked": sorted(int(wish) for wish in self.asked),
            "is_ended": self.is_ended,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = Position(**state["place"])
        self.rows = state["rows"]
        self.rates = state["rates"] if "rates" in state else {"lr": state["lr"]}  # in a checkpoint of version 0.1
        self.best.load_state_dict(state["best"])
        self.asked = {Wish(each) for each in state.get("asked", ())}
        self.is_ended = state.get("is_ended", False)
