"""Ranks forked from a process that has already imported torch: ordinary subprocesses to torch's elastic agent.

One import serves the agent and all of its ranks: `start_fork_server` imports, then forks the server, which does
nothing but fork ranks. Whatever they inherit that a fresh interpreter would not have is reset in each rank, so
that the program can't tell the difference, except by what is in sys.modules.
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
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from dtrain import signals

from . import cpython
from .entry import die_with_parent, main
from .stdio import reopen_input

PATH = tuple(sys.path)  # as python set it; its first entry is the folder of this command, or of what is run
_NUMBER = struct.Struct("q")  # a process's id, or its exit code

_server: socket.socket | None = None  # in the agent


def start_fork_server(modules: Sequence[str], num_threads: int, *, unless: Callable[[], bool] = lambda: False) -> bool:
    """Import the modules, and start the process that all ranks are forked from; whether it was started.

    Call it from the main thread, while there is no other, and before any user code is imported. Only name modules that
    do not touch CUDA: once CUDA is initialised, no forked process can use it.

    Args:
        num_threads: of each rank. numpy's linear algebra takes it from OMP_NUM_THREADS on import, for good.
        unless: called after the imports: whether the ranks can't be forked from this process after all.
    """
    global _server
    environment = dict(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
    for module in modules:
        with contextlib.suppress(ImportError):  # the ranks will report it if they need it
            importlib.import_module(module)
    os.environ.clear()  # torch leaves something there, too
    os.environ.update(environment)
    if unless():
        return False
    for stream in (sys.stdout, sys.stderr):  # each process would print what is left in a buffer
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
    """Run the server: fork a rank for each socket that arrives, and report its process id and its end there.

    The server must die with the agent and take the ranks with it: the kernel regards the thread that forked it as its
    parent, the agent's main thread. A session of its own keeps signals to the agent's whole process group (Ctrl-C, a
    closed terminal, `timeout`) away from the ranks: the agent decides what they mean.
    """
    os.setsid()
    die_with_parent(agent)
    server = os.getpid()
    running: dict[int, tuple[int, socket.socket]] = {}  # by the rank's pidfd: its process, and where to report
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
                    other.close()  # the objects too, which would close these descriptors again when deleted
                be_rank(connection, server)
            send(connection, process)
            watched = os.pidfd_open(process)
            running[watched] = process, connection
            events.register(watched, select.POLLIN)


def report_end(watched: int, process: int, connection: socket.socket) -> None:
    """Tell the agent how the rank ended, as subprocess.Popen does: the negative signal number if one ended it."""
    _, status = os.waitpid(process, 0)
    send(connection, os.waitstatus_to_exitcode(status))
    connection.close()
    os.close(watched)


def send(connection: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # the agent has lost interest
        connection.sendall(_NUMBER.pack(number))


def be_rank(connection: socket.socket, server: int) -> NoReturn:
    """In the new process: run what the agent asks for, to the end."""
    with connection, connection.makefile("rb") as file:
        rank: Rank = pickle.load(file)
    close_inherited()
    rank.run(server)


def close_inherited() -> None:
    """Close all descriptors but the standard ones, as subprocess does. Only open ones: the limit may be 10^9."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):  # that of the list itself
                os.close(int(name))


def fork_rank(command: tuple[str, ...], environment: dict[str, str]) -> ForkedProcess:
    """Have the server fork a rank that does what this command would, in that environment."""
    assert _server is not None
    return ForkedProcess(Rank(command[4:], environment, os.getcwd()), _server)


class ForkedProcess:
    """A forked rank, with the part of subprocess.Popen that torch's agent uses."""

    def __init__(self, rank: Rank, server: socket.socket) -> None:
        self.returncode: int | None = None
        self._connection, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(server, [b"\0"], [theirs.fileno()])
        self._connection.sendall(pickle.dumps(rank))
        self.pid = self._receive()

    def poll(self) -> int | None:
        """The exit code, the negative signal number if one ended it; None while it runs."""
        return self._poll(0)

    def wait(self, timeout: float | None = None) -> int:
        """`poll`, once it has ended.

        Raises:
            TimeoutExpired: it did not end within this time.
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
                except EOFError:  # the server has died, and the rank with it
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
        """Run it, to the end of the process."""
        os.setsid()  # as torch's agent starts its subprocesses: a signal to this group is for this rank
        die_with_parent(server)
        gc.freeze()  # scanning the imports would copy all of their pages, and be slow
        gc.enable()
        imported = dict(sys.modules)
        os.chdir(self.working_directory)
        os.environ.clear()
        os.environ.update(self.environment)
        sys.path[:] = PATH
        for name in [each for each in sys.modules if each.partition(".")[0] == "click"]:
            del sys.modules[name]  # the command line's: nothing else here has it, and a script may have its own
        cpython.name_main_thread()
        reopen_input()
        reseed()
        main(*self.arguments, imported=imported)


def reseed() -> None:
    """Seed each rank randomly, since the server has one state for all. (Python's `random` does so itself.)"""
    if torch := sys.modules.get("torch"):
        torch.default_generator.seed()
    if random := sys.modules.get("numpy.random"):
        random.seed()
