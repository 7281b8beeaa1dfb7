"""`dtrain` forked from a process that has imported torch already: importing it takes longer than most commands.

A process of the tests has one such server, and asks it as the product asks its own (launcher/rank/fork_server.py). A
command has what one from a shell has: its argv, environment, working directory, standard streams and session, default
signal handlers, a single thread, and `dtrain`, the file, as its main module. It differs in what sys.modules holds, and
shares its hash seed with the others of this server. What reads the environment on import has read the server's:
`suits` says which commands need an interpreter of their own for that, or do without torch.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import os
import re
import runpy
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

DTRAIN = str(Path(sys.executable).with_name("dtrain"))
MARK = "DTRAIN_TEST_COMMAND"  # in the environment of all processes of one command
_NO_MARK = "0" * 32  # as long as a mark
_READ_ON_IMPORT = re.compile(
    "PYTHON|LD_|LANG|LC_|OMP|MKL|KMP|GOMP|OPENBLAS|NUMEXPR|NPY|NUMPY|MPL|TORCH|PYTORCH|TRITON|CUDA|NVIDIA|DS_|NCCL"
)
_COMMANDS = ("launch", "check", "summary", "evaluate", "predict", "export")  # import torch
# Of what commands import, all but what starts threads, and what few need: mlflow, deepspeed, torchvision.
_MODULES = (
    *("torch", "torch._dynamo", "torch.distributed.elastic.multiprocessing.api", "torchmetrics"),
    *("dtrain.trainer.trainer", "dtrain.trainer.metrics.metric_set", "dtrain.schema.instantiate"),
    *("dtrain.launcher.cli", "dtrain.launcher.commands.launch", "dtrain.launcher.commands.evaluate"),
    *("dtrain.launcher.agent.supervisor", "dtrain.launcher.agent.nodes"),
)


def suits(arguments: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether a command had better be forked: it imports torch, and what it imports would read the same variables."""
    return arguments[0] in _COMMANDS and _read_on_import(environment) == server()[1]


def start(arguments: list[str], folder: Path, environment: dict[str, str], out: int, err: int) -> ForkedProcess:
    """`dtrain` with these arguments, with output to these descriptors."""
    streams = tuple(f"/proc/{os.getpid()}/fd/{number}" for number in (out, err))
    return ForkedProcess(WarmCommand(tuple(arguments), environment, str(folder), streams), server()[0])


def _read_on_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if _READ_ON_IMPORT.match(name)}


@functools.cache
def server() -> tuple[socket.socket, dict[str, str]]:
    """The connection to the server, and what of its environment was read on import."""
    assert threading.current_thread() is threading.main_thread()  # with the thread that starts it the server dies
    ours, theirs = socket.socketpair()
    with theirs:
        subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno()), str(os.getpid())],
            # One thread: numpy's linear algebra would start others on import, which a fork does not have.
            env={**os.environ, "OMP_NUM_THREADS": "1", MARK: _NO_MARK},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
    return ours, _read_on_import(os.environ)


def main(requests: socket.socket, parent: int) -> NoReturn:
    """Be the server."""
    gc.disable()
    for module in _MODULES:
        importlib.import_module(module)
    gc.freeze()
    gc.enable()
    assert len(os.listdir("/proc/self/task")) == 1, "what was imported has started a thread"
    serve(requests, parent)


if __name__ == "__main__":
    sys.modules["warm"] = sys.modules["__main__"]  # of which the requests are
    sys.path[0] = os.path.dirname(DTRAIN)
    _find = ctypes.CDLL(None).getenv
    _find.restype = ctypes.c_void_p
    _mark_in_memory = _find(MARK.encode())  # what /proc shows as the environment

from dtrain.launcher.rank.fork_server import ForkedProcess, Rank, serve  # noqa: E402 (it remembers sys.path)


@dataclass(frozen=True)
class WarmCommand(Rank):
    """What the server is sent for a command."""

    streams: tuple[str, ...]

    def run(self, server: int) -> NoReturn:
        """Be it, to the end of the process."""
        os.setsid()
        for number, path in enumerate(self.streams, 1):
            descriptor = os.open(path, os.O_RDWR)
            os.dup2(descriptor, number)
            os.close(descriptor)
        ctypes.memmove(_mark_in_memory, self.environment[MARK].encode(), len(_NO_MARK))
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.working_directory)
        threading.main_thread()._set_native_id()  # as multiprocessing in each child
        sys.modules["numpy"].random.seed()  # which all would have in common
        del sys.modules["warm"]
        sys.argv[:] = [DTRAIN, *self.arguments]
        sys.orig_argv[:] = [sys.executable, *sys.argv]
        runpy.run_path(DTRAIN, run_name="__main__")
        raise AssertionError("it ends by itself")


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
