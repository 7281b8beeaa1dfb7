"""Which of the ranks that ended is the one to blame, and how that is said."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dtrain.files import read_json
from dtrain.run import RunDir

# The cause must fit into the last 15 lines, however long it is itself.
MAX_MESSAGE_LINES = 7
MAX_TRACEBACK_LINES = 6


@dataclass(frozen=True)
class RankEnd:
    """How a rank ended: its exit code (negative: the signal), and what it recorded itself, if it could."""

    rank: int
    exit_code: int | None
    record: dict[str, Any] | None = None


def read_ends(run: RunDir, exit_codes: dict[int, int | None]) -> list[RankEnd]:
    """The ends of this node's ranks, by rank."""
    return [RankEnd(rank, code, read_json(run.rank_error(rank))) for rank, code in sorted(exit_codes.items())]


def first_cause(ends: Sequence[RankEnd], noticed: int | None) -> RankEnd:
    """The rank that failed by itself.

    A rank that recorded an error of its own comes first, the earliest if several did. Then one that died without
    a word: killed, or by an exit of its own. Not those that the agent ended by SIGTERM afterwards, unless nothing
    else is left; and last the victims, whose collective failed since another rank was gone.

    Args:
        noticed: the rank whose end the agent saw first.
    """
    recorded = [end for end in ends if end.record is not None and not end.record["victim"]]
    if recorded:
        return min(recorded, key=lambda end: end.record["time"] if end.record else 0.0)
    silent = [end for end in ends if end.record is None and end.exit_code not in (0, None, -signal.SIGTERM)]
    if silent:
        return next((end for end in silent if end.rank == noticed), silent[0])
    return next((end for end in ends if end.rank == noticed), ends[0])


def describe(end: RankEnd) -> dict[str, Any]:
    """status.json's `error`: rank, type, message, traceback."""
    if end.record is not None:
        return {key: end.record[key] for key in ("rank", "type", "message", "traceback")}
    code = end.exit_code or 0
    if code < 0:
        name = signal.Signals(-code).name
        return {"rank": end.rank, "type": name, "message": f"killed by signal {name}", "traceback": ""}
    return {"rank": end.rank, "type": "SystemExit", "message": f"exit code {code}", "traceback": ""}


def exit_code(end: RankEnd) -> int:
    """What the command exits with: 1, or 2 where there was nothing that the run could continue from."""
    return 1 if end.record is None else int(end.record["exit_code"])


def headline(error: dict[str, Any], run: RunDir) -> str:
    """The last lines on the screen: which rank, what, where in the user's code, and where to read on."""
    if error["type"] in ("UserError", "ResumeError", "SystemExit") or error["type"].startswith("SIG"):
        what = error["message"]
    else:
        what = f"{error['type']}: {error['message']}".removesuffix(": ")
    lines = f"rank {error['rank']} failed: {what}".splitlines()
    if len(lines) > MAX_MESSAGE_LINES:  # the beginning names the rank, the end often the cause
        lines = [*lines[:2], "...", *lines[3 - MAX_MESSAGE_LINES :]]
    lines += str(error["traceback"]).rstrip().splitlines()[-MAX_TRACEBACK_LINES:]
    return "\n".join([*lines, f"log: {run.rank_log(error['rank'])}"])
