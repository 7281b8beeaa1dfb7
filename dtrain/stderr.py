"""Lines for the user on stderr. None of them ends a run, whether the disk is full or the terminal closed."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import TextIO


def say(line: str) -> None:
    """Print a line for the user."""
    with tolerated(sys.stderr):
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def tolerated(file: TextIO) -> Iterator[None]:
    """A run goes on although the file takes nothing; once its reader has gone (`| head`, a closed terminal), it leads
    to nowhere."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EIO):  # EIO: the terminal is closed
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, file.fileno())
            os.close(nowhere)
