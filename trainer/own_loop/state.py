"""What is saved of a loop of the user's own, and how its script comes to the place where it was stopped.

A script can't be entered in its middle. So an epoch that was stopped begins again with its first line: iterations over
loaders that were over give no batch, what `compute` and `report` gave is given again, and where the loader comes that
was stopped, everything becomes what it was there. Whatever the lines before have done meanwhile is undone by that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar, cast

from dtrain.errors import ResumeError
from dtrain.run.folder import Row
from dtrain.stderr import say

from ..checkpoint.reader import Snapshot
from ..distributed.world import World
from ..metrics.early_stopping import Best
from ..strategies.base import shortened
from .parts import Parts
from .place import Place
from .tracked import Loader, Tracked

T = TypeVar("T")

_LOOP = "own loop"  # no part can have this name


class State:
    """Of the loop, with everything that belongs to it.

    Attributes:
        place: where the loop is.
        rows: those made so far.
        best: which of them is the best.
    """

    def __init__(self, world: World, parts: Parts, tracked: Tracked, best: Best) -> None:
        self.place = Place()
        self.rows: list[Row] = []
        self.best = best
        self._world = world
        self._parts = parts
        self._tracked = tracked
        self._snapshot: Snapshot | None = None  # of the place in mid-epoch that the script is on its way to,
        self._target: Place | None = None  # which is this one
        self._results: Iterator[Any] = iter(())  # of the lines that come again

    # -- saving ----------------------------------------------------------------------------------

    def saved(self) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
        """What is the same on all ranks, what each has to itself, and of what in the former rank 0's counts.

        All ranks take part.
        """
        own = {"buffers": self._parts.own_buffers(), "tracked": self._tracked.own_state()}
        buffers = [f"{name}/{buffer}" for name, found in own["buffers"].items() for buffer in found]
        loop = {
            "place": self.place.state_dict(),
            "rows": self.rows,
            "best": self.best.state_dict(),
            "kinds": self._parts.kinds(),
            "trained": self._parts.trained(),
            "tracked": self._tracked.state_dict(),
        }
        return {_LOOP: loop, **self._parts.state_dict()}, own, buffers

    # -- continuing ------------------------------------------------------------------------------

    @property
    def is_on_its_way(self) -> bool:
        """Whether the script has still to come to the place where it was stopped."""
        return self._target is not None

    def misfit(self, state: dict[str, Any]) -> str | None:
        """Why a checkpoint is not this loop's, if it is not. No collective."""
        if _LOOP not in state:
            return "a checkpoint of Trainer's, not of a loop over Ranks.epochs"
        return self._parts.misfit(state[_LOOP]["kinds"], state)

    def resume(self, snapshot: Snapshot) -> None:
        """Become what was saved: now, and in mid-epoch once more at that place. All ranks take part."""
        place = Place(**snapshot.shared[_LOOP]["place"])
        if place.active:
            self._snapshot, self._target, self._results = snapshot, place, iter(place.results)
            snapshot = copy.deepcopy(snapshot)  # the lines before that place may change what they find
        trained = self._parts.trained()
        self._load(snapshot)
        changed = sorted({own for name, now in self._parts.trained().items() for own in {*now} ^ {*trained[name]}})
        if self._world.is_main and changed:
            say(
                f"requires_grad of {shortened(changed)} is what it was when the run was saved, not what the script says"
            )
        if place.active:
            self.place = replace(self.place, finished=0, active={}, results=[])

    def begin_iteration(self, loader: Loader) -> int | None:
        """The batch to begin with, from 0; None: the iteration was over before the stop. All ranks take part."""
        if not self.place.active and self._target is not None:
            if self.place.finished < self._target.finished:
                self.place.finished += 1
                return None
            self._arrive(loader)
        elif loader.number not in self.place.active:
            loader.epoch += 1
        return self.place.active.setdefault(loader.number, 0)

    def end_iteration(self, loader: Loader) -> None:
        """It is over, or was left. No collective."""
        self.place.active.pop(loader.number, None)
        self.place.finished += not self.place.active

    def once(self, give: Callable[[], T]) -> T:
        """What this gives; where the lines of an epoch come again, what it gave then."""
        if self.place.active:
            return give()
        if self._target is not None:
            for given in self._results:
                return cast(T, copy.deepcopy(given))
        given = give()
        self.place.results.append(given)
        return given

    def require_continued(self) -> None:
        """At an epoch's end: has the script come to the place where it was stopped?"""
        if self.is_on_its_way:
            raise ResumeError(
                f"the run was stopped within epoch {self.place.epoch}, at a loader that this time was not iterated "
                "over: does the script do something else than it did?"
            )

    def _arrive(self, loader: Loader) -> None:
        """Here the run was stopped: everything becomes what it was then. All ranks take part."""
        assert self._snapshot is not None
        assert self._target is not None
        if next(iter(self._target.active)) != loader.number:
            raise ResumeError(
                f"the run was stopped within epoch {self.place.epoch}, at another loader than comes here: does the "
                "script do something else than it did?"
            )
        snapshot, self._snapshot, self._target = self._snapshot, None, None
        self._load(snapshot)

    def _load(self, snapshot: Snapshot) -> None:
        """All ranks take part. To the bit on as many ranks, to the same curve on another number."""
        loop, rank = snapshot.shared[_LOOP], self._world.rank
        self._parts.train(loop.get("trained", self._parts.trained()))
        self._parts.load_state_dict(snapshot.shared)
        self.place = Place(**copy.deepcopy(loop["place"]))
        self.rows = list(loop["rows"])
        self.best.load_state_dict(loop["best"])
        self._tracked.load_state_dict(loop["tracked"])
        if snapshot.world_size == self._world.world_size:
            self._parts.load_own_buffers(snapshot.ranks[rank]["buffers"])
        own = {number: each["tracked"] for number, each in snapshot.ranks.items()}
        self._tracked.load_own(own, snapshot.world_size, self.place.step)
