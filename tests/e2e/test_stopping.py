"""Signals, and what follows: a checkpoint at the next step, the exit code, the command that continues the run.

Each run waits in a step until it is allowed to go on, so that nothing here depends on timing.
"""

from __future__ import annotations

import fcntl
import re
import shlex
import signal
import socket
import time

import pytest
from command import PATIENCE_S
from marks import campaign
from mlflow import MlflowClient
from training import timeless

from dtrain.files import read_json
from dtrain.monitoring.mlflow_tracker import tracker
from dtrain.run.heartbeat import Heartbeat
from dtrain.trainer.checkpoint.manager import saved

GATE = 7  # the step that waits, the second one of epoch 2
SIZE = ("launch", "--gpus", "2", "--run-dir", "run", "job.yaml")
JOB = ("optimizer.lr=0.2", f"model.gate={GATE}")
TOTAL = 10


def until_waiting(project, command):
    command.until((project.folder / "waiting").exists)


def go_on(project):
    project.write("go", "")


def stop(project, number, *, to_group=False, arguments=(*SIZE, *JOB)):
    """The end of a run that got the signal in step GATE, on the agent alone or on its whole process group."""
    with project.running(*arguments) as command:
        until_waiting(project, command)
        command.signal(number, to_group=to_group)
        command.until(lambda: "stopping at the next step" in command.err)
        go_on(project)
        return command.wait()


def continue_as_told(project, done):
    [words] = re.findall(r"^continue with: dtrain (.*)$", done.err, re.MULTILINE)
    return project.run(*shlex.split(words))


def check_stopped(project, done, code):
    assert done.code == code, done.err
    status = project.status()
    assert (status["state"], status["exit_code"], status["error"]) == ("stopped", code, None)
    assert GATE <= status["step"] < TOTAL
    assert project.run_dir().latest.read_text() == f"step-{status['step']:09d}\n"
    assert saved(project.run_dir())[-1].name == f"step-{status['step']:09d}"
    assert [row["epoch"] for row in project.run_dir().rows()] == [1]
    assert project.run_dir().last_weights.stat().st_mtime_ns > project.run_dir().latest.stat().st_mtime_ns


def history(project, name="run"):
    """The run's rows, without how fast it was."""
    rows = project.run_dir(name).rows()
    return [timeless(row) for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(new_project):
    project = new_project("uninterrupted")
    go_on(project)
    done = project.run(*SIZE, *JOB)
    assert done.code == 0, done.err
    return history(project)


def check_finished(project, done, uninterrupted):
    assert done.code == 0, done.err
    assert project.status()["state"] == "finished"
    assert history(project) == uninterrupted  # to the bit


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stop_and_its_continuation(number, code, project, uninterrupted):
    """To the whole group, as a terminal's Ctrl-C and `timeout` send it."""
    done = stop(project, number, to_group=True)
    check_stopped(project, done, code)
    assert "Traceback" not in done.err
    check_finished(project, continue_as_told(project, done), uninterrupted)
    assert project.status()["restarts"] == 1


@pytest.mark.mlflow
@pytest.mark.parametrize("number", [campaign(signal.SIGTERM), signal.SIGUSR2])
def test_what_a_cluster_sends_to_all_processes_means_the_agent(number, project, uninterrupted):
    """Slurm signals each process of a job: the fork server, the ranks, those that load their data, the tracker."""
    with project.running(*SIZE, *JOB, "data.workers=1") as command:
        until_waiting(project, command)
        command.signal_all(number)
        command.until(lambda: "stopping at the next step, with a checkpoint" in command.err)
        go_on(project)
        done = command.wait()
    check_stopped(project, done, 75)
    check_finished(project, project.run(*SIZE, "--resume", *JOB), uninterrupted)


def test_ctrl_c_twice_ends_at_once(project):
    with project.running(*SIZE, *JOB) as command:
        until_waiting(project, command)
        command.until(project.run_dir().latest.exists)  # written behind the training
        command.signal(signal.SIGINT, to_group=True)
        command.until(lambda: "repeat to end at once" in command.err)
        command.signal(signal.SIGINT, to_group=True)
        done = command.wait()  # although the ranks still wait
    assert done.code == 130
    assert "Traceback" not in done.err
    assert (project.status()["state"], project.status()["exit_code"]) == ("killed", 130)
    assert [path.name for path in saved(project.run_dir())] == ["step-000000005-epoch-0001"]


def test_a_closed_terminal_stops_the_run(project, uninterrupted):
    """The terminal is one that `script` makes, and that is gone when `script` is."""
    line = shlex.join(["dtrain", *SIZE, *JOB])
    with project.shell_running(f"exec script -qec {shlex.quote(line)} /dev/null") as terminal:
        until_waiting(project, terminal)
        terminal.signal(signal.SIGKILL)
        heartbeat, deadline = Heartbeat(project.run_dir().heartbeat(0)), time.monotonic() + PATIENCE_S
        while not heartbeat.stop:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        go_on(project)
        terminal.wait()  # for the run too
    assert (project.status()["state"], project.status()["exit_code"]) == ("stopped", 75)
    check_finished(project, project.run(*SIZE, "--resume", *JOB), uninterrupted)


def test_nohup_keeps_a_run_from_a_hangup(project):
    with project.shell_running(f"exec nohup {shlex.join(['dtrain', *SIZE, *JOB])}") as command:
        until_waiting(project, command)
        command.signal(signal.SIGHUP, to_group=True)
        go_on(project)
        done = command.wait()
    assert done.code == 0, done.err
    assert project.status()["step"] == TOTAL


def test_a_stop_before_the_first_step(project):
    """A signal that comes while the processes are still being started is not lost."""
    with project.running(*SIZE, *JOB) as command:
        command.until(project.run_dir().status_file.exists)
        command.until(lambda: signal.SIGTERM in caught_signals(command.pid))
        command.signal(signal.SIGTERM)
        done = command.wait()
    assert done.code == 75, done.err
    assert project.status()["state"] == "stopped"
    assert project.status()["step"] < GATE


def test_a_script_that_is_still_being_started_is_ended(project):
    project.write("train.py", "import time\ntime.sleep(1000)")
    with project.running("launch", "--gpus", "2", "--run-dir", "run", "train.py") as command:
        command.until(lambda: signal.SIGTERM in caught_signals(command.pid))
        command.signal(signal.SIGTERM)
        done = command.wait()
    assert done.code == 128 + signal.SIGTERM, done.err
    assert project.status()["state"] == "killed"


def caught_signals(pid):
    with open(f"/proc/{pid}/status") as file:
        [mask] = [line.split()[1] for line in file if line.startswith("SigCgt")]
    return {number for number in signal.Signals if int(mask, 16) >> (number - 1) & 1}


def test_a_running_run_has_one_writer(project):
    """And --resume without a folder finds it, the newest of that name that is not finished."""
    with project.running("launch", "--gpus", "1", "job.yaml", *JOB) as command:
        until_waiting(project, command)
        [folder] = project.runs()
        before = read_json(folder / "status.json")
        second = project.run("launch", "--resume", "--run-dir", str(folder), "job.yaml", *JOB)
        assert second.code == 2
        assert f"is being written by process {command.pid} on {socket.gethostname()}" in second.err
        assert project.run("status", str(folder)).out.splitlines()[1] == "state     running"
        assert read_json(folder / "status.json")["restarts"] == before["restarts"]
        command.signal(signal.SIGUSR2)
        command.until(lambda: "SIGUSR2: stopping at the next step" in command.err)
        go_on(project)
        assert command.wait().code == 75
    assert read_json(folder / "status.json")["state"] == "stopped"
    done = project.run("launch", "--gpus", "1", "--resume", "job.yaml", *JOB)
    assert done.code == 0, done.err
    assert project.runs() == [folder]
    assert read_json(folder / "status.json")["state"] == "finished"


@pytest.mark.mlflow
@pytest.mark.parametrize(
    "options",
    [pytest.param([], id="preload"), campaign(["--no-preload"], id="no-preload")],
)
def test_a_killed_agent_leaves_nothing_running_and_resume_finishes(options, project, store, uninterrupted):
    with project.running(*SIZE, *JOB, *options) as command:
        until_waiting(project, command)
        # MLflow's side is to be seen as well: the tracker starts after the first step.
        command.until(lambda: (read_json(project.run_dir().path / "mlflow.json") or {}).get("run_id"))
        command.signal(signal.SIGKILL)
        done = command.wait()  # of all its processes
    assert done.code == -signal.SIGKILL
    assert project.status()["state"] == "running"  # nobody could write anything else
    assert "state     killed" in project.run("status", "run").out
    mlflow_run = read_json(project.run_dir().path / "mlflow.json")["run_id"]
    assert MlflowClient(store).get_run(mlflow_run).info.status == "KILLED"

    go_on(project)
    client = MlflowClient(store)
    with tracker.lock(project.run_dir()).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as if the tracker before were still at work
        with project.running(*SIZE, *JOB, "--resume") as command:
            assert command.end() == 0
            assert "MLflow upload is unfinished" in command.err
            assert "upload unfinished" in project.run("status", "run").out
            assert "not all in MLflow" in project.run("runs", ".").out
            assert client.get_run(mlflow_run).info.status == "KILLED"
            lock.close()
            check_finished(project, command.wait(), uninterrupted)
    assert "mlflow    " + mlflow_run in project.run("status", "run").out.splitlines()
    assert project.status()["mlflow_run_id"] == mlflow_run
    assert client.get_run(mlflow_run).info.status == "FINISHED"
    assert [metric.step for metric in client.get_metric_history(mlflow_run, "val_loss")] == [5, 10]


SCRIPT = """
import sys
import torch
from torch.utils.data import DataLoader
from dtrain import Trainer
import data, net

torch.manual_seed(0)
model = net.Net(gate=7)
trainer = Trainer(model, torch.nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=float(sys.argv[1])))
trainer.fit(DataLoader(data.points(40), batch_size=8, shuffle=True), epochs=2)
print("trained to the end")
"""


OWN_LOOP = """
import sys
import torch
from torch.utils.data import DataLoader
from dtrain import Ranks
import data, net

torch.manual_seed(0)
ranks = Ranks()
loader = ranks.shard(DataLoader(data.points(40), batch_size=8, shuffle=True))
model = ranks.wrap(net.Net(gate=7))
optimizer = torch.optim.SGD(model.parameters(), lr=float(sys.argv[1]))
for epoch in ranks.epochs(2, net=model, optimizer=optimizer):
    for features, target in loader:
        loss = torch.nn.functional.cross_entropy(model(features), target)
        optimizer.zero_grad()
        ranks.scale_loss(loss).backward()
        optimizer.step()
        ranks.log(train_loss=loss)
    ranks.report()
print("trained to the end")
"""


@pytest.mark.parametrize("script", [SCRIPT, OWN_LOOP], ids=["Trainer", "own loop"])
def test_a_script_stops_and_continues(script, project):
    project.write("train.py", script)
    done = stop(
        project, signal.SIGTERM, arguments=("launch", "--gpus", "2", "--run-dir", "run", "train.py", "--", "0.1")
    )
    check_stopped(project, done, 75)
    assert "trained to the end" not in done.out
    done = continue_as_told(project, done)
    assert done.code == 0, done.err
    assert "trained to the end" in done.out
    assert [row["step"] for row in project.run_dir().rows()] == [5, 10]


def test_an_uninterested_script_is_ended_by_a_signal(project):
    """One that runs no Trainer can't be asked for a checkpoint: it must not make the signal ineffective."""
    project.write("train.py", "import time\nopen('waiting', 'w').close()\ntime.sleep(1000)")
    with project.running("launch", "--gpus", "2", "--run-dir", "run", "train.py") as command:
        until_waiting(project, command)
        command.signal(signal.SIGTERM)
        done = command.wait()
    assert done.code == 128 + signal.SIGTERM
    assert project.status()["state"] == "killed"


def test_ctrl_c_twice_ends_a_script_that_does_not_listen(project):
    """The first is passed on to the ranks; the second ends what they make of it."""
    text = "import os, signal, time\n"
    text += "signal.signal(signal.SIGINT, lambda *_: open(f'asked-{os.environ[\"RANK\"]}', 'w').close())\n"
    text += "open(f'waiting-{os.environ[\"RANK\"]}', 'w').close()\nwhile True:\n    time.sleep(1)\n"
    project.write("train.py", text)
    with project.running("launch", "--gpus", "2", "--run-dir", "run", "train.py") as command:
        for word in ("waiting", "asked"):
            command.until(lambda word=word: all((project.folder / f"{word}-{rank}").exists() for rank in (0, 1)))
            command.signal(signal.SIGINT)
        done = command.wait()
    assert done.code == 130
    assert "SIGINT: passed on to the ranks; repeat to end at once" in done.err
    assert "Traceback" not in done.err
    assert project.status()["state"] == "killed"
