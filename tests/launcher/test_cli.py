"""The command line itself: what needs no rank. Results on stdout, all else on stderr, mistakes in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
import yaml

from dtrain.errors import UserError
from dtrain.launcher.machine.devices import choose_processes

pytestmark = pytest.mark.fresh


def test_help_names_the_commands(project):
    done = project.run("--help")
    assert (done.code, done.err) == (0, "")
    for command in ("launch", "check", "status", "logs", "runs", "cancel", "schema", "ui"):
        assert f"\n  {command} " in done.out


def test_version(project):
    done = project.run("--version")
    assert (done.code, done.out.split()[0]) == (0, "dtrain,")


def test_python_m_is_the_command():
    result = subprocess.run([sys.executable, "-m", "dtrain", "check", "none.yaml"], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "none.yaml: no such file\n")


def test_schema_is_json_schema_on_stdout(project):
    done = project.run("schema")
    assert (done.code, done.err) == (0, "")
    schema = json.loads(done.out)
    assert schema["additionalProperties"] is False
    assert {"name", "model", "data", "optimizer", "fit"} <= set(schema["else"]["required"])  # without a script


def test_check_says_that_a_job_is_right(project):
    done = project.run("check", "job.yaml", "optimizer.lr=0.5")
    assert (done.code, done.err) == (0, "")
    assert "job.yaml is right" in done.out
    assert "val_loss" in done.out


def test_dry_run_prints_the_resolved_job_and_writes_nothing(project):
    before = sorted(project.folder.rglob("*"))
    done = project.run(
        *("launch", "--gpus", "3", "--dry-run", "job.yaml", "optimizer.lr=1e-3", "model.width=64"),
        *("metrics.acc={_target_: torchmetrics.Accuracy, task: binary, activation: none}", "fit.deterministic=true"),
        *("mlflow.run_name='007'", "data.val=null", "checkpoint.every=7"),
        PYTHONDONTWRITEBYTECODE="1",
    )
    assert done.code == 0
    job = yaml.safe_load(done.out)
    assert job["optimizer"]["lr"] == 1e-3
    assert job["model"] == {"_target_": "net.Net", "width": 64}
    assert job["metrics"]["acc"]["task"] == "binary"
    assert job["fit"]["deterministic"] is True
    assert job["mlflow"]["run_name"] == "007"
    assert job["data"]["val"] is None
    assert job["checkpoint"] == {"every": 7, "keep": 2, "keep_every": None}  # the default beside the override
    assert job["launch"]["device"] == "cpu"
    assert "3 cpu processes" in done.err
    assert "run_name" not in done.err
    assert sorted(project.folder.rglob("*")) == before


def test_without_a_gpu_it_warns_and_says_why(project):
    """The line is there for --gpus auto as well: who expected GPUs must see that there are none."""
    if torch.cuda.device_count():
        pytest.skip("there are GPUs")
    for gpus, number in (("2", "2 CPU processes"), ("auto", "1 CPU process ")):
        done = project.run("launch", "--dry-run", "--gpus", gpus, "job.yaml")
        [line] = [line for line in done.err.splitlines() if line.startswith("warning")]
        assert number in line
        assert "CUDA" in line
    done = project.run("launch", "--dry-run", "--gpus", "2", "job.yaml", "launch.device=cpu")
    assert "warning" not in done.err  # decided by hand


def test_cuda_by_hand_needs_a_gpu(project):
    if torch.cuda.device_count():
        pytest.skip("there are GPUs")
    done = project.run("launch", "job.yaml", "launch.device=cuda")
    assert done.code == 2
    assert "launch.device is cuda, but there is no GPU" in done.err
    assert not project.runs()


def test_processes_are_never_more_than_the_gpus_that_there_are(capsys):
    with patch.object(torch.cuda, "device_count", return_value=2):
        assert choose_processes("auto", "auto") == (2, "cuda")
        assert choose_processes("1", "cuda") == (1, "cuda")
        assert choose_processes("5", "cpu") == (5, "cpu")
        with pytest.raises(UserError, match=r"--gpus 3.*2 visible.*at most 2"):
            choose_processes("3", "auto")
    assert not capsys.readouterr().err


def test_status_shows_how_a_run_stands(project):
    run = project.run_dir()
    run.create()
    error = {"rank": 1, "type": "ValueError", "message": "boom", "traceback": '  File "net.py", line 7'}
    status = {"state": "failed", "exit_code": 1, "epoch": 2, "step": 7, "error": error}
    run.status_file.write_text(json.dumps(status))
    run.write_rows([{"epoch": 1, "step": 5, "train_loss": 0.5}])
    done = project.run("status", "run")
    assert (done.code, done.err) == (0, "")
    for text in ("failed", "exit code 1", "epoch     2, step 7", "train_loss 0.5", "rank 1 failed: ValueError: boom"):
        assert text in done.out


def test_status_of_no_run(project):
    done = project.run("status", "runs")
    assert (done.code, done.out) == (2, "")
    assert done.err == "runs holds no run (there is no status.json)\n"


def test_a_reader_that_has_seen_enough_is_no_error(project):
    """`dtrain schema | head -1` prints no traceback."""
    command = f"'{sys.executable}' -m dtrain schema | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=project.folder)
    assert result.stderr == ""
