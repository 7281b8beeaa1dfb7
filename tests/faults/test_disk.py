"""A disk that refuses: said once, training goes on, the last good checkpoint stays, and what is missing follows."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from training import Job, Samples, differences, final_state, train

from dtrain.run.folder import RUN_DIR_VARIABLE, RunDir
from dtrain.run.heartbeat import Heartbeat
from dtrain.trainer.checkpoint.manager import saved

STEPS, EPOCHS, WORST_FROM = 2, 5, 4  # the best epoch is the one before
BEGINS, ENDS = STEPS + 1, 4 * STEPS + 1  # in the first steps of epochs 2 and 5


def run_dir() -> RunDir:
    return RunDir(os.environ[RUN_DIR_VARIABLE])


class SizeLimit:
    """No file of rank 0 may grow: as a quota does it."""

    reason = "File too large"

    def begin(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    def end(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class FullDisk:
    """The run's folder is a small file system, which somebody else fills."""

    reason = "No space left on device"

    def begin(self) -> None:
        with (run_dir().path / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass

    def end(self) -> None:
        (run_dir().path / "filler").unlink()


class ReadOnlyFolder:
    """The folder of the checkpoints, for root too."""

    reason = "Read-only file system"

    def begin(self) -> None:
        folder = str(run_dir().checkpoints)
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)

    def end(self) -> None:
        subprocess.run(["umount", "--lazy", str(run_dir().checkpoints)], check=True)


HOST = f" (on {socket.gethostname()})"
REMEDY = {"file size limit": HOST, "full disk": f"{HOST}; free some space", "read-only folder": HOST}
OUTAGES = {"file size limit": SizeLimit, "full disk": FullDisk, "read-only folder": ReadOnlyFolder}


def job(kind: str | None = None, ends: bool = True, stops: bool = False) -> Job:
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(6, 3000), nn.Tanh(), nn.Linear(3000, 2))  # 100 kB
    optimizer = torch.optim.Adam(net.parameters(), lr=0.001)
    outage = OUTAGES[kind]() if kind else None
    if dist.get_rank() == 0:
        sys.stderr = (run_dir().path.parent / "stderr").open("a")
    steps = 0

    def after_step(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps > (WORST_FROM - 1) * STEPS:
            with torch.no_grad():
                net[2].bias += torch.tensor([5.0, -5.0])
        if outage is None or dist.get_rank() != 0:
            return
        if steps == BEGINS:
            when_written(outage.begin)
        if steps == ENDS and ends:
            when_written(outage.end)
        if steps == BEGINS and stops:
            Heartbeat(run_dir().heartbeat(0)).stop = signal.SIGTERM

    optimizer.register_step_post_hook(after_step)
    features = torch.randn(10, 6)
    data = Samples(features, (features[:, 0] > 0).long())
    trainer = {"net": net, "loss_fn": nn.CrossEntropyLoss(), "optimizer": optimizer, "seed": 1}
    return {"trainer": trainer, "train": data, "val": data, "batch_size": 5, "fit": {"epochs": EPOCHS}}


def when_written(action: Callable[[], None]) -> None:
    """Do it at a known moment: while nothing is being written."""
    for thread in threading.enumerate():
        if thread.name == "dtrain-write":
            thread.join()
    action()


@pytest.fixture
def folder(tmp_path):
    """A run's folder on a file system of its own, if that can be had."""
    path = tmp_path / "run"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], capture_output=True, check=False)
    yield path
    if mounted.returncode == 0:
        subprocess.run(["umount", "--lazy", path / "checkpoints"], capture_output=True, check=False)
        subprocess.run(["umount", "--lazy", path], check=True)


def needs_mount(kind: str, folder: Path) -> None:
    if kind != "file size limit" and not folder.is_mount():
        pytest.skip("only root can mount a file system to fill or to make read-only")


def reported(folder: Path) -> list[str]:
    return (folder.parent / "stderr").read_text().splitlines()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(2, folder, job)
    assert reported(folder) == []
    found = final_state(folder)
    losses = [row["val_loss"] for row in found["rows"]]
    assert losses.index(min(losses)) == WORST_FROM - 2
    return found


@pytest.mark.parametrize("kind", OUTAGES)
def test_training_goes_on(kind, folder, plain):
    needs_mount(kind, folder)
    train(2, folder, job, kind)
    [line] = reported(folder)
    assert line.startswith(f"{folder}: can't write ")
    assert f": {OUTAGES[kind].reason}" in line
    assert f"{REMEDY[kind]}; training goes on, and the last good checkpoint is step-000000002-epoch-0001" in line
    found = final_state(folder)  # the best weights are those of an epoch that could not be written
    assert differences(found, plain) == []
    assert [path.name for path in saved(RunDir(folder))] == ["step-000000002-epoch-0001", "step-000000010-epoch-0005"]


@pytest.mark.parametrize("kind", OUTAGES)
def test_the_last_good_checkpoint_stays(kind, folder, plain):
    """A stop that can't be saved is none: the run continues from before, once there is room."""
    needs_mount(kind, folder)
    with pytest.raises(
        RuntimeError, match=r"stopped at step \d, but the checkpoint could not be written; the last good"
    ):
        train(2, folder, job, kind, False, True)
    if kind == "full disk":
        (folder / "filler").unlink()
    if kind == "read-only folder":
        subprocess.run(["umount", "--lazy", folder / "checkpoints"], check=True)
    run = RunDir(folder)
    assert [path.name for path in saved(run)] == ["step-000000002-epoch-0001"]
    assert run.latest.read_text() == "step-000000002-epoch-0001\n"
    assert len(reported(folder)) == 1
    train(2, folder, resumed_job)
    assert differences(final_state(folder)["rows"][1:3], plain["rows"][1:3]) == []


def resumed_job() -> Job:
    return job()


FILLING = """
import os
import threading
import time
from contextlib import suppress

import net


def fill():
    # Again and again: whatever is deleted makes room.
    with open("run/filler", "wb", buffering=0) as filler:
        while not os.path.exists("go"):
            with suppress(OSError):
                filler.write(bytes(4096))
                continue
            time.sleep(0.001)


class Net(net.Net):
    def forward(self, x):
        if self.training and self.calls == 6 and os.environ["RANK"] == "0":
            threading.Thread(target=fill).start()
        print("forward")
        return super().forward(x)
"""


def test_a_disk_that_fills_up_is_said_and_the_run_goes_on(folder, project):
    needs_mount("full disk", folder)
    project.write("filling.py", FILLING)
    project.job(model={"_target_": "filling.Net", "gate": 9})
    run = ["launch", "--gpus", "2", "--run-dir", "run/new", "job.yaml", "launch.device=cpu"]
    with project.running(*run, "fit.epochs=4") as command:
        command.until(
            lambda: (
                f"run/new: can't write status.json: No space left on device{HOST}; free some space; the run goes on"
                in command.err
            )
        )
        project.write("go", "")
        (folder / "filler").unlink()
        done = command.wait()
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    assert project.status("run/new")["state"] == "finished"
    assert [row["step"] for row in project.run_dir("run/new").rows()] == [5, 10, 15, 20]


def test_no_run_begins_on_a_full_disk(folder, project):
    needs_mount("full disk", folder)
    with (folder / "filler").open("wb", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(bytes(4096))
    done = project.run("launch", "--run-dir", str(folder / "new"), "job.yaml", "launch.device=cpu")
    assert done.code == 2
    assert done.err == f"{folder}/new cannot be used: No space left on device; choose another --run-dir\n"
    assert [path.name for path in folder.iterdir()] == ["filler"]


def test_results_that_can_not_be_written_in_the_end_are_an_error(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"training is done, but (best|last)\.pt, (best|last)\.pt could not be written in"
    ):
        train(1, tmp_path / "run", job, "file size limit", False)
    assert len(reported(tmp_path / "run")) == 1
