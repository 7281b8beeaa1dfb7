"""The training loop: what happens, when, and which ranks take part.

Every rank runs this same loop in step with the others. A method says which ranks take part in its collectives;
what only rank 0 does (files, reports) stands under `if self.world.is_main`.
"""

from __future__ import annotations

import time
from datetime import datetime, timezone
from typing import NoReturn

from dtrain.run.folder import Row, RunDir
from dtrain.run.heartbeat import Heartbeat, Phase
from dtrain.schema.metrics.monitor import covers, reports
from dtrain.stderr import say

from ..checks.arguments import Settings
from ..checks.batch_norm import warn_of_small_shares
from ..checks.optimizer_kinds import start_training, stop_training
from ..distributed.stop import Stopped
from ..distributed.wishes import Agreement, Wish
from ..metrics.early_stopping import Best
from ..model.modes import begin_training
from ..optimization.learning_check import Learning
from .cadence import Cadence, Due
from .callbacks import Callbacks, FitContext
from .data import FitData
from .evaluation import Validation, gather_values
from .progress import Progress
from .saver import Saver
from .trained import Trained
from .training_step import TrainingStep

ASKED = {Wish.SAVE, Wish.VALIDATE, Wish.END}
LOOK_EVERY_S = 0.5  # how often rank 0 waits for its device to show a loss


class Loop:
    """Trains until the last epoch or step, until early stopping says so, or until all ranks agree to stop.

    Args:
        run: the folder that it all goes to.
        trained: what is trained.
        data: what it is trained on.
        settings: of them `fit`, `checkpoint` and `seed`.
        best: what decides which weights are the best, and when to stop early.
        cadence: what decides when to report, to validate and to save.
        callbacks: are called when their moments come.
    """

    def __init__(
        self,
        run: RunDir,
        trained: Trained,
        data: FitData,
        settings: Settings,
        best: Best,
        cadence: Cadence,
        callbacks: Callbacks,
    ) -> None:
        self.trained = trained
        self.data = data
        self.world = trained.world
        self.cadence = cadence
        self.progress = Progress(settings.fit, best, data, Heartbeat(run.heartbeat(self.world.rank)))
        self.train_step = TrainingStep(trained, data.train_tally, self.progress)
        self.validation = Validation(trained, data, self.progress)
        self.agreement = Agreement(self.world, self.progress.heartbeat, each_turn=callbacks.has("on_step_end"))
        self.callbacks = callbacks
        self.shown = FitContext(run, trained, data, self.progress, self.agreement)
        self.saver = Saver(run, trained, data, self.progress, settings, self.agreement, callbacks)
        self.say = say if self.world.is_main else lambda line: None
        is_scaled = trained.precision.name == "fp16"
        losses = [tally.loss_name for tally in data.tallies]
        self.learning = Learning(trained.model, trained.optimizer, losses, self.say, scales=is_scaled)
        self._looked_at = 0.0

    def run(self) -> None:
        """Train. All ranks take part.

        Raises:
            Stopped: all ranks agreed to stop; a checkpoint of this very step is saved.
        """
        try:
            with self.saver:
                start_training(self.trained.optimizer)
                self.trained.require_savable()
                self.callbacks.require_savable()
                self.saver.resume()
                begin_training(self.trained.model.bare)
                self.trained.freezing.start(self.progress.position.step, self.progress.position.epoch - 1)
                self.callbacks.call("on_start", self.shown)
                if not self.progress.is_over:
                    self.begin_window()
                while not self.progress.is_over:
                    self.train_epoch()
                    if not self.progress.is_over:
                        self.pause(epoch_ends=True)
                self.saver.settle()
                stop_training(self.trained.optimizer)
                self.callbacks.call("on_end", self.shown)
                self.progress.beat()
        finally:
            self.trained.freezing.end_fit()
            self.progress.enter(Phase.DONE)

    def train_epoch(self) -> None:
        """The rest of the epoch's steps, or of the run's, and what is due in between. All ranks take part."""
        progress, position = self.progress, self.progress.position
        if position.step_in_epoch and not progress.is_at_epochs_end:
            self.pause(epoch_ends=False)  # what was due when the run was stopped
        if progress.is_over:
            return
        # All ranks: the batches of this epoch that are still to do, an optimizer step for each.
        for batch in self.data.train.epoch(position.epoch, position.step_in_epoch):
            step_began = time.perf_counter()
            self.agreement.ask(self.wishes())
            self.train_step(batch.micro_batches)
            if not progress.samples_done:  # the optimizer has a state from now on
                self.trained.require_savable()
                warn_of_small_shares(self.trained.model.bare, batch.samples, self.world)
            progress.end_step(batch.samples, time.perf_counter() - step_began)
            self.callbacks.call("on_step_end", self.shown)
            self.after_step()
            if not progress.is_at_epochs_end:
                self.pause(epoch_ends=False)
                if progress.is_over:
                    return

    def wishes(self) -> list[Wish]:
        """What this rank wishes for before a step."""
        wishes = [Wish.JUDGE] if self.learning.take_doubt() else []
        if self.world.is_main:  # whose clock counts
            wishes += [Wish.STOP] if self.cadence.is_time_up else []
            wishes += [Wish.SAVE] if self.cadence.is_time_to_save else []
        return wishes

    def after_step(self) -> None:
        """Show the step, and do what any rank has wished for. All ranks take part."""
        self.look_at_loss()
        self.progress.beat()
        if not (wishes := self.agreement.agreed()):
            return
        if Wish.JUDGE in wishes:
            self.learning.require_finite(self.progress.position.step)
        self.progress.asked |= wishes & ASKED
        if Wish.STOP in wishes:
            self.stop_here()

    def look_at_loss(self) -> None:
        """See this rank's loss so far. Waits for the device: only now and then, and only on rank 0."""
        now = time.monotonic()
        if self.world.is_main and self.data.train_tally.samples and now - self._looked_at > LOOK_EVERY_S:
            self._looked_at = now
            self.progress.enter(Phase.WAITING)
            self.progress.loss = self.data.train_tally.mean_loss()
            self.learning.see(self.progress.loss)

    def pause(self, *, epoch_ends: bool) -> None:
        """Between two steps, report, validate and save what is due. All ranks take part, with the same decisions."""
        progress = self.progress
        run_ends = Wish.END in progress.asked or progress.ends(epoch_ends=epoch_ends)
        due = self.cadence.due(progress.position, progress.asked, epoch_ends=epoch_ends, run_ends=run_ends)
        if not (due.anything or progress.asked or epoch_ends or run_ends):
            return
        if epoch_ends or due.validation:
            # All ranks: rank 0's buffers are what is evaluated and saved.
            self.trained.model.share_buffers()
        row, is_best = self.report(due, epoch_ends=epoch_ends) if due.row else ({}, False)
        self.trained.scheduling.after_row(row, epoch_ends=epoch_ends)
        if row:
            if not progress.best.is_stopped_by_nan:
                # All ranks: whether anything is learned is seen from the same row.
                self.learning.judge(row, epoch_ends=epoch_ends, is_last=run_ends)
            progress.rows.append(row)
            self.saver.write_rows()
        progress.is_ended |= Wish.END in progress.asked
        progress.asked.clear()
        checkpoint = self.call_after_row(row, epoch_ends=epoch_ends) or due.checkpoint
        if epoch_ends:
            progress.end_epoch()
        results = epoch_ends or reports(row, "val") or run_ends
        if results or checkpoint or progress.is_over:
            # All ranks copy, and go on while the copies are written; rank 0 writes the results.
            self.save(results=results, is_best=is_best, checkpoint=checkpoint or progress.is_over)
        if "train_loss" in row and not progress.is_over:
            self.begin_window()

    def call_after_row(self, row: Row, *, epoch_ends: bool) -> bool:
        """Call who waits for that; whether a checkpoint is asked for. All ranks take part."""
        if not self.callbacks.act_after_rows:
            return False
        is_validated = reports(row, "val")
        if is_validated:
            self.callbacks.call("on_validation_end", self.shown)
        if epoch_ends:
            self.callbacks.call("on_epoch_end", self.shown)
        wishes = self.agreement.at_once((Wish.SAVE, Wish.END)) if epoch_ends or is_validated else frozenset()
        self.progress.is_ended |= Wish.END in wishes
        return Wish.SAVE in wishes

    def save(self, *, results: bool, is_best: bool, checkpoint: bool) -> None:
        """Save results, a checkpoint, or both. All ranks take part."""
        if checkpoint:
            self.callbacks.call("on_save", self.shown)
            self.cadence.saved()
        self.saver.save(results=results, is_best=is_best, checkpoint=checkpoint)

    def report(self, due: Due, *, epoch_ends: bool) -> tuple[Row, bool]:
        """A row of what is due, the same on all ranks, and whether it is the best so far. All ranks take part."""
        progress, best = self.progress, self.progress.best
        progress.enter(Phase.WAITING)
        self.world.await_device()  # what is measured is training, not asking for it
        progress.speed.pause()
        if due.validation and not self.validation.run():
            self.stop_here()
        row = self.row(due.report, due.validation, epoch_ends=epoch_ends)
        is_best = covers(row, best.monitor) and best.update(row)
        if best.verdict is not None:
            if not due.report:  # what has been trained since the last report is not lost
                rest = self.row(True, False, epoch_ends=epoch_ends)
                row = {**rest, **row, "phase": "train+val", "samples_per_s": rest["samples_per_s"]}
            self.say(f"stopping early, after step {row['step']}: {best.verdict}")
        progress.end_report(training="train_loss" in row, validation=due.validation)
        for tally in self.data.tallies:
            if tally.loss_name in row:
                tally.reset()
        progress.speed.start()
        return row, is_best

    def row(self, training: bool, validation: bool, *, epoch_ends: bool) -> Row:
        """What training or validation have added up. All ranks take part: one synchronisation for all of it."""
        progress, data = self.progress, self.data
        progress.enter(Phase.REPORTING)
        values = gather_values(self.world, [data.train_tally] * training + [*data.val_tallies] * validation)
        row: Row = {
            "epoch": progress.position.epoch if epoch_ends else progress.epoch,
            "step": progress.position.step,
            "phase": "+".join(["train"] * training + ["val"] * validation),
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            **{name: float(rate) for name, rate in progress.rates.items()},
            "samples_per_s": progress.speed.take() if training else None,
            **values,
        }
        return self.world.from_main(row)

    def begin_window(self) -> None:
        """Begin with what the next report of the training covers. All ranks take part."""
        self.learning.begin(self.progress.position.step)
        self.progress.speed.start()

    def stop_here(self) -> NoReturn:
        """Save a checkpoint of this very step, and end. All ranks take part.

        Raises:
            Stopped: it is saved.
            UserError: it could not be.
        """
        self.callbacks.call("on_stop", self.shown)
        self.callbacks.call("on_save", self.shown)
        if self.cadence.is_time_up:
            self.say(f"fit.max_time is over: stopping after step {self.progress.position.step}, with a checkpoint")
        self.saver.save_and_wait()
        raise Stopped
