"""A run's tracker processes: started when there is something to send, and left to finish when the run has ended."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

from dtrain.monitoring.tracker import Tracker, trackers
from dtrain.run.folder import RunDir
from dtrain.signals import held_back

GRACE_S = 60.0  # for a tracker to finish, if nothing may outlive this process
STOPPED_GRACE_S = 5.0  # in a cluster's job that was stopped: it must end, and be requeued, before its time is up


class TrackerProcesses:
    """A process for each tracker, in a session of its own.

    So it outlives a killed run for the moment that it takes to close the run's copy as killed.

    Args:
        say: shows a line to the user.
        wait: whether the end waits until each has all of the run, however long that takes.
    """

    def __init__(self, run: RunDir, say: Callable[[str], None], *, wait: bool) -> None:
        self._run = run
        self._say = say
        self._wait = wait
        self._processes: dict[Tracker, subprocess.Popen[bytes]] = {}
        self._untracked: set[Tracker] = set()  # for want of something, which has been said

    def start(self) -> None:
        """Start those that are on and not yet started. After the first step: importing mlflow takes seconds."""
        for tracker in trackers():
            if tracker in self._processes or tracker in self._untracked or tracker.is_off():
                continue
            if lacking := tracker.lacking():
                self._untracked.add(tracker)
                self._say(f"the run is not recorded in {tracker.title}, which {lacking}")
                continue
            with tracker.log(self._run).open("ab") as log, held_back():
                self._processes[tracker] = subprocess.Popen(
                    tracker.command(self._run),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "PYTHONSAFEPATH": "1"},  # the user's folder may have an mlflow.py
                    start_new_session=True,
                )

    def leave(self, *, in_cluster_job: bool, was_stopped: bool) -> None:
        """The run is over, and its status final: see that its copies are, and say of each that is not."""
        grace_s = self._grace_s(in_cluster_job, was_stopped)
        for tracker, process in self._processes.items():
            log = tracker.log(self._run)
            try:
                code = process.wait(grace_s)
            except subprocess.TimeoutExpired:
                if grace_s == STOPPED_GRACE_S:
                    self._say(f"{tracker.title} upload is unfinished; it continues when the run does")
                else:
                    sending = f"upload is unfinished; process {process.pid} continues it and reports in {log}"
                    self._say(f"{tracker.title} {sending}")
                continue
            if code != 0 and log.exists():
                lines = log.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
                self._say(f"{tracker.title} upload failed: {lines[-1]}")

    def _grace_s(self, in_cluster_job: bool, was_stopped: bool) -> float | None:
        """How long the end waits for a tracker; None: as long as it takes."""
        if in_cluster_job:
            return STOPPED_GRACE_S if was_stopped else GRACE_S
        if self._wait:
            return None
        # When the first process of a container or a service ends, all others are killed.
        return GRACE_S if 1 in (os.getpid(), os.getppid()) else 0.0
