"""The lock of a run's one writer, and who that is."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.errors import UserError
from dtrain.files import read_json
from dtrain.run.filelock import try_lock, warn_of_no_locks

STALE_AFTER_S = 30.0  # status.json is rewritten every second; this old, its writer on another host is gone


@dataclass(frozen=True)
class Writer:
    """The process that keeps a run: an agent, or else a script that was started without one."""

    host: str
    pid: int
    is_agent: bool

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()


class Locked:
    """A run's folder as its writers see it: `lock_file` names the one there is, and `status_file` shows it alive."""

    path: Path
    lock_file: Path
    status_file: Path

    @contextlib.contextmanager
    def lock(self, *, is_agent: bool = False) -> Iterator[None]:
        """Be this run's only writer, until the block ends or the process does.

        On a file system without locks the writer before is still found, by its process here or its status elsewhere;
        but not one that starts at the same moment.

        Raises:
            UserError: another live process is; the message names it.
        """
        descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o640)
        try:
            locked = _flock(descriptor)
            if locked is None:
                warn_of_no_locks(self.path)
            if locked is False or (locked is None and self._is_written_here()) or self._has_remote_writer():
                holder = read_json(self.lock_file) or {}
                raise UserError(
                    f"{self} is being written by process {holder.get('pid')} on {holder.get('host')}; "
                    f"wait for it, or stop it: dtrain cancel {self}"
                )
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({**_me(), "is_agent": is_agent}).encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def last_writer(self) -> Writer | None:
        """The process that writes this run, or was the last to; None where there was none."""
        holder = read_json(self.lock_file) or {}
        host, pid = holder.get("host"), holder.get("pid")
        if not isinstance(host, str) or not isinstance(pid, int):
            return None
        return Writer(host, pid, holder.get("is_agent") is True)

    def writer(self) -> Writer | None:
        """The live process that writes this run, by what the lock says of it; None where there is none."""
        writer = self.last_writer()
        if writer is None:
            return None
        is_alive = self._is_locked() if writer.is_here else self._has_remote_writer()
        return writer if is_alive else None

    @contextlib.contextmanager
    def process_of(self, writer: Writer) -> Iterator[int]:
        """A pidfd of this run's writer: whatever becomes of its number, no other process is meant.

        Raises:
            ProcessLookupError: no process of this number holds this run's lock.
            OSError: it can't be known: PermissionError, if it is another user's.
        """
        descriptor = os.pidfd_open(writer.pid)
        try:
            # The number alone proves nothing: it may be used again, or be that of another container.
            if not self._is_open_in(writer.pid) or has_ended(descriptor):
                raise ProcessLookupError
            yield descriptor
        finally:
            os.close(descriptor)

    def _is_open_in(self, pid: int) -> bool:
        lock = self.lock_file.stat()
        with contextlib.suppress(FileNotFoundError):  # the process has ended
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(FileNotFoundError):  # that one is closed
                    if os.path.samestat(entry.stat(), lock):
                        return True
        return False

    def _is_locked(self) -> bool:
        descriptor = os.open(self.lock_file, os.O_RDONLY)
        try:
            free = try_lock(descriptor, shared=True)
        finally:
            os.close(descriptor)
        return self._is_written_here() if free is None else not free

    def _is_written_here(self) -> bool:
        """Whether another process of this host that has the lock's file open is the one that it names."""
        writer = self.last_writer()
        if writer is None or not writer.is_here or writer.pid == os.getpid():
            return False
        try:
            return self._is_open_in(writer.pid)
        except PermissionError:  # it is another user's, and may be the one
            return True

    def _has_remote_writer(self) -> bool:
        """Another host's flock may not be visible here, but the age of its status is."""
        holder = read_json(self.lock_file)
        if holder is None or holder.get("host") == socket.gethostname():
            return False
        if holder.get("slurm_job_id") and holder["slurm_job_id"] == os.environ.get("SLURM_JOB_ID"):
            return False  # this job, before it was requeued: Slurm starts it again once it is over everywhere
        status = read_json(self.status_file) or {}
        if status.get("state") != "running":
            return False
        return time.time() - self.status_file.stat().st_mtime < STALE_AFTER_S


def has_ended(process: int, timeout_s: float = 0.0) -> bool:
    """Whether the process behind a pidfd has ended, or does within the time."""
    return bool(select.select([process], [], [], timeout_s)[0])


def _me() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
    }


def _flock(descriptor: int) -> bool | None:
    # A reader of the status holds the lock for microseconds: ask again before saying no.
    for _ in range(20):
        if (locked := try_lock(descriptor)) is not False:
            return locked
        time.sleep(0.01)
    return False
