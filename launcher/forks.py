"""Ranks forked from a server that has torch imported already: subprocesses like any other to torch's elastic agent.

What the server has in it that an interpreter of its own would not have is put right in the child, so that the program
can't tell the difference, but for what is in sys.modules.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import connection, forkserver, resource_tracker
from typing import Any, NoReturn

from dtrain import signals

from .entry import die_with_parent, main
from .streams import reopen_input

SERVER = os.getpid()  # in the ranks, which are forked with it
PATH = tuple(sys.path)  # as python made it; its first entry is the folder of this command, or of what is run


def start_fork_server(preload: Sequence[str], num_threads: int) -> None:
    """Start the process that all ranks are forked from, so that it imports while this one goes on.

    From the main thread, and before this process imports torch. Only modules that leave CUDA alone may be
    preloaded: once CUDA is initialised, no forked process can use it.

    Args:
        num_threads: of each rank. numpy's linear algebra takes it from OMP_NUM_THREADS on import, for good.
    """
    multiprocessing.set_forkserver_preload(["dtrain.launcher.preload", *preload])
    here, before = os.open(".", os.O_PATH), os.environ.get("OMP_NUM_THREADS")
    os.chdir("/")  # it imports from its working directory first, and a user's may hold anything
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
    try:
        resource_tracker.ensure_running()  # the server would start it, and let signals through
        with signals.held_back():  # in the server for good
            forkserver.ensure_running()
    finally:
        os.fchdir(here)
        os.close(here)
        if before is None:
            del os.environ["OMP_NUM_THREADS"]


def fork_ranks() -> None:
    """From now on torch's elastic agent has its subprocesses forked from the server."""
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    class ForkHandler(SubprocessHandler):
        def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
            return ForkedProcess(Rank(args[4:], env, os.getcwd()))

        def close(self, death_sig: signal.Signals | None = None) -> None:
            with contextlib.suppress(ProcessLookupError):  # the server does not leave us a zombie to signal
                super().close(death_sig)

    # torch's agent looks its handlers up here, and has no parameter for them.
    api.get_subprocess_handler = ForkHandler  # type: ignore[attr-defined, assignment]


class ForkedProcess:
    """A rank just forked, with what torch's agent uses of subprocess.Popen."""

    def __init__(self, rank: Rank) -> None:
        self.returncode: int | None = None
        self._status, pipe = forkserver.connect_to_new_process([])
        folder = rank.working_directory
        with open(pipe, "wb") as child:
            # As multiprocessing.spawn reads it: how to prepare the process, and what to run in it.
            path = list(PATH)
            pickle.dump({"authkey": os.urandom(32), "dir": folder, "orig_dir": folder, "sys_path": path}, child)
            pickle.dump(rank, child)
        self.pid = forkserver.read_signed(self._status)

    def poll(self) -> int | None:
        """The exit code, minus the signal's number where one ended it; None while it runs."""
        if self.returncode is None and connection.wait([self._status], 0):
            try:
                self.returncode = forkserver.read_signed(self._status)
            except (OSError, EOFError):  # the server is gone, and took the rank along
                self.returncode = -signal.SIGKILL
            os.close(self._status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """`poll`, once it has ended.

        Raises:
            TimeoutExpired: it has not, in so many seconds.
        """
        if self.returncode is None:
            connection.wait([self._status], timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("rank", timeout or 0.0)
        return code


@dataclass(frozen=True)
class Rank:
    """What is sent to the new process, which calls `_bootstrap` as that of any multiprocessing.Process."""

    arguments: tuple[str, ...]
    environment: dict[str, str]
    working_directory: str

    def _bootstrap(self, parent_sentinel: int) -> NoReturn:
        os.close(parent_sentinel)
        os.setsid()  # as torch's agent starts its subprocesses: a signal to this group is for this rank
        die_with_parent(SERVER)
        gc.freeze()  # to look through what the server has imported would copy all of its pages, and take a while
        gc.enable()
        os.environ.clear()
        os.environ.update(self.environment)
        forget_multiprocessing()
        reopen_input()
        reseed()
        main(*self.arguments)


def forget_multiprocessing() -> None:
    """The program has no part in the server: what it starts by multiprocessing begins anew."""
    server: Any = forkserver._forkserver
    tracker: Any = resource_tracker._resource_tracker
    os.close(server._forkserver_alive_fd)
    os.close(tracker._fd)
    server.__init__()
    tracker.__init__()
    # multiprocessing does so in each child it starts: debuggers and py-spy read it.
    threading.main_thread()._set_native_id()  # type: ignore[attr-defined]


def reseed() -> None:
    """A random start for each rank, where the server has one for all. (Python's own `random` sees to itself.)"""
    if torch := sys.modules.get("torch"):
        torch.default_generator.seed()
    if random := sys.modules.get("numpy.random"):
        random.seed()
