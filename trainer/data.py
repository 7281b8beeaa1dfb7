"""From a dataset to a rank's batches: what is loaded, by whom, and where an epoch continues after a stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from dtrain.errors import UserError

from .seeds import rng_kept, seed_everything
from .sharding import IndexBatches, Indices, Shard
from .world import World


@dataclass(frozen=True)
class Source:
    """Samples, and how they are to be read."""

    dataset: Dataset[Any]
    batch_size: int  # samples per optimizer step, over all ranks
    shuffle: bool
    workers: int = 0  # loading processes per rank
    collate: Callable[[list[Any]], Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.dataset, IterableDataset) or not hasattr(self.dataset, "__len__"):
            raise UserError(
                f"{type(self.dataset).__name__} has no length: this version trains on map-style datasets, "
                "those with __len__ and __getitem__"
            )
        if self.num_samples == 0:
            raise UserError(f"the dataset {type(self.dataset).__name__} is empty: len() is 0")

    @property
    def num_samples(self) -> int:
        return len(cast(Sized, self.dataset))

    @classmethod
    def of(cls, data: DataLoader[Any]) -> Source:
        """What a DataLoader reads, with its batch_size as the whole batch over all ranks."""
        if not isinstance(data, DataLoader):
            raise UserError(f"expected a torch DataLoader, got {type(data).__name__}: its batch_size is needed")
        if data.batch_size is None:
            raise UserError("the DataLoader has no batch_size (a batch_sampler of its own, or none): give it one")
        if not isinstance(data.sampler, (RandomSampler, SequentialSampler)):
            raise UserError(
                f"the DataLoader has a sampler of its own ({type(data.sampler).__name__}): "
                "dtrain shards the data itself; use shuffle=True or False"
            )
        if isinstance(data.sampler, RandomSampler) and (data.sampler.replacement or data.sampler._num_samples):
            raise UserError(
                "the DataLoader's RandomSampler draws with replacement, or a given number of samples: "
                "dtrain takes every sample once an epoch; use shuffle=True"
            )
        return cls(
            data.dataset,
            data.batch_size,
            isinstance(data.sampler, RandomSampler),
            data.num_workers,
            data.collate_fn,
        )


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the model at once. `samples` is 0 for a filler, which must leave no trace."""

    data: Any
    samples: int
    batch_samples: int  # of the whole batch that it is a part of, over all ranks
    is_last: bool = True  # of this rank's parts of the batch


class SeededDataset(Dataset[Any]):
    """A dataset for loading processes: what it draws (torch, numpy, random) follows from the micro-batch alone.

    So a run that continues in the middle of an epoch, with other processes at other batches, draws the same.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __getitems__(self, indices: Indices) -> Any:
        seed_everything(indices.seed)
        whole = getattr(self._dataset, "__getitems__", None)
        return whole(indices) if whole else [self._dataset[index] for index in indices]


class Batches:
    """One rank's batches of a source, epoch by epoch.

    Args:
        fill_empty: whether an empty share is filled (training) or left out (evaluation, which needs no collective).
    """

    def __init__(
        self, source: Source, world: World, seed: int, micro_batch_size: int | None, *, fill_empty: bool
    ) -> None:
        self.shard = Shard(source.num_samples, source.batch_size, world.rank, world.world_size, micro_batch_size)
        self._sampler = IndexBatches(self.shard, seed, source.shuffle, fill_empty=fill_empty)
        self._loader: DataLoader[Any] = DataLoader(
            SeededDataset(source.dataset) if source.workers else source.dataset,
            batch_sampler=cast(Any, self._sampler),
            num_workers=source.workers,
            collate_fn=source.collate,
            pin_memory=world.device.type == "cuda",
            # A loader draws from its generator at each start: from the training's, a resumed epoch would go on with
            # other numbers.
            generator=torch.Generator(),
        )
        self._device = world.device

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Iterator[MicroBatch]]:
        """For each step of the epoch from `first_step` on (from 0), this rank's micro-batches, on its device.

        Each step's micro-batches must be consumed before the next step is asked for.
        """
        sampler, shard = self._sampler, self.shard
        sampler.epoch, sampler.first_step = epoch, first_step
        loaded = iter(self._loader)
        for step in range(first_step, shard.num_steps):
            yield self._micro_batches(step, loaded)

    def _micro_batches(self, step: int, loaded: Iterator[Any]) -> Iterator[MicroBatch]:
        parts = self.shard.micro_batches(step)
        for i, part in enumerate(parts):
            if part:
                data = next(loaded)
            elif self._sampler.fill_empty:
                with rng_kept(self._device):  # a dataset may draw random numbers
                    data = next(loaded)
            else:
                continue
            is_last = i == len(parts) - 1
            yield MicroBatch(to_device(data, self._device), len(part), self.shard.samples(step), is_last)


def to_device(batch: Any, device: torch.device) -> Any:
    """The tensors of nested dicts, lists and tuples on the device; the rest as it is."""
    if device.type == "cpu":
        return batch
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch)
