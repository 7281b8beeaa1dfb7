"""Where a run came from: env.json, and the copy of the job's own folder."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dtrain.run import RunDir

PACKAGES = ("dtrain", "torch", "torchvision", "torchmetrics", "mlflow", "numpy", "deepspeed")
MAX_DIFF = 1_000_000  # characters
MAX_FILE = 1 << 20  # bytes
MAX_TOTAL = 20 << 20
MAX_FILES = 2_000
SKIPPED = {"__pycache__", "runs", "mlruns", "mlartifacts", "node_modules", "venv", "build", "dist"}
SKIPPED |= {"mlflow.db", "mlflow.db.lock"}


def environment(folder: Path) -> dict[str, Any]:
    """Versions, host, GPUs, command, and the git commit and diff of the folder (None outside a repository)."""
    return {
        "command": sys.argv,
        "working_directory": os.getcwd(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "cpus": len(os.sched_getaffinity(0)),
        "gpus": _gpus(),
        "git": _git(folder),
    }


def snapshot(folder: Path, copy: Path) -> list[str]:
    """Copy a job's folder: its Python files and small data. Returns what was left out, by relative path.

    Left out are hidden files, what tools make (SKIPPED), run folders, files above 1 MiB, and what goes beyond 2,000
    files or 20 MiB in all. Python files come first, so that they are not what is left out.
    """
    copy.mkdir(parents=True, exist_ok=True)
    left_out: list[str] = []
    total = count = 0
    for path in sorted(_files(folder), key=lambda path: (path.suffix != ".py", path)):
        size = path.stat().st_size
        relative = path.relative_to(folder)
        if size > MAX_FILE or total + size > MAX_TOTAL or count == MAX_FILES:
            left_out.append(str(relative))
            continue
        (copy / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy / relative)
        total += size
        count += 1
    return left_out


def _files(folder: Path) -> Iterator[Path]:
    seen = 0
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if _is_wanted(name) and not _is_run(Path(parent, name)))
        for name in sorted(names):
            path = Path(parent, name)
            if _is_wanted(name) and path.is_file():
                yield path
                seen += 1
        if seen > 10 * MAX_FILES:  # a folder of data: what lies deeper is not the job's code
            return


def _is_wanted(name: str) -> bool:
    return not name.startswith(".") and name not in SKIPPED


def _is_run(folder: Path) -> bool:
    run = RunDir(folder)  # --run-dir may be anywhere, beside the job file too
    return run.lock_file.exists() and run.checkpoints.exists()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return (_output(query) or "").splitlines()


def _git(folder: Path) -> dict[str, Any] | None:
    commit = _output(["git", "-C", str(folder), "rev-parse", "HEAD"])
    if commit is None:
        return None
    diff = _output(["git", "-C", str(folder), "diff", "HEAD"]) or ""
    return {"commit": commit.strip(), "dirty": bool(diff), "diff": diff[:MAX_DIFF]}


def _output(command: list[str]) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout
