"""A rank that fails, in every way that a rank can: the cause on the screen, exit code 1, nothing left running."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from command import Command
from mlflow import MlflowClient

from dtrain.trainer.checkpoint.manager import saved

FAULTS = '''
import ctypes
import os
import signal
import sys

from torch import nn

import data
import net

BOOM = "the flux capacitor is empty"


def value_error():
    raise ValueError(BOOM)


def memory_error():
    raise MemoryError


def long_message():
    raise RuntimeError("\\n".join(["the first line", *["between"] * 100, BOOM]))


def sys_exit():
    sys.exit(9)


def os_exit():
    print("no fuel left")
    os._exit(9)


def sigkill():
    os.kill(os.getpid(), signal.SIGKILL)


def segfault():
    ctypes.string_at(0)


def strike(fault):
    if os.environ["RANK"] == "1":
        globals()[fault]()


class Net(net.Net):
    """Fails in its rank 1 when it is made, or in a training step (from 0)."""

    def __init__(self, fault, step=None):
        super().__init__()
        self.fault, self.step = fault, step
        if step is None:
            strike(fault)

    def forward(self, x):
        if self.training and self.calls == self.step:
            strike(self.fault)
        return super().forward(x)


class Points:
    """A dataset that fails in rank 1 after some of its samples."""

    def __init__(self, fault, after):
        self.points, self.fault, self.left = data.points(40), fault, after

    def __len__(self):
        return 40

    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0:
            strike(self.fault)
        return self.points[index]
'''


def model(fault, step=None):
    return {"model": {"_target_": "faults.Net", "fault": fault, "step": step}}


def dataset(fault, after, **data):
    points = {"_target_": "faults.Points", "fault": fault, "after": after}
    return {"data": {"train": points, "batch_size": 8, **data}}


BOOM = "the flux capacitor is empty"
# By name: number of ranks, what differs in the job, what the screen must say, status.json's error.type.
CASES = {
    "init": (2, model("value_error"), f"ValueError: {BOOM}", "ValueError"),
    "forward-first-step": (2, model("value_error", 0), f"ValueError: {BOOM}", "ValueError"),
    "forward-later-of-3": (3, model("value_error", 7), f"ValueError: {BOOM}", "ValueError"),
    "dataset": (2, dataset("value_error", 10), f"ValueError: {BOOM}", "ValueError"),
    "loading-process": (2, dataset("value_error", 10, workers=1), BOOM, "ValueError"),
    "long-message": (2, model("long_message", 1), BOOM, "RuntimeError"),
    "memory-error": (2, model("memory_error", 3), "failed: MemoryError", "MemoryError"),
    "sys.exit-of-3": (3, model("sys_exit", 0), "exit code 9", "SystemExit"),
    "os._exit": (2, model("os_exit", 7), "exit code 9", "SystemExit"),
    "SIGKILL-of-3": (3, model("sigkill", 7), "SIGKILL", "SIGKILL"),
    "SIGKILL-first-step": (2, dataset("sigkill", 0), "SIGKILL", "SIGKILL"),
    "SIGSEGV": (2, model("segfault", 0), "SIGSEGV", "SIGSEGV"),
}

FRESH = {"forward-first-step", "SIGKILL-first-step"}  # an interpreter for each rank


TRACKED = "sys.exit-of-3"  # MLflow takes seconds


@pytest.fixture(scope="module")
def outcomes(new_project, store):
    """Each case's project and end. Two run at a time, since much of a launch is waiting."""

    def run(name):
        num_ranks, changed, *_ = CASES[name]
        project = new_project(name)
        project.write("faults.py", FAULTS)
        project.job(**changed)
        # A checkpoint in the middle of the epoch: what fails later must not take it along.
        arguments = ["launch", "--gpus", str(num_ranks), "--run-dir", "run", "job.yaml", "checkpoint.every=3"]
        tracked = {"MLFLOW_TRACKING_URI": store} if name == TRACKED else {}
        return project, project.run(*arguments, *["--no-preload"] * (name in FRESH), **tracked)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(run, CASES), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_cause_is_named(name, outcomes):
    _, _, says, kind = CASES[name]
    project, done = outcomes[name]  # its end, and that of all its processes
    assert done.code == 1, done.err
    assert done.out == ""
    assert "rank 1 failed" in done.last_lines, done.err
    assert says in done.last_lines, done.err
    for noise in ("Connection reset", "Connection closed", "gloo", "torch/distributed", "/dtrain/", "launcher/"):
        assert noise not in done.err

    status = project.status()
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert set(status["error"]) == {"rank", "host", "type", "message", "traceback"}
    assert (status["error"]["rank"], status["error"]["type"]) == (1, kind)
    assert says.removeprefix("failed: ").removeprefix(f"{kind}: ") in f"{kind} {status['error']['message']}"


def test_the_users_own_lines_are_shown(outcomes):
    """Those of the user's code, not those of torch and of dtrain; the log has them all."""
    project, done = outcomes["forward-later-of-3"]
    assert 'faults.py", line' in done.last_lines
    assert "raise ValueError(BOOM)" in project.status()["error"]["traceback"]
    assert "Traceback" not in done.err
    assert 'faults.py", line' in outcomes["SIGSEGV"][1].last_lines  # as faulthandler has them
    log = project.run_dir().rank_log(1).read_text()
    assert "Traceback (most recent call last)" in log
    assert str(project.run_dir("run").rank_log(1).relative_to(project.folder)) in done.last_lines


def test_a_place_is_shown_for_an_exit_code(outcomes):
    """Where sys.exit was called; where nobody knows, the end of the log may say why."""
    assert "sys.exit(9)" in outcomes["sys.exit-of-3"][1].last_lines
    assert "the end of its log:\nno fuel left\n" in outcomes["os._exit"][1].last_lines


def test_an_error_in_a_loading_process_is_shown_as_it_was(outcomes):
    lines = outcomes["loading-process"][1].last_lines.splitlines()
    shown = lines[lines.index(f"rank 1 failed: ValueError: {BOOM}") :]
    frames = [line for line in shown if line.startswith("  File ")]
    assert "in loading process 0" in shown
    assert frames
    assert all("faults.py" in line for line in frames)


# Rank 2 sees the failure of its collective and leaves, as programs do; rank 0 wraps it. Then rank 1 leaves early, and
# then before it has met the others.
BLAME = """
import os
import sys

import torch
import torch.distributed as dist

from dtrain.trainer.distributed.world import join_world

rank = int(os.environ["RANK"])
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "2" and rank == 1:
    sys.exit()
join_world("cpu")
try:
    if rank == 1:
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "1":
            os._exit(0)
        raise RuntimeError("Connection reset by peer: Broken pipe in gloo")
    dist.all_reduce(torch.ones(1))
except RuntimeError as error:
    if rank == 2:
        sys.exit(1)
    elif rank == 0:
        raise ValueError("the step failed") from error
    raise
"""


def test_victims_are_not_blamed(project):
    project.write("blame.py", BLAME)
    done = project.run("launch", "--gpus", "3", "--max-restarts", "2", "--run-dir", "run", "blame.py")
    assert done.code == 1
    first, second, third = [line for line in done.err.splitlines() if " failed: " in line]
    assert first == "rank 1 failed: RuntimeError: Connection reset by peer: Broken pipe in gloo"
    assert second.startswith("rank 1 failed: it left with exit code 0 at ")
    assert 'blame.py", line' in done.err.partition(second)[2].partition(third)[0]  # where another was left alone
    assert third.startswith("rank 1 failed: it left with exit code 0 at ")
    assert third.endswith(" was waiting for it to join")
    assert project.status()["error"]["type"] == "LeftEarly"


# Runs the launcher here. All ranks end between its look at them and what it does next.
LATE = """
import time

from dtrain.launcher.agent.supervisor import Supervisor
from dtrain.launcher.commands import launch
from dtrain.launcher.commands.request import RankOptions, Request

look = Supervisor._look


def look_and_wait(self):
    look(self)
    while self.cause is None and None in self.poll().values():
        time.sleep(0.02)


Supervisor._look = look_and_wait
launch.launch(Request(("train.py",), RankOptions("2"), run_dir="run"))
"""


def test_ranks_that_fail_behind_the_agents_back_have_failed(project):
    project.write("train.py", "import sys\nimport time\n\ntime.sleep(2)\nsys.exit(3)\n")
    project.write("late.py", LATE)
    done = Command([sys.executable, "late.py"], project.folder, project.environment).wait()
    assert project.status()["state"] == "failed", done.err
    assert "rank 0 failed: exit code 3" in done.err


def test_status_tells_the_same(outcomes):
    project, _ = outcomes["forward-later-of-3"]
    assert BOOM in json.loads(project.run_dir().rank_error(1).read_text())["message"]
    done = project.run("status", "run")
    assert "state     failed (exit code 1)" in done.out
    assert f"rank 1 failed: ValueError: {BOOM}" in done.out


def test_the_checkpoint_before_the_failure_stays(outcomes):
    project, _ = outcomes["os._exit"]
    # That of step 6 was being written two steps before the failure.
    names = [path.name for path in saved(project.run_dir())]
    assert names in (["step-000000003"], ["step-000000003", "step-000000006"])
    assert project.run_dir().latest.read_text().strip() in names
    assert [row["epoch"] for row in project.run_dir().rows()] == [1]


def test_mlflow_marks_the_run_as_failed(outcomes, store):
    project, _ = outcomes[TRACKED]
    assert MlflowClient(store).get_run(project.status()["mlflow_run_id"]).info.status == "FAILED"


def test_a_failed_run_continues_once_the_cause_is_gone(outcomes):
    project, _ = outcomes["forward-later-of-3"]
    code = project.run_dir().code / "faults.py"  # the run's own copy is what counts
    code.write_text(code.read_text().replace("raise ValueError(BOOM)", "pass"))
    done = project.run("launch", "--gpus", "3", "--resume", "job.yaml", "--run-dir", "run", "checkpoint.every=3")
    assert done.code == 0, done.err
    status = project.status()
    assert (status["state"], status["error"], status["restarts"]) == ("finished", None, 1)
    assert [row["epoch"] for row in project.run_dir().rows()] == [1, 2]
    assert not project.run_dir().rank_error(1).exists()
