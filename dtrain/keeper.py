"""The keeper of a run: keeps status.json true, shows progress, and has it mirrored into MLflow.

It sees only what the ranks leave in the run folder, so it works the same in the agent of `dtrain launch` and
inside a script that runs by itself. The ranks never wait for it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from dtrain.files import read_json, write_json
from dtrain.heartbeat import Beat, Heartbeat
from dtrain.run import END_OF_OUTPUT, RunDir
from dtrain.screen import Screen

State = Literal["running", "finished", "failed", "stopped", "killed"]

LOOK_EVERY_S = 0.1
WRITE_EVERY_S = 1.0
TRACKER_GRACE_S = 60.0  # MLflow gets this long after the end of the run


class Keeper:
    """Keeps a run from its start to its end. A context manager; `finish` says how it ended.

    The run must be locked by the caller, and have its ranks' heartbeats.

    Args:
        echo: where lines that rank 0 prints into its log are shown; None where it has no log of its own.
        quiet: neither to a screen nor to MLflow.
    """

    def __init__(self, run: RunDir, echo: IO[str] | None = None, *, quiet: bool = False) -> None:
        self.run = run
        self.screen = Screen(quiet)
        self._quiet = quiet
        self._heartbeat = Heartbeat(run.heartbeat(0))
        previous = read_json(run.status_file)
        self._status: dict[str, Any] = {
            "state": "running",
            "exit_code": None,
            "epoch": 0,
            "step": 0,
            "mlflow_run_id": None,
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
            "restarts": 0 if previous is None else previous.get("restarts", 0) + 1,
            "error": None,
        }
        if previous is not None:
            self._status |= {key: previous.get(key) for key in ("epoch", "step")}
        self._echoed = Follower(run.rank_log(0)) if echo is not None else None
        self._echo = echo
        self._rows_changed = 0
        # Epochs done again after a stop are not shown again.
        self._shown_epoch = max((row["epoch"] for row in run.rows()), default=0)
        self._tracker: subprocess.Popen[bytes] | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="dtrain-keeper", daemon=True)

    def __enter__(self) -> Keeper:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._status["state"] == "running":
            interrupted = isinstance(error, KeyboardInterrupt)
            self.finish("killed" if interrupted else "failed", 130 if interrupted else 1)

    @property
    def has_begun(self) -> bool:
        """Whether rank 0 has a loop of ours running, which listens to a request to stop."""
        return self._heartbeat.read().epochs > 0

    def finish(self, state: State, exit_code: int, error: dict[str, Any] | None = None) -> None:
        """The ranks have ended: show and write what is left, and wait for MLflow to have it."""
        self._over.set()
        self._thread.join()
        self._look()
        self.screen.close()
        self._status |= {"state": state, "exit_code": exit_code, "error": error}
        self._write()
        if self._tracker is None and self.run.job.exists():
            self._start_tracker()
        if self._tracker is not None:
            self._await_tracker(self._tracker)
            self._write()

    # -- while it runs ---------------------------------------------------------------------------

    def _watch(self) -> None:
        last_write = time.monotonic()
        while not self._over.wait(LOOK_EVERY_S):
            with contextlib.suppress(OSError):  # a hiccup of the file system must not blind the rest of the run
                beat = self._look()
                if beat.step > 0 and self._tracker is None:
                    self._start_tracker()
            if time.monotonic() - last_write >= WRITE_EVERY_S:
                last_write = time.monotonic()
                self._write()

    def _look(self) -> Beat:
        """Take in and show what is new."""
        if self._echoed is not None and self._echo is not None:
            for line in self._echoed.new_lines():
                if line == END_OF_OUTPUT:  # a victim's traceback would hide the cause
                    self._echoed = None
                    break
                self.screen.print(line, self._echo)
        self._show_new_rows()
        beat = self._heartbeat.read()
        if beat.epochs:
            self._status |= {"epoch": beat.epoch, "step": beat.step}
            self.screen.show_beat(beat)
        return beat

    def _show_new_rows(self) -> None:
        changed = self.run.metrics.stat().st_mtime_ns if self.run.metrics.exists() else 0
        if changed == self._rows_changed:
            return
        self._rows_changed = changed
        rows = self.run.rows()
        for row in rows:
            if row["epoch"] > self._shown_epoch:
                self._shown_epoch = row["epoch"]
                self.screen.show_row(row)

    def _write(self) -> None:
        mirrored = read_json(self.run.mlflow) or {}
        self._status["mlflow_run_id"] = mirrored.get("run_id")
        # A full disk must not end the training.
        with contextlib.suppress(OSError):
            write_json(self.run.status_file, self._status, durable=self._status["state"] != "running")

    # -- MLflow ----------------------------------------------------------------------------------

    def _start_tracker(self) -> None:
        if self._quiet:
            return
        # A process of its own, in a session of its own: it outlives a killed run for the moment that it takes to
        # close the run in MLflow as KILLED. Started after the first step, since importing mlflow takes seconds.
        with (self.run.logs / "mlflow.log").open("ab") as log:
            self._tracker = subprocess.Popen(
                [sys.executable, "-m", "dtrain.trainer.tracking", str(self.run)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONSAFEPATH": "1"},  # the user's folder may have an mlflow.py
                start_new_session=True,
            )

    def _await_tracker(self, tracker: subprocess.Popen[bytes]) -> None:
        log = self.run.logs / "mlflow.log"
        try:
            code = tracker.wait(TRACKER_GRACE_S)
        except subprocess.TimeoutExpired:
            self.screen.print(f"MLflow has not taken all of the run yet; process {tracker.pid} goes on trying")
            return
        if code != 0:
            lines = log.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
            self.screen.print(f"MLflow does not have all of this run: {lines[-1]}")


class Follower:
    """New lines of a growing file, which may not be there yet. What is there at first is not new."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = path.stat().st_size if path.exists() else 0

    def new_lines(self) -> list[str]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                text = file.read()
        except OSError:
            return []
        whole = text.rfind(b"\n") + 1  # the rest of a line may still be on its way
        self._position += whole
        return text[:whole].decode(errors="replace").splitlines()
