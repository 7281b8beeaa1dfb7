"""`dtrain launch --gpus 2 train.py`: any torchrun script, unchanged."""

from __future__ import annotations

import json

import pytest
import torch

REPORT = """
import json
import multiprocessing
import os
import sys

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import beside


class Squares:  # not picklable from elsewhere: __main__ is this script
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return index**2


dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"]
names += ["TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"]
report = {
    "environment": {name: os.environ.get(name) for name in names},
    "argv": sys.argv,
    "name": __name__,
    "file": __file__,
    "path": sys.path[0],
    "cwd": os.getcwd(),
    "total": total.item(),
    "bad_fork": torch.cuda._is_in_bad_fork(),
    "start_method": multiprocessing.get_start_method(allow_none=True),
    "loaded": list(DataLoader(Squares(), num_workers=1, collate_fn=lambda batch: batch[0])),
    "is_main_module": sys.modules["__main__"].__dict__.get("Squares") is Squares,
}
with open(f"report-{dist.get_rank()}.json", "w") as file:
    json.dump(report, file)
print("from rank", dist.get_rank())
print("to stderr of rank", dist.get_rank(), file=sys.stderr)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def project(new_project):
    project = new_project("scripts")
    (project.folder / "code").mkdir()
    project.write("code/beside.py", "")
    project.write("code/train.py", REPORT)
    return project


@pytest.fixture(scope="module")
def done(project):
    return project.run("launch", "--gpus", "2", "--run-dir", "run", "code/train.py", "--", "--lr", "0.1", "key=value")


@pytest.fixture(scope="module")
def reports(done, project):
    assert done.code == 0, done.err
    return [json.loads((project.folder / f"report-{rank}.json").read_text()) for rank in (0, 1)]


def test_the_environment_is_torchruns(reports):
    for rank, report in enumerate(reports):
        environment = report["environment"]
        assert (environment["RANK"], environment["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (environment["WORLD_SIZE"], environment["LOCAL_WORLD_SIZE"]) == ("2", "2")
        assert environment["GROUP_RANK"] == "0"
        assert not [name for name, value in environment.items() if value is None]
        assert report["total"] == 2


def test_it_runs_as_python_runs_a_script(reports, project):
    for report in reports:
        assert report["argv"] == ["code/train.py", "--lr", "0.1", "key=value"]
        assert (report["name"], report["file"]) == ("__main__", "code/train.py")
        assert report["path"] == str(project.folder / "code")
        assert report["cwd"] == str(project.folder)
        assert report["is_main_module"]


def test_cuda_is_untouched_before_the_fork(reports):
    assert torch.version.cuda is not None, "without CUDA in torch, nothing is tested here"
    assert [report["bad_fork"] for report in reports] == [False, False]


def test_loading_processes_start_as_without_us(reports):
    """So that a dataset and a collate that do not pickle work where they do under torchrun."""
    for report in reports:
        assert report["start_method"] is None
        assert report["loaded"] == [0, 1, 4, 9]


def test_rank_0_is_shown_on_stdout(done, project):
    assert done.out.splitlines() == ["from rank 0", "to stderr of rank 0"]
    assert "from rank" not in done.err
    assert "finished; logs in run;" in done.err  # no Trainer, so no weights to speak of
    assert "from rank 1" in project.run_dir().rank_log(1).read_text()
    assert project.status()["state"] == "finished"


def test_a_jobs_modules_are_not_in_a_bad_fork_either(project):
    text = (project.folder / "net.py").read_text()
    check = "import torch\n\nassert not torch.cuda._is_in_bad_fork(), 'CUDA was touched'\n"
    # torchmetrics and torchvision are imported before the fork where the job names them.
    project.write("net.py", check + "import torchvision\n" + text)
    metric = "metrics.acc={_target_: torchmetrics.Accuracy, task: multiclass, num_classes: 2}"
    done = project.run("launch", "--gpus", "2", "--run-dir", "job", "job.yaml", "fit.epochs=1", metric)
    assert done.code == 0, done.err


TRAINER = """
import sys
import torch
from torch.utils.data import DataLoader
from torchmetrics import Accuracy
from dtrain import Trainer
import data, net

torch.manual_seed(0)
model = net.Net()
trainer = Trainer(
    model,
    torch.nn.CrossEntropyLoss(),
    torch.optim.SGD(model.parameters(), lr=float(sys.argv[2])),
    {"acc": Accuracy(task="multiclass", num_classes=2)},
)
history = trainer.fit(DataLoader(data.points(40), batch_size=8, shuffle=True), epochs=2)
print(len(history), "epochs")
"""


def test_a_script_with_a_trainer(project):
    project.write("train.py", TRAINER)
    done = project.run("launch", "--gpus", "2", "--run-dir", "trainer", "train.py", "--", "--lr", "0.1")
    assert done.code == 0, done.err
    assert done.out == "2 epochs\n"
    run = project.run_dir("trainer")
    assert [(row["epoch"], row["step"], row["lr"]) for row in run.rows()] == [(1, 5, 0.1), (2, 10, 0.1)]
    assert (project.status("trainer")["state"], project.status("trainer")["step"]) == ("finished", 10)
    assert torch.load(run.best_weights, weights_only=True).keys() == {
        f"layers.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")
    }
    assert (run.code / "train.py").read_text() == TRAINER


def test_a_scripts_own_exit_code(project):
    project.write("exit.py", "import os, sys\nprint('working')\nsys.exit(3 if os.environ['RANK'] == '1' else 0)\n")
    done = project.run("launch", "--gpus", "2", "--run-dir", "exit", "exit.py")
    assert done.code == 1
    assert done.out == "working\n"
    assert "rank 1 failed: exit code 3" in done.last_lines


def test_a_script_that_says_why_it_ends(project):
    """As in `sys.exit("no data")`, which python prints and turns into exit code 1."""
    project.write("why.py", "import sys\nsys.exit('there is no data')\n")
    done = project.run("launch", "--run-dir", "why", "why.py")
    assert done.code == 1
    assert "rank 0 failed: there is no data" in done.last_lines


def test_a_missing_script(project):
    done = project.run("launch", "--run-dir", "missing", "tarin.py")
    assert (done.code, done.out, done.err) == (2, "", "no such file: tarin.py\n")
    assert not (project.folder / "missing").exists()
