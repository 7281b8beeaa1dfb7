"""A run that was interrupted and continued in new processes is, to the bit, the run that never was."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import lr_scheduler
from torchmetrics import Accuracy
from torchmetrics.wrappers import MinMaxMetric
from training import Job, Samples, approximately, differences, epoch_order, final_state, make_loop, train

from dtrain import WeightAveraging
from dtrain.run.folder import RUN_DIR_VARIABLE, RunDir
from dtrain.run.heartbeat import Heartbeat
from dtrain.schema.sections import Fsdp
from dtrain.trainer.checkpoint import manager
from dtrain.trainer.checkpoint.manager import Checkpoints
from dtrain.trainer.checkpoint.manifest import HashedFile
from dtrain.trainer.data import permutation
from dtrain.trainer.optimization.ema import Ema

# 4 steps an epoch; no share has less than the 2 samples that batch norm wants, at up to 4 ranks.
NUM_SAMPLES, BATCH, STEPS, EPOCHS, CLASSES, SEED = 35, 9, 4, 3, 3, 6
STRATEGIES: dict[str, Any] = {"ddp": "ddp", "fsdp": Fsdp(wrap=["Linear"])} | {
    f"ZeRO {stage}": {"zero_optimization": {"stage": stage}} for stage in (1, 2, 3)
}


@dataclass(frozen=True)
class Options:
    """How to train, and where the run is interrupted: each rank counts what it does from 1 in each process."""

    scheduler: str = "cosine by step"
    checkpoint_every: int | str = "epoch"
    epochs: int = EPOCHS
    in_steps: bool = False  # 10 of them, a validation after each third and a report after each second
    random: bool = True  # dropout, batch norm, and augmentation
    workers: int = 0
    optimizer: str = "adam"
    strategy: str = "ddp"
    patience: int | None = None
    sets: bool = False  # two to validate on, a moving average, which is evaluated on both, and an equal one
    stop_after_step: int | None = None  # the last rank is asked to stop after this step: all do after the next
    stop_after_validation: int | None = None  # the same, after this batch of a validation
    kill_after_step: int | None = None
    kill_before_save: int | None = None  # when the results are written, and nothing of this checkpoint is
    kill_in_save: int | None = None  # when this checkpoint is half written
    kill_before_latest: int | None = None  # when it has its name
    kill_in_retention: int | None = None  # when, after this checkpoint, an old one is half removed


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "cosine by step": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 12),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 3),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(
        optimizer, patience=0, threshold=10.0, threshold_mode="abs"
    ),
    "one cycle by step": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=12),
    "sequence": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1), lr_scheduler.MultiStepLR(optimizer, [1, 2])],
        milestones=[1],
    ),
}


class Drift(nn.Module):
    """Adds what it has seen so far on this rank: a buffer that matters in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 0.1 * x.mean().detach()
        return x + self.seen


class Recorded(Samples):
    """Writes down what is read in training: the process, the step of the run (from 0), and the sample."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        rank, folder = dist.get_rank(), Path(os.environ[RUN_DIR_VARIABLE])
        with (folder / f"read-{rank}.jsonl").open("a") as file:
            step = Heartbeat(RunDir(folder).heartbeat(rank)).read().step
            file.write(json.dumps([os.getpid(), step, index]) + "\n")
        return super().__getitem__(index)


def job(options: Options) -> Job:
    torch.manual_seed(SEED)
    noise = [nn.BatchNorm1d(12), Drift(), nn.Dropout(0.3)] if options.random else []
    net = nn.Sequential(nn.Linear(5, 12), *noise, nn.Tanh(), nn.Linear(12, CLASSES))
    if options.optimizer == "adam":
        optimizer: Any = torch.optim.Adam(net.parameters(), lr=torch.tensor(0.02))
    else:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1 if options.optimizer == "sgd" else 0.0, momentum=0.9)
    interval = "step" if options.scheduler.endswith("by step") else "epoch"
    metrics = {
        "acc": Accuracy(task="multiclass", num_classes=CLASSES),
        "range": MinMaxMetric(Accuracy(task="multiclass", num_classes=CLASSES)),
    }
    trainer = {"net": net, "loss_fn": nn.CrossEntropyLoss(), "optimizer": optimizer, "metrics_dict": metrics}
    trainer |= {"scheduler": SCHEDULERS[options.scheduler](optimizer), "scheduler_interval": interval, "seed": SEED}
    trainer |= {"checkpoint_every": options.checkpoint_every, "strategy": STRATEGIES[options.strategy]}
    features, val_features = torch.randn(NUM_SAMPLES, 5), torch.randn(29, 5)
    data = Recorded(features, features[:, :CLASSES].argmax(1), noise=0.1 if options.random else 0.0)
    val: Any = Samples(val_features, val_features[:, :CLASSES].argmax(1), noise=data.noise)
    if options.sets:
        trainer |= {"ema": 0.9, "callbacks": [WeightAveraging(4, "3 steps")]}
        val = {"whole": val, "part": Samples(val.features[:11], val.target[:11], noise=data.noise)}
    interrupt(options, net, optimizer)
    fit_options: dict[str, Any] = {"epochs": options.epochs, "patience": options.patience}
    fit_options |= {"monitor": "ema_part_loss"} if options.sets else {}
    if options.in_steps:
        trainer |= {"validate_every": 3, "report_every": "2 steps"}
        fit_options |= {"epochs": None, "steps": 10}
    data_options = {"train": data, "val": val, "batch_size": BATCH, "workers": options.workers}
    return {"trainer": trainer, **data_options, "fit": fit_options}


def interrupt(options: Options, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Arrange for what `options` has in store for this rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    counts = {"step": 0, "validation": 0, "save": 0}

    def ask_to_stop() -> None:
        if rank == world_size - 1:
            Heartbeat(RunDir(os.environ[RUN_DIR_VARIABLE]).heartbeat(rank)).stop = signal.SIGTERM

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def after_step(*_: Any) -> None:
        counts["step"] += 1
        if counts["step"] == options.stop_after_step:
            ask_to_stop()
        if counts["step"] == options.kill_after_step:
            kill()

    def after_forward(module: nn.Module, *_: Any) -> None:
        counts["validation"] += not module.training
        if not module.training and counts["validation"] == options.stop_after_validation:
            ask_to_stop()

    write, close, write_latest, remove = Checkpoints._write, HashedFile.__exit__, manager.write_text, shutil.rmtree

    def counted_write(*args: Any) -> None:
        counts["save"] += 1
        if counts["save"] == options.kill_before_save:
            kill()
        write(*args)

    def half_close(file: HashedFile, *error: Any) -> None:
        close(file, *error)
        if counts["save"] == options.kill_in_save and file.name == f"rank-{world_size - 1}.bin":
            [path] = RunDir(os.environ[RUN_DIR_VARIABLE]).checkpoints.glob(f".*/{file.name}")
            path.write_bytes(path.read_bytes()[:100])
            kill()

    def late_write_latest(*args: Any) -> None:
        if counts["save"] == options.kill_before_latest:
            kill()
        write_latest(*args)

    def half_remove(path: Path, **others: Any) -> None:
        if counts["save"] == options.kill_in_retention and path.exists():
            (path / "index.json").unlink()
            kill()
        remove(path, **others)

    Checkpoints._write, HashedFile.__exit__ = counted_write, half_close
    manager.write_text, shutil.rmtree = late_write_latest, half_remove
    optimizer.register_step_post_hook(after_step)
    net.register_forward_hook(after_forward)
    if options.stop_after_step == 0:
        ask_to_stop()


def samples_trained_on(folder: Path, world_size: int) -> dict[int, list[int]]:
    """By step (from 0), the samples that made it, in the order of the ranks: the last time that the step was done."""
    steps: dict[int, list[int]] = {}
    for rank in range(world_size):
        reads = [json.loads(line) for line in (folder / f"read-{rank}.jsonl").read_text().splitlines()]
        own: dict[int, list[int]] = {}
        last = None
        for process, step, index in reads:
            own[step] = [*own[step], index] if last == (process, step) else [index]
            last = process, step
        for step, indices in own.items():
            steps.setdefault(step, []).extend(indices)
    return steps


def all_samples() -> dict[int, list[int]]:
    """By step (from 0), the samples of an uninterrupted run."""
    orders = [epoch_order(NUM_SAMPLES, SEED, epoch) for epoch in range(1, EPOCHS + 1)]
    return dict(enumerate(batch.tolist() for order in orders for batch in order.split(BATCH)))


def continue_to_the_end(folder: Path, world_size: int, interruptions: list[Options], final: Options) -> list[Any]:
    for options in interruptions:
        if any(value for name, value in vars(options).items() if name.startswith("kill")):
            with pytest.raises(RuntimeError, match=r"exit code -9|closed by peer|reset by peer"):
                train(world_size, folder, job, options)
        else:
            assert train(world_size, folder, job, options) == [None] * world_size  # Stopped, on all ranks
    return train(world_size, folder, job, final)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The final state of a run that nothing interrupts; each is made once."""
    made: dict[Any, dict[str, Any]] = {}

    def get(world_size: int, options: Options) -> dict[str, Any]:
        if (world_size, options) not in made:
            folder = tmp_path_factory.mktemp("uninterrupted")
            train(world_size, folder, job, options)
            made[world_size, options] = final_state(folder)
        return made[world_size, options]

    return get


INTERRUPTIONS = {
    "stop at a step": [Options(stop_after_step=5)],
    "stop at once": [Options(stop_after_step=0)],
    "stop at an epoch's end": [Options(stop_after_step=2 * STEPS - 1)],
    "stop in validation": [Options(stop_after_validation=5)],
    "stop in validation's last batch": [Options(stop_after_validation=4)],
    "stop again and again": [
        Options(stop_after_step=1),
        Options(stop_after_step=0),
        Options(stop_after_validation=1),
        Options(stop_after_validation=2),
        Options(stop_after_step=2),
    ],
    "kill at a step": [Options(checkpoint_every=3, kill_after_step=8)],
    "kill before any checkpoint": [Options(kill_after_step=2)],
    "kill in a save": [Options(kill_in_save=2)],
    "kill before a save": [Options(kill_before_save=2)],
    "kill before latest": [Options(kill_before_latest=2)],
    "kill in retention": [Options(checkpoint_every=1, kill_in_retention=3)],
    "kill, stop and kill": [
        Options(checkpoint_every=2, kill_after_step=7),
        Options(checkpoint_every=2, stop_after_step=1),
        Options(checkpoint_every=2, kill_in_save=1),
    ],
}


@pytest.mark.parametrize(
    ("world_size", "name"),
    [
        pytest.param(world_size, name, marks=[pytest.mark.campaign] * (world_size != 2 + i % 2))
        for world_size in (1, 2, 3)
        for i, name in enumerate(INTERRUPTIONS)
    ]
    + [(4, "stop at a step"), (4, "kill at a step"), (4, "stop in validation")],
)
def test_a_continued_run_has_the_bits_of_one_that_was_never_interrupted(world_size, name, uninterrupted, tmp_path):
    interruptions = INTERRUPTIONS[name]
    final = Options(checkpoint_every=interruptions[-1].checkpoint_every)
    continue_to_the_end(tmp_path, world_size, interruptions, final)
    found, expected = final_state(tmp_path), uninterrupted(world_size, final)
    assert [row["epoch"] for row in found["rows"]] == [1, 2, 3]
    assert differences(found, expected) == []
    assert samples_trained_on(tmp_path, world_size) == all_samples()


def job_of_another_order(options):
    permutation.NAME = "of before"
    return job(options)


def test_a_run_begun_in_another_order_is_not_continued(tmp_path):
    assert train(1, tmp_path, job_of_another_order, Options(stop_after_step=1)) == [None]
    with pytest.raises(RuntimeError, match=r"ResumeError: .* shuffles in another order"):
        train(1, tmp_path, job, Options())


@pytest.mark.parametrize(
    ("strategy", "world_size", "name"),
    [
        pytest.param("fsdp", world_size, name, marks=[pytest.mark.campaign] * (world_size != 2 + i % 2))
        for world_size in (1, 2, 3)
        for i, name in enumerate(("stop at a step", "stop in validation", "kill at a step", "kill in a save"))
    ]
    + [
        pytest.param(f"ZeRO {stage}", world_size, name, marks=[pytest.mark.campaign] * (stage != world_size))
        for stage in (1, 2, 3)
        for world_size, name in ((1, "stop at a step"), (2, "stop in validation"), (3, "kill at a step"))
    ],
)
def test_so_has_one_whose_ranks_keep_parts_of_the_model(strategy, world_size, name, uninterrupted, tmp_path):
    interruptions = [replace(each, strategy=strategy) for each in INTERRUPTIONS[name]]
    final = Options(checkpoint_every=interruptions[-1].checkpoint_every, strategy=strategy)
    continue_to_the_end(tmp_path, world_size, interruptions, final)
    assert differences(final_state(tmp_path), uninterrupted(world_size, final)) == []
    assert samples_trained_on(tmp_path, world_size) == all_samples()


IN_STEPS = {
    # Its checkpoints: before and after the row of steps 6 and 9; all that is due at step 6 is done once.
    "stop where a row is due": [Options(stop_after_step=5), Options(stop_after_step=2)],
    "stop in a validation": [Options(stop_after_validation=5)],
    "stop at the last step": [Options(stop_after_step=9)],
    "kill between rows": [Options(checkpoint_every=1, kill_after_step=8)],
    "kill in the save after a row": [Options(checkpoint_every=3, kill_in_save=2)],
    "stop, stop in a validation, and kill": [
        Options(checkpoint_every=2, stop_after_step=3),
        Options(checkpoint_every=2, stop_after_validation=4),
        Options(checkpoint_every=2, kill_after_step=2),
    ],
}


@pytest.mark.parametrize(("world_size", "name"), [(2 + i % 2, name) for i, name in enumerate(IN_STEPS)])
def test_so_has_one_that_counts_steps(world_size, name, uninterrupted, tmp_path):
    interruptions = [replace(each, in_steps=True) for each in IN_STEPS[name]]
    final = Options(checkpoint_every=interruptions[-1].checkpoint_every, in_steps=True)
    continue_to_the_end(tmp_path, world_size, interruptions, final)
    found = final_state(tmp_path)
    rows = [(row["step"], row["phase"]) for row in found["rows"]]
    assert rows == [
        *((2, "train"), (3, "val"), (4, "train"), (6, "train+val")),
        *((8, "train"), (9, "val"), (10, "train+val")),
    ]
    assert differences(found, uninterrupted(world_size, final)) == []


SETS = {
    # Each rank evaluates 4 batches of the first set, the same with the average, and 2 of the second.
    "stop in the second set": [Options(stop_after_validation=9), Options(stop_after_validation=11)],
    "kill in the save after it": [Options(kill_in_save=2)],
}


@pytest.mark.parametrize(("world_size", "name"), [(1 + i, name) for i, name in enumerate(SETS)])
def test_so_has_one_that_validates_on_several_sets(world_size, name, uninterrupted, tmp_path):
    final = Options(sets=True)
    continue_to_the_end(tmp_path, world_size, [replace(each, sets=True) for each in SETS[name]], final)
    found = final_state(tmp_path)
    assert differences(found, uninterrupted(world_size, final)) == []
    assert found["weights"].keys() == {"best.pt", "last.pt", "swa.pt"}
    losses = {name for row in found["rows"] for name in row if name.endswith("_loss")}
    assert losses == {"train_loss", "val_whole_loss", "ema_whole_loss", "val_part_loss", "ema_part_loss"}
    # The training is that of a run with one set.
    assert [row["train_loss"] for row in found["rows"]] == [
        row["train_loss"] for row in uninterrupted(world_size, Options())["rows"]
    ]


@pytest.mark.parametrize("world_size", [1, 3])
def test_augmentation_in_loading_processes_continues(world_size, uninterrupted, tmp_path):
    final = Options(workers=2)
    continue_to_the_end(tmp_path, world_size, [replace(final, stop_after_step=5)], final)
    assert differences(final_state(tmp_path), uninterrupted(world_size, final)) == []


def test_augmentation_does_not_depend_on_the_number_of_loading_processes(uninterrupted):
    for workers in (1, 2):
        assert differences(uninterrupted(1, Options(workers=0)), uninterrupted(1, Options(workers=workers))) == []


def test_a_state_is_read_to_where_it_belongs(tmp_path):
    """The meta device stands for a GPU: the ranks of a node must not each have the whole state on the CPU besides."""
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    trainer = {"net": net, "loss_fn": nn.CrossEntropyLoss(), "optimizer": torch.optim.Adam(net.parameters())}
    loop = make_loop(
        str(tmp_path), {"trainer": trainer, "train": Samples(torch.randn(2, 4), torch.ones(2)), "batch_size": 2}
    )
    loop.trained.model.bare.to("meta")
    loop.trained.ema = Ema(loop.trained.model.bare, 0.9)
    [weight, *_] = loop.trained.model.bare.parameters()
    saved_by_columns = torch.empty(4, 8, device="meta").t()
    found = loop.trained.room("model/0.weight", saved_by_columns)
    assert found.untyped_storage()._cdata == weight.untyped_storage()._cdata
    assert loop.trained.room("ema/0.weight", saved_by_columns) is loop.trained.ema.state_dict()["0.weight"]
    state = loop.trained.room("optimizer/state/0.weight/exp_avg", saved_by_columns)
    # To the bit also means: in the order in which it lay.
    assert (state.device.type, state.stride()) == ("meta", (1, 8))
    # What has no place there, or another form.
    for path, like in (("model/1.running_mean", torch.empty(8)), ("optimizer/state/0.weight/step", torch.empty(()))):
        assert loop.trained.room(path, like.to("meta")) is None
    assert loop.trained.room("model/0.weight", saved_by_columns.double()) is None


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_scheduler_continues(scheduler, uninterrupted, tmp_path):
    final = Options(scheduler=scheduler)
    continue_to_the_end(tmp_path, 2, [replace(final, stop_after_step=5), replace(final, kill_before_save=1)], final)
    expected = uninterrupted(2, final)
    assert differences(final_state(tmp_path), expected) == []
    rates = [row["lr"] for row in expected["rows"]]
    assert len(set(rates)) > 1
    if scheduler == "cosine by step":  # each epoch's last step has done 3, 7 and 11 steps of 12 before
        assert rates == pytest.approx([0.01 * (1 + math.cos(math.pi * steps / 12)) for steps in (3, 7, 11)], rel=1e-5)


def test_patience_continues(uninterrupted, tmp_path):
    # Nothing is learned, and ties are no better.
    final = Options(epochs=10, patience=2, random=False, optimizer="none")
    continue_to_the_end(tmp_path, 2, [replace(final, stop_after_step=2 * STEPS)], final)
    assert [row["epoch"] for row in final_state(tmp_path)["rows"]] == [1, 2, 3]
    assert differences(final_state(tmp_path), uninterrupted(2, final)) == []
    train(2, tmp_path, job, final)  # nothing is left to do
    assert differences(final_state(tmp_path), uninterrupted(2, final)) == []


def test_best_weights_go_back_with_the_run(uninterrupted, tmp_path):
    options = Options()
    continue_to_the_end(tmp_path, 1, [replace(options, kill_before_save=2)], replace(options, epochs=1))
    # Killed after the second epoch's best.pt, and then shortened to one epoch.
    best, second = (uninterrupted(1, replace(options, epochs=n))["weights"]["best.pt"] for n in (1, 2))
    assert differences(best, second) != []
    found = torch.load(RunDir(tmp_path).best_weights, weights_only=True)
    assert differences(found, best) == []
    assert [row["epoch"] for row in RunDir(tmp_path).rows()] == [1]


@pytest.mark.parametrize(("before", "after"), [(4, 1), (4, 2), (4, 3), (4, 6), (1, 3)])
def test_on_another_number_of_ranks_the_curve_is_the_same(before, after, uninterrupted, tmp_path):
    final = Options(random=False, optimizer="sgd")
    train(before, tmp_path, job, replace(final, stop_after_step=5))
    train(after, tmp_path, job, final)
    found, expected = final_state(tmp_path), uninterrupted(before, final)
    for row, expected_row in zip(found["rows"], expected["rows"], strict=True):
        assert row == approximately(expected_row, rel=1e-5)
        assert row["train_acc"] == expected_row["train_acc"]
    for name, value in expected["weights"]["last.pt"].items():
        torch.testing.assert_close(found["weights"]["last.pt"][name], value, rtol=1e-4, atol=1e-6)
    assert samples_trained_on(tmp_path, max(before, after)) == all_samples()
