"""One optimizer step: what it waits for, what it sends, and that an empty share leaves no trace."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import count_collectives, run_ranks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torchmetrics import Accuracy
from training import Job, Samples, make_loop

from dtrain.trainer.samples import read_samples
from dtrain.trainer.seeds import derive_seed, sample_seeds
from dtrain.trainer.sharding import Indices

CLASSES, LENGTH = 3, 4


class Net(nn.Module):
    """Batch norm and dropout, and a buffer that the backward pass reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Conv1d(2, 5, 1)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(5 * LENGTH, CLASSES)
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(self.first(x) * self.scale)).flatten(1))


def samples(number: int, noise: float) -> Samples:
    torch.manual_seed(2)
    return Samples(torch.randn(number, 2, LENGTH), torch.randint(CLASSES, (number,)), noise)


def job(number: int, batch_size: int, micro_batch_size: int | None, loss_fn: Any, noise: float = 0.0) -> Job:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    trainer = {"net": net, "loss_fn": loss_fn, "optimizer": optimizer, "micro_batch_size": micro_batch_size}
    trainer["metrics_dict"] = {"acc": Accuracy(task="multiclass", num_classes=CLASSES, validate_args=False)}
    trainer["scheduler"] = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return {
        "trainer": trainer | {"scheduler_interval": "step"},
        "train": samples(number, noise),
        "batch_size": batch_size,
    }


def seed(rank: int) -> None:
    torch.manual_seed(rank)
    np.random.seed(rank)
    random.seed(rank)


def draws() -> list[float]:
    """What all three generators would give next."""
    return [float(torch.rand(())), float(np.random.rand()), random.random()]


def seeded(positions: range) -> Indices:
    """The samples at these positions of the first epoch, in the dataset's order."""
    indices = Indices(positions)
    indices.seeds = sample_seeds(np.array(positions), derive_seed("loading", 0, 1)).tolist()
    return indices


# -- empty shares --------------------------------------------------------------------------------

# For each rank the micro-batches with samples, as the rule for shares has them; all other parts are empty.
SHARES = {
    (1, None): [[[0]], [], []],
    (2, None): [[[0]], [[1]], []],
    (4, 1): [[[0], [1]], [[2]], [[3]]],
}


def take_a_step(rank: int, world_size: int, folder: str, number: int, micro_batch_size: int | None) -> Any:
    weighted = nn.CrossEntropyLoss(weight=torch.ones(CLASSES)) if number == 2 else nn.CrossEntropyLoss()
    loop = make_loop(folder, job(number, 4, micro_batch_size, weighted, noise=0.1))
    seed(rank)
    loop.train_epoch()
    sums = [state.value for state in loop.train_tally.states()]
    reported = loop.train_tally.finish(sums) if any(sums) else {}
    return {name: value.clone() for name, value in loop.model.bare.state_dict().items()}, draws(), reported


@pytest.mark.parametrize(("number", "micro_batch_size"), SHARES)
def test_an_empty_share_leaves_no_trace(number, micro_batch_size, tmp_path):
    results = run_ranks(3, take_a_step, str(tmp_path), number, micro_batch_size)

    whole, gradients, buffers = samples(number, noise=0.1), [], []
    data = read_samples(whole, seeded(range(number)))
    for rank, micro_batches in enumerate(SHARES[number, micro_batch_size]):
        net = Net()
        seed(rank)
        loss_sum = correct = 0.0
        for chosen in micro_batches:
            features, target = (torch.stack(each) for each in zip(*(data[i] for i in chosen), strict=True))
            predictions = net(features)
            loss = F.cross_entropy(predictions, target, reduction="sum")
            (loss / number).backward()
            loss_sum += loss.item()
            correct += int((predictions.argmax(1) == target).sum())
        assert results[rank][1] == draws()  # the random numbers that dropout took for its own samples, and no more
        taken = sum(map(len, micro_batches))
        expected = {"train_loss": loss_sum / taken, "train_acc": correct / taken} if taken else {}
        assert results[rank][2] == pytest.approx(expected, rel=1e-6)
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()])
        buffers.append(dict(net.named_buffers()))

    net = Net()
    for parameter, *parts in zip(net.parameters(), *gradients, strict=True):
        parameter.data -= 0.1 * torch.stack(parts).sum(0)
    for rank, (state, _, _) in enumerate(results):
        for name, value in net.named_parameters():
            torch.testing.assert_close(state[name], value.data, rtol=1e-5, atol=1e-7)
        for name, value in buffers[rank].items():
            assert torch.equal(state[name], value), name


# -- waiting and sending -------------------------------------------------------------------------

WAITS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__")
LOSSES = {
    "by samples": (nn.MultiMarginLoss(), 0),
    "by weights": (nn.CrossEntropyLoss(label_smoothing=0.1), 1),  # all-reduces of the weight in each step
}


def count(rank: int, world_size: int, folder: str, loss: str, micro_batches: int) -> tuple[Counter, Counter, int]:
    """The waits inside of steps, the collectives of an epoch, and the buckets that DDP all-reduced."""
    number, batch_size = 26, 8  # the last batch has 1 sample a rank
    loop = make_loop(folder, job(number, batch_size, -(-batch_size // world_size // micro_batches), LOSSES[loss][0]))
    waits: Counter[str] = Counter()
    buckets = 0

    def counted(name: str) -> Any:
        original = getattr(Tensor, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            waits[name] += 1
            return original(*args, **kwargs)

        return method

    def hook(group, bucket):
        nonlocal buckets
        buckets += 1
        return allreduce_hook(group, bucket)

    train_step = loop.train_step

    def watched_step(micro_batches: Any) -> None:
        loaded = list(micro_batches)  # what a loader does on the CPU is no wait for the device
        with ExitStack() as stack:
            for name in WAITS:
                stack.enter_context(patch.object(Tensor, name, counted(name)))
            train_step(iter(loaded))

    loop.train_step = watched_step
    loop.model.module.register_comm_hook(None, hook)
    with count_collectives() as collectives:
        loop.train_epoch()
    return waits, collectives, buckets


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_waits_for_nothing_and_sends_one_small_message_beside_the_gradients(loss, micro_batches, tmp_path):
    steps = 4
    for waits, collectives, buckets in run_ranks(2, count, str(tmp_path), loss, micro_batches):
        assert not waits
        assert buckets == steps  # the gradients: once a batch, however many micro-batches it has
        assert collectives == {"all_reduce": buckets + steps * (1 + LOSSES[loss][1])}
