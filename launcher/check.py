"""`dtrain check`: what can be known about a job before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

from dtrain.errors import UserError


def check(path: str, overrides: Sequence[str]) -> int:
    """Check schema, imports and arguments; 0 if the job is right.

    Raises:
        UserError: all that is wrong, at once.
    """
    from dtrain.loading import load_job
    from dtrain.target import check_job

    loaded = load_job(path, overrides)
    if problems := check_job(loaded, loaded.path.absolute().parent):
        raise UserError(problems)
    job = loaded.job
    print(f"{path} is right: schema, imports and arguments; best weights by {job.monitor} ({job.monitor_mode})")
    return 0
