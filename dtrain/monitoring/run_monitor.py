"""The monitor of a run: keeps status.json up to date, shows progress, and starts the trackers that mirror it.

It sees only what the ranks leave in the run folder, so it works the same in the agent of `dtrain launch` and
inside a script that runs by itself. The ranks never wait for it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Literal, TextIO

from dtrain.files import refusal, write_json
from dtrain.monitoring.rank_output import RankOutput
from dtrain.monitoring.screen import Screen
from dtrain.monitoring.tracker import trackers
from dtrain.monitoring.tracker_processes import TrackerProcesses
from dtrain.run.folder import EXIT_INTERRUPTED, Row, RowReader, RunDir
from dtrain.run.heartbeat import Beat, Heartbeat

RunState = Literal["running", "finished", "failed", "stopped", "killed"]

LOOK_EVERY_S = 0.1
WRITE_EVERY_S = 1.0
SHOW_ROWS_EVERY_S = 0.5  # it reads several files, possibly on a slow file system


class Keeper:
    """Monitors a run from its start to its end. A context manager; call `finish` with how it ended.

    The caller must hold the run's lock and create its heartbeats. A thread keeps the status and another one
    the screen: a blocked terminal must not make the status stale.

    Args:
        echo: where lines from the ranks' logs are shown; None if they have no logs.
        show_ranks: whose lines.
        quiet: use neither screen nor trackers.
        wait_mlflow: whether the end waits until MLflow has all of the run, however long that takes.
    """

    def __init__(
        self,
        run: RunDir,
        echo: TextIO | None = None,
        show_ranks: Iterable[int] = (0,),
        *,
        quiet: bool = False,
        wait_mlflow: bool = False,
    ) -> None:
        self.run = run
        self.screen = Screen(quiet)
        self._heartbeat = Heartbeat(run.heartbeat(0))
        self._began = time.time()
        previous = run.status()
        self._status: dict[str, Any] = {
            "state": "running",
            "exit_code": None,
            "fit": 1,
            "epoch": 0,
            "step": 0,
            **{tracker.id_key: None for tracker in trackers()},
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
            "restarts": previous.get("restarts", 0) + 1 if previous else 0,
            "error": None,
        }
        self._status |= {key: previous[key] for key in ("fit", "epoch", "step") if key in previous}
        self._outputs = [RankOutput(rank, run.rank_log(rank)) for rank in show_ranks] if echo is not None else []
        self._echo = echo
        self._trouble: str | None = None  # not yet shown
        self._was_in_trouble = False
        self._rows_shown = 0.0
        self._histories = {each.path: _History(each, shown=True) for each in (run, *run.fits())}
        self._trackers = None if quiet else TrackerProcesses(run, self.screen.print, wait=wait_mlflow)
        self._over = threading.Event()
        self._watching = threading.Thread(target=self._watch, name="dtrain-keeper", daemon=True)
        self._showing = threading.Thread(target=self._show, name="dtrain-screen", daemon=True)

    def __enter__(self) -> Keeper:
        self._write()
        self._watching.start()
        self._showing.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._status["state"] == "running":
            interrupted = isinstance(error, KeyboardInterrupt)
            self.finish("killed" if interrupted else "failed", EXIT_INTERRUPTED if interrupted else 1)

    def restarted(self) -> None:
        """The ranks have failed and are being restarted."""
        self._status["restarts"] += 1
        # The current end of their logs belongs to the ranks that failed.
        self._outputs = [RankOutput(output.rank, self.run.rank_log(output.rank)) for output in self._outputs]

    def finish(self, state: RunState, exit_code: int, error: dict[str, Any] | None = None) -> None:
        """The ranks have ended: write and show the rest, and leave the upload to the trackers."""
        self._over.set()
        self._watching.join()
        self._take_beat()
        end = {"state": state, "exit_code": exit_code, "error": error}
        self._status |= end
        if state == "finished" and (values := self.run.test_values()):
            self._status["test"] = values
        self._end_fit(end)
        self._write()
        self._showing.join()
        self._show_trouble()
        self.screen.close()
        if self._trackers is not None:
            if self.run.job.exists():
                self._trackers.start()
            self._trackers.leave(
                in_cluster_job=self._status["slurm_job_id"] is not None, was_stopped=state == "stopped"
            )
            self._write()

    def _end_fit(self, end: dict[str, Any]) -> None:
        """Say of the fit that has ended with the run why: rank 0, its keeper, was killed or another rank's victim."""
        with contextlib.suppress(OSError):
            fits = [fit for fit in self.run.fits() if fit.status_file.stat().st_mtime >= self._began]
            for fit in fits[-1:]:
                status = fit.status()
                if {end["state"], status.get("state")} <= {"failed", "killed"}:
                    write_json(fit.status_file, {**status, **end})

    # -- while it runs ---------------------------------------------------------------------------

    def _watch(self) -> None:
        last_write = time.monotonic()
        while not self._over.wait(LOOK_EVERY_S):
            with contextlib.suppress(
                OSError
            ):  # a brief file system error must not stop the monitor for the rest of the run
                if self._take_beat().step > 0 and self._trackers is not None:
                    self._trackers.start()
            if time.monotonic() - last_write >= WRITE_EVERY_S:
                last_write = time.monotonic()
                self._write()

    def _take_beat(self) -> Beat:
        beat = self._heartbeat.read()
        if beat.epochs:
            self._status |= {"fit": beat.fit, "epoch": beat.epoch, "step": beat.step}
        return beat

    def _write(self) -> None:
        self._status |= {tracker.id_key: tracker.run_id(self.run) for tracker in trackers()}
        try:
            write_json(self.run.status_file, self._status, durable=self._status["state"] != "running")
        except OSError as error:  # a full disk must not end the training, and leaves no room in logs to say so
            if not self._was_in_trouble:
                self._trouble = f"{self.run}: can't write status.json: {refusal(error)}; the run goes on"
            self._was_in_trouble = True

    # -- on the screen ---------------------------------------------------------------------------

    def _show(self) -> None:
        more = False
        while not self._over.wait(0 if more else LOOK_EVERY_S):
            more = self._show_new()
        while self._show_new():  # to the last byte: it may explain why a rank died
            pass
        for output in self._outputs:
            self._show_lines(output.rank, output.unfinished())

    def _show_new(self) -> bool:
        """Show what is new; whether more may follow at once."""
        more = False
        self._show_trouble()
        with contextlib.suppress(OSError):
            for output in self._outputs:
                lines = output.new_lines()
                self._show_lines(output.rank, lines or [])
                more |= lines is not None
            if time.monotonic() - self._rows_shown > SHOW_ROWS_EVERY_S or self._over.is_set():
                self._rows_shown = time.monotonic()
                self._show_new_rows()
            beat = self._heartbeat.read()
            if beat.epochs:
                self.screen.show_beat(beat)
        return more

    def _show_trouble(self) -> None:
        if self._trouble is not None:
            self.screen.print(self._trouble)
            self._trouble = None

    def _show_lines(self, rank: int, lines: list[bytes]) -> None:
        if lines and self._echo is not None:
            self.screen.show_output(rank, lines, self._echo)

    def _show_new_rows(self) -> None:
        for fit in (self.run, *self.run.fits()):
            history = self._histories.get(fit.path)
            if history is None:
                history = self._histories[fit.path] = _History(fit)
                self.screen.print(f"run {fit}")
            for row in history.new():
                self.screen.show_row(row)


class _History:
    """A run's rows, each to be shown once: those repeated after a stop are not shown again."""

    def __init__(self, run: RunDir, *, shown: bool = False) -> None:
        self._reader = RowReader(run)
        self._last = (0, 0.0)
        if shown:
            list(self.new())

    def new(self) -> Iterator[Row]:
        """The rows that have not been shown yet."""
        for row in self._reader.new():
            if (at := (row["step"], row["epoch"])) > self._last:
                self._last = at
                yield row
