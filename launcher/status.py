"""`dtrain status`: how a run stands, in a few lines."""

from __future__ import annotations

from typing import Any

from dtrain.errors import UserError
from dtrain.run import RunDir
from dtrain.screen import row_line

from .causes import headline


def status(path: str) -> int:
    """Print state, place, last epoch and cause of failure.

    Raises:
        UserError: there is no run in that folder.
    """
    run = RunDir(path)
    found = read_status(run)
    print(f"run       {run}")
    print(f"state     {found['state']}" + _exit_code(found.get("exit_code")))
    print(f"epoch     {found['epoch']}, step {found['step']}")
    if found.get("mlflow_run_id"):
        print(f"mlflow    {found['mlflow_run_id']}")
    if rows := run.rows():
        print(f"last      {row_line(rows[-1])}")
    if found.get("error"):
        print(headline(found["error"], run))
    return 0


def read_status(run: RunDir) -> dict[str, Any]:
    """How the run stands now.

    Raises:
        UserError: there is no run in that folder.
    """
    status = run.status()
    if not status:
        raise UserError(f"{run} holds no run (there is no status.json)")
    return status


def _exit_code(code: int | None) -> str:
    return "" if code is None else f" (exit code {code})"
