"""What a phase (train, val, val_NAME) of an epoch accumulates on this rank: loss, metrics, and what a step logs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from dtrain.errors import UserError, among
from dtrain.schema.metrics.values import Result

from ..loss.step import Outcome
from .logged import Logged
from .reduce import LocalState, Value

if TYPE_CHECKING:  # metrics need torchmetrics, whose import a job without metrics does not pay for
    from .metric_set import MetricSet


class Tally:
    """Local sums, made without waiting for the device; `reduce_states` combines those of all ranks.

    Args:
        metrics: those that this phase reports.
        known: the names of all phases' metrics, for which a step may return arguments.
    """

    def __init__(
        self, phase: str, device: torch.device, metrics: MetricSet | None = None, known: Collection[str] = ()
    ) -> None:
        self.phase = phase
        self.metrics = metrics
        self._known = known
        self.samples = 0  # on this rank
        # Float64, so that an epoch's loss depends on neither the number of steps nor that of ranks.
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._weight = torch.zeros((), dtype=torch.float64, device=device)
        self.logged = Logged(device, {"loss", *known})

    @property
    def loss_name(self) -> str:
        """What its loss is reported as."""
        return f"{self.phase}_loss"

    def known(self, monitor: str) -> dict[str, dict[str, Result] | None]:
        """What is reported, as far as it is known before the first sample: see `monitor_problem`."""
        known: dict[str, dict[str, Result] | None] = {self.loss_name: {self.loss_name: 0.0}}
        for name in [] if self.metrics is None else self.metrics.names:
            reported = f"{self.phase}_{name}"
            is_meant = monitor == reported or monitor.startswith(f"{reported}_")
            values = self.metrics.values_of_no_sample(name) if self.metrics is not None and is_meant else None
            known[reported] = values and {f"{self.phase}_{key}": value for key, value in values.items()}
        return known

    def add(self, outcome: Outcome, samples: int, batch: int) -> None:
        """Add a micro-batch of this rank, which belongs to the batch of that number."""
        self.samples += samples
        self._loss += outcome.total.detach()
        self._weight += samples if outcome.weight is None else outcome.weight
        if outcome.logs is not None:
            self.logged.add(outcome.logs)
        for name in outcome.metrics.keys() - self._known if outcome.metrics else ():
            raise UserError(f"step returns arguments of the metric {name}; {among(name, sorted(self._known))}")
        if self.metrics is not None:
            self._require_arguments(self.metrics, outcome)
            self.metrics.update(outcome.predictions, outcome.target, outcome.metrics, batch=batch, samples=samples)

    def _require_arguments(self, metrics: MetricSet, outcome: Outcome) -> None:
        if outcome.predictions is not None and outcome.target is not None:
            return
        if lacking := [name for name in metrics.names if name not in outcome.metrics]:
            mend = "; or leave these metrics out of training: `train: false` (Trainer: train_metrics=[...])"
            raise UserError(
                f"{self.phase} metrics {', '.join(lacking)} need `predictions` and `target` in what step returns, or "
                f"arguments of their own in its `metrics`{mend if self.phase == 'train' else ''}"
            )

    def mean_loss(self) -> float:
        """This rank's mean loss so far. Waits for the device: don't call it every step."""
        return float(self._loss / self._weight)

    def states(self) -> list[LocalState]:
        """The states for the epoch's synchronisation."""
        metrics = [] if self.metrics is None else self.metrics.states()
        return [LocalState(self._loss, "sum"), LocalState(self._weight, "sum"), self.logged.state(), *metrics]

    def finish(self, reduced: Sequence[Value]) -> dict[str, Any]:
        """The values to report, from the states of all ranks: PHASE_loss, PHASE_<metric>, PHASE_<logged>. Rank 0 only.

        Raises:
            UserError: a step has logged other names on other ranks.
        """
        loss, weight, logged, *states = reduced
        values: dict[str, Any] = {"loss": float(cast(Tensor, loss) / cast(Tensor, weight))}
        values |= Logged.finish(cast("list[Any]", logged))
        if self.metrics is not None:
            values |= self.metrics.finish(states)
        return {f"{self.phase}_{name}": value for name, value in values.items()}

    def reset(self) -> None:
        """Begin an epoch."""
        if self.metrics is not None:
            self.metrics.reset()
            if self.samples:
                self.metrics.trust()  # whose samples belong to the previous epoch
        self.samples = 0
        self._loss.zero_()
        self._weight.zero_()
        self.logged.reset()

    def state_dict(self) -> dict[str, Any]:
        """This rank's sums in the middle of an epoch."""
        metrics = None if self.metrics is None else self.metrics.state_dict()
        sums = {"samples": self.samples, "loss": self._loss, "weight": self._weight}
        return {**sums, "logged": self.logged.state_dict(), "metrics": metrics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.samples = state["samples"]
        self._loss.copy_(state["loss"])
        self._weight.copy_(state["weight"])
        if "logged" in state:  # not in a checkpoint of version 0.1
            self.logged.load_state_dict(state["logged"])
        if self.metrics is not None:
            self.metrics.load_state_dict(state["metrics"])

    def load_merged(self, states: Sequence[dict[str, Any]]) -> None:
        """Take over the sums of all ranks of another number of ranks. For rank 0 alone; the others stay empty."""
        self.samples = sum(state["samples"] for state in states)
        self._loss.copy_(torch.stack([state["loss"] for state in states]).sum())
        self._weight.copy_(torch.stack([state["weight"] for state in states]).sum())
        self.logged.load_merged([state["logged"] for state in states if "logged" in state])
        if self.metrics is not None:
            self.metrics.load_state_dict(self.metrics.merge([state["metrics"] for state in states]))
