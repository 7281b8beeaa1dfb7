"""What an exception tells about a rank's end: type, message, the user's own lines, and whether it is the cause."""

from __future__ import annotations

import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

from dtrain.errors import InLoadingProcess, UserError, first_line

from . import stacks

# gloo raises plain RuntimeErrors, which begin with their place in gloo: "[/path/gloo/transport/tcp/pair.cc:9] ...", or
# "Gloo connectFullMesh failed with [...] ..." if a rank is gone before all have joined.
_FROM_GLOO = re.compile(
    r"(?:Gloo \w+ failed with )?\[(?:enforce fail at )?\S*(?:gloo/\S+\.(?:cc|h)|ProcessGroupGloo\.cpp):\d+\]"
)
# So do NCCL's, with what torch asked of it and NCCL's own reason: "NCCL AllReduce failed: remote process exited ...".
# Not if the reason is local: a wrong call, or this GPU.
_FROM_NCCL = re.compile(
    r"(?:\[[^]]*\]:? ?)?(?:"
    r"(?:NCCL [\w ]+ failed[\w ]*|Failed to initialize NCCL communicator): (?!invalid |unhandled cuda )"
    r"|NCCL communicator was aborted|NCCL operation failed|Watchdog caught collective operation timeout)"
)
# torch raises in the training process what was raised in a loading process, with the traceback as its message.
_FROM_LOADING = re.compile(r"Caught (\w+) in DataLoader worker process (\d+)\.\nOriginal Traceback [^\n]*\n")
DEAD_LOADER = "DataLoader worker (pid"  # how torch's message about a dead loading process begins
_DYING_S = 0.5  # for a loading process that no longer responds to end
_FRAME = re.compile(r'  File "([^"]+)", line \d+')
_NO_SHARED_MEMORY = re.compile(r"(/torch_\w+|/psm_\w+|shared memory).*No space left on device", re.DOTALL)
_SHARED_MEMORY = (
    "; that is /dev/shm, through which loading processes pass their batches: enlarge it "
    "(docker run --shm-size=8g), or use fewer loading processes (data.workers)"
)


def of(error: BaseException, exit_status: int) -> dict[str, str]:
    """Type, message and traceback, as status.json's `error` has them."""
    error = _meant(error)
    said = [str(error), *getattr(error, "__notes__", ()), *_behind(error)]
    kind, message = type(error).__name__, "\n".join(filter(None, said))
    lines = "" if isinstance(error, UserError) else users_traceback(error)
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        message = f"exit code {exit_status}"
    elif isinstance(error.__cause__, InLoadingProcess) and lines:
        lines = _users(_parse(str(error.__cause__))[0])
    elif loading := _FROM_LOADING.match(message):
        kind, process = loading.groups()
        frames, last = _parse(message[loading.end() :])
        own_words = re.sub(rf"^[\w.]*{kind}(: |$)", "", last)
        message = f"{own_words} (in loading process {process})".strip()
        lines = _users(frames)
    elif is_dead_loader(error):
        lines = ""  # torch raises it wherever the main thread was
    if _NO_SHARED_MEMORY.search(message):
        message += _SHARED_MEMORY
    return {"type": kind, "message": message, "traceback": lines}


def is_dead_loader(error: BaseException) -> bool:
    """Whether torch reports a dead loading process; it does so at SIGCHLD, wherever the main thread is then."""
    return isinstance(error, RuntimeError) and str(error).startswith(DEAD_LOADER)


def first_of(error: BaseException) -> BaseException:
    """The end of a loading process, if that caused this error; otherwise the error."""
    try:
        frames = traceback.extract_tb(error.__traceback__)
        if frames and "/multiprocessing/" in frames[-1].filename:
            time.sleep(_DYING_S)
        signal.raise_signal(signal.SIGCHLD)
    except RuntimeError as death:
        if is_dead_loader(death):
            return death
    return error


def has_users_lines(text: str) -> bool:
    """Whether a traceback has a frame of the user's own code."""
    return any(stacks.is_users(match[1]) for match in map(_FRAME.match, text.splitlines()) if match)


def is_failed_collective(error: BaseException) -> bool:
    """Whether the error says that another rank is gone, rather than what went wrong here.

    Also one that was raised when such an error was handled, sys.exit included.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is None:
        return False
    typed = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    return any(
        isinstance(each, typed) or (type(each) is RuntimeError and _is_of_backend(str(each))) for each in _chain(error)
    )


def _is_of_backend(message: str) -> bool:
    return _FROM_GLOO.match(message) is not None or _FROM_NCCL.match(message) is not None


def users_traceback(error: BaseException) -> str:
    """The frames of the user's own code; the last frames if there are none."""
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if stacks.is_users(frame.filename)]
    return "".join(traceback.format_list(users or frames[-3:]))


def _users(frames: list[_Frame]) -> str:
    return "".join(frame.text for frame in [each for each in frames if stacks.is_users(each.file)] or frames[-3:])


def excerpt(text: str, room: int) -> list[str]:
    """The last complete frames of a traceback that fit into this many lines."""
    frames: list[list[str]] = []
    for line in text.rstrip().splitlines():
        if not frames or _FRAME.match(line):
            frames.append([])
        if line.strip(" ~^"):  # a separate line that marks the part of the code line
            frames[-1].append(line)
    shown = frames.pop()[:room] if frames else []
    while frames and len(frames[-1]) + len(shown) <= room:
        shown = frames.pop() + shown
    return shown


def _meant(error: BaseException) -> BaseException:
    """The error that this one stands for.

    Programs that log their own errors then exit through sys.exit; and a StopIteration can't leave a generator.
    """
    behind = error.__cause__ or error.__context__
    if behind is not None and isinstance(error, SystemExit) and isinstance(error.code, int):
        return behind
    return behind if isinstance(behind, StopIteration) and isinstance(error, RuntimeError) else error


def _behind(error: BaseException) -> list[str]:
    """What it was raised from, if that says more, and the members of an exception group; one line each."""
    cause, lines = error.__cause__, []
    is_said = isinstance(error, UserError) or isinstance(cause, InLoadingProcess) or str(cause) in str(error)
    if cause is not None and not (is_said or is_dead_loader(error)):
        lines = [f"raised from {type(cause).__name__}: {first_line(cause)}"]
    members = getattr(error, "exceptions", ()) if type(error).__name__.endswith("Group") else ()
    return lines + [f"{type(each).__name__}: {first_line(each)}" for each in members[:3]]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from or while handling, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


@dataclass
class _Frame:
    file: str
    text: str


def _parse(text: str) -> tuple[list[_Frame], str]:
    """The frames of a printed traceback, and the exception at its end."""
    frames: list[_Frame] = []
    last: list[str] = []
    for line in text.splitlines():
        if match := _FRAME.match(line):
            frames.append(_Frame(match[1], ""))
            last = []
        if line.startswith("  ") and frames and not last:
            frames[-1].text += f"{line}\n"
        else:
            last.append(line)
    return frames, "\n".join(last)
