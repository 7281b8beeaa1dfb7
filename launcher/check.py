"""`dtrain check`: what can be known about a job before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from dtrain.errors import UserError


def check(path: str, overrides: Sequence[str], exact: bool) -> int:
    """Check schema, imports and arguments; 0 if the job is right. With `exact`, also see its promises kept.

    Raises:
        UserError: all that is wrong, at once.
    """
    from dtrain.loading import load_job
    from dtrain.target import check_job

    loaded = load_job(path, overrides)
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
