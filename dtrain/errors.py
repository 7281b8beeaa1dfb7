"""Users' mistakes and how they are reported: one line for each problem, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dtrain.redact import hide_password


@dataclass(frozen=True)
class Problem:
    """One mistake. `file` is the source of the value: a file, or the override `key=value` itself."""

    message: str
    path: str | None = None
    file: str | None = None
    line: int | None = None
    hint: str | None = None

    def __str__(self) -> str:
        """One line, such as `job.yaml:12: optimizer.lrr: unknown key; did you mean lr?`."""
        place = f"{self.file}:{self.line}" if self.file and self.line else self.file
        text = ": ".join(part for part in (place, self.path, self.message) if part)
        if self.hint:
            text += f"; {self.hint}"
        return hide_password(" ".join(text.split()))


class UserError(Exception):
    """The request was wrong: printed as it is, one problem per line, and the command exits with 2."""

    exit_code = 2

    def __init__(self, problems: str | Problem | Iterable[Problem]) -> None:
        if isinstance(problems, str):
            problems = Problem(problems)
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__(self.problems)  # as the argument, so that it pickles

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


class ResumeError(UserError):
    """There are checkpoints, but none that the run can continue from. Also from a rank, the command exits with 2."""


class InLoadingProcess(Exception):
    """The cause of an exception from one of a rank's loading processes: its traceback there, as text."""

    def __str__(self) -> str:
        return f"in a loading process\n{self.args[0]}"


class RanksFailed(Exception):
    """A rank has failed. A command has reported it, and exits with 1; from `dtrain.launch`, the message says it."""


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that the user most likely meant, ignoring case; None if none is close."""
    by_lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return by_lower[found[0]] if found else None


def did_you_mean(word: str, choices: Iterable[str]) -> str | None:
    """`nearest` as a hint."""
    choice = nearest(word, choices)
    return f"did you mean {choice}?" if choice else None


def among(word: str, choices: Sequence[str]) -> str:
    """All choices as a hint, the closest first."""
    return " ".join(filter(None, [did_you_mean(word, choices), f"known: {', '.join(choices)}"]))


def first_line(error: BaseException) -> str:
    """The error's first line; its type if it has no message."""
    return next(iter(str(error).splitlines()), type(error).__name__)
