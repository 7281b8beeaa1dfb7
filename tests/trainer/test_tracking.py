"""The tracker against real MLflow stores, and `dtrain ui` on one of them."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from dtrain.errors import UserError
from dtrain.files import read_json, write_json
from dtrain.launcher.commands.ui import ui
from dtrain.monitoring.mlflow_tracker import tracker
from dtrain.monitoring.run_monitor import Keeper
from dtrain.monitoring.tracker_processes import GRACE_S, STOPPED_GRACE_S
from dtrain.monitoring.tracking_uri import resolve_tracking_uri
from dtrain.redact import hide_password
from dtrain.run.folder import RunDir
from dtrain.run.heartbeat import Heartbeat
from dtrain.trainer.tracking.mlflow import flatten, follow_run

TRACKER = [sys.executable, "-m", "dtrain.trainer.tracking"]
RUNNING, FINISHED = {"state": "running", "epoch": 1, "step": 1}, {"state": "finished", "epoch": 3, "step": 9}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The working directory of all tests here: MLflow puts the artifacts of a local store into it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("work"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        patch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # a server in 6 s instead of 28
        yield Path.cwd()


@pytest.fixture(scope="module")
def store(folder):
    """One SQLite store for most tests: making one takes seconds."""
    return f"sqlite:///{folder}/shared.db"


@pytest.fixture
def run(store, tmp_path):
    return make_run(tmp_path / "digits-1", store)


def make_run(path, uri, **fields):
    run = RunDir(path)
    run.create()
    job = {"name": "digits", "fit": {"epochs": 2}, "mlflow": {"tracking_uri": uri}, **fields}
    run.job.write_text(yaml.safe_dump(job))
    return run


def rows(*epochs, **values):
    return [{"epoch": epoch, "step": 3 * epoch, "train_loss": 1 / epoch, **values} for epoch in epochs]


def client_and_run(run):
    from mlflow import MlflowClient

    names = read_json(run.path / "mlflow.json")
    client = MlflowClient(names["tracking_uri"])
    return client, client.get_run(names["run_id"])


def history(run, key):
    client, found = client_and_run(run)
    return [(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, key)]


def artifacts(run, folder=None):
    client, found = client_and_run(run)
    return {file.path for file in client.list_artifacts(found.info.run_id, folder)}


def scripted(*events):
    """A status function that answers with one event after the other; a function among them acts first."""
    remaining = iter(events)

    def status():
        event = next(remaining)
        while callable(event):
            event()
            event = next(remaining)
        return event

    return status


def test_a_run_is_copied_while_it_goes_on(run):
    run.best_weights.write_bytes(b"weights")
    write_json(run.env, {"git": {"commit": "abc", "dirty": True}})
    seen = []
    status = scripted(
        {"state": "running", "step": 0},
        lambda: seen.append((run.path / "mlflow.json").exists()),
        RUNNING,
        lambda: run.write_rows(rows(1)),
        RUNNING,
        lambda: seen.append((client_and_run(run)[1].info.status, artifacts(run), history(run, "epoch"))),
        lambda: run.write_rows(rows(1, 2)),
        RUNNING,
        FINISHED,
    )
    assert follow_run(run, status) == 0
    assert seen == [False, ("RUNNING", {"job.yaml"}, [(3, 1.0)])]
    found = client_and_run(run)[1]
    assert (found.info.status, found.info.run_name) == ("FINISHED", "digits-1")
    assert found.data.params["fit.epochs"] == "2"
    tags = {"mlflow.source.git.commit": "abc", "dtrain.git_dirty": "true", "dtrain.run_dir": str(run.path)}
    assert tags.items() <= found.data.tags.items()
    assert history(run, "train_loss") == [(3, 1.0), (6, 0.5)]
    assert artifacts(run) == {"job.yaml", "weights"}
    assert artifacts(run, "weights") == {"weights/best.pt"}


def test_a_resumed_run_continues_without_a_step_twice(run, store):
    run.write_rows(rows(1, 2))
    follow_run(run, lambda: {"state": "stopped"})
    before = client_and_run(run)[1]
    make_run(run.path, store, fit={"epochs": 3, "strategy": "ddp"})
    states = []
    status = scripted(
        RUNNING,
        lambda: run.write_rows(rows(1)),  # cut back to the checkpoint
        RUNNING,
        lambda: run.write_rows(rows(1, 2, 3)),
        RUNNING,
        lambda: states.append(client_and_run(run)[1].info.status),
        FINISHED,
    )
    assert follow_run(run, status) == 0
    after = client_and_run(run)[1]
    assert [before.info.status, *states, after.info.status] == ["KILLED", "RUNNING", "FINISHED"]
    assert after.info.run_id == before.info.run_id
    assert history(run, "epoch") == [(3, 1.0), (6, 2.0), (9, 3.0)]
    params = {"fit.epochs": "2", "fit.strategy": "ddp"}  # what is there can't change in MLflow
    assert params.items() <= after.data.params.items()


def test_a_scripts_later_fits_are_children_of_its_run(run, store):
    fit = make_run(run.path / "fit-2", store, name="another", mlflow={})
    run.add_fit(fit)
    write_json(fit.status_file, {"state": "stopped", "epoch": 1, "step": 3})
    fit.write_rows(rows(1))
    states = []

    def look():
        states.append([client_and_run(each)[1].info.status for each in (run, fit)])

    def go_on():
        write_json(fit.status_file, RUNNING)
        fit.write_rows(rows(1, 2))

    with fit.lock():
        status = scripted(
            RUNNING, RUNNING, look, go_on, RUNNING, look, lambda: write_json(fit.status_file, FINISHED), FINISHED
        )
        assert follow_run(run, status) == 0
    look()
    assert states == [["RUNNING", "KILLED"], ["RUNNING", "RUNNING"], ["FINISHED", "FINISHED"]]
    (_, parent), (_, child) = client_and_run(run), client_and_run(fit)
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (child.info.run_name, child.info.experiment_id) == ("fit-2", parent.info.experiment_id)
    assert history(fit, "epoch") == [(3, 1.0), (6, 2.0)]


@pytest.mark.parametrize(
    ("status", "expected"),
    [({"state": "failed"}, "FAILED"), ({"state": "killed", "step": 4}, "KILLED"), ({}, "KILLED")],
)
def test_the_end_of_the_run_is_that_of_the_mlflow_run(run, status, expected):
    assert follow_run(run, lambda: status) == 0
    assert client_and_run(run)[1].info.status == expected


def test_results_on_the_test_set_are_those_of_the_last_step(run):
    run.write_rows(rows(1, 2))
    write_json(run.test, {"test_loss": 0.25, "test_confusion": [[1, 0], [0, 1]]})
    for _ in range(2):
        follow_run(run, scripted(RUNNING, RUNNING, FINISHED))
    assert history(run, "test_loss") == [(6, 0.25)]
    assert "test_confusion" not in client_and_run(run)[1].data.metrics


def test_matrices_and_nan_are_left_out(run):
    run.write_rows(rows(1, val_matrix=[[1, 2], [3, 4]], val_auc=float("nan"), val_loss=float("inf"), val_acc=1))
    assert follow_run(run, lambda: FINISHED) == 0
    assert client_and_run(run)[1].data.metrics == {"epoch": 1, "train_loss": 1, "val_acc": 1}


def test_more_and_longer_parameters_than_mlflow_takes(run, store):
    make_run(run.path, store, model={"_target_": "net.Net", "widths": list(range(250)), "k" * 300: "v" * 7000})
    assert follow_run(run, lambda: FINISHED) == 0
    params = client_and_run(run)[1].data.params
    assert params["model.widths.249"] == "249"
    assert max(map(len, params.values())) == 6000


def test_a_deleted_mlflow_run_is_made_anew(run):
    run.write_rows(rows(1))
    follow_run(run, lambda: FINISHED)
    client, before = client_and_run(run)
    client.delete_run(before.info.run_id)
    assert follow_run(run, lambda: FINISHED) == 0
    assert client_and_run(run)[1].info.run_id != before.info.run_id
    assert history(run, "epoch") == [(3, 1.0)]


def test_a_broken_artifact_store_costs_the_artifacts_alone(run, capsys):
    follow_run(run, lambda: FINISHED)
    artifact_folder = Path(client_and_run(run)[1].info.artifact_uri)
    shutil.rmtree(artifact_folder)
    artifact_folder.write_text("in the way")
    run.write_rows(rows(1))
    assert follow_run(run, lambda: {"state": "failed"}, retry_s=0, give_up_s=0) == 1
    assert client_and_run(run)[1].info.status == "FAILED"
    assert history(run, "epoch") == [(3, 1.0)]
    assert capsys.readouterr().err.count("\n") == 1


def test_without_a_server_it_says_so_in_one_line_and_gives_up(tmp_path, capsys):
    uri = f"http://user:secret@127.0.0.1:{free_port()}"
    run = make_run(tmp_path / "run", uri)
    tracker.log(run).touch()
    assert follow_run(run, lambda: FINISHED, retry_s=0, give_up_s=0) == 1
    assert tracker.outstanding(run) == f"incomplete; to finish the upload: python -m dtrain.trainer.tracking {run}"
    error = capsys.readouterr().err
    assert re.match(f"dtrain: MLflow at {re.escape(hide_password(uri))}: .*Connection refused", error)
    assert error.endswith(f"gave up; to finish the upload: python -m dtrain.trainer.tracking {run}\n")
    assert "secret" not in error


def test_a_server_that_comes_late_gets_everything(tmp_path, store):
    port = free_port()
    run = make_run(tmp_path / "run", f"http://127.0.0.1:{port}")
    run.best_weights.write_bytes(b"weights")
    run.write_rows(rows(1))
    write_json(run.status_file, RUNNING)
    server = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
    with run.lock(), (run.path / "log").open("w") as log:
        tracker = subprocess.Popen([*TRACKER, str(run)], stderr=log)
        wait_until(lambda: "trying again" in (run.path / "log").read_text())
        with process([*server, "--host", "127.0.0.1", "--port", str(port)]):
            wait_until(lambda: (run.path / "mlflow.json").exists() and history(run, "epoch") == [(3, 1.0)])
            tracker.send_signal(signal.SIGTERM)  # as a cluster does to all processes of a job
            run.write_rows(rows(1, 2))
            write_json(run.status_file, FINISHED)
            assert tracker.wait(120) == 0
            assert client_and_run(run)[1].info.status == "FINISHED"
            assert (len(history(run, "epoch")), artifacts(run, "weights")) == (2, {"weights/best.pt"})
    assert len((run.path / "log").read_text().splitlines()) == 1


@pytest.mark.campaign
def test_trackers_that_make_one_store_at_the_same_time(tmp_path):
    runs = [make_run(tmp_path / name, f"sqlite:///{tmp_path}/new/mlflow.db") for name in ("a", "b")]
    for run in runs:
        write_json(run.status_file, RUNNING)  # without a live writer: killed
    trackers = [subprocess.Popen([*TRACKER, str(run)], stderr=subprocess.PIPE) for run in runs]
    said = [tracker.communicate(timeout=60)[1] for tracker in trackers]
    assert [(tracker.returncode, text) for tracker, text in zip(trackers, said, strict=True)] == [(0, b"")] * 2
    assert [client_and_run(run)[1].info.status for run in runs] == ["KILLED", "KILLED"]


def test_waiting_for_the_first_step_costs_no_heavy_import():
    code = "import sys, dtrain.trainer.tracking.mlflow; print({'mlflow', 'torch'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_flatten():
    job = {"optimizer": {"lr": 1e-5, "betas": [0.9, 0.99]}, "on": True, "none": None, "slurm": {}, "a/b": "c"}
    assert [f"{key}={value}" for key, value in flatten(job).items()] == [
        *["optimizer.lr=1e-05", "optimizer.betas.0=0.9", "optimizer.betas.1=0.99"],
        *["on=true", "none=null", "slurm={}", "a_b=c"],
    ]


def test_which_store_is_meant(folder, monkeypatch):
    assert resolve_tracking_uri(None) == f"sqlite:///{folder}/mlflow.db"
    assert resolve_tracking_uri(None, "http://before") == "http://before"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert resolve_tracking_uri(None, "http://before") == "http://environment"
    assert resolve_tracking_uri("sqlite:///a/b.db?timeout=9") == f"sqlite:///{folder}/a/b.db?timeout=9"


def test_ui_without_a_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no runs recorded in"):
        ui(None, None)


def test_ui_of_a_server(capsys):
    assert ui("https://user:secret@mlflow.example", None) == 0
    assert capsys.readouterr().out == "https://***@mlflow.example\n"


def test_ui_serves_the_store_until_ctrl_c(run, store):
    follow_run(run, lambda: FINISHED)
    code = f"import sys; from dtrain.launcher.commands.ui import ui; sys.exit(ui({store!r}, None))"
    with process([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as shown:
        address = shown.stdout.readline().strip()
        assert get(f"{address}/health") == "OK"
        assert "digits" in get(f"{address}/api/2.0/mlflow/experiments/search?max_results=9")
        shown.send_signal(signal.SIGINT)
        assert shown.wait(60) == 130
    with pytest.raises(OSError, match="refused"):
        get(address)


@contextlib.contextmanager
def process(command, **options):
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, **options) as started:
        try:
            yield started
        finally:
            started.terminate()


def get(address):
    return urllib.request.urlopen(address, timeout=10).read().decode()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_until(condition, timeout_s=300):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("state", "within", "seconds", "says"),
    [
        ("stopped", "4711", STOPPED_GRACE_S, "it continues when the run does"),  # its time may be nearly up
        ("finished", "4711", GRACE_S, "process 7 continues it and reports in"),
        ("stopped", None, 0.0, "process 7 continues it and reports in"),  # it goes on behind the command
        ("finished", "1", GRACE_S, "process 7"),  # the first process of a container ends all others
        ("finished", "--wait-mlflow", None, "process 7"),
    ],
)
def test_how_long_the_end_waits(state, within, seconds, says, tmp_path, monkeypatch, capsys):
    class Slow:
        pid = 7

        def __init__(self, *arguments: object, **options: object) -> None:
            pass

        def wait(self, timeout: float | None) -> int:
            waited.append(timeout)
            raise subprocess.TimeoutExpired("tracker", timeout or 0.0)

    waited: list[float | None] = []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///nowhere.db")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if within == "4711":
        monkeypatch.setenv("SLURM_JOB_ID", within)
    if within == "1":
        monkeypatch.setattr("os.getpid", lambda: 1)
    run = RunDir(tmp_path / "run")
    run.create()
    run.job.write_text("name: x\n")
    Heartbeat(run.heartbeat(0), create=True)
    with Keeper(run, wait_mlflow=within == "--wait-mlflow") as keeper:
        monkeypatch.setattr(subprocess, "Popen", Slow)
        keeper.finish(state, 0)
    assert waited == [seconds]
    assert says in capsys.readouterr().err
