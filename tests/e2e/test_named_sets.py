"""Several validation and test sets by their names: what a job and a script report of each."""

from __future__ import annotations

import json
import os

import pytest
import torch
from ranks import count_collectives, run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Accuracy
from training import prepare

from dtrain import Trainer, load_weights
from dtrain.errors import UserError
from dtrain.run.folder import RUN_DIR_VARIABLE

SIZES = {"clean": 12, "noisy": 13}
METRICS = {"acc": {"_target_": "torchmetrics.Accuracy", "task": "multiclass", "num_classes": 2}}


def points(size):
    x = torch.randn(size, 4, generator=torch.Generator().manual_seed(size))
    return TensorDataset(x, (x[:, 0] > 0).long())


def expected(net, phase):
    """The sets' results by a plain loop."""
    values = {}
    for name, size in SIZES.items():
        x, y = points(size).tensors
        with torch.no_grad():
            predictions = net(x)
        values[f"{phase}_{name}_loss"] = nn.functional.cross_entropy(predictions, y).item()
        values[f"{phase}_{name}_acc"] = (predictions.argmax(1) == y).float().mean().item()
    return {name: pytest.approx(value, rel=1e-6) for name, value in values.items()}


def test_a_job_reports_each_set(project):
    sets = {name: {"_target_": "data.points", "size": size} for name, size in SIZES.items()}
    data = {"train": {"_target_": "data.points", "size": 40}, "val": sets, "test": sets, "batch_size": 8}
    fit = {"epochs": 2, "early_stopping": {"monitor": "val_noisy_loss"}}
    project.job(data=data, metrics=METRICS, fit=fit, launch={"device": "cpu"})
    done = project.run("launch", "--gpus", "2", "--run-dir", "run", "job.yaml")
    assert done.code == 0, done.err
    run, holder = project.run_dir(), nn.Module()
    holder.layers = net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    load_weights(holder, run.last_weights)
    row = run.rows()[-1]
    assert {name: row[name] for name in row if name.startswith("val_")} == expected(net, "val")
    load_weights(holder, run.best_weights)
    assert project.status()["test"] == expected(net, "test")
    assert f"val_noisy_loss {row['val_noisy_loss']:.4g}" in done.err
    assert f"val_noisy_loss {row['val_noisy_loss']:.4g}" in project.run("runs", ".").out
    for name, values in (("val", expected(net, "val")), ("test.noisy", expected(net, "test"))):
        own = {key: value for key, value in values.items() if key.startswith(name.replace(".", "_"))}
        answer = project.run("evaluate", "run", "--gpus", "1", "--data", name)
        assert json.loads(answer.out) == own, answer.err
    for command, says in (
        (("predict", "run", "val"), "data.val has several sets; name one: val.clean, val.noisy"),
        (("evaluate", "run", "--data", "val.nosy"), "expected one of the job's datasets; did you mean val.noisy?"),
    ):
        refused = project.run(*command)
        assert (refused.code, says in refused.err) == (2, True), refused.err


def own_step(model, batch):
    features, target = batch
    predictions = model(features)
    log = {"b_loss": 1.0} if len(target) else {}
    return {"loss": nn.functional.cross_entropy(predictions, target), "log": log}


def fit(rank, world_size, folder):
    os.environ[RUN_DIR_VARIABLE] = folder
    torch.manual_seed(0)
    net = nn.Linear(4, 2)
    trainer = Trainer(
        net,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(net.parameters(), lr=0.1),
        {"acc": Accuracy(task="multiclass", num_classes=2)},
        device="cpu",
    )
    val = {name: DataLoader(points(size), batch_size=8) for name, size in SIZES.items()}
    history = trainer.fit(DataLoader(points(40), batch_size=8), val, epochs=2, monitor="val_clean_acc", mode="max")
    with count_collectives() as several:
        values = trainer.evaluate(val, "far")
    with count_collectives() as one:
        trainer.evaluate(val["clean"])
    beyond = {name: several[name] - count for name, count in one.items()}
    return history.to_dict("records")[-1], values, net.state_dict(), beyond


def test_a_script_reports_each_set_in_one_synchronisation(tmp_path):
    prepare(tmp_path, 2)
    for row, values, state, beyond in run_ranks(2, fit, str(tmp_path)):
        net = nn.Linear(4, 2)
        net.load_state_dict(state)
        assert {name: row[name] for name in row if name.startswith("val_")} == expected(net, "val")
        assert values == expected(net, "far")
        # Another set costs the comparison of what the ranks were given, and nothing else.
        assert {name: count for name, count in beyond.items() if count} == {"all_gather_object": 1}


def test_what_a_script_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    net = nn.Linear(4, 2)
    loader = DataLoader(points(8), batch_size=8)

    def attempt(val, **options):
        metrics = {"acc": Accuracy(task="multiclass", num_classes=2)}
        trainer = Trainer(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.1), metrics, device="cpu")
        trainer.fit(loader, val, epochs=1, run_dir=tmp_path / "run", **options)

    for val, options, says in (
        ({"a": loader, "b": loader}, {}, "monitor: missing; with several validation sets, name what"),
        ({"a": loader, "b": loader}, {"monitor": "val_loss"}, "nothing is reported as val_loss; did you mean val_"),
        ({"a": loader, "a b": loader}, {"monitor": "val_a_loss"}, "a set's name consists of letters, digits and '_'"),
        ({"a": loader, "b": loader}, {"monitor": "val_b_acc"}, "is min, but higher is better for val_b_acc"),
        ({}, {}, "data.val: a dict without a set in it"),
    ):
        with pytest.raises(UserError, match=says):
            attempt(val, **options)
    # Values that only the steps know.
    trainer = Trainer(net, None, torch.optim.SGD(net.parameters(), lr=0.1), step=own_step, device="cpu")
    sets = {"a": loader, "a_b": loader}
    with pytest.raises(UserError, match="two sets report val_a_b_loss, one of them is val_a_b: rename it, or the val"):
        trainer.fit(loader, sets, epochs=1, run_dir=tmp_path / "own", monitor="val_a_loss")
