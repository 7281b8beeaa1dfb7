"""Several validation or test sets in job.yaml: what they are called, and what is refused."""

from __future__ import annotations

import pytest
import yaml

from dtrain.errors import UserError
from dtrain.schema.loading import dump_job, load_job

SET = {"_target_": "builtins.dict"}
JOB = {
    "name": "sets",
    "model": SET,
    "data": {"train": SET, "val": {"clean": SET, "noisy_2": SET}, "test": {"far": SET}, "batch_size": 8},
    "loss": SET,
    "optimizer": SET,
    "metrics": {"acc": SET},
    "fit": {"epochs": 1, "ema": 0.9, "early_stopping": {"monitor": "ema_noisy_2_acc"}},
}


@pytest.fixture
def write(tmp_path):
    def write(**changed):
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump({**JOB, **changed}))
        return path

    return write


def with_val(val):
    return {"data": {**JOB["data"], "val": val}}


def test_what_they_are(write, tmp_path):
    job = load_job(write()).job
    assert list(job.data.sets) == ["train", "val.clean", "val.noisy_2", "test.far"]
    assert job.phases == ["train", "val_clean", "val_noisy_2", "ema_clean", "ema_noisy_2"]
    again = tmp_path / "again.yaml"
    again.write_text(dump_job(job))
    assert load_job(again).job == job
    changed = load_job(write(), ["data.val.clean.size=3"]).job
    assert changed.data.sets["val.clean"].arguments == {"size": 3}
    # The loss of the only one, whether it has a name or not.
    only = load_job(write(**with_val({"clean": SET}), fit={"epochs": 1})).job
    assert only.monitor == "val_clean_loss"


REFUSED = {
    "no monitor": (
        {"fit": {"epochs": 1}},
        "fit.early_stopping.monitor: missing; with several validation sets, name what decides which weights are best: "
        "val_clean_loss, val_noisy_2_loss or another value",
    ),
    "an unknown monitor": (
        {"fit": {"epochs": 1, "early_stopping": {"monitor": "val_acc"}}},
        "fit.early_stopping.monitor: nothing is reported as val_acc; did you mean val_clean_acc?",
    ),
    "loss": (with_val({"loss": SET}), "data.val: a set is named loss, as the value val_loss is"),
    "odd": (with_val({"a.b": SET}), "data.val: a set's name consists of letters, digits and '_'"),
    "two meanings": (
        {**with_val({"a": SET, "a_b": SET}), "metrics": {"acc": SET, "b_acc": SET}},
        "data.val: val_a_b_acc would be both acc of val_a_b and a value of val_a; rename the set or the metric",
    ),
    "no target": (
        with_val({"clean": SET, "noisy": "data.noisy"}),
        "data.val.noisy: expected a mapping, found 'data.noisy'; write {_target_: data.noisy}",
    ),
    "an unknown argument": (with_val({"clean": {"_target_": "operator.add", "d": 1}}), "data.val.clean"),
    "nothing": (with_val({}), "data.val._target_: missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, write):
    changed, says = REFUSED[name]
    with pytest.raises(UserError) as refused:
        load_job(write(**changed), ["name=[]"])  # a mistake besides, so that all is checked
    assert any(says in str(problem) for problem in refused.value.problems), str(refused.value)
