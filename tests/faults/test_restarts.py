"""`fit.restarts`: ranks that have failed are started again, from the last checkpoint, as if they had not."""

from __future__ import annotations

import pytest
from training import timeless

MODEL = """
import os
from pathlib import Path

import net


class Net(net.Net):
    '''Fails in its rank 1 in the third forward pass that it trains with, so many times.'''

    def __init__(self, failures, error="ValueError"):
        super().__init__()
        self.failures, self.error = failures, error

    def forward(self, x):
        if self.training and self.calls == 2 and os.environ["RANK"] == "1":
            times = Path("times")
            count = int(times.read_text()) if times.exists() else 0
            if count < self.failures:
                times.write_text(str(count + 1))
                if self.error == "SIGKILL":
                    os.kill(os.getpid(), 9)
                raise ValueError("not now")
        return super().forward(x)
"""
LAUNCH = ("launch", "--gpus", "2", "--run-dir", "run", "job.yaml", "fit.restarts=2", "checkpoint.every=1")


@pytest.fixture
def job(project):
    project.write("failing.py", MODEL)
    project.job(model={"_target_": "failing.Net", "failures": 0})
    return project


def results(project, name):
    """Rows without how fast they were, and the weights' bytes."""
    rows = [timeless(row) for row in project.run_dir(name).rows()]
    return rows, project.run_dir(name).last_weights.read_bytes()


def test_a_run_that_was_started_again_is_as_one_that_never_failed(job):
    done = job.run(*LAUNCH, "model.failures=2", "model.error=SIGKILL")
    assert done.code == 0, done.err
    assert done.err.count("restarting the ranks, from the last checkpoint") == 2
    assert done.err.count("rank 1 failed: ") == 2
    assert done.err.count("epoch 1  step 5") == 1  # not shown again
    assert (job.status()["state"], job.status()["restarts"], job.status()["error"]) == ("finished", 2, None)
    assert job.run("launch", "--gpus", "2", "--run-dir", "whole", "job.yaml", "checkpoint.every=1").code == 0
    assert results(job, "run") == results(job, "whole")


@pytest.mark.campaign
def test_in_the_end_the_cause_is_the_headline(job):
    done = job.run(*LAUNCH, "model.failures=9")
    assert done.code == 1
    assert (job.folder / "times").read_text() == "3"
    assert "rank 1 failed: ValueError: not now" in done.last_lines
    assert (job.status()["state"], job.status()["restarts"]) == ("failed", 2)


def test_what_another_start_does_not_mend_is_final(job):
    job.write("wrong.py", "def empty():\n    return []\n")
    done = job.run(*LAUNCH, "data.train={_target_: wrong.empty}")
    assert done.code == 1
    assert "restarting the ranks" not in done.err
    assert "is empty" in done.last_lines
