"""What a dataset draws for a sample depends on (seed, epoch, position in the order), and on nothing else."""

from __future__ import annotations

import random
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from marks import campaign
from ranks import run_ranks
from torch.utils.data import Dataset, Subset, default_convert
from training import epoch_order

from dtrain.trainer.data.indexed import IndexedBatches, Source
from dtrain.trainer.data.ready_batches import ReadyBatches
from dtrain.trainer.data.samples import reads_blocks
from dtrain.trainer.data.workers import Processes
from dtrain.trainer.distributed.seeds import sample_seeds, seed_loading
from dtrain.trainer.distributed.world import World, join_world

NUM_SAMPLES, BATCH, SEED = 23, 7, 3  # the last batch has 2: on three ranks one has none


def draws() -> list[float]:
    """Two numbers of each generator; numpy's normal keeps a second one for later."""
    drawn = [float(torch.rand(())), float(torch.randn(())), np.random.rand(), np.random.randn()]
    return [*drawn, random.random(), random.gauss(0, 1)]


class Noisy(Dataset):
    """Samples that are their index and what was drawn for them."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, torch.tensor(draws(), dtype=torch.float64)


class Blocks(Noisy):
    """Draws for all samples of a block, as one that transforms whole batches does."""

    def __getitems__(self, indices: list[int]) -> list[tuple[int, torch.Tensor]]:
        values = [torch.tensor(draws(), dtype=torch.float64) for _ in range(len(indices))]
        return list(zip(list(indices), values, strict=True))


def load(world: World, dataset: Dataset[Any], workers: int, micro_batch_size: int | None, first_step: int = 0) -> Any:
    """For two epochs, by sample: its step and what was drawn for it on this rank."""
    source = Source(dataset, BATCH, shuffle=True, processes=Processes(workers))
    batches = IndexedBatches(source, world, SEED, micro_batch_size, fill_empty=True)
    seen: list[dict[int, Any]] = [{}, {}]
    for epoch in (1, 2):
        for step, batch in enumerate(batches.epoch(epoch, first_step), first_step):
            for part in batch.micro_batches:
                if part.samples:
                    indices, values = part.data
                    seen[epoch - 1] |= {
                        int(i): (step, value.tolist()) for i, value in zip(indices, values, strict=True)
                    }
    return seen


def load_as_rank(rank: int, world_size: int, *options: Any) -> Any:
    return load(join_world("cpu"), Noisy(), *options)


def alone() -> World:
    return World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def expected():
    return load(alone(), Noisy(), 0, None)


def test_each_sample_draws_numbers_of_its_own(expected):
    for seen in expected:
        assert len(seen) == NUM_SAMPLES
        values = np.array([drawn for _, drawn in seen.values()])
        for column in values.T:
            assert len(set(column)) == NUM_SAMPLES
        assert len(set(values.ravel())) == values.size  # nor do two generators draw the same
    for index in range(NUM_SAMPLES):
        assert expected[0][index][1] != expected[1][index][1]


@pytest.mark.parametrize(
    ("world_size", "workers", "micro_batch_size"), [campaign(1, 2, 2), campaign(2, 0, None), (3, 2, None), (3, 0, 1)]
)
def test_neither_ranks_nor_workers_nor_micro_batches_change_a_sample(world_size, workers, micro_batch_size, expected):
    ranks = run_ranks(world_size, load_as_rank, workers, micro_batch_size)
    for epoch in (0, 1):
        assert {index: drawn for seen in ranks for index, drawn in seen[epoch].items()} == expected[epoch]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stop_changes_no_sample(workers, expected):
    draws()  # whatever the process has drawn before
    continued = load(alone(), Noisy(), workers, None, first_step=2)
    assert continued == [{i: drawn for i, drawn in seen.items() if drawn[0] >= 2} for seen in expected]


def test_a_subset_is_read_sample_by_sample(expected):
    # torch's Subset has __getitems__, whatever it is a subset of.
    assert load(alone(), Subset(Noisy(), range(NUM_SAMPLES)), 0, 3) == expected
    assert reads_blocks(Subset(Blocks(), [0]))
    assert not reads_blocks(Subset(Subset(Noisy(), [0]), [0]))


def test_a_dataset_that_reads_blocks_is_seeded_by_its_first_position(expected):
    blocks = load(alone(), Blocks(), 0, None)
    again = load(alone(), Blocks(), 2, None, first_step=1)
    assert again == [{i: drawn for i, drawn in seen.items() if drawn[0] >= 1} for seen in blocks]
    first = int(epoch_order(NUM_SAMPLES, SEED, 1)[BATCH])  # where a block begins
    same = [index for index in range(NUM_SAMPLES) if blocks[0][index] == expected[0][index]]
    assert first in same
    assert len(same) == -(-NUM_SAMPLES // BATCH)


def test_loading_leaves_the_training_its_own_numbers():
    def numbers(load_between: bool) -> list[list[float]]:
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        found = []
        batches = IndexedBatches(Source(Noisy(), BATCH, shuffle=True), alone(), SEED, None, fill_empty=True)
        for batch in batches.epoch(1):
            if load_between:
                assert [part.samples for part in batch.micro_batches] == [batch.samples]
            found.append([float(torch.rand(())), np.random.rand(), random.random(), random.gauss(0, 1)])
        return found

    assert numbers(True) == numbers(False)


class Drawing(tuple):
    """A batch that draws when it is looked at."""

    def __iter__(self):
        torch.rand(())
        return super().__iter__()


PAIR = (torch.zeros(4, 2), np.zeros(4))


@pytest.mark.parametrize(
    ("batches", "collate", "may_draw"),
    [
        ([PAIR, {"a": torch.zeros(4), "b": [*PAIR]}], None, False),
        ((torch.zeros(4),), None, False),
        ([PAIR, Drawing(PAIR)], None, True),
        ([PAIR], default_convert, True),
        (Noisy(), None, True),
    ],
)
def test_only_batches_that_draw_nothing_are_read_without_a_seed(batches, collate, may_draw):
    source = Source(batches, None, shuffle=False, collate=collate)
    read = ReadyBatches(source, World(0, 1, torch.device("cpu")), SEED, None, fill_empty=True)
    before = torch.get_rng_state()
    with patch("dtrain.trainer.data.ready_batches.seed_loading", wraps=seed_loading) as seeded:
        for batch in read.epoch(1):
            assert len(list(batch.micro_batches)) == 1
    assert seeded.called is may_draw
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_fails_as_the_dataset_does_and_leaves_no_trace():
    class Broken(Noisy):
        def __getitem__(self, index: int) -> Any:
            draws()
            raise ZeroDivisionError

    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with pytest.raises(ZeroDivisionError):
        load(alone(), Broken(), 0, None)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


def test_seeds_of_positions_are_those_of_splitmix64():
    # The reference: the state advances by a constant, and is mixed. Vigna's splitmix64.c, in Python's integers.
    mask, state, key = 2**64 - 1, 2**63 - 5, 2**63 - 5
    expected = []
    for _ in range(5):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        expected.append(z ^ (z >> 31))
    assert sample_seeds(np.arange(5), key).tolist() == expected
    far = sample_seeds(np.array([10**12, 10**12 + 1]), key)
    assert far.dtype == np.uint64
    assert far[0] != far[1]
