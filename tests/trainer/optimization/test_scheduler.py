"""Schedulers: what they are fed, whether they last as long as the run, what of them is saved."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from shutil import rmtree
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import SWALR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from training import prepare

from dtrain.errors import UserError
from dtrain.run.folder import RUN_DIR_VARIABLE
from dtrain.schema.loading import load
from dtrain.trainer import fit_folder
from dtrain.trainer.trainer import Trainer

EPOCHS, STEPS = 3, 4


class Warmup(LRScheduler):
    """Keeps its curve as a function, which is no state."""

    def __init__(self, optimizer: Any, steps: int = 6) -> None:
        self.curve = lambda step: min(1.0, (step + 1) / steps)
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [base * self.curve(self.last_epoch) for base in self.base_lrs]


class OfItsOwn:
    """Looks at a value, as ReduceLROnPlateau does, without a base class."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.seen = optimizer, []

    def step(self, value: float) -> None:
        self.seen.append(value)
        self.optimizer.param_groups[0]["lr"] /= 1 + len(self.seen)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


class Odd(StepLR):
    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer, 1)
        self.curve = iter([1])


class Stream(IterableDataset):
    def __init__(self, samples: TensorDataset) -> None:
        self.samples = samples

    def __iter__(self) -> Any:
        return iter([self.samples[i] for i in range(len(self.samples))])


class ByEpoch(OfItsOwn):
    def step(self, epoch: int) -> None:  # type: ignore[override]
        pass


@pytest.fixture(autouse=True)
def restored_environment(monkeypatch):
    monkeypatch.setenv(RUN_DIR_VARIABLE, "")  # to be set by `fit`


def fit(folder: Any, make: Callable[..., Any], epochs: int = EPOCHS, **options: Any) -> list[float]:
    """The learning rate of each epoch's last step."""
    fit_folder._fits.clear()  # as in another process
    os.environ[RUN_DIR_VARIABLE] = str(folder)
    if not folder.exists():
        prepare(folder, 1)
    torch.manual_seed(0)
    net = nn.Linear(4, 2)
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
    samples = TensorDataset(torch.randn(STEPS * 2, 4), torch.zeros(STEPS * 2, dtype=torch.long))
    loader = DataLoader(Stream(samples) if options.pop("stream", False) else samples, batch_size=2)
    monitor = {name: options.pop(name) for name in ("monitor", "mode") if name in options}
    options = {"metrics_dict": {"acc": accuracy}, "device": "cpu", **options}
    trainer = Trainer(net, nn.CrossEntropyLoss(), optimizer, scheduler=make(optimizer), **options)
    loop = trainer.train(loader, loader, epochs=epochs, early_stopping=monitor)
    return [row["lr"] for row in loop.progress.rows]


def accuracy(predictions: torch.Tensor, target: torch.Tensor) -> float:
    return float((predictions.argmax(1) == target).float().mean())


# What is made of the optimizer, when it steps, and the rates of the steps by torch itself.
KINDS: dict[str, tuple[Callable[..., Any], str]] = {
    "own": (Warmup, "step"),
    "one cycle": (lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=EPOCHS * STEPS), "step"),
    "cyclic": (lambda optimizer: CyclicLR(optimizer, 0.01, 0.1, step_size_up=3), "step"),
    "lambda": (lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)), "step"),
    "averaging": (lambda optimizer: SWALR(optimizer, 0.01, anneal_epochs=2), "epoch"),
    "chained": (lambda optimizer: ChainedScheduler([LinearLR(optimizer), ExponentialLR(optimizer, 0.9)]), "step"),
    "a sequence": (
        lambda optimizer: SequentialLR(optimizer, [LinearLR(optimizer), CosineAnnealingLR(optimizer, 9)], [3]),
        "step",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_continues_with_the_same_rates(kind, tmp_path):
    make, interval = KINDS[kind]
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    scheduler, expected = make(optimizer), []
    for step in range(EPOCHS * STEPS):
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        if interval == "step" or step % STEPS == STEPS - 1:
            scheduler.step()
        if step % STEPS == STEPS - 1:
            expected.append(rate)
    fit(tmp_path / "run", make, EPOCHS - 1 if kind != "one cycle" else 2, scheduler_interval=interval)
    assert fit(tmp_path / "run", make, scheduler_interval=interval) == expected


# Made for so many epochs: whose rates, of all steps, follow from how many these are.
LENGTHS: dict[str, tuple[Callable[..., Any], str]] = {
    "cosine": (CosineAnnealingLR, "epoch"),
    "milestones": (lambda optimizer, epochs: MultiStepLR(optimizer, [epochs // 2]), "epoch"),
    "one cycle": (lambda optimizer, epochs: OneCycleLR(optimizer, 0.1, total_steps=epochs * STEPS), "step"),
    "chained": (
        lambda optimizer, epochs: ChainedScheduler([LinearLR(optimizer), CosineAnnealingLR(optimizer, epochs)]),
        "epoch",
    ),
    "a sequence": (
        lambda optimizer, epochs: SequentialLR(
            optimizer, [LinearLR(optimizer), CosineAnnealingLR(optimizer, epochs * STEPS - 3)], [3]
        ),
        "step",
    ),
}


@pytest.mark.parametrize("kind", LENGTHS)
def test_a_schedule_follows_a_run_that_gets_longer(kind, tmp_path):
    """It goes on as if it had had this length from the start, from where a shorter one had ended."""
    make, interval = LENGTHS[kind]
    longer = partial(make, **{"T_max" if make is CosineAnnealingLR else "epochs": 6})
    shorter = partial(make, **{"T_max" if make is CosineAnnealingLR else "epochs": 2})
    expected = fit(tmp_path / "whole", longer, 6, scheduler_interval=interval)
    before = fit(tmp_path / "run", shorter, 2, scheduler_interval=interval)
    assert fit(tmp_path / "run", longer, 6, scheduler_interval=interval) == [*before, *expected[2:]]
    assert before != expected[:2]


def test_a_schedule_stays_where_the_run_is_as_long_as_before(tmp_path):
    fit(tmp_path / "run", lambda optimizer: CosineAnnealingLR(optimizer, 3), 3, checkpoint_every=5)
    last = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    rmtree(last)  # that of the end
    rates = fit(tmp_path / "run", lambda optimizer: CosineAnnealingLR(optimizer, 9), 3, checkpoint_every=5)
    assert rates == fit(tmp_path / "whole", lambda optimizer: CosineAnnealingLR(optimizer, 3), 3)


def test_a_value_is_fed_to_those_that_want_one(tmp_path):
    made: list[OfItsOwn] = []

    def make(optimizer: Any) -> OfItsOwn:
        made.append(OfItsOwn(optimizer))
        return made[-1]

    fit(tmp_path / "1", make)
    fit(tmp_path / "2", make, monitor="val_acc", mode="max", scheduler_monitor="train_loss")
    assert [len(each.seen) for each in made] == [EPOCHS, EPOCHS]
    assert made[0].seen != made[1].seen
    # As it gets better in each epoch, and is fed to a scheduler that means the same by better, the rate stays.
    wrong = partial(ReduceLROnPlateau, patience=0, mode="max")
    assert len(set(fit(tmp_path / "3", wrong, monitor="val_loss", mode="max"))) > 1
    right = partial(ReduceLROnPlateau, patience=0)
    assert fit(tmp_path / "4", right, monitor="val_acc", mode="max", scheduler_monitor="val_loss") == [0.1] * EPOCHS


REFUSED: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "less for more": (ReduceLROnPlateau, {"monitor": "val_acc", "mode": "max"}, "is min, .* val_acc, for which higher"),
    "more for less": (
        lambda optimizer: ReduceLROnPlateau(optimizer, "max"),
        {},
        "is max, .* val_loss, for which lower",
    ),
    "monitor": (
        ReduceLROnPlateau,
        {"scheduler_monitor": "val_los"},
        "nothing is reported as val_los; did you mean val_loss",
    ),
    "each step": (ReduceLROnPlateau, {"scheduler_interval": "step"}, "can't have the interval step"),
    "too short": (
        lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=11),
        {"scheduler_interval": "step"},
        "OneCycleLR ends after total_steps 11, and this run makes 12 steps: total_steps: 12",
    ),
    "too short within": (
        lambda optimizer: SequentialLR(
            optimizer, [LinearLR(optimizer), OneCycleLR(optimizer, 0.1, total_steps=8)], [3]
        ),
        {"scheduler_interval": "step"},
        "after total_steps 8, and this run makes 9 steps",
    ),
    "steps for epochs": (
        lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=EPOCHS),
        {"scheduler_interval": "step"},
        "this run makes 12 steps: scheduler.interval: epoch",
    ),
    "state": (Odd, {}, "can't hold scheduler/curve: it is a list_iterator.*give Odd a state_dict"),
    "another optimizer": (
        lambda optimizer: StepLR(Adam(optimizer.param_groups[0]["params"]), 1),
        {},
        r"of an optimizer other than the one that trains \(SGD\)",
    ),
    "an optimizer": (lambda optimizer: optimizer, {}, "SGD is an optimizer"),
    "a class": (lambda optimizer: StepLR, {}, "StepLR is a class"),
    "no scheduler": (lambda optimizer: object(), {}, "object is no scheduler: it lacks step"),
    "an epoch": (ByEpoch, {}, "ByEpoch.step needs epoch"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_go_wrong_later_is_refused_before_the_first_step(kind, tmp_path):
    make, options, message = REFUSED[kind]
    with pytest.raises(UserError, match=message):
        fit(tmp_path / "run", make, **options)
    assert not list(tmp_path.glob("run/weights/*"))


def test_what_is_hardly_meant_is_warned_of(tmp_path, capsys):
    fit(tmp_path / "1", lambda optimizer: CosineAnnealingLR(optimizer, 2))
    fit(tmp_path / "2", lambda optimizer: PolynomialLR(optimizer, 2))
    fit(tmp_path / "3", lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=EPOCHS * STEPS))
    said = capsys.readouterr().err
    assert "warning: CosineAnnealingLR turns back up after T_max 2 of 3 epochs; T_max: 3 ends with the run" in said
    assert "warning: PolynomialLR: the learning rate is 0 after total_iters 2 of 3 epochs" in said
    assert "warning: OneCycleLR makes 3 of its total_steps 12: is scheduler.interval step meant?" in said


def test_what_lasts_longer_than_the_run_is_warned_of(tmp_path, capsys):
    fit(tmp_path / "1", lambda optimizer: CosineAnnealingLR(optimizer, 9))
    fit(tmp_path / "2", lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=99), scheduler_interval="step")
    fit(tmp_path / "3", lambda optimizer: MultiStepLR(optimizer, [1, 3, 5]))
    fit(
        tmp_path / "4",
        lambda optimizer: SequentialLR(optimizer, [LinearLR(optimizer), CosineAnnealingLR(optimizer, 9)], [20]),
        scheduler_interval="step",
    )
    said = capsys.readouterr().err
    assert "CosineAnnealingLR makes 3 of its T_max 9 epochs and stops halfway; T_max: 3 ends with the run" in said
    assert "OneCycleLR makes 12 of its total_steps 99 steps and stops halfway; total_steps: 12 ends with the" in said
    assert "MultiStepLR never gets past milestone 3, 5 in 3 epochs" in said
    assert "SequentialLR never gets past milestone 20 in 12 steps" in said
    assert said.count("warning:") == 4


def test_what_fits_is_not_warned_of(tmp_path, capsys):
    def sequence(optimizer: Any) -> LRScheduler:
        warm_up = LinearLR(optimizer, total_iters=4)
        return SequentialLR(optimizer, [warm_up, CosineAnnealingLR(optimizer, EPOCHS * STEPS - 4)], [4])

    fit(tmp_path / "1", lambda optimizer: CosineAnnealingLR(optimizer, EPOCHS))
    fit(tmp_path / "2", lambda optimizer: MultiStepLR(optimizer, [1, 2]))
    fit(tmp_path / "3", sequence, scheduler_interval="step")
    fit(tmp_path / "4", KINDS["one cycle"][0], scheduler_interval="step")
    assert "warning:" not in capsys.readouterr().err


def test_a_schedule_that_ends_before_a_stream_of_unknown_length(tmp_path, capsys):
    def made(optimizer: Any) -> LRScheduler:
        return SequentialLR(optimizer, [LinearLR(optimizer), OneCycleLR(optimizer, 0.1, total_steps=8)], [3])

    with pytest.raises(UserError, match="scheduler: OneCycleLR ended before the run did, at step 12: Tried"):
        fit(tmp_path / "run", made, stream=True, scheduler_interval="step")
    assert "OneCycleLR ends after total_steps 8, and the run with it if there are more steps" in capsys.readouterr().err


JOB = """
name: job
model: {_target_: torch.nn.Linear, in_features: 4, out_features: 2}
data: {train: {_target_: builtins.list}, val: {_target_: builtins.list}, batch_size: 2}
loss: {_target_: torch.nn.MSELoss}
optimizer: {_target_: torch.optim.SGD, lr: 0.1, groups: [{params: '*.bias', lr: 0.2}]}
scheduler: {_target_: torch.optim.lr_scheduler.ReduceLROnPlateau}
metrics: {acc: {_target_: builtins.dict}}
fit: {epochs: 1, early_stopping: {monitor: val_acc, mode: max}}
"""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (None, r"scheduler: its mode is min, but it monitors val_acc, for which higher is better; mode: max, or"),
        ("scheduler.monitor=val_los", "scheduler.monitor: nothing is reported as val_los; did you mean val_loss"),
        ("scheduler._target_=torch.optim.SGD", "scheduler._target_: is an optimizer, not a scheduler"),
        *((f"optimizer.lr={value}", "optimizer.lr: expected a positive number") for value in ("fast", "[0.1]", "")),
        *((f"optimizer.lr={value}", "optimizer.lr: expected a positive number") for value in (".nan", ".inf", "-1")),
        ("optimizer.groups=[{params: '*', lr: fast}]", "optimizer.groups.0.lr: expected a positive number"),
    ],
)
def test_a_job_is_checked_before_anything_starts(override, message, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    plateau = [] if override is None or override.startswith("scheduler") else ["scheduler.mode=max"]
    with pytest.raises(UserError, match=message):
        load(path, [*plateau, *([override] if override else [])])
    load(path, ["scheduler.monitor=val_loss"])
