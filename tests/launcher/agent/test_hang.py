"""A rank that no longer moves: which one and where it stands is said, and the job ends."""

from __future__ import annotations

import os
import re
import signal

import pytest
from command import Project
from marks import campaign

from dtrain.files import read_json
from dtrain.launcher.agent.watchdog import Watchdog
from dtrain.launcher.rank import flight_recorder, stacks
from dtrain.run.heartbeat import Beat, Heartbeat, Phase

HANGS = """
import os
import signal
import time

import data, net


def stand():
    while True:
        time.sleep(0.01)


class Net(net.Net):
    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def forward(self, x):
        if self.calls == 3 and os.environ["RANK"] == "1":
            if self.fault == "forward":
                stand()
            if self.fault == "suspended":
                os.kill(os.getpid(), signal.SIGSTOP)
        return super().forward(x)


class Points:
    def __init__(self, hangs):
        self.points, self.hangs = data.points(40), hangs

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if self.hangs and os.environ["RANK"] == "1" and index >= 17:
            stand()
        return self.points[index]
"""

STUBBORN = """
import signal
import time

signal.signal(signal.SIGTERM, signal.SIG_IGN)
open("waiting", "w").close()
while True:
    time.sleep(0.1)
"""

# By name: what differs in the job, what the screen must say.
CASES = {
    "forward": ({}, "in its forward pass, epoch 1, after step 3"),
    "suspended": ({}, "in its forward pass, epoch 1, after step 3; the process is suspended"),
    "loading": ({"workers": 0}, "loading data, epoch 1, after step "),
    "loading process": ({"workers": 1}, "loading data, epoch 1, after step "),
}


@pytest.mark.parametrize("name", ["forward", "loading", campaign("suspended"), campaign("loading process")])
def test_the_rank_that_stands_is_named(name, project: Project):
    loading, says = CASES[name]
    project.write("hangs.py", HANGS)
    project.job(
        model={"_target_": "hangs.Net", "fault": name},
        data={"train": {"_target_": "hangs.Points", "hangs": bool(loading)}, "batch_size": 8, **loading},
        launch={"hang_timeout_s": 3},
    )
    done = project.run("launch", "--gpus", "2", "--run-dir", "run", "job.yaml")
    assert done.code == 1, done.err
    assert re.search(rf"rank 1 failed: has made no progress for \d+ s: {says}", done.last_lines), done.err
    assert "most recent call first" not in done.err
    if name != "suspended":
        assert re.search(r'hangs.py", line \d+ in stand', done.last_lines), done.err
        assert "in stand" in project.run_dir().rank_log(1).read_text()
    # The other rank's stack is in its log as well.
    assert "most recent call first" in project.run_dir().rank_log(0).read_text()
    assert project.status()["error"]["type"] == "Hang"


def test_what_torch_has_recorded_of_collectives_is_written(project: Project):
    """On GPUs it is recorded unasked."""
    project.write("hangs.py", HANGS)
    project.job(
        model={"_target_": "hangs.Net", "fault": "forward"},
        launch={"hang_timeout_s": 3},
    )
    done = project.run("launch", "--gpus", "2", "--run-dir", "run", "job.yaml", TORCH_FR_BUFFER_SIZE="100")
    assert done.code == 1, done.err
    files = [project.run_dir().flight_record(rank) for rank in range(2)]
    assert "; the ranks' last collectives: " + ", ".join(f"run/logs/{file.name}" for file in files) in done.last_lines
    entries = read_json(files[0])["gloo"]["entries"]
    assert {"gloo:all_reduce", "gloo:broadcast"} <= {entry["profiling_name"] for entry in entries}


def test_on_gpus_collectives_are_recorded_unless_the_user_has_said_otherwise():
    environment = {}
    flight_recorder.record(environment)
    assert int(environment["TORCH_FR_BUFFER_SIZE"]) > 0
    environment = {"TORCH_FR_BUFFER_SIZE": "0"}
    flight_recorder.record(environment)
    assert environment == {"TORCH_FR_BUFFER_SIZE": "0"}


def test_ranks_that_do_not_stop_when_asked_are_ended(project: Project):
    project.write("stubborn.py", STUBBORN)
    with project.running("launch", "--gpus", "2", "--run-dir", "run", "stubborn.py") as command:
        command.until((project.folder / "waiting").exists)
        command.signal(signal.SIGTERM)
        done = command.wait()
    assert done.code == 128 + signal.SIGTERM
    assert "Traceback" not in done.err
    assert project.status()["state"] == "killed"


def test_ranks_that_wait_for_their_devices_are_not_told_apart(tmp_path, monkeypatch):
    """Rank 0 alone looks at its device, and so stands still while others go on asking theirs for more."""
    monkeypatch.setattr(stacks, "request", lambda pid, log: [])
    heartbeats = {rank: Heartbeat(tmp_path / str(rank), create=True) for rank in range(2)}
    for rank, heartbeat in heartbeats.items():
        heartbeat.beat(Beat(epoch=1, epochs=2, step=7 + rank))
    heartbeats[0].enter(Phase.WAITING)
    error = Watchdog(heartbeats, timeout_s=0).explain({0: os.getpid(), 1: os.getpid()}, {0: tmp_path, 1: tmp_path})
    assert error["rank"] == 0
    assert "waiting for its device. All ranks are, but only this one checks" in error["message"]


class Watched(bytearray):
    """A heartbeat's bytes, which are read after each write: where the rank may be interrupted."""

    def __setitem__(self, place, numbers) -> None:
        super().__setitem__(place, numbers)
        self.seen.append(self.heartbeat.read().moved_ns > 0)


def test_a_rank_that_is_interrupted_in_a_beat_has_moved(tmp_path):
    heartbeat = Heartbeat(tmp_path / "0", create=True)
    heartbeat.beat(Beat(epoch=1, epochs=2))
    heartbeat._bytes = watched = Watched(heartbeat._bytes[:])
    watched.heartbeat, watched.seen = heartbeat, []
    heartbeat.beat(Beat(epoch=1, epochs=2, step=1))
    heartbeat.enter(Phase.FORWARD)
    assert watched.seen == [True] * 3
