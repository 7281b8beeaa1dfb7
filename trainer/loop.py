"""The training loop: what happens, when, and which ranks take part.

Every rank runs this same loop in step with the others. A method says which ranks take part in its collectives;
what only rank 0 does (files, reports) stands under `if self.world.is_main`.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dtrain.errors import UserError
from dtrain.run.folder import Row, RunDir
from dtrain.run.heartbeat import Beat, Heartbeat, Phase
from dtrain.schema.sections import Checkpoint

from .checkpoint.background import Background, Disk, say
from .checkpoint.codec import require_data
from .checkpoint.manager import Checkpoints, Moment, Snapshot, restore_best
from .checkpoint.results import Results
from .checks.optimizer_kinds import is_two_step, judged, needs_closure, require_rates, start_training, stop_training
from .data.batch_tensors import ways_to_take
from .data.indexed import Batch, Batches, MicroBatch
from .distributed.seeds import derive_seed, rng_kept, rng_state, seed_everything, set_rng_state
from .distributed.stop import DOUBT, StopAgreement, Stopped
from .distributed.world import World
from .loss.loss_trial import Pairs, standing_still, try_step
from .loss.step import Outcome, Step, as_units
from .metrics.early_stopping import Best
from .metrics.epoch_totals import Tally
from .metrics.reduce import reduce_states
from .model.buffers import shapes_of
from .model.learned_loss import beside
from .model.modes import begin_training
from .model.weights import mismatches
from .optimization.ema import Ema
from .optimization.learning_check import Learning
from .optimization.optimizer_step import Update
from .optimization.precision import Precision
from .optimization.scheduler import Interval, after_epoch, after_step, state_of
from .sample_mixing import warn_of_mixing
from .strategies.base import Parallel, matches

# In the paths of `shared_state`, the section and the name of the parameter.
_OF_PARAMETER = re.compile(r"(model|ema|optimizer)(?:/held/[^/]+)*(?:/state)?/([^/]+)(?:/[^/]+)?")
TRIED_AT = frozenset(
    10**k for k in range(10)
)  # a process's steps at which a user's step is tried: one may be a lucky one
LOOK_EVERY_S = 0.5  # how often rank 0 waits for its device to show a loss


@dataclass
class Place:
    """How far the run is. It continues with batch `step_in_epoch` (from 0) of `epoch` (from 1)."""

    epoch: int = 1
    step_in_epoch: int = 0
    step: int = 0  # optimizer steps since the run began


@dataclass(frozen=True)
class Schedule:
    """When things happen."""

    epochs: int
    checkpoint: Checkpoint
    scheduler_interval: Interval = "epoch"
    scheduler_monitor: str = ""  # what a scheduler is fed that wants a value


class Loop:
    """Trains until the last epoch, until patience runs out, or until all ranks agree to stop."""

    def __init__(
        self,
        run: RunDir,
        world: World,
        model: Parallel,
        step: Step,
        precision: Precision,
        update: Update,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        batches: tuple[Batches, Batches | None],
        tallies: Sequence[Tally],
        best: Best,
        schedule: Schedule,
        seed: int,
        ema: Ema | None = None,
    ) -> None:
        self.run_dir = run
        self.world = world
        self.model = model
        self.step = step
        self.precision = precision
        self.update = update
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.train_batches, self.val_batches = batches
        self.tallies = tallies
        self.by_closure = needs_closure(optimizer)
        self.train_tally = tallies[0]
        self.ema = ema
        self.best = best
        self.schedule = schedule
        report = say if world.is_main else lambda line: None
        self.learning = Learning(model, optimizer, report, scales=precision.name == "fp16")
        self.seed = seed
        self.place = Place()
        self.rows: list[Row] = []  # of the epochs done, the same on all ranks
        self.disk = Disk(run)
        self.results = Results(run, self.disk)
        self.checkpoints = Checkpoints(run, world, schedule.checkpoint.keep, self.disk, self.room)
        self.background = Background()
        self.heartbeat = Heartbeat(run.heartbeat(world.rank))
        self.stop, self.stop_evaluating = (StopAgreement(world, self.heartbeat) for _ in range(2))
        self.lr: float | Tensor = float("nan")  # of the last step done
        self.samples_per_s: float | None = None  # of this epoch's training in this process
        self.samples_done = self.steps_done = 0  # over all ranks, since this process began
        self.pairs = Pairs()
        self.is_to_try = False  # the user's step, since this is a step to do so or the one before could not
        self.step_s = self.checkpoint_s = 0.0  # how long the last ones took
        self._looked_at = 0.0
        self._shown_loss = float("nan")

    def run(self) -> None:
        """Train. All ranks take part.

        Raises:
            Stopped: all ranks agreed to stop; a checkpoint of this very step is saved.
        """
        try:
            with self.background:
                start_training(self.optimizer)
                self.require_savable()
                self.resume()
                begin_training(self.model.bare)
                while not self.is_over:
                    # All ranks: the batches of this epoch that are still to do, an optimizer step for each.
                    self.train_epoch()
                    # All ranks: evaluate rank 0's model, each rank on its own share of the validation set.
                    self.model.share_buffers()
                    self.validate()
                    # All ranks: what each has added up meets on rank 0, which reports it back to all.
                    row = self.report()
                    # All ranks: whether anything is learned is seen from the same row.
                    self.learning.judge(row, is_last=self.place.epoch == self.schedule.epochs)
                    # All ranks: the decision what is best is the same everywhere, made from the same row.
                    improved = self.finish_epoch(row)
                    # All ranks copy, and go on while the copies are written; rank 0 writes the results.
                    self.save(
                        results=True,
                        improved=improved,
                        checkpoint=self.schedule.checkpoint.every == "epoch" or self.is_over,
                    )
                self.settle()
                stop_training(self.optimizer)
                self.beat()
        finally:
            self.heartbeat.enter(Phase.DONE)

    @property
    def is_over(self) -> bool:
        """Whether no epoch is left to do."""
        return self.place.epoch > self.schedule.epochs or self.best.exhausted

    # -- training --------------------------------------------------------------------------------

    def train_epoch(self) -> None:
        """The rest of the epoch's steps. All ranks take part."""
        self.learning.begin(self.place.step)
        began, samples_before = time.perf_counter(), self.samples_done
        for batch in self.train_batches.epoch(self.place.epoch, self.place.step_in_epoch):
            step_began = time.perf_counter()
            self.stop.ask(in_doubt=self.learning.take_doubt())
            self.train_step(batch.micro_batches)
            if not self.samples_done:  # the optimizer has a state from now on
                self.require_savable()
            self.samples_done += batch.samples
            self.steps_done += 1
            self.place.step += 1
            self.place.step_in_epoch += 1
            self.step_s = time.perf_counter() - step_began
            self.beat()
            self.stop_or_save()
        self.heartbeat.enter(Phase.WAITING)
        self.world.await_device()  # what is measured is training, not asking for it
        samples = self.samples_done - samples_before  # none when only the validation was left to do
        self.samples_per_s = samples / (time.perf_counter() - began) if samples else None

    def train_step(self, micro_batches: Iterator[MicroBatch]) -> None:
        """One optimizer step, by the gradient of the whole batch's mean, whatever its split. All ranks take part."""
        lr = self.optimizer.param_groups[0].get("lr", float("nan"))
        self.lr = lr.clone() if isinstance(lr, Tensor) else lr  # a scheduler changes a tensor in place
        if not (isinstance(lr, Tensor) or lr >= 0):  # a tensor is looked at when an epoch begins
            require_rates(self.optimizer, self.place.step)
        # A collate function may have left out the whole batch, on all ranks: it passes, and changes nothing.
        if self.by_closure:
            parts = list(micro_batches)
            is_done = bool(parts)
            if is_done:
                self.step_by_closure(parts)
        else:
            seen = copy.deepcopy(self.train_tally.state_dict()) if self.update.may_skip else None
            self.model.zero_grad(self.optimizer)
            totals, _ = self.backward(micro_batches)
            is_done = bool(totals) and self.update.apply(self.place.step + 1)
            if not is_done and seen is not None:
                self.train_tally.load_state_dict(seen)
        if self.ema is not None and is_done:
            self.ema.update()
        if self.scheduler is not None and self.schedule.scheduler_interval == "step":
            after_step(self.scheduler, self.place.step + 1)

    def backward(
        self, micro_batches: Iterable[MicroBatch], *, counted: bool = True
    ) -> tuple[list[Tensor], Tensor | None]:
        """Add the batch's gradient to the parameters'. All ranks take part.

        Returns the losses of this rank's parts, as sums, and their weight where it isn't the number of samples. With
        `counted` they go into the epoch's loss and metrics.
        """
        totals: list[Tensor] = []
        weight: Tensor | None = None
        whole_weight: Callable[[], Tensor] | None = None  # over all ranks
        batch_samples = 0
        for i, micro_batch in enumerate(micro_batches):
            # DDP averages over the ranks where the batch's gradient is a sum over them: hence the world size.
            batch_samples = micro_batch.batch_samples
            scale: float | Tensor = self.world.world_size / batch_samples
            undone = contextlib.nullcontext() if micro_batch.samples else self.model.without_trace()
            with self.model.accumulating(last=micro_batch.is_last), undone:
                self.heartbeat.enter(Phase.FORWARD)
                outcome = self.model.run(self.step, micro_batch)
                if not outcome.total.requires_grad:
                    raise UserError(
                        "the loss does not depend on the model: on the way to it something was detached (detach(), "
                        "item(), numpy, torch.no_grad, argmax), and nothing can be learned from it"
                    )
                if not self.samples_done:  # in this process's first step
                    self.model.require_all_used(outcome.total, self.optimizer)
                self.heartbeat.enter(Phase.BACKWARD)
                if outcome.weight is not None:
                    weight = outcome.weight if weight is None else weight + outcome.weight
                    if micro_batch.is_whole and self.world.world_size == 1:
                        scale = 1.0 / weight.where(weight != 0, 1.0).to(outcome.total.dtype)
                    elif micro_batch.is_last:
                        # Known only after all parts; see `rescale_gradients`. It travels during the backward pass.
                        whole_weight = self.world.begin_sum(weight)
                self.model.backward(self.precision.scaled(outcome.total * scale))
            if micro_batch.is_last:
                self.model.require_averaged(outcome.total, self.place.step + 1)
            if outcome.is_believed and counted:
                self.try_step(micro_batch, i)  # after the backward pass, which needs the buffers as they were
            elif not self.samples_done and i == 0 and counted and not outcome.is_users:
                self.look_for_mixing(micro_batch)
            totals.append(outcome.total.detach())
            if micro_batch.samples and counted:
                self.train_tally.add(outcome, micro_batch.samples, self.place.step_in_epoch)
        self.model.loss.average_gradients()
        if whole_weight is not None:
            self.rescale_gradients(batch_samples, whole_weight())
        return totals, weight

    def try_step(self, micro_batch: MicroBatch, number: int) -> None:
        """See that the step's loss is the mean over samples, where batches are cut, in some of a process's steps.

        All ranks take part in these steps' first forward pass where such passes are collective.

        Raises:
            UserError: it is not.
        """
        is_due = number == 0 and self.steps_done + 1 in TRIED_AT
        self.is_to_try |= is_due
        is_for_all = self.is_forward_collective
        is_empty = micro_batch.is_whole or not micro_batch.samples
        if not self.is_to_try or (number != 0 if is_for_all else is_empty):
            return
        data, samples = self.pairs.of(micro_batch.data, micro_batch.samples or 1)
        if samples == 1 and not is_for_all:
            return  # until there is a second one
        self.is_to_try = is_for_all and is_due  # all ranks together: once more with the next step's, which makes a pair

        def run(data: Any) -> float:
            part = replace(micro_batch, data=data, samples=1, batch_samples=1, is_regular=True)
            return float(self.run_still(part).total)

        with self.model.trying():
            try_step(run, data, samples, self.world.device, self.is_coarse, is_forward_collective=is_for_all)

    def look_for_mixing(self, micro_batch: MicroBatch) -> None:
        """Warn where the loss of this rank's samples depends on which of them make a batch. Of rank 0's it is said.

        All ranks take part where forward passes are collective.
        """
        samples, data = micro_batch.samples, micro_batch.data
        ways = [] if micro_batch.is_whole or samples < 2 else ways_to_take(data, samples)
        if len(ways) != 1 and not self.is_forward_collective:
            return
        cut = samples // 2
        losses: list[tuple[float, float]] = []
        # What fails here, training will tell.
        with contextlib.suppress(Exception), rng_kept(self.world.device), self.model.trying():
            for rows in (range(samples), range(samples), range(cut), range(cut, samples)):
                taken = ways[0](rows) if len(ways) == 1 else data  # of a rank that only takes part
                outcome = self.run_still(replace(micro_batch, data=taken, samples=len(rows), is_whole=True))
                losses.append((float(outcome.total), len(rows) if outcome.weight is None else float(outcome.weight)))
        if self.world.is_main and len(ways) == 1 and len(losses) == 4:
            warn_of_mixing(losses, samples, lambda line: say(f"warning: {line}"), is_coarse=self.is_coarse)

    def run_still(self, micro_batch: MicroBatch) -> Outcome:
        """The outcome of a step that changes nothing. All ranks take part where forward passes are collective."""
        with standing_still(self.model.bare, inspect.unwrap(self.step)):
            return self.model.run(self.step, micro_batch)

    @property
    def is_forward_collective(self) -> bool:
        """Whether all ranks take part in each forward pass."""
        return self.model.forwards_together and self.world.world_size > 1

    @property
    def is_coarse(self) -> bool:
        """Whether numbers that should be equal may differ by the rounding of 16 bits, or of TF32."""
        return self.world.device.type != "cpu" or self.precision.name != "fp32"

    def step_by_closure(self, micro_batches: list[MicroBatch]) -> None:
        """A step of an optimizer that evaluates the batch as often as it likes. All ranks take part.

        Each evaluation brings all ranks the same loss and gradient, so that they ask for equally many.
        """
        evaluations = itertools.count()

        @torch.enable_grad()
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            totals, weight = self.backward(micro_batches, counted=next(evaluations) == 0)
            samples = sum(micro_batch.samples for micro_batch in micro_batches)
            units = as_units(samples if weight is None else weight, totals[0].device)
            sums = torch.stack([torch.stack(totals).sum().double(), units])
            sums = self.world.sum(sums)
            mean: Tensor = sums[0] / sums[1].where(sums[1] != 0, 1.0)
            return mean

        if is_two_step(self.optimizer):
            closure()  # it begins with the batch's gradient
        self.optimizer.step(closure)  # type: ignore[arg-type]  # torch's stub says float, its LBFGS takes a tensor

    def rescale_gradients(self, samples: int, units: Tensor) -> None:
        """Turn the gradients of the mean over so many samples into those of the mean over all ranks' units."""
        gradients = self.model.gradients(self.optimizer)
        scale = samples / units.where(units != 0, 1.0)  # no unit counts: the gradients are zeros, as torch's are
        torch._foreach_mul_(gradients, scale.to(gradients[0].device, gradients[0].dtype))

    def stop_or_save(self) -> None:
        """After a step: stop if any rank was asked to, save if it is time. All ranks take part."""
        every = self.schedule.checkpoint.every
        signal_number = self.stop.agreed()
        if signal_number == DOUBT:
            self.learning.require_finite(self.place.step)
        elif signal_number:
            self.stop_here(signal_number)
        if every != "epoch" and self.place.step % every == 0:
            self.save(results=False)

    # -- evaluation ------------------------------------------------------------------------------

    def validate(self) -> None:
        """Every validation sample once. All ranks take part in the agreement on a stop, and in a sharded forward."""
        if self.val_batches is None:
            return
        self.heartbeat.enter(Phase.VALIDATING)
        before = rng_state(self.world.device)
        for tally in self.tallies[1:]:
            with judged(self.optimizer):
                signal_number = self.evaluate(self.val_batches, tally)
            if signal_number:
                # The run will continue with the whole validation: with the random numbers that it began with.
                set_rng_state(before, self.world.device)
                for begun in self.tallies[1:]:
                    begun.reset()
                self.stop_here(signal_number)

    def evaluate(self, batches: Batches, tally: Tally) -> int:
        """Add all batches to the tally, of the weights or of their average; the signal on which it stopped, or 0.

        All ranks take part.
        """
        averaged = self.ema.in_place() if self.ema is not None and tally.phase == "ema" else contextlib.nullcontext()
        tally.reset()
        with averaged, self.model.evaluating():
            for i, batch in enumerate(batches.epoch(self.place.epoch)):
                self.stop_evaluating.ask()
                evaluate_batch(self.model, self.step, batch, tally, i)
                self.beat(Phase.VALIDATING, i + 1)
                if signal_number := self.stop_evaluating.agreed():
                    return signal_number
        return 0

    def report(self) -> Row:
        """The epoch's row, the same on all ranks. All ranks take part: one synchronisation for all of it."""
        self.heartbeat.enter(Phase.REPORTING)
        values = gather_values(self.world, self.tallies)
        row: Row = {
            "epoch": self.place.epoch,
            "step": self.place.step,
            "lr": float(self.lr),
            "samples_per_s": self.samples_per_s,
            **values,
        }
        return self.world.from_main(row)

    def finish_epoch(self, row: Row) -> bool:
        """Take in what the epoch brought, and move on to the next; whether it is the best so far. No collective."""
        self.rows.append(row)
        improved = self.best.update(row)
        if self.scheduler is not None and self.schedule.scheduler_interval == "epoch":
            after_epoch(self.scheduler, row, self.schedule.scheduler_monitor)
        for tally in self.tallies:
            tally.reset()
        self.place = Place(self.place.epoch + 1, 0, self.place.step)
        return improved

    # -- stopping and continuing -----------------------------------------------------------------

    def save(self, *, results: bool, improved: bool = False, checkpoint: bool = True) -> None:
        """Copy what is to be kept, and write it behind the training. All ranks take part.

        Args:
            results: whether the history and the last weights are to be written, and with `improved` the best ones.
            checkpoint: whether the run is to be able to continue from here.
        """
        self.beat(Phase.SAVING)
        self.background.wait()  # for the copies before to be written
        began = time.monotonic()
        # Results first, also those that the disk refused before: a checkpoint has a link to the best weights.
        jobs: list[Callable[[], None]] = [self.results.write] if self.world.is_main else []
        if results:
            with judged(self.optimizer):
                weights = self.weights(improved=improved)
                if self.world.is_main:
                    self.results.snapshot(weights, self.rows)
        if checkpoint:
            own = {
                "rng": rng_state(self.world.device),
                "buffers": self.model.own_buffers(),
                "loss_buffers": self.model.loss.own_buffers(),
                "data": self.train_batches.state_dict(),
                # After training's they are empty, but for what wrappers remember of earlier epochs.
                **{tally.phase: tally.state_dict() for tally in self.tallies},
            }
            buffers = [f"model/{name}" for name in own["buffers"]] + [f"loss/{name}" for name in own["loss_buffers"]]
            ended = self.place.epoch - 1 if self.place.step_in_epoch == 0 else None
            moment = Moment(self.place.step, ended)
            jobs.append(self.checkpoints.snapshot(moment, self.best.epoch, self.shared_state(), own, buffers))
            jobs.append(lambda: setattr(self, "checkpoint_s", time.monotonic() - began))
        self.background.start(jobs)
        self.heartbeat.enter(Phase.LOADING)

    def weights(self, *, improved: bool) -> dict[Path, dict[str, Any]]:
        """Whole state_dicts, by the files for them. All ranks take part, rank 0 has what it needs."""
        run = self.run_dir
        weights = {run.last_weights: self.model.weights()}
        if self.ema is not None:
            weights[run.ema_weights] = self.model.weights(self.ema.by_parameter())
        if loss := self.model.loss.state_dict():
            weights |= {beside(path): loss for path in weights}
        if improved:
            if loss:
                weights[beside(run.best_weights)] = loss
            weights[run.best_weights] = weights[run.ema_weights if self.best.is_of_average else run.last_weights]
        return weights

    def settle(self) -> None:
        """Wait until all is written. All ranks take part; raises UserError where results can't be written."""
        self.heartbeat.enter(Phase.SAVING)
        self.background.wait()
        if self.world.is_main:
            self.results.finish()

    def stop_here(self, signal_number: int) -> NoReturn:
        """Save a checkpoint of this very step, and end. All ranks take part.

        Raises:
            Stopped: it is saved.
            UserError: it could not be.
        """
        self.save(results=False)  # first, since the time may not suffice for both
        self.save(results=True, checkpoint=False)
        self.heartbeat.enter(Phase.SAVING)
        self.background.wait()
        if self.world.from_main(self.checkpoints.failed):  # rank 0 has said why, before another rank ends
            raise UserError(
                f"stopped at step {self.place.step}, but the checkpoint could not be written; {self.disk.last_good()}"
            )
        raise Stopped(signal_number)

    def shared_state(self) -> dict[str, Any]:
        """What is the same on all ranks, but for the model's buffers, of which rank 0's count."""
        return {
            "kinds": self.kinds(),
            "place": asdict(self.place),
            "rows": self.rows,
            "lr": float(self.lr),
            "model": self.model.state_dict(),
            "loss": self.model.loss.state_dict(),
            "optimizer": self.model.optimizer_state(self.optimizer),
            "scheduler": None if self.scheduler is None else state_of(self.scheduler),
            "best": self.best.state_dict(),
            "scaler": self.precision.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }

    def require_savable(self) -> None:
        """Raise UserError where a checkpoint can't hold what optimizer and scheduler have. No collective."""
        require_data("scheduler", self.scheduler, None if self.scheduler is None else state_of(self.scheduler))
        require_data("optimizer", self.optimizer, self.model.own_optimizer_state(self.optimizer))

    def room(self, path: str, like: Tensor) -> Tensor | None:
        """Room to read this rank's part of a tensor of `shared_state` into; None where the CPU's will do."""
        if (of_parameter := _OF_PARAMETER.fullmatch(path)) is None:
            return None
        section, name, *_ = of_parameter.groups()
        if section == "ema" and self.ema is not None:
            average = self.ema.state_dict().get(name)
            return average if average is not None and matches(average, like) else None
        return self.model.room(section, name, like)

    def kinds(self) -> dict[str, str | None]:
        """The classes whose states mean nothing to others."""
        parts = {"optimizer": self.optimizer, "scheduler": self.scheduler}
        return {name: None if part is None else type(part).__name__ for name, part in parts.items()}

    def misfit(self, shared: dict[str, Any]) -> str | None:
        """Why a shared state is not one of this run, if it is not."""
        shapes = shapes_of(shared["model"])
        grown = {name: shapes[name] for name in self.model.own_buffers() if name in shapes}
        if problems := mismatches(shapes, self.model.shapes() | grown):
            return f"a checkpoint of another model: {'; '.join(problems)}"
        if problem := self.model.loss.misfit(shared.get("loss", {})):
            return f"a checkpoint with {problem}"
        for part, kind in self.kinds().items():
            if shared["kinds"][part] != kind:
                return f"a checkpoint with {part} {shared['kinds'][part]}, this run has {kind}"
        if self.ema is not None and not shared.get("ema"):
            return "a checkpoint without an average of the weights, this run has one (ema)"
        groups = [group["params"] for group in shared["optimizer"]["param_groups"]]
        if groups != self.model.parameter_groups(self.optimizer):
            return "a checkpoint whose optimizer has other parameters, or other groups of them"
        return None

    def resume(self) -> None:
        """Continue from the newest checkpoint that is whole; begin where there is none. All ranks take part.

        Raises:
            ResumeError: there are checkpoints, and none that can be used.
        """
        seed_everything(derive_seed("rank", self.seed, self.world.rank))
        snapshot = self.checkpoints.load(self.misfit)
        if snapshot is not None:
            self.restore(snapshot)
        if self.world.is_main:
            with self.disk.tolerated("write metrics.jsonl"):
                self.run_dir.write_rows(self.rows)
        self.world.barrier()  # no rank saves before all have read
        self.beat()

    def restore(self, snapshot: Snapshot) -> None:
        """Become what was saved: to the bit on as many ranks, to the same curve on another number.

        All ranks take part.
        """
        shared = snapshot.shared
        self.place = Place(**shared["place"])
        self.rows = shared["rows"]
        self.lr = shared["lr"]
        self.model.load_state_dict(shared["model"])
        self.model.loss.load_state_dict(shared.get("loss", {}))
        self.model.load_optimizer_state(self.optimizer, shared["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(shared["scheduler"])
        self.best.load_state_dict(shared["best"])
        self.precision.load_state_dict(shared.get("scaler"))
        if self.ema is not None:
            self.ema.load_state_dict(shared["ema"])
        self.train_batches.load_state_dict(snapshot.ranks[self.world.rank % snapshot.world_size]["data"])
        # A script may validate only now.
        tallies = [each for each in self.tallies if all(each.phase in own for own in snapshot.ranks.values())]
        if snapshot.world_size == self.world.world_size:
            own = snapshot.ranks[self.world.rank]
            set_rng_state(own["rng"], self.world.device)
            self.model.load_own_buffers(own["buffers"])
            self.model.loss.load_own_buffers(own.get("loss_buffers", {}))
            for tally in tallies:
                tally.load_state_dict(own[tally.phase])
        else:
            seed_everything(derive_seed("rank", self.seed, self.world.rank, self.place.step))
            if self.world.is_main:
                for tally in tallies:
                    tally.load_merged([own[tally.phase] for own in snapshot.ranks.values()])
        if self.world.is_main:
            with self.disk.tolerated("write weights/best.pt"):
                restore_best(snapshot.path, self.run_dir)

    # -- seeing ----------------------------------------------------------------------------------

    def beat(self, phase: Phase = Phase.LOADING, validated: int = 0) -> None:
        """Say where this rank is. Waits for the device only now and then, and only on rank 0.

        Args:
            validated: batches, while it validates.
        """
        now = time.monotonic()
        if self.world.is_main and not validated and self.train_tally.samples and now - self._looked_at > LOOK_EVERY_S:
            self._looked_at = now
            self.heartbeat.enter(Phase.WAITING)
            self._shown_loss = self.train_tally.mean_loss()
            self.learning.see(self._shown_loss)
        batches = self.val_batches if validated and self.val_batches else self.train_batches
        self.heartbeat.beat(
            Beat(
                epoch=min(self.place.epoch - self.is_over, self.schedule.epochs),  # the last one, at the end
                epochs=self.schedule.epochs,
                step=self.place.step,
                step_in_epoch=validated or self.place.step_in_epoch,
                steps_in_epoch=batches.num_steps or 0,
                samples=float(self.samples_done),
                loss=self._shown_loss,
                phase=phase,
                stop_s=self.step_s + self.checkpoint_s,
            )
        )


@torch.no_grad()
def evaluate_batch(model: Parallel, step: Step, batch: Batch, tally: Tally, number: int) -> None:
    """Add this rank's share of batch `number` to the tally. All ranks take part where `model.forwards_together`."""
    for micro_batch in batch.micro_batches:
        if micro_batch.samples:
            tally.add(model.run(step, micro_batch), micro_batch.samples, number)
        else:
            with model.without_trace():
                model.run(step, micro_batch)


def gather_values(world: World, tallies: Sequence[Tally]) -> dict[str, Any]:
    """The tallies' values over all ranks, on rank 0; empty elsewhere. All ranks take part: one synchronisation."""
    states = [tally.states() for tally in tallies]
    reduced = reduce_states([state for part in states for state in part])
    values: dict[str, Any] = {}
    if reduced is not None and world.is_main:
        for tally, part in zip(tallies, states, strict=True):
            values |= tally.finish(reduced[: len(part)])
            reduced = reduced[len(part) :]
    return values
