"""A dataset of 10^12 samples trains, stops and goes on like one of 10^3: its order is arithmetic, and nothing grows."""

from __future__ import annotations

import itertools
import os
import resource
import signal
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.utils.data import Dataset
from training import fit, prepare

from dtrain.files import read_json, write_json
from dtrain.run.folder import RUN_DIR_VARIABLE, RunDir
from dtrain.run.heartbeat import Heartbeat
from dtrain.trainer.checkpoint.manager import saved
from dtrain.trainer.data.permutation import Permutation
from dtrain.trainer.distributed.seeds import derive_seed

BATCH, SEED, MOST_MB = 6, 5, 100


class Numbered(Dataset):
    """So many samples, which follow from their indices."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([index % 7, index % 11], dtype=torch.float32) / 10, torch.tensor(index % 2)


def parts() -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = nn.Linear(2, 2)
    return net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.1)


def job(size: int, steps: int):
    """Stops after that many steps of the process, or soon after; leaves its peak memory, in MB."""
    net, loss, optimizer = parts()
    run, counted = RunDir(os.environ[RUN_DIR_VARIABLE]), itertools.count(1)

    def count(*_: object) -> None:
        if next(counted) == steps:
            Heartbeat(run.heartbeat(dist.get_rank())).stop = signal.SIGTERM
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            write_json(run.path / f"peak-{dist.get_rank()}.json", {"MB": peak})

    optimizer.register_step_post_hook(count)
    return {
        "trainer": {"net": net, "loss_fn": loss, "optimizer": optimizer, "seed": SEED},
        "train": Numbered(size),
        "batch_size": BATCH,
        "fit": {"epochs": 1},
    }


def stopped_twice(size: int, folder: Path) -> tuple[dict[str, torch.Tensor], int, list[float]]:
    """The weights after a stop and another one, how many steps they are of, and each rank's peak memory in MB."""
    for steps in (3, 4):
        run = prepare(folder, 2)
        assert run_ranks(2, fit, str(folder), job, size, steps) == [None, None]
    peaks = [read_json(folder / f"peak-{rank}.json")["MB"] for rank in range(2)]
    return torch.load(run.last_weights, weights_only=True), int(saved(run)[-1].name.removeprefix("step-")), peaks


def test_more_samples_than_memory_could_list(tmp_path):
    size = 10**12
    *_, few = stopped_twice(1_000, tmp_path / "few")
    weights, steps, many = stopped_twice(size, tmp_path / "many")
    assert max(many) < max(few) + MOST_MB

    assert steps >= 7
    net, loss, optimizer = parts()
    dataset, order = Numbered(size), Permutation(size, derive_seed("order", SEED, 1))(np.arange(steps * BATCH))
    for step in range(steps):
        samples = [dataset[int(index)] for index in order[step * BATCH : (step + 1) * BATCH]]
        inputs, targets = (torch.stack(each) for each in zip(*samples, strict=True))
        optimizer.zero_grad()
        loss(net(inputs), targets).backward()
        optimizer.step()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6)
