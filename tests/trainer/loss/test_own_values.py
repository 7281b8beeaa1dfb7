"""What a step returns under `log` is reported as a mean over steps and ranks, as its loss is."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn.functional import cross_entropy
from torchmetrics import Accuracy
from training import Job, Samples, epoch_order, fit, prepare, timeless, train

from dtrain import Trainer
from dtrain.errors import UserError
from dtrain.run.folder import RUN_DIR_VARIABLE, RunDir
from dtrain.run.heartbeat import Heartbeat

NUM_SAMPLES, BATCH, STEPS, SEED = 23, 5, 5, 3


def data() -> tuple[Samples, Samples]:
    torch.manual_seed(SEED)
    features, val_features = torch.randn(NUM_SAMPLES, 4), torch.randn(11, 4)
    train_set, val_set = (Samples(each, each[:, :3].argmax(1)) for each in (features, val_features))
    return train_set, val_set


def classify(model: nn.Module, batch: Any) -> dict[str, Any]:
    features, target = batch
    predictions = model(features)
    first = target == 0
    return {
        "loss": cross_entropy(predictions, target),
        "predictions": predictions,
        "target": target,
        "log": {
            "size": predictions.abs().mean(),  # as the loss
            "lowest": float(features.sum()) / len(features),
            "of_first": (predictions[first].mean(), first.sum()),  # 0/0 where a part has none
        },
    }


def weigh(model: nn.Module, batch: Any) -> dict[str, Any]:
    return {**classify(model, batch), "weight": float(len(batch[0]) * 2)}


def values_of(predictions: torch.Tensor, features: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    """Of all samples together."""
    first = predictions[target == 0]
    values = {"size": predictions.abs().mean(), "lowest": features.sum() / len(features), "of_first": first.mean()}
    return {name: float(value) for name, value in values.items()}


def job(options: dict[str, Any], step: Any = classify) -> Job:
    torch.manual_seed(SEED)
    net = nn.Linear(4, 3)
    # By default so small that an epoch's values are those of all its samples.
    optimizer = torch.optim.SGD(net.parameters(), lr=options.pop("lr", 1e-6))
    trainer = {"net": net, "optimizer": optimizer, "step": step, "seed": SEED, **options.pop("trainer", {})}
    train_set, val_set = data()
    return {
        "trainer": trainer,
        "train": train_set,
        "val": val_set,
        "batch_size": BATCH,
        "fit": {"epochs": 1, **options},
    }


@pytest.mark.parametrize("step", [classify, weigh])
def test_logged_values_are_those_of_all_samples(step, tmp_path):
    net, (train_set, val_set) = job({})["trainer"]["net"], data()
    order = epoch_order(NUM_SAMPLES, SEED, 1)
    seen = order[: 2 * BATCH], order[2 * BATCH :]  # a report after two steps, and after the other three
    with torch.no_grad():
        expected = [values_of(net(train_set.features[i]), train_set.features[i], train_set.target[i]) for i in seen]
        val = values_of(net(val_set.features), val_set.features, val_set.target)
    for world_size in (1, 2, 3):
        prepare(tmp_path / str(world_size), world_size)
        options = {"steps": STEPS, "epochs": None, "trainer": {"report_every": 2, "micro_batch_size": 2}}
        [(rows, _), *_] = run_ranks(world_size, fit, str(tmp_path / str(world_size)), job, options, step)
        at = {row["step"]: row for row in rows}
        for name in val:
            assert at[2][f"train_{name}"] == pytest.approx(expected[0][name], rel=1e-5)
            assert at[5][f"val_{name}"] == pytest.approx(val[name], rel=1e-5)
        # The other three steps have two rows, of 10 samples and of 3.
        whole = sum(at[step]["train_lowest"] * size for step, size in ((4, 10), (5, 3))) / 13
        assert whole == pytest.approx(expected[1]["lowest"], rel=1e-5)


def stopping(options: dict[str, Any]) -> Job:
    """Rank 1 is asked to stop after its second step."""
    made, counts = job(options), {"step": 0}

    def ask(*_: Any) -> None:
        counts["step"] += 1
        if counts["step"] == 2 and torch.distributed.get_rank() == 1:
            Heartbeat(RunDir(os.environ[RUN_DIR_VARIABLE]).heartbeat(1)).stop = signal.SIGTERM

    made["trainer"]["optimizer"].register_step_post_hook(ask)
    return made


def test_a_stop_in_between_loses_nothing(tmp_path):
    options = {"epochs": 2, "lr": 0.1, "monitor": "val_size"}
    train(2, tmp_path / "whole", job, dict(options))
    assert train(2, tmp_path / "run", stopping, dict(options)) == [None, None]
    train(2, tmp_path / "run", job, dict(options))
    found, expected = ([timeless(row) for row in RunDir(tmp_path / name).rows()] for name in ("run", "whole"))
    assert found == expected  # to the bit
    assert {"train_size", "val_size", "val_of_first"} <= found[0].keys()
    assert train(2, tmp_path / "other", stopping, dict(options)) == [None, None]
    train(3, tmp_path / "other", job, dict(options))
    for row, other in zip(RunDir(tmp_path / "other").rows(), expected, strict=True):
        assert row["train_size"] == pytest.approx(other["train_size"], rel=1e-5)


def on_one_rank(model: nn.Module, batch: Any) -> dict[str, Any]:
    result = classify(model, batch)
    if torch.distributed.get_rank() == 1:
        result["log"]["extra"] = 1.0
    return result


def not_on_one_rank(model: nn.Module, batch: Any) -> dict[str, Any]:
    result = classify(model, batch)
    if torch.distributed.get_rank() == 1:
        del result["log"]
    return result


@pytest.mark.parametrize(("step", "names"), [(on_one_rank, "extra"), (not_on_one_rank, "size, lowest, of_first")])
def test_names_that_differ_between_ranks_are_refused(step, names, tmp_path):
    prepare(tmp_path, 2)
    with pytest.raises(RuntimeError, match=f"the step logs {names} on some ranks but not on others"):
        run_ranks(2, fit, str(tmp_path), job, {}, step)


@pytest.mark.parametrize(
    ("log", "monitor", "says"),
    [
        ([1.0], None, "step's `log` must be a dict of values by name, it is a list"),
        ({3: 1.0}, None, "needs names as keys, found 3"),
        ({"kl": torch.zeros(2)}, None, r"the step logs kl as a tensor of shape \[2\]: give a number"),
        ({"kl": "much"}, None, "the step logs kl as a str"),
        ({"loss": 1.0}, None, "the step logs 'loss', but that is the loss"),
        ({"acc": 1.0}, None, "the step logs 'acc', but a metric has that name"),
        ({"kl": 1.0}, "val_kk", "nothing is reported as val_kk; did you mean val_kl?"),
    ],
)
def test_what_can_not_be_logged_is_refused_before_the_first_step(log, monitor, says, tmp_path):
    def step(model: nn.Module, batch: Any) -> dict[str, Any]:
        return {**classify(model, batch), "log": log}

    made = job({}, step)
    stepped: list[Any] = []
    made["trainer"]["optimizer"].register_step_post_hook(lambda *_: stepped.append(1))
    metrics = {"acc": Accuracy(task="multiclass", num_classes=3)}
    trainer = Trainer(**made["trainer"], metrics_dict=metrics, device="cpu", run_dir=tmp_path / "run")
    loaders = [torch.utils.data.DataLoader(made[name], batch_size=BATCH) for name in ("train", "val")]
    with pytest.raises(UserError, match=says):
        trainer.fit(*loaders, epochs=1, monitor=monitor)
    assert not stepped
