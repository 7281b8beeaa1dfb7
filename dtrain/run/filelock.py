"""flock(2), if available: Lustre may be mounted without it, and some FUSE file systems lack it."""

from __future__ import annotations

import errno
import fcntl
import sys
from contextlib import suppress
from pathlib import Path

NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})

_warned: set[Path] = set()


def try_lock(descriptor: int, *, shared: bool = False) -> bool | None:
    """Try to lock an open file without waiting: whether that worked; None if its file system has no locks."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise
    return True


def warn_of_no_locks(folder: Path) -> None:
    """Warn, once, what that means for a run there."""
    if folder not in _warned:
        _warned.add(folder)
        with suppress(OSError):
            print(
                f"warning: {folder} is on a file system without locks: don't start two commands on it at once",
                file=sys.stderr,
            )
