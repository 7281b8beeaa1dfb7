"""How long something lasts, without the time in which this node stood still itself."""

from __future__ import annotations

import time

ASLEEP_S = 5.0  # who looks several times a second, and now after so long, was held up


class AwakeClock:
    """Seconds in which this process was awake. To be read all the time, by one that looks for others.

    One that was suspended (`scontrol suspend`, SIGSTOP), or waited for a file system, has seen nothing of the others
    meanwhile: neither that they stood still, nor that they have gone.
    """

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._asleep = 0.0

    def now(self) -> float:
        """The time, which goes on from where it was when it was last read long ago."""
        now = time.monotonic()
        if now - self._last > ASLEEP_S:
            self._asleep += now - self._last
        self._last = now
        return now - self._asleep
