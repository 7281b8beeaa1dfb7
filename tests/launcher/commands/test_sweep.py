"""One job with several values: what the grid is, and the runs here, one after the other."""

from __future__ import annotations

import signal

import pytest
from command import STEPS
from mlflow import MlflowClient
from training import timeless

from dtrain.errors import UserError
from dtrain.files import read_json
from dtrain.run.sweep import Sweep, grid


def test_a_grid():
    assert grid(["a=1", "b=x,y", "c=0.1,1e-3"]) == (
        ["a=1"],
        [("b=x", "c=0.1"), ("b=x", "c=1e-3"), ("b=y", "c=0.1"), ("b=y", "c=1e-3")],
    )


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("betas=[0.9,0.99],[0.8,0.99]", ["[0.9,0.99]", "[0.8,0.99]"]),
        ("a={x: 1, y: 2}, {x: 3}", ["{x: 1, y: 2}", "{x: 3}"]),
        ("a='one, two',three", ["'one, two'", "three"]),
        ("a=null,~", ["null", "~"]),
    ],
)
def test_values_are_taken_as_they_are_written(override, values):
    key = override.partition("=")[0]
    assert grid([override]) == ([], [(f"{key}={value}",) for value in values])


@pytest.mark.parametrize("override", ["a=", "a", "a=[1,2]", "a=1", "a={x: 1, y: 2}"])
def test_one_value(override):
    assert grid([override]) == ([override], [()])


@pytest.mark.parametrize("overrides", [["a=1,2", "a=3"], ["a=1,[2"], ["a=1],[2"], ["a=1,'2"]])
def test_no_grid(overrides):
    with pytest.raises(UserError):
        grid(overrides)


def history(run):
    return [timeless(row) for row in run.rows()]


@pytest.mark.mlflow
def test_each_run_is_the_run_that_its_values_make(project):
    done = project.run("sweep", "--gpus", "2", "--run-dir", "all", "job.yaml", "optimizer.lr=0.1,0.02", "fit.epochs=1")
    assert done.code == 0, done.err
    sweep = Sweep.read(project.folder / "all")
    assert [sweep.point(run) for run in sweep.runs] == ["optimizer.lr=0.1", "optimizer.lr=0.02"]
    alone = project.run("launch", "--gpus", "2", "--run-dir", "run", "job.yaml", "optimizer.lr=0.02", "fit.epochs=1")
    assert alone.code == 0
    assert history(sweep.runs[1]) == history(project.run_dir()) != history(sweep.runs[0])
    assert [line.split()[1] for line in done.out.splitlines()] == ["finished", "finished"]
    assert done.out.splitlines()[1].endswith("optimizer.lr=0.02")

    client = MlflowClient(project.environment["MLFLOW_TRACKING_URI"])
    parent = client.get_run(read_json(sweep.folder / "mlflow.json")["run_id"])
    assert (parent.info.status, parent.info.run_name) == ("FINISHED", "all")
    for run in sweep.runs:
        child = client.get_run(read_json(run.path / "mlflow.json")["run_id"])
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.info.run_name == sweep.point(run)

    listed = project.run("runs", ".").out
    assert "2 of 2 finished" in listed
    again = project.run("sweep", "--run-dir", "all", "job.yaml", "optimizer.lr=0.1,0.02")
    assert again.code == 2
    assert "--resume continues the sweep in it" in again.err


@pytest.mark.campaign
def test_a_sweep_that_was_stopped_continues(project):
    arguments = ("job.yaml", "optimizer.lr=0.1,0.02", "model.gate=3", "fit.epochs=1")
    with project.running("sweep", "--gpus", "2", "--run-dir", "all", *arguments) as command:
        command.until((project.folder / "waiting").exists)
        command.signal(signal.SIGTERM)
        command.until(lambda: "SIGTERM: stopping" in command.err)
        (project.folder / "go").touch()
        done = command.wait()
    assert done.code == 75
    assert "dtrain sweep --gpus 2 --resume --run-dir" in done.last_lines
    first, second = Sweep.read(project.folder / "all").runs
    assert (first.status()["state"], second.status()) == ("stopped", {})
    assert "waiting" in project.run("status", "all").out

    other = project.run("sweep", "--resume", "--run-dir", "all", "job.yaml", "optimizer.lr=0.1,0.5")
    assert other.code == 2
    assert "was started with other values" in other.err
    done = project.run("sweep", "--gpus", "2", "--resume", "--run-dir", "all", *arguments)
    assert done.code == 0, done.err
    assert [run.status()["step"] for run in (first, second)] == [STEPS, STEPS]
    assert first.status()["restarts"] == 1


def test_a_run_that_fails_does_not_keep_the_others_from_running(project):
    project.write("fault.py", "import net\n\n\ndef make(width):\n    assert width > 3\n    return net.Net(width)\n")
    project.job(model={"_target_": "fault.make"}, fit={"epochs": 1})
    done = project.run("sweep", "--gpus", "1", "--run-dir", "all", "job.yaml", "model.width=2,4")
    assert done.code == 1
    assert [run.status()["state"] for run in Sweep.read(project.folder / "all").runs] == ["failed", "finished"]
    assert "Traceback" not in done.last_lines


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["job.yaml", "fit.epochs=1,x"], "fit.epochs"),
        (["job.yaml", "optimizer.lrr=0.1,0.2"], "optimizer.lrr"),
        (["job.yaml", "--max-parallel", "2", "optimizer.lr=0.1,0.2"], "--max-parallel need --slurm"),
        (["job.yaml", "--resume", "optimizer.lr=0.1,0.2"], "--resume needs --run-dir"),
        (["job.yaml", "--resume", "--run-dir", ".", "optimizer.lr=0.1,0.2"], "holds no sweep to resume"),
        (["script.yaml"], "is a script that trains by itself: sweeps are for jobs with a model"),
        (["job.yaml", "--slurm", "--dry-run", "slurm.time=1,2"], "can't be swept"),
        (["nowhere.yaml", "a=1,2"], "nowhere.yaml"),
    ],
)
def test_wrong_requests(project, arguments, says):
    project.write("train.py", "")
    project.write("script.yaml", "name: x\nscript: train.py\n")
    done = project.run("sweep", *arguments)
    assert done.code == 2, done.err
    assert says in done.err
    assert "Traceback" not in done.err
    assert not project.runs()


def test_a_dry_run_prints_the_runs(project):
    done = project.run("sweep", "--dry-run", "job.yaml", "optimizer.lr=0.1,0.2", "model.width=4,8")
    assert done.out.splitlines()[1] == "1: optimizer.lr=0.1 model.width=8"
    assert len(done.out.splitlines()) == 4
    done = project.run("sweep", "--slurm", "--max-parallel", "2", "--dry-run", "job.yaml", "optimizer.lr=0.1,0.2")
    assert "--array=0-1%2" in done.out
    assert not project.runs()
