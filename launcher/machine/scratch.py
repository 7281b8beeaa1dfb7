"""Temporary folders of commands: if a command is killed, a later one removes its folders."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dtrain.run import node_disk

# By kind, the age at which a folder that nobody holds is removed. Logs of failures outside a run are kept to be read.
_KEPT_S = {"scratch": 60.0, "aside": 86400.0, "node": 86400.0}
_NAME = re.compile(rf"dtrain-({'|'.join(_KEPT_S)})-[a-z0-9_]{{8,16}}")


@contextmanager
def held_folder(kind: str) -> Iterator[Path]:
    """A new folder, held while this process is in the block; the caller removes it."""
    for root in {Path(tempfile.gettempdir()), node_disk.ROOT}:
        remove_left_behind(root)
    folder = Path(tempfile.mkdtemp(prefix=f"dtrain-{kind}-"))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # without locks no other command removes it, see `_remove_unheld`
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(descriptor)


def remove_left_behind(root: Path) -> None:
    """Remove this user's scratch folders that no process holds: their commands were killed, or have failed."""
    for folder in root.glob("dtrain-*"):
        if match := _NAME.fullmatch(folder.name):
            with suppress(OSError):  # it is held, or another command is removing it
                _remove_unheld(folder, _KEPT_S[match[1]])


def _remove_unheld(folder: Path, kept_s: float) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        found = os.fstat(descriptor)
        if found.st_uid == os.getuid() and time.time() - found.st_mtime > kept_s:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
    finally:
        os.close(descriptor)
