"""Other processes of this machine, as /proc shows them."""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path


def children(pid: int) -> list[int]:
    """The running child processes of a process, oldest first."""
    return sorted(child for child, parent, _ in _all() if parent == pid)


def kill_sessions(sessions: Collection[int]) -> None:
    """Send SIGKILL to all processes in these sessions."""
    for pid, _, session in _all():
        if session in sessions:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def is_suspended(pid: int) -> bool:
    """Whether a process is stopped, as by SIGSTOP or a debugger."""
    return _status(pid, "State").startswith(("T", "t"))


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for that signal."""
    mask = _status(pid, "SigCgt")
    return bool(mask) and bool(int(mask, 16) >> (number - 1) & 1)


def oom_kills() -> int:
    """How many processes of this machine the kernel has killed for lack of memory since boot."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _all() -> Iterator[tuple[int, int, int]]:
    """The ids of all processes, each with its parent and session."""
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with suppress(OSError, IndexError):
                # The name, in parentheses, may contain anything.
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                yield int(entry), int(fields[1]), int(fields[3])


def _status(pid: int, key: str) -> str:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return line.partition(":")[2].strip()
    return ""
