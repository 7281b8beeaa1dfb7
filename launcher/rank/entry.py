"""A rank's start and end: it runs its program as python would under torchrun, and records how that ended.

Either in a process forked from the fork server, which has imported torch (fork_server.py), or in an interpreter of its
own (fresh.py).
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import faulthandler
import io
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NoReturn

from dtrain import signals
from dtrain.errors import ResumeError, UserError
from dtrain.run.folder import END_OF_OUTPUT, EXIT_STOPPED, RUN_DIR_VARIABLE, RunDir
from dtrain.run.heartbeat import HANG_TIMEOUT_S, HANG_TIMEOUT_VARIABLE, Heartbeat

from ..machine.cores import openmp_threads
from . import cpython, flight_recorder, reports, stacks
from .finalize import drop, leave, leave_script
from .stdio import open_output

VICTIM_WAIT_S = 2.0  # how much later a failed collective is reported than its cause
PR_SET_PDEATHSIG = 1
TORCHRUN_HANDLES = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"


@dataclass(frozen=True)
class Task:
    """What each rank runs: a job's worker, or a user's script or module, as `python` and `python -m` do.

    Or the module that calls a function of the process that launched, which raises the cause of a failure itself.

    A job's worker, which is a module of dtrain's, responds to a request to stop from its start, a script only once its
    Trainer runs.
    """

    run_dir: str
    kind: Literal["job", "script", "module", "function"]
    program: str  # the script's path, or the module's name
    arguments: tuple[str, ...]
    num_threads: int
    hang_timeout_s: float = HANG_TIMEOUT_S
    folder: str | None = None  # first on sys.path; a job's worker has none, and finds its modules itself
    forked: bool = True  # from the fork server; else in an interpreter of its own

    @property
    def is_job(self) -> bool:
        return self.kind == "job"

    def command(self) -> list[str]:
        """The arguments for python, for a rank of this process.

        torch's agent replaces ${local_rank} and $$ in it, also in a script's arguments, as under torchrun.
        """
        text = json.dumps({**asdict(self), "arguments": ()}).replace("$", "$$")
        arguments = [each.replace("$", "$$") for each in self.arguments] if self.is_job else self.arguments
        return ["-u", str(Path(__file__).with_name("fresh.py")), str(os.getpid()), text, *arguments]


def main(text: str, *arguments: str, imported: Mapping[str, ModuleType] | None = None) -> NoReturn:
    """Run this rank until its process ends: the task of `Task.command`.

    Args:
        imported: modules already loaded by the fork server.
    """
    task = Task(**json.loads(text))
    run_dir = RunDir(os.path.abspath(task.run_dir))  # the script may change the working directory
    open_output(run_dir.rank_log(int(os.environ["RANK"])))
    stacks.write_on_request()
    if task.is_job:
        signals.leave_to_agent()  # in a script, Trainer does that
        faulthandler.enable(all_threads=True)
        if flight_recorder.is_recorded():
            flight_recorder.answer_requests(run_dir, int(os.environ["RANK"]))
    signals.let_through()
    os.environ[RUN_DIR_VARIABLE] = str(run_dir)
    os.environ[HANG_TIMEOUT_VARIABLE] = str(task.hang_timeout_s)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = TORCHRUN_HANDLES  # the agent's settings are for the agent only
    set_num_threads(task.num_threads)
    if not getattr(sys.flags, "safe_path", False):
        sys.path[:1] = [] if task.folder is None else [task.folder]
    code = run(task, arguments, run_dir)
    if task.is_job and code:  # the others may be in a collective: leaving the group properly would wait for them
        drop(code)
    if task.is_job:
        leave(code)
    if imported is not None:
        leave_script(code, imported)
    sys.exit(code)


def run(task: Task, arguments: Sequence[str], run_dir: RunDir) -> int:
    """Run the program, and record how it ended; the exit code."""
    process = os.getpid()
    try:
        execute(task, arguments)
    except BaseException as error:
        while error.__traceback__ is not None and error.__traceback__.tb_frame.f_code.co_filename == __file__:
            error.__traceback__ = error.__traceback__.tb_next  # it begins with the program's own lines
        try:
            return end(error, run_dir, is_child=os.getpid() != process)
        except RuntimeError as death:
            if not reports.is_dead_loader(death):
                raise
            return end(death, run_dir)
    return 0


def end(error: BaseException, run_dir: RunDir, *, is_child: bool = False) -> int:
    """Report the exception that ended the program; the exit code."""
    code, rank = exit_status(error), int(os.environ["RANK"])
    if is_child:  # forked by the script, which handles it itself
        show(error)
    elif code == EXIT_STOPPED and isinstance(error, SystemExit):
        Heartbeat(run_dir.heartbeat(rank)).stopped = True
        return 0
    elif code:
        record(error, run_dir.last_word(rank), rank)
    return code


def execute(task: Task, arguments: Sequence[str]) -> None:
    """Run the program as __main__, in a module that stays: threads, atexit handlers and pickles still use it."""
    module = ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    if sys.version_info < (3, 14):
        module.__annotations__ = {}
    sys.modules["__main__"] = module
    if "multiprocessing" in sys.modules:  # which makes this alias when it is imported
        sys.modules["__mp_main__"] = module
    sys.orig_argv[:] = [sys.executable, "-u", *(["-m"] if task.kind != "script" else []), task.program, *arguments]
    if task.kind != "script":
        sys.argv[:] = ["-m", *arguments]
        cpython.run_module_as_main(task.program)
        return
    sys.argv[:] = [task.program, *arguments]
    file = os.path.join(os.getcwd(), task.program)
    module.__dict__.update(__file__=file, __cached__=None, __loader__=SourceFileLoader("__main__", file))
    with io.open_code(file) as source:
        code = compile(source.read(), file, "exec", dont_inherit=True)
    exec(code, module.__dict__)


def die_with_parent(parent: int | None = None, number: int = signal.SIGKILL) -> None:
    """Have the kernel end this process when its parent ends; exit now if the parent is no longer `parent`."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def set_num_threads(number: int) -> None:
    """Divide the node's cores among its ranks. In a forked process torch has already read OMP_NUM_THREADS."""
    os.environ.setdefault("OMP_NUM_THREADS", str(number))
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(openmp_threads(os.environ["OMP_NUM_THREADS"]) or number)


# -- the end -------------------------------------------------------------------------------------


def exit_status(error: BaseException) -> int:
    """What python exits with when the main module raises this, as the kernel reports it."""
    if not isinstance(error, SystemExit):
        return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1


def show(error: BaseException) -> None:
    """Print it as python does."""
    if isinstance(error, SystemExit):
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
        return
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
    if isinstance(error, UserError):
        print(error, file=sys.stderr)
    else:
        try:
            sys.excepthook(type(error), error, error.__traceback__)
        except Exception:
            traceback.print_exc()  # of both


def record(error: BaseException, path: Path, rank: int) -> None:
    """Write what happened to the log and to a file for the agent; later, if another rank is the cause."""
    raised_at = time.time()
    error = reports.first_of(error)
    if not isinstance(error, SystemExit):
        print(END_OF_OUTPUT, file=sys.stderr)
    report: dict[str, Any] = {
        "rank": rank,
        "host": socket.gethostname(),
        **reports.of(error, exit_status(error)),
        "time": raised_at,
        "exit_code": error.exit_code if isinstance(error, ResumeError) else 1,  # of the command
        "victim": reports.is_failed_collective(error),
    }
    with contextlib.suppress(OSError):  # the disk may be full
        path.write_text(json.dumps(report))
        show(error)
    if report["victim"]:
        time.sleep(VICTIM_WAIT_S)
