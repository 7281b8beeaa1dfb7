"""Which samples of an epoch belong where: the order, the batches, the ranks' shares, the micro-batches.

All of it is arithmetic on positions in the epoch's order, so that every rank knows every rank's share without a
message, and any step is found at once after a stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..distributed.seeds import derive_seed, sample_seeds
from .permutation import Permutation

BLOCK = 4096  # positions whose indices are found at once

# From positions in an epoch's order to the samples' indices, or to whatever else a user's sampler calls samples by.
Order = Callable[[NDArray[np.int64]], NDArray[Any]]


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

    def batch(self, step: int) -> range:
        """The step's samples (from 0) over all ranks, as positions in the epoch's order."""
        return range(step * self.batch_size, min((step + 1) * self.batch_size, self.num_samples))

    def samples(self, step: int) -> int:
        """Samples of the step's batch, over all ranks."""
        return len(self.batch(step))

    def share(self, step: int) -> range:
        """This rank's samples of the step, as positions in the epoch's order."""
        batch = self.batch(step)
        size, left_over = divmod(len(batch), self.world_size)
        start = self.rank * size + min(self.rank, left_over)
        return batch[start : start + size + (self.rank < left_over)]

    def num_micro_batches(self, step: int) -> int:
        """Parts of each rank's share of the step."""
        largest_share = -(-self.samples(step) // self.world_size)
        return -(-largest_share // self.micro_batch_size) if self.micro_batch_size else 1

    def micro_batches(self, step: int) -> list[range]:
        """This rank's micro-batches of the step, as positions in the epoch's order."""
        return cut(self.share(step), self.num_micro_batches(step))


@dataclass(frozen=True)
class ListedShard(Shard):
    """A part of an epoch whose batches are of any size."""

    ends: tuple[int, ...] = ()  # of each batch, as positions in the epoch's order

    @property
    def num_steps(self) -> int:
        return len(self.ends)

    def batch(self, step: int) -> range:
        return range(self.ends[step - 1] if step else 0, self.ends[step])


def cut(share: range, count: int) -> list[range]:
    """Contiguous, nearly equal parts; some are empty where there are more parts than samples."""
    return [share[len(share) * i // count : len(share) * (i + 1) // count] for i in range(count)]


class Indices(list[Any]):
    """A micro-batch's samples, and for each of them the seed of what loading it draws."""

    seeds: list[int]


def index_batches(shard: Shard, order: Order, key: int, first_step: int, *, fill_empty: bool) -> Iterator[Indices]:
    """The indices of each of this rank's micro-batches, from a step on.

    An empty micro-batch is left out, or filled with two copies of its batch's first sample: where the rank must take
    part in the collectives of the backward pass, it computes something, at weight 0. Two, since batch norm refuses one.

    Args:
        key: of the samples' seeds.
    """
    # Many steps at once: numpy takes as long for a few positions as for a thousand.
    stride = max(1, BLOCK * shard.world_size // shard.batch_size)
    for first in range(first_step, shard.num_steps, stride):
        steps = range(first, min(first + stride, shard.num_steps))
        parts = [part for step in steps for part in _positions(shard, step, fill_empty=fill_empty)]
        if not parts:
            continue
        positions = np.concatenate(parts)
        indices, seeds = order(positions).tolist(), sample_seeds(positions, key).tolist()
        begin = 0
        for part in parts:
            end = begin + len(part)
            micro_batch = Indices(indices[begin:end])
            micro_batch.seeds = seeds[begin:end]
            yield micro_batch
            begin = end


def _positions(shard: Shard, step: int, *, fill_empty: bool) -> Iterator[NDArray[np.int64]]:
    for part in shard.micro_batches(step):
        if part:
            yield np.arange(part.start, part.stop)
        elif fill_empty:
            yield np.full(2, shard.batch(step).start)
