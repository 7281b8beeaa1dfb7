"""`dtrain check`: what can be known about a job before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

from dtrain.errors import Problem, UserError

if TYPE_CHECKING:
    from dtrain.job import LoadedScript


def check(path: str, overrides: Sequence[str], exact: bool) -> int:
    """Check schema, imports and arguments; 0 if the job is right. With `exact`, also see its promises kept.

    Raises:
        UserError: all that is wrong, at once.
    """
    from dtrain.job import LoadedScript
    from dtrain.loading import load
    from dtrain.target import check_job

    loaded = load(path, overrides)
    if isinstance(loaded, LoadedScript):
        return _check_script(loaded, exact)
    with redirect_stdout(sys.stderr):  # stdout is for results, not for what the user's modules print
        problems = check_job(loaded, loaded.path.absolute().parent)
    if problems:
        raise UserError(problems)
    job = loaded.job
    print(f"{path} is right: schema, imports and arguments; best weights by {job.monitor} ({job.monitor_mode})")
    if not exact:
        return 0
    from .exact import check_exact

    return check_exact(loaded)


def _check_script(loaded: LoadedScript, exact: bool) -> int:
    from .program import find_program

    program = find_program(loaded)
    if exact:
        raise UserError(loaded.at(Problem("trains by itself: --exact is for jobs with a model", "script")))
    print(f"{loaded.path} is right: schema and {program.file}")
    return 0
