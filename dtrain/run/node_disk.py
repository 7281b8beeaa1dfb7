"""A folder on each node's own disk, for what is polled many times a second during a run.

The run folder may be on a file system that all nodes share: ten requests a second from each node are too many
there, and a rank that maps a file may wait for a server. So it only holds a link, to a name that is the same on all
nodes. Each node finds its own folder there, and so does `dtrain cancel` on the same machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dtrain.errors import UserError

ROOT = Path("/tmp")  # not TMPDIR, which clusters set per job
PREFIX = "dtrain-node-"


def link(place: Path) -> None:
    """Have the place in a run folder name a folder beside it on each node; a plain folder that is there stays one."""
    # By the run's path: one that was copied or moved with its link gets a folder of its own.
    key = hashlib.sha256(os.fsencode(f"{os.getuid()}:{os.path.realpath(place.parent)}")).hexdigest()
    target = str(ROOT / f"{PREFIX}{key[:16]}")
    if place.is_symlink():
        if os.readlink(place) == target:
            return
        place.unlink()
    if not place.exists():
        with contextlib.suppress(OSError):  # a file system without links
            if os.access(ROOT, os.W_OK):
                place.symlink_to(target)
        if not place.is_symlink():
            place.mkdir(mode=0o750)


def make(place: Path) -> Path:
    """The folder on this node, created if missing.

    Raises:
        UserError: another user has created it.
    """
    folder = Path(os.path.realpath(place))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.parent == ROOT and folder.stat().st_uid != os.getuid():  # its owner could ask the ranks to stop
        raise UserError(f"{folder} belongs to another user: move the run folder {place.parent}, or have it removed")
    return folder


@contextlib.contextmanager
def held(place: Path) -> Iterator[Path]:
    """The folder on this node, for the block; the last on this node to leave removes it."""
    folder = make(place)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield folder
    finally:
        if folder.parent == ROOT:
            with contextlib.suppress(OSError):  # others hold it
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
        os.close(descriptor)
