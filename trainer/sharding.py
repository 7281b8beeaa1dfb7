"""Which samples of an epoch are whose: the order, the batches, the ranks' shares, the micro-batches.

All of it is arithmetic on positions in the epoch's order, so that every rank knows every rank's share without a
message, and any step is found at once after a stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .order import Permutation
from .seeds import derive_seed, sample_seeds

BLOCK = 4096  # positions whose indices are found at once

Order = Callable[[NDArray[np.int64]], NDArray[np.int64]]  # positions in an epoch's order -> the samples' indices


def in_order(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The order of the dataset itself."""
    return positions


def shuffled(num_samples: int, seed: int, epoch: int) -> Order:
    """The samples' order in this epoch: a function of (seed, epoch) alone."""
    return Permutation(num_samples, derive_seed("order", seed, epoch))


@dataclass(frozen=True)
class Shard:
    """One rank's part of an epoch.

    Each batch is cut into `world_size` contiguous, nearly equal shares (the first ones take what is left over), and
    each share into micro-batches: as many on every rank, none larger than `micro_batch_size`. A share or a
    micro-batch may be empty; nothing is dropped, nothing repeated.
    """

    num_samples: int
    batch_size: int  # over all ranks
    rank: int = 0
    world_size: int = 1
    micro_batch_size: int | None = None

    @property
    def num_steps(self) -> int:
        """Batches in an epoch, the short last one included."""
        return -(-self.num_samples // self.batch_size)

    def samples(self, step: int) -> int:
        """Samples of the step's batch, over all ranks."""
        return min(self.batch_size, self.num_samples - step * self.batch_size)

    def share(self, step: int) -> range:
        """This rank's samples of the step (from 0), as positions in the epoch's order."""
        size, left_over = divmod(self.samples(step), self.world_size)
        start = step * self.batch_size + self.rank * size + min(self.rank, left_over)
        return range(start, start + size + (self.rank < left_over))

    def num_micro_batches(self, step: int) -> int:
        """Parts of each rank's share of the step."""
        largest_share = -(-self.samples(step) // self.world_size)
        return -(-largest_share // self.micro_batch_size) if self.micro_batch_size else 1

    def micro_batches(self, step: int) -> list[range]:
        """This rank's micro-batches of the step, as positions in the epoch's order."""
        return cut(self.share(step), self.num_micro_batches(step))


def cut(share: range, count: int) -> list[range]:
    """Contiguous, nearly equal parts; some are empty where there are more parts than samples."""
    return [share[len(share) * i // count : len(share) * (i + 1) // count] for i in range(count)]


class Indices(list[int]):
    """A micro-batch's samples, and for each of them the seed of what loading it draws."""

    seeds: list[int]


class IndexBatches:
    """A DataLoader's batch sampler: the dataset's indices for each of this rank's micro-batches.

    An empty micro-batch is filled with two copies of its batch's first sample: the rank must take part in the
    collectives of the backward pass, so it computes something, at weight 0. Two, since batch norm refuses one.
    """

    def __init__(self, shard: Shard, *, fill_empty: bool) -> None:
        self.shard = shard
        self.fill_empty = fill_empty
        self.order: Order = in_order
        self.key = 0  # of the samples' seeds
        self.first_step = 0

    def __iter__(self) -> Iterator[Indices]:
        shard = self.shard
        # Many steps at once: numpy takes as long for a few positions as for a thousand.
        stride = max(1, BLOCK * shard.world_size // shard.batch_size)
        for first in range(self.first_step, shard.num_steps, stride):
            steps = range(first, min(first + stride, shard.num_steps))
            parts = [part for step in steps for part in self._positions(step)]
            if not parts:
                continue
            positions = np.concatenate(parts)
            indices, seeds = self.order(positions).tolist(), sample_seeds(positions, self.key).tolist()
            begin = 0
            for part in parts:
                end = begin + len(part)
                micro_batch = Indices(indices[begin:end])
                micro_batch.seeds = seeds[begin:end]
                yield micro_batch
                begin = end

    def _positions(self, step: int) -> Iterator[NDArray[np.int64]]:
        for part in self.shard.micro_batches(step):
            if part:
                yield np.arange(part.start, part.stop)
            elif self.fill_empty:
                yield np.full(2, step * self.shard.batch_size)
