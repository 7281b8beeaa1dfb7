"""`dtrain check --exact`: what differs between numbers of processes, and after a stop, on the job at hand."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml
from command import JOB, Project
from marks import campaign

UNREPEATABLE = """
import os
import torch
from torch.utils.data import Dataset

class Points(Dataset):
    def __init__(self, size):
        self.x = torch.randn(size, 4, generator=torch.Generator().manual_seed(size))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] + os.urandom(1)[0], int(self.x[index, 0] > 0)
"""

STREAM = """
import torch
from torch.utils.data import IterableDataset, get_worker_info

class Points(IterableDataset):
    def __init__(self, splits):
        self.splits = splits

    def __iter__(self):
        info = get_worker_info() if self.splits else None
        start, step = (info.id, info.num_workers) if self.splits else (0, 1)
        x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
        for i in range(start, 1000, step):
            yield x[i] + torch.rand(()), int(x[i, 0] > 0)
"""


def kept() -> set[str]:
    return {path.name for path in Path("/tmp").glob("dtrain-exact-*")}


def test_a_job_that_keeps_its_promises(project: Project):
    before = kept()
    project.job(optimizer={"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9})
    in_steps = ("fit.steps=500", "fit.validate_every=100", "fit.report_every=50 steps", "fit.max_time=1 s")
    done = project.run("check", "--exact", "job.yaml", "data.workers=1", *in_steps)
    assert done.code == 0, done.err
    for size in (2, 3):
        what = rf"^{size} processes against 1: largest difference in weights (.*), in reported values (.*)$"
        ((weights, values),) = re.findall(what, done.out, re.MULTILINE)
        for difference in (weights, values):
            assert difference == "none" or float(difference.split(" (")[0]) < 1e-5
    assert "2 processes, stopped after 3 steps and continued: bit-identical" in done.out
    assert "its own" not in done.out
    assert not project.runs()
    assert kept() == before


def test_what_cannot_be_repeated_is_seen(project: Project):
    project.write("points.py", UNREPEATABLE)
    project.write(
        "noisy.py", "from torch import nn\ndef net():\n    return nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2))\n"
    )
    data = {"train": {"_target_": "points.Points", "size": 100}, "batch_size": 8}
    project.job(model={"_target_": "noisy.net"}, data=data)
    done = project.run("check", "--exact", "job.yaml")
    assert done.code == 1
    assert re.search(r"stopped after 3 steps and continued: largest difference \d\.\de[+-]\d+ \(\w", done.out)
    assert "each process has its own Dropout" in done.out


@pytest.mark.parametrize("splits", [campaign(False), True])
def test_streams_are_cut_too(splits, project: Project):
    project.write("stream.py", STREAM)
    project.job(data={"train": {"_target_": "stream.Points", "splits": splits}, "batch_size": 8})
    done = project.run("check", "--exact", "job.yaml")
    assert done.code == 0, done.err
    assert "2 processes, stopped after 3 steps and continued: bit-identical" in done.out
    assert ("each process has its own part of the stream" in done.out) == splits
    largest = re.findall(r"largest difference in weights (\S+)", done.out)
    assert all((each != "none" and float(each) > 1e-3) == splits for each in largest)


def test_a_job_that_fails_leaves_its_log(project: Project):
    project.job(loss={"_target_": "torch.nn.MSELoss"})
    done = project.run("check", "--exact", "job.yaml")
    assert done.code == 1
    assert "rank 0 failed: the loss MSELoss would compare samples with each other's targets: " in done.last_lines
    log = Path(done.err.split("log: ")[-1].strip())
    assert "MSELoss" in log.read_text()


def test_what_check_finds_comes_first(project: Project):
    (project.folder / "job.yaml").write_text(yaml.safe_dump({**JOB, "optimizer": {"_target_": "torch.optim.SGDD"}}))
    done = project.run("check", "--exact", "job.yaml")
    assert done.code == 2
    assert "did you mean" in done.err
    assert not done.out
    assert os.listdir(project.folder)
