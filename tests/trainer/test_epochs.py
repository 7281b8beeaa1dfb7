"""Ranks.epochs: what it refuses, and what a script may do around it."""

from __future__ import annotations

import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from dtrain import Ranks
from dtrain.errors import UserError
from dtrain.run.folder import RunDir
from dtrain.run.heartbeat import Heartbeat
from dtrain.trainer import fit_folder
from dtrain.trainer.distributed.stop import Stopped


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")


class Script:
    """A script's beginning."""

    def __init__(self, micro_batch_size: int | None = None, batch_size: int = 4) -> None:
        torch.manual_seed(0)
        self.ranks = Ranks(device="cpu")
        loader = DataLoader(TensorDataset(torch.randn(8, 3)), batch_size=batch_size)
        self.data = self.ranks.shard(loader, micro_batch_size=micro_batch_size)
        self.net = self.ranks.wrap(nn.Linear(3, 1))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)

    def epochs(self, count: int = 2, **given: Any) -> Any:
        return self.ranks.epochs(count, **{"net": self.net, "optimizer": self.optimizer, **given})

    def train(self) -> None:
        for (features,) in self.data:
            self.optimizer.zero_grad()
            self.ranks.scale_loss(self.net(features).square().mean()).backward()
            self.optimizer.step()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 0}, "epochs: expected|epochs: .*0"),
        ({"checkpoint_every": "now"}, "every"),
        ({"patience": 0}, "patience"),
        ({"net": nn.Linear(3, 1)}, "net, a Linear, was not returned by Ranks.wrap"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, "optimizer trains none of the parameters of net"),
        ({"extra": 3}, "extra is a int, without state_dict"),
    ],
    ids=str,
)
def test_what_is_refused_before_the_first_epoch(given, message):
    with pytest.raises(UserError, match=message):
        Script().epochs(**given)


def test_a_loop_needs_its_optimizer_and_all_wrapped_models():
    script = Script()
    with pytest.raises(UserError, match="needs the optimizer too"):
        script.ranks.epochs(2, net=script.net)
    script.ranks.wrap(nn.Linear(2, 2))
    with pytest.raises(UserError, match="was not given the Linear that"):
        script.epochs()


def test_what_is_refused_within_the_loop():
    script = Script()
    for name in ("log", "report"):
        with pytest.raises(UserError, match=f"Ranks.{name} is for the lines in a loop over Ranks.epochs"):
            getattr(script.ranks, name)(val_loss=1.0)
    for _ in script.epochs(1):
        with pytest.raises(UserError, match="make the loaders before the loop"):
            script.ranks.shard(DataLoader(TensorDataset(torch.zeros(4, 3)), batch_size=2))
        with pytest.raises(UserError, match="val_loss is a str, expected a number"):
            script.ranks.report(val_loss="low")
        with pytest.raises(UserError, match="there is another value called step"):
            script.ranks.report(step=1)
        script.train()


def test_a_step_by_a_loss_that_was_not_scaled_is_refused():
    script = Script()
    for _ in script.epochs(1):
        script.optimizer.step()  # between the epochs' batches it is the script's own affair
        for (features,) in script.data:
            script.net(features).square().mean().backward()
            with pytest.raises(UserError, match="the SGD has made a step by a loss that was not scaled"):
                script.optimizer.step()
    next(iter(script.data))
    script.optimizer.step()


def test_gradients_that_are_added_up_over_batches_are_not_lost_by_a_stop(monkeypatch):
    for name, is_stopped in (("one", False), ("two", True), ("two", False)):
        monkeypatch.setattr(fit_folder, "_fits", {})  # as in another process
        script, batches = Script(batch_size=1), 0
        with pytest.raises(Stopped) if is_stopped else nullcontext():
            for _ in script.epochs(1, run_dir=name, resume=True, checkpoint_every=3):
                for (features,) in script.data:
                    batches += 1
                    if is_stopped and batches == 2:
                        Heartbeat(RunDir(name).heartbeat(0)).stop = signal.SIGTERM
                    script.ranks.scale_loss(script.net(features).square().mean()).backward()
                    if features[0, 0] > 0:  # the fifth sample, and the seventh
                        script.optimizer.step()
                        script.optimizer.zero_grad()
                script.ranks.report(val_loss=1.0)
        assert batches == {"one": 8, "two": 5 if is_stopped else 3}[name]
    found = [torch.load(RunDir(name).last_weights)["weight"] for name in ("one", "two")]
    assert torch.equal(*found)


def test_a_monitor_that_is_never_reported_is_refused_after_the_first_epoch():
    script = Script()
    epochs = script.epochs(monitor="val_acc")
    assert next(epochs) == 1
    script.train()
    script.ranks.report(val_loss=1.0)
    with pytest.raises(UserError, match="no row of epoch 1 has val_acc"):
        next(epochs)


def test_micro_batches_need_a_loop_that_asks_where_the_batch_ends():
    script = Script(micro_batch_size=2)
    with pytest.raises(UserError, match="does not ask where it ends"):
        script.train()
    (features,) = next(batches := iter(script.data))
    with pytest.raises(UserError, match="its `units` are not known"):
        script.ranks.scale_loss(script.net(features).mean(), units=2)
    batches.close()


def test_a_script_may_have_several_loops_and_leave_them(monkeypatch, capfd):
    """Each has a run folder of its own; what is continued after `break` comes again from the last checkpoint."""
    script = Script()
    average = AveragedModel(script.net)
    for epoch in script.epochs(3, run_dir="first", average=average):
        script.train()
        average.update_parameters(script.net)
        script.ranks.report(val_loss=1 / epoch)
        if epoch == 2:
            break
    for epoch in script.epochs(2, run_dir="second", average=average):
        script.train()
        script.ranks.report(val_loss=float(epoch))
    assert [row["step"] for row in RunDir("first").rows()] == [2, 4]
    assert [row["step"] for row in RunDir("second").rows()] == [2, 4]
    monkeypatch.setattr(fit_folder, "_fits", {})  # as in another process
    again = Script()
    again.net.bias.requires_grad_(False)
    seen = AveragedModel(again.net)
    assert list(again.epochs(2, run_dir="second", resume=True, average=seen)) == []
    assert torch.equal(again.net.weight, script.net.weight)
    assert again.net.bias.requires_grad
    assert "requires_grad of bias is what it was when the run was saved" in capfd.readouterr().err
    assert int(seen.n_averaged) == 2


NAN = float("nan")


@pytest.mark.parametrize(
    ("given", "values", "ended"),
    [
        ({"patience": 2}, [3, 2, 2.5, 2.4, 1.9], 4),
        ({"patience": 2, "min_delta": 0.5}, [3, 2.8, 2.6, 1.0], 3),
        ({"patience": 1, "mode": "max"}, [1, 2, 2, 3], 3),
        ({"threshold": 2.0}, [3, 2, 1], 2),
        ({"stop_on_nan": True}, [3, NAN, 1], 2),
        ({}, [1, NAN, 2], 3),
    ],
    ids=str,
)
def test_a_loop_ends_early_with_the_epoch_whose_row_says_so_and_stays_ended(given, values, ended, monkeypatch, capfd):
    """Rows are made amid the training, and the second run is stopped right after the one that ends it."""
    for name, is_stopped in (("one", False), ("two", True), ("two", False)):
        monkeypatch.setattr(fit_folder, "_fits", {})  # as in another process
        script = Script()
        with pytest.raises(Stopped) if is_stopped else nullcontext():
            for epoch in script.epochs(len(values), run_dir=name, resume=True, **given):
                reported = None
                for (features,) in script.data:
                    script.optimizer.zero_grad()
                    script.ranks.scale_loss(script.net(features).square().mean()).backward()
                    script.optimizer.step()
                    reported = reported or script.ranks.report(val_loss=values[epoch - 1])
                    if is_stopped and epoch == ended:
                        Heartbeat(RunDir(name).heartbeat(0)).stop = signal.SIGTERM
    for name in ("one", "two"):
        assert [row["epoch"] for row in RunDir(name).rows() if row["step"] % 2] == [n + 0.5 for n in range(ended)]
        assert torch.equal(torch.load(RunDir(name).last_weights)["weight"], script.net.weight)
    assert capfd.readouterr().err.count("stopping early, after step") == (0 if ended == len(values) else 2)
    monkeypatch.setattr(fit_folder, "_fits", {})
    assert list(Script().epochs(len(values), run_dir="one", resume=True, **given)) == []


def test_what_ends_a_loop_early_must_be_reported():
    script = Script()
    epochs = script.epochs(patience=3)
    assert next(epochs) == 1
    script.train()
    with pytest.raises(UserError, match="no row of epoch 1 has val_loss"):
        next(epochs)


def test_a_row_has_the_speed_of_the_training_and_the_rate_of_its_last_step():
    script = Script()
    scheduler = torch.optim.lr_scheduler.StepLR(script.optimizer, 1, gamma=0.5)
    validated = []
    for _ in script.epochs(2, scheduler=scheduler):
        began = time.perf_counter()
        script.train()
        trained_s = time.perf_counter() - began
        scheduler.step()
        time.sleep(0.2)  # is no training
        row = script.ranks.report(val_loss=1.0)
        assert row["samples_per_s"] >= 8 / trained_s
        validated.append(script.ranks.report(val_loss=2.0)["samples_per_s"])
    [run] = (RunDir(path) for path in Path("runs").iterdir())
    assert [row["lr"] for row in run.rows()] == [0.1, 0.1, 0.05, 0.05]
    assert validated == [None, None]
