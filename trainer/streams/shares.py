"""Where a rank's shares come from: a stream of samples, or a loader of the user's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from itertools import chain, repeat
from types import GeneratorType
from typing import Any, Protocol

from torch.utils.data import Dataset

from dtrain.errors import UserError

from ..data.batch_samples import num_rows, num_samples
from ..data.indexed import Source
from ..data.workers import Loader
from ..distributed.seeds import loading_apart
from ..distributed.world import World
from .loading import Ask, Share, StreamReading, Whole
from .progress import StreamProgress
from .reader import StreamReader


class Shares(Protocol):
    """Where a rank's shares come from."""

    name: str  # of what is read, for messages
    workers: int  # loading processes of this rank; 1 where the rank itself loads
    num_micro_batches: int  # parts of a share

    @property
    def num_steps(self) -> int | None:
        """Steps of an epoch, where that is known."""

    def read(self, progress: StreamProgress) -> Iterator[Share]:
        """This rank's shares from there on, each loading process's in turn, without an end; empty ones after it."""


class StreamShares:
    """Shares of a stream of samples, read in loading processes or in the rank itself."""

    def __init__(
        self, source: Source, world: World, seed: int, micro_batch_size: int | None, *, fill_empty: bool
    ) -> None:
        self.name = type(source.dataset).__name__
        self.workers = max(1, source.processes.num_workers)
        self._source = source
        self._stream = StreamReading(source, world, seed, micro_batch_size, fill_empty=fill_empty)
        self.num_micro_batches = self._stream.num_micro_batches
        self._loader = Loader(self._stream, source.processes, world, seed)

    @property
    def num_steps(self) -> int | None:
        return self._source.num_steps

    def read(self, progress: StreamProgress) -> Iterator[Share]:
        # The processes are asked in turn, the first one first; the epoch may go on with another's turn.
        begin = chain(repeat(Ask.NOTHING, progress.turn), repeat(progress, self.workers), repeat(Ask.NEXT))
        for share in self._loader.read(begin, progress.epoch):
            if share is not None:
                yield Share(*share)  # pinned memory comes as a copy


class LoaderShares:
    """Shares that a user's own loader makes, each one of its batches: it gives each rank other samples.

    A batch's samples are the first dimension of its first tensor.
    """

    workers = 1
    num_micro_batches = 1

    def __init__(self, loader: Iterable[Any], world: World, seed: int) -> None:
        self.name = type(loader).__name__
        self._loader = loader
        self._rank = world.rank
        self._seed = seed
        if isinstance(loader, Dataset) or not hasattr(loader, "__iter__"):
            raise UserError(f"expected a torch DataLoader, got {self.name}: its batch_size is needed")
        if isinstance(loader, GeneratorType):
            raise UserError("a generator can be read only once: pass an object whose __iter__ yields the batches")

    @property
    def num_steps(self) -> int | None:
        return len(self._loader) if isinstance(self._loader, Sized) else None

    def read(self, progress: StreamProgress) -> Iterator[Share]:
        with loading_apart():
            reader = StreamReader(self._loader, self._seed, progress.epoch, progress.places[0], self._rank, splits=True)
        while True:
            with loading_apart():
                batches = reader.take(1)
                samples = sum(map(_num_samples, batches))
            if samples or not batches:
                parts = [(each, samples) for each in batches]
                is_regular = all(num_rows(each) == samples for each in batches)
                yield Share(samples, parts, 0, reader.place, True, Whole(), is_regular)


def _num_samples(batch: Any) -> int:
    if (samples := num_samples(batch)) is None:
        raise UserError(f"a batch of type {type(batch).__name__} holds no tensor with a batch dimension")
    return samples
