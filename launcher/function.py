"""`dtrain.launch`: a function of this process, which may be a notebook's, on several ranks.

The agent is a process of its own, and its ranks are forked from that: nothing of this process is, where torch may have
initialised CUDA, and threads run.
"""

from __future__ import annotations

import inspect
import linecache
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from dtrain.errors import RanksFailed, UserError, did_you_mean, first_line
from dtrain.schema.packages import require

from .arguments import check_gpus
from .call.mailbox import Call, Ended, Mailbox, Returned, Sources, Surroundings
from .call.request import FunctionRequest

OWN_KEYWORDS = ("gpus", "run_dir", "resume", "show_ranks")


def launch(
    function: Callable[..., Any],
    *args: Any,
    gpus: int | str = "auto",
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    show_ranks: int | str = 0,
    **kwargs: Any,
) -> list[Any]:
    """Call `function(*args, **kwargs)` on several ranks, one process each; what each returned, in the order of ranks.

    The ranks run as those of `dtrain launch --gpus N script.py` do. Their output appears here, and in the run folder's
    logs/. An interrupt (Ctrl-C, or a notebook's stop button) ends them at the next step, with a checkpoint; a second
    one at once. They end with this process.

    Args:
        gpus: processes, one GPU each; "auto": all visible GPUs.
        run_dir: run folder; by default a new one under runs/.
        resume: continue the run in `run_dir`, or the newest unfinished run of a function of this name.
        show_ranks: the ranks whose output appears here, such as "0,2", or "all".

    Raises:
        UserError: the request is wrong, and nothing was started; or what a rank returned can't be read here.
        RanksFailed: a rank failed; which one, why, and where in the user's own lines.
        KeyboardInterrupt: it was interrupted, and all ranks have ended.
    """
    name = re.sub(r"\W", "", getattr(function, "__name__", type(function).__name__)) or "function"
    call = function, args, kwargs
    require("dtrain.launch", "cloudpickle")
    _require_outside()
    _require_callable(name, call)
    check_gpus(str(gpus))
    folder = None if run_dir is None else str(run_dir)
    modules = sorted({name.partition(".")[0] for name in sys.modules})
    with Mailbox.opened() as mailbox:
        _send(mailbox, name, call)
        code, was_interrupted = _run_agent(
            FunctionRequest(name, str(gpus), folder, resume, str(show_ranks), os.getpid(), mailbox, modules)
        )
        if was_interrupted:
            raise KeyboardInterrupt
        ended = mailbox.end_if_any() or Ended(error=_lost(code))
        if ended.error is not None:
            raise ended.error
        values = {each.rank: _value(each) for each in mailbox.all_returned()}
    return [values.get(rank) for rank in range(ended.num_ranks)]  # None of one that left by sys.exit()


# -- before --------------------------------------------------------------------------------------


def _require_outside() -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        rank, world_size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
        raise UserError(
            f"launch starts ranks of its own, but this process is one already (rank {rank} of {world_size}): "
            "call the function itself"
        )


def _require_callable(name: str, call: Call) -> None:
    """Raise UserError where the function would refuse its arguments."""
    function, args, kwargs = call
    if not callable(function):
        raise UserError(f"launch(function, ...): expected a function, got {type(function).__name__}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a builtin
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        unknown = next((each for each in kwargs if each not in signature.parameters), "")
        hint = did_you_mean(unknown, [*OWN_KEYWORDS, *signature.parameters])
        raise UserError(f"{name} does not take these arguments: {error}{f'; {hint}' if hint else ''}") from None


def _send(mailbox: Mailbox, name: str, call: Call) -> None:
    function, args, kwargs = call
    try:
        mailbox.send(Surroundings(name, sys.path, _cells()), call)
    except Exception as error:  # of whatever is to be pickled
        pieces = {f"argument {number}": each for number, each in enumerate(args, 1)}
        pieces |= {f"argument {key}": each for key, each in kwargs.items()} | {name: function}
        found = (_unsendable(piece, each, set()) for piece, each in pieces.items())
        what, cause = next(filter(None, found), ("the call", error))
        raise UserError(
            f"{what} can't be sent to another process: {type(cause).__name__}: {first_line(cause)}; "
            f"create it inside {name} instead"
        ) from None


def _cells() -> Sources:
    """The sources of notebooks' cells, as the shell has registered them: without a file's time."""
    return {name: entry for name, entry in list(linecache.cache.items()) if len(entry) == 4 and entry[1] is None}


def _unsendable(what: str, value: Any, seen: set[int]) -> tuple[str, Exception] | None:
    """What of this doesn't pickle, in words, and why: the value itself, or what a function uses of its surroundings."""
    from .call import by_value

    if id(value) in seen:
        return None
    seen.add(id(value))
    try:
        by_value.dumps(value)
    except Exception as error:
        used = inspect.getclosurevars(value) if inspect.isfunction(value) else None
        for name, each in {**used.globals, **used.nonlocals}.items() if used else ():
            if inner := _unsendable(f"{name}, which {value.__name__} uses,", each, seen):
                return inner
        return f"{what} ({type(value).__name__})", error
    return None


# -- meanwhile -----------------------------------------------------------------------------------


def _run_agent(request: FunctionRequest) -> tuple[int, bool]:
    """Run the agent to its end, with its output here; its exit code, and whether it was interrupted from here."""
    # It finds dtrain where this process did; nothing in the working directory hides a module of Python's from it.
    path = [entry for entry in map(str, sys.path) if entry not in ("", os.getcwd())]
    program = f"import sys; sys.path[:] = {path!r}; from dtrain.launcher.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", program, "call-function", request.text()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # an interrupt of this process's group reaches it from here alone
    ) as agent:
        try:
            return _follow(agent)
        finally:
            agent.kill()  # which has ended, unless this process is in trouble


def _follow(agent: subprocess.Popen[str]) -> tuple[int, bool]:
    assert agent.stdout is not None
    was_interrupted = False
    while True:
        try:
            for line in agent.stdout:
                print(line, end="", flush=True)
            return agent.wait(), was_interrupted
        except KeyboardInterrupt:
            was_interrupted = True
            agent.send_signal(signal.SIGINT)


# -- after ---------------------------------------------------------------------------------------


def _lost(code: int) -> RanksFailed:
    how = f"killed by signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return RanksFailed(f"the process that supervises the ranks has ended, and they with it: {how}")


def _value(returned: Returned) -> Any:
    try:
        return pickle.loads(returned.value)
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"what rank {returned.rank} returned can't be read in this process: {why}") from error
