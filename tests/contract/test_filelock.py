"""A file system without locks, as Lustre may be mounted: a run's one writer is found all the same."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from dtrain.errors import UserError
from dtrain.launcher.machine.scratch import held_folder
from dtrain.run.folder import RunDir

HOLD = """
import fcntl, os, sys
from dtrain.run.folder import RunDir

def flock(descriptor, operation):
    raise OSError(int(sys.argv[2]), os.strerror(int(sys.argv[2])))

fcntl.flock = flock
with RunDir(sys.argv[1]).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_run_without_locks_has_one_writer(number, tmp_path, monkeypatch, capsys):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with held_folder("scratch") as scratch:
        scratch.rmdir()
    run = RunDir(tmp_path / "run")
    run.create()
    for _ in range(2):  # again, in the same process
        with run.lock():
            assert run.last_writer().pid == os.getpid()
    assert capsys.readouterr().err.count("on a file system without locks: don't start two commands") == 1
    command = [sys.executable, "-c", HOLD, str(run), str(number)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as other:
        assert other.stdout.readline() == b"held\n"
        assert run.writer().pid == other.pid
        with pytest.raises(UserError, match=f"is being written by process {other.pid} on"), run.lock():
            pass
    assert run.writer() is None  # it has ended, and left its name there
    with run.lock():
        pass


def test_another_error_is_no_lack_of_locks(tmp_path, monkeypatch):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    run = RunDir(tmp_path / "run")
    run.create()
    with pytest.raises(OSError, match="Input/output error"), run.lock():
        pass
