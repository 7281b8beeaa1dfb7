"""Private parts of torch.utils.data, all that are used here. tests/house/test_private_parts.py covers upgrades."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data._utils import worker as torch_worker

# What `get_worker_info()`, which is public, returns: the class has no public name.
from torch.utils.data._utils.worker import WorkerInfo

__all__ = ["WorkerInfo", "end_by_kill", "show"]


def show(info: WorkerInfo | None) -> WorkerInfo | None:
    """Have `get_worker_info()` answer this from now on; what it answered before.

    By it a stream splits itself. torch sets it in loading processes alone, and for these alone; ranks split too.
    """
    before = torch_worker._worker_info
    torch_worker._worker_info = info
    return before


def end_by_kill(loaded: Iterator[Any]) -> None:
    """Have an iterator of a DataLoader end its processes by SIGKILL, those that don't end when they are told to.

    torch sends SIGTERM, which ours outlive: a cluster sends it to all processes of a run, and the rank still needs
    them for the step at which it stops.
    """
    for process in getattr(loaded, "_workers", ()):  # there are none where the rank loads by itself
        process._popen.terminate = process._popen.kill
