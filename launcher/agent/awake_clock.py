"""Measures durations without the time in which this node itself was suspended or blocked."""

from __future__ import annotations

import time

ASLEEP_S = 5.0  # the agent looks several times a second; after a longer gap it was held up


class AwakeClock:
    """Seconds in which this process was awake. Read it continuously, where others are watched.

    A process that was suspended (`scontrol suspend`, SIGSTOP), or waited for a file system, saw nothing of the others
    meanwhile: neither that they were stuck, nor that they are gone.
    """

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._asleep = 0.0

    def now(self) -> float:
        """The time; it continues from the last reading if that was long ago."""
        now = time.monotonic()
        if now - self._last > ASLEEP_S:
            self._asleep += now - self._last
        self._last = now
        return now - self._asleep
