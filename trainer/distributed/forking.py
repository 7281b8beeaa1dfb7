"""Keeps this process from forking while another of its threads does something for the first time.

A C++ function that has a static variable notes down, at its first call, what is to be destroyed at the exit. glibc does
that under a lock of its own, which stays locked in a process that is forked at that moment: there the next such first
call never returns. Seen in loading processes that were started while the first checkpoint was being written.
"""

from __future__ import annotations

import threading

# A thread that is still at it then waits for a disk, and rarely for that lock.
MOST_S = 2.0

_is_over = threading.Event()
_is_over.set()


def begin_first_time() -> None:
    """Another thread is going to do something for the first time."""
    _is_over.clear()


def end_first_time() -> None:
    """It is done."""
    _is_over.set()


def await_first_time() -> None:
    """Before a fork: wait until it is done, or for a moment."""
    _is_over.wait(MOST_S)
