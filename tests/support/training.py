"""Whole trainings for tests: a Trainer on each rank, in a run folder prepared as `dtrain launch` does."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten_with_path
from torch.utils.data import Dataset

from dtrain.run.folder import RUN_DIR_VARIABLE, RunDir
from dtrain.run.heartbeat import Heartbeat
from dtrain.schema.sections import EarlyStopping
from dtrain.trainer.checkpoint import storage
from dtrain.trainer.checkpoint.codec import unflatten
from dtrain.trainer.checkpoint.manager import saved
from dtrain.trainer.checkpoint.manifest import read_manifest
from dtrain.trainer.data.indexed import Source
from dtrain.trainer.data.sharding import shuffled
from dtrain.trainer.data.workers import Processes
from dtrain.trainer.distributed.stop import Stopped
from dtrain.trainer.fit.cadence import Cadence
from dtrain.trainer.fit.callbacks import Callbacks
from dtrain.trainer.fit.loop import Loop
from dtrain.trainer.fit.trained import Trained
from dtrain.trainer.metrics.early_stopping import Best
from dtrain.trainer.optimization.ema import Ema
from dtrain.trainer.optimization.optimizer_step import Update
from dtrain.trainer.trainer import Trainer

Job = dict[str, Any]  # net, loss, optimizer, train, val and options; see `fit`


def epoch_order(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """The samples of an epoch in the order in which a run with this seed trains on them."""
    return torch.from_numpy(shuffled(num_samples, seed, epoch)(np.arange(num_samples)))


class Samples(Dataset):
    """(features, target) tensors. `noise` adds random numbers from torch, numpy and random to each sample."""

    def __init__(self, features: Any, target: torch.Tensor, noise: float = 0.0) -> None:
        self.features, self.target, self.noise = features, target, noise

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = float(torch.rand(())) + np.random.rand() + random.random() if self.noise else 0.0
        return self.features[index] + self.noise * drawn, self.target[index]


def fit(rank: int, world_size: int, folder: str, make: Callable[..., Job], *args: Any) -> Any:
    """Train what `make(*args)` describes, as this rank; the history and the weights, or None where it was stopped.

    A job is `trainer` (a Trainer's arguments), `train` and `val` (datasets; without `batch_size` loaders), `workers`,
    and `fit` (arguments of Trainer.fit).
    """
    os.environ[RUN_DIR_VARIABLE] = folder
    job = make(*args)
    trainer = Trainer(**job["trainer"], device="cpu")
    train, val = job["train"], job.get("val")  # loaders as they are, else datasets
    if "batch_size" in job:
        processes = Processes(job.get("workers", 0))
        train = Source(train, job["batch_size"], shuffle=True, processes=processes)
        if val is not None:  # one set, or several by their names
            sets = val.items() if isinstance(val, dict) else [("", val)]
            sources = {name: Source(each, job["batch_size"], shuffle=False, processes=processes) for name, each in sets}
            val = sources if isinstance(val, dict) else sources[""]
    try:
        history = trainer.fit(train, val, **job["fit"])
    except Stopped:
        return None
    weights = {name: full(value).clone() for name, value in trainer.model.state_dict().items()}
    return history.to_dict("records"), weights


def full(tensor: torch.Tensor) -> torch.Tensor:
    """All of it, where it is one rank's part. All ranks take part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def make_loop(folder: str, job: Job) -> Loop:
    """The loop that `fit` would run, without running it; the samples in their own order."""
    trainer = Trainer(**job["trainer"], device="cpu")
    run = RunDir(folder)
    Heartbeat(run.heartbeat(trainer.world.rank), create=True)
    data = trainer._data(Source(job["train"], job["batch_size"], shuffle=False), None)
    model, precision, optimizer = trainer.model, trainer.precision, trainer.optimizer
    assert optimizer is not None
    update = Update(model, optimizer, precision, trainer.settings.fit)
    ema = None if trainer.ema is None else Ema(trainer.net, trainer.ema)
    trained = Trained(model, trainer.step, precision, optimizer, update, trainer.scheduling, trainer.freezing, ema)
    cadence = Cadence(trainer.settings, validates=False, num_steps=data.train.num_steps)
    return Loop(run, trained, data, trainer.settings, Best(EarlyStopping(monitor="train_loss")), cadence, Callbacks([]))


def prepare(folder: Path, world_size: int) -> RunDir:
    """Do what the agent does before it starts the ranks."""
    run = RunDir(folder)
    run.create()
    run.job.touch()
    for rank in range(world_size):
        Heartbeat(run.heartbeat(rank), create=True)
    return run


def train(world_size: int, folder: Path, make: Callable[..., Job], *args: Any) -> list[Any]:
    """What `fit` returned on each rank."""
    prepare(folder, world_size)
    return run_ranks(world_size, fit, str(folder), make, *args)


def final_state(folder: Path) -> dict[str, Any]:
    """All that a run leaves: rows, weights, and the last checkpoint, with each rank's random states."""
    run = RunDir(folder)
    files = [run.best_weights, run.last_weights, *[run.swa_weights] * run.swa_weights.exists()]
    weights = {path.name: torch.load(path, weights_only=True) for path in files}
    newest = saved(run)[-1]
    assert run.latest.read_text() == f"{newest.name}\n"
    for path in (run.checkpoints, run.best_weights.parent, run.path):
        assert not list(path.glob(".*"))  # nothing half written stays
    rows = [timeless(row) for row in run.rows()]
    return {"rows": rows, "weights": weights, "checkpoint": newest.name, **content(newest)}


def content(checkpoint: Path) -> dict[str, Any]:
    """What is in a checkpoint: the shared state, that of each rank, and the best weights, where they are there."""
    index, _ = read_manifest(checkpoint)
    tensors = {name: storage.empty_tensor(each) for name, each in index["tensors"].items()}
    storage.load(checkpoint, index, tensors)
    shared = unflatten(tensors)
    shared["rows"] = [timeless(row) for row in shared.get("rows", [])]
    ranks = [unflatten(tensors, f"rank-{rank}/") for rank in range(index["world_size"])]
    best = checkpoint / "best.pt"
    return {"shared": shared, "ranks": ranks, "best": torch.load(best, weights_only=True) if best.exists() else None}


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    """The row without what is measured by a clock."""
    return {key: value for key, value in row.items() if key not in ("samples_per_s", "time")}


def approximately(row: dict[str, Any], rel: float) -> dict[str, Any]:
    """What a row is equal to whose numbers are nearly those of this one."""
    return {key: value if isinstance(value, str) else pytest.approx(value, rel=rel) for key, value in row.items()}


def differences(one: Any, other: Any) -> list[str]:
    """The paths at which two nested values are not equal to the bit."""
    (ones, tree), (others, other_tree) = tree_flatten_with_path(one), tree_flatten_with_path(other)
    assert tree == other_tree
    found = []
    for (path, a), (_, b) in zip(ones, others, strict=True):
        if isinstance(a, torch.Tensor | np.ndarray):
            a, b = torch.as_tensor(a), torch.as_tensor(b)
            same = a.dtype == b.dtype and torch.equal(a, b)
        else:
            same = type(a) is type(b) and (a == b or (a != a and b != b))
        if not same:
            found.append(str(path))
    return found
