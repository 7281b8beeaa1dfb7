"""Which samples are whose: by arithmetic alone, and as the model sees them in a training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from training import Job, Samples, epoch_order, train

from dtrain.errors import UserError
from dtrain.trainer.data.indexed import IndexedBatches, Source
from dtrain.trainer.data.sharding import Shard
from dtrain.trainer.distributed.world import World, join_world


@pytest.mark.parametrize("micro_batch_size", [None, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_shares_and_micro_batches_cover_each_batch_exactly(world_size, micro_batch_size):
    for num_samples, batch_size in product(range(1, 25), range(1, 13)):
        shards = [Shard(num_samples, batch_size, rank, world_size, micro_batch_size) for rank in range(world_size)]
        batches = [list(range(num_samples))[start : start + batch_size] for start in range(0, num_samples, batch_size)]
        for shard in shards:
            assert shard.num_steps == len(batches)
        for step, batch in enumerate(batches):
            parts = [shard.micro_batches(step) for shard in shards]
            # Contiguous, in the order of the ranks, nothing dropped and nothing repeated.
            assert [i for of_rank in parts for part in of_rank for i in part] == batch
            shares = [sum(map(len, of_rank)) for of_rank in parts]
            assert max(shares) - min(shares) <= 1
            counts = {len(of_rank) for of_rank in parts}
            assert len(counts) == 1
            assert counts == {1 if micro_batch_size is None else -(-max(shares) // micro_batch_size)}
            for of_rank in parts:
                sizes = [len(part) for part in of_rank]
                assert max(sizes) - min(sizes) <= 1
                assert max(sizes) <= (micro_batch_size or batch_size)
            assert shards[0].samples(step) == len(batch)


def test_the_order_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    orders = {(seed, epoch): epoch_order(100, seed, epoch) for seed in (0, 1) for epoch in (1, 2)}
    for (seed, epoch), order in orders.items():
        assert sorted(order.tolist()) == list(range(100))
        torch.manual_seed(epoch * 10 + seed)  # no other generator has a say
        assert torch.equal(epoch_order(100, seed, epoch), order)
    assert len({tuple(order.tolist()) for order in orders.values()}) == 4


# -- what the model sees -------------------------------------------------------------------------

NUM_SAMPLES, BATCH, EPOCHS, SEED = 27, 8, 2, 4  # the last batch has 3


def recording(folder: str, workers: int, micro_batch_size: int | None) -> Job:
    """A training that writes down for each step which samples went through the model of each rank."""
    net = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    current: list[list[int]] = []
    record = Path(folder) / f"seen-{dist.get_rank()}.jsonl"

    def step(model: nn.Module, batch: Any) -> dict[str, Any]:
        features, target = batch
        current.append(target.tolist())
        return {"loss": model(features).mean(), "weight": len(target)}  # with a weight it is called once

    def write(*_: Any) -> None:
        with record.open("a") as file:
            file.write(json.dumps(current) + "\n")
        current.clear()

    optimizer.register_step_pre_hook(write)
    trainer = {"net": net, "step": step, "optimizer": optimizer, "seed": SEED, "micro_batch_size": micro_batch_size}
    data = Samples(torch.zeros(NUM_SAMPLES, 1), torch.arange(NUM_SAMPLES))
    return {"trainer": trainer, "train": data, "batch_size": BATCH, "workers": workers, "fit": {"epochs": EPOCHS}}


@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_step_takes_the_same_samples_however_they_are_split(world_size, workers, micro_batch_size, tmp_path):
    train(world_size, tmp_path, recording, str(tmp_path), workers, micro_batch_size)
    files = [(tmp_path / f"seen-{rank}.jsonl").read_text().splitlines() for rank in range(world_size)]
    orders = [epoch_order(NUM_SAMPLES, SEED, epoch) for epoch in range(1, EPOCHS + 1)]
    batches = [batch.tolist() for order in orders for batch in order.split(BATCH)]
    assert [len(lines) for lines in files] == [len(batches)] * world_size
    for step, batch in enumerate(batches):
        micro_batches = [json.loads(lines[step]) for lines in files]
        assert [i for of_rank in micro_batches for part in of_rank for i in part] == batch
        assert max(len(part) for of_rank in micro_batches for part in of_rank) <= (micro_batch_size or BATCH)


# -- a sampler of the user's own -----------------------------------------------------------------


class Unseeded(Sampler[int]):
    """Draws from a generator that nobody else knows, and says so: other numbers on each rank."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.drawn = np.random.default_rng()
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(self.drawn.integers(NUM_SAMPLES, size=self.size).tolist())

    def __len__(self) -> int:
        return self.size


SAMPLERS: dict[str, Callable[[], Sampler[int]]] = {
    "weighted": lambda: WeightedRandomSampler([1.0 + i for i in range(NUM_SAMPLES)], 20),
    "with a generator": lambda: SubsetRandomSampler(range(5, 25), generator=torch.Generator()),
    "with replacement": lambda: RandomSampler(range(NUM_SAMPLES), replacement=True, num_samples=20),
    "unseeded": lambda: Unseeded(20),
}


def seen_through(rank: int, world_size: int, name: str, first_step: int) -> list[list[list[int]]]:
    """For two epochs, this rank's samples of each step."""
    sampler = SAMPLERS[name]()
    loader = DataLoader(Samples(torch.zeros(NUM_SAMPLES, 1), torch.arange(NUM_SAMPLES)), BATCH, sampler=sampler)
    world = join_world("cpu")
    batches = IndexedBatches(Source.of(loader), world, SEED, None, fill_empty=False)
    before = torch.get_rng_state()
    seen = [
        [[i for part in batch.micro_batches for i in part.data[1].tolist()] for batch in batches.epoch(epoch, first)]
        for epoch, first in ((1, first_step), (2, 0))
    ]
    assert torch.equal(torch.get_rng_state(), before)
    if isinstance(sampler, Unseeded):
        assert sampler.epochs == ([1, 2] if world.is_main else [])
    return seen


def joined(ranks: list[Any], epoch: int) -> list[list[int]]:
    return [[i for share in shares for i in share] for shares in zip(*(seen[epoch] for seen in ranks), strict=True)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_of_the_users_own_draws_one_order_for_all_ranks(name):
    one, three = run_ranks(1, seen_through, name, 0), run_ranks(3, seen_through, name, 0)
    for epoch in (0, 1):
        assert [len(batch) for batch in joined(three, epoch)] == [8, 8, 4]
    if name == "unseeded":
        return
    assert [joined(three, epoch) for epoch in (0, 1)] == [joined(one, epoch) for epoch in (0, 1)]
    assert joined(one, 0) != joined(one, 1)
    continued = run_ranks(3, seen_through, name, 2)
    assert joined(continued, 0) == joined(one, 0)[2:]
    if name == "with a generator":
        assert sorted(i for batch in joined(one, 0) for i in batch) == list(range(5, 25))


def test_a_sampler_that_does_not_keep_its_word_is_refused():
    sampler = Unseeded(20)
    sampler.__class__ = type("Short", (Unseeded,), {"__len__": lambda self: 21})
    loader = DataLoader(DATA, BATCH, sampler=sampler)
    batches = IndexedBatches(Source.of(loader), World(0, 1, torch.device("cpu")), 0, None, fill_empty=False)
    with pytest.raises(UserError, match="Short drew 20 samples for epoch 1, but its length is 21"):
        next(batches.epoch(1))


# -- DataLoaders ---------------------------------------------------------------------------------

DATA = Samples(torch.zeros(10, 1), torch.arange(10))


def test_a_data_loader_is_read_as_the_whole_batch():
    loader = DataLoader(DATA, batch_size=4, shuffle=True, num_workers=2)
    source = Source.of(loader)
    assert (source.dataset, source.batch_size, source.shuffle, source.processes.num_workers) == (DATA, 4, True, 2)
    assert Source.of(DataLoader(DATA, batch_size=4)).shuffle is False


def test_a_data_loader_that_gives_each_rank_its_part_is_refused():
    with pytest.raises(UserError, match="DistributedSampler"):
        Source.of(DataLoader(DATA, sampler=DistributedSampler(DATA, 1, 0)))


def test_no_data_is_refused():
    with pytest.raises(UserError, match="empty"):
        Source(Samples(torch.zeros(0, 1), torch.zeros(0)), 4, shuffle=True)
