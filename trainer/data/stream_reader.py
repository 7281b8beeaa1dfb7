"""A stream read in a loading process: which samples are this rank's, what they draw, and the stream's position.

A stream is anything with `__iter__`. Of a *plain* one every process reads all samples, and keeps those of its rank.
One that *splits itself* asks `torch.utils.data.get_worker_info()` for `num_workers`, as torch's documentation teaches,
and gives each process other samples.
"""

from __future__ import annotations

import contextlib
import enum
import pickle
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.utils.data import Dataset, default_convert

from dtrain.errors import UserError

from ..distributed.seeds import derive_seed, sample_seeds, seed_loading
from ..distributed.torch_private import tree_leaves
from ..distributed.world import World
from .batch_tensors import num_samples
from .indexed import Source, num_kept
from .loading_failures import noted, reading
from .ready_batches import Cut, Cutter
from .samples import collated
from .sharding import BLOCK, Shard, cut
from .torch_data_private import WorkerInfo, show
from .workers import Reading


class Place(NamedTuple):
    """A stream's position in an epoch."""

    position: int = 0  # samples taken (of a user's own loader: batches)
    ended: bool = False
    # The states of the iterable and its iterator, where they have one; without, the stream is read again from its
    # start. Pickled, so that it stays what it was while the stream goes on.
    state: bytes | None = None


@dataclass
class Progress:
    """How far a rank's streams are in an epoch, after the last batch that was requested."""

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
        """Make `get_worker_info()` return this within the block."""
        before = show(self)
        try:
            yield
        finally:
            show(before)


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
        """Read samples only for their random draws and the stream's state."""
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
        except Exception as error:
            noted(error, f"sample {self.position} (from 0) of {type(self._iterable).__name__}")
            raise

    def _shown(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._info is None else self._info.shown()


class Share(NamedTuple):
    """A rank's share of a step's batch, as a loading process delivers it."""

    samples: int
    # Data and samples of each; as many on all ranks, if there are any. 0 samples: filled up, to leave no trace.
    # A collate function of the user's own may have left out all of one.
    micro_batches: list[tuple[Any, int]]
    worker: int  # the loading process that it is from
    place: Place  # where that one's stream stands after it
    splits: bool
    batch_samples: int  # of the whole batch; 0 where the stream splits itself, so that only all ranks together know
    mark: int  # of a plain stream's first sample: must be the same in all processes
    is_regular: bool  # see MicroBatch
    filler: Any = None  # of the same batch, in place of a micro-batch of which nothing is left; None: not known here


class Ask(enum.Enum):
    """What a loading process is asked for, but for the Progress from which an epoch goes on."""

    NEXT = enum.auto()  # its next share
    NOTHING = enum.auto()  # its turn is not yet


class Stream(Reading):
    """Answers with its rank's shares in turn, without an end; with empty ones when none is left."""

    def __init__(
        self, source: Source, world: World, seed: int, micro_batch_size: int | None, *, fill_empty: bool
    ) -> None:
        super().__init__(source.dataset, source.processes.worker_init_fn)
        self._name = type(source.dataset).__name__
        self._batch_size = source.batch_size
        self._drop_last = source.drop_last
        self._collate = source.collate
        self._is_regular = source.is_regular
        self._rank = world.rank
        self._world_size = world.world_size
        self._seed = seed
        self._micro_batch_size = micro_batch_size
        self._fill_empty = fill_empty
        self._cutter = Cutter(self._name, world.rank, world.world_size, micro_batch_size, fill_empty)
        self._workers = max(1, source.workers)
        self._worker = 0
        self._info: ShardInfo | None = None  # what the user's worker_init_fn was shown
        self._splits = False  # whether that has split the stream
        self._shares: Iterator[Share] = iter(())

    @property
    def num_micro_batches(self) -> int:
        """Parts of a share, on each rank."""
        return 1 if self._batch_size is None else self._of_batch(self._batch_size).num_micro_batches(0)

    def info(self, info: WorkerInfo) -> WorkerInfo:
        self._worker = info.id
        self._info = self._shard_info(epoch=0)
        return self._info

    def begin(self) -> None:
        super().begin()
        self._splits = self._info is not None and self._info.was_asked

    def answer(self, request: Progress | Ask) -> Share | None:
        if request is Ask.NOTHING:
            return None
        if isinstance(request, Progress):
            self._shares = self._from(request)
        return next(self._shares)

    def _from(self, progress: Progress) -> Iterator[Share]:
        splits = progress.splits or self._splits
        info = self._shard_info(progress.epoch)
        place = progress.places[self._worker if progress.splits else 0]
        reader = Reader(self.dataset, self._seed, progress.epoch, place, info.id, splits=splits, info=info)
        return self._of_shard(reader) if reader.splits else self._of_whole(reader)

    def _of_whole(self, reader: Reader) -> Iterator[Share]:
        """Of a plain stream. Process number w makes the steps w, w + workers, ... from the place on."""
        mark = _mark(reader.first)
        size = self._batch_size or 1
        reader.skip(self._worker * size)
        while True:
            taken = self._take(reader, size)
            cut = self._cut(taken)
            own = sum(samples for _, samples in cut.micro_batches)
            filler = None if cut.is_regular else self._filler(taken, cut)
            place = reader.place
            yield Share(own, cut.micro_batches, self._worker, place, False, cut.samples, mark, cut.is_regular, filler)
            reader.skip((self._workers - 1) * size)

    def _of_shard(self, reader: Reader) -> Iterator[Share]:
        """Of a stream that splits itself: all that this process's part brings, a nominal share at a time."""
        size = 1 if self._batch_size is None else self._nominal(self._batch_size)
        while True:
            taken = self._take(reader, size)
            if self._batch_size is None:  # a batch is this rank's share
                batches = [self._converted(batch) for batch in taken]
                parts = [(batch, num_samples(batch) or 1) for batch in batches]
            else:
                parts = self._collated(taken, cut(range(len(taken)), self.num_micro_batches) if taken else [])
            own = sum(samples for _, samples in parts)
            is_regular = self._is_regular and self._batch_size is not None
            yield Share(own, parts, self._worker, reader.place, True, 0, 0, is_regular)

    def _take(self, reader: Reader, size: int) -> list[Any]:
        taken = reader.take(size)
        return [] if self._drop_last and len(taken) < size else taken

    def _cut(self, taken: list[Any]) -> Cut:
        if not taken:
            return Cut(0, [], self._is_regular)
        if self._batch_size is None:
            return self._cutter(self._converted(taken[0]))
        return Cut(len(taken), self._collated(taken, self._of_batch(len(taken)).micro_batches(0)), self._is_regular)

    def _filler(self, taken: list[Any], cut: Cut) -> Any:
        """A micro-batch of the batch, of whatever rank, of which something is left; None where it is not needed."""
        if not self._fill_empty or None not in [num_kept(*part) for part in cut.micro_batches]:
            return None
        shards = [replace(self._of_batch(len(taken)), rank=rank) for rank in range(self._world_size)]
        parts = [part for shard in shards for part in shard.micro_batches(0) if part]
        made = (self._collated(taken, [part])[0] for part in parts)
        return next((data for data, samples in made if num_kept(data, samples)), None)

    def _nominal(self, batch_size: int) -> int:
        if nominal := len(self._of_batch(batch_size).share(0)):
            return nominal
        raise UserError(
            f"{self._name} splits itself among the ranks: batch_size {batch_size} leaves some of {self._world_size} "
            f"ranks without a sample; it must be at least {self._world_size}"
        )

    def _shard_info(self, epoch: int) -> ShardInfo:
        shard, num_shards = self._rank * self._workers + self._worker, self._world_size * self._workers
        seed, dataset = derive_seed("worker", self._seed, epoch), cast(Dataset[Any], self.dataset)
        return ShardInfo(id=shard, num_workers=num_shards, seed=seed, dataset=dataset)

    def _of_batch(self, samples: int) -> Shard:
        return Shard(samples, self._batch_size or 1, self._rank, self._world_size, self._micro_batch_size)

    def _collated(self, samples: list[Any], parts: list[range]) -> list[tuple[Any, int]]:
        filled = [
            (samples[part.start : part.stop] if part else [samples[0]] * 2, len(part))  # two: see index_batches
            for part in parts
            if part or self._fill_empty
        ]
        return [(collated(chosen, self._collate, self.dataset), size) for chosen, size in filled]

    def _converted(self, batch: Any) -> Any:
        with reading(f"collate of a batch of {self._name}"):
            return (self._collate or default_convert)(batch)


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
