"""Metrics of all kinds, and functions of all samples: three ranks report what one process does, in its order."""

from __future__ import annotations

import os
from unittest.mock import patch

import pytest
import torch
import torchmetrics as tm
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate
from torchmetrics.retrieval import RetrievalMAP
from torchmetrics.text import EditDistance, ExtendedEditDistance
from torchmetrics.wrappers import ClasswiseWrapper, MultitaskWrapper
from training import prepare

from dtrain.errors import UserError
from dtrain.run.folder import RUN_DIR_VARIABLE
from dtrain.schema.instantiate import check_job
from dtrain.schema.loading import load_job
from dtrain.schema.metrics.values import named_values
from dtrain.trainer import Trainer
from dtrain.trainer.metrics.given_metrics import as_metrics
from dtrain.trainer.metrics.metric_set import MetricSet
from dtrain.trainer.metrics.reduce import reduce_states
from dtrain.trainer.ranks import Ranks

NUM = 23
WORDS = ["the", "cat", "dog", "sat", "on", "mat"]


class Samples(Dataset):
    def __len__(self):
        return NUM

    def __getitem__(self, index):
        features = torch.randn(3, generator=torch.Generator().manual_seed(index))
        return {"features": features, "target": int(features.sum() > 0), "index": index}


def text(index, step):
    return " ".join(WORDS[(index * step + j * j) % 6] for j in range(5))


def boxes(index):
    return torch.full((index % 3, 4), float(index))


def nested(predictions, target, index):
    """Sees all samples, and that they are in order."""
    assert index.tolist() == list(range(NUM))
    assert predictions["texts"] == [text(i, 1) for i in range(NUM)]
    assert [each.tolist() for each in predictions["boxes"]] == [boxes(i).tolist() for i in range(NUM)]
    first, second = target  # as default_collate has tuples
    return {"a": (predictions["scores"][0] * index).sum(), "b": (first - second).sum()}


def kinds():
    classes = tm.Accuracy(task="multiclass", num_classes=3, average=None)
    binary = {"acc": tm.Accuracy(task="binary"), "auc": tm.AUROC(task="binary"), "f1": tm.F1Score(task="binary")}
    return {
        "eed": ExtendedEditDistance(return_sentence_level_score=True),
        "edit": EditDistance(reduction="none"),
        "map": RetrievalMAP(),
        "mean": tm.MeanMetric(),
        "each": tm.CatMetric(),
        "of": tm.MetricCollection(binary, prefix="p_", postfix="_q"),
        "classes": ClasswiseWrapper(classes, labels=["x", "y", "z"]),
        "tasks": MultitaskWrapper({"a": tm.Accuracy(task="binary"), "b": tm.MeanSquaredError()}),
        "nested": nested,
    }


def arguments(scores, batch):
    target, index = batch["target"], batch["index"]
    texts, others = [text(i, 1) for i in index.tolist()], [text(i, 2) for i in index.tolist()]
    heads = {"scores": (scores, 1 - scores), "texts": texts, "boxes": [boxes(i) for i in index.tolist()]}
    return {
        "eed": (texts, [[each] for each in others]),
        "edit": (texts, others),
        "map": {"preds": scores, "target": target, "indexes": index // 4},
        "mean": scores,
        "each": scores,
        "of": (scores, target),
        "classes": (torch.stack([scores, 1 - scores, scores * scores], 1), index % 3),
        "tasks": ({"a": scores, "b": scores}, {"a": target, "b": target.float()}),
        "nested": (heads, [target, index], index),
    }


def network():
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def scores_step(model, batch):
    scores = model(batch["features"])[:, 0].sigmoid()
    return {"loss": scores.mean(), "metrics": arguments(scores, batch)}


def evaluated(rank, world_size):
    net = network()
    trainer = Trainer(net, metrics_dict=kinds(), step=scores_step, device="cpu", micro_batch_size=3)
    values = trainer.evaluate(DataLoader(Samples(), batch_size=8))
    ranks = Ranks(device="cpu")
    metrics = ranks.synchronise({name: kinds()[name] for name in ("each", "of", "map")})
    with torch.no_grad():
        for batch in ranks.shard(DataLoader(Samples(), batch_size=8)):
            given = arguments(net(batch["features"])[:, 0].sigmoid(), batch)
            for name, metric in metrics.items():
                own = given[name]
                metric.update(**own) if isinstance(own, dict) else metric.update(*own if name == "of" else [own])
    return values, {name: metric.compute() for name, metric in metrics.items()}


def expected():
    """What torchmetrics itself, and the function, make of all samples at once."""
    batch = default_collate([Samples()[i] for i in range(NUM)])
    with torch.no_grad():
        given = arguments(network()(batch["features"])[:, 0].sigmoid(), batch)
    values = {}
    for name, metric in kinds().items():
        own = given[name]
        args, kwargs = ((), own) if isinstance(own, dict) else (own if isinstance(own, tuple) else (own,), {})
        if name == "nested":
            result = metric(*args)
        else:
            metric.update(*args, **kwargs)
            result = metric.compute()
        values |= named_values(f"val_{name}", result)
    return values


def test_three_ranks_report_what_one_process_does():
    wanted = expected()
    (values, synchronised), *others = run_ranks(3, evaluated)
    assert all(other == (values, synchronised) for other in others)
    values.pop("val_loss")
    assert values.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(values[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    own = {"each": synchronised["each"], "map": synchronised["map"], **synchronised["of"]}
    for name, value in own.items():
        torch.testing.assert_close(value, wanted[f"val_{name}"], rtol=1e-5, atol=1e-6)


def test_samples_keep_their_order_when_a_run_goes_on_with_fewer_ranks():
    metrics = [MetricSet({"each": tm.CatMetric()}, {}, "cpu") for _ in range(3)]
    for batch, start in enumerate((0, 6)):
        for rank in range(3):
            part = torch.arange(start + 2 * rank, start + 2 * rank + 2).float()
            metrics[rank].update(None, None, {"each": part}, batch=batch)
    alone = MetricSet({"each": tm.CatMetric()}, {}, "cpu")
    alone.load_state_dict(alone.merge([each.state_dict() for each in metrics]))
    alone.update(None, None, {"each": torch.tensor([12.0, 13.0])}, batch=2)
    assert alone.finish([state.value for state in alone.states()])["each"] == list(range(14))


class Draws(tm.Metric):
    def __init__(self):
        super().__init__()
        self.add_state("seen", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, predictions, target):
        self.seen += len(target)

    def compute(self):
        return torch.rand(())


def test_what_a_metric_draws_is_the_same_everywhere_and_leaves_no_trace():
    metrics = MetricSet({"a": Draws()}, {}, "cpu")
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        drawn.append(metrics.finish(reduce_states(metrics.states()) or []))
        assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(seed))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([torch.zeros(4, 5), torch.zeros(4, 7)], "tensors of .4, 5. and .4, 7. can't be joined"),
        ([torch.zeros(()), torch.zeros(())], "one number of a batch can't be joined"),
        ([{"a": torch.zeros(4)}, {"b": torch.zeros(4)}], "dicts with different keys"),
        ([[torch.zeros(4)] * 4] * 2, "a list of 4 tensors, each with 4 rows"),
        ([0.5, 0.5], "can't be joined; a list with an entry for each sample can"),
    ],
)
def test_what_cannot_be_joined_is_refused(pieces, said):
    metrics = MetricSet(as_metrics({"f": lambda predictions, target: 0.0}), {}, "cpu")
    for piece in pieces:
        metrics.update(piece, torch.zeros(4), samples=4)
    with pytest.raises(UserError, match=rf"metric f \(.*\) does not fit: .*{said}"):
        metrics.finish([state.value for state in metrics.states()])


def data(num=24):
    features = torch.randn(num, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(features, features[:, :3].argmax(1)), batch_size=8)


def trained(folder, metrics, step=None, epochs=1, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    loss = None if step else nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    activations = dict.fromkeys(metrics or (), "softmax" if step is None else None)
    trainer = Trainer(net, loss, optimizer, metrics, step=step, activations=activations, device="cpu")
    with patch.dict(os.environ, {RUN_DIR_VARIABLE: str(prepare(folder, 1))}):
        history = trainer.fit(data(), data(), epochs, **options)
    return net.state_dict(), history


def values_by_class(predictions, target):
    return {f"class_{int(each)}": float((predictions.argmax(1) == each).float().mean()) for each in target.unique()}


def test_metrics_are_tried_before_the_training_and_leave_no_trace(tmp_path):
    weights, history = trained(tmp_path / "without", None)
    options = {"num_classes": 3, "task": "multiclass"}
    metrics = {"all": tm.MetricCollection([tm.Accuracy(**options), tm.AUROC(**options)]), "each": values_by_class}
    monitored, with_metrics = trained(tmp_path / "with", metrics, monitor="val_each_class_0")
    assert weights.keys() == monitored.keys()
    assert all(torch.equal(weights[name], monitored[name]) for name in weights)
    assert history.val_loss.tolist() == with_metrics.val_loss.tolist()
    assert {"val_all_MulticlassAccuracy", "val_all_MulticlassAUROC", "val_each_class_0"} <= set(with_metrics)


def broken(predictions, target):
    return predictions.logits


def only_many(predictions, target):
    if len(target) < 20:
        raise ValueError("too few")
    return 0.5


CLASSES = tm.Accuracy(task="multiclass", num_classes=3, average=None)


@pytest.mark.parametrize(
    ("metrics", "monitor", "said"),
    [
        ({"f": broken}, None, r"metric f \(broken\) does not fit"),
        ({"acc": tm.Accuracy(task="binary"), "x": CLASSES}, None, r"metric acc \(BinaryAccuracy\) does not fit"),
        ({"x": CLASSES}, "val_x", "val_x is a list of 3 values"),
        ({"x": tm.ROC(task="multiclass", num_classes=3, thresholds=4)}, "val_x", "val_x is a list of 3 values"),
        ({"x": lambda predictions, target: predictions.mean(0)}, "val_x", "val_x is a list of 3 values"),
        ({"x": tm.MetricCollection({"acc": CLASSES})}, "val_x_f1", "nothing is reported as val_x_f1; .*val_x_acc"),
        ({"x": values_by_class}, "val_x", "nothing is reported as val_x"),
        ({"x": CLASSES}, "val_y", "nothing is reported as val_y"),
        ({"loss": CLASSES}, None, "a metric is named loss"),
    ],
)
def test_misfits_end_the_run_before_its_first_step(tmp_path, metrics, monitor, said):
    with pytest.raises(UserError, match=said):
        trained(tmp_path / "run", metrics, monitor=monitor)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_too_few_samples_to_compute_prove_nothing(tmp_path):
    _, history = trained(tmp_path / "run", {"f": only_many})
    assert history.val_f.tolist() == [0.5]


def silent_in_training(model, batch):
    logits = model(batch[0])
    loss = nn.functional.cross_entropy(logits, batch[1])
    return {"loss": loss} if model.training else {"loss": loss, "predictions": logits.softmax(1), "target": batch[1]}


def test_a_metric_of_the_validation_needs_nothing_in_training(tmp_path):
    options = {"num_classes": 3, "task": "multiclass"}
    _, history = trained(tmp_path / "a", {"auc": tm.AUROC(**options)}, silent_in_training)
    assert history.val_auc.notna().all()
    with pytest.raises(UserError, match=r"train metrics acc need `predictions` and `target` .* `train: false`"):
        trained(tmp_path / "b", {"acc": tm.Accuracy(**options)}, silent_in_training)


def test_arguments_of_no_metric_are_refused(tmp_path):
    def step(model, batch):
        return {"loss": model(batch[0]).mean(), "metrics": {"mena": torch.ones(2)}}

    with pytest.raises(UserError, match="arguments of the metric mena; did you mean mean"):
        trained(tmp_path / "run", {"mean": tm.MeanMetric()}, step)


JOB = """
name: job
model: {_target_: torch.nn.Linear, in_features: 4, out_features: 3}
data: {train: {_target_: torch.zeros}, val: {_target_: torch.zeros}, batch_size: 5}
loss: {_target_: torch.nn.CrossEntropyLoss}
optimizer: {_target_: torch.optim.SGD, lr: 0.1}
metrics:
  m:
    _target_: torchmetrics.MetricCollection
    metrics:
      acc: {_target_: torchmetrics.Accuracy, task: multiclass, num_classes: 3}
      each: {_target_: torchmetrics.Recall, task: multiclass, num_classes: 3, average: null}
  tracked: {_target_: torchmetrics.MinMaxMetric, base_metric: {_target_: torchmetrics.MeanSquaredError}}
fit: {epochs: 1, early_stopping: {monitor: MONITOR}}
"""


@pytest.mark.parametrize(
    ("monitor", "said"),
    [
        ("val_m_acc", None),
        ("val_tracked_max", None),
        ("val_m_each", "val_m_each is a list of 3 values"),
        ("val_m", "nothing is reported as val_m"),
        ("val_m_ac", "nothing is reported as val_m_ac; did you mean val_m_acc?"),
    ],
)
def test_check_knows_the_values_of_torchmetrics_own(tmp_path, monitor, said):
    path = tmp_path / "job.yaml"
    path.write_text(JOB.replace("MONITOR", monitor))
    problems = [str(each) for each in check_job(load_job(path), tmp_path) if "monitor" in str(each)]
    assert len(problems) == (said is not None)
    assert said is None or f"fit.early_stopping.monitor: {said}" in problems[0]
