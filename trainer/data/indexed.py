"""From a dataset to a rank's batches: what is loaded, by whom, and where an epoch continues after a stop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, default_collate, default_convert

from dtrain.errors import ResumeError, UserError

from ..distributed.seeds import derive_seed, loading_apart
from ..distributed.world import World
from . import permutation
from .batch_samples import num_collated
from .dataloader import source_arguments
from .sampler import Sampling, draw_batches, draw_samples, length
from .samples import SampleReading
from .sharding import ListedShard, Order, Shard, in_order, index_batches, shuffled
from .transfer import to_device
from .workers import Loader, Processes


@dataclass(frozen=True)
class Source:
    """Samples, and how they are read. The names are a DataLoader's."""

    dataset: Dataset[Any]
    batch_size: int | None  # samples per optimizer step, over all ranks; None: see `is_ready` and `Sampling`
    shuffle: bool  # without meaning for a stream, or where a sampler draws the order
    processes: Processes = field(default_factory=Processes)
    collate: Callable[[Any], Any] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    drop_last: bool = False  # drop an epoch's last batch if it is short

    def __post_init__(self) -> None:
        name, sampler = type(self.dataset).__name__, self.sampling.chosen_by
        if self.is_stream:
            if sampler is not None:
                raise UserError(f"{name} is a stream, from which a sampler can't choose")
            return
        for each in self.sampling.samplers:
            if isinstance(each, DistributedSampler) or hasattr(each, "num_replicas"):
                raise UserError(
                    f"{type(each).__name__} gives each rank its part, which dtrain already does; use shuffle=True"
                )
        if sampler is None and not hasattr(self.dataset, "__len__"):
            raise UserError(
                f"{name} has no length: a dataset has __len__ and __getitem__, or is a stream with __iter__"
            )
        if self.num_samples == 0:
            raise UserError(f"{name if sampler is None else type(sampler).__name__} is empty: its len() is 0")

    @classmethod
    def of(cls, loader: DataLoader[Any]) -> Source:
        """What a DataLoader reads, with its batch_size as the whole batch over all ranks."""
        return cls(**source_arguments(loader))

    @property
    def is_stream(self) -> bool:
        """Whether the samples can only be iterated over; see `StreamBatches`."""
        dataset = self.dataset
        return isinstance(dataset, IterableDataset) or (
            hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__")
        )

    @property
    def is_ready(self) -> bool:
        """Whether the dataset gives batches in place of samples; see `ready`."""
        return self.batch_size is None and self.sampling.batch_sampler is None

    @property
    def is_regular(self) -> bool:
        """Whether a batch has as many rows as samples: the user's own collate function may do otherwise."""
        return self.collate in (None, default_collate, default_convert)

    @property
    def is_shuffled(self) -> bool:
        """Whether its order is ours: a permutation for each epoch."""
        return self.shuffle and self.sampling.chosen_by is None and not self.is_stream

    @property
    def num_samples(self) -> int | None:
        """Samples in an epoch; with a batch sampler, batches. None if unknown."""
        return length(self.dataset if self.sampling.chosen_by is None else self.sampling.chosen_by)

    @property
    def num_steps(self) -> int | None:
        """Batches in an epoch, over all ranks; None if unknown."""
        samples = self.num_samples
        if samples is None or self.batch_size is None or self.sampling.batch_sampler is not None:
            return samples
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)

    def seed(self, seed: int, world: World) -> int:
        """What order and draws follow from: the run's seed, and what a generator that was given was seeded with.

        All ranks take part: rank 0's counts.
        """
        given = self.sampling.initial_seed
        return seed if given is None else derive_seed("generator", seed, world.from_main(given))


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the model at once. `samples` is 0 for a filler, which must not affect anything."""

    data: Any
    samples: int
    batch_samples: int  # of the whole batch that it is a part of, over all ranks
    is_last: bool = True  # of this rank's parts of the batch
    is_whole: bool = True  # the whole batch at once: no other rank, no other micro-batch has a part in it
    is_regular: bool = True  # its tensors begin with `samples` samples; a collate function of the user's may do else


Data = DataLoader[Any] | Source | Iterable[Any]  # whatever a rank may be given to train on or to evaluate


@dataclass(frozen=True)
class Batch:
    """An optimizer step's batch: how many samples it has over all ranks, and this rank's share."""

    samples: int
    micro_batches: Iterator[MicroBatch]  # to be consumed before the next batch is asked for


class Batches(Protocol):
    """One rank's batches of a source, epoch by epoch: the same batches, whatever the number of ranks."""

    @property
    def num_steps(self) -> int | None:
        """Batches in an epoch; None if that is not known before its end."""

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of the epoch (from 1) from `first_step` (from 0) on, on this rank's device.

        All ranks take part, and get equally many.
        """

    def state_dict(self) -> dict[str, Any]:
        """What this rank needs besides epoch and step to continue after the last batch that was requested."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there with the next `epoch`."""


def num_kept(data: Any, asked: int) -> int | None:
    """How many samples a collate function of the user's own, asked for so many (0: for a filler), has put into a batch.

    None where it has left out all of them.
    """
    found = num_collated(data, asked or 2)
    return (found if asked else 0) if found else None


class IndexedBatches:
    """The batches of a dataset whose samples have indices, or whatever else a sampler calls them by.

    Args:
        fill_empty: whether an empty share is filled, where the model is called by all ranks together, or left out. It
            is filled from the same batch: parameters that no sample of the batch uses have no gradient.
    """

    def __init__(
        self, source: Source, world: World, seed: int, micro_batch_size: int | None, *, fill_empty: bool
    ) -> None:
        self._source = source
        self._world = world
        self._seed = seed
        self._micro_batch_size = micro_batch_size
        self._fill_empty = fill_empty
        self._reading = SampleReading(source.dataset, source.collate, source.processes.worker_init_fn)
        self._loader = Loader(self._reading, source.processes, world, seed)
        # Of the epoch, and before the first one where that is known already.
        samples = source.num_samples if source.sampling.batch_sampler is None else None
        self.shard = None if samples is None else self._shard(samples)

    @property
    def num_steps(self) -> int | None:
        return self._source.num_samples if self.shard is None else self.shard.num_steps

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        order, samples, ends = order_of(self._source, self._seed, epoch, self._world)
        shard = self.shard = self._shard(samples, ends)
        key = derive_seed("loading", self._seed, epoch)
        requests = index_batches(shard, order, key, first_step, fill_empty=self._fill_empty)
        loaded = self._loader.read(requests, epoch)
        for step in range(first_step, shard.num_steps):
            find_filler = functools.partial(self._filler, shard, order, key, step)
            yield Batch(shard.samples(step), self._micro_batches(shard, step, loaded, find_filler))

    def _shard(self, samples: int, ends: tuple[int, ...] = ()) -> Shard:
        own = self._world.rank, self._world.world_size, self._micro_batch_size
        size = self._source.batch_size
        if size is None:
            return ListedShard(samples, -(-samples // len(ends)), *own, ends)
        whole = samples - samples % size if self._source.drop_last else samples
        if not whole:
            name = type(self._source.dataset).__name__
            raise UserError(f"drop_last leaves no batch of {name}: {samples} samples, batch_size {size}")
        return Shard(whole, size, *own)

    def _filler(self, shard: Shard, order: Order, key: int, step: int) -> Any:
        """A micro-batch of the step, of whatever rank, of which something is left, read by this rank; or None."""
        with loading_apart():
            for rank in range(shard.world_size):
                of_rank = replace(shard, rank=rank)
                requests = index_batches(of_rank, order, key, step, fill_empty=False)
                for _ in filter(None, of_rank.micro_batches(step)):
                    request = next(requests)
                    if num_collated(data := self._reading.answer(request), len(request)):
                        return data
        return None

    def _micro_batches(
        self, shard: Shard, step: int, loaded: Iterator[Any], find_filler: Callable[[], Any]
    ) -> Iterator[MicroBatch]:
        parts = shard.micro_batches(step)
        samples = shard.samples(step)
        find_filler = functools.cache(find_filler)
        for i, part in enumerate(parts):
            if not part and not self._fill_empty:
                continue
            data, found = next(loaded), len(part)
            if not self._source.is_regular:
                kept = num_kept(data, found)
                if kept is None:
                    data = find_filler() if self._fill_empty else None
                    if data is None:  # on all ranks alike, where it is filled
                        continue
                found = kept or 0
            is_last, is_whole = i == len(parts) - 1, len(part) == samples
            data = to_device(data, self._world.device)
            yield MicroBatch(data, found, samples, is_last, is_whole, self._source.is_regular)

    def state_dict(self) -> dict[str, Any]:
        return {"order": permutation.NAME} if self._source.is_shuffled else {}  # epoch and step say the rest

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._source.is_shuffled and state.get("order") != permutation.NAME:
            raise ResumeError(
                "the run was begun with a dtrain that shuffles in another order, and can't be continued exactly: "
                "resume it with that version (env.json in the run folder names it), or begin a new run"
            )


def order_of(source: Source, seed: int, epoch: int, world: World) -> tuple[Order, int, tuple[int, ...]]:
    """An epoch's order, its number of samples, and where its batches end, if that is drawn too.

    All ranks take part where a sampler of the user's own draws it.
    """
    if source.sampling.batch_sampler is not None:
        drawn, ends = draw_batches(source.sampling.batch_sampler, seed, epoch, world)
        return drawn.__getitem__, len(drawn), ends
    if source.sampling.sampler is not None:
        drawn = draw_samples(source.sampling.sampler, seed, epoch, world)
        return drawn.__getitem__, len(drawn), ()
    samples = source.num_samples
    assert samples is not None  # see Source
    return shuffled(samples, seed, epoch) if source.is_shuffled else in_order, samples, ()
