"""A stop that all ranks make at the same step: a request to one is agreed on by all, at no waiting time."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import torch
import torch.distributed as dist

from dtrain.heartbeat import Heartbeat
from dtrain.run import EXIT_STOPPED
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
    """Each step, all ranks learn whether any of them was asked to stop.

    The question is sent before the step's work and answered after it, so that the few bytes travel meanwhile.
    """

    def __init__(self, world: World, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat
        self._group = world.control
        self._request = torch.zeros(1, dtype=torch.int64)
        self._asked: dist.Work | None = None

    def ask(self, *, in_doubt: bool = False) -> None:
        """All ranks take part (without waiting). With `in_doubt` of any of them, all agree on DOUBT."""
        self._request[0] = DOUBT if in_doubt else self._heartbeat.stop
        if self._group is not None:
            self._asked = dist.all_reduce(self._request, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def agreed(self) -> int:
        """The signal's number, the same on all ranks, or DOUBT; 0 to go on. After `ask`."""
        if self._asked is not None:
            self._asked.wait()
            self._asked = None
        return int(self._request[0])
