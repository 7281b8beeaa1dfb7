"""`dtrain runs`: the runs of a folder, one line each."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from pathlib import Path

from dtrain.errors import UserError
from dtrain.run import RunDir

# In job.yaml as dtrain writes it. Reading it as YAML takes 3 ms a run.
_MONITOR = re.compile(r"^  early_stopping:\n    monitor: (\w+)$", re.MULTILINE)


def runs(folder: str | None) -> int:
    """Print the runs in the folder (by default runs/), the one that began last at the end, above the prompt.

    Raises:
        UserError: there is no such folder.
    """
    root = Path("runs" if folder is None else folder)
    if folder is not None and not root.is_dir():
        raise UserError(f"no such folder: {folder}")
    found = sorted(_look(RunDir(path)) for path in root.glob("*") if _is_run(path))
    lines = [cells for _, cells in found]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for cells in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    if not found:
        print(f"no runs in {root}", file=sys.stderr)
    return 0


def _is_run(path: Path) -> bool:
    try:
        return RunDir(path).status_file.exists()
    except OSError:  # a folder that may not be read
        return False


def _look(run: RunDir) -> tuple[float, list[str]]:
    """When the run began (the last time, if it was continued), and its line: folder, state, place, result, age."""
    path = os.fsencode(run.path).decode(errors="backslashreplace")
    try:
        seen = _changed(run.status_file)
        began = _changed(run.lock_file) if run.lock_file.exists() else seen
        status = run.status()
        state, epoch, step = str(status["state"]), int(status["epoch"]), int(status["step"])
        age = f"began {_ago(began)}" if state == "running" else f"ended {_ago(seen)}"
        return began, [path, state, f"epoch {epoch}", f"step {step}", _result(run), age]
    except Exception:  # whatever is wrong in one folder, the others are listed
        return 0.0, [path, "damaged", "", "", "", ""]


def _changed(file: Path) -> float:
    return file.stat().st_mtime


def _result(run: RunDir) -> str:
    """The last epoch's monitored value, where the job names one, else its val_loss or train_loss."""
    monitor = None
    with contextlib.suppress(OSError, ValueError):
        monitor = _MONITOR.search(run.job.read_text(encoding="utf-8"))
    with contextlib.suppress(OSError, ValueError, AttributeError):
        last = run.metrics.read_bytes().rstrip().rpartition(b"\n")[2]
        row = json.loads(last)
        for name in (monitor[1] if monitor else "", "val_loss", "train_loss"):
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
