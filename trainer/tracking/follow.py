"""Follows a run folder and sends what is new to a mirror, until the run has ended and the mirror is complete.

The folder is the truth, the mirror a copy: after any error a new mirror is made, which asks what is already there and
sends the rest. status.json is written before a tracker starts: a run without one, or with a final state, has ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from dtrain import signals
from dtrain.monitoring.tracker import Tracker
from dtrain.redact import hide_password
from dtrain.run.folder import RunDir

POLL_S = 0.5
RETRY_S = 3.0
GIVE_UP_S = 20.0

FINAL = ("finished", "failed", "stopped", "killed")

Status = Callable[[], dict[str, Any]]


class Mirror(Protocol):
    """The copy of a run. A new one continues the copy that already exists."""

    def update(self, final: str | None) -> None:
        """Send what the copy lacks; close the copy if `final` gives the run's final state."""


def ignore_what_a_cluster_sends() -> None:
    """A cluster signals every process of a job; this one still has to report how the others ended."""
    for number in signals.TO_ALL:
        signal.signal(number, signal.SIG_IGN)
    signals.let_through()


def follow(
    run: RunDir,
    status: Status,
    tracker: Tracker,
    where: str,
    mirrored: Callable[[], Mirror],
    *,
    retry_s: float = RETRY_S,
    give_up_s: float = GIVE_UP_S,
) -> int:
    """Mirror the run until it has ended; returns 0 if the mirror is complete, 1 if it could not be completed.

    Args:
        where: the copy's place, for messages.
        mirrored: makes the mirror.
    """
    mirror: Mirror | None = None
    failing = False
    give_up_at = math.inf
    while True:
        final = final_state(now := status())  # read before the rows: none are added after a final state
        give_up_at = min(give_up_at, time.monotonic() + give_up_s) if final else math.inf
        try:
            mirror = mirror or mirrored()
            mirror.update(final)
        except Exception as error:  # whatever the server, the network or the disk cause
            mirror = None  # the failed request may have arrived after all: ask again what is there
            if time.monotonic() >= give_up_at:
                _report(where, error, f"gave up; to finish the upload: python -m {tracker.module} {run}")
                return 1
            if not failing:
                _report(where, error, "trying again")
            failing = True
        else:
            if final:
                tracker.note_complete(run, now)
                return 0
            failing = False
        time.sleep(retry_s if failing else POLL_S)


def wait_for_first_step(status: Status) -> None:
    """Importing a tracker's library takes seconds of CPU time, which the ranks need until their first step is done."""
    while not final_state(now := status()) and now.get("step", 0) < 1:
        time.sleep(POLL_S)


def final_state(status: dict[str, Any]) -> str | None:
    """The state if it is final, else None. A run without a status, whose folder was deleted, counts as killed."""
    state = status.get("state", "killed")
    return state if state in FINAL else None


def _report(where: str, error: Exception, outcome: str) -> None:
    cause = " ".join(str(error).split()) or type(error).__name__
    print(hide_password(f"dtrain: {where}: {cause}; {outcome}"), file=sys.stderr, flush=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the file's lock and hold it in the block; on a file system without locks, do without."""
    with path.open("a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
