"""Ranks forked from a process that has torch imported already: subprocesses like any other to torch's elastic agent.

One import serves the agent and all of its ranks: `start_fork_server` imports, then forks the server, which does
nothing but fork ranks. What they have in them that an interpreter of their own would not have is put right in each, so
that the program can't tell the difference, but for what is in sys.modules.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from dtrain import signals

from .entry import die_with_parent, main
from .stdio import reopen_input

PATH = tuple(sys.path)  # as python made it; its first entry is the folder of this command, or of what is run
_NUMBER = struct.Struct("q")  # a process's id, or its exit code

_server: socket.socket | None = None  # in the agent


def start_fork_server(modules: Sequence[str], num_threads: int, *, unless: Callable[[], bool] = lambda: False) -> bool:
    """Import the modules, and start the process that all ranks are forked from; whether it was started.

    From the main thread, while there is no other one, and before anything of the user's is imported. Only modules that
    leave CUDA alone may be named: once CUDA is initialised, no forked process can use it.

    Args:
        num_threads: of each rank. numpy's linear algebra takes it from OMP_NUM_THREADS on import, for good.
        unless: asked once all is imported: whether the ranks can't do with what there is then.
    """
    global _server
    environment = dict(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
    for module in modules:
        with contextlib.suppress(ImportError):  # the ranks will say it, if they need it
            importlib.import_module(module)
    os.environ.clear()  # torch leaves something there, too
    os.environ.update(environment)
    if unless():
        return False
    for stream in (sys.stdout, sys.stderr):  # what is left in a buffer would be printed by each process
        stream.flush()
    agent = os.getpid()
    _server, requests = socket.socketpair()
    with signals.held_back():  # in the server for good, see architecture.md
        if os.fork() == 0:
            try:
                serve(requests, agent)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
    requests.close()
    return True


def serve(requests: socket.socket, agent: int) -> NoReturn:
    """Be the server: fork a rank for each socket that comes, and report its process and its end there.

    The server must die with the agent, and take the ranks along: the kernel counts the thread that forked it as its
    parent, the agent's main thread. A session of its own keeps signals to the agent's whole process group (Ctrl-C, a
    closed terminal, `timeout`) away from the ranks: the agent decides what they mean.
    """
    os.setsid()
    die_with_parent(agent)
    server = os.getpid()
    running: dict[int, tuple[int, socket.socket]] = {}  # by the rank's pidfd: its process, and who wants to know
    events = select.poll()
    events.register(requests, select.POLLIN)
    while True:
        for descriptor, _ in events.poll():
            if descriptor in running:
                events.unregister(descriptor)
                report_end(descriptor, *running.pop(descriptor))
                continue
            message, descriptors, _, _ = socket.recv_fds(requests, 1, 1)
            if not message:
                os._exit(0)  # the agent is gone
            connection = socket.socket(fileno=descriptors[0])
            process = os.fork()
            if process == 0:
                for other in (requests, *(each for _, each in running.values())):
                    other.close()  # as objects too, which would close these numbers again at their end
                be_rank(connection, server)
            send(connection, process)
            watched = os.pidfd_open(process)
            running[watched] = process, connection
            events.register(watched, select.POLLIN)


def report_end(watched: int, process: int, connection: socket.socket) -> None:
    """Tell the agent how the rank ended, as subprocess.Popen has it: minus the signal's number where one ended it."""
    _, status = os.waitpid(process, 0)
    send(connection, os.waitstatus_to_exitcode(status))
    connection.close()
    os.close(watched)


def send(connection: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # the agent has lost interest
        connection.sendall(_NUMBER.pack(number))


def be_rank(connection: socket.socket, server: int) -> NoReturn:
    """In the new process: be what the agent asks for, to the end."""
    with connection, connection.makefile("rb") as file:
        rank: Rank = pickle.load(file)
    close_inherited()
    rank.run(server)


def close_inherited() -> None:
    """Close all descriptors but the standard ones, as subprocess does. Only open ones: there may be room for 10^9."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):  # that of the list itself
                os.close(int(name))


def fork_ranks() -> None:
    """From now on torch's elastic agent has its subprocesses forked from the server."""
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    class ForkHandler(SubprocessHandler):
        def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
            assert _server is not None
            return ForkedProcess(Rank(args[4:], env, os.getcwd()), _server)

        def close(self, death_sig: signal.Signals | None = None) -> None:
            with contextlib.suppress(ProcessLookupError):  # the server does not leave us a zombie to signal
                super().close(death_sig)

    # torch's agent looks its handlers up here, and has no parameter for them.
    api.get_subprocess_handler = ForkHandler  # type: ignore[attr-defined, assignment]


class ForkedProcess:
    """A rank just forked, with what torch's agent uses of subprocess.Popen."""

    def __init__(self, rank: Rank, server: socket.socket) -> None:
        self.returncode: int | None = None
        self._connection, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(server, [b"\0"], [theirs.fileno()])
        self._connection.sendall(pickle.dumps(rank))
        self.pid = self._receive()

    def poll(self) -> int | None:
        """The exit code, minus the signal's number where one ended it; None while it runs."""
        return self._poll(0)

    def wait(self, timeout: float | None = None) -> int:
        """`poll`, once it has ended.

        Raises:
            TimeoutExpired: it has not, in so many seconds.
        """
        code = self._poll(None if timeout is None else timeout * 1000)
        if code is None:
            raise subprocess.TimeoutExpired("rank", timeout or 0.0)
        return code

    def _poll(self, timeout_ms: float | None) -> int | None:
        if self.returncode is None:
            ends = select.poll()
            ends.register(self._connection, select.POLLIN)
            if ends.poll(timeout_ms):
                try:
                    self.returncode = self._receive()
                except EOFError:  # the server is gone, and took the rank along
                    self.returncode = -signal.SIGKILL
                self._connection.close()
        return self.returncode

    def _receive(self) -> int:
        message = self._connection.recv(_NUMBER.size, socket.MSG_WAITALL)
        if len(message) < _NUMBER.size:
            raise EOFError("the fork server has died")
        return int(_NUMBER.unpack(message)[0])


@dataclass(frozen=True)
class Rank:
    """What the server is sent for a rank."""

    arguments: tuple[str, ...]
    environment: dict[str, str]
    working_directory: str

    def run(self, server: int) -> NoReturn:
        """Be it, to the end of the process."""
        os.setsid()  # as torch's agent starts its subprocesses: a signal to this group is for this rank
        die_with_parent(server)
        gc.freeze()  # to look through what was imported would copy all of its pages, and take a while
        gc.enable()
        imported = dict(sys.modules)
        os.chdir(self.working_directory)
        os.environ.clear()
        os.environ.update(self.environment)
        sys.path[:] = PATH
        for name in [each for each in sys.modules if each.partition(".")[0] == "click"]:
            del sys.modules[name]  # the command line's: nothing else here has it, and a script may have its own
        # Debuggers and py-spy read it.
        threading.main_thread()._set_native_id()  # type: ignore[attr-defined]  # as multiprocessing in each child
        reopen_input()
        reseed()
        main(*self.arguments, imported=imported)


def reseed() -> None:
    """A random start for each rank, where the server has one for all. (Python's own `random` sees to itself.)"""
    if torch := sys.modules.get("torch"):
        torch.default_generator.seed()
    if random := sys.modules.get("numpy.random"):
        random.seed()
