"""Signals that a terminal or a cluster sends to all processes of a run at once, but that are meant for its agent.

The agent passes them on through the heartbeat, so that all ranks stop at the same step.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

TO_ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Block these signals within the block. Children inherit the mask, until they call `let_through`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TO_ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_through() -> None:
    """Unblock them: pending ones arrive now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TO_ALL)


@contextlib.contextmanager
def handled(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle these signals with the handler within the block."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def leave_to_agent() -> dict[int, Any]:
    """Make them do nothing from now on; returns what they did before, by number. A handler that was set stays.

    Programs that this process starts ignore them too, except SIGTERM, which ends them.
    """
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in TO_ALL}
    ours: dict[int, Any] = {number: handler for number, handler in before.items() if handler in defaults}
    for number in ours:
        signal.signal(number, outlive if number == signal.SIGTERM else signal.SIG_IGN)
    signal.siginterrupt(signal.SIGTERM, False)
    return ours


def outlive(number: int, frame: FrameType | None) -> None:
    """A handler, not SIG_IGN, which programs started by this process would inherit."""


def _let_children_end() -> None:
    if signal.getsignal(signal.SIGTERM) is outlive:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_let_children_end)
