"""MLflow's copy of a run, made by a process of its own.

So a slow or dead server never holds up training, and a run whose processes were all killed is still closed in MLflow.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from dtrain.errors import UserError
from dtrain.files import read_json, write_json
from dtrain.monitoring.mlflow_tracker import tracker
from dtrain.monitoring.tracking_uri import resolve_tracking_uri, sqlite_file
from dtrain.redact import hide_in_job, hide_password
from dtrain.run.folder import Row, RowReader, RunDir
from dtrain.run.sweep import Sweep
from dtrain.schema.packages import require
from dtrain.yaml12 import Reader, dump

from .follow import Status, final_state, follow, ignore_what_a_cluster_sends, locked, wait_for_first_step

MLFLOW_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED", "killed": "KILLED"}

# MLflow's limits (mlflow/utils/validation.py); beyond them it refuses the whole batch.
MAX_KEY, MAX_PARAM_VALUE, MAX_BATCH = 250, 6000, 100

# For what the user has not set.
MLFLOW_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # follow() retries by itself; MLflow's own 7 retries take minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

# Makes MLflow show its pages for training, not those for language models.
TRAINING = {"mlflow.experimentKind": "custom_model_development"}


def main() -> int:
    """Follow the run folder named on the command line to the run's end."""
    ignore_what_a_cluster_sends()
    for name, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    run = RunDir(sys.argv[1])
    try:
        require("dtrain: recording a run in MLflow", "mlflow")
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    # The tracker of an earlier attempt may still be trying: two would send the same rows.
    with locked(tracker.lock(run)):
        try:
            return follow_run(run, run.status)
        except UserError as error:
            print(f"dtrain: MLflow at {error}", file=sys.stderr)
            return 1


def follow_run(run: RunDir, status: Status, **limits: float) -> int:
    """`follow` into the store that the job or the environment names; returns 0 if it has all of the run."""
    wait_for_first_step(status)
    uri = _tracking_uri(run)
    return follow(run, status, tracker, f"MLflow at {uri}", lambda: MlflowRun(run, uri), **limits)


def _tracking_uri(run: RunDir) -> str:
    asked = (_read_job(run).get("mlflow") or {}).get("tracking_uri")
    return resolve_tracking_uri(asked, (read_json(tracker.note(run)) or {}).get("tracking_uri"))


def _read_job(run: RunDir) -> dict[str, Any]:
    return cast("dict[str, Any]", Reader(str(run.job)).read(run.job.read_text(encoding="utf-8")))


class MlflowRun:
    """The copy of a run in MLflow: the MLflow run that mlflow.json names, continued, or else a new one.

    The runs of a sweep share a parent, which stays open as long as one of them runs. A script's run is the parent of
    its later fits, which are copied along with it.

    Args:
        script: the copy of the script's run, if this is one of its fits.
    """

    def __init__(self, run: RunDir, uri: str, script: MlflowRun | None = None) -> None:
        gc.disable()  # imports make no garbage, and looking for it would take a quarter of the time
        from mlflow import MlflowClient

        gc.enable()

        self._folder = run
        self._job = hide_in_job(_read_job(run))
        self._job_sent = False
        self._rows = RowReader(run)
        self._uri = uri
        self._sweep = Sweep.of(run)
        self._script = script
        self._parent_id: str | None = None if script is None else script._run_id
        self._fits: dict[Path, MlflowRun] = {}
        self._closed: str | None = None  # the final state that it was closed with
        with _creating(uri):
            self._client = MlflowClient(uri)
            if self._sweep is not None:
                with locked(tracker.lock(RunDir(self._sweep.folder))):
                    self._parent_id = self._open(RunDir(self._sweep.folder)).info.run_id
            found = self._open(run)
        self._run_id: str = found.info.run_id
        self._experiment_id: str = found.info.experiment_id
        self._describe(found.data.params)
        history = self._client.get_metric_history(self._run_id, "epoch")
        self._last = max(((metric.step, metric.value) for metric in history), default=(-1, 0.0))

    def update(self, final: str | None) -> None:
        """Send what MLflow lacks; `final` is the state to close the MLflow run with."""
        self._send_new_rows()
        if final == "finished":
            self._send_test_values()
        try:
            self._send_files(ended=final is not None)
            for fit in self._folder.fits():
                self._update_fit(fit)
        finally:  # a broken artifact store is no reason to leave the run open
            if final:
                self._client.set_terminated(self._run_id, MLFLOW_STATUS[final])
                self._end_parent()
        self._closed = final

    def _update_fit(self, fit: RunDir) -> None:
        final, mirror = final_state(fit.status()), self._fits.get(fit.path)
        if mirror is None or (mirror._closed and mirror._closed != final):  # new, or continued after a failure
            mirror = self._fits[fit.path] = MlflowRun(fit, self._uri, self)
        if mirror._closed is None:
            mirror.update(final)

    def _end_parent(self) -> None:
        if self._sweep is None or self._parent_id is None:
            return
        with locked(tracker.lock(RunDir(self._sweep.folder))):
            states = {run.status().get("state") for run in self._sweep.runs}
            if "running" not in states:
                worst = next((state for state in ("failed", "killed", "stopped") if state in states), "killed")
                self._client.set_terminated(
                    self._parent_id, MLFLOW_STATUS["finished" if states == {"finished"} else worst]
                )

    def _open(self, folder: RunDir) -> Any:
        """The MLflow run of a run folder or a sweep's folder, noted in the folder's mlflow.json."""
        found = self._continue(folder) or self._create(folder)
        info = found.info
        names = {"run_id": info.run_id, "tracking_uri": self._uri, "experiment_id": info.experiment_id}
        write_json(tracker.note(folder), {name: hide_password(value) for name, value in names.items()})
        return found

    def _continue(self, folder: RunDir) -> Any:
        """The MLflow run that mlflow.json names, marked as running again; None if this store has none that can be."""
        from mlflow.exceptions import MlflowException

        run_id = (read_json(tracker.note(folder)) or {}).get("run_id")
        if run_id is None:
            return None
        try:
            found = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # it is another store now
                return None
            raise
        if found.info.lifecycle_stage != "active":  # the user deleted it
            return None
        self._client.update_run(run_id, "RUNNING")
        return found

    def _create(self, folder: RunDir) -> Any:
        settings = self._job.get("mlflow") or {}
        experiment_id = self._find_experiment() if self._script is None else self._script._experiment_id
        name = settings.get("run_name") or folder.path.absolute().name
        if self._sweep is not None and folder is self._folder:
            name = self._sweep.point(folder)
        began = int(self._folder.job.stat().st_mtime * 1000)  # the launch, not this process's start
        return self._client.create_run(experiment_id, start_time=began, run_name=name)

    def _find_experiment(self) -> str:
        name = (self._job.get("mlflow") or {}).get("experiment") or self._job["name"]
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name, tags=TRAINING))

    def _describe(self, known: dict[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        # MLflow's parameters can't be changed: after a resume the first values remain, also that of the epochs.
        params = [Param(key, value) for key, value in flatten(self._job).items() if key not in known]
        for start in range(0, len(params), MAX_BATCH):
            self._client.log_batch(self._run_id, params=params[start : start + MAX_BATCH], synchronous=True)
        tags = [RunTag(key, value) for key, value in _tags(self._folder).items()]
        if self._parent_id is not None:
            tags.append(RunTag("mlflow.parentRunId", self._parent_id))
        self._client.log_batch(self._run_id, tags=tags, synchronous=True)

    def _send_new_rows(self) -> None:
        for row in self._rows.new():
            if (row["step"], row["epoch"]) > self._last:
                self._send(row)

    def _send(self, row: Row) -> None:
        step, made_at = row["step"], _milliseconds(row)
        self._log({name: value for name, value in row.items() if name != "step"}, made_at, step)
        self._last = step, row["epoch"]

    def _send_test_values(self) -> None:
        """Send the results on the test set, as of the last step, unless they are there."""
        values, step = self._folder.test_values(), self._last[0]
        for name in values:
            if any(each.step == step for each in self._client.get_metric_history(self._run_id, _key(name))):
                return
        self._log(values, int(time.time() * 1000), step)

    def _log(self, values: Mapping[str, Any], made_at: int, step: int) -> None:
        from mlflow.entities import Metric

        scalars = {_key(name): value for name, value in values.items() if is_scalar(value)}
        metrics = [Metric(name, value, made_at, step) for name, value in scalars.items()]
        self._client.log_batch(self._run_id, metrics=metrics, synchronous=True)

    def _send_files(self, *, ended: bool) -> None:
        if not self._job_sent:
            self._client.log_text(self._run_id, dump(self._job), "job.yaml")
            self._job_sent = True
        if ended and self._folder.best_weights.exists():
            self._client.log_artifact(self._run_id, str(self._folder.best_weights), "weights")
        for folder in (self._folder.plots, self._folder.pictures):
            if ended and folder.exists():
                self._client.log_artifacts(self._run_id, str(folder), folder.name)


def _milliseconds(row: Row) -> int:
    """When the row was made, as MLflow has it; a script may have written one that doesn't say."""
    made_at = datetime.fromisoformat(row["time"]).timestamp() if "time" in row else time.time()
    return int(made_at * 1000)


def is_scalar(value: object) -> bool:
    """Whether MLflow can plot the value: a finite number. Matrices and NaN are in metrics.jsonl alone."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings and lists as MLflow parameters: dotted keys, list items by index, values as in JSON."""
    if value and isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: text for name, item in items for key, text in flatten(item, f"{prefix}{name}.").items()}
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return {_key(prefix[:-1]): text[:MAX_PARAM_VALUE]}


def _key(name: str) -> str:
    return re.sub(r"[^\w.\- :]", "_", name)[:MAX_KEY]


def _tags(run: RunDir) -> dict[str, str]:
    env = read_json(run.env) or {}
    tags = {"dtrain.run_dir": str(run.path.absolute())}
    if env.get("command"):
        tags["mlflow.source.name"] = shlex.join(env["command"])
    if git := env.get("git"):
        tags["mlflow.source.git.commit"] = str(git.get("commit"))
        tags["dtrain.git_dirty"] = str(bool(git.get("dirty"))).lower()
    return tags


def _creating(uri: str) -> contextlib.AbstractContextManager[None]:
    """To be held while a store may be created: of three processes that created one SQLite file at once, two failed."""
    file = sqlite_file(uri)
    if file is None:
        return contextlib.nullcontext()
    file.parent.mkdir(parents=True, exist_ok=True)
    return locked(file.with_name(f"{file.name}.lock"))
