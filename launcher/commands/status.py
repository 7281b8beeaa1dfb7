"""`dtrain status`: how a run is doing, in a few lines."""

from __future__ import annotations

from typing import Any

from dtrain.clusters.cluster import Submitted, submitted, submitted_file
from dtrain.errors import UserError
from dtrain.monitoring.screen import row_line, values_line
from dtrain.monitoring.tracker import trackers
from dtrain.run.folder import RunDir
from dtrain.run.sweep import Sweep

from ..agent.root_cause import headline
from .runs import print_runs


def status(path: str) -> int:
    """Print the run's state, how far it is, its last epoch, and why it failed if it did.

    Raises:
        UserError: there is no run in that folder.
    """
    run = RunDir(path)
    if sweep := Sweep.read(run.path):
        print_runs(sweep.runs)
        return 0
    found = read_status(run)
    print(f"run       {run}")
    print(f"state     {found['state']}" + _exit_code(found.get("exit_code")))
    if job := submitted(run):
        print(f"{job.cluster.name:<9} job {job.job_id}, {_in_queue(job)}")
    print(f"epoch     {_in_fit(found)}{found['epoch']}, step {found['step']}")
    for tracker in trackers():
        known = [found.get(tracker.id_key), tracker.outstanding(run) if found["state"] != "running" else ""]
        if any(known):
            print(f"{tracker.name:<9} " + ", ".join(filter(None, known)))
    if row := run.last_row():
        print("last      " + ("fit 1, " if run.fits() else "") + row_line(row))
    if values := found.get("test"):
        print(f"test      {values_line(values)}")
    if found.get("error"):
        print(headline(found["error"], run))
    print_runs(run.fits())
    return 0


def read_status(run: RunDir) -> dict[str, Any]:
    """The run's status now.

    Raises:
        UserError: there is no run in that folder.
    """
    status = run.status()
    if not status:
        if submitted_file(run) is None:
            raise UserError(f"{run} holds no run (there is no status.json)")
        return {"state": "submitted", "epoch": 0, "step": 0}
    return status


def position(status: dict[str, Any]) -> str:
    """How far a run is, in words."""
    return f"{_in_fit(status)}epoch {status['epoch']}, step {status['step']}"


def _in_fit(status: dict[str, Any]) -> str:
    number = status.get("fit", 1)
    return f"fit {number}, " if number > 1 else ""


def _in_queue(job: Submitted) -> str:
    try:
        queued = job.look_up()
    except UserError as error:
        return str(error)
    return "no longer in the queue" if queued is None else queued.in_words()


def _exit_code(code: int | None) -> str:
    return "" if code is None else f" (exit code {code})"
