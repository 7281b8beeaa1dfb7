"""A stream read in a loading process: which samples are this rank's, what they draw, and where the stream stands.

A stream is anything with `__iter__`. Of a *plain* one every process reads all samples, and keeps those of its rank.
One that *splits itself* asks `torch.utils.data.get_worker_info()` for `num_workers`, as torch's documentation teaches,
and gives each process other samples.
"""

from __future__ import annotations

import contextlib
import pickle
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info
from torch.utils.data._utils import worker as torch_worker
from torch.utils.data._utils.worker import WorkerInfo

from dtrain.errors import UserError

from .seeds import derive_seed, sample_seeds, seed_loading
from .sharding import BLOCK, Shard, cut
from .world import World


class Place(NamedTuple):
    """Where a stream stands in an epoch."""

    position: int = 0  # samples taken (of a user's own loader: batches)
    ended: bool = False
    # The states of the iterable and its iterator, where they have one; without, the stream is read again from its
    # start. Pickled, so that it stays what it was while the stream goes on.
    state: bytes | None = None


@dataclass
class Progress:
    """How far a rank's streams are in an epoch, after the last batch that was asked for."""

    epoch: int = 0
    splits: bool = False  # whether the stream splits itself
    places: list[Place] = field(default_factory=lambda: [Place()])  # of each loading process; of a plain stream: one
    turn: int = 0  # the loading process that gives the next share, where the stream splits itself
    ended: bool = False  # on all ranks


class ShardInfo(WorkerInfo):
    """The answer of `get_worker_info()`, over the loading processes of all ranks; it notes what splitting needs.

    `seed` is, as torch's, one for each process; but the same for all while the stream does not split itself.
    """

    was_asked = False

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name == "num_workers":
            object.__setattr__(self, "was_asked", True)  # its class is frozen
        return value + self.id if name == "seed" and self.was_asked else value

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """In the block, `get_worker_info()` gives this."""
        before = torch_worker._worker_info
        torch_worker._worker_info = self
        try:
            yield
        finally:
            torch_worker._worker_info = before


class Reader(Iterator[Any]):
    """An epoch's samples of an iterable, from a place on.

    torch, numpy and random are seeded before each sample by (seed, epoch, position); where it splits itself by the
    shard too. Not so for `iter()` and the first sample, with which a generator's own beginning runs: a list of files
    must be shuffled alike everywhere before it is divided.

    States go back as torchdata's StatefulDataLoader has it: the iterable's, then `iter()`, then the iterator's.

    Attributes:
        splits: whether the iterable splits itself.
        first: the first sample read; None of an iterable that gives none.
    """

    def __init__(
        self,
        iterable: Iterable[Any],
        seed: int,
        epoch: int,
        place: Place,
        shard: int,
        *,
        splits: bool,
        info: ShardInfo | None = None,
    ) -> None:
        self._iterable: Any = iterable
        self._info = info
        self.splits = splits
        self.ended = place.ended
        self.first: Any = None
        self.position = place.position if place.state or place.ended else 0
        self._ahead: list[Any] = []
        if self.ended:
            return
        key = derive_seed("loading", seed, epoch)
        own_key = derive_seed("loading", seed, epoch, shard)
        self._open(epoch, key, {} if place.state is None else pickle.loads(place.state))
        self._seeds = _seeds(own_key if splits and self.position else key, self.position)
        with contextlib.suppress(StopIteration):
            self.first = self._read()
            self._ahead.append(self.first)
        self.splits = splits or (info is not None and info.was_asked)
        self._seeds = _seeds(own_key if self.splits else key, self.position + 1)
        self.skip(place.position - self.position)

    def __next__(self) -> Any:
        sample = self._ahead.pop() if self._ahead else self._read()
        if self._info is not None and self._info.was_asked and not self.splits:
            raise UserError(
                f"{type(self._iterable).__name__} asked get_worker_info() for num_workers after its first sample: "
                "a stream that splits itself must do so before"
            )
        self.position += 1
        return sample

    def take(self, samples: int) -> list[Any]:
        """The next samples, fewer at the end."""
        return list(islice(self, samples))

    def skip(self, samples: int) -> None:
        """Read samples for what they draw and for their state alone."""
        for _ in islice(self, samples):
            pass

    @property
    def place(self) -> Place:
        """Where it stands, after at least one sample was taken or none is left."""
        state = {}
        if not self.ended:
            if _is_stateful(self._iterator):
                state["iterator"] = self._iterator.state_dict()
            if self._iterator is not self._iterable and _is_stateful(self._iterable):
                state["iterable"] = self._iterable.state_dict()
        return Place(self.position, self.ended, _pickled(state, self._iterable) if state else None)

    def _open(self, epoch: int, key: int, state: dict[str, Any]) -> None:
        sampler: Any = getattr(self._iterable, "sampler", None)
        for each in (self._iterable, sampler):
            if hasattr(each, "set_epoch"):
                each.set_epoch(epoch)
        if "iterable" in state:
            self._iterable.load_state_dict(state["iterable"])
        seed_loading(key)
        with self._shown():
            self._iterator: Any = iter(self._iterable)
        if "iterator" in state:
            self._iterator.load_state_dict(state["iterator"])

    def _read(self) -> Any:
        if self.ended:
            raise StopIteration
        seed_loading(next(self._seeds))
        try:
            with self._shown():
                return next(self._iterator)
        except StopIteration:
            self.ended = True
            raise

    def _shown(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._info is None else self._info.shown()


class Share(NamedTuple):
    """A rank's share of a step's batch, as a loading process hands it over."""

    samples: int
    # Data and samples of each; as many on all ranks, if there are any. 0 samples: filled up, to leave no trace.
    micro_batches: list[tuple[Any, int]]
    worker: int  # the loading process that it is from
    place: Place  # where that one's stream stands after it
    splits: bool
    batch_samples: int  # of the whole batch; 0 where the stream splits itself, so that only all ranks together know
    mark: int  # of a plain stream's first sample: must be the same in all processes


class Stream(IterableDataset[Any]):
    """What a DataLoader's process iterates over: its rank's shares, without an end; empty ones when none is left.

    A UserError is handed over like a share, since a loading process would turn it into a traceback.
    """

    def __init__(
        self,
        dataset: Iterable[Any],
        batch_size: int,
        workers: int,
        collate: Callable[[list[Any]], Any] | None,
        world: World,
        seed: int,
        micro_batch_size: int | None,
        *,
        fill_empty: bool,
    ) -> None:
        self._dataset = dataset
        self._batch_size = batch_size
        self._workers = max(1, workers)
        self._collate = collate or default_collate
        self._rank = world.rank
        self._world_size = world.world_size
        self._seed = seed
        self._micro_batch_size = micro_batch_size
        self._fill_empty = fill_empty
        self.progress = Progress()

    @property
    def num_micro_batches(self) -> int:
        """Parts of a share, on each rank."""
        return self._of_batch(self._batch_size).num_micro_batches(0)

    def __iter__(self) -> Iterator[Share | UserError]:
        try:
            yield from self._shares()
        except UserError as error:
            yield error

    def _shares(self) -> Iterator[Share]:
        info = get_worker_info()
        started = 0 if info is None else info.id
        progress = self.progress
        worker = (progress.turn + started) % self._workers  # a DataLoader asks its processes in turn, from 0 on
        shard, num_shards = self._rank * self._workers + worker, self._world_size * self._workers
        seed = derive_seed("worker", self._seed, progress.epoch)
        reader = Reader(
            self._dataset,
            self._seed,
            progress.epoch,
            progress.places[worker if progress.splits else 0],
            shard,
            splits=progress.splits,
            info=ShardInfo(shard, num_shards, seed, cast(Dataset[Any], self._dataset)),
        )
        yield from self._of_shard(reader, worker) if reader.splits else self._of_whole(reader, started)

    def _of_whole(self, reader: Reader, started: int) -> Iterator[Share]:
        """Of a plain stream. The process started as number w makes the steps w, w + workers, ... from the place on."""
        mark = _mark(reader.first)
        reader.skip(started * self._batch_size)
        while True:
            batch = reader.take(self._batch_size)
            parts = self._of_batch(len(batch)).micro_batches(0) if batch else []
            micro_batches = self._collated(batch, parts)
            samples = sum(map(len, parts))
            yield Share(samples, micro_batches, started, reader.place, False, len(batch), mark)
            reader.skip((self._workers - 1) * self._batch_size)

    def _of_shard(self, reader: Reader, worker: int) -> Iterator[Share]:
        """Of a stream that splits itself: all that this process's part brings, a nominal share at a time."""
        nominal = self._of_batch(self._batch_size).share(0)
        if not nominal:
            raise UserError(
                f"{type(self._dataset).__name__} splits itself among the ranks: batch_size {self._batch_size} leaves "
                f"some of {self._world_size} ranks without a sample; it must be at least {self._world_size}"
            )
        while True:
            samples = reader.take(len(nominal))
            parts = cut(range(len(samples)), self.num_micro_batches) if samples else []
            yield Share(len(samples), self._collated(samples, parts), worker, reader.place, True, 0, 0)

    def _of_batch(self, samples: int) -> Shard:
        return Shard(samples, self._batch_size, self._rank, self._world_size, self._micro_batch_size)

    def _collated(self, samples: list[Any], parts: list[range]) -> list[tuple[Any, int]]:
        filled = [
            (samples[part.start : part.stop] if part else [samples[0]] * 2, len(part))  # two: see IndexBatches
            for part in parts
            if part or self._fill_empty
        ]
        return [(self._collate(chosen), size) for chosen, size in filled]


def _seeds(key: int, position: int) -> Iterator[int]:
    """The seeds of the samples from a position on; many at once, since numpy takes as long for one."""
    for first in count(position, BLOCK):
        yield from sample_seeds(np.arange(first, first + BLOCK), key).tolist()


def _mark(sample: Any) -> int:
    """A checksum of what a sample holds; of parts other than arrays, numbers and text it takes the type alone."""
    mark = 0
    for leaf in tree_leaves(sample):
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
            content = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        elif isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject:
            content = leaf.tobytes()
        else:
            known = leaf is None or isinstance(leaf, int | float | str | bytes | np.generic)
            content = (repr(leaf) if known else type(leaf).__qualname__).encode()
        mark = zlib.crc32(content, mark)
    return mark


def _is_stateful(value: Any) -> bool:
    """Whether it follows torchdata's protocol."""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def _pickled(state: dict[str, Any], owner: object) -> bytes:
    try:
        return pickle.dumps(state)
    except Exception as error:  # a user's objects pickle or not, for reasons of their own
        raise UserError(f"the state_dict of {type(owner).__name__} can't be saved: {error}") from None
