"""From a dataset to a rank's batches: what is loaded, by whom, and where an epoch continues after a stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
)

from dtrain.errors import UserError

from .loading_processes import leave_signals, start_loading
from .seeds import derive_seed, loading_apart, seed_loading
from .sharding import IndexBatches, Indices, Order, Shard, in_order, shuffled
from .transfer import to_device
from .world import World


@dataclass(frozen=True)
class Source:
    """Samples, and how they are to be read."""

    dataset: Dataset[Any]
    batch_size: int  # samples per optimizer step, over all ranks
    shuffle: bool  # without meaning for a stream
    workers: int = 0  # loading processes per rank
    collate: Callable[[list[Any]], Any] | None = None
    sampler: Sampler[int] | None = None  # draws the order, instead of `shuffle`

    def __post_init__(self) -> None:
        if self.is_stream:
            if self.sampler is not None:
                raise UserError(f"{type(self.dataset).__name__} is a stream, whose samples no sampler can choose")
            return
        if not hasattr(self.dataset, "__len__"):
            raise UserError(
                f"{type(self.dataset).__name__} has no length: a dataset has __len__ and __getitem__, or is a stream "
                "with __iter__"
            )
        if isinstance(self.sampler, DistributedSampler):
            raise UserError("DistributedSampler gives each rank its part, which dtrain does itself; use shuffle=True")
        if self.sampler is not None and not hasattr(self.sampler, "__len__"):
            raise UserError(f"{type(self.sampler).__name__} has no length: give it __len__, the samples of an epoch")
        if self.num_samples == 0:
            raise UserError(f"{type(self._sized).__name__} is empty: its len() is 0")

    @property
    def is_stream(self) -> bool:
        """Whether the samples can only be iterated over; see `StreamBatches`."""
        dataset = self.dataset
        return isinstance(dataset, IterableDataset) or (
            hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__")
        )

    @property
    def num_samples(self) -> int:
        """Samples in an epoch; not of a stream."""
        return len(self._sized)

    @property
    def _sized(self) -> Sized:
        return cast(Sized, self.dataset if self.sampler is None else self.sampler)

    @classmethod
    def of(cls, data: DataLoader[Any]) -> Source:
        """What a DataLoader reads, with its batch_size as the whole batch over all ranks."""
        if data.batch_size is None:
            raise UserError("the DataLoader has no batch_size (a batch_sampler of its own, or none): give it one")
        if isinstance(data.dataset, IterableDataset):
            return cls(data.dataset, data.batch_size, False, data.num_workers, data.collate_fn)
        sampler: Any = data.sampler
        if isinstance(sampler, RandomSampler) and not (sampler.replacement or sampler._num_samples):
            sampler, shuffle = None, True
        else:
            sampler, shuffle = None if isinstance(sampler, SequentialSampler) else sampler, False
        return cls(data.dataset, data.batch_size, shuffle, data.num_workers, data.collate_fn, sampler)


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the model at once. `samples` is 0 for a filler, which must leave no trace."""

    data: Any
    samples: int
    batch_samples: int  # of the whole batch that it is a part of, over all ranks
    is_last: bool = True  # of this rank's parts of the batch
    is_whole: bool = True  # the whole batch at once: no other rank, no other micro-batch has a part in it
    is_regular: bool = True  # its tensors begin with `samples` samples; a collate function of the user's may do else


@dataclass(frozen=True)
class Batch:
    """An optimizer step's batch: how many samples it has over all ranks, and this rank's share."""

    samples: int
    micro_batches: Iterator[MicroBatch]  # to be consumed before the next batch is asked for


class Batches(Protocol):
    """One rank's batches of a source, epoch by epoch: the same batches, whatever the number of ranks."""

    @property
    def num_steps(self) -> int | None:
        """Batches in an epoch; None where that is not known before its end."""

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of the epoch (from 1) from `first_step` (from 0) on, on this rank's device.

        All ranks take part, and get equally many.
        """

    def state_dict(self) -> dict[str, Any]:
        """What this rank needs beside epoch and step to continue after the last batch that was asked for."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there with the next `epoch`."""


class SeededDataset(Dataset[Any]):
    """A dataset whose random draws (torch, numpy, random) depend on (seed, epoch, position in the order) alone.

    So neither ranks nor loading processes, neither micro-batches nor stops change what is drawn for a sample. A
    dataset that reads in blocks is seeded once a block, by its first position.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __getitems__(self, indices: Indices) -> Any:
        if reads_blocks(self._dataset):
            seed_loading(indices.seeds[0])
            return cast(Any, self._dataset).__getitems__(indices)
        samples = []
        for index, seed in zip(indices, indices.seeds, strict=True):
            seed_loading(seed)
            samples.append(self._dataset[index])
        return samples


def reads_blocks(dataset: Dataset[Any]) -> bool:
    """Whether the dataset itself reads many samples at once; torch's Subset only hands them on."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return hasattr(dataset, "__getitems__")


class IndexedBatches:
    """The batches of a dataset whose samples have indices.

    Args:
        fill_empty: whether an empty share is filled, where the model is called by all ranks together, or left out.
    """

    def __init__(
        self, source: Source, world: World, seed: int, micro_batch_size: int | None, *, fill_empty: bool
    ) -> None:
        self.shard = Shard(source.num_samples, source.batch_size, world.rank, world.world_size, micro_batch_size)
        self._source = source
        self._world = world
        self._seed = seed
        self._sampler = IndexBatches(self.shard, fill_empty=fill_empty)
        self._loader: DataLoader[Any] = DataLoader(
            SeededDataset(source.dataset),
            batch_sampler=cast(Any, self._sampler),
            num_workers=source.workers,
            collate_fn=source.collate,
            pin_memory=world.device.type == "cuda",
            worker_init_fn=leave_signals,
            # A loader draws from its generator at each start: from the training's, a resumed epoch would go on with
            # other numbers.
            generator=torch.Generator(),
        )

    @property
    def num_steps(self) -> int:
        return self.shard.num_steps

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        self._sampler.order = self._order(epoch)
        self._sampler.key = derive_seed("loading", self._seed, epoch)
        self._sampler.first_step = first_step
        loaded = start_loading(self._loader)
        for step in range(first_step, self.shard.num_steps):
            yield Batch(self.shard.samples(step), self._micro_batches(step, loaded))

    def _order(self, epoch: int) -> Order:
        source = self._source
        if source.sampler is not None:
            return _drawn(source.sampler, source.num_samples, self._seed, epoch, self._world)
        return shuffled(source.num_samples, self._seed, epoch) if source.shuffle else in_order

    def _micro_batches(self, step: int, loaded: Iterator[Any]) -> Iterator[MicroBatch]:
        parts = self.shard.micro_batches(step)
        samples = self.shard.samples(step)
        for i, part in enumerate(parts):
            if not part and not self._sampler.fill_empty:
                continue
            with nullcontext() if self._source.workers else loading_apart():
                data = next(loaded)
            is_last = i == len(parts) - 1
            yield MicroBatch(to_device(data, self._world.device), len(part), samples, is_last, len(part) == samples)

    def state_dict(self) -> dict[str, Any]:
        return {}  # epoch and step say it all

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _drawn(sampler: Iterable[int], num_samples: int, seed: int, epoch: int, world: World) -> Order:
    """The order that a user's sampler draws for this epoch, on rank 0. All ranks take part: they get it from there."""
    indices = np.empty(0, np.int64)
    if world.is_main:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        with loading_apart():
            key = derive_seed("order", seed, epoch)
            seed_loading(key)
            if isinstance(generator := getattr(sampler, "generator", None), torch.Generator):
                generator.manual_seed(key)
            indices = np.fromiter(sampler, np.int64)
    indices = world.from_main(indices)
    if len(indices) != num_samples:
        name = type(sampler).__name__
        raise UserError(f"{name} has drawn {len(indices)} samples for epoch {epoch}, its length is {num_samples}")
    return indices.__getitem__
