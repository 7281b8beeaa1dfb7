"""The training loop: what happens, when, and which ranks take part.

Every rank runs this same loop in step with the others. A method says which ranks take part in its collectives;
what only rank 0 does (files, reports) stands under `if self.world.is_main`.
"""

from __future__ import annotations

import time
from typing import NoReturn

from dtrain.run.folder import Row, RunDir
from dtrain.run.heartbeat import Heartbeat, Phase
from dtrain.stderr import say

from ..checks.arguments import Settings
from ..checks.batch_norm import warn_of_small_shares
from ..checks.optimizer_kinds import start_training, stop_training
from ..distributed.stop import DOUBT, StopAgreement, Stopped
from ..metrics.early_stopping import Best
from ..model.modes import begin_training
from ..optimization.learning_check import Learning
from .data import FitData
from .evaluation import Validation, gather_values
from .progress import Progress
from .saver import Saver
from .trained import Trained
from .training_step import TrainingStep

LOOK_EVERY_S = 0.5  # how often rank 0 waits for its device to show a loss


class Loop:
    """Trains until the last epoch, until patience runs out, or until all ranks agree to stop.

    Args:
        run: the folder that it all goes to.
        trained: what is trained.
        data: what it is trained on.
        settings: of them `fit.epochs`, `checkpoint` and `seed`.
        best: what decides which epoch is the best, and when patience runs out.
    """

    def __init__(self, run: RunDir, trained: Trained, data: FitData, settings: Settings, best: Best) -> None:
        self.trained = trained
        self.data = data
        self.world = trained.world
        self.progress = Progress(settings.fit.epochs, best, data, Heartbeat(run.heartbeat(self.world.rank)))
        self.train_step = TrainingStep(trained, data.train_tally, self.progress)
        self.validation = Validation(trained, data, self.progress)
        self.saver = Saver(run, trained, data, self.progress, settings)
        self.checkpoint_every = settings.checkpoint.every
        report = say if self.world.is_main else lambda line: None
        is_scaled = trained.precision.name == "fp16"
        self.learning = Learning(trained.model, trained.optimizer, report, scales=is_scaled)
        self.stop = StopAgreement(self.world, self.progress.heartbeat)
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
                self.saver.resume()
                begin_training(self.trained.model.bare)
                while not self.progress.is_over:
                    # All ranks: the batches of this epoch that are still to do, an optimizer step for each.
                    self.train_epoch()
                    # All ranks: evaluate rank 0's model, each rank on its own share of the validation set.
                    self.trained.model.share_buffers()
                    self.validate()
                    # All ranks: what each has added up meets on rank 0, which reports it back to all.
                    row = self.report()
                    # All ranks: whether anything is learned is seen from the same row.
                    self.learning.judge(row, is_last=self.progress.position.epoch == self.progress.epochs)
                    # All ranks: the decision what is best is the same everywhere, made from the same row.
                    is_best = self.end_epoch(row)
                    # All ranks copy, and go on while the copies are written; rank 0 writes the results.
                    checkpoint = self.checkpoint_every == "epoch" or self.progress.is_over
                    self.saver.save(results=True, is_best=is_best, checkpoint=checkpoint)
                self.saver.settle()
                stop_training(self.trained.optimizer)
                self.progress.beat()
        finally:
            self.progress.enter(Phase.DONE)

    def train_epoch(self) -> None:
        """The rest of the epoch's steps. All ranks take part."""
        progress, position = self.progress, self.progress.position
        self.learning.begin(position.step)
        began, samples_before = time.perf_counter(), progress.samples_done
        for batch in self.data.train.epoch(position.epoch, position.step_in_epoch):
            step_began = time.perf_counter()
            self.stop.ask(in_doubt=self.learning.take_doubt())
            self.train_step(batch.micro_batches)
            if not progress.samples_done:  # the optimizer has a state from now on
                self.trained.require_savable()
                warn_of_small_shares(self.trained.model.bare, batch.samples, self.world)
            progress.end_step(batch.samples, time.perf_counter() - step_began)
            self.after_step()
        progress.enter(Phase.WAITING)
        self.world.await_device()  # what is measured is training, not asking for it
        samples = progress.samples_done - samples_before  # none when only the validation was left to do
        progress.samples_per_s = samples / (time.perf_counter() - began) if samples else None

    def after_step(self) -> None:
        """Show the step, stop if any rank was asked to, save if it is time. All ranks take part."""
        self.look_at_loss()
        self.progress.beat()
        signal_number, step = self.stop.agreed(), self.progress.position.step
        if signal_number == DOUBT:
            self.learning.require_finite(step)
        elif signal_number:
            self.stop_here(signal_number)
        if self.checkpoint_every != "epoch" and step % self.checkpoint_every == 0:
            self.saver.save(results=False)

    def look_at_loss(self) -> None:
        """See this rank's loss so far. Waits for the device: only now and then, and only on rank 0."""
        now = time.monotonic()
        if self.world.is_main and self.data.train_tally.samples and now - self._looked_at > LOOK_EVERY_S:
            self._looked_at = now
            self.progress.enter(Phase.WAITING)
            self.progress.loss = self.data.train_tally.mean_loss()
            self.learning.see(self.progress.loss)

    def validate(self) -> None:
        """Every validation sample once. All ranks take part."""
        if signal_number := self.validation.run():
            self.stop_here(signal_number)

    def report(self) -> Row:
        """The epoch's row, the same on all ranks. All ranks take part: one synchronisation for all of it."""
        self.progress.enter(Phase.REPORTING)
        values = gather_values(self.world, self.data.tallies)
        row: Row = {
            "epoch": self.progress.position.epoch,
            "step": self.progress.position.step,
            "lr": float(self.progress.lr),
            "samples_per_s": self.progress.samples_per_s,
            **values,
        }
        return self.world.from_main(row)

    def end_epoch(self, row: Row) -> bool:
        """Take in what the epoch brought, and move on to the next; whether it is the best so far. No collective."""
        is_best = self.progress.end_epoch(row)
        self.trained.scheduling.after_epoch(row)
        for tally in self.data.tallies:
            tally.reset()
        return is_best

    def stop_here(self, signal_number: int) -> NoReturn:
        """Save a checkpoint of this very step, and end. All ranks take part.

        Raises:
            Stopped: it is saved.
            UserError: it could not be.
        """
        self.saver.save_and_wait()
        raise Stopped(signal_number)
