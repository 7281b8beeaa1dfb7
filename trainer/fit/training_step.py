"""One optimizer step, by the gradient of the whole batch's mean, however the batch is split."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dtrain.errors import UserError
from dtrain.run.heartbeat import Phase

from ..checks.optimizer_kinds import is_two_step, needs_closure, require_rates
from ..data.indexed import MicroBatch
from ..distributed.torch_private import multiply_
from ..distributed.world import World
from ..loss.step import Outcome, as_units
from ..metrics.epoch_totals import Tally
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

    def __call__(self, micro_batches: Iterable[MicroBatch]) -> None:
        """Make the step. A batch that a collate function has left out whole, on all ranks, passes without one."""
        trained, position = self._trained, self._progress.position
        number = position.step + 1
        trained.freezing.follow(position.step, position.epoch - 1)
        self._read_rate()
        is_done = self._with_closure(micro_batches) if self._by_closure else self._by_gradient(micro_batches, number)
        if trained.ema is not None and is_done:
            trained.ema.update()
        trained.scheduling.after_step(number)

    def _read_rate(self) -> None:
        optimizer = self._trained.optimizer
        lr = optimizer.param_groups[0].get("lr", float("nan"))
        self._progress.lr = lr.clone() if isinstance(lr, Tensor) else lr  # a scheduler changes a tensor in place
        if not (isinstance(lr, Tensor) or lr >= 0):  # a tensor is looked at when an epoch begins
            require_rates(optimizer, self._progress.position.step)

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
        if not outcome.total.requires_grad:
            raise UserError(
                "the loss does not depend on the model: something was detached on the way to it (detach(), item(), "
                "numpy, torch.no_grad, argmax), and nothing can be learned from it"
            )
        if not self._progress.samples_done:  # in this process's first step
            self._trained.model.require_all_used(outcome.total, self._trained.optimizer)
        return outcome


class BatchWeight:
    """A batch's weight, which its gradient is divided by: its samples, or the units that a step has counted.

    The number of samples is known from the start, so that each part's loss is divided by it. How many units all ranks
    have is known only after the last part: until then the gradient is one per sample, and is corrected afterwards.

    Attributes:
        own: the units of this rank's parts so far; None where they are its samples.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._samples = 0  # over all ranks
        self._summed: Callable[[], Tensor] | None = None
        self.own: Tensor | None = None

    @property
    def is_summed(self) -> bool:
        """Whether the gradient is still to be corrected, by the sum of all ranks' units."""
        return self._summed is not None

    def scale(self, outcome: Outcome, part: MicroBatch) -> float | Tensor:
        """The factor for a part's summed loss before its backward pass.

        All ranks take part, at the batch's last part, in a sum that overlaps with that pass.
        """
        # DDP averages over the ranks where the batch's gradient is a sum over them: hence the world size.
        self._samples = part.batch_samples
        scale = self._world.world_size / part.batch_samples
        if outcome.weight is None:
            return scale
        self.own = outcome.weight if self.own is None else self.own + outcome.weight
        if part.is_whole and self._world.world_size == 1:
            return 1.0 / self.own.where(self.own != 0, 1.0).to(outcome.total.dtype)
        if part.is_last:
            self._summed = self._world.begin_sum(self.own)
        return scale

    def rescale(self, gradients: list[Tensor]) -> None:
        """Turn the gradients of the mean over the batch's samples into those of the mean over all ranks' units."""
        assert self._summed is not None
        units = self._summed()
        scale = self._samples / units.where(units != 0, 1.0)  # no unit counts: the gradients are zeros, as torch's are
        multiply_(gradients, scale.to(gradients[0].device, gradients[0].dtype))
