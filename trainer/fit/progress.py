"""A fit's progress: its position, what it has reported, and what each rank's heartbeat shows of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from dtrain.run.folder import Row
from dtrain.run.heartbeat import Beat, Heartbeat, Phase

from ..metrics.early_stopping import Best
from .data import FitData


@dataclass
class Position:
    """The fit continues with batch `step_in_epoch` (from 0) of `epoch` (from 1)."""

    epoch: int = 1
    step_in_epoch: int = 0
    step: int = 0  # optimizer steps since the run began


class Progress:
    """The same on all ranks, but for what has been measured in this process. No collective anywhere.

    Attributes:
        rows: of the epochs done.
        lr: of the last step done.
        samples_done, steps_done: over all ranks, since this process began.
        samples_per_s: of this epoch's training in this process.
        step_s, checkpoint_s: how long the last step, and the last checkpoint, took.
        loss: the last one that this rank has looked at.
    """

    def __init__(self, epochs: int, best: Best, data: FitData, heartbeat: Heartbeat) -> None:
        self.epochs = epochs
        self.best = best
        self.heartbeat = heartbeat
        self._data = data
        self.position = Position()
        self.rows: list[Row] = []
        self.lr: float | Tensor = math.nan
        self.samples_done = self.steps_done = 0
        self.samples_per_s: float | None = None
        self.step_s = self.checkpoint_s = 0.0
        self.loss = math.nan

    @property
    def is_over(self) -> bool:
        """Whether no epoch is left to do."""
        return self.position.epoch > self.epochs or self.best.exhausted

    def end_step(self, samples: int, seconds: float) -> None:
        """Record a finished step with this many samples over all ranks."""
        self.samples_done += samples
        self.steps_done += 1
        self.position.step += 1
        self.position.step_in_epoch += 1
        self.step_s = seconds

    def end_epoch(self, row: Row) -> bool:
        """Record a finished epoch and its row; whether it is the best so far."""
        self.rows.append(row)
        self.position = Position(self.position.epoch + 1, 0, self.position.step)
        return self.best.update(row)

    def enter(self, phase: Phase) -> None:
        """Show the phase that this rank enters within the same step."""
        self.heartbeat.enter(phase)

    def beat(self, phase: Phase = Phase.LOADING, validated: int = 0) -> None:
        """Show this rank's position.

        Args:
            validated: batches, while it validates.
        """
        batches = self._data.val if validated and self._data.val else self._data.train
        self.heartbeat.beat(
            Beat(
                epoch=min(self.position.epoch - self.is_over, self.epochs),  # the last one, at the end
                epochs=self.epochs,
                step=self.position.step,
                step_in_epoch=validated or self.position.step_in_epoch,
                steps_in_epoch=batches.num_steps or 0,
                samples=float(self.samples_done),
                loss=self.loss,
                phase=phase,
                stop_s=self.step_s + self.checkpoint_s,
            )
        )

    def state_dict(self) -> dict[str, Any]:
        """Its part of a checkpoint."""
        return {
            "place": asdict(self.position),
            "rows": self.rows,
            "lr": float(self.lr),
            "best": self.best.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = Position(**state["place"])
        self.rows = state["rows"]
        self.lr = state["lr"]
        self.best.load_state_dict(state["best"])
