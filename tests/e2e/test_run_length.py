"""Jobs whose values refer to others: what a run does with `${run.steps}`, with overrides, and when it goes on."""

from __future__ import annotations

import math

import pytest
import yaml
from command import JOB, STEPS

from dtrain.run.folder import RunDir

# The learning rate of each step, in a file for each rank.
PARTS = """
import os
import torch
from torch.utils.data import IterableDataset


class Recording(torch.optim.SGD):
    def step(self, closure=None):
        with open(f"rates-{os.environ['RANK']}", "a") as file:
            print(self.param_groups[0]["lr"], file=file)
        return super().step(closure)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.zeros(4), torch.tensor(0)
"""
COSINE = {
    "_target_": "torch.optim.lr_scheduler.CosineAnnealingLR",
    "_args_": ["${run.steps}"],
    "eta_min": "${optimizer.weight_decay}",
    "interval": "step",
}
RATE, LEAST = 0.1, 0.001


@pytest.fixture
def cosine(project):
    project.write("parts.py", PARTS)
    optimizer = {"_target_": "parts.Recording", "lr": RATE, "weight_decay": LEAST}
    project.job(optimizer=optimizer, scheduler=COSINE, model={"_target_": "net.Net", "width": "${data.batch_size}"})
    return project


def rates(project, rank: int = 0) -> list[float]:
    return [float(line) for line in (project.folder / f"rates-{rank}").read_text().splitlines()]


def curve(steps: int) -> list[float]:
    """The rates of a cosine over so many steps, by its formula."""
    return [LEAST + (RATE - LEAST) * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]


def test_the_runs_steps_are_the_same_on_any_number_of_ranks(cosine):
    """And an override reaches what refers to it; a run that goes on with more epochs follows their curve."""
    for gpus in (2, 1):
        done = cosine.run("launch", "--gpus", str(gpus), "--run-dir", f"run-{gpus}", "job.yaml", "fit.epochs=3")
        assert done.code == 0, done.err
        assert "warning: Cosine" not in done.err
        assert rates(cosine, gpus - 1) == pytest.approx(curve(3 * STEPS), rel=1e-9)
        (cosine.folder / "rates-0").unlink()
    run = RunDir(cosine.folder / "run-1")
    job = yaml.safe_load(run.job.read_text())
    assert job["model"]["width"] == JOB["data"]["batch_size"]
    assert job["scheduler"]["_args_"] == ["${run.steps}"]
    done = cosine.run("launch", "--resume", "--gpus", "1", "--run-dir", "run-1", "job.yaml", "fit.epochs=5")
    assert done.code == 0, done.err
    assert rates(cosine) == pytest.approx(curve(5 * STEPS)[3 * STEPS :], rel=1e-9)


def test_a_stream_without_a_length_has_no_number_of_steps(cosine):
    done = cosine.run("launch", "--gpus", "1", "job.yaml", "data.train={_target_: parts.Endless}", "data.val=null")
    assert done.code == 1
    assert "scheduler._args_.0: Endless has no length, so run.steps cannot be" in done.last_lines
    assert not (cosine.folder / "rates-0").exists()
