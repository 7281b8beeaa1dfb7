"""What a run writes to disk: checkpoints, rows, weights; behind the training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dtrain.errors import UserError
from dtrain.run.folder import Row, RunDir
from dtrain.schema.sections import Checkpoint

from ..distributed.world import World
from .background import GRACE_S, Background, Disk
from .manager import Checkpoints, Moment, restore_best
from .reader import Misfit, Snapshot
from .results import Results


class RunWriter:
    """Copies what must be kept, and writes it in the background; all ranks take part in all of it.

    Attributes:
        run: where it goes.

    Args:
        room: see `Checkpoints`.
    """

    def __init__(
        self,
        run: RunDir,
        world: World,
        settings: Checkpoint,
        room: Callable[[str, Tensor], Tensor | None] = lambda *_: None,
    ) -> None:
        self.run = run
        self._world = world
        self._disk = Disk(run)
        self._results = Results(run, self._disk)
        self._checkpoints = Checkpoints(run, world, settings, self._disk, room)
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

    def wait(self) -> None:
        """Until what was copied is written."""
        self._background.wait()

    def write(self, *jobs: Callable[[], None]) -> None:
        """Write what was copied, also what the disk refused before: results first, since checkpoints link to them."""
        results = [self._results.write] if self._world.is_main else []
        self._background.start([*results, *jobs])

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
        if self._world.from_main(self._checkpoints.failed):  # rank 0 has said why, before another rank ends
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
