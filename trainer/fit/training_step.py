"""One optimizer step, by the gradient of the whole batch's mean, however the batch is split."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from dtrain.run.heartbeat import Phase

from ..checks.optimizer_kinds import is_two_step, needs_closure, require_rates
from ..data.indexed import MicroBatch
from ..loss.batch_weight import BatchWeight
from ..loss.step import Outcome, as_units, require_graph
from ..loss.user_step import LossByLoss
from ..metrics.epoch_totals import Tally
from ..model.optimizers import Optimizers
from .loss_by_loss import StepByLosses
from .progress import Progress
from .step_trial import StepTrial
from .trained import Trained


class TrainingStep:
    """Trains on one batch at a time. All ranks take part in each method.

    Args:
        tally: takes in the losses and predictions.
    """

    def __init__(self, trained: Trained, tally: Tally, progress: Progress) -> None:
        self._trained = trained
        self._tally = tally
        self._progress = progress
        self._trial = StepTrial(trained, progress)
        self._by_closure = needs_closure(trained.optimizer)
        optimizer = trained.optimizer
        self._rated = {"lr": optimizer}
        if isinstance(optimizer, Optimizers):
            self._rated |= {f"lr_{name}": each for name, each in optimizer.members.items()}
        self._by_losses: StepByLosses | None = None
        if isinstance(trained.step, LossByLoss):
            self._by_losses = StepByLosses(trained, trained.step, progress)
        else:
            trained.model.divide([])  # an earlier fit may have had several losses

    def __call__(self, micro_batches: Iterable[MicroBatch]) -> None:
        """Make the step. A batch that a collate function has left out whole, on all ranks, passes without one."""
        trained, position = self._trained, self._progress.position
        number = position.step + 1
        trained.freezing.follow(position.step, position.epoch - 1)
        self._read_rate()
        is_done = self._learn(micro_batches, number)
        if trained.ema is not None and is_done:
            trained.ema.update()
        trained.scheduling.after_step(number)

    def _learn(self, micro_batches: Iterable[MicroBatch], number: int) -> bool:
        """Make the optimizer's step, or those of several; whether all were made."""
        if self._by_losses is not None:
            return self._loss_by_loss(self._by_losses, list(micro_batches), number)
        return self._with_closure(micro_batches) if self._by_closure else self._by_gradient(micro_batches, number)

    def _read_rate(self) -> None:
        for name, optimizer in self._rated.items():
            lr = optimizer.param_groups[0].get("lr", float("nan"))
            self._progress.rates[name] = lr.clone() if isinstance(lr, Tensor) else lr  # schedules change it in place
            if not (isinstance(lr, Tensor) or lr >= 0):  # a tensor is looked at when an epoch begins
                require_rates(self._trained.optimizer, self._progress.position.step)

    def _by_gradient(self, micro_batches: Iterable[MicroBatch], number: int) -> bool:
        """The step of an ordinary optimizer; whether it was made."""
        trained = self._trained
        seen = copy.deepcopy(self._tally.state_dict()) if trained.update.may_skip else None
        trained.model.zero_grad(trained.optimizer)
        totals, _ = self.backward(micro_batches)
        is_done = bool(totals) and trained.update.apply(number)
        if not is_done and seen is not None:
            self._tally.load_state_dict(seen)
        return is_done

    def _loss_by_loss(self, step: StepByLosses, micro_batches: list[MicroBatch], number: int) -> bool:
        """The steps that follow on one loss after the other; whether all were made."""
        outcomes, is_done = step(micro_batches, number)
        for i, (outcome, micro_batch) in enumerate(zip(outcomes, micro_batches, strict=True)):
            self._trial.look(outcome, micro_batch, i)
            if micro_batch.samples and (is_done or not self._trained.update.may_skip):
                self._tally.add(outcome, micro_batch.samples, number - 1)
        return is_done and bool(micro_batches)

    def _with_closure(self, micro_batches: Iterable[MicroBatch]) -> bool:
        """The step of an optimizer that evaluates the batch several times; whether it was made.

        Each evaluation brings all ranks the same loss and gradient, so that they ask for equally many.
        """
        optimizer, parts, evaluations = self._trained.optimizer, list(micro_batches), itertools.count()
        if not parts:
            return False

        @torch.enable_grad()
        def closure() -> Tensor:
            optimizer.zero_grad()
            totals, weight = self.backward(parts, counted=next(evaluations) == 0)
            samples = sum(micro_batch.samples for micro_batch in parts)
            units = as_units(samples if weight is None else weight, totals[0].device)
            sums = self._trained.world.sum(torch.stack([torch.stack(totals).sum().double(), units]))
            mean: Tensor = sums[0] / sums[1].where(sums[1] != 0, 1.0)
            return mean

        if is_two_step(optimizer):
            closure()  # it starts from the batch's gradient
        optimizer.step(closure)  # type: ignore[arg-type]  # torch's stub says float, its LBFGS takes a tensor
        return True

    def backward(
        self, micro_batches: Iterable[MicroBatch], *, counted: bool = True
    ) -> tuple[list[Tensor], Tensor | None]:
        """Add the batch's gradient to the parameters'.

        Returns the losses of this rank's parts, as sums, and their weight where it isn't the number of samples. With
        `counted` they go into the epoch's loss and metrics.
        """
        model, precision, position = self._trained.model, self._trained.precision, self._progress.position
        totals: list[Tensor] = []
        weight = BatchWeight(self._trained.world)
        for i, micro_batch in enumerate(micro_batches):
            undone = contextlib.nullcontext() if micro_batch.samples else model.preserving_state()
            with model.accumulating(last=micro_batch.is_last), undone:
                outcome = self._forward(micro_batch)
                self._progress.enter(Phase.BACKWARD)
                scale = weight.scale(outcome, micro_batch)
                model.backward(precision.scaled(outcome.total * scale))
            if micro_batch.is_last:
                model.require_averaged(outcome.total, position.step + 1)
            if counted:  # after the backward pass, which needs the buffers as they were
                self._trial.look(outcome, micro_batch, i)
            totals.append(outcome.total.detach())
            if micro_batch.samples and counted:
                self._tally.add(outcome, micro_batch.samples, position.step)
        model.loss.average_gradients()
        if weight.is_summed:
            weight.rescale(model.gradients(self._trained.optimizer))
        return totals, weight.own

    def _forward(self, micro_batch: MicroBatch) -> Outcome:
        self._progress.enter(Phase.FORWARD)
        outcome = self._trained.model.run(self._trained.step, micro_batch)
        require_graph(outcome)
        if not self._progress.samples_done:  # in this process's first step
            self._trained.model.require_all_used(outcome.total, self._trained.optimizer)
        return outcome
