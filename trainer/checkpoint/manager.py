"""The checkpoints of a run: their names, which are kept, and which one the run continues from.

    checkpoints/step-000000120/               in mid-epoch
    checkpoints/step-000000120-row/           in mid-epoch, after the validation or report that was due there
    checkpoints/step-000000120-epoch-0003/    at the end of an epoch, after its validation
    checkpoints/latest                        the name of the newest
    checkpoints/damaged-step-000000100/       found damaged, and skipped

A folder appears when all of it is on disk. It holds the state of each rank, and once what is the same on all; see
storage.py.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import yaml
from torch import Tensor
from torch.distributed.tensor import DTensor

from dtrain import __version__
from dtrain.errors import Problem, ResumeError
from dtrain.files import hidden_name, write_atomic, write_text
from dtrain.run.folder import RunDir
from dtrain.schema.interval import Interval
from dtrain.schema.sections import Checkpoint
from dtrain.stderr import say

from ..distributed.world import World, collective_timeout
from ..model.learned_loss import beside
from .background import Copies, Disk
from .codec import TEXT, flatten
from .manifest import FORMAT, Damaged, Unusable
from .reader import CheckpointReader, Misfit, Snapshot

_NAME = re.compile(r"step-(\d+)(-row)?(?:-epoch-(\d+))?")


@dataclass(frozen=True, order=True)
class Moment:
    """When a checkpoint is made. Its name identifies one state of the run."""

    step: int  # optimizer steps since the run began
    epoch: int = 0  # the epoch that has just ended, with a row; 0 in mid-epoch
    has_row: bool = False  # whether in mid-epoch a row was due, and is made

    @classmethod
    def of(cls, path: Path) -> Moment:
        """That of a checkpoint's folder."""
        match = _NAME.fullmatch(path.name)
        assert match is not None
        return cls(int(match[1]), int(match[3] or 0), bool(match[2]))

    @property
    def name(self) -> str:
        row, epoch = "-row" * self.has_row, f"-epoch-{self.epoch:04d}" * (self.epoch > 0)
        return f"step-{self.step:09d}{row}{epoch}"


class Checkpoints:
    """A run's checkpoints. All ranks take part in all of it; rank 0 reports.

    Args:
        room: to read this rank's part of a tensor of that name into, which was saved like that; None: all of it, on the
            CPU. A state need not fit into the memory of a node once for each of its ranks.

    Attributes:
        failed: whether the last one is not on disk, once it has been written.
    """

    def __init__(
        self,
        run: RunDir,
        world: World,
        settings: Checkpoint,
        disk: Disk,
        room: Callable[[str, Tensor], Tensor | None] = lambda *_: None,
    ) -> None:
        self._run = run
        self._world = world
        self._keep = settings.keep
        self._milestones = Interval.of(settings.keep_every)
        self._disk = disk
        self._reader = CheckpointReader(world, lambda: self._job, room)
        # A separate group, since its messages are in flight while the training sends others.
        alone = world.world_size == 1
        self._group = (
            None if alone else cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=collective_timeout()))
        )
        self._copies = Copies()
        self._foreign: set[str] = set()  # names taken by something that is not this run's
        self.failed = False

    # -- saving ----------------------------------------------------------------------------------

    def snapshot(
        self,
        moment: Moment,
        best_step: int | None,
        shared: Mapping[str, Any],
        own: Mapping[str, Any],
        of_rank_0: Collection[str] = (),
    ) -> Callable[[], None]:
        """Copy the state; what is returned writes it, and is to be called on another thread, on all ranks.

        The previous one must have been written. A disk that refuses is reported and tolerated.

        Args:
            shared: what is the same on all ranks; each of its tensors is copied and written by one of them, a DTensor
                in its parts by all.
            of_rank_0: paths in it for which rank 0's tensors are used, such as "model/norm.running_mean".

        Raises:
            UserError: something is not data, and can't be saved.
        """
        from . import storage  # imports DCP, when there is something to save

        folder = self._run.checkpoints / moment.name
        self.failed = not self._world.from_main(self._is_saved(folder) if self._world.is_main else False)
        if not self.failed:
            return lambda: None  # a run repeats it after a stop
        tensors = flatten(shared)
        whole = {name: tensor.nbytes for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
        writers = assign(whole, self._world.world_size)
        first = {*of_rank_0, TEXT}
        writers |= {name: 0 for name in tensors if not first.isdisjoint((name, "/".join(name.split("/")[:2])))}
        own_rank = self._world.rank
        mine = {name: tensor for name, tensor in tensors.items() if writers.get(name, own_rank) == own_rank}
        copies = self._copies.of({**mine, **flatten(own, f"rank-{own_rank}/")})
        about = self._describe(moment) if self._world.is_main else {}
        best = self._run.best_weights
        attached = {path.name: path for path in (best, beside(best))}
        write = functools.partial(storage.save, folder, copies, about, attached, self._group)
        return functools.partial(self._write, write, folder, best_step)

    def _write(self, write: Callable[[], None], folder: Path, best_step: int | None) -> None:
        if not self._world.is_main:
            with contextlib.suppress(OSError):  # rank 0 has it too, and reports it
                write()
                self.failed = False
            return
        with self._disk.tolerated("write checkpoint", folder.name):
            try:
                write()
            except OSError:
                shutil.rmtree(hidden_name(folder), ignore_errors=True)
                raise
            self.failed = False
        if not self.failed:
            with self._disk.tolerated("write checkpoints/latest"):
                write_text(self._run.latest, f"{folder.name}\n")
            with self._disk.tolerated("remove old checkpoints"):
                self._drop_old(best_step)

    def _is_saved(self, folder: Path) -> bool:
        if folder.name in self._foreign:
            self._set_aside(folder, "foreign")
        return folder.exists()

    def _describe(self, moment: Moment) -> dict[str, Any]:
        versions = {"dtrain": __version__, "torch": torch.__version__}
        about = {"format": FORMAT, "job": self._job, "step": moment.step, "epoch": moment.epoch or None}
        return {**about, "world_size": self._world.world_size, "versions": versions}

    @functools.cached_property
    def _job(self) -> str | None:
        """The job's name. Rank 0 only: it may have only just written the file."""
        job = yaml.safe_load(self._run.job.read_text())
        return job["name"] if isinstance(job, dict) else None

    def _drop_old(self, best_step: int | None) -> None:
        """Keep the newest ones, that of the best weights so far, and the milestones."""
        own = [path for path in saved(self._run) if path.name not in self._foreign]
        kept = {*own[-self._keep :], *self._first_of_each(own)}
        for path in own:
            moment = Moment.of(path)
            is_best = moment.step == best_step and (moment.has_row or moment.epoch > 0)
            if path not in kept and not is_best:
                outdated = path.rename(hidden_name(path))  # a stop must not leave half of it under its name
                shutil.rmtree(outdated)

    def _first_of_each(self, checkpoints: Iterable[Path]) -> Iterator[Path]:
        """Of those with which or after which a milestone's interval was over, the first each."""
        over = 0
        for path in checkpoints:
            moment = Moment.of(path)
            if self._milestones is not None and (number := self._milestones.number(moment.step, moment.epoch)) > over:
                over = number
                yield path

    def _set_aside(self, path: Path, why: str) -> None:
        self._foreign.add(path.name)
        with contextlib.suppress(OSError):  # whoever needs the name will report it
            path.rename(path.with_name(f"{why}-{path.name}"))
            self._foreign.remove(path.name)

    # -- continuing ------------------------------------------------------------------------------

    def load(self, misfit: Misfit) -> Snapshot | None:
        """The newest checkpoint that is complete and matches this run; None if there is none.

        Each skipped one is reported; damaged ones are renamed and kept. What killed runs
        left half written is removed.

        Args:
            misfit: why a shared state does not match this run, if it does not.

        Raises:
            ResumeError: there are checkpoints, and none that can be used.
        """
        names = self._world.from_main(self._tidy() if self._world.is_main else [])
        problems: dict[str, Unusable] = {}
        found = None
        while names and found is None:
            path = self._run.checkpoints / names.pop()
            found, problem = self._reader.read(path, misfit)
            if problem is not None:
                problems[path.name] = problem
        if problems and found is None:
            lines = [Problem(str(each), file=str(self._run.checkpoints / name)) for name, each in problems.items()]
            raise ResumeError([*lines, Problem("no other checkpoint is left to continue from", file=str(self._run))])
        if found is not None and self._world.is_main:
            self._settle_on(found.path, problems)
        return found

    def _tidy(self) -> list[str]:
        for folder, pattern in (
            (self._run.checkpoints, ".*"),
            (self._run.best_weights.parent, ".*"),
            (self._run.path, f".{self._run.metrics.name}.*"),
        ):
            for path in folder.glob(pattern):
                with contextlib.suppress(OSError):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        return [path.name for path in saved(self._run)]

    def _settle_on(self, path: Path, problems: Mapping[str, Unusable]) -> None:
        """Report what was skipped, and make `latest` name what was not. Rank 0 only."""
        with self._disk.tolerated("write checkpoints/latest"):
            write_text(self._run.latest, f"{path.name}\n")
        for name, problem in problems.items():
            say(f"checkpoint {self._run.checkpoints / name} is skipped: {problem}; continuing from {path.name}")
            self._foreign.add(name)
            if isinstance(problem, Damaged):
                self._set_aside(self._run.checkpoints / name, "damaged")


def saved(run: RunDir) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted((path for path in run.checkpoints.glob("step-*") if _NAME.fullmatch(path.name)), key=Moment.of)


def restore_best(path: Path, run: RunDir) -> None:
    """Put the best weights back to what they were at the checkpoint. Rank 0 only."""
    for best in (run.best_weights, beside(run.best_weights)):
        _restore(path / best.name, best)


def _restore(saved: Path, best: Path) -> None:
    if saved.exists():
        write_atomic(best, lambda temporary: shutil.copyfile(saved, temporary))
    else:
        best.unlink(missing_ok=True)


def assign(sizes: Mapping[str, int], world_size: int) -> dict[str, int]:
    """Which rank writes which tensor: nearly equal shares of the bytes. The same on all ranks, without a message."""
    loads = [(0, rank) for rank in range(world_size)]
    writers = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, writers[name] = loads[0]
        heapq.heapreplace(loads, (load + sizes[name], writers[name]))
    return writers
