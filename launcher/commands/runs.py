"""`dtrain runs`: the runs in a folder, one line each."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from dtrain.clusters.cluster import submitted_file
from dtrain.errors import UserError
from dtrain.monitoring.tracker import trackers
from dtrain.run.folder import RunDir
from dtrain.run.sweep import Sweep

# In job.yaml as dtrain writes it. Parsing it as YAML would take 3 ms a run.
_MONITOR = re.compile(r"^  early_stopping:\n    monitor: (\w+)$", re.MULTILINE)


def runs(folder: str | None) -> int:
    """Print the runs in the folder (by default runs/), the one started last at the end, just above the prompt.

    Raises:
        UserError: there is no such folder.
    """
    root = Path("runs" if folder is None else folder)
    if folder is not None and not root.is_dir():
        raise UserError(f"no such folder: {folder}")
    found = [RunDir(path) for path in root.glob("*") if _is_run(path)]
    print_runs(found)
    if not found:
        print(f"no runs in {root}", file=sys.stderr)
    return 0


def print_runs(found: Iterable[RunDir]) -> None:
    """Print a line for each run, the one started last at the end; a sweep has one line for all of its runs."""
    lines = [cells for _, cells in sorted(map(_look, found))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for cells in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def _is_run(path: Path) -> bool:
    try:
        run = RunDir(path)
        is_begun = run.status_file.exists() or submitted_file(run) is not None
        return is_begun or Sweep.is_at(path) or Sweep.of(run) is not None
    except OSError:  # a folder that we may not read
        return False


def _look(run: RunDir) -> tuple[float, list[str]]:
    """When the run was started (for the last time, if it was continued), and its line.

    The line has the folder, the state, how far the run is, its result and age, and its values in a sweep.
    """
    path = os.fsencode(run.path).decode(errors="backslashreplace")
    try:
        if sweep := Sweep.read(run.path):
            states = [each.status().get("state") for each in sweep.runs]
            ended = f"{states.count('finished')} of {len(states)} finished"
            seen = _changed(sweep.file)
            return seen, [path, "sweep", ended, "", "", f"began {_ago(seen)}", ""]
        sweep = Sweep.of(run)
        point = sweep.point(run) if sweep else ""
        if not run.status_file.exists():
            submission = submitted_file(run)
            seen = _changed(submission or run.job)
            state = "submitted" if submission else "waiting"
            return seen, [path, state, "epoch 0", "step 0", "-", f"since {_ago(seen)}", point]
        if run.has_damaged_status():
            return 0.0, _damaged(path)
        seen = _changed(run.status_file)
        began = _changed(run.lock_file) if run.lock_file.exists() else seen
        status = run.status()
        state, epoch, step = str(status["state"]), int(status["epoch"]), int(status["step"])
        age = f"began {_ago(began)}" if state == "running" else f"ended {_ago(seen)}"
        if state != "running":
            age += "".join(f", not all in {tracker.title}" for tracker in trackers() if tracker.outstanding(run))
        return began, [path, state, f"epoch {epoch}", f"step {step}", _result(run), age, point]
    except Exception:  # whatever is wrong in this folder: the others are still listed
        return 0.0, _damaged(path)


def _damaged(path: str) -> list[str]:
    return [path, "damaged", "", "", "", "", ""]


def _changed(file: Path) -> float:
    return file.stat().st_mtime


def _result(run: RunDir) -> str:
    """The last epoch's monitored value if the job names one, else the loss of its validation or training."""
    monitor = None
    with contextlib.suppress(OSError, ValueError):
        monitor = _MONITOR.search(run.job.read_text(encoding="utf-8"))
    with contextlib.suppress(OSError):
        row = run.last_row() or {}
        losses = [name for name in row if name.startswith("val_") and name.endswith("_loss")]
        for name in (monitor[1] if monitor else "", "val_loss", *losses, "train_loss"):
            if isinstance(value := row.get(name), int | float):
                return f"{name} {value:.4g}"
    return "-"


def _ago(moment: float) -> str:
    """`40 s ago`, `12 min ago`, `3 h ago`, `5 days ago`."""
    seconds = max(0, int(time.time() - moment))
    for unit, length, limit in (("s", 1, 60), ("min", 60, 60), ("h", 3600, 48)):
        if seconds < limit * length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds // 86400} days ago"
