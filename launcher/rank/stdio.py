"""A rank's standard streams: output goes to its log at once, and a full disk does not stop the rank."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path
from typing import Any


def open_standard_streams() -> None:
    """Connect stdin, stdout and stderr to /dev/null if the caller has closed them.

    Otherwise the next files to be opened would get their numbers, and the output.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: those below are open
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            stream = open(number, mode, closefd=False)  # noqa: SIM115 (open as long as the process is)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def open_output(path: Path) -> None:
    """Append everything that this process and its children print to the file.

    stdout and stderr have no buffer, as of `python -u`.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    for number, name in ((1, "stdout"), (2, "stderr")):
        _replace(name, "w", _Log(number, "wb", closefd=False))


def reopen_input() -> None:
    """stdin as of `python -u`, in a process that was forked from another."""
    _replace("stdin", "r", open(0, "rb", closefd=False))  # noqa: SIM115 (open as long as the process is)


class _Log(io.FileIO):
    """What a training prints is worth less than the training: without room for it, it is lost."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return memoryview(data).nbytes


def _replace(name: str, mode: str, binary: Any) -> None:
    before = getattr(sys, f"__{name}__")
    if before is None:  # closed since the command started
        return
    getattr(binary, "raw", binary).name = f"<{name}>"
    stream: Any = io.TextIOWrapper(binary, before.encoding, before.errors, "\n", write_through=True)
    stream.mode = mode
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)
