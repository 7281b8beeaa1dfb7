"""What the command line says and does when a checkpoint can't be used, or can't be written."""

from __future__ import annotations

import signal
import socket
import sys

import pytest
from command import Command
from training import timeless

from dtrain.files import read_json
from dtrain.trainer.checkpoint.manager import saved

RUN = ("launch", "--gpus", "2", "--run-dir", "run", "job.yaml")
RESUME = ("launch", "--resume", "--gpus", "2", "--run-dir", "run", "job.yaml")
NAMES = [f"step-{5 * epoch:09d}-epoch-{epoch:04d}" for epoch in range(1, 5)]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_a_damaged_checkpoint_is_passed_over_and_none_at_all_is_exit_2(project):
    done = project.run(*RUN)
    assert done.code == 0, done.err
    run = project.run_dir()
    rows = run.rows()
    flip(run.checkpoints / NAMES[1] / "rank-1.bin")
    done = project.run(*RESUME, "fit.epochs=3")
    assert done.code == 0, done.err
    said = "is skipped: rank-1.bin is damaged: its checksum differs from SHA256SUMS; continuing from"
    assert f"checkpoint {project.folder}/run/checkpoints/{NAMES[1]} {said} {NAMES[0]}\n" in done.err
    assert done.err.count("is skipped") == 1
    for row, before in zip(run.rows()[:2], rows, strict=True):  # epoch 2 is done again
        assert timeless(row) == timeless(before)
    assert [path.name for path in saved(run)] == NAMES[1:3]

    for path in saved(run):
        (path / "rank-0.bin").unlink()
    for _ in range(2):  # the second time as well
        done = project.run(*RESUME, "fit.epochs=4")
        assert done.code == 2, done.err
        assert "Traceback" not in done.err
        for name in NAMES[1:3]:
            assert f"run/checkpoints/{name}: rank-0.bin is missing\n" in done.err
        assert "no other checkpoint is left to continue from" in done.last_lines
    status = project.status()
    assert (status["state"], status["exit_code"], status["error"]["type"]) == ("failed", 2, "ResumeError")
    assert [row["epoch"] for row in run.rows()] == [1, 2, 3]  # nothing is lost
    assert project.run("status", "run").out.count("rank-0.bin is missing") == 2


SCRIPT = """
import sys
import torch
from torch.utils.data import DataLoader
from dtrain import Trainer
import data, net

torch.manual_seed(0)
model = net.Net(width=int(sys.argv[1]))
optimizer = getattr(torch.optim, sys.argv[2])(model.parameters(), lr=0.1)
trainer = Trainer(model, torch.nn.CrossEntropyLoss(), optimizer)
trainer.fit(DataLoader(data.points(40), batch_size=8, shuffle=True), epochs=int(sys.argv[3]))
"""


@pytest.mark.campaign
def test_a_script_that_was_changed_does_not_continue_with_what_does_not_fit(project):
    project.write("train.py", SCRIPT)
    words = ("launch", "--gpus", "1", "--run-dir", "run", "train.py", "--")
    assert project.run(*words, "4", "SGD", "1").code == 0
    cases = {
        ("8", "SGD"): "a checkpoint of another model: layers.0.weight is (4, 4) in the file, (8, 4) in the model",
        ("4", "Adam"): "a checkpoint with optimizer SGD, this run has Adam",
    }
    for changed, said in cases.items():
        done = project.run(words[0], "--resume", *words[1:], *changed, "2")
        assert done.code == 2, done.err
        assert "Traceback" not in done.err
        assert said in done.last_lines
    assert [path.name for path in saved(project.run_dir())] == NAMES[:1]
    assert project.run(words[0], "--resume", *words[1:], "4", "SGD", "2").code == 0


def test_a_stop_without_a_checkpoint_is_not_called_one(project):
    with project.running(*RUN, "model.gate=7") as command:
        command.until((project.folder / "waiting").exists)
        command.until(project.run_dir().latest.exists)
        command.signal(signal.SIGTERM)
        command.until(lambda: "stopping at the next step" in command.err)
        checkpoints = project.run_dir().checkpoints
        checkpoints.rename(checkpoints.with_name("elsewhere"))
        checkpoints.write_text("not a folder")
        project.write("go", "")
        done = command.wait()
    assert done.code == 1, done.err
    step = project.status()["step"]
    assert (
        f"can't write checkpoint step-{step:09d}: Not a directory (on {socket.gethostname()}); training goes on"
        in done.err
    )
    assert f"failed: stopped at step {step}, but the checkpoint could not be written" in done.last_lines
    assert "Traceback" not in done.err
    assert project.status()["exit_code"] == 1


FAILING = """
import sys, time
import torch
from torch.utils.data import TensorDataset
from dtrain import Trainer
from dtrain.trainer.checkpoint.manifest import HashedFile
import data, net

close = HashedFile.__exit__

def slow_close(*arguments):
    open("writing", "w").close()
    time.sleep(0.5)
    return close(*arguments)

HashedFile.__exit__ = slow_close

class Net(net.Net):
    def forward(self, x):
        if self.training and self.calls == 5:
            import os
            while not os.path.exists("writing"):
                time.sleep(0.01)
            raise ValueError("in epoch 2")
        return super().forward(x)

model = Net()
trainer = Trainer(model, torch.nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1), run_dir="run")
trainer.fit(torch.utils.data.DataLoader(data.points(40), batch_size=8), epochs=2)
"""


def test_a_script_that_fails_while_a_checkpoint_is_written_ends_as_it_fails(project):
    """In plain python, where an interpreter that ends with a thread in native code would abort."""
    project.write("train.py", FAILING)
    done = Command([sys.executable, "train.py"], project.folder, project.environment).wait()
    assert done.code == 1
    assert done.err.splitlines()[-1] == "ValueError: in epoch 2"
    assert [path.name for path in saved(project.run_dir())] == NAMES[:1]  # and the checkpoint is whole
    assert read_json(project.run_dir().status_file)["state"] == "failed"
