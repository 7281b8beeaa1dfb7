"""The tracker interface: a tracker is a process that mirrors a run elsewhere, such as in MLflow."""

from __future__ import annotations

import fcntl
import os
import sys
from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from dtrain.files import read_json, write_json
from dtrain.run.folder import RunDir

# Name: module, whose `tracker` is the Tracker.
TABLE = {"mlflow": "dtrain.monitoring.mlflow_tracker"}


class Tracker(ABC):
    """One of what may follow a run. It may outlive the command that started it; the run folder tells how far it is.

    Attributes:
        name: of its section in job.yaml, and of its files in the run folder.
        title: its name in messages.
        module: what follows a run folder, run as `python -m MODULE RUN`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    module: ClassVar[str]

    @abstractmethod
    def is_off(self) -> bool:
        """Whether it is turned off here."""

    @abstractmethod
    def lacking(self) -> str:
        """What it needs and lacks, and how to turn it off, in words; empty if nothing is missing."""

    @property
    def id_key(self) -> str:
        """Where status.json tells which of its runs this run is."""
        return f"{self.name}_run_id"

    def command(self, run: RunDir) -> list[str]:
        """What starts it."""
        return [sys.executable, "-m", self.module, str(run)]

    def log(self, run: RunDir) -> Path:
        """Where it reports."""
        return run.logs / f"{self.name}.log"

    def lock(self, run: RunDir) -> Path:
        """Held by the tracker at work; two would send the same rows."""
        return run.path / f"{self.name}.lock"

    def note(self, run: RunDir) -> Path:
        """What it knows of the copy: at least its `run_id`."""
        return run.path / f"{self.name}.json"

    def run_id(self, run: RunDir) -> str | None:
        """Which of its runs this run is; None before it has one."""
        found = (read_json(self.note(run)) or {}).get("run_id")
        return found if isinstance(found, str) else None

    def note_complete(self, run: RunDir, status: dict[str, Any]) -> None:
        """Its copy has all of the run with that status, which is final. It notes so, until the run goes on."""
        # A short run is over before there is an id for it. Who keeps a running one writes it himself.
        written = read_json(run.status_file) or {"state": "running"}
        if written.get("state") != "running" and written.get(self.id_key) != self.run_id(run):
            write_json(run.status_file, {**written, self.id_key: self.run_id(run)})
        known = read_json(self.note(run)) or {}
        write_json(self.note(run), {**known, "complete_after_restarts": status.get("restarts", 0)})

    def outstanding(self, run: RunDir) -> str:
        """What its copy of a finished run lacks, in words; empty if it is complete or turned off."""
        complete_after = (read_json(self.note(run)) or {}).get("complete_after_restarts")
        is_complete = complete_after == (read_json(run.status_file) or {}).get("restarts", 0)
        if is_complete or not self.log(run).exists():
            return ""
        if _is_locked(self.lock(run)):
            return f"upload unfinished; log: {self.log(run)}"
        return f"incomplete; to finish the upload: python -m {self.module} {run}"


def trackers() -> list[Tracker]:
    """All known trackers."""
    found = [import_module(module).tracker for module in TABLE.values()]
    assert all(isinstance(each, Tracker) for each in found)
    return found


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks here
        return False
    finally:
        os.close(descriptor)
    return False
