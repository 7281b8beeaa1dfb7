"""What a phase (train or val) of an epoch adds up on this rank: its loss, and its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from dtrain.errors import UserError

from .reduce import State, Value
from .step import Outcome

if TYPE_CHECKING:  # metrics need torchmetrics, whose import a job without metrics does not pay for
    from .metrics import MetricSet


class Tally:
    """Local sums, made without waiting for the device; `reduce_states` brings those of all ranks together."""

    def __init__(self, phase: str, device: torch.device, metrics: MetricSet | None = None) -> None:
        self.phase = phase
        self.metrics = metrics
        self.samples = 0  # on this rank
        # Float64, so that an epoch's loss depends on neither the number of steps nor that of ranks.
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._weight = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def names(self) -> list[str]:
        """What `finish` reports, but for metrics that give several values."""
        metrics = [] if self.metrics is None else list(self.metrics.names)
        return [f"{self.phase}_{name}" for name in ["loss", *metrics]]

    def add(self, outcome: Outcome, samples: int) -> None:
        """Take in a micro-batch of this rank."""
        self.samples += samples
        self._loss += outcome.total.detach()
        self._weight += samples if outcome.weight is None else outcome.weight
        if self.metrics is not None:
            if outcome.predictions is None or outcome.target is None:
                raise UserError("metrics need `predictions` and `target` in what step returns")
            self.metrics.update(outcome.predictions, outcome.target)

    def mean_loss(self) -> float:
        """This rank's mean loss so far. Waits for the device: not for every step."""
        return float(self._loss / self._weight)

    def states(self) -> list[State]:
        """What takes part in the epoch's synchronisation."""
        metrics = [] if self.metrics is None else self.metrics.states()
        return [State(self._loss, "sum"), State(self._weight, "sum"), *metrics]

    def finish(self, reduced: Sequence[Value]) -> dict[str, Any]:
        """The values to report, from the states of all ranks: PHASE_loss and PHASE_<metric>. Rank 0 only."""
        loss, weight, *states = reduced
        values: dict[str, Any] = {"loss": float(cast(Tensor, loss) / cast(Tensor, weight))}
        if self.metrics is not None:
            values |= self.metrics.finish(states)
        return {f"{self.phase}_{name}": value for name, value in values.items()}

    def reset(self) -> None:
        """Begin an epoch."""
        self.samples = 0
        self._loss.zero_()
        self._weight.zero_()
        if self.metrics is not None:
            self.metrics.reset()

    def state_dict(self) -> dict[str, Any]:
        """This rank's sums in the middle of an epoch."""
        metrics = None if self.metrics is None else self.metrics.state_dict()
        return {"samples": self.samples, "loss": self._loss, "weight": self._weight, "metrics": metrics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.samples = state["samples"]
        self._loss.copy_(state["loss"])
        self._weight.copy_(state["weight"])
        if self.metrics is not None:
            self.metrics.load_state_dict(state["metrics"])

    def load_merged(self, states: Sequence[dict[str, Any]]) -> None:
        """Take over the sums of all ranks of another number of ranks. For rank 0 alone; the others stay empty."""
        self.samples = sum(state["samples"] for state in states)
        self._loss.copy_(torch.stack([state["loss"] for state in states]).sum())
        self._weight.copy_(torch.stack([state["weight"] for state in states]).sum())
        if self.metrics is not None:
            self.metrics.load_state_dict(self.metrics.merge([state["metrics"] for state in states]))
