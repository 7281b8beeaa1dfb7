"""The processes that load data: their rank ends them, not a signal that a cluster sends to all processes of a run."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from dtrain.signals import outlive


def leave_signals(worker: int) -> None:
    """In a loading process, at its start: without it the rank would fail, when it is asked to stop with a checkpoint.

    torch has set a handler just before, which ends the process. The other signals are ignored as in the rank.
    """
    signal.signal(signal.SIGTERM, outlive)


def start_loading(loader: DataLoader[Any]) -> Iterator[Any]:
    """Iterate over the loader, whose processes have `leave_signals` as their `worker_init_fn`.

    torch and multiprocessing end by SIGTERM those that don't end when they are told to.
    """
    loaded = iter(loader)
    for process in getattr(loaded, "_workers", ()):
        process._popen.terminate = process._popen.kill
    return loaded
