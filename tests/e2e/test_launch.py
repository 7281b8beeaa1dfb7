"""`dtrain launch --gpus 2 job.yaml`, to the end: the run folder, what is printed, MLflow; and its continuation."""

from __future__ import annotations

import json
import re
import socket
import subprocess

import pytest
import torch
import yaml
from command import JOB, STEPS
from mlflow import MlflowClient

from dtrain.files import read_json
from dtrain.run.folder import RunDir

RUN_NAME = r"tiny-\d{8}-\d{6}-[0-9a-f]{4}"
ACCURACY = "metrics.acc={_target_: torchmetrics.Accuracy, task: multiclass, num_classes: 2}"
OVERRIDES = ("optimizer.lr=0.25", "model.width=6", ACCURACY)


@pytest.fixture(scope="module")
def project(new_project):
    """In a git repository, with a change that is not committed, and with what is no part of the code."""
    project = new_project("launched", is_fresh=True)
    (project.folder / "sub").mkdir()
    project.write("sub/words.txt", "some data")
    project.write("big.bin", "x" * (1 << 20) + "x")
    project.write(".hidden", "secret")
    project.write(".gitignore", "big.bin")
    author = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    for arguments in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *arguments], cwd=project.folder, check=True)
    project.write("sub/words.txt", "other data")
    return project


@pytest.fixture(scope="module")
def done(project, store):
    """The command's end; of a print in the model, only rank 0's is shown."""
    project.write("net.py", (project.folder / "net.py").read_text() + "\nprint('imported', os.environ.get('RANK'))\n")
    return project.run("launch", "--gpus", "2", "job.yaml", *OVERRIDES, MLFLOW_TRACKING_URI=store)


@pytest.fixture(scope="module")
def run(done, project):
    assert done.code == 0, done.err
    [folder] = project.runs()
    return RunDir(folder)


def test_the_default_folder_is_named_after_the_job(run):
    assert re.fullmatch(RUN_NAME, run.path.name)


def test_stdout_is_for_results(done, run):
    assert done.out == ""
    lines = done.err.splitlines()
    assert f"run runs/{run.path.name}" in lines
    assert "[rank 0] imported 0" in lines
    assert not [line for line in lines if "imported 1" in line]
    [first, second] = [line for line in lines if line.startswith("epoch ")]
    assert re.match(r"epoch 1  step 5  .*train_loss .*val_acc .* samples/s", first)
    assert second.startswith("epoch 2  step 10  ")


def test_all_files_are_there(run):
    files = {str(path.relative_to(run.path)) for path in run.path.rglob("*")}
    expected = ["job.yaml", "code/net.py", "status.json", "metrics.jsonl", "env.json", "mlflow.json"]
    expected += ["logs/rank-0.log", "logs/rank-1.log", "logs/agent-0.log", "weights/best.pt", "weights/last.pt"]
    for epoch in (1, 2):
        folder = f"checkpoints/step-{epoch * STEPS:09d}-epoch-{epoch:04d}"
        names = ("rank-0.bin", "rank-1.bin", "index.json", "best.pt", "SHA256SUMS")
        expected += [f"{folder}/{name}" for name in names]
    expected.append("checkpoints/latest")
    assert not set(expected) - files
    assert not [name for name in files if "/." in f"/{name}"]  # no half-written file


def test_job_yaml_is_resolved(run):
    job = yaml.safe_load(run.job.read_text())
    assert job["model"] == {"_target_": "net.Net", "width": 6}
    assert job["optimizer"]["lr"] == 0.25
    assert job["metrics"]["acc"]["num_classes"] == 2
    defaults = {"test": None, "workers": 0, "shuffle": True, "sampler": None, "collate": None}
    assert job["data"] == {**JOB["data"], **defaults}
    assert job["checkpoint"] == {"every": "epoch", "keep": 2, "keep_every": None}
    assert job["launch"] == {"device": "cpu", "hang_timeout_s": 1800.0}


def test_code_is_the_jobs_folder_as_it_was(run):
    files = {str(path.relative_to(run.code)) for path in run.code.rglob("*") if path.is_file()}
    assert files == {"net.py", "data.py", "job.yaml", "sub/words.txt"}
    assert (run.code / "sub/words.txt").read_text() == "other data"


def test_status(run):
    status = read_json(run.status_file)
    mlflow_run_id = status.pop("mlflow_run_id")
    assert re.fullmatch(r"[0-9a-f]{32}", mlflow_run_id)
    assert status == {
        "state": "finished",
        "exit_code": 0,
        "fit": 1,
        "epoch": 2,
        "step": 2 * STEPS,
        "slurm_job_id": None,
        "restarts": 0,
        "error": None,
    }


def test_metrics(run):
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    names = ["epoch", "step", "phase", "time", "lr", "samples_per_s", "train_loss", "train_acc", "val_loss", "val_acc"]
    assert [sorted(row) for row in rows] == [sorted(names)] * 2
    assert [(row["epoch"], row["step"], row["lr"]) for row in rows] == [(1, STEPS, 0.25), (2, 2 * STEPS, 0.25)]


def test_weights_are_a_bare_state_dict(run):
    for path in (run.best_weights, run.last_weights):
        weights = torch.load(path, weights_only=True)
        assert {name: tuple(value.shape) for name, value in weights.items()} == {
            "layers.0.weight": (6, 4),
            "layers.0.bias": (6,),
            "layers.2.weight": (2, 6),
            "layers.2.bias": (2,),
        }


def test_logs_hold_what_each_rank_printed(run):
    for rank in (0, 1):
        assert run.rank_log(rank).read_text() == f"imported {rank}\n"


def test_env(run, project):
    env = read_json(run.env)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project.folder, capture_output=True, text=True, check=True)
    assert env["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert {"dtrain", "mlflow", "torchmetrics"} <= set(env["packages"])
    assert env["host"] == socket.gethostname()
    assert env["command"][1:4] == ["launch", "--gpus", "2"]
    assert env["git"]["commit"] == head.stdout.strip()
    assert env["git"]["dirty"] is True
    assert "-some data" in env["git"]["diff"]
    assert "+other data" in env["git"]["diff"]
    assert env["left_out_of_code"] == ["big.bin"]


def test_mlflow_has_one_run_for_the_job(run, store):
    client = MlflowClient(store)
    found = client.get_run(read_json(run.status_file)["mlflow_run_id"])
    twins = client.search_runs([found.info.experiment_id], f"attributes.run_name = '{run.path.name}'")
    assert len(twins) == 1
    assert found.info.status == "FINISHED"
    assert found.data.params["optimizer.lr"] == "0.25"
    assert found.data.params["model._target_"] == "net.Net"
    rows = run.rows()
    history = client.get_metric_history(found.info.run_id, "val_acc")
    assert [(metric.step, metric.value) for metric in history] == [(row["step"], row["val_acc"]) for row in rows]
    artifacts = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert artifacts == {"job.yaml", "weights", "plots"}
    assert [file.path for file in client.list_artifacts(found.info.run_id, "weights")] == ["weights/best.pt"]


# -- a run folder that is there already -----------------------------------------------------------


def content(run):
    return {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_a_new_run_refuses_an_old_folder(run, project):
    before = content(run)
    done = project.run("launch", "--run-dir", str(run), "job.yaml", *OVERRIDES)
    assert done.code == 2
    assert "exists and is not empty; --resume continues" in done.err
    assert content(run) == before


def test_resume_of_a_finished_run_changes_nothing(run, project):
    before = content(run)
    done = project.run("launch", "--gpus", "2", "--resume", "--run-dir", str(run), "job.yaml", *OVERRIDES)
    assert (done.code, done.out) == (0, "")
    assert "is finished; nothing to resume" in done.err
    assert content(run) == before


def test_resume_with_another_job_lists_the_differences(run, project):
    before = content(run)
    done = project.run("launch", "--resume", "--run-dir", str(run), "job.yaml", "seed=3", "optimizer.lr=0.5", ACCURACY)
    assert done.code == 2
    for difference in ("seed: 0 before, 3 now", "optimizer.lr: 0.25 before, 0.5 now", "model.width: 6 before, absent"):
        assert difference in done.err
    assert "metrics" not in done.err
    assert content(run) == before


def test_resume_without_a_folder_needs_an_unfinished_run(run, project):
    done = project.run("launch", "--resume", "job.yaml", *OVERRIDES)
    assert done.code == 2
    assert "no unfinished run of tiny under" in done.err


@pytest.mark.parametrize("arguments", [(), ("--resume",)], ids=["new", "resume"])
def test_a_folder_that_holds_anything_else_is_left_alone(arguments, project):
    folder = project.folder / "thesis"
    folder.mkdir(exist_ok=True)
    (folder / "chapter.txt").write_text("years of work")
    done = project.run("launch", *arguments, "--run-dir", "thesis", "job.yaml")
    assert done.code == 2
    assert "thesis" in done.err
    assert [path.name for path in folder.iterdir()] == ["chapter.txt"]


def test_resume_of_what_is_not_there(project):
    done = project.run("launch", "--resume", "--run-dir", "nowhere", "job.yaml")
    assert done.code == 2
    assert "nowhere does not exist, so there is nothing to resume" in done.err
    assert not (project.folder / "nowhere").exists()


def test_more_epochs_continue_a_finished_run(run, project):
    """The last of this file: it changes the run. The code is that of the run, whatever became of the project's."""
    project.write("net.py", "raise RuntimeError('not this one')")
    rows = run.rows()
    # An empty folder is no obstacle elsewhere, and another file of the same job no other job.
    done = project.run("launch", "--gpus", "2", "--resume", "--run-dir", str(run), str(run.job), "fit.epochs=3")
    assert done.code == 0, done.err
    assert run.rows()[:2] == rows
    assert [(row["epoch"], row["step"]) for row in run.rows()] == [(1, 5), (2, 10), (3, 15)]
    assert [line.split()[1] for line in done.err.splitlines() if line.startswith("epoch ")] == ["3"]
    assert yaml.safe_load(run.job.read_text())["fit"]["epochs"] == 3
    status = read_json(run.status_file)
    assert (status["state"], status["epoch"], status["step"], status["restarts"]) == ("finished", 3, 15, 1)
    names = ["step-000000010-epoch-0002", "step-000000015-epoch-0003"]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["latest", *names]


def test_a_run_without_mlflow(new_project):
    project = new_project("without-mlflow")
    done = project.run("launch", "--gpus", "1", "--run-dir", "run", "job.yaml", MLFLOW_TRACKING_URI="")
    assert done.code == 0, done.err
    assert not (project.run_dir().path / "mlflow.json").exists()
    assert not (project.folder / "mlflow.db").exists()
    assert "MLflow" not in done.err
