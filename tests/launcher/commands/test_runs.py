"""`dtrain runs`: a line for each run, whatever else is in the folder."""

from __future__ import annotations

import json
import os
import time

import pytest

from dtrain.files import write_json, write_text
from dtrain.run.folder import RunDir
from dtrain.run.heartbeat import Heartbeat
from dtrain.schema.loading import dump_job, load_job

HOUR, DAY = 3600, 86400
ROW = {"epoch": 1, "step": 5, "lr": 0.1, "train_loss": 0.5, "val_loss": 0.25, "val_acc": 0.75}


def make_run(folder, state, began_ago, ended_ago, rows=(), epoch=2, step=10):
    """A run that began and was last heard of so many seconds ago."""
    run = RunDir(folder)
    run.create()
    Heartbeat(run.heartbeat(0), create=True)
    with run.lock(is_agent=True):
        pass
    write_json(run.status_file, {"state": state, "exit_code": None, "epoch": epoch, "step": step, "error": None})
    if rows:
        run.write_rows(list(rows))
    for file, ago in ((run.lock_file, began_ago), (run.status_file, ended_ago)):
        os.utime(file, (time.time() - ago,) * 2)
    return run


def lines(done):
    assert (done.code, done.err) == (0, "")
    return done.out.splitlines()


def test_a_line_for_each_run_the_newest_last(project):
    later = {**ROW, "epoch": 2, "step": 10, "val_loss": 0.125}
    make_run(project.folder / "runs" / "a-new", "finished", 3 * HOUR + 60, 2 * HOUR + 60, [ROW, later])
    make_run(project.folder / "runs" / "b-old", "failed", 9 * DAY + 60, 8 * DAY + 60, [{**ROW, "val_loss": None}])
    make_run(project.folder / "runs" / "c-killed", "running", 4 * HOUR + 60, 10 * 60 + 30, epoch=0, step=0)
    live = make_run(project.folder / "runs" / "a-live", "running", 0, 0, [{"epoch": 1, "step": 5, "train_loss": 1e-7}])
    (project.folder / "runs" / "no-run").mkdir()
    (project.folder / "runs" / "file").touch()
    with live.lock(is_agent=True):
        os.utime(live.lock_file, (time.time() - 150,) * 2)
        found = lines(project.run("runs"))
    assert found == [
        "runs/b-old     failed    epoch 2  step 10  train_loss 0.5    ended 8 days ago",
        "runs/c-killed  killed    epoch 0  step 0   -                 ended 10 min ago",
        "runs/a-new     finished  epoch 2  step 10  val_loss 0.125    ended 2 h ago",
        "runs/a-live    running   epoch 2  step 10  train_loss 1e-07  began 2 min ago",
    ]


def test_the_monitored_value_is_shown(project):
    """As the job in the run folder names it, in the file that `dtrain launch` writes there."""
    project.job(
        metrics={"acc": {"_target_": "torchmetrics.Accuracy", "task": "binary", "activation": "none"}},
        fit={"epochs": 2, "early_stopping": {"monitor": "val_acc", "mode": "max"}},
    )
    run = make_run(project.folder / "mine", "finished", DAY, DAY, [ROW])
    write_text(run.job, dump_job(load_job(project.folder / "job.yaml").job))
    [line] = lines(project.run("runs", str(project.folder)))
    assert "  val_acc 0.75  " in line
    assert line.startswith(f"{run}  finished")


DAMAGE = {
    "status-no-json": lambda run: run.status_file.write_bytes(b'{"state": '),
    "status-no-text": lambda run: run.status_file.write_bytes(b"\xff"),
    "status-a-list": lambda run: run.status_file.write_text("[]"),
    "status-empty": lambda run: run.status_file.write_text("{}"),
    "status-of-words": lambda run: run.status_file.write_text('{"state": "failed", "epoch": "one", "step": null}'),
    "status-infinite": lambda run: run.status_file.write_text('{"state": "failed", "epoch": Infinity, "step": 1}'),
    "status-a-folder": lambda run: (run.status_file.unlink(), run.status_file.mkdir()),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_run_hides_no_other(name, project):
    make_run(project.folder / "runs" / "good", "finished", DAY, DAY, [ROW])
    run = make_run(project.folder / "runs" / os.fsdecode(b"\xff"), "finished", DAY, DAY)
    DAMAGE[name](run)
    found = lines(project.run("runs"))
    assert found[0] == "runs/\\xff  damaged"
    assert found[1].startswith("runs/good  finished  epoch 2  step 10  val_loss 0.25")
    assert len(found) == 2


@pytest.mark.parametrize("text", ["{", "[1]", '{"val_loss": "x"}', "\xff", ""])
def test_a_damaged_row_is_passed_over_and_said(text, project):
    run = make_run(project.folder / "runs" / "x", "finished", DAY, DAY)
    run.metrics.write_text(json.dumps(ROW) + "\n" + text, encoding="latin-1")
    run.job.write_bytes(b"\xff")
    done = project.run("runs")
    assert done.out.rstrip().split("  ")[-2:] == ["val_loss 0.25", "ended 24 h ago"]
    assert done.err == ("warning: runs/x/metrics.jsonl:2: damaged, so it is skipped\n" if text else "")


def test_no_runs(project):
    done = project.run("runs")
    assert (done.code, done.out, done.err) == (0, "", "no runs in runs\n")
    done = project.run("runs", "nowhere")
    assert (done.code, done.out, done.err) == (2, "", "no such folder: nowhere\n")
