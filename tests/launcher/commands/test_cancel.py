"""`dtrain cancel`: the run that is meant, and no other process, stops or ends, and one is told what became of it.

The runs wait in a step until they are allowed to go on, so that nothing here depends on timing.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from unittest.mock import patch

import pytest
from command import PATIENCE_S, Command
from mlflow import MlflowClient

from dtrain.errors import UserError
from dtrain.files import read_json, write_json
from dtrain.launcher.commands import cancel as cancel_command
from dtrain.run.folder import RunDir
from dtrain.trainer.checkpoint.manager import saved

GATE = 7  # the step that waits, the second one of epoch 2
LAUNCH = ("launch", "--gpus", "2", "--run-dir", "run", "job.yaml", f"model.gate={GATE}")


def until_waiting(project, command):
    command.until((project.folder / "waiting").exists)


def check_stopped(project, done):
    assert done.code == 0, done.err
    status = project.status()
    assert (status["state"], status["exit_code"]) == ("stopped", 75)
    assert GATE <= status["step"] < 10
    assert f"run was stopped in epoch 2, step {status['step']}, with a checkpoint\n" in done.out
    assert saved(project.run_dir())[-1].name == f"step-{status['step']:09d}"


def test_a_run_stops_with_a_checkpoint_and_continues_as_told(project):
    """It is followed to its end: afterwards its folder is free. A run that was stopped by Ctrl-Z goes on for it."""
    with project.running(*LAUNCH) as launch:
        until_waiting(project, launch)
        launch.signal(signal.SIGSTOP)
        with project.running("cancel", "run") as cancel:
            cancel.until(lambda: "is asked to stop at its next step" in cancel.err)
            launch.until(lambda: "SIGTERM: stopping at the next step, with a checkpoint" in launch.err)
            project.write("go", "")
            done = cancel.wait()
        with project.run_dir().lock():
            pass
        assert launch.wait().code == 75
    check_stopped(project, done)

    again = project.run("cancel", "run")
    assert (again.code, again.out, again.err) == (0, "run is not running: it is stopped\n", "")

    [words] = re.findall(r"^to continue: dtrain (.*)$", done.out, re.MULTILINE)
    assert "--gpus 2" in words
    continued = project.run(*shlex.split(words))
    assert continued.code == 0, continued.err
    assert [row["step"] for row in project.run_dir().rows()] == [5, 10]


@pytest.mark.mlflow
def test_now_ends_it_without_a_checkpoint(project, store):
    """Although a first cancel waits already; and all that tells of runs knows it."""
    with project.running(*LAUNCH) as launch:
        until_waiting(project, launch)
        launch.until(project.run_dir().latest.exists)  # written behind the training
        with project.running("cancel", "run") as first:
            launch.until(lambda: "SIGTERM: stopping" in launch.err)
            done = project.run("cancel", "--now", "run")
            assert first.wait().out == done.out
        launched = launch.wait()  # although its ranks still wait
    assert done.code == 0, done.err
    assert "run was killed in epoch 2, step 6; nothing after the last checkpoint was saved\n" in done.out
    assert "to continue: dtrain launch --resume --run-dir run --gpus 2 run/job.yaml\n" in done.out
    assert launched.code == 130
    assert "Traceback" not in launched.err
    status = project.status()  # as it was written: nobody has to find out
    assert (status["state"], status["exit_code"]) == ("killed", 130)
    assert [path.name for path in saved(project.run_dir())] == ["step-000000005-epoch-0001"]
    assert MlflowClient(store).get_run(status["mlflow_run_id"]).info.status == "KILLED"


SCRIPT = """
import torch
from torch.utils.data import DataLoader
from dtrain import Trainer
import data, net

torch.manual_seed(0)
model = net.Net(gate=7)
trainer = Trainer(model, torch.nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1), run_dir="run")
trainer.fit(DataLoader(data.points(40), batch_size=8, shuffle=True), epochs=2)
"""


@pytest.mark.parametrize("now", [False, True], ids=["next-step", "now"])
def test_a_script_that_was_started_without_an_agent(now, project):
    project.write("train.py", SCRIPT)
    command = Command([sys.executable, "train.py"], project.folder, project.environment)
    try:
        until_waiting(project, command)
        with project.running("cancel", "run", *["--now"] * now) as cancel:
            if not now:
                cancel.until(lambda: "is asked to stop at its next step" in cancel.err)
                project.write("go", "")
            done = cancel.wait()
        ended = command.wait()
    finally:
        command.kill()
    if now:
        assert done.code == 0, done.err
        assert (project.status()["state"], project.status()["exit_code"]) == ("killed", 130)
    else:
        check_stopped(project, done)
        assert ended.code == 75
    assert "to continue: the script again, with Trainer(..., run_dir='run', resume=True)\n" in done.out


# -- whom it must not signal ----------------------------------------------------------------------


@pytest.fixture
def bystander():
    """A process that has nothing to do with any run. It is alive when the test ends."""
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    alive = process.poll() is None
    process.kill()
    process.wait()
    assert alive


def name_in_lock(run, **changed):
    run.lock_file.write_text(json.dumps({**read_json(run.lock_file), **changed}))


def test_a_killed_agent_whose_number_is_another_process_by_now(project, bystander):
    with project.running(*LAUNCH) as launch:
        until_waiting(project, launch)
        with project.running("logs", "-f", "run") as logs:
            launch.signal(signal.SIGKILL)
            launch.wait()
            followed = logs.wait()
    assert (followed.code, followed.err) == (0, "")
    run = project.run_dir()
    assert read_json(run.lock_file)["pid"] == launch.pid
    name_in_lock(run, pid=bystander.pid)
    assert project.status()["state"] == "running"  # nobody could write anything else
    assert "state     killed" in project.run("status", "run").out
    for options in ([], ["--now"]):
        done = project.run("cancel", *options, "run")
        assert (done.code, done.out, done.err) == (0, "run is not running: it is killed\n", "")


@pytest.fixture
def running(project):
    """A run that this process writes."""
    run = project.run_dir()
    run.create()
    with run.lock(is_agent=True):
        write_json(run.status_file, {"state": "running", "exit_code": None, "epoch": 3, "step": 7, "error": None})
        yield run


@pytest.mark.parametrize("number", ["a bystander's", "nobody's"])
def test_a_lock_that_another_process_holds(number, running, project, bystander):
    """As in a container that shares the folder and the host's name: its numbers mean nothing here."""
    pid = bystander.pid
    if number == "nobody's":
        gone = subprocess.Popen(["true"])
        gone.wait()
        pid = gone.pid
    name_in_lock(running, pid=pid)
    done = project.run("cancel", "--now", "run")
    assert (done.code, done.out) == (2, "")
    assert done.err == "run is locked, but not by the process named in its lock; to find which one: fuser run/lock\n"


def test_a_run_on_another_host(project, bystander):
    """Its lock can't be seen from here, but that its status is fresh."""
    run = project.run_dir()
    run.create()
    with run.lock(is_agent=True):
        pass
    write_json(run.status_file, {"state": "running", "exit_code": None, "epoch": 3, "step": 7, "error": None})
    name_in_lock(run, host="node7", pid=bystander.pid)
    done = project.run("cancel", "run")
    assert (done.code, done.out) == (2, "")
    assert done.err == f"run runs on node7; stop it there: ssh node7 dtrain cancel {project.folder}/run\n"


def test_no_run(project):
    done = project.run("cancel", "runs")
    assert (done.code, done.out, done.err) == (2, "", "runs holds no run (there is no status.json)\n")


# -- what a run may make of it --------------------------------------------------------------------

WRITER = """
import signal, sys, time
from dtrain.files import write_json
from dtrain.run.folder import RunDir

run = RunDir("run")
run.create()


def write(state, error=None):
    write_json(run.status_file, {"state": state, "exit_code": 1, "epoch": 3, "step": 7, "error": error})


def end(number, frame):
    write(sys.argv[1], {"rank": 1, "type": "ValueError", "message": "boom", "traceback": ""})
    sys.exit()


signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGQUIT, signal.SIG_IGN)
with run.lock(is_agent=True):
    write("running")
    print("ready", flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def writer(project, monkeypatch):
    """Starts a run that ends in the given state when it is asked to stop, and does not listen to --now."""
    monkeypatch.chdir(project.folder)
    started = []

    def start(state):
        process = subprocess.Popen([sys.executable, "-c", WRITER, state], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(PATIENCE_S)
        process.stdout.close()


def test_an_agent_that_does_not_listen_is_killed(writer, capsys, monkeypatch):
    process = writer("stopped")
    monkeypatch.setattr(cancel_command, "PATIENCE_S", 0.2)
    assert cancel_command.cancel("run", now=True) == 0
    assert process.wait() == -signal.SIGKILL
    assert capsys.readouterr().out == "run was killed in epoch 3, step 7; nothing after the last checkpoint was saved\n"
    assert RunDir("run").status()["state"] == "killed"


def test_a_run_that_fails_instead(writer, project):
    """Its checkpoint could not be written, say."""
    writer("failed")
    done = project.run("cancel", "run")
    assert done.code == 1
    assert done.out.startswith("run failed in epoch 3, step 7\nrank 1 failed: ValueError: boom\n")


def test_a_run_that_was_done(writer, project):
    writer("finished")
    done = project.run("cancel", "run")
    assert (done.code, done.out) == (0, "run finished before it could stop\n")


def test_another_users_run(running):
    """The kernel shows nobody else's processes, but to root."""
    refusal = PermissionError(errno.EACCES, "Permission denied")
    with patch.object(os, "scandir", side_effect=refusal), pytest.raises(UserError) as raised:
        cancel_command.cancel(str(running), now=False)
    assert (
        str(raised.value) == f"process {os.getpid()}, which writes to {running}, can't be signalled: Permission denied"
    )
