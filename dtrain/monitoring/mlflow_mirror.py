"""Whether MLflow has all of a run that is over, as its run folder tells: the tracker may outlive the command."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

from dtrain.files import read_json, write_json
from dtrain.run.folder import RunDir


def tracker_log(run: RunDir) -> Path:
    """Where the tracker reports."""
    return run.logs / "mlflow.log"


def tracker_lock(run: RunDir) -> Path:
    """Held by the tracker that is at work; two would send the same rows."""
    return run.path / "mlflow.lock"


def note_complete(run: RunDir, status: dict[str, Any]) -> None:
    """MLflow has all of the run with that status, which is final. The tracker notes it, until the run goes on."""
    known = read_json(run.mlflow) or {}
    # A short run is over before MLflow has an id for it. Who keeps a running one writes it himself.
    written = read_json(run.status_file) or {"state": "running"}
    if written.get("state") != "running" and written.get("mlflow_run_id") != known.get("run_id"):
        write_json(run.status_file, {**written, "mlflow_run_id": known.get("run_id")})
    write_json(run.mlflow, {**known, "complete_after_restarts": status.get("restarts", 0)})


def outstanding(run: RunDir) -> str:
    """What MLflow's copy of a run that is over lacks, in words; empty where it has all, or is to have nothing."""
    complete_after = (read_json(run.mlflow) or {}).get("complete_after_restarts")
    if not tracker_log(run).exists() or complete_after == (read_json(run.status_file) or {}).get("restarts", 0):
        return ""
    if _is_locked(tracker_lock(run)):
        return f"still being sent; log: {tracker_log(run)}"
    return f"not all of the run; to complete it: python -m dtrain.trainer.tracking {run}"


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there are no locks
        return False
    finally:
        os.close(descriptor)
    return False
