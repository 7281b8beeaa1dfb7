"""The first thing that a rank's process does: become what torchrun would have started, and say how it ends.

Runs in a process forked from the fork server, which has torch imported already.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.errors import ResumeError, UserError
from dtrain.run import END_OF_OUTPUT, RUN_DIR_VARIABLE, RunDir

VICTIM_WAIT_S = 2.0  # a failed collective is reported this much later than its cause
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Task:
    """What each rank runs: a module (a job's worker) or a user's script, with its arguments."""

    run_dir: str
    arguments: tuple[str, ...]
    num_threads: int
    module: str | None = None
    script: str | None = None


def run(task: Task) -> int:
    """Run the task as this rank; its exit code. Raises what the task raises, with a record of it in the run folder."""
    die_with_parent()
    # Who sends a request to stop to all processes at once, means the agent.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # Processes that the user's code starts, loading ones among them, start as they would without us.
    multiprocessing.set_start_method(None, force=True)
    os.environ[RUN_DIR_VARIABLE] = task.run_dir
    run_dir = RunDir(task.run_dir)
    rank = int(os.environ["RANK"])
    redirect_output(run_dir.rank_log(rank))
    set_num_threads(task.num_threads)
    try:
        with flushed():
            return _run(task)
    except BaseException as error:
        record(error, run_dir.rank_error(rank), rank)
        code = error.code if isinstance(error, SystemExit) else 1
        raise SystemExit(code if isinstance(code, int) else 1) from None


def _run(task: Task) -> int:
    try:
        if task.module is not None:
            sys.argv = [task.module, *task.arguments]
            runpy.run_module(task.module, run_name="__main__", alter_sys=True)
        else:
            assert task.script is not None
            sys.argv = [task.script, *task.arguments]
            sys.path.insert(0, os.path.dirname(os.path.abspath(task.script)))
            runpy.run_path(task.script, run_name="__main__")
    except SystemExit as end:
        if end.code in (None, 0, 75):  # 75: stopped on request, with a checkpoint
            return int(end.code or 0)
        raise
    return 0


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends: the fork server, which dies with the agent."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def redirect_output(path: Path) -> None:
    """All that this process and its children print goes to the file, after what is there."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # typed as TextIO, which may lack it


def set_num_threads(number: int) -> None:
    """Share the node's cores among its ranks. In a forked process OMP_NUM_THREADS is read too late."""
    import torch

    os.environ.setdefault("OMP_NUM_THREADS", str(number))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def record(error: BaseException, path: Path, rank: int) -> None:
    """Leave what happened in the log and in a file for the agent; late, where another rank is the cause."""
    raised_at = time.time()
    if isinstance(error, SystemExit):
        message = f"exit code {error.code}" if isinstance(error.code, int) else str(error.code)
    else:
        message = str(error)
    if not isinstance(error, SystemExit):
        print(END_OF_OUTPUT, file=sys.stderr)
        if isinstance(error, UserError):
            print(message, file=sys.stderr)
        else:
            traceback.print_exc()
    report: dict[str, Any] = {
        "rank": rank,
        "host": socket.gethostname(),
        "type": type(error).__name__,
        "message": message,
        "traceback": "" if isinstance(error, (UserError, SystemExit)) else users_traceback(error),
        "time": raised_at,
        "exit_code": error.exit_code if isinstance(error, ResumeError) else 1,  # of the command
        "victim": is_failed_collective(error),
    }
    path.write_text(json.dumps(report))
    if report["victim"]:
        time.sleep(VICTIM_WAIT_S)


def users_traceback(error: BaseException) -> str:
    """The frames of the user's own code; the last ones where there are none."""
    frames = traceback.extract_tb(error.__traceback__)
    packages = [frame.f_globals.get("__package__") for frame, _ in traceback.walk_tb(error.__traceback__)]
    users = [frame for frame, package in zip(frames, packages, strict=True) if not _is_library(frame.filename, package)]
    return "".join(traceback.format_list(users or frames[-3:]))


def _is_library(filename: str, package: str | None) -> bool:
    is_ours = (package or "").partition(".")[0] == "dtrain"
    return is_ours or "site-packages" in filename or filename.startswith((os.path.dirname(os.__file__), "<frozen"))


def is_failed_collective(error: BaseException) -> bool:
    """Whether the error says that another rank went away, rather than what went wrong here."""
    import torch.distributed as dist

    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
        return True
    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "gloo")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in lost)
