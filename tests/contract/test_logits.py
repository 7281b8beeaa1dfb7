"""`guesses_logits` against what the classes of torchmetrics do with a batch of logits."""

from __future__ import annotations

import inspect

import pytest
import torch
import torchmetrics
from torchmetrics import classification, wrappers

from dtrain.schema.metrics.logits import guesses_logits

ARGUMENTS = {
    **{"num_classes": 3, "num_labels": 3, "num_groups": 2, "beta": 1.0},
    **{"min_recall": 0.5, "min_precision": 0.5, "min_sensitivity": 0.5, "min_specificity": 0.5},
}
NAMES = [name for name in classification.__all__ if name.startswith(("Binary", "Multiclass", "Multilabel"))]


def build(name: str) -> torchmetrics.Metric:
    metric = getattr(classification, name)
    return metric(**{key: ARGUMENTS[key] for key in inspect.signature(metric).parameters if key in ARGUMENTS})


def batch(name: str, logits: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(0)
    if name.startswith("Multiclass"):
        return [logits, torch.randint(3, (20,))]
    if name.startswith("Multilabel"):
        return [logits, torch.randint(2, (20, 3))]
    groups = [torch.randint(2, (20,))] if name in ("BinaryFairness", "BinaryGroupStatRates") else []
    return [logits[:, 0], torch.randint(2, (20,)), *groups]


class Watched(torch.Tensor):
    """A tensor that notices being turned into probabilities."""

    seen: list[str] = []  # noqa: RUF012 (shared on purpose)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_what_an_update_does(name: str):
    torch.manual_seed(1)
    Watched.seen.clear()
    metric = build(name)
    metric.update(*batch(name, torch.randn(20, 3).as_subclass(Watched)))
    assert guesses_logits(metric) == bool({"sigmoid", "softmax"} & set(Watched.seen))


def test_the_guess_depends_on_how_the_samples_are_split():
    predictions, target = torch.tensor([0.9, 0.2, 1.5, -2.0]), torch.tensor([0, 0, 1, 0])
    whole, halves = classification.BinaryAUROC(), classification.BinaryAUROC()
    whole.update(predictions, target)
    for rows in (slice(0, 2), slice(2, 4)):
        halves.update(predictions[rows], target[rows])
    assert whole.compute() == 1
    assert halves.compute() < 1  # 1.5 came out as 0.82, and 0.9 stayed
    assert guesses_logits(whole)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (torchmetrics.Accuracy(task="multiclass", num_classes=3), False),
        (torchmetrics.Accuracy(task="binary"), True),
        (torchmetrics.AUROC(task="multiclass", num_classes=3), True),
        (torchmetrics.MeanSquaredError(), False),
        (torchmetrics.MeanMetric(), False),
        (torchmetrics.CatMetric(), False),
        (wrappers.MinMaxMetric(classification.BinaryAUROC()), True),
        (wrappers.MinMaxMetric(torchmetrics.MeanSquaredError()), False),
        (wrappers.BootStrapper(classification.BinaryAccuracy(), num_bootstraps=2), True),
        (torchmetrics.MetricCollection([torchmetrics.MeanSquaredError(), classification.BinaryROC()]), True),
        (classification.BinaryRecall() + torchmetrics.MeanSquaredError(), True),
        (object(), False),
    ],
)
def test_wrapped_and_other_metrics(metric: object, expected: bool):
    assert guesses_logits(metric) is expected


class Scaled(classification.BinaryAUROC):
    def update(self, preds, target):
        super().update(preds * 2, target)


class Replaced(classification.BinaryAUROC):
    def update(self, preds, target):
        self.preds.append(preds.sigmoid())


def test_classes_derived_from_torchmetrics():
    assert guesses_logits(Scaled())
    assert not guesses_logits(Replaced())
