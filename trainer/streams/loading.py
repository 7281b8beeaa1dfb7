"""What a loading process makes of a stream: its rank's share of each step's batch."""

from __future__ import annotations

import enum
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.utils.data import Dataset, default_convert

from dtrain.errors import UserError

from ..data.batch_samples import num_samples
from ..data.indexed import Source, num_kept
from ..data.loading_failures import reading
from ..data.ready_batches import Cut, Cutter
from ..data.samples import collated
from ..data.sharding import Shard, cut
from ..data.torch_data_private import WorkerInfo
from ..data.workers import Reading
from ..distributed.seeds import derive_seed
from ..distributed.torch_private import tree_leaves
from ..distributed.world import World
from .progress import StreamPosition, StreamProgress
from .reader import ShardInfo, StreamReader


class Whole(NamedTuple):
    """What all processes must find alike of a plain stream; of one that splits itself, only all ranks together know."""

    samples: int = 0  # of the step's batch
    mark: int = 0  # of the stream's first sample


class Share(NamedTuple):
    """A rank's share of a step's batch, as a loading process delivers it."""

    samples: int
    # Data and samples of each; as many on all ranks, if there are any. 0 samples: filled up, to leave no trace.
    # A collate function of the user's own may have left out all of one.
    micro_batches: list[tuple[Any, int]]
    worker: int  # the loading process that it is from
    place: StreamPosition  # where that one's stream stands after it
    splits: bool
    whole: Whole
    is_regular: bool  # see MicroBatch
    filler: Any = None  # of the same batch, in place of a micro-batch of which nothing is left; None: not known here


class Ask(enum.Enum):
    """What a loading process is asked for, but for the StreamProgress from which an epoch goes on."""

    NEXT = enum.auto()  # its next share
    NOTHING = enum.auto()  # its turn is not yet


class StreamReading(Reading):
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
        self._workers = max(1, source.processes.num_workers)
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

    def answer(self, request: StreamProgress | Ask) -> Share | None:
        if request is Ask.NOTHING:
            return None
        if isinstance(request, StreamProgress):
            self._shares = self._from(request)
        return next(self._shares)

    def _from(self, progress: StreamProgress) -> Iterator[Share]:
        splits = progress.splits or self._splits
        info = self._shard_info(progress.epoch)
        place = progress.places[self._worker if progress.splits else 0]
        reader = StreamReader(self.dataset, self._seed, progress.epoch, place, info.id, splits=splits, info=info)
        return self._of_shard(reader) if reader.splits else self._of_whole(reader)

    def _of_whole(self, reader: StreamReader) -> Iterator[Share]:
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
            whole = Whole(cut.samples, mark)
            yield Share(own, cut.micro_batches, self._worker, place, False, whole, cut.is_regular, filler)
            reader.skip((self._workers - 1) * size)

    def _of_shard(self, reader: StreamReader) -> Iterator[Share]:
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
            yield Share(own, parts, self._worker, reader.place, True, Whole(), is_regular)

    def _take(self, reader: StreamReader, size: int) -> list[Any]:
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
