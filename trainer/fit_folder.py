"""A fit's run folder: which one it is, and which process keeps its status.

Under `dtrain launch` a script's first fit has the folder of the run itself, whose agent keeps it, so that a script with
one fit is a run like any other. Each later fit has a folder inside it:

    RUN/            the first fit, and what belongs to the script: logs, heartbeat, code
    RUN/fit-2/      the second: a whole run folder, kept by rank 0
    RUN/fits.json   the folders of later fits, including those given as `run_dir`

All of them show their position in the run's own heartbeats, where the agent looks and requests a stop.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from dtrain.errors import UserError
from dtrain.files import write_text
from dtrain.monitoring.run_monitor import Keeper
from dtrain.names import is_users
from dtrain.run import node_disk
from dtrain.run.folder import EXIT_INTERRUPTED, EXIT_STOPPED, RUN_DIR_VARIABLE, RunDir
from dtrain.run.heartbeat import Heartbeat

from .checkpoint.manager import saved
from .distributed.stop import Stopped, signals_left_to_agent
from .distributed.world import World

_fits: dict[str | None, list[Path]] = {}  # the folders of this process's fits, by the launched run; None without one


@contextlib.contextmanager
def fit_folder(
    world: World, given: str | os.PathLike[str] | None, *, resume: bool, job_text: Callable[[str], str]
) -> Iterator[RunDir]:
    """The run folder of a new fit, whose status is being kept. All ranks take part.

    Args:
        given: by the script, in place of the one that it would have.
        resume: whether `given` may hold a run already.
        job_text: the text of its job.yaml, by the script's name.

    Raises:
        UserError: the folder can't be used.
    """
    script, before = _script()
    number = len(before) + 1
    run = _next(given) or RunDir(world.from_main(str(RunDir.new(_script_name()))))
    path = run.path.absolute()
    if path in before:
        raise UserError(f"{run} already holds a fit of this script; give each fit its own run_dir")
    before.append(path)
    is_agents = script is not None and path == script.path
    with contextlib.ExitStack() as stack:
        if script is not None:
            stack.enter_context(signals_left_to_agent())
            if world.is_main and not script.job.exists():
                name = _script_name()
                write_text(script.job, job_text(name) if is_agents else yaml.safe_dump({"name": name}))
        if world.is_main and not is_agents:
            _prepare(run, script, stack, may_exist=resume or given is None, text=job_text(_script_name()))
        world.barrier()  # the folder is there
        if script is None:
            stack.enter_context(node_disk.held(run.heartbeats))
        Heartbeat(run.heartbeat(world.rank), create=script is None).begin(number)
        if world.is_main and not is_agents:
            _keep(run, script, stack)
        yield run


def continues(given: str | os.PathLike[str] | None = None) -> bool:
    """Whether there is a checkpoint already in the folder that the next fit will have. No collective.

    Args:
        given: as for `fit_folder`.
    """
    run = _next(given)
    return run is not None and bool(saved(run))


def _next(given: str | os.PathLike[str] | None) -> RunDir | None:
    """The folder that the next fit will have; None: a new one."""
    if given is not None:
        return RunDir(given)
    script, before = _script()
    return script.fit(len(before) + 1) if script is not None and script.path in before else script


def _script() -> tuple[RunDir | None, list[Path]]:
    """The run that was launched, if one was, and the folders that this process's fits have had in it."""
    launched = os.environ.get(RUN_DIR_VARIABLE)
    return None if launched is None else RunDir(Path(launched).absolute()), _fits.setdefault(launched, [])


def _prepare(run: RunDir, script: RunDir | None, stack: contextlib.ExitStack, *, may_exist: bool, text: str) -> None:
    """Make the run folder, and lock it until the stack ends. Rank 0 only."""
    own = [] if script is None else [fit.path for fit in script.fits()]  # from before a stop of the script
    if run.exists() and not may_exist and run.path.absolute() not in own:
        raise UserError(f"{run} already exists: choose another run_dir, or resume=True to continue it")
    run.create()
    stack.enter_context(run.lock())
    run.take_heartbeats(script)
    if not run.job.exists():
        write_text(run.job, text)


def _keep(run: RunDir, script: RunDir | None, stack: contextlib.ExitStack) -> None:
    """Keep the run's status until the stack ends. The agent shows the fit and has it mirrored. Rank 0 only."""
    keeper = stack.enter_context(Keeper(run, quiet=script is not None))
    stack.push(lambda *failure: _report_end(keeper, failure[1]))
    if script is not None:
        script.add_fit(run)


def _report_end(keeper: Keeper, failure: BaseException | None) -> None:
    if failure is None:
        keeper.finish("finished", 0)
    elif isinstance(failure, Stopped):
        keeper.finish("stopped", EXIT_STOPPED)
    elif isinstance(failure, KeyboardInterrupt):
        keeper.finish("killed", EXIT_INTERRUPTED)
    else:
        lines = "" if isinstance(failure, UserError) else _users_lines(failure)
        error = {"rank": 0, "host": socket.gethostname(), "type": type(failure).__name__, "message": str(failure)}
        error |= {"traceback": lines}
        keeper.finish("failed", 1, error)


def _users_lines(failure: BaseException) -> str:
    """The frames of the user's own code; all where there are none."""
    frames = traceback.extract_tb(failure.__traceback__)
    here = os.path.join(os.path.dirname(__file__), "")
    users = [frame for frame in frames if is_users(frame.filename) and not frame.filename.startswith(here)]
    return "".join(traceback.format_list(users or frames))


def _script_name() -> str:
    name = Path(sys.argv[0]).stem if sys.argv and sys.argv[0] else ""
    return name if name and not name.startswith("-") else "run"
