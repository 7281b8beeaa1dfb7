"""Follows a run folder: sends what is new to a mirror, until the run has ended and the mirror is complete.

The folder is the truth and the mirror the copy: after any error the mirror is made anew, asks what is there, and sends
the rest. Whoever starts a tracker has written status.json before: a run without one, or with a final state, has ended.
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
    """The copy of a run. Making it continues the copy that there is."""

    def update(self, final: str | None) -> None:
        """Send what the folder has and the copy has not; close it where `final` tells the run's last state."""


def ignore_what_a_cluster_sends() -> None:
    """A cluster signals every process of a job; this one has yet to report how the others ended."""
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
    """Mirror the run until it has ended: 0 when the mirror has all of it, 1 when it could not be made so.

    Args:
        where: the copy's place, for messages.
        mirrored: makes the mirror.
    """
    mirror: Mirror | None = None
    failing = False
    give_up_at = math.inf
    while True:
        final = final_state(now := status())  # before the rows are read: none are added after it
        give_up_at = min(give_up_at, time.monotonic() + give_up_s) if final else math.inf
        try:
            mirror = mirror or mirrored()
            mirror.update(final)
        except Exception as error:  # whatever the other side, the network or the disk raise
            mirror = None  # the failed request may have arrived: ask anew what is there
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
    """Importing a tracker's library takes seconds of CPU, which the ranks need until then."""
    while not final_state(now := status()) and now.get("step", 0) < 1:
        time.sleep(POLL_S)


def final_state(status: dict[str, Any]) -> str | None:
    """The state where it is final; a run without a status, its folder deleted, was killed."""
    state = status.get("state", "killed")
    return state if state in FINAL else None


def _report(where: str, error: Exception, outcome: str) -> None:
    cause = " ".join(str(error).split()) or type(error).__name__
    print(hide_password(f"dtrain: {where}: {cause}; {outcome}"), file=sys.stderr, flush=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the file's lock, waiting for it; a file system that has no locks goes without."""
    with path.open("a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
