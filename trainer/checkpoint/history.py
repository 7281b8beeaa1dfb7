"""Writes metrics.jsonl on a thread of its own: no step waits for a slow disk.

A row is written as soon as it is there, but for rows in quick succession: those of PAUSE_S are written together, since
having the disk take one costs as much as some steps of a small model.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from dtrain.run.folder import Row, RunDir

from .background import Disk

PAUSE_S = 0.25


class History:
    """The rows of a fit, on rank 0. What the disk refuses is reported, and written with what comes next."""

    def __init__(self, run: RunDir, disk: Disk) -> None:
        self._run = run
        self._disk = disk
        self._rows: Sequence[Row] = ()
        self._written: int | None = 0  # rows in the file; None where that is not known
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_working = False
        self._is_awaited = threading.Event()

    def begin(self, rows: Sequence[Row]) -> None:
        """Have the file hold these rows and no others: those of later steps belong to what is done again."""
        self._rows, self._written = list(rows), None
        self._write(self._rows)

    def write(self, rows: Sequence[Row]) -> None:
        """Have the file hold these rows, which begin with those from before; returns at once."""
        with self._lock:
            self._rows = list(rows)
            if not self._is_working:
                self._is_working = True
                self._is_awaited.clear()
                self._thread = threading.Thread(target=self._work, name="dtrain-history", daemon=True)
                self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the thread has done what it can; whether all is written."""
        if self._thread is not None:
            self._is_awaited.set()
            self._thread.join(timeout)
        return self._written == len(self._rows)

    def finish(self) -> bool:
        """Write what is missing, at the end of the training; whether that was possible."""
        if not self.wait():
            self.write(self._rows)
        return self.wait()

    def _work(self) -> None:
        while True:
            self._write(rows := self._rows)
            self._is_awaited.wait(PAUSE_S)
            with self._lock:
                if self._rows is rows:  # nothing new; what was refused waits for the next row
                    self._is_working = False
                    return

    def _write(self, rows: Sequence[Row]) -> None:
        written, self._written = self._written, None  # a write that fails may leave half a row
        with self._disk.tolerated("write metrics.jsonl"):
            if written is None:
                self._run.write_rows(rows)
            elif written < len(rows):
                self._run.append_rows(rows[written:])
            self._written = len(rows)
