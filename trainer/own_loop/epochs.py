"""A loop of the user's own that continues where it was stopped: its epochs, and what happens between its batches."""

from __future__ import annotations

import atexit
import contextlib
import sys
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from torch.optim import Optimizer

from dtrain.errors import UserError
from dtrain.run.folder import Row, RunDir
from dtrain.run.heartbeat import Beat, Heartbeat, Phase
from dtrain.schema.interval import Interval, seconds
from dtrain.stderr import say

from ..checkpoint.run_writer import RunWriter
from ..checks.arguments import Settings
from ..distributed.stop import Stopped
from ..distributed.wishes import NONE, Agreement, Wish
from ..distributed.world import World
from ..metrics.early_stopping import Best
from ..metrics.plots import try_to_draw
from .parts import Parts
from .rows import head_of, require_monitored, row_of
from .state import State
from .tracked import Loader, Tracked
from .turn import Turn


class Epochs:
    """Iterate over it, once. All ranks take part, in step with each other.

    Args:
        folder: gives the run's folder, and keeps its status while it is open.
        parts: what is trained.
        tracked: what else the script has made.
        settings: of them `fit` and `checkpoint`.
        is_chosen: whether the user has named the monitor, or what ends the loop early.
    """

    def __init__(
        self,
        world: World,
        folder: contextlib.AbstractContextManager[RunDir],
        parts: Parts,
        tracked: Tracked,
        settings: Settings,
        *,
        is_chosen: bool,
    ) -> None:
        assert settings.fit.epochs is not None
        assert settings.fit.early_stopping is not None
        self.count = settings.fit.epochs
        self.is_over = False
        self._world = world
        self._folder = folder
        self._parts = parts
        self._tracked = tracked
        self._settings = settings.checkpoint
        self._interval, self._save_every_s = Interval.of(self._settings.every), seconds(self._settings.every)
        self._is_chosen = is_chosen
        self.state = State(world, parts, tracked, Best(settings.fit.early_stopping))
        self._num_metrics = tracked.num_metrics
        self._saver: RunWriter | None = None  # once it has begun
        self._turn = Turn()
        self._is_asked = False  # what the ranks wish for, before the batch in hand
        self._postponed = NONE
        self._saved_at = self._turned_at = time.monotonic()

    @property
    def is_running(self) -> bool:
        """Whether it has begun, and is not over."""
        return self._saver is not None and not self.is_over

    # -- epochs ----------------------------------------------------------------------------------

    def __iter__(self) -> Epochs:
        if self._saver is not None:
            raise UserError("Ranks.epochs was iterated over already: call it again for another loop")
        return self

    def __next__(self) -> int:
        if self.is_over:
            raise StopIteration
        try:
            if self._saver is None:
                self._begin()
            else:
                self._end_epoch()
            if self._is_at_end and not self.state.is_on_its_way:
                self._finish()
        except BaseException as error:
            self.leave(error)
            raise
        if self.is_over:
            raise StopIteration
        self._tracked.num_metrics = self._num_metrics
        self._beat()
        return self.state.place.epoch

    @property
    def _is_at_end(self) -> bool:
        """Whether no epoch is to follow on the last one, or on the current one."""
        return self.state.place.epoch > self.count or self.state.place.verdict is not None

    def _begin(self) -> None:
        run = self._folder.__enter__()
        self._heartbeat = Heartbeat(run.heartbeat(self._world.rank))
        self._agreement = Agreement(self._world, self._heartbeat)
        self._saver = RunWriter(run, self._world, self._settings, self._parts.room)
        atexit.register(self._leave_at_exit)  # after `break`, or an error
        optimizers = self._parts.optimizers.values()
        self._hooks = [each.register_step_post_hook(self._after_step) for each in optimizers]
        if (snapshot := self._saver.load(self.state.misfit)) is not None:
            self.state.resume(snapshot)
        self._saver.begin_rows(self.state.rows)

    def _end_epoch(self) -> None:
        self.state.require_continued()
        if self.state.place.epoch == 1 and (self.state.rows or self._is_chosen):
            require_monitored(self.state.best, self._world, is_chosen=self._is_chosen)
        self._turn.end()
        ended = self.state.place.epoch
        self.state.place.end_epoch()
        is_last = self._is_at_end
        if self._heartbeat.stop:
            self._agreement.wish(Wish.STOP)
        # All ranks: also what was asked before the last batch.
        wishes = self._postponed | self._agreed() | self._agreement.at_once((Wish.STOP, Wish.SAVE))
        self._postponed = NONE
        stops = Wish.STOP in wishes and not is_last
        self._copy_last()
        if stops or is_last or Wish.SAVE in wishes or (self._interval and self._interval.is_over(0, ended)):
            self._save()
        else:
            self._begun.write()
        if stops:
            self._stop()

    def _finish(self) -> None:
        saver, place = self._begun, self.state.place
        if self._world.is_main and place.verdict is not None:
            say(f"stopping early, after step {place.step}: {place.verdict}")
        self._heartbeat.enter(Phase.SAVING)
        saver.finish()
        if self._world.is_main and (self._turn.samples or not saver.run.plots.exists()):
            try_to_draw(saver.run, self.state.rows, self.state.best.step, ("train", "val"))
        self.leave(None)

    def leave(self, error: BaseException | None) -> None:
        """End here, with what is saved. No collective."""
        if self.is_over:
            return
        self.is_over = True
        atexit.unregister(self._leave_at_exit)
        if self._saver is not None:
            for hook in self._hooks:
                hook.remove()
            self._saver.leave(error)
            self._heartbeat.enter(Phase.DONE)
        failure = (None, None, None) if error is None else (type(error), error, error.__traceback__)
        self._folder.__exit__(*failure)

    def _leave_at_exit(self) -> None:
        self.leave(getattr(sys, "last_value", None))

    @property
    def _begun(self) -> RunWriter:
        assert self._saver is not None
        return self._saver

    # -- batches ---------------------------------------------------------------------------------

    def before_batch(self, loader: Loader) -> None:
        """Between two batches of the outermost loader, do what any rank has wished for. All ranks take part.

        Not between a gradient and the optimizer's step: of batches whose gradients are added up, after the last one.

        Raises:
            Stopped: all ranks agreed to stop; a checkpoint of this very place is saved.
        """
        if not self._is_outermost(loader):
            self._turn.pause()
            return
        if self._turn.is_counted and self.state.place.active[loader.number] == loader.batches.num_steps:
            self._world.await_device()  # what is measured is training, not asking for it
        has_stepped = self._turn.end()
        wishes = self._postponed | self._agreed()
        self._beat(loader)
        if has_stepped and self._interval and self._interval.is_over(self.state.place.step, 0):
            wishes |= {Wish.SAVE}
        self._postponed = wishes if self._turn.is_pending else NONE
        if wishes - self._postponed:
            self._save()
        if Wish.STOP in wishes - self._postponed:
            self._stop()
        self._turn.begin()

    def end_iteration(self, loader: Loader) -> None:
        """One over the loader is over, or was left. No collective."""
        self.state.end_iteration(loader)
        (self._turn.resume if self.state.place.active else self._turn.pause)()

    def hand_out(self, loader: Loader) -> None:
        """A batch of the loader comes now. All ranks take part where it is the outermost, without waiting."""
        self.state.place.active[loader.number] += 1
        if not self._is_outermost(loader):
            return
        is_time = self._save_every_s is not None and time.monotonic() - self._saved_at >= self._save_every_s
        self._agreement.ask([Wish.SAVE] if self._world.is_main and is_time else [])
        self._is_asked = True
        self._heartbeat.enter(self._phase(Phase.FORWARD))

    def count_step(self, samples: int) -> None:
        """The loss of the batch in hand is scaled: it is one that is trained on."""
        if not self._turn.is_counted:
            self._turn.count(samples)
            self.state.place.step += 1
            self.state.place.lr = self._parts.learning_rate

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._turn.is_pending = False
        if self.state.place.active and not self._turn.samples:
            name = type(optimizer).__name__
            raise UserError(
                f"the {name} has made a step by a loss that was not scaled: ranks.scale_loss(loss).backward()"
            )

    def _is_outermost(self, loader: Loader) -> bool:
        return next(iter(self.state.place.active)) == loader.number

    def _agreed(self) -> frozenset[Wish]:
        """What any rank had wished before the last batch. All ranks take part."""
        if not self._is_asked:
            return NONE
        self._is_asked = False
        return self._agreement.agreed()

    def _phase(self, training: Phase) -> Phase:
        return training if self._parts.net.bare.training else Phase.VALIDATING

    def _beat(self, loader: Loader | None = None) -> None:
        """Show this rank's position."""
        now = time.monotonic()
        turn_s, self._turned_at = now - self._turned_at, now
        place, phase = self.state.place, self._phase(Phase.LOADING)
        done, steps = (0, 0) if loader is None else (place.active[loader.number], loader.batches.num_steps or 0)
        epoch, samples = min(place.epoch, self.count), float(self._turn.samples)
        self._heartbeat.beat(Beat(epoch, self.count, place.step, done, steps, samples, phase=phase, stop_s=turn_s))

    # -- rows ------------------------------------------------------------------------------------

    def report(self, values: Mapping[str, Any]) -> Row:
        """Add a row, see `Ranks.report`. All ranks take part."""
        place, best = self.state.place, self.state.best
        self._heartbeat.enter(Phase.REPORTING)
        self._turn.pause()
        lr = float(self._parts.learning_rate if place.lr is None else place.lr)
        head = head_of(place, self._tracked.share_done(place.active), lr, self._turn.take_speed())
        row = row_of(self._world, head, values, self._tracked.logged)
        self._tracked.logged.reset()
        place.reported = place.step
        self.state.rows.append(row)
        self._begun.write_rows(self.state.rows)
        if best.monitor in row:
            if best.update(row):
                self._begun.copy_weights({self._begun.run.best_weights: self._parts.net.weights()})
                self._begun.write()
            place.verdict = place.verdict or best.verdict
        self._turn.resume()
        return dict(row)

    # -- saving ----------------------------------------------------------------------------------

    def _copy_last(self) -> None:
        self._begun.copy_weights({self._begun.run.last_weights: self._parts.net.weights()})

    def _save(self) -> None:
        """Save a checkpoint of this place. All ranks copy, and go on while the copies are written."""
        self._heartbeat.enter(Phase.SAVING)
        saver = self._begun
        saver.write(saver.copy_state(self.state.place.moment, self.state.best.step, *self.state.saved()))
        self._saved_at = time.monotonic()
        self._heartbeat.enter(self._phase(Phase.LOADING))

    def _stop(self) -> NoReturn:
        """End, since the checkpoint of this place is being written. All ranks take part."""
        try:
            self._copy_last()
            self._begun.write()
            self._heartbeat.enter(Phase.SAVING)
            self._begun.require_written(self.state.place.step)
            raise Stopped
        except BaseException as error:
            self.leave(error)
            raise
