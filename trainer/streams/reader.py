"""The samples of a stream, from a place on: what each of them draws, and whether the stream splits itself.

A stream is anything with `__iter__`. Of a *plain* one every process reads all samples, and keeps those of its rank.
One that *splits itself* asks `torch.utils.data.get_worker_info()` for `num_workers`, as torch's documentation teaches,
and gives each process other samples.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterable, Iterator
from itertools import count, islice
from typing import Any

import numpy as np

from dtrain.errors import UserError

from ..data.loading_failures import noted
from ..data.sharding import BLOCK
from ..data.torch_data_private import WorkerInfo, show
from ..distributed.seeds import derive_seed, sample_seeds, seed_loading
from .progress import StreamPosition


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


class StreamReader(Iterator[Any]):
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
        place: StreamPosition,
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
    def place(self) -> StreamPosition:
        """Where it stands, after at least one sample was taken or none is left."""
        state = {}
        if not self.ended:
            if _is_stateful(self._iterator):
                state["iterator"] = self._iterator.state_dict()
            if self._iterator is not self._iterable and _is_stateful(self._iterable):
                state["iterable"] = self._iterable.state_dict()
        return StreamPosition(self.position, self.ended, _pickled(state, self._iterable) if state else None)

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


def _seeds(key: int, position: int) -> Iterator[int]:
    """The seeds of the samples from a position on; many at once, since numpy takes as long for one."""
    for first in count(position, BLOCK):
        yield from sample_seeds(np.arange(first, first + BLOCK), key).tolist()


def _is_stateful(value: Any) -> bool:
    """Whether it follows torchdata's protocol."""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def _pickled(state: dict[str, Any], owner: object) -> bytes:
    try:
        return pickle.dumps(state)
    except Exception as error:  # a user's objects pickle or not, for reasons of their own
        raise UserError(f"the state_dict of {type(owner).__name__} can't be saved: {error}") from None
