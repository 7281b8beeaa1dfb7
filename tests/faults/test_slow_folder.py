"""A run folder that a slow server shares, without locks: a step does not notice, and nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from command import PATIENCE_S
from training import timeless

from dtrain.errors import UserError
from dtrain.run.folder import RunDir
from dtrain.trainer.checkpoint.manager import saved
from dtrain.trainer.checkpoint.manifest import read_manifest, verify

PROGRAM = Path(__file__).with_name("slow_folder.py")
GATE = 10  # the step that waits for a stop
HOLD = "/checkpoints/.step-000000020"  # where a checkpoint is written, upon which the disk stands until step 38
JOB = ("launch", "--gpus", "2", "job.yaml")

COUNTING_NET = """
import os
import torch
from net import Net


class CountingNet(Net):
    def __init__(self, gate=0):
        super().__init__(gate=gate)
        self.register_buffer("steps", torch.tensor(0))
        with open("ranks", "a") as file:
            file.write(f"{os.getpid()}\\n")

    def forward(self, x):
        self.steps += self.training
        if self.steps == 38:
            open("until", "w").close()
        return super().forward(x)
"""


@dataclass(frozen=True)
class Shown:
    """A slow folder, where it is shown, and what was asked of it."""

    place: Path
    log: Path

    def operations(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def slow(tmp_path_factory: pytest.TempPathFactory, project) -> Iterator[Shown]:
    """Without FUSE the test is skipped, except where DTRAIN_NEED_FUSE says that it must not be."""
    folder = tmp_path_factory.mktemp("slow")
    disk, place, log, errors = (folder / name for name in ("disk", "shared", "log", "errors"))
    disk.mkdir()
    place.mkdir()
    command = [sys.executable, PROGRAM, disk, place, log, HOLD, project.folder / "until"]
    with errors.open("w") as stderr, subprocess.Popen(command, stdin=subprocess.PIPE, stderr=stderr) as server:
        while not os.path.ismount(place):
            if server.poll() is not None:
                why = errors.read_text().strip().splitlines()[-1]
                if os.environ.get("DTRAIN_NEED_FUSE"):
                    pytest.fail(f"no FUSE, which DTRAIN_NEED_FUSE demands: {why}")
                pytest.skip(f"no FUSE: {why}")
            time.sleep(0.02)
        yield Shown(place, log)
        server.stdin.close()
        assert server.wait(PATIENCE_S) == 0, errors.read_text()


def history(run: RunDir):
    return [timeless(row) for row in run.rows()]


def weights(run: RunDir) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in run.best_weights.parent.iterdir()}


def checkpoints(run: RunDir) -> list[str]:
    """The names of what lies there; each checkpoint is whole."""
    for folder in saved(run):
        index, sums = read_manifest(folder)
        verify(folder, sums, sums, index["files"])
    return sorted(path.name for path in run.checkpoints.iterdir())


def test_a_stop_and_its_continuation_on_a_slow_folder_without_locks(slow, project):
    project.write("counting.py", COUNTING_NET)
    project.job(
        model={"_target_": "counting.CountingNet"},
        data={
            "train": {"_target_": "data.points", "size": 480},
            "val": {"_target_": "data.points", "size": 12},
            "batch_size": 8,
        },
        fit={"epochs": 1},
        checkpoint={"every": 20},
    )
    run = RunDir(slow.place / "run")
    launch = (*JOB, "--run-dir", str(run), f"model.gate={GATE}")
    with project.running(*launch) as command:
        command.until((project.folder / "waiting").exists)
        assert run.writer().pid == command.pid
        with pytest.raises(UserError, match=f"is being written by process {command.pid} on"), run.lock():
            pass
        command.signal(signal.SIGTERM)
        command.until(lambda: "stopping at the next step" in command.err)
        project.write("go", "")
        stopped = command.wait()
    assert stopped.code == 75, stopped.err
    assert "is on a file system without locks" in stopped.err
    assert run.status()["state"] == "stopped"
    (project.folder / "ranks").unlink()
    done = project.run(*launch, "--resume")
    assert done.code == 0, done.err
    assert run.status()["state"] == "finished"

    # From the checkpoint of step 20 to step 38 the disk stood. Neither the ranks nor their agent waited for it: only
    # threads of theirs did, those of ranks for that checkpoint alone.
    assert "in vain" not in slow.operations()
    held = [line.split(" ", 4)[1:] for line in slow.operations() if line.startswith("held")]
    assert not [operation for operation in held if operation[0] == operation[1]]
    ranks = (project.folder / "ranks").read_text().split()
    paths = [path for process, _, _, path in held if process in ranks]
    assert paths
    assert all(HOLD in path for path in paths), paths

    ordinary = project.run(*JOB, "--run-dir", "run")
    assert ordinary.code == 0, ordinary.err
    assert history(run) == history(project.run_dir())
    assert weights(run) == weights(project.run_dir())
    assert checkpoints(run) == checkpoints(project.run_dir())
