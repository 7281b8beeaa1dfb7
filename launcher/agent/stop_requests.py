"""Signals to a node's agent: how they become a stop of its ranks, and when that takes too long."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from dtrain import signals
from dtrain.run.heartbeat import Heartbeat, Phase
from dtrain.stderr import tolerated

from .awake_clock import AwakeClock

if TYPE_CHECKING:
    from .supervisor import Supervisor

GRACE_S = 30.0  # for ranks that were asked to stop, besides three steps and a checkpoint
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT)


class StopRequests:
    """Signals to the agent: the first asks the ranks to stop at a step boundary, a second Ctrl-C ends everything.

    SIGQUIT ends everything at once too (`dtrain cancel --now`).

    A script without a Trainer would ignore such a request: it gets the signal itself, as from torchrun.
    """

    def __init__(self, heartbeats: Mapping[int, Heartbeat], *, is_job: bool) -> None:
        self.first: int | None = None
        self.agent: Supervisor | None = None  # once it is made
        self.are_over = False  # the ranks have ended: only the report is left
        self.heartbeats = heartbeats
        self._is_job = is_job
        self._clock = AwakeClock()
        self._deadline = float("inf")
        self._unsent: int | None = None  # for ranks that have yet to start

    @property
    def are_met(self) -> bool:
        """Whether ranks have stopped on request, with a checkpoint."""
        return any(heartbeat.stopped for heartbeat in self.heartbeats.values())

    @property
    def are_heard(self) -> bool:
        """Whether the ranks check for a request: a job's do from the start, a script's once its Trainer runs."""
        return self._is_job or any(heartbeat.read().epochs for heartbeat in self.heartbeats.values())

    def is_overdue(self) -> bool:
        """Whether the ranks should have stopped long ago. Called repeatedly while they run."""
        if self._unsent is not None:
            number, self._unsent = self._unsent, None
            self._signal_ranks(number)
        now = self._clock.now()
        if any(heartbeat.read().phase == Phase.SAVING for heartbeat in self.heartbeats.values()):
            self._deadline = max(self._deadline, now + GRACE_S)  # nobody knows how long the first one takes
        return now > self._deadline

    def handled(self) -> AbstractContextManager[None]:
        """Handle signals, except a closed terminal's under `nohup`."""
        is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        return signals.handled(set(STOP_SIGNALS) - ({signal.SIGHUP} if is_nohup else set()), self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.are_over:
            if number in (signal.SIGINT, signal.SIGQUIT):  # not worth waiting for MLflow
                raise KeyboardInterrupt
            return
        if number == signal.SIGQUIT or (number == signal.SIGINT and self.first is not None):
            self._signal_ranks(signal.SIGKILL)
            raise KeyboardInterrupt
        if self.first is not None:
            return
        self.first = number
        name, again = signal.Signals(number).name, "; repeat to end at once" if number == signal.SIGINT else ""
        for heartbeat in self.heartbeats.values():
            heartbeat.stop = number
        if self.are_heard:
            _say(f"{name}: stopping at the next step, with a checkpoint{again}")
        else:
            _say(f"{name}: passed on to the ranks{again}")
            if self.agent is not None and self.agent.pids:
                self._signal_ranks(number)
            else:
                self._unsent = number
        if number != signal.SIGUSR2:  # sent by Slurm shortly before the time limit, which Slurm itself enforces
            longest = max(heartbeat.read().stop_s for heartbeat in self.heartbeats.values())
            self._deadline = self._clock.now() + GRACE_S + 3 * longest

    def _signal_ranks(self, number: int) -> None:
        for pid in self.agent.pids.values() if self.agent is not None else ():
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def _say(line: str) -> None:
    # Straight to the descriptor: a handler may have interrupted a print to the same stream.
    with tolerated(sys.stderr):  # the signal may mean that the terminal is gone
        os.write(sys.stderr.fileno(), f"{line}\n".encode())
