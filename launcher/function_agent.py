"""The agent of `dtrain.launch`: a function of the process that has started this one, on the ranks of this machine."""

from __future__ import annotations

import os
import sys
from dataclasses import astuple
from pathlib import Path

from dtrain.errors import RanksFailed, UserError
from dtrain.gpus import DEVICE_VARIABLE
from dtrain.run.folder import EXIT_INTERRUPTED, EXIT_STOPPED, RunDir
from dtrain.schema.packages import require_for
from dtrain.stderr import say

from .agent.agent import run_ranks
from .agent.root_cause import headline
from .call.mailbox import Ended
from .call.request import FunctionRequest
from .commands.launch import has_hidden_modules
from .commands.request import Request, choose_ranks
from .commands.run_folder import fill, find_run, locked, whole_or_as_before
from .machine.devices import choose_processes, expected_ranks, threads_per_rank
from .rank.entry import Task, die_with_parent
from .rank.fork_server import start_fork_server
from .rank.preparation import preload_for

PROGRAM = "dtrain.launcher.call.program"


def run(asked: FunctionRequest) -> int:
    """Call it on all ranks; the exit code. How it ended goes to the mailbox too."""
    die_with_parent(asked.launcher)
    try:
        ended, code = _call(asked)
    except UserError as error:
        ended, code = Ended(error=error), error.exit_code
    asked.mailbox.end(ended)
    return code


def _call(asked: FunctionRequest) -> tuple[Ended, int]:
    require_for()
    run, here = find_run(Request((asked.name,), run_dir=asked.run_dir, resume=asked.resume), asked.name), Path.cwd()
    sys.argv[:] = ["dtrain.launch", asked.name]  # as env.json has it
    modules, threads = preload_for(" ".join(asked.modules)), threads_per_rank(expected_ranks(asked.gpus))
    forked = start_fork_server(modules, threads, unless=lambda: has_hidden_modules(here, here))
    num_ranks, os.environ[DEVICE_VARIABLE] = choose_processes(asked.gpus, "auto")
    show_ranks = choose_ranks(asked.show_ranks, num_ranks)
    task = Task(str(run), "function", PROGRAM, astuple(asked.mailbox), threads_per_rank(num_ranks), forked=forked)
    with locked(run) as is_new:
        with whole_or_as_before(run.path, is_new=is_new):
            fill(run, None if asked.resume else here, None)
        say(f"run {run}")
        code = run_ranks(task, num_ranks, run, show_ranks)
    if code in (EXIT_STOPPED, EXIT_INTERRUPTED):
        say(f"continue with: launch({asked.name}, ..., run_dir={str(run)!r}, resume=True)")
    return Ended(num_ranks, _failure(run) if code else None), code


def _failure(run: RunDir) -> RanksFailed:
    """What is raised where the function was called."""
    status = run.status()
    if error := status.get("error"):
        return RanksFailed(headline(error, run))
    return RanksFailed(f"the run was {status['state']} on request: {run}")
