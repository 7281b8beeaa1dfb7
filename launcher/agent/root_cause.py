"""Which of the ranks that ended is the root cause, and how it is reported."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.files import read_json
from dtrain.run.folder import END_OF_OUTPUT, RunDir
from dtrain.run.heartbeat import Beat, Phase

from ..machine.proc import oom_kills
from ..rank import stacks
from ..rank.reports import DEAD_LOADER, excerpt, has_users_lines

MAX_LINES = 15  # screen lines: the cause must fit, however long it is
MAX_MESSAGE_LINES = 7
MAX_LINE = 200  # characters of a line of a log
MAX_LOG_LINES = 6  # for a rank that has not recorded why it left

_FATAL = "Fatal Python error: "  # faulthandler's first line, before the stacks
_UNCAUGHT = re.compile(r"^  what\(\):  (?:\[enforce fail at \S+\] )?(.+)$", re.MULTILINE)  # of C++, before it aborts

# What a restart can't fix.
FINAL = ("UserError", "ResumeError", "Timeout", "NodeLost", "FolderLost")

Error = dict[str, Any]  # status.json's `error`: rank, host, type, message, traceback; and time, and place of a hang


@dataclass(frozen=True)
class RankEnd:
    """How a rank ended: its exit code (negative: the signal), and what it recorded itself, if it could."""

    rank: int
    exit_code: int | None
    record: dict[str, Any] | None = None

    @property
    def has_failed(self) -> bool:
        """Whether it has failed, or is about to."""
        if self.record is not None and not self.record["victim"]:
            return True
        return self.exit_code not in (None, 0)

    @property
    def suspicion(self) -> int:
        """How likely it is the cause; 0: it is. Among equals the earlier one counts.

        A signal comes from outside, except SIGABRT and SIGTERM, with which libraries and we end ranks that can't
        continue; an exception speaks for itself, unless it says that another rank is gone; an exit code says little.
        """
        if self.record is not None and self.record["victim"]:
            return 4
        if self.record is not None and self.record["type"] != "SystemExit":
            return 1
        code = self.exit_code or 0
        if code < 0:
            return 3 if -code in (signal.SIGABRT, signal.SIGTERM) else 0
        return 2


def read_ends(last_words: Mapping[int, Path], exit_codes: dict[int, int | None]) -> list[RankEnd]:
    """The ends of this node's ranks, by rank."""
    return [RankEnd(rank, code, read_json(last_words[rank])) for rank, code in sorted(exit_codes.items())]


def first_cause(noticed: Sequence[RankEnd], after: Sequence[RankEnd]) -> RankEnd:
    """The rank that failed by itself.

    Args:
        noticed: those that had failed when the agent first looked.
        after: those that have failed by themselves, now that all have ended. They count only if the others are
            victims or look like it: a collective failed because another rank was gone, or something ended them.
    """
    found = min(noticed, key=_order)
    late = min(after, key=_order, default=found)
    return late if found.suspicion >= 3 and late.suspicion < found.suspicion else found


def left_early(found: RankEnd, ends: Sequence[RankEnd], ended_at: Mapping[int, float]) -> Error | None:
    """The first rank to end as if all were done, if the others are only its victims.

    Args:
        found: `first_cause`.
        ends: of all ranks of this node, as they were when the agent first saw a failure.
        ended_at: by rank, when it was seen to have ended.
    """
    left = [end.rank for end in ends if end.exit_code == 0]
    if not left or found.record is None or not found.record["victim"]:
        return None
    error = _left(left, ended_at, f"rank {found.rank} still had to exchange data with it")
    lines = found.record["traceback"] if has_users_lines(found.record["traceback"]) else ""
    return {**error, "message": error["message"] + ", here:" * bool(lines), "traceback": lines}


def left_unmet(beats: Mapping[int, Beat], exit_codes: Mapping[int, int | None], ended_at: Mapping[int, float]) -> Error:
    """The rank that has ended as if all were done while others still wait for it; empty if there is none.

    Args:
        beats: of all ranks of this node.
    """
    left = [rank for rank, code in exit_codes.items() if code == 0 and not beats[rank].has_joined]
    waiting = [rank for rank, code in exit_codes.items() if code is None and beats[rank].phase == Phase.JOINING]
    return _left(left, ended_at, f"rank {waiting[0]} was waiting for it to join") if left and waiting else {}


def _left(ranks: Sequence[int], ended_at: Mapping[int, float], meanwhile: str) -> Error:
    rank = min(ranks, key=lambda rank: ended_at[rank])
    at = time.strftime("%H:%M:%S", time.localtime(ended_at[rank]))
    # Less suspect than an exception of another node's rank, more than the victims there.
    error = _error(rank, "LeftEarly", f"it left with exit code 0 at {at}, while {meanwhile}", suspicion=3)
    return {**error, "time": ended_at[rank]}


def _order(end: RankEnd) -> tuple[int, float, int]:
    return end.suspicion, end.record["time"] if end.record else 0.0, end.rank


def error_of(end: RankEnd, oom_kills_before: int, printed: Callable[[int], str]) -> Error:
    """A rank's end as status.json's `error`.

    Args:
        printed: by rank, the end of its output: programs that catch their own errors, and loading processes, print
            there why they exit; C++ and faulthandler, why and where a signal has ended it.
    """
    code = end.exit_code or 0
    if code >= 0 or end.record is not None:
        error: Error = end.record or _error(end.rank, "SystemExit", f"exit code {code}")
        said = _last_lines(printed(end.rank)) if error["message"].startswith(("exit code", DEAD_LOADER)) else ""
        return {**error, "traceback": error["traceback"] + said, "suspicion": end.suspicion}
    kind = signal.Signals(-code).name
    message = f"killed by signal {kind}"
    if code == -signal.SIGKILL and oom_kills() > oom_kills_before:
        message += " (out of memory: the kernel just killed a process on this node)"
    uncaught, _, fatal = printed(end.rank).partition(_FATAL)
    message += "".join(f": {said[:MAX_LINE]}" for said in _UNCAUGHT.findall(uncaught)[-1:] if fatal)
    return {**_error(end.rank, kind, message, suspicion=end.suspicion), "traceback": stacks.shown(stacks.parse(fatal))}


def end_of_output(log: Path, begin: int) -> str:
    """What a rank has printed last, after this offset in bytes of its log."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(begin, file.seek(0, os.SEEK_END) - (1 << 16)))
        return file.read().decode(errors="replace").partition(END_OF_OUTPUT)[0]
    return ""


def _last_lines(text: str) -> str:
    lines = [line[:MAX_LINE] for line in text.splitlines() if line.strip()]
    return "\n".join(["the end of its log:", *lines[-MAX_LOG_LINES:], ""]) if lines else ""


def gave_up(rank: int) -> Error:
    """The cause if ranks were asked to stop and did not."""
    return _error(rank, "Timeout", "did not stop when asked to, and was killed", suspicion=1)


def lost_node(node: int) -> Error:
    """The cause if a node's agent no longer responds."""
    return {**_error(None, "NodeLost", f"node {node} is gone: its agent no longer responds"), "suspicion": 1}


def lost_folder(run: RunDir) -> Error:
    """The cause if the run folder was removed or moved."""
    message = f"{run} was removed or moved during the run: nothing more could be saved"
    return _error(None, "FolderLost", message)


def _error(rank: int | None, kind: str, message: str, suspicion: int = 0) -> Error:
    error = {"rank": rank, "host": socket.gethostname(), "type": kind, "message": message, "traceback": ""}
    return {**error, "time": time.time(), "suspicion": suspicion}


def first(errors: Sequence[Error]) -> Error | None:
    """The root cause among those of all nodes: the hung rank furthest behind, or the likeliest and earliest."""
    hangs = [error for error in errors if error["type"] == "Hang"]
    if hangs:
        return min(hangs, key=lambda error: error["place"])
    return min(errors, key=lambda error: (error["suspicion"], error["time"]), default=None)


def exit_code(error: Error) -> int:
    """The command's exit code: 1, or 2 if there was nothing to continue from."""
    return int(error.get("exit_code", 1))


def public(error: Error) -> Error:
    """Its entry in status.json."""
    return {key: error[key] for key in ("rank", "host", "type", "message", "traceback")}


def headline(error: Error, run: RunDir) -> str:
    """The last lines on the screen: which rank, what, where in the user's code, and where to read on."""
    if error["type"] in (*FINAL, "SystemExit", "Hang", "LeftEarly") or error["type"].startswith("SIG"):
        what = error["message"]
    else:
        what = f"{error['type']}: {error['message']}".removesuffix(": ")
    if error["rank"] is None:
        return str(what)
    lines = f"rank {error['rank']} failed: {what}".splitlines()
    if len(lines) > MAX_MESSAGE_LINES:  # the beginning names the rank, the end often the cause
        lines = [*lines[:2], "...", *lines[3 - MAX_MESSAGE_LINES :]]
    place = [f"host: {error.get('host')}", f"log: {run.rank_log(error['rank'])}"]
    return "\n".join([*lines, *excerpt(str(error["traceback"]), MAX_LINES - len(lines) - len(place)), *place])
