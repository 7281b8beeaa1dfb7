"""`launch(function, gpus=2)` in a notebook's kernel, where torch is loaded and threads run."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from notebook import Notebook

from dtrain.launcher.call.mailbox import Mailbox
from dtrain.run.folder import RunDir

DEFINITIONS = """
import os, threading, time
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from dtrain import Trainer, launch
import beside

class Net(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        self.gate = gate
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        if self.training and self.calls == self.gate:
            open("waiting", "w").close()
            while not os.path.exists("go"):
                time.sleep(0.02)
        return self.layers(x)

def begin(gate=0):
    torch.manual_seed(0)
    net = Net(gate)
    x = torch.randn(40, 4)
    return net, torch.optim.SGD(net.parameters(), lr=0.1), TensorDataset(x, (x[:, 0] > 0).long())

def train(gate=0):
    net, optimizer, points = begin(gate)
    trainer = Trainer(net, nn.CrossEntropyLoss(), optimizer)
    trainer.fit(DataLoader(points, batch_size=8), epochs=2)
    return net

def loop():
    net, optimizer, points = begin()
    for epoch in range(2):
        for x, y in DataLoader(points, batch_size=8):
            optimizer.zero_grad()
            nn.CrossEntropyLoss()(net(x), y).backward()
            optimizer.step()
    return net

def wait(factor):
    print("sleeping")
    time.sleep(600 * factor)

class Unsendable(Exception):
    def __init__(self):
        super().__init__("no pickle holds it")
        self.lock = threading.Lock()

def fail():
    if os.environ["RANK"] == "1":
        raise Unsendable
    time.sleep(600)

def meet(value):
    dist.init_process_group()
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, Point(dist.get_rank(), value))
    dist.destroy_process_group()
    try:
        launch(meet, 1, gpus=2)
    except Exception as error:
        refusal = str(error)
    print("met", beside.VALUE)
    return parts, refusal

class Point:
    def __init__(self, rank, value):
        self.rank, self.value = rank, value

lock = threading.Lock()

def critical():
    with lock:
        return 1

def locked():
    return critical()

def generated():
    return (number for number in range(3))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "beside.py").write_text("VALUE = 7\n")
    return folder


@pytest.fixture(scope="module")
def notebook(folder):
    with Notebook.opened(folder) as notebook:
        assert notebook.run(DEFINITIONS).error is None
        yield notebook


def test_ranks_meet_and_return_what_they_found(notebook):
    """Classes of the notebook are the same there, on the way between ranks, and back."""
    cell = notebook.run("answers = launch(meet, value=torch.ones(2), gpus=2)")
    assert cell.error is None, cell
    assert "[rank 0] met 7\n" in cell.text
    assert "[rank 1]" not in cell.text
    assert "2 CPU processes instead" in cell.text
    shown = notebook.run(
        "print([[(type(part) is Point, part.rank, part.value.tolist()) for part in parts] for parts, _ in answers])"
    )
    parts = [(True, 0, [1.0, 1.0]), (True, 1, [1.0, 1.0])]
    assert shown.text == f"{[parts, parts]}\n"
    assert "(rank 1 of 2): call the function itself" in notebook.run("print(answers[1][1])").text


def test_a_training_that_is_interrupted_goes_on_to_what_a_plain_loop_computes(notebook, folder):
    cell = notebook.start("nets = launch(train, 7, gpus=2, run_dir='run')")
    notebook.until(cell, (folder / "waiting").exists)
    notebook.interrupt()
    notebook.until(cell, lambda: "SIGINT: stopping at the next step, with a checkpoint" in cell.text)
    (folder / "go").touch()
    notebook.until(cell, lambda: cell.is_over)
    assert cell.error == ("KeyboardInterrupt", "")
    assert "continue with: launch(train, ..., run_dir='run', resume=True)" in cell.text
    notebook.await_others()
    status = RunDir(folder / "run").status()
    assert (status["state"], status["exit_code"], status["epoch"]) == ("stopped", 130, 2)

    assert notebook.run("nets = launch(train, gpus=2, run_dir='run', resume=True)").error is None
    assert RunDir(folder / "run").status()["state"] == "finished"
    assert [row["epoch"] for row in RunDir(folder / "run").rows()] == [1, 2]
    weights = "print([[p.tolist() for p in net.parameters()] for net in (*nets, loop())])"
    first, second, plain = json.loads(notebook.run(weights).text)
    assert first == second
    for trained, expected in zip(first, plain, strict=True):
        torch.testing.assert_close(torch.tensor(trained), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_the_first_rank_to_fail_is_raised_with_the_cells_own_lines(notebook):
    name, message = notebook.run("launch(fail, gpus=2, run_dir='failed')").error
    assert name == "RanksFailed"
    lines = message.splitlines()
    assert lines[0] == "rank 1 failed: Unsendable: no pickle holds it"
    assert lines[2] == "    raise Unsendable"
    assert lines[-1] == "log: failed/logs/rank-1.log"
    assert len(lines) == 5
    notebook.await_others()


def test_what_can_not_be_sent_is_named(notebook):
    kept = {
        "launch(locked, gpus=2)": "lock, which critical uses, (lock) can't be sent to another process: "
        "TypeError: cannot pickle '_thread.lock' object; create it inside locked instead",
        "launch(meet, lock, gpus=2)": "argument 1 (lock) can't be sent to another process: "
        "TypeError: cannot pickle '_thread.lock' object; create it inside meet instead",
        "launch(meet, 1, gpu=2)": "meet does not take these arguments: got an unexpected keyword argument 'gpu'; "
        "did you mean gpus?",
        "launch(meet, 1, gpus='0')": "--gpus 0: expected a number above 0, or auto",
        "launch(meet, 1, gpus=2, show_ranks='2')": "--show-ranks 2: there is no rank 2; the last is 1",
    }
    for code, message in kept.items():
        assert notebook.run(code).error == ("UserError", message)
    name, message = notebook.run("launch(generated, gpus=1)").error
    assert (name, message.splitlines()[0]) == (
        "RanksFailed",
        "rank 0 failed: the function returned what can't be sent to another process (a generator; "
        "TypeError: cannot pickle 'generator' object); return numbers, tensors or a state_dict",
    )


def test_a_call_is_in_no_file_and_nobody_elses():
    with Mailbox.opened() as mailbox:
        for path in astuple(mailbox):
            assert os.readlink(path).startswith("/memfd:dtrain-")
            assert Path(path).parent.stat().st_mode & 0o077 == 0
            if os.getuid() == 0:  # only then can one be another user
                done = subprocess.run(["cat", path], user=65534, capture_output=True, text=True)
                assert "Permission denied" in done.stderr


def test_an_interrupt_ends_what_is_no_training_and_a_second_one_anything(notebook, folder):
    cell = notebook.start("launch(wait, 1, gpus=2)")
    notebook.until(cell, lambda: "sleeping" in cell.text)
    notebook.interrupt()
    notebook.until(cell, lambda: cell.is_over)
    assert cell.error == ("KeyboardInterrupt", "")
    notebook.await_others()

    for file in ("waiting", "go"):
        (folder / file).unlink(missing_ok=True)
    cell = notebook.start("launch(train, 1, gpus=2, run_dir='twice')")  # and never gets to its next step
    notebook.until(cell, (folder / "waiting").exists)
    notebook.interrupt()
    notebook.until(cell, lambda: "repeat to end at once" in cell.text)
    notebook.interrupt()
    notebook.until(cell, lambda: cell.is_over)
    assert cell.error == ("KeyboardInterrupt", "")
    assert RunDir(folder / "twice").status()["state"] == "killed"
    notebook.await_others()


def test_nothing_outlives_the_kernel(notebook):
    cell = notebook.start("launch(wait, 1, gpus=2)")
    notebook.until(cell, lambda: "sleeping" in cell.text)
    assert len(notebook.others()) > 2  # the agent, the fork server, the ranks
    notebook.kill()
    notebook.await_others()
