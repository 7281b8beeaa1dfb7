"""Ready-made batches, the items of a dataset: split by rows into the ranks' shares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import default_convert

from dtrain.errors import UserError

from ..distributed.seeds import derive_seed, seed_loading
from ..distributed.world import World
from .batch_samples import num_rows, num_samples, take_rows
from .indexed import Batch, MicroBatch, Source, order_of
from .loading_failures import reading
from .sharding import Indices, Shard, index_batches
from .transfer import to_device
from .workers import Loader, Reading


class Cut(NamedTuple):
    """A rank's share of a batch."""

    samples: int  # of the whole batch
    micro_batches: list[tuple[Any, int]]  # and their samples; 0: filled up, to leave no trace
    is_regular: bool


@dataclass(frozen=True)
class Cutter:
    """Cuts whole batches by rows, as `Shard` cuts the samples of an order."""

    name: str  # of what gives them
    rank: int
    world_size: int
    micro_batch_size: int | None
    fill_empty: bool

    def __call__(self, batch: Any) -> Cut:
        """This rank's share.

        Raises:
            UserError: an empty batch, or one that must be split and can't be.
        """
        rows = num_rows(batch)
        if rows == 0:
            raise UserError(f"{self.name} yields a batch without samples")
        if rows is None:
            if self.world_size > 1 or self.micro_batch_size is not None:
                raise UserError(
                    f"a batch of {self.name} can't be cut: all its parts must be tensors, arrays, or lists of numbers "
                    "or texts, and begin with the same number of samples; give samples and a batch_size, or train in "
                    "one process without micro-batches"
                )
            samples = num_samples(batch) or 1
            return Cut(samples, [(batch, samples)], is_regular=False)
        if self.world_size == 1 and self.micro_batch_size is None:
            return Cut(rows, [(batch, rows)], is_regular=True)
        shard = Shard(rows, rows, self.rank, self.world_size, self.micro_batch_size)
        parts = [
            (take_rows(batch, slice(part.start, part.stop) if part else slice(2)), len(part))  # two: as index_batches
            for part in shard.micro_batches(0)
            if part or self.fill_empty
        ]
        return Cut(rows, parts, is_regular=True)


class ReadyReading(Reading):
    """Answers an item's index with this rank's share of the batch that it is."""

    def __init__(self, source: Source, cutter: Cutter) -> None:
        super().__init__(source.dataset, source.processes.worker_init_fn)
        self._collate = source.collate or default_convert
        self._cutter = cutter
        self.draws = source.collate is not None or not _is_plain(source.dataset)

    def answer(self, request: Indices) -> Cut:
        (index,), (seed,) = request, request.seeds
        if self.draws:
            seed_loading(seed)
        with reading(f"batch {index!r} of {type(self.dataset).__name__}"):
            batch = self._collate(self.dataset[index])
        return self._cutter(batch)


def _is_plain(value: Any) -> bool:
    """Whether it is tensors and arrays, in lists, tuples and dicts: no code of anyone's reads them."""
    if type(value) is dict:
        return all(map(_is_plain, value.values()))
    return type(value) in (Tensor, np.ndarray) or (type(value) in (list, tuple) and all(map(_is_plain, value)))


class ReadyBatches:
    """The items of a dataset as batches. Each rank reads all of them, drawing alike, and keeps its rows.

    Attributes:
        num_steps: of the epoch, and before the first one as many as are known.
    """

    def __init__(
        self, source: Source, world: World, seed: int, micro_batch_size: int | None, *, fill_empty: bool
    ) -> None:
        self._source = source
        self._world = world
        self._seed = seed
        name = type(source.dataset).__name__
        cutter = Cutter(name, world.rank, world.world_size, micro_batch_size, fill_empty)
        self._loader = Loader(ReadyReading(source, cutter), source.processes, world, seed)
        self.num_steps = source.num_samples

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        order, steps, _ = order_of(self._source, self._seed, epoch, self._world)
        self.num_steps = steps
        key = derive_seed("loading", self._seed, epoch)
        requests = index_batches(Shard(steps, 1), order, key, first_step, fill_empty=False)
        for cut in self._loader.read(requests, epoch):
            yield Batch(cut[0], self._micro_batches(Cut(*cut)))  # pinned memory comes as a copy

    def _micro_batches(self, cut: Cut) -> Iterator[MicroBatch]:
        for i, (data, samples) in enumerate(cut.micro_batches):
            is_last, is_whole = i == len(cut.micro_batches) - 1, samples == cut.samples
            data = to_device(data, self._world.device)
            yield MicroBatch(data, samples, cut.samples, is_last, is_whole, cut.is_regular)

    def state_dict(self) -> dict[str, Any]:
        return {}  # epoch and step say it all

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
