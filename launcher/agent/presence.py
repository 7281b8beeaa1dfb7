"""Whether the run folder is still there, while ranks write to it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

_MISSED_S = 2.0  # a run folder that is missing for so long is gone
_LOOK_EVERY_S = 0.5  # between checks: the file system may be shared by many
_LOOK_AGAIN_S = 0.1  # while somebody waits


class Presence:
    """Notices that a file was removed, or moved with its folder. A file system may fail to find it for a moment.

    A thread checks: a file system that hangs must not cut the agent off from its ranks and the other nodes.
    """

    def __init__(self, file: Path) -> None:
        self._file = file.absolute()
        self._missed_since: float | None = None
        threading.Thread(target=self._watch, name="dtrain-presence", daemon=True).start()

    def is_gone(self) -> bool:
        """Whether it has been missing for a while."""
        since = self._missed_since
        return since is not None and time.monotonic() - since > _MISSED_S

    def stays_away(self) -> bool:
        """Whether it is missing and does not reappear within a while."""
        self._look()
        while not self.is_gone() and self._missed_since is not None:
            time.sleep(_LOOK_AGAIN_S)
        return self.is_gone()

    def _watch(self) -> None:
        while True:
            self._look()
            time.sleep(_LOOK_EVERY_S)

    def _look(self) -> None:
        try:
            self._file.stat()
        except FileNotFoundError:
            self._missed_since = self._missed_since or time.monotonic()
        except OSError:
            pass
        else:
            self._missed_since = None
