"""What a loop of the user's own writes to disk: checkpoints, rows, weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dtrain.errors import UserError
from dtrain.run.folder import Row, RunDir
from dtrain.schema.sections import Checkpoint

from ..checkpoint.background import GRACE_S, Background, Disk
from ..checkpoint.manager import Checkpoints, Moment, restore_best
from ..checkpoint.reader import Misfit, Snapshot
from ..checkpoint.results import Results
from ..distributed.world import World


class LoopSaver:
    """Copies what must be kept, and writes it in the background; all ranks take part in all of it.

    Attributes:
        run: where it goes.
    """

    def __init__(self, run: RunDir, world: World, settings: Checkpoint) -> None:
        self.run = run
        self._world = world
        self._disk = Disk(run)
        self._results = Results(run, self._disk)
        self._checkpoints = Checkpoints(run, world, settings, self._disk)
        self._background = Background()

    def load(self, misfit: Misfit) -> Snapshot | None:
        """The newest checkpoint that can be used, whose best weights are put back; None where there is none."""
        snapshot = self._checkpoints.load(misfit)
        if snapshot is not None and self._world.is_main:
            with self._disk.tolerated("write weights/best.pt"):
                restore_best(snapshot.path, self.run)
        return snapshot

    def begin_rows(self, rows: Sequence[Row]) -> None:
        """Have metrics.jsonl hold these rows and no others; no rank goes on before that."""
        if self._world.is_main:
            self._results.history.begin(rows)
        self._world.barrier()

    def write_rows(self, rows: Sequence[Row]) -> None:
        """Have the rows written, without waiting. No collective."""
        if self._world.is_main:
            self._results.history.write(rows)

    def copy_weights(self, weights: Mapping[Path, Mapping[str, Any]]) -> None:
        """Copy whole state_dicts, to be written to these files with what is written next."""
        self._background.wait()
        if self._world.is_main:
            self._results.snapshot(weights)

    def write(self, checkpoint: Callable[[], None] | None = None) -> None:
        """Write what was copied. Results come first, since a checkpoint links to the best weights."""
        results = [self._results.write] if self._world.is_main else []
        self._background.start([*results, *([checkpoint] if checkpoint else [])])

    def copy_state(
        self,
        moment: Moment,
        best_step: int,
        shared: Mapping[str, Any],
        own: Mapping[str, Any],
        of_rank_0: Sequence[str],
    ) -> Callable[[], None]:
        """Copy a state, for `write`: see `Checkpoints.snapshot`."""
        self._background.wait()
        return self._checkpoints.snapshot(moment, best_step, shared, own, of_rank_0)

    def require_written(self, step: int) -> None:
        """Wait until all is written, for a stop.

        Raises:
            UserError: the checkpoint could not be.
        """
        self._background.wait()
        self._results.history.wait()
        if self._world.from_main(self._checkpoints.failed):
            last = self._disk.last_good()
            raise UserError(f"stopped at step {step}, but the checkpoint could not be written; {last}")

    def finish(self) -> None:
        """Wait until all is written; raises UserError where results can't be."""
        self._background.wait()
        if self._world.is_main:
            self._results.finish()

    def leave(self, error: BaseException | None) -> None:
        """Wait a moment for what is being written. No collective of this thread's."""
        self._background.__exit__(None if error is None else type(error), error, None)
        self._results.history.wait(GRACE_S)
