"""Python stacks of hung processes: requested by a signal, written to their logs, read from there."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from dtrain.run.folder import END_OF_OUTPUT, END_OF_STACKS, STACKS

from ..machine.proc import catches, is_suspended

# Rarely used, and only sent to ranks that have installed a handler.
SIGNAL = signal.SIGRTMIN + 6
_WRITTEN_S = 1.0  # for a process to write its stacks
_FRAME = re.compile(r'  File "([^"]+)", line \d+ in .+')
_HOME = Path(__file__).parents[2]
_RECORDER = str(Path(__file__).with_name("flight_recorder.py"))


@dataclass(frozen=True)
class Frame:
    """A line of a stack, as it is printed."""

    text: str
    file: str

    @property
    def is_ours(self) -> bool:
        return is_ours(self.file)

    @property
    def is_users(self) -> bool:
        return is_users(self.file)


Stack = list[Frame]  # of one thread, the innermost frame first


def is_ours(file: str) -> bool:
    """Whether this source file is dtrain's."""
    return any(file.startswith(f"{_HOME}/{name}/") for name in ("dtrain", "launcher", "trainer"))


def is_users(file: str) -> bool:
    """Whether this source file is neither Python's, nor an installed package's, nor ours."""
    installed = file.startswith((os.path.dirname(os.__file__), "<frozen")) or "site-packages" in file
    return not (installed or is_ours(file))


def write_on_request() -> None:
    """Make this process, and those that it forks, write their stacks to stderr at the signal.

    The handler is in C: it works while Python waits for something, or never returns.
    """
    faulthandler.register(SIGNAL, file=sys.stderr, all_threads=True)


def request(pid: int, log: Path, *, goes_on: bool = False) -> list[Stack]:
    """Have a process write its stacks to its log, and return them, one per thread; none if it can't.

    Args:
        goes_on: whether later output is the process's own again.
    """
    if is_suspended(pid) or not catches(pid, SIGNAL):
        return []
    _note(log, STACKS if goes_on else END_OF_OUTPUT)
    try:
        return _request(pid, log)
    finally:
        if goes_on:
            _note(log, END_OF_STACKS)


def _note(log: Path, line: str) -> None:
    with log.open("a") as file:
        file.write(f"{line}\n")


def _request(pid: int, log: Path) -> list[Stack]:
    before = log.stat().st_size
    try:
        os.kill(pid, SIGNAL)
    except ProcessLookupError:
        return []
    deadline, size = time.monotonic() + _WRITTEN_S, before
    while time.monotonic() < deadline:
        time.sleep(0.05)
        if before < size == log.stat().st_size:
            break
        size = log.stat().st_size
    with log.open("rb") as file:
        file.seek(before)
        return parse(file.read().decode(errors="replace"))


def parse(text: str) -> list[Stack]:
    """The stacks in what faulthandler wrote, but for that of the thread that waits for the agent."""
    stacks: list[Stack] = []
    for line in text.splitlines():
        if line.endswith("(most recent call first):"):
            stacks.append([])
        elif stacks and (match := _FRAME.fullmatch(line)):
            stacks[-1].append(Frame(line, match[1]))
    return [stack for stack in stacks if not any(frame.file == _RECORDER for frame in stack)]


def in_users_code(stacks: list[Stack]) -> bool:
    """Whether a thread is in user code called by ours, rather than in ours or a library's."""
    for stack in stacks:
        known = next((frame for frame in stack if frame.is_users or frame.is_ours), None)
        if known is not None and known.is_users:
            return True
    return False


def shown(stacks: list[Stack]) -> str:
    """The user's frames of the thread that runs the training, or its innermost ones; the innermost last."""
    main = next((stack for stack in stacks if any(frame.is_ours for frame in stack)), stacks[-1] if stacks else [])
    frames = [frame for frame in main if frame.is_users] or main[:3]
    return "".join(f"{frame.text}\n" for frame in reversed(frames))
