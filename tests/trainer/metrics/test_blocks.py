"""Metrics that only count see several batches at once, and have the same bits as if updated with each of them."""

from __future__ import annotations

import inspect

import pytest
import torch
import torchmetrics as tm
from torchmetrics import classification

from dtrain.errors import UserError
from dtrain.trainer.metrics import blocks
from dtrain.trainer.metrics.blocks import only_counts
from dtrain.trainer.metrics.metric_set import MetricSet

CLASSES = 4
SIZES = (6, 6, 6, 6, 6, 6, 6, 3, 3, 1, 1, 6)
GIVEN = {"num_classes": CLASSES, "num_labels": CLASSES, "thresholds": 7, "beta": 0.5, "num_groups": 2}
OPTIONS = (
    *({}, {"ignore_index": 1}, {"ignore_index": -1}, {"top_k": 2}, {"average": "micro"}, {"average": "none"}),
    *({"top_k": 2, "ignore_index": -1}, {"average": "micro", "ignore_index": 1}, {"validate_args": False}),
)


def every_class():
    """All classes that torchmetrics exports for a task, in each setting that they take."""
    for name in classification.__all__:
        kind = getattr(classification, name)
        names = inspect.signature(kind).parameters
        if not name.startswith(("Binary", "Multiclass", "Multilabel")):
            continue  # of a name such as Accuracy, which makes one of these
        needed = {key: value for key, value in GIVEN.items() if key in names}
        needed |= {key: 0.5 for key in names if key.startswith("min_")}
        for options in OPTIONS:
            if options.keys() <= names.keys():
                yield pytest.param(kind, {**needed, **options}, id=f"{name} {options or ''}")


def make(kind, options):
    """The metric; None with a setting that it does not take, or with which torchmetrics fails."""
    try:
        kind(**options).update(*next(batches(kind, (), None)))
    except (ValueError, TypeError, RuntimeError):
        return None
    return kind(**options)


def batches(kind, shape, ignore_index):
    """Predictions with many ties, in batches of several sizes."""
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        scores = torch.randint(11, (size, CLASSES, *shape), generator=generator) / 10
        target = torch.randint(CLASSES, (size, *shape), generator=generator)
        if kind.__name__.startswith("Binary"):
            scores, target = scores[:, 0], target % 2
        elif kind.__name__.startswith("Multilabel"):
            target = torch.randint(2, scores.shape, generator=generator)
        if ignore_index is not None:
            target[torch.rand(target.shape, generator=generator) < 0.2] = ignore_index
        yield scores, target


@pytest.mark.parametrize(("kind", "options"), list(every_class()))
def test_every_class_that_only_counts_has_the_bits_of_updates_one_by_one(kind, options):
    made = make(kind, options)
    if made is None or not only_counts(made):
        return
    for shape in ((), (5,)):
        alone, together = kind(**options), kind(**options)
        metrics = MetricSet({"m": together}, {}, "cpu")
        for number, (scores, target) in enumerate(batches(kind, shape, options.get("ignore_index"))):
            alone.update(scores, target)
            metrics.update(scores, target, batch=number)
            scores.fill_(0.3)  # a loader may use its memory again
            target.zero_()
        metrics.states()
        assert together.update_count < alone.update_count == len(SIZES)
        for name, state in alone.metric_state.items():
            assert not state.is_floating_point()
            assert state.dtype == together.metric_state[name].dtype
            assert torch.equal(state, together.metric_state[name])


def test_which_classes_those_are():
    made = [make(*each.values) for each in every_class()]
    counting = {type(metric).__name__.removeprefix("Binary") for metric in made if metric and only_counts(metric)}
    known = ("Accuracy", "F1Score", "FBetaScore", "ConfusionMatrix", "CohenKappa", "MatthewsCorrCoef", "ROC", "AUROC")
    assert {*known, "AveragePrecision", "MulticlassExactMatch", "MultilabelJaccardIndex"} <= counting
    options = {"num_classes": CLASSES}
    assert only_counts(tm.MetricCollection([classification.MulticlassAccuracy(**options), tm.ROC("binary", 5)]))
    floats = (tm.MeanSquaredError(), tm.MeanMetric(), tm.HingeLoss(task="binary"), tm.CalibrationError(task="binary"))
    lists = (tm.AUROC(task="binary"), tm.Accuracy(task="binary", multidim_average="samplewise"))
    assert not any(map(only_counts, (*floats, *lists, tm.wrappers.MinMaxMetric(tm.Accuracy(task="binary")))))
    assert not only_counts(tm.MetricCollection([tm.Accuracy(task="binary"), tm.AUROC(task="binary")]))


class Halved(classification.BinaryAccuracy):
    """A user's own, of which nothing is known."""


def test_a_class_derived_elsewhere_is_updated_one_by_one():
    assert not only_counts(Halved())


def accuracies():
    options = {"task": "multiclass", "num_classes": CLASSES}
    own = {"acc": tm.Accuracy(**options), "f1": tm.F1Score(average="macro", **options), "auc": tm.AUROC(**options)}
    return MetricSet(own, {"acc": "softmax", "auc": "softmax"}, "cpu")


def results(metrics):
    return metrics.finish([state.value for state in metrics.states()])


def test_a_state_taken_between_updates_lacks_none_of_them():
    given = [(torch.randn(6, CLASSES), torch.randint(CLASSES, (6,))) for _ in range(40)]
    metrics, other, expected = accuracies(), accuracies(), accuracies()
    for scores, target in given[:10]:
        metrics.update(scores, target)
    other.update(*given[30])
    other.update(*given[31])
    other.load_state_dict(metrics.state_dict())
    metrics.update(*given[33])
    metrics.reset()
    for number, (scores, target) in enumerate(given):
        expected.update(scores, target, {"f1": (scores, target)})  # with arguments there are no blocks
        if number >= 10:
            other.update(scores, target)
        metrics.update(scores, target)
    assert results(metrics) == results(other) == results(expected)


def test_memory_is_bounded(monkeypatch):
    metric = tm.Accuracy(task="multiclass", num_classes=CLASSES)
    metrics = MetricSet({"acc": metric}, {}, "cpu")
    scores, target = torch.rand(10, CLASSES), torch.arange(10) % CLASSES
    monkeypatch.setattr(blocks, "MOST_BYTES", 3 * (scores.nbytes + target.nbytes))
    for number in range(8):  # two by themselves, then three at a time
        metrics.update(scores, target, batch=number)
    assert metric.update_count == 4
    large = torch.rand(20, CLASSES), torch.arange(20) % CLASSES
    for _ in range(4):
        metrics.update(*large)
    assert metric.update_count == 8


def test_logits_and_misfits_within_a_block_are_refused():
    metrics = MetricSet({"acc": tm.Accuracy(task="binary")}, {}, "cpu")
    for value in (0.5, 0.5, 0.5, 1.5):
        metrics.update(torch.full((4,), value), torch.ones(4, dtype=torch.int64))
    with pytest.raises(UserError, match=r"metrics acc: some predictions are outside \[0, 1\]"):
        results(metrics)
    metrics.reset()
    for value in (1, 1, 1, 2):
        metrics.update(torch.full((4,), 0.5), torch.full((4,), value))
    with pytest.raises(UserError, match=r"metric acc \(BinaryAccuracy\) does not fit: .* target int64 \[16\]"):
        results(metrics)
