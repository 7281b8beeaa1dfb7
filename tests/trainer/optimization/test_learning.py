"""A run that learns nothing says so, and ends; what is no model, loss or optimizer is refused before it begins."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset
from training import prepare

from dtrain.errors import UserError
from dtrain.run.folder import RUN_DIR_VARIABLE
from dtrain.trainer.fit import loop as loops
from dtrain.trainer.trainer import Trainer

SIZE = 8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.factor = 1.0

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.linear(features) * (1.0 if self.training else self.factor)
        return out


def loader(target: float = 1.0) -> DataLoader[Any]:
    torch.manual_seed(0)
    features = torch.randn(SIZE, 2)
    return DataLoader(TensorDataset(features, torch.full((SIZE, 2), target)), batch_size=2)


def train(net: nn.Module, loss: Any, lr: float = 0.1, epochs: int = 2, **options: Any) -> list[dict[str, Any]]:
    own = list(loss.parameters()) if isinstance(loss, nn.Module) else []
    trainer = Trainer(net, loss, SGD([*net.parameters(), *own], lr=lr), device="cpu", **options)
    return trainer.train(loader(), loader(), epochs=epochs).progress.rows


@pytest.fixture(autouse=True)
def run(tmp_path, monkeypatch):
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path / "run"))
    return prepare(tmp_path / "run", 1)


def masked(predictions: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(predictions, target) * 0 + math.nan


@pytest.mark.parametrize("shown", [True, False])
def test_weights_that_are_no_numbers_end_the_run(shown, monkeypatch):
    if not shown:  # it is seen at the epoch's end, where nobody has looked at the loss before
        monkeypatch.setattr(loops, "LOOK_EVERY_S", math.inf)
    steps = "[1-4]" if shown else "4"
    with pytest.raises(UserError, match=f"the weights are not finite after steps? (1 to )?{steps}, .*learning rate"):
        train(Net(), nn.MSELoss(), lr=1e30)


def test_a_loss_from_which_nothing_is_learned_ends_the_run():
    message = "epoch 1, steps 1 to 4: train_loss is nan, .*the weights have not changed: nothing is learned"
    with pytest.raises(UserError, match=message):
        train(Net(), masked)


def test_a_loss_of_validation_that_is_no_number_ends_the_run():
    net = Net()
    net.factor = math.nan
    with pytest.raises(UserError, match="val_loss is nan; the weights are finite, so it is val_loss itself"):
        train(net, nn.MSELoss())


def test_a_loss_that_is_infinite_once_is_told_and_passed_over(capsys):
    net = Net()
    hits = iter([math.inf])

    def loss(predictions: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(predictions, target) + next(hits, 0.0)

    rows = train(net, loss)
    assert [math.isfinite(row["train_loss"]) for row in rows] == [False, True]
    assert "epoch 1, steps 1 to 4: train_loss is inf; the weights are finite, and training goes on" in (
        capsys.readouterr().err
    )


def sign(predictions: Tensor, target: Tensor) -> Tensor:
    return (predictions.sign() - target).square().mean()


def of_nothing_trained(predictions: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(predictions.detach(), target).requires_grad_()


class OfItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.ones(()))

    def forward(self, predictions: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(predictions.detach(), target) + self.offset.square()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (sign, "epoch 1, steps 1 to 4: the weights have not changed: nothing is learned; the loss has no"),
        (of_nothing_trained, "the loss depends on none of the model's parameters that this SGD trains"),
        (OfItself(), "the loss depends on none of the model's parameters that this SGD trains"),
    ],
)
def test_weights_that_no_step_changes_end_the_run(loss, message):
    with pytest.raises(UserError, match=message):
        train(Net(), loss)


def test_where_nothing_is_left_to_learn_is_said(capsys):
    rows = train(Net(), lambda predictions, target: (predictions * 0).mean())
    assert [row["train_loss"] for row in rows] == [0, 0]
    assert "the weights have not changed, and train_loss is 0: there is nothing to learn" in (capsys.readouterr().err)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([0, 0], "epoch 2, steps 5 to 8: the weights have not changed: nothing is learned; .*rate .0. is"),
        ([1, -1], "a learning rate is -0.1 after step 4, by the scheduler: it must be a positive number"),
        ([1, math.nan], "a learning rate is nan after step 4, by the scheduler: it must be a positive number"),
        ([0, 1], None),  # a warm-up
        ([1, -1e-9], None),  # rounded
    ],
)
def test_rates_that_a_scheduler_makes(factors, message):
    net = Net()
    optimizer = SGD(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: factors[min(epoch, 1)])
    trainer = Trainer(net, nn.MSELoss(), optimizer, scheduler=scheduler, device="cpu")
    before = net.linear.weight.detach().clone()
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        trainer.train(loader(), loader(), epochs=2)
    assert torch.equal(before, net.linear.weight) == (factors == [0, 0])


def test_rates_that_a_scheduler_makes_within_an_epoch():
    net = Net()
    optimizer = SGD([{"params": net.linear.weight}, {"params": net.linear.bias, "lr": 0.5}], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step)
    trainer = Trainer(net, nn.MSELoss(), optimizer, scheduler=scheduler, scheduler_interval="step", device="cpu")
    with pytest.raises(UserError, match=r"a learning rate is -0\.1 after step 2, by the scheduler"):
        trainer.train(loader(), loader(), epochs=1)


def of_all_ranks(rank: int, world_size: int, folder: str) -> list[str]:
    messages = []
    for i, (loss, lr) in enumerate([(nn.MSELoss(), 1e30), (detached, 0.1), (masked, 0.1), (sign, 0.1)]):
        os.environ[RUN_DIR_VARIABLE] = f"{folder}/{i}"
        torch.manual_seed(0)
        try:
            train(Net(), loss, lr=lr)
        except UserError as error:
            messages.append(str(error))
    return messages


def detached(predictions: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(predictions.detach(), target)


def test_all_ranks_say_the_same(tmp_path):
    for i in range(4):
        prepare(tmp_path / str(i), 2)
    first, second = run_ranks(2, of_all_ranks, str(tmp_path))
    assert first == second
    begin = ["the weights are not finite", "the loss does not depend", "epoch 1, steps 1 to 4: train_loss is nan"]
    begin.append("epoch 1, steps 1 to 4: the weights have not changed")
    assert all(message.startswith(expected) for message, expected in zip(first, begin, strict=True))


def parts(**changes: Any) -> dict[str, Any]:
    net = changes.pop("net", None) or Net()
    return {"net": net, "loss_fn": nn.MSELoss(), "optimizer": SGD(net.parameters(), lr=0.1), **changes}


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "a dataset": (lambda: parts() | {"net": TensorDataset(torch.zeros(1))}, "model: TensorDataset is not a model"),
    "a model's class": (lambda: parts() | {"net": Net}, "model: Net is a class"),
    "a loss's class": (lambda: parts(loss_fn=nn.MSELoss), r"loss: MSELoss is a class: .*MSELoss\(\)"),
    "a loss's name": (lambda: parts(loss_fn="mse"), "loss: str is not a loss"),
    "an optimizer's class": (lambda: parts(optimizer=SGD), r"SGD is a class: .*SGD\(net.parameters"),
    "no optimizer": (lambda: parts(optimizer=nn.Linear(1, 1)), "optimizer: Linear is no optimizer: it lacks step"),
    "another model's": (
        lambda: parts(optimizer=SGD(Net().parameters(), lr=0.1)),
        "optimizer: none of the 2 parameters of this SGD belongs to the Net",
    ),
    "frozen": (lambda: parts(net=Net().requires_grad_(False)), "all parameters of this SGD are frozen"),
    "metrics": (lambda: parts(metrics_dict=[nn.MSELoss()]), "metrics: a list of metrics has no names"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_of_another_kind_is_refused(kind):
    make, message = REFUSED[kind]
    with pytest.raises(UserError, match=message):
        Trainer(device="cpu", **make())


@pytest.mark.parametrize("rate", [math.nan, math.inf, 0.0])
def test_a_learning_rate_is_a_positive_number(rate):
    with pytest.raises(UserError, match=r"optimizer\.lr: .*learning rate is"):
        train(Net(), nn.MSELoss(), lr=rate)
