"""Where a run came from: what env.json holds."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dtrain.redact import hide_in_command, hide_in_diff, pathspecs_without_secrets

PACKAGES = ("dtrain", "torch", "torchvision", "torchmetrics", "mlflow", "numpy", "deepspeed")
MAX_DIFF = 1_000_000  # characters


def environment(folder: Path) -> dict[str, Any]:
    """Versions, host, GPUs, command, the git commit, and the folder's diff (None outside a repository)."""
    return {
        "command": hide_in_command(sys.argv),
        "working_directory": os.getcwd(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "cpus": len(os.sched_getaffinity(0)),
        "gpus": _gpus(),
        "git": _git(folder),
    }


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
    git = ["git", "-C", str(folder)]
    commit = _output([*git, "rev-parse", "HEAD"])
    if commit is None:
        return None
    changed = _output([*git, "diff", "HEAD", "--name-only"])
    diff = _output([*git, "diff", "HEAD", "--", ".", *pathspecs_without_secrets()]) or ""
    return {"commit": commit.strip(), "dirty": bool(changed), "diff": hide_in_diff(diff)[:MAX_DIFF]}


def _output(command: list[str]) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout
