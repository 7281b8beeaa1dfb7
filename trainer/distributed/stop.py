"""A stop of all ranks at the same step: a request to one is agreed on by all, at little cost."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from dtrain.run.folder import EXIT_STOPPED
from dtrain.run.heartbeat import Heartbeat
from dtrain.signals import leave_to_agent

from .world import World

DOUBT = 1 << 10  # agreed on as signals are, and above all of them: whether the weights are numbers


class Stopped(SystemExit):
    """Training ended at a step boundary, on a signal, with a checkpoint saved. A script that lets it pass exits 75."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(EXIT_STOPPED)
        self.signal_number = signal_number


@contextlib.contextmanager
def signals_left_to_agent() -> Iterator[None]:
    """`leave_to_agent`, for a while."""
    if threading.current_thread() is not threading.main_thread():  # where handlers can't be set
        yield
        return
    before = leave_to_agent()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopAgreement:
    """All ranks learn, at the same turns, whether any of them was asked to stop.

    A turn is a step, or a batch evaluated. The question is sent before a turn's work and answered after it, so that the
    few bytes travel meanwhile. Each answer says alike on all ranks when they ask again: after the turns that the
    slowest of them does in INTERVAL_S, by the longest of its last ones, but after no more than a sixteenth of all so
    far, which may have been short by chance.
    """

    INTERVAL_S = 0.25

    def __init__(self, world: World, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat
        self._group = world.control
        self._message = torch.zeros(2, dtype=torch.int64)  # the request, and the longest turn since the last, in ns
        self._asked: dist.Work | None = None
        self._in_doubt = False
        self._turns = self._asks_at = self._longest = 0
        self._began: int | None = None

    def ask(self, *, in_doubt: bool = False) -> None:
        """Before a turn. All ranks take part (without waiting). With `in_doubt` of any of them, all agree on DOUBT."""
        self._in_doubt |= in_doubt
        now = time.perf_counter_ns()
        self._longest = max(self._longest, now - (self._began or now))
        self._began = now
        if self._group is None or self._turns < self._asks_at:
            return
        self._message[0], self._message[1] = self._take_request(), self._longest
        self._longest = 0
        self._asked = dist.all_reduce(self._message, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def agreed(self) -> int:
        """After the turn: the signal's number, the same on all ranks, or DOUBT; 0 to go on."""
        self._turns += 1
        if self._group is None:
            return self._take_request()
        if self._asked is None:
            return 0
        self._asked.wait()
        self._asked = None
        request, longest = self._message.tolist()
        self._asks_at = self._turns + min(self._turns // 16, int(self.INTERVAL_S * 1e9) // max(longest, 1))
        return int(request)

    def _take_request(self) -> int:
        in_doubt, self._in_doubt = self._in_doubt, False
        return DOUBT if in_doubt else self._heartbeat.stop
