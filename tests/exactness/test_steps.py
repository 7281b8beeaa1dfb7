"""A fit in steps: when it reports, validates, saves and ends, with a plain loop's values at any number of ranks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import Accuracy
from training import Job, Samples, epoch_order, fit, prepare

from dtrain import Trainer
from dtrain.errors import UserError
from dtrain.run.folder import RUN_DIR_VARIABLE, RunDir
from dtrain.trainer import fit_folder
from dtrain.trainer.checkpoint.manager import saved
from dtrain.trainer.distributed.stop import Stopped
from dtrain.trainer.optimization.scheduling import Scheduling

# 6 steps an epoch, the last one of 3 samples.
NUM_SAMPLES, BATCH, EPOCH_STEPS, CLASSES, SEED = 43, 8, 6, 3, 5


def parts() -> tuple[nn.Module, Samples, Samples]:
    torch.manual_seed(SEED)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    features, val_features = torch.randn(NUM_SAMPLES, 5), torch.randn(29, 5)
    train, val = (Samples(each, each[:, :CLASSES].argmax(1)) for each in (features, val_features))
    return net, train, val


def job(trainer: dict[str, Any], fit: dict[str, Any], *, validates: bool = True) -> Job:
    net, train, val = parts()
    made = {"net": net, "loss_fn": nn.CrossEntropyLoss(), "optimizer": torch.optim.SGD(net.parameters(), lr=0.3)}
    made |= {"metrics_dict": {"acc": Accuracy(task="multiclass", num_classes=CLASSES)}, "seed": SEED, **trainer}
    found: Job = {"trainer": made, "train": train, "batch_size": BATCH, "fit": fit}
    return {**found, "val": val} if validates else found


def plain_loop(steps: int, train_at: list[int], val_at: list[int]) -> dict[int, dict[str, float]]:
    """By step the values of a row: training's since the last report, the validation's of the weights then."""
    net, train, val = parts()
    optimizer, loss_fn = torch.optim.SGD(net.parameters(), lr=0.3), nn.CrossEntropyLoss()
    batches = [batch for epoch in range(1, 10) for batch in epoch_order(NUM_SAMPLES, SEED, epoch).split(BATCH)]
    rows: dict[int, dict[str, float]] = {}
    losses, hits, samples = 0.0, 0, 0
    for step, batch in enumerate(batches[:steps], 1):
        features, target = train.features[batch], train.target[batch]
        predictions = net(features)
        loss = loss_fn(predictions, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses, samples = losses + float(loss.detach()) * len(batch), samples + len(batch)
        hits += int((predictions.argmax(1) == target).sum())
        if step in train_at:
            rows[step] = {"train_loss": losses / samples, "train_acc": hits / samples}
            losses, hits, samples = 0.0, 0, 0
        if step in val_at:
            with torch.no_grad():
                predictions = net(val.features)
            loss, right = loss_fn(predictions, val.target), predictions.argmax(1) == val.target
            rows[step] = {**rows.get(step, {}), "val_loss": float(loss), "val_acc": float(right.float().mean())}
    return rows


# What is asked for, and the steps after which training is reported and the model validated.
CADENCES: dict[str, tuple[dict[str, Any], dict[str, Any], list[int], list[int]]] = {
    "epochs": ({}, {"epochs": 2}, [6, 12], [6, 12]),
    "steps": ({}, {"steps": 8}, [6, 8], [6, 8]),
    "what ends first": ({}, {"steps": 8, "epochs": 1}, [6], [6]),
    "reports within an epoch": ({"report_every": 4}, {"epochs": 2}, [4, 8, 12], [6, 12]),
    "validations within an epoch": ({"validate_every": 5}, {"steps": 14}, [6, 12, 14], [5, 10, 14]),
    "both": ({"validate_every": "3 steps", "report_every": 2}, {"steps": 10}, [2, 4, 6, 8, 10], [3, 6, 9, 10]),
    "every second epoch": ({"validate_every": "2 epochs"}, {"epochs": 3}, [6, 12, 18], [12, 18]),
    "an epoch's length": ({"validate_every": 6, "report_every": 6}, {"steps": 12}, [6, 12], [6, 12]),
}


@pytest.mark.parametrize("name", CADENCES)
def test_rows_have_the_values_of_a_plain_loop(name, tmp_path):
    trainer, length, train_at, val_at = CADENCES[name]
    expected = plain_loop(max(train_at), train_at, val_at)
    for world_size in (1, 2, 3):
        folder = tmp_path / str(world_size)
        prepare(folder, world_size)
        [(rows, _), *others] = run_ranks(world_size, fit, str(folder), job, trainer, length)
        assert [row["step"] for row in rows] == sorted(expected)
        assert all([row["time"] for row in rows] == [row["time"] for row in other] for other, _ in others)
        for row, written in zip(rows, RunDir(folder).rows(), strict=True):
            values = {name: value for name, value in written.items() if name.startswith(("train_", "val_"))}
            assert values == pytest.approx(expected[row["step"]], rel=1e-5)
            assert written["phase"] == "+".join(each for each in ("train", "val") if f"{each}_loss" in values)
            assert written["epoch"] == pytest.approx(row["step"] / EPOCH_STEPS)
            assert isinstance(written["epoch"], int) == (row["step"] % EPOCH_STEPS == 0)
            assert (written["samples_per_s"] is not None) == ("train_loss" in values)
            made_at = datetime.fromisoformat(written["time"].replace("Z", "+00:00"))
            assert abs((datetime.now(timezone.utc) - made_at).total_seconds()) < 600
            assert len(written["time"]) == len("2026-01-01T00:00:00.000Z")


class Endless(IterableDataset[Any]):
    """The samples in their order, again and again."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from (self.samples[i] for i in range(len(self.samples)))


def endless(trainer: dict[str, Any], fit: dict[str, Any]) -> Job:
    made = job(trainer, fit)
    batch_size = made.pop("batch_size")
    data = {"train": Endless(made["train"]), "val": made["val"]}
    return {**made, **{name: DataLoader(each, batch_size=batch_size) for name, each in data.items()}}


def test_a_stream_without_an_end(tmp_path):
    """It has rows, validations and best weights; it is stopped and goes on; and it ends."""
    found = []
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        prepare(folder, world_size)
        arguments = (endless, {"validate_every": 4, "report_every": 2}, {"steps": 10})
        [(rows, weights), *_] = run_ranks(world_size, fit, str(folder), *arguments)
        assert [(row["step"], row["epoch"], row["phase"]) for row in rows] == [
            *((2, 0, "train"), (4, 0, "train+val"), (6, 0, "train")),
            *((8, 0, "train+val"), (10, 0, "train+val")),
        ]
        assert saved(RunDir(folder))[-1].name == "step-000000010-row"
        found.append((rows, weights))
    (rows, weights), (other_rows, other_weights) = found
    for row, other in zip(rows, other_rows, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(value, other_weights[name])


@pytest.fixture(autouse=True)
def _as_a_rank(monkeypatch):
    monkeypatch.setenv(RUN_DIR_VARIABLE, "")  # set by what follows


def trainer_in(folder: Path, **options: Any) -> tuple[Trainer, Samples, Samples]:
    """A trainer as that of a rank that is alone, of a run in this folder."""
    fit_folder._fits.clear()  # as in another process
    prepare(folder, 1)
    os.environ[RUN_DIR_VARIABLE] = str(folder)
    net, train, val = parts()
    made = {"loss_fn": nn.CrossEntropyLoss(), "optimizer": torch.optim.SGD(net.parameters(), lr=0.3)}
    return Trainer(net, **made, device="cpu", seed=SEED, **options), train, val


def loader(samples: Samples) -> DataLoader[Any]:
    return DataLoader(samples, batch_size=BATCH, shuffle=True)


@pytest.mark.parametrize(
    ("every", "keep_every", "kept"),
    [
        (2, None, [10, 12]),
        (2, 4, [4, 8, 10, 12]),
        (2, 5, [6, 10, 12]),  # the first after each fifth step
        ("epoch", "2 epochs", [12, 18, 24]),
        ("2 epochs", None, [12, 24]),
        ("0.000001 s", None, [11, 12]),  # the clock says so after every step
    ],
)
def test_which_checkpoints_are_kept(every, keep_every, kept, tmp_path):
    trainer, train, _ = trainer_in(tmp_path / "run", checkpoint_every=every, keep_every=keep_every, keep=2)
    history = trainer.fit(loader(train), epochs=kept[-1] // EPOCH_STEPS, monitor="train_loss")
    best = int(history.loc[history["train_loss"].idxmin(), "step"])
    steps = [int(path.name.split("-")[1]) for path in saved(RunDir(tmp_path / "run"))]
    assert sorted({*steps} - ({best} - {*kept})) == kept


def test_time_that_is_up(tmp_path):
    """It stops with a checkpoint, as on request; and goes on, for as long again."""
    folder = tmp_path / "run"
    for _ in range(3):
        trainer, train, val = trainer_in(
            folder,
            max_time="0.000001 s",
        )
        with pytest.raises(Stopped) as stopped:
            trainer.fit(loader(train), loader(val), steps=20)
        assert stopped.value.code == 75
    assert saved(RunDir(folder))[-1].name == "step-000000003"
    trainer, train, val = trainer_in(folder)
    resumed = trainer.fit(loader(train), loader(val), steps=20)
    trainer, train, val = trainer_in(tmp_path / "whole")
    whole = trainer.fit(loader(train), loader(val), steps=20)
    times = ["samples_per_s", "time"]
    assert resumed.drop(columns=times).equals(whole.drop(columns=times))


def test_stopping_early_within_an_epoch(tmp_path, capfd):
    """The last row has all: what was trained since the last report too."""
    trainer, train, val = trainer_in(tmp_path / "run", validate_every=2)
    history = trainer.fit(loader(train), loader(val), epochs=9, threshold=100.0)
    assert [(row["step"], row["phase"]) for row in history.to_dict("records")] == [(2, "train+val")]
    assert "stopping early, after step 2: val_loss has reached 100" in capfd.readouterr().err
    assert RunDir(tmp_path / "run").best_weights.exists()
    trainer, train, val = trainer_in(tmp_path / "run", validate_every=2)
    assert len(trainer.fit(loader(train), loader(val), epochs=9, threshold=100.0)) == 1  # nothing is left to do


def test_a_value_that_is_no_number_ends_the_run_if_asked_to(tmp_path, capfd):
    """Otherwise it is an error: nobody knows whether such a run learns."""
    for is_asked in (True, False):
        trainer, train, val = trainer_in(tmp_path / str(is_asked), validate_every=2)
        val.features[0] = float("nan")
        ended = contextlib.nullcontext() if is_asked else pytest.raises(UserError, match="val_loss is nan")
        with ended:
            history = trainer.fit(loader(train), loader(val), epochs=1, stop_on_nan=is_asked)
    assert list(history["step"]) == [2]
    assert "stopping early, after step 2: val_loss is nan" in capfd.readouterr().err


def test_patience_and_plateaus_count_validations(tmp_path):
    trainer, train, val = trainer_in(tmp_path / "run", validate_every=2)
    assert trainer.optimizer is not None
    trainer.optimizer.param_groups[0]["lr"] = 1e-6
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(trainer.optimizer, patience=0, threshold=10.0)
    trainer.scheduling = Scheduling.of(plateau)
    history = trainer.fit(loader(train), loader(val), epochs=9, patience=3, min_delta=1.0)
    assert list(history["step"][history["val_loss"].notna()]) == [2, 4, 6, 8]
    assert plateau.last_epoch == 4


@pytest.mark.parametrize(
    ("options", "length", "validates", "says"),
    [
        ({}, {"steps": 0}, True, "fit.steps: expected a number above 0, found 0"),
        ({"validate_every": 0}, {"steps": 5}, True, "fit.validate_every: expected epoch or a number of"),
        ({"report_every": "2 hours"}, {"steps": 5}, True, "or text such as 5 epochs, found '2 hours'"),
        ({"checkpoint_every": "0 min"}, {"steps": 5}, True, "text such as 5 epochs or 30 min, found '0 min'"),
        ({"max_time": 3600}, {"steps": 5}, True, "fit.max_time: expected a time above 0, such as 30 min"),
        ({"validate_every": 6}, {"steps": 5}, True, "fit.validate_every: 6 steps never comes: this run has 5 steps"),
        ({"report_every": "3 epochs"}, {"epochs": 2}, True, "fit.report_every: 3 epochs never comes: .* 12 steps"),
        ({"validate_every": 2}, {"steps": 5}, False, "fit.validate_every: there is nothing to validate"),
        ({}, {"steps": 5, "min_delta": 0.1}, True, "fit.early_stopping.min_delta: has no effect without patience"),
        ({}, {"steps": 5, "patience": 2, "min_delta": -1.0}, True, "min_delta: expected at least 0.0, found -1.0"),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_first_step(options, length, validates, says, tmp_path):
    net, train, val = parts()
    optimizer, where = torch.optim.SGD(net.parameters(), lr=0.3), {"device": "cpu", "run_dir": tmp_path / "run"}
    with pytest.raises(UserError, match=says):  # by the one or the other
        Trainer(net, nn.CrossEntropyLoss(), optimizer, **options, **where).fit(
            loader(train), loader(val) if validates else None, **length
        )
    assert not (tmp_path / "run").exists()
