"""Which samples of an epoch are whose: the order, the batches, the ranks' shares, the micro-batches.

All of it is arithmetic on positions in the epoch's order, so that every rank knows every rank's share without a
message, and any step is found at once after a stop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from .seeds import derive_seed


def epoch_order(num_samples: int, seed: int, epoch: int, shuffle: bool) -> torch.Tensor:
    """The samples' indices, int64 [num_samples], in the order of this epoch: a function of (seed, epoch) alone."""
    if not shuffle:
        return torch.arange(num_samples)
    generator = torch.Generator().manual_seed(derive_seed("order", seed, epoch))
    return torch.randperm(num_samples, generator=generator)


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

    def micro_batches(self, step: int) -> list[range]:
        """This rank's micro-batches of the step (from 0), as positions in the epoch's order."""
        samples = self.samples(step)
        size, left_over = divmod(samples, self.world_size)
        start = step * self.batch_size + self.rank * size + min(self.rank, left_over)
        share = size + (self.rank < left_over)
        largest_share = size + (left_over > 0)
        count = -(-largest_share // self.micro_batch_size) if self.micro_batch_size else 1
        cuts = [start + share * i // count for i in range(count + 1)]
        return [range(begin, end) for begin, end in pairwise(cuts)]


class Indices(list[int]):
    """A micro-batch's samples, and the seed for what loading them draws."""

    seed: int


class IndexBatches:
    """A DataLoader's batch sampler: the dataset's indices for each of this rank's micro-batches.

    An empty micro-batch is filled with two copies of its batch's first sample: the rank must take part in the
    collectives of the backward pass, so it computes something, at weight 0. Two, since batch norm refuses one.
    """

    def __init__(self, shard: Shard, seed: int, shuffle: bool, *, fill_empty: bool) -> None:
        self.shard = shard
        self.seed = seed
        self.shuffle = shuffle
        self.fill_empty = fill_empty
        self.epoch = 1
        self.first_step = 0

    def __iter__(self) -> Iterator[Indices]:
        shard = self.shard
        order = epoch_order(shard.num_samples, self.seed, self.epoch, self.shuffle)
        for step in range(self.first_step, shard.num_steps):
            for part in shard.micro_batches(step):
                if part:
                    indices = Indices(order[part.start : part.stop].tolist())
                elif self.fill_empty:
                    indices = Indices([int(order[step * shard.batch_size])] * 2)
                else:
                    continue
                indices.seed = derive_seed("loading", self.seed, self.epoch, part.start)
                yield indices
