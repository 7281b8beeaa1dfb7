"""How a fit stops early: by which exception, and who handles the signals that ask for it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from dtrain.run.folder import EXIT_STOPPED
from dtrain.signals import leave_to_agent


class Stopped(SystemExit):
    """Training ended at a step boundary, on request, with a checkpoint saved. A script that lets it pass exits 75."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


@contextlib.contextmanager
def signals_left_to_agent() -> Iterator[None]:
    """`leave_to_agent`, for a while."""
    if threading.current_thread() is not threading.main_thread():  # where handlers can't be set
        yield
        return
    before = leave_to_agent()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
