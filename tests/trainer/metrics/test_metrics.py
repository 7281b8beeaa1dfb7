"""What N ranks report equals what torchmetrics reports on all samples at once."""

from __future__ import annotations

import functools
import io
import itertools
import warnings
from collections import Counter

import pytest
import torch
import torchmetrics as tm
from ranks import count_collectives, run_ranks
from sklearn.metrics import roc_auc_score
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import MetricCollection
from torchmetrics.classification import MultilabelRankingLoss
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.utilities.compute import normalize_logits_if_needed
from torchmetrics.wrappers import (
    BootStrapper,
    ClasswiseWrapper,
    MetricTracker,
    MinMaxMetric,
    MultioutputWrapper,
    Running,
)

from dtrain.errors import UserError
from dtrain.trainer.metrics.function_metric import FunctionMetric
from dtrain.trainer.metrics.given_metrics import as_metrics, keeps_samples
from dtrain.trainer.metrics.metric_set import MetricSet
from dtrain.trainer.metrics.reduce import reduce_states


class OfPredictions(tm.Metric):
    """Feeds an aggregator, which takes one value, from the two of a step; a metric inside a metric."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def update(self, predictions, target):
        self.inner.update(predictions)

    def compute(self):
        return self.inner.compute()


class Widest(tm.Metric):
    """A custom function as the reduction, and a sum whose first update sets its shape and dtype."""

    def __init__(self):
        super().__init__()
        self.add_state("spread", torch.zeros(2), dist_reduce_fx=lambda stacked: stacked.amax(0))
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, predictions, target):
        self.spread = torch.maximum(self.spread, torch.stack([predictions.max(), target.max()]))
        self.total = self.total + torch.stack([predictions.double().sum(), target.double().sum()])

    def compute(self):
        return torch.cat([self.spread, self.total])


def classes():
    options = {"num_classes": 5, "task": "multiclass"}
    return {
        "acc": tm.Accuracy(**options),
        "f1": tm.F1Score(average="macro", **options),
        "confusion": tm.ConfusionMatrix(**options),
        "auroc": tm.AUROC(**options),
        "binned": tm.AUROC(thresholds=20, **options),
        "calibration": tm.CalibrationError(**options),
        "each": ClasswiseWrapper(tm.Accuracy(average=None, **options)),
        "both": tm.Accuracy(**options) + tm.Recall(average="macro", **options),
    }


def binary():
    return {
        "auroc": tm.AUROC(task="binary"),
        "binned": tm.AUROC(task="binary", thresholds=20),
        "roc": tm.ROC(task="binary", thresholds=5),
        "acc": tm.Accuracy(task="binary"),
        "function": FunctionMetric(area),
    }


def area(predictions, target):
    """As scikit-learn's users write it: numpy's functions take tensors."""
    return roc_auc_score(target.numpy(), predictions.numpy())


def regression():
    return {
        "mse": tm.MeanSquaredError(),
        "r2": tm.R2Score(),
        "pearson": tm.PearsonCorrCoef(),
        "mean": OfPredictions(tm.MeanMetric()),
        "max": OfPredictions(tm.MaxMetric()),
        "min": OfPredictions(tm.MinMetric()),
        "cat": OfPredictions(tm.CatMetric()),
        "range": MinMaxMetric(tm.MeanAbsoluteError()),
        "widest": Widest(),
    }


def outputs():
    return {
        "r2": MultioutputWrapper(tm.R2Score(), 2),
        "spearman": MultioutputWrapper(tm.SpearmanCorrCoef(), 2),
        "pearson": tm.PearsonCorrCoef(num_outputs=2),
        "mse": tm.MeanSquaredError(num_outputs=2),
    }


def images():
    return {
        "ssim": StructuralSimilarityIndexMeasure(data_range=1.0),
        "each_ssim": StructuralSimilarityIndexMeasure(data_range=1.0, reduction="none"),
        "psnr": PeakSignalNoiseRatio(data_range=1.0),
    }


def labels():
    options = {"task": "multilabel", "num_labels": 5}
    return {
        "acc": tm.Accuracy(**options),
        "f1": tm.F1Score(average=None, **options),
        "exact": tm.ExactMatch(**options),
        "auroc": tm.AUROC(**options),
        "confusion": tm.ConfusionMatrix(**options),
        "ranking": MultilabelRankingLoss(num_labels=5),
    }


ACTIVATIONS = {classes: "softmax", binary: "sigmoid", labels: "sigmoid"}
LENGTHS = {images: 40}


@functools.cache
def data(kind):
    """All predictions (logits, rounded so that many are equal) and targets of a kind of task."""
    generator = torch.Generator().manual_seed(0)
    num = LENGTHS.get(kind, 10_007)
    if kind is images:
        target = torch.rand(num, 1, 16, 16, generator=generator)
        return (target + 0.1 * torch.rand(target.shape, generator=generator)).clamp(0, 1), target
    if kind in (regression, outputs):
        target = torch.randn((num, 2) if kind is outputs else (num,), generator=generator)
        return target + torch.randn(target.shape, generator=generator), target
    if kind is labels:
        target = torch.randint(2, (num, 5), generator=generator)
        return target + torch.randn(target.shape, generator=generator), target
    num_classes = 5 if kind is classes else 2
    target = torch.randint(num_classes, (num,), generator=generator)
    logits = torch.randn(num, num_classes, generator=generator) + torch.eye(num_classes)[target]
    logits = (logits * 4).round() / 4
    return (logits if kind is classes else logits[:, 1]), target


def new_set(kind):
    return MetricSet(kind(), dict.fromkeys(kind(), ACTIVATIONS.get(kind)), "cpu")


@functools.cache
def expected(kind):
    """What torchmetrics itself makes of all samples in one update, without MetricSet."""
    predictions, target = data(kind)
    activation = ACTIVATIONS.get(kind)
    if activation:
        predictions = predictions.softmax(1) if activation == "softmax" else predictions.sigmoid()
    results = {}
    for name, metric in kind().items():
        metric.update(predictions, target)
        result = metric.compute()
        results |= {f"{name}_{key}": v for key, v in result.items()} if isinstance(result, dict) else {name: result}
    return results


def check(results, kind):
    assert results.keys() == expected(kind).keys()
    for name, value in expected(kind).items():
        wanted = torch.stack(value) if isinstance(value, tuple) else torch.as_tensor(value)
        actual = torch.tensor(results[name], dtype=torch.float64)
        if name in ("cat", "each_ssim"):  # resumed on fewer ranks, the samples come in another order
            actual, wanted = actual.sort().values, wanted.sort().values
        torch.testing.assert_close(actual, wanted.double(), rtol=2e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def feed(metrics, kind, share):
    predictions, target = data(kind)
    for start, stop in share:
        metrics.update(predictions[start:stop], target[start:stop])


def finish(metrics):
    reduced = reduce_states(metrics.states())
    return None if reduced is None else metrics.finish(reduced)


def even(num, world_size):
    """Contiguous shares that differ by one sample, each taken in two updates of different lengths."""
    bounds = [num * rank // world_size for rank in range(world_size + 1)]
    return [[(a, a + (b - a) // 3), (a + (b - a) // 3, b)] for a, b in itertools.pairwise(bounds)]


def epoch(rank, world_size, kind, shares):
    warnings.filterwarnings("error", message="The ``compute`` method")  # "was called before update": it was not
    metrics = new_set(kind)
    feed(metrics, kind, shares[rank])
    return finish(metrics)


KINDS = [classes, binary, labels, regression, outputs, images]


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_reports_what_torchmetrics_does(kind):
    check(epoch(0, 1, kind, even(len(data(kind)[0]), 1)), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_report_what_one_process_does(kind, world_size):
    first, *others = run_ranks(world_size, epoch, kind, even(len(data(kind)[0]), world_size))
    assert others == [None] * (world_size - 1)
    check(first, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("empty", [0, 2])
def test_a_rank_without_samples_changes_nothing(kind, empty):
    shares = even(len(data(kind)[0]), 2)
    shares.insert(empty, [])
    check(run_ranks(3, epoch, kind, shares)[0], kind)


@pytest.mark.parametrize("kind", [regression, outputs])
def test_all_samples_on_one_rank(kind):
    check(run_ranks(2, epoch, kind, [[], *even(len(data(kind)[0]), 1)])[0], kind)


def two_epochs(rank, world_size):
    metrics = new_set(outputs)
    metrics.update(torch.randn(7, 2) + 1e3, torch.randn(7, 2))
    finish(metrics)
    metrics.reset()
    feed(metrics, outputs, even(10_007, world_size)[rank])
    return finish(metrics)


def test_reset_forgets_the_epoch_before():
    check(run_ranks(2, two_epochs)[0], outputs)


def test_what_a_wrapper_remembers_of_earlier_epochs_survives_a_resume():
    metrics, resumed = new_set(regression), new_set(regression)
    feed(metrics, regression, [(0, 100)])
    before = finish(metrics)
    metrics.reset()
    resumed.load_state_dict(resumed.merge([through_a_file(metrics.state_dict())]))
    feed(resumed, regression, [(100, 300)])
    after = finish(resumed)
    assert {after["range_min"], after["range_max"]} == {before["range_raw"], after["range_raw"]}


def count(rank, world_size):
    metrics, train = new_set(classes), new_set(regression)
    with count_collectives() as updating:
        feed(metrics, classes, [(0, 50), (50, 100)])
        feed(train, regression, [(0, 50)])
    with count_collectives() as syncing:
        reduced = reduce_states([*metrics.states(), *train.states()])
    with count_collectives() as finishing:
        if reduced is not None:
            metrics.finish(reduced[: len(metrics.states())])
    return updating, syncing, finishing


def test_many_metrics_share_four_collectives_and_updates_take_none():
    together = Counter(all_gather_object=1, reduce=2, gather=1)
    assert run_ranks(2, count) == [(Counter(), together, Counter())] * 2


LOGITS = torch.tensor([0.2, 0.9, 0.4, 3.0, -2.0, 0.1, 0.7, -0.5, 0.6])
LABELS = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 1])


def auroc(rank, world_size, activation):
    metrics = MetricSet({"auc": tm.AUROC(task="binary")}, {"auc": activation}, "cpu")
    metrics.update(LOGITS.tensor_split(world_size)[rank], LABELS.tensor_split(world_size)[rank])
    reduced = reduce_states(metrics.states())
    if reduced is None:
        return None
    try:
        return metrics.finish(reduced)["auc"]
    except UserError as error:
        return str(error)


def test_activation_makes_auroc_the_same_at_any_number_of_ranks():
    guessed = tm.AUROC(task="binary")
    for logits, labels in zip(LOGITS.tensor_split(3), LABELS.tensor_split(3), strict=True):
        guessed.update(logits, labels)
    truth = tm.AUROC(task="binary")(LOGITS.sigmoid(), LABELS).item()
    assert guessed.compute() != pytest.approx(truth)  # else there were nothing to mend
    assert [run_ranks(n, auroc, "sigmoid")[0] for n in (2, 3)] == [pytest.approx(truth)] * 2
    assert auroc(0, 1, "sigmoid") == pytest.approx(truth)


@pytest.mark.parametrize("activation", ["none", None])
def test_logits_without_an_activation_are_refused(activation):
    # The first of the three ranks sees only values that could be probabilities.
    messages = [auroc(0, 1, activation), run_ranks(3, auroc, activation)[0]]
    for message in messages:
        assert "metrics auc: some predictions are outside [0, 1]" in message
        assert "activation: softmax" in message


def test_probabilities_without_an_activation_are_taken_as_they_are():
    metrics = MetricSet({"auc": tm.AUROC(task="binary")}, {}, "cpu")
    metrics.update(LOGITS, LABELS)
    metrics.reset()  # forgets that there were logits
    metrics.update(LOGITS.sigmoid(), LABELS)
    assert finish(metrics)["auc"] == tm.AUROC(task="binary")(LOGITS.sigmoid(), LABELS).item()


class Guesses(tm.Metric):
    """Looks as if it might guess, and never waits for a value."""

    guess = False

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, predictions, target):
        self.total += (normalize_logits_if_needed(predictions, "sigmoid") if self.guess else predictions).sum()

    def compute(self):
        return self.total


class NoWait(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # What .item(), bool() and float() come to.
        assert func is not torch.ops.aten._local_scalar_dense.default, "waits for the device"
        return func(*args, **(kwargs or {}))


def test_update_waits_for_no_value():
    metrics = MetricSet({"a": Guesses(), "b": Guesses()}, {"a": "softmax"}, "cpu")
    with NoWait():
        metrics.update(torch.randn(4, 3), torch.zeros(4))
        with pytest.raises(AssertionError, match="waits"):  # finish may, which shows that NoWait sees it
            finish(metrics)


class Keeps(Guesses):
    def update(self, predictions, target):
        self.seen = predictions


def test_an_activation_is_computed_once_for_all_metrics():
    metrics = {name: Keeps() for name in "abc"}
    updated = MetricSet(metrics, {"a": "softmax", "b": "softmax"}, "cpu")
    updated.update(torch.zeros(2, 4), None)
    assert metrics["a"].seen is metrics["b"].seen
    assert metrics["a"].seen.tolist() == [[0.25] * 4] * 2
    assert metrics["c"].seen.tolist() == [[0.0] * 4] * 2


def test_states_keep_no_graph():
    metrics = MetricSet({"auc": tm.AUROC(task="binary")}, {"auc": "none"}, "cpu")
    metrics.update(LOGITS.requires_grad_().sigmoid(), LABELS)
    tensors = [piece for state in metrics.states() for piece in (state.value if isinstance(state.value, list) else [])]
    assert tensors
    assert not any(tensor.requires_grad for tensor in tensors)


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_continues_from_its_state_dict_to_the_bit(kind):
    first, second = even(len(data(kind)[0]), 1)[0]
    through = new_set(kind)
    feed(through, kind, [first])
    saved = through.state_dict()
    feed(through, kind, [second])  # must leave what was saved alone
    resumed = new_set(kind)
    resumed.load_state_dict(through_a_file(saved))
    feed(resumed, kind, [second])
    assert finish(resumed) == finish(through)
    check(finish(through), kind)


def mergeable(kind):
    """A set of those metrics whose states can be merged."""
    metrics = {name: metric for name, metric in kind().items() if name != "pearson"}
    metrics.pop("widest", None)
    return MetricSet(metrics, dict.fromkeys(metrics, ACTIVATIONS.get(kind)), "cpu")


def saved_by_three(kind):
    """The state dicts of three ranks after the first halves of their shares, and the second halves."""
    shares = even(len(data(kind)[0]), 3)
    sets = [mergeable(kind) for _ in shares]
    for metrics, share in zip(sets, shares, strict=True):
        feed(metrics, kind, share[:1])
    return [through_a_file(metrics.state_dict()) for metrics in sets], [share[1] for share in shares]


def resume(rank, world_size, kind, states, rest):
    metrics = mergeable(kind)
    if rank == 0:
        metrics.load_state_dict(through_a_file(metrics.merge(states)))
    feed(metrics, kind, rest[rank::world_size])
    return finish(metrics)


def check_mergeable(results, kind):
    left_out = {name: value for name, value in expected(kind).items() if name in ("pearson", "widest")}
    check(results | {name: value.tolist() for name, value in left_out.items()}, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_three_ranks_continue_as_one(kind):
    states, rest = saved_by_three(kind)
    check_mergeable(resume(0, 1, kind, states, rest), kind)
    for part in (part for state in states for part in state["parts"].values()):
        del part["batches"]  # as in older checkpoints
    check_mergeable(resume(0, 1, kind, states, rest), kind)


@pytest.mark.parametrize("kind", [classes, regression])
def test_three_ranks_continue_as_two(kind):
    check_mergeable(run_ranks(2, resume, kind, *saved_by_three(kind))[0], kind)


def three_pearsons(num_updated):
    sets = [MetricSet({"corr": tm.PearsonCorrCoef()}, {}, "cpu") for _ in range(3)]
    for metrics in sets[:num_updated]:
        feed(metrics, regression, [(0, 100)])
    return sets[0], sets[0].merge([metrics.state_dict() for metrics in sets])


def test_a_state_that_cannot_be_merged_names_its_metric():
    with pytest.raises(UserError, match=r"metric corr cannot continue .* another number of ranks"):
        three_pearsons(num_updated=2)


def test_a_stack_of_one_updated_rank_is_merged():
    metrics, merged = three_pearsons(num_updated=1)
    before = finish(metrics)
    metrics.load_state_dict(merged)
    assert finish(metrics) == before


def test_results_are_floats_nested_lists_and_flat_names():
    results = epoch(0, 1, classes, even(100, 1)) | epoch(0, 1, regression, even(100, 1))
    assert isinstance(results["acc"], float)
    assert [len(row) for row in results["confusion"]] == [5] * 5
    assert all(isinstance(cell, float) for row in results["confusion"] for cell in row)
    assert {"range_raw", "range_min", "range_max"} <= results.keys()


@pytest.mark.parametrize(
    ("activation", "predictions", "said"),
    [
        ("none", torch.rand(4, 3), "predictions float32 [4, 3], target int64 [4], activation none"),
        ("softmax", torch.rand(4), "predictions float32 [4], target int64 [4], activation softmax"),
        ("softmax", {"a": 1}, "predictions a dict with keys a, target int64 [4], activation softmax"),
    ],
)
def test_a_metric_that_does_not_fit_its_task_is_named(activation, predictions, said):
    metrics = MetricSet({"acc": tm.Accuracy(task="multiclass", num_classes=5)}, {"acc": activation}, "cpu")
    with pytest.raises(UserError) as caught:
        metrics.update(predictions, torch.tensor([0, 1, 2, 3]))
    assert str(caught.value).startswith("metric acc (MulticlassAccuracy) does not fit: ")
    assert str(caught.value.__cause__).split("\n")[0][:40] in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_a_metric_that_cannot_be_computed_is_named():
    metrics = MetricSet({"auc": tm.AUROC(task="binary")}, {}, "cpu")
    with pytest.raises(UserError, match=r"metric auc \(BinaryAUROC\) does not fit: No samples to concatenate"):
        finish(metrics)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Running(tm.MeanSquaredError()), "metric m: Running depends on how many updates"),
        (
            MetricCollection([BootStrapper(tm.MeanSquaredError())]),
            "metric m: BootStrapper draws random samples",
        ),
        (MetricTracker(tm.MeanSquaredError()), "metric m: MetricTracker keeps the values of epochs"),
        (tm.MeanSquaredError, "metric m: MeanSquaredError is neither a torchmetrics metric nor a function"),
    ],
)
def test_what_has_no_value_over_ranks_is_refused(given, said):
    with pytest.raises(UserError, match=said):
        as_metrics({"m": given})


def test_keeps_samples():
    assert keeps_samples(tm.AUROC(task="binary"))
    assert keeps_samples(MultioutputWrapper(tm.SpearmanCorrCoef(), 2))
    assert not keeps_samples(tm.AUROC(task="binary", thresholds=20))
    assert not keeps_samples(MinMaxMetric(tm.MeanSquaredError()))
