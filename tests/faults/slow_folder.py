"""A folder as a busy server shares it: each operation takes its time, none has a lock, and all are written down.

    python tests/faults/slow_folder.py FOLDER PLACE LOG HOLD UNTIL

shows FOLDER at PLACE (FUSE) until its input ends. LOG gets a line "PROCESS THREAD OPERATION PATH" for each operation,
and the kernel is to remember nothing of what it has asked, so that none is missed. The first one on a path with HOLD in
it, and all from then on, wait for a file UNTIL: those have the line "held PROCESS ...".
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from mfusepy import FUSE, FuseOSError, Operations, fuse_get_context

DELAY_S = 0.01
PATIENCE_S = 200.0  # for UNTIL; without it a line "in vain" follows


def operation(method):
    """Note it, and let it wait. Attributes come at once: clients of a server remember them for seconds."""
    name = method.__name__

    @functools.wraps(method)
    def slow(self, path, *arguments):
        held = self.is_held(path)
        self.note(f"{'held ' * held}{caller()} {name} {path}")
        if held:
            self.wait()
        if name != "getattr":
            time.sleep(DELAY_S)
        return method(self, path, *arguments)

    return slow


def caller() -> str:
    """The process and the thread that wait for this operation, by number; zeros where none does."""
    thread = fuse_get_context()[2]
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{thread}/status").read_text()
        return f"{status.partition('Tgid:')[2].split()[0]} {thread}"
    return "0 0"


class SlowFolder(Operations):
    use_ns = True

    def __init__(self, folder: str, log: str, hold: str, until: str) -> None:
        self._folder, self._hold, self._until = folder, hold, until
        self._held = threading.Event()
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def at(self, path: str) -> str:
        return self._folder + path

    def note(self, line: str) -> None:
        os.write(self._log, f"{line}\n".encode())

    def is_held(self, path: str) -> bool:
        if self._hold in path:
            self._held.set()
        return self._held.is_set() and not os.path.exists(self._until)

    def wait(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not os.path.exists(self._until):
            if time.monotonic() > deadline:
                self.note("in vain")
                Path(self._until).touch()
            time.sleep(0.01)

    # -- names -----------------------------------------------------------------------------------

    @operation
    def getattr(self, path, fh=None):
        found = os.lstat(self.at(path))
        fields = ("mode", "nlink", "uid", "gid", "size", "blocks")
        times = {f"st_{name}": getattr(found, f"st_{name}_ns") for name in ("atime", "mtime", "ctime")}
        return {**{f"st_{name}": getattr(found, f"st_{name}") for name in fields}, **times}

    @operation
    def readdir(self, path, fh):
        return [".", "..", *os.listdir(self.at(path))]

    @operation
    def readlink(self, path):
        return os.readlink(self.at(path))

    @operation
    def mkdir(self, path, mode):
        os.mkdir(self.at(path), mode)

    @operation
    def rmdir(self, path):
        os.rmdir(self.at(path))

    @operation
    def unlink(self, path):
        os.unlink(self.at(path))

    @operation
    def symlink(self, path, target):
        os.symlink(target, self.at(path))

    @operation
    def rename(self, path, new):
        os.rename(self.at(path), self.at(new))

    @operation
    def link(self, path, target):
        os.link(self.at(target), self.at(path))

    @operation
    def chmod(self, path, mode):
        os.chmod(self.at(path), mode)

    @operation
    def chown(self, path, uid, gid):
        os.lchown(self.at(path), uid, gid)

    @operation
    def utimens(self, path, times=None):
        os.utime(self.at(path), ns=times, follow_symlinks=False)

    @operation
    def statfs(self, path):
        found = os.statvfs(self.at(path))
        return {name: getattr(found, name) for name in dir(found) if name.startswith("f_")}

    # -- contents --------------------------------------------------------------------------------

    @operation
    def create(self, path, mode, fi=None):
        return os.open(self.at(path), os.O_RDWR | os.O_CREAT, mode)

    @operation
    def open(self, path, flags):
        return os.open(self.at(path), flags)

    @operation
    def read(self, path, size, offset, fh):
        return os.pread(fh, size, offset)

    @operation
    def write(self, path, data, offset, fh):
        return os.pwrite(fh, data, offset)

    @operation
    def truncate(self, path, length, fh=None):
        os.truncate(self.at(path), length)

    @operation
    def flush(self, path, fh):
        pass

    @operation
    def fsync(self, path, datasync, fh):
        os.fsync(fh)

    def release(self, path, fh):
        os.close(fh)

    # -- locks -----------------------------------------------------------------------------------

    @operation
    def lock(self, path, fh, cmd, lock):
        raise FuseOSError(errno.ENOSYS)

    @operation
    def flock(self, path, fh, op):
        raise FuseOSError(errno.ENOSYS)


def end_with_input(place: str) -> None:
    sys.stdin.read()
    subprocess.run(["fusermount3", "-u", "-z", place], check=True)


def main() -> None:
    folder, place, log, hold, until = sys.argv[1:]
    threading.Thread(target=end_with_input, args=(place,), daemon=True).start()
    forgetful = {"attr_timeout": 0, "entry_timeout": 0, "negative_timeout": 0}
    FUSE(SlowFolder(folder, log, hold, until), place, foreground=True, **forgetful)


if __name__ == "__main__":
    main()
