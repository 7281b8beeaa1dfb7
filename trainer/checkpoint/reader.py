"""One checkpoint, read on all ranks: used by all of them, or by none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from dtrain.errors import first_line

from ..distributed.world import World
from .codec import unflatten
from .manifest import Damaged, Unusable, read_manifest, verify

T = TypeVar("T")

Misfit = Callable[[dict[str, Any]], "str | None"]  # why a shared state does not match this run, if it does not


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint's content, as one rank needs it."""

    path: Path
    world_size: int  # of the run that saved it
    shared: dict[str, Any]
    ranks: dict[int, dict[str, Any]]  # at the same world size this rank's own state, otherwise every rank's


class CheckpointReader:
    """Reads a run's checkpoints, one at a time. All ranks take part.

    Args:
        job: the name of the run's job; called on rank 0 alone.
        room: see `Checkpoints`.
    """

    def __init__(
        self, world: World, job: Callable[[], str | None], room: Callable[[str, Tensor], Tensor | None]
    ) -> None:
        self._world = world
        self._job = job
        self._room = room

    def read(self, path: Path, misfit: Misfit) -> tuple[Snapshot | None, Unusable | None]:
        """The checkpoint's content; or why it can't be used, on any rank."""
        index, problem = self._agreed(functools.partial(self._check, path))
        if index is None:
            return None, problem
        return self._agreed(functools.partial(self._read, path, index, misfit))

    def _check(self, path: Path) -> dict[str, Any]:
        """The checkpoint's index, after a look at this rank's share of its bytes."""
        index, sums = read_manifest(path)
        if self._world.is_main and index["job"] != (job := self._job()):
            raise Unusable(f"index.json: a checkpoint of another job, {index['job']}; this one is {job}")
        share = sorted(sums)[self._world.rank :: self._world.world_size]
        verify(path, sums, share, index["files"])
        return index

    def _read(self, path: Path, index: dict[str, Any], misfit: Misfit) -> Snapshot:
        from . import storage

        size = index["world_size"]
        ranks = [self._world.rank] if size == self._world.world_size else range(size)
        prefixes = {rank: f"rank-{rank}/" for rank in ranks}
        wanted = [n for n in index["tensors"] if not n.startswith("rank-") or n.startswith(tuple(prefixes.values()))]
        tensors = {}
        for name in wanted:
            described = index["tensors"][name]
            room = self._room(name, storage.empty_tensor(described, "meta"))
            tensors[name] = storage.empty_tensor(described) if room is None else room
        storage.load(path, index, tensors)
        own = {rank: unflatten(tensors, prefix) for rank, prefix in prefixes.items()}
        snapshot = Snapshot(path, size, unflatten(tensors), own)
        if problem := misfit(snapshot.shared):
            raise Unusable(problem)
        return snapshot

    def _agreed(self, function: Callable[[], T]) -> tuple[T | None, Unusable | None]:
        """The function's result, if no rank has a problem. All ranks take part."""
        result, problem = None, None
        try:
            result = function()
        except Unusable as error:
            problem = error
        except OSError as error:
            problem = Unusable(f"can't be read: {error.strerror}")
        except MemoryError:
            raise
        except Exception as error:  # what is in the files may be anything
            problem = Damaged(f"its content is invalid: {type(error).__name__}: {first_line(error)}")
        problems = [each for each in self._world.gather(problem) if each is not None]
        return (None, problems[0]) if problems else (result, None)
