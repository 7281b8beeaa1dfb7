"""What a fit writes to disk, and how it continues from there: checkpoints, history, weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from dtrain.run.folder import RunDir
from dtrain.run.heartbeat import Phase

from ..checkpoint.manager import Moment
from ..checkpoint.reader import Snapshot
from ..checkpoint.run_writer import RunWriter
from ..checks.arguments import Settings
from ..checks.optimizer_kinds import judged
from ..distributed.seeds import derive_seed, rng_state, seed_everything, set_rng_state
from ..distributed.wishes import Agreement
from .callbacks import Callbacks
from .data import FitData
from .progress import Progress
from .trained import Trained


class Saver:
    """Copies what must be kept, and writes it in the background. A context manager around the whole fit.

    Attributes:
        run: where it goes.
    """

    def __init__(
        self,
        run: RunDir,
        trained: Trained,
        data: FitData,
        progress: Progress,
        settings: Settings,
        agreement: Agreement,
        callbacks: Callbacks,
    ) -> None:
        self.run = run
        self._agreement = agreement
        self._callbacks = callbacks
        self._trained = trained
        self._data = data
        self._progress = progress
        self._seed = settings.seed
        self._world = trained.world
        self._writer = RunWriter(run, trained.world, settings.checkpoint, trained.room)

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._writer.leave(error)

    # -- saving ----------------------------------------------------------------------------------

    def save(self, *, results: bool, is_best: bool = False, checkpoint: bool = True) -> None:
        """Copy what must be kept, and write it in the background. All ranks take part.

        Args:
            results: whether to write the last weights, and with `is_best` the best ones.
            checkpoint: whether to save a checkpoint.
        """
        self._progress.beat(Phase.SAVING)
        self._writer.wait()
        began = time.monotonic()
        if results:
            self._copy_results(is_best=is_best)
        jobs: list[Callable[[], None]] = []
        if checkpoint:
            jobs = [self._copy_checkpoint(), lambda: setattr(self._progress, "checkpoint_s", time.monotonic() - began)]
        self._writer.write(*jobs)
        self._progress.enter(Phase.LOADING)

    def write_rows(self) -> None:
        """Have the rows written, without waiting. No collective."""
        self._writer.write_rows(self._progress.rows)

    def _copy_results(self, *, is_best: bool) -> None:
        of_average = self._progress.best.is_of_average
        with judged(self._trained.optimizer):
            weights = self._trained.weights(self.run, is_best=is_best, is_best_of_average=of_average)
            self._writer.copy_weights(weights)

    def _copy_checkpoint(self) -> Callable[[], None]:
        """Copy the state; what is returned writes it."""
        position, own = self._progress.position, self._own_state()
        buffers = [f"model/{name}" for name in own["buffers"]] + [f"loss/{name}" for name in own["loss_buffers"]]
        is_at_epochs_end = position.step_in_epoch == 0
        moment = Moment(
            position.step, position.epoch - 1 if is_at_epochs_end else 0, position.has_row and not is_at_epochs_end
        )
        shared = {**self._progress.state_dict(), **self._trained.state_dict()}
        return self._writer.copy_state(moment, self._progress.best.step, shared, own, buffers)

    def _own_state(self) -> dict[str, Any]:
        """What each rank has to itself."""
        model = self._trained.model
        return {
            "rng": rng_state(self._world.device),
            "buffers": model.own_buffers(),
            "loss_buffers": model.loss.own_buffers(),
            "data": self._data.train.state_dict(),
            "wishes": self._agreement.state_dict(),
            "callbacks": self._callbacks.state_dict(),
            # After training's they are empty, but for what wrappers remember of earlier epochs.
            **{tally.phase: tally.state_dict() for tally in self._data.tallies},
        }

    def save_and_wait(self) -> None:
        """Save everything, for a stop at this very step. All ranks take part.

        Raises:
            UserError: the checkpoint could not be written.
        """
        self.save(results=False)  # first, since the time may not suffice for both
        self.save(results=True, checkpoint=False)
        self._progress.enter(Phase.SAVING)
        self._writer.require_written(self._progress.position.step)

    def settle(self) -> None:
        """Wait until all is written. All ranks take part; raises UserError where results can't be written."""
        self._progress.enter(Phase.SAVING)
        self._writer.finish()

    # -- continuing ------------------------------------------------------------------------------

    def resume(self) -> None:
        """Continue from the newest valid checkpoint; start anew if there is none. All ranks take part.

        Raises:
            ResumeError: there are checkpoints, and none that can be used.
        """
        seed_everything(derive_seed("rank", self._seed, self._world.rank))
        snapshot = self._writer.load(self._trained.misfit)
        if snapshot is not None:
            self._restore(snapshot)
        self._writer.begin_rows(self._progress.rows)
        self._progress.beat()

    def _restore(self, snapshot: Snapshot) -> None:
        """Become what was saved: to the bit on as many ranks, to the same curve on another number.

        All ranks take part.
        """
        self._progress.load_state_dict(snapshot.shared)
        self._trained.load_state_dict(snapshot.shared)
        own = snapshot.ranks[self._world.rank % snapshot.world_size]
        self._data.train.load_state_dict(own["data"])
        self._agreement.load_state_dict({wish for each in snapshot.ranks.values() for wish in each.get("wishes", ())})
        self._callbacks.load_state_dict(own.get("callbacks", {}))
        # A script may validate only now.
        known = [each for each in self._data.tallies if all(each.phase in own for own in snapshot.ranks.values())]
        if snapshot.world_size == self._world.world_size:
            own = snapshot.ranks[self._world.rank]
            set_rng_state(own["rng"], self._world.device)
            self._trained.model.load_own_buffers(own["buffers"])
            self._trained.model.loss.load_own_buffers(own.get("loss_buffers", {}))
            for tally in known:
                tally.load_state_dict(own[tally.phase])
        else:
            seed_everything(derive_seed("rank", self._seed, self._world.rank, self._progress.position.step))
            if self._world.is_main:
                for tally in known:
                    tally.load_merged([own[tally.phase] for own in snapshot.ranks.values()])
