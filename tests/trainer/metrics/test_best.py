"""Which epoch is the best, when patience runs out, and what a monitor may name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics import Accuracy
from torchmetrics.classification import MulticlassConfusionMatrix
from training import Samples

from dtrain.errors import UserError
from dtrain.run.folder import Row
from dtrain.schema.sections import EarlyStopping
from dtrain.trainer.data.indexed import Source
from dtrain.trainer.metrics.early_stopping import Best
from dtrain.trainer.trainer import Trainer

NAN = math.nan


def best_by(monitor: str, mode: str = "min", **settings: Any) -> Best:
    return Best(EarlyStopping(monitor=monitor, mode=mode, **settings))


def row_of(epoch: int, value: float) -> Row:
    return {"epoch": epoch, "step": 10 * epoch, "val_loss": value}


def run(best: Best, values: list[float]) -> list[bool]:
    return [best.update(row_of(epoch, value)) for epoch, value in enumerate(values, start=1)]


@pytest.mark.parametrize(
    ("mode", "values", "improved_at", "best_epoch"),
    [
        ("min", [3.0, 2.0, 2.0, 4.0, 1.0], [1, 2, 5], 5),
        ("max", [3.0, 2.0, 3.0, 4.0, 1.0], [1, 4], 4),
        ("min", [1.0, 1.0, 1.0], [1], 1),
        ("max", [0.5, 0.5], [1], 1),
        ("min", [1.0, NAN, 0.5, NAN], [1, 3], 3),
        ("max", [1.0, NAN, NAN], [1], 1),
        ("min", [NAN, NAN, 2.0, 1.0], [1, 3, 4], 4),  # the first epoch always is, so that there is a best
        ("max", [NAN, 1.0, NAN, 2.0], [1, 2, 4], 4),
        ("min", [math.inf, 1.0, -math.inf], [1, 2, 3], 3),
    ],
)
def test_ties_keep_the_earlier_and_nan_is_never_better(mode, values, improved_at, best_epoch):
    best = best_by("val_loss", mode)
    assert [epoch for epoch, improved in enumerate(run(best, values), start=1) if improved] == improved_at
    assert (best.epoch, best.step) == (best_epoch, 10 * best_epoch)
    assert best.verdict is None


@pytest.mark.parametrize(
    ("settings", "values", "ends_after"),
    [
        ({"patience": 1}, [1.0, 1.0], 2),
        ({"patience": 2}, [1.0, 2.0, 0.5, 3.0, 3.0, 0.1], 5),
        ({"patience": 3}, [1.0, NAN, NAN, NAN], 4),
        ({"patience": 2}, [3.0, 2.0, 1.0], None),
        ({"patience": 2, "min_delta": 0.5}, [3.0, 2.8, 2.4, 2.2, 2.0], 5),  # 2.4 is better than 3.0 by more than 0.5
        ({"patience": 1, "min_delta": 0.5}, [NAN, 1.0, 0.4, 0.0], 4),
        ({"patience": 2, "min_delta": 0.5, "mode": "max"}, [1.0, 1.4, 1.6, 1.7, 1.8], 5),
        ({"threshold": 0.5}, [1.0, 0.6, 0.5, 0.1], 3),
        ({"threshold": 0.5, "mode": "max"}, [NAN, 0.4, 0.7], 3),
        ({"stop_on_nan": True}, [1.0, 2.0, NAN, 1.0], 3),
        ({"stop_on_nan": True}, [1.0, math.inf], 2),
        ({}, [1.0, NAN, math.inf, -math.inf], None),
    ],
)
def test_when_it_stops_early(settings, values, ends_after):
    best = best_by("val_loss", **settings)
    ends = []
    for epoch, value in enumerate(values, start=1):
        state, best = best.state_dict(), best_by("val_loss", **settings)  # as after a resume
        best.load_state_dict(state)
        best.update(row_of(epoch, value))
        ends.append(best.verdict is not None)
    assert (ends.index(True) + 1 if True in ends else None) == ends_after


def test_an_improvement_that_patience_does_not_count_is_still_the_best():
    best = best_by("val_loss", patience=5, min_delta=1.0)
    assert run(best, [3.0, 2.5, 2.0]) == [True, True, True]
    assert (best.value, best.stale) == (2.0, 2)  # 2.0 is not better than 3.0 by more than 1.0


def test_a_value_that_is_no_single_number_is_no_monitor():
    with pytest.raises(UserError, match="val_acc is not a single value"):
        best_by("val_acc").update({"epoch": 1, "step": 5, "val_acc": [0.5, 0.4], "val_loss": 1.0})


class Unread(Samples):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("a sample was read")


@pytest.mark.parametrize(
    ("monitor", "with_val", "hint"),
    [("val_ac", True, "val_acc"), ("val_acc", False, "train_acc"), ("train_auroc", True, "")],
)
def test_a_monitor_that_names_nothing_is_refused_before_training(monitor, with_val, hint, tmp_path):
    net = nn.Linear(2, 3)
    data = Source(Unread(torch.zeros(6, 2), torch.zeros(6, dtype=torch.int64)), 3, shuffle=True)
    metrics = {"acc": Accuracy(task="multiclass", num_classes=3), "confusion": MulticlassConfusionMatrix(3)}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    trainer = Trainer(net, nn.CrossEntropyLoss(), optimizer, metrics, device="cpu", run_dir=tmp_path / "run")
    with pytest.raises(UserError, match=f"nothing is reported as {monitor}.*{hint}"):
        trainer.fit(data, data if with_val else None, monitor=monitor)
    for wrong, says in (
        ({"patience": 0}, "fit.early_stopping.patience: expected a number above 0, found 0"),
        ({"epochs": 0}, "fit.epochs: expected a number above 0, found 0"),
        ({"monitor": "train_acc"}, "mode: is min, but higher is better for train_acc"),
        ({"mode": "maximum"}, "fit.early_stopping.mode: expected min or max, found 'maximum'"),
    ):
        with pytest.raises(UserError, match=says):
            trainer.fit(data, **wrong)
    with pytest.raises(UserError, match="Trainer needs a loss"):
        Trainer(net, device="cpu").evaluate(data)
    assert not (tmp_path / "run").exists()
