"""Where a loop of the user's own is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from ..checkpoint.manager import Moment


@dataclass
class Place:
    """The same on all ranks. The script's lines between two batches are its own: a place is at a loader's next batch.

    Attributes:
        epoch: from 1; in it
        finished: so many iterations over loaders are over,
        active: and of those that go on, the outermost first, so many batches are done, by the loader's number;
        results: what `compute` and `report` gave between iterations.
        step: batches whose loss was scaled, since the run began.
        reported: the step after which the last row was made.
        lr: of the last step; None before the first.
        verdict: why the run ends with this epoch, where it ends early.
    """

    epoch: int = 1
    finished: int = 0
    active: dict[int, int] = field(default_factory=dict)
    results: list[Any] = field(default_factory=list)
    step: int = 0
    reported: int = 0
    lr: float | Tensor | None = None
    verdict: str | None = None

    @property
    def moment(self) -> Moment:
        """What names a checkpoint that is made here: within an epoch, or at the end of the one before."""
        if self.active:
            return Moment(self.step, has_row=self.step > 0 and self.reported == self.step)
        return Moment(self.step, self.epoch - 1)

    def end_epoch(self) -> None:
        """Move on to the next epoch."""
        self.epoch += 1
        self.finished = 0
        self.results = []

    def state_dict(self) -> dict[str, Any]:
        return {**asdict(self), "lr": None if self.lr is None else float(self.lr)}
