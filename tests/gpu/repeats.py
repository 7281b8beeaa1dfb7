"""Runs that are made again, or stopped and continued."""

from __future__ import annotations

from pathlib import Path

from checks import Job, Place, apart, below, check
from training import differences, final_state

STOPPED = ("model.acts=raises", "model.at=12")  # in the second epoch, after a checkpoint
CURVES = ("train_loss", "val_loss")


def stopped_and_continued(place: Place, name: str, *settings: str) -> Job:
    """A run that failed at a step, and went on from its last checkpoint."""
    job = Job(place, name, *STOPPED, *settings)
    job.train_until_it_fails()
    job.go()
    job.train("--resume")
    return job


def uninterrupted(place: Place, name: str, *settings: str) -> Job:
    job = Job(place, name, *STOPPED, *settings)
    job.go()
    job.train()
    return job


@check(7, "deterministic: the same bits twice, and through a stop", limit_s=150)
def deterministic(place: Place) -> str:
    one, other = (uninterrupted(place, name, "fit.deterministic=true") for name in ("one", "other"))
    stopped = stopped_and_continued(place, "stopped", "fit.deterministic=true")
    for name, job in (("a second run", other), ("a stop", stopped)):
        found = differences(end_of(job), end_of(one))
        assert not found, f"{name} differs in {len(found)} values, {found[0]} among them"
    return "the same bits"


@check(8, "resume with dropout: the same curve", limit_s=120)
def dropout(place: Place) -> str:
    expected = uninterrupted(place, "straight").run.rows()
    found = stopped_and_continued(place, "stopped").run.rows()
    without = uninterrupted(place, "other", "model.dropout=0.5").run.rows()
    # Kernels add in any order; other masks would be a hundred times as far off.
    assert apart(without, expected, CURVES) > 1e-2, "dropout makes no difference to this job"
    return below("curves", apart(found, expected, CURVES), 1e-3)


def end_of(job: Job) -> object:
    return final_state(Path(job.run.path))
