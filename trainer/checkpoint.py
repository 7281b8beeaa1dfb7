"""Checkpoints: complete or invisible, read without executing anything.

    checkpoints/step-000000120/
        state.pt     what is the same on all ranks: model, optimizer, scheduler, place, best; written by rank 0
        rank-K.pt    what is rank K's own: random states, buffers, sums of the epoch so far
        best.pt      the best weights as they were then, so that a run that goes back finds them again

The folder is filled under a hidden name and renamed when all of it is on disk: a stop in between leaves the
checkpoints before it as they were.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dtrain.errors import UserError, first_line
from dtrain.files import sync, write_atomic
from dtrain.run import RunDir

from .world import World


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint's content as one rank sees it."""

    shared: dict[str, Any]
    ranks: list[dict[str, Any]]  # one for each rank of the run that saved it

    @property
    def world_size(self) -> int:
        return len(self.ranks)


def save(run: RunDir, step: int, world: World, shared: dict[str, Any], own: dict[str, Any], keep: int) -> None:
    """Save a checkpoint, and drop all but the newest `keep`. All ranks take part; `shared` is rank 0's."""
    target = run.checkpoints / f"step-{step:09d}"
    hidden = run.checkpoints / f".{target.name}"
    if world.is_main:
        shutil.rmtree(hidden, ignore_errors=True)  # a stop may have left it half full
        hidden.mkdir()
        _write({**shared, "world_size": world.world_size}, hidden / "state.pt")
        if run.best_weights.exists():
            _link(run.best_weights, hidden / "best.pt")
    world.barrier()  # the folder is there
    _write(own, hidden / f"rank-{world.rank}.pt")
    world.barrier()  # all ranks have written
    if world.is_main:
        _publish(hidden, target)
        for old in saved(run)[:-keep]:
            shutil.rmtree(old)


def saved(run: RunDir) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted(run.checkpoints.glob("step-*"))


def load(path: Path) -> Snapshot:
    """Read a checkpoint. Nothing in it is executed.

    Raises:
        UserError: a file is missing or damaged.
    """
    shared = _read(path / "state.pt")
    return Snapshot(shared, [_read(path / f"rank-{rank}.pt") for rank in range(shared["world_size"])])


def restore_best(path: Path, run: RunDir) -> None:
    """Put the best weights back to what they were at the checkpoint. Rank 0 only."""
    if (path / "best.pt").exists():
        write_atomic(run.best_weights, lambda temporary: shutil.copyfile(path / "best.pt", temporary) and None)
    else:
        run.best_weights.unlink(missing_ok=True)


def _publish(hidden: Path, target: Path) -> None:
    sync(hidden)
    if target.exists():  # the same step once more, as after a stop in validation: the newer one counts
        outdated = target.with_name(f".old-{target.name}")
        shutil.rmtree(outdated, ignore_errors=True)
        target.rename(outdated)
        hidden.rename(target)
        shutil.rmtree(outdated)
    else:
        hidden.rename(target)
    sync(target.parent)


def _write(state: dict[str, Any], path: Path) -> None:
    torch.save(state, path)
    sync(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its parser met
        raise UserError(f"checkpoint {path} can't be read: {first_line(error)}") from None
    return state


def _link(source: Path, target: Path) -> None:
    # Weights are replaced by renaming, never written into, so a second name costs nothing and stays as it is.
    try:
        os.link(source, target)
    except OSError:  # file systems without hard links
        shutil.copyfile(source, target)
