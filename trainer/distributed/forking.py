"""Keeps this process from forking while another of its threads does something for the first time.

At its first call a C++ function with a static variable registers that variable's destructor (__cxa_atexit), which takes
a lock of glibc's. If the process is forked at that moment the lock stays locked in the child, whose own next first call
then never returns. Seen in loading processes that were started while the first checkpoint was being written.
"""

from __future__ import annotations

import threading

# A thread that takes longer mostly waits for a disk, without that lock.
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
