"""The moving average of the weights: its formula, its evaluation, its file, and its way through a stop."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from marks import campaign
from torch import nn
from training import Job, Samples, differences, epoch_order, final_state, train

from dtrain.run.folder import RUN_DIR_VARIABLE, RunDir
from dtrain.run.heartbeat import Heartbeat
from dtrain.schema.sections import Fsdp

SEED, DECAY, BATCH, EPOCHS, NUM_TRAIN, NUM_VAL = 2, 0.8, 8, 3, 30, 13
STRATEGIES: dict[str, Any] = {
    "ddp": "ddp",
    "fsdp": Fsdp(),  # all parameters are the root's, which an evaluation leaves gathered
    "ZeRO 2": {"zero_optimization": {"stage": 2}},
}


def parts() -> tuple[nn.Module, torch.optim.Optimizer, Samples, Samples]:
    torch.manual_seed(SEED)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    samples = (Samples(torch.randn(n, 4), torch.randn(n, 1)) for n in (NUM_TRAIN, NUM_VAL))
    return net, torch.optim.SGD(net.parameters(), lr=0.2), *samples


def job(strategy: str, stop_after: int | None = None) -> Job:
    net, optimizer, train_set, val_set = parts()
    steps = iter(range(1, 100))

    def stop(*_: Any) -> None:
        if next(steps) == stop_after:
            Heartbeat(RunDir(os.environ[RUN_DIR_VARIABLE]).heartbeat(0)).stop = signal.SIGTERM

    optimizer.register_step_post_hook(stop)
    trainer = {"net": net, "loss_fn": nn.MSELoss(), "optimizer": optimizer, "seed": SEED, "ema": DECAY}
    trainer["strategy"] = STRATEGIES[strategy]
    fit = {"epochs": EPOCHS, "monitor": "ema_loss", "mode": "max"}  # which prefers the first epochs
    return {"trainer": trainer, "train": train_set, "val": val_set, "batch_size": BATCH, "fit": fit}


@pytest.fixture(scope="module")
def plain_loop() -> tuple[list[dict[str, float]], list[dict[str, torch.Tensor]]]:
    """By epoch, the losses of weights and average, and the average."""
    net, optimizer, train_set, val_set = parts()
    average = {name: value.clone() for name, value in net.state_dict().items()}
    rows, averages = [], []
    for epoch in range(1, EPOCHS + 1):
        for chosen in epoch_order(NUM_TRAIN, SEED, epoch).split(BATCH):
            loss = nn.functional.mse_loss(net(train_set.features[chosen]), train_set.target[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for name, value in net.state_dict().items():
                average[name] = DECAY * average[name] + (1 - DECAY) * value
        with torch.no_grad():
            val = nn.functional.mse_loss(net(val_set.features), val_set.target).item()
            predictions = torch.func.functional_call(net, average, val_set.features)
            ema = nn.functional.mse_loss(predictions, val_set.target).item()
        rows.append({"val_loss": val, "ema_loss": ema})
        averages.append(dict(average))
    return rows, averages


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("world_size", [campaign(1), 3])
def test_the_average_is_that_of_a_plain_loop(world_size, strategy, plain_loop, tmp_path):
    expected, averages = plain_loop
    rows = train(world_size, tmp_path, job, strategy)[0][0]
    for row, other in zip(rows, expected, strict=True):
        assert {name: row[name] for name in other} == pytest.approx(other, rel=1e-5)
    best = max(range(EPOCHS), key=lambda epoch: expected[epoch]["ema_loss"])
    run = RunDir(tmp_path)
    for file, average in ((run.ema_weights, averages[-1]), (run.best_weights, averages[best])):
        found = torch.load(file, weights_only=True)
        assert list(found) == list(average)
        for name, value in average.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert not torch.equal(torch.load(run.last_weights, weights_only=True)["0.weight"], found["0.weight"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_stopped_run_goes_on_with_its_average(strategy, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(2, whole, job, strategy)
    assert train(2, cut, job, strategy, 5) == [None, None]
    train(2, cut, job, strategy)
    assert differences(final_state(whole), final_state(cut)) == []
    one, other = (torch.load(RunDir(folder).ema_weights, weights_only=True) for folder in (whole, cut))
    assert differences(one, other) == []


def test_a_job(project):
    project.job(fit={"epochs": 2, "ema": 0.9, "early_stopping": {"monitor": "ema_loss"}})
    done = project.run("launch", "--gpus", "2", "--run-dir", "run", "job.yaml")
    assert done.code == 0, done.err
    assert "ema_loss" in done.err
    run = RunDir(project.folder / "run")
    assert run.ema_weights.exists()
    assert all(row["ema_loss"] > 0 for row in run.rows())
