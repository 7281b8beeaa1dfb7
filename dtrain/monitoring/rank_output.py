"""What the ranks print: the bytes of a log as it grows, and its lines as a screen shows them."""

from __future__ import annotations

import time
from pathlib import Path

from dtrain.run.folder import END_OF_OUTPUT, END_OF_STACKS, STACKS

CHUNK = 1 << 20  # bytes of a log in memory at a time
MAX_LINE = 1 << 16  # a longer line is shown in pieces
UNFINISHED_S = 10.0  # an unfinished line is shown after this time: a progress bar, a rank that hangs


class Tail:
    """The bytes of a growing file, which may not exist yet. With `at_end`, existing content is skipped."""

    def __init__(self, path: Path, *, at_end: bool = False) -> None:
        self._path = path
        self._position = path.stat().st_size if at_end and path.exists() else 0

    def read(self) -> bytes:
        """The next bytes, at most CHUNK; empty if there are none yet."""
        try:
            with self._path.open("rb", buffering=0) as file:
                file.seek(self._position)
                new = file.read(CHUNK)
        except FileNotFoundError:
            return b""
        self._position += len(new)
        return new


class RankOutput:
    """The lines that a rank prints from now on, for a screen, up to the traceback with which it fails.

    A line that was overwritten by carriage returns (a progress bar) appears as a terminal would finally show it.
    """

    def __init__(self, rank: int, log: Path) -> None:
        self.rank = rank
        self._tail = Tail(log, at_end=True)
        self._rest = b""  # of an unfinished line
        self._began = 0.0  # when that line did
        self._is_cut = False  # whether a piece of it has been shown
        self._failed = False
        self._is_aside = False  # within stacks that the agent has requested

    def new_lines(self) -> list[bytes] | None:
        """New lines since the last call, from one chunk at most; None if there are none."""
        new = b"" if self._failed else self._tail.read()
        *lines, rest = (self._rest + new).split(b"\n")
        if lines or not self._rest:
            self._began = time.monotonic()
        if lines:
            lines = self._until_failure(lines[1:] if self._is_cut and not _visible(lines[0]) else lines)
            self._is_cut = False
        self._rest = b"" if self._failed else _last_written(rest)
        shown = [_visible(line) for line in lines]
        if len(self._rest) > MAX_LINE or (self._rest and time.monotonic() - self._began > UNFINISHED_S):
            shown += self.unfinished()
        return shown if new or shown else None

    def unfinished(self) -> list[bytes]:
        """The unfinished line so far, if there is one; it is not shown again."""
        line, self._rest = _visible(self._rest), b""
        self._is_cut = True
        return [line] if line else []

    def _until_failure(self, lines: list[bytes]) -> list[bytes]:
        # What follows is the traceback: one of a victim would hide the cause, which the agent names.
        shown = []
        for line in lines:
            if self._is_aside:
                self._is_aside = line != END_OF_STACKS.encode()
                continue
            mark = next((each for each in (END_OF_OUTPUT, STACKS) if line.endswith(each.encode())), "")
            before = line.removesuffix(mark.encode())  # earlier output may lack a newline
            if not mark or _visible(before):
                shown.append(before)
            self._is_aside = mark == STACKS
            if mark == END_OF_OUTPUT:
                self._failed = True
                break
        return shown


def _last_written(line: bytes) -> bytes:
    """The line without what was overwritten; the carriage returns at its end stay, which may belong to its end."""
    return line[line.rstrip(b"\r").rfind(b"\r") + 1 :]


def _visible(line: bytes) -> bytes:
    return _last_written(line).rstrip(b"\r")
