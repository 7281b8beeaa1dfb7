"""A rank's loading processes: a DataLoader's settings for them, how they start, and their requests.

Their rank ends them, not a signal that a cluster sends to all processes of a run.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from dtrain.signals import outlive

from ..distributed.forking import await_first_time
from ..distributed.seeds import derive_seed, loading_apart
from ..distributed.world import World
from .loading_failures import Failure
from .torch_data_private import WorkerInfo, end_by_kill, show


@dataclass(frozen=True)
class Processes:
    """A DataLoader's settings for its processes, by its own names. Order is kept whatever `in_order` is."""

    num_workers: int = 0  # of each rank
    timeout: float = 0
    worker_init_fn: Callable[[int], None] | None = None
    multiprocessing_context: Any = None
    prefetch_factor: int | None = None
    persistent_workers: bool = False


class Reading(Dataset[Any]):
    """What a loading process, or the rank itself, does: it answers requests, in order.

    A failure is delivered like an answer: torch would send text in place of the user's exception.

    Attributes:
        draws: whether an answer may draw random numbers.
    """

    draws = True

    def __init__(self, dataset: Any, worker_init_fn: Callable[[int], None] | None) -> None:
        self.dataset = dataset  # the user's
        self._worker_init_fn = worker_init_fn
        self._process: int | None = None  # its number, where this is one
        self._failed: Failure | None = None

    def answer(self, request: Any) -> Any:
        """What was asked for."""
        raise NotImplementedError

    def info(self, info: WorkerInfo) -> WorkerInfo:
        """What `get_worker_info()` is to answer in this process, in place of torch's."""
        return WorkerInfo(id=info.id, num_workers=info.num_workers, seed=info.seed, dataset=self.dataset)

    def begin(self) -> None:
        """In a loading process, at its start."""
        torchs = cast(WorkerInfo, get_worker_info())
        self._process = torchs.id
        info = self.info(torchs)
        show(info)
        if self._worker_init_fn is not None:
            try:
                self._worker_init_fn(info.id)
            except (Exception, SystemExit) as error:
                self._failed = Failure.of(error, torchs.id)

    def __getitem__(self, request: Any) -> Any:
        if self._process is None:
            return self.answer(request)
        try:
            return self._failed or self.answer(request)
        except (Exception, SystemExit) as error:
            return Failure.of(error, self._process)


class Loader:
    """Answers of a Reading, from processes of this rank or from the rank itself.

    torch's DataLoader starts the processes, and pins memory for a GPU; a rank that needs neither does without.

    Args:
        seed: of what torch seeds a loading process with at its start, beside epoch and rank.
    """

    def __init__(self, reading: Reading, processes: Processes, world: World, seed: int) -> None:
        self._reading = reading
        self._requests = Requests()
        self._seed = seed
        self._rank = world.rank
        self._is_apart = not processes.num_workers and reading.draws
        is_pinned = world.device.type == "cuda"
        self._loader = self._loader_of(processes, is_pinned=is_pinned) if processes.num_workers or is_pinned else None

    def _loader_of(self, processes: Processes, *, is_pinned: bool) -> DataLoader[Any]:
        workers = processes.num_workers
        return DataLoader(
            self._reading,
            batch_size=None,
            sampler=self._requests,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=is_pinned,
            worker_init_fn=_begin,
            # A loader draws from its generator at each start: from the training's, a resumed epoch would go on with
            # other numbers.
            generator=torch.Generator(),
            timeout=processes.timeout,
            multiprocessing_context=processes.multiprocessing_context if workers else None,
            prefetch_factor=processes.prefetch_factor if workers else None,
            persistent_workers=processes.persistent_workers and workers > 0,
        )

    def read(self, requests: Iterable[Any], epoch: int) -> Iterator[Any]:
        """The answers to an epoch's requests, in their order. What the rank itself draws for them leaves no trace."""
        loaded = map(self._reading.answer, requests) if self._loader is None else self._begin(requests, epoch)
        while True:
            with loading_apart() if self._is_apart else nullcontext():
                try:
                    answer = next(loaded)
                except StopIteration:
                    return
            if isinstance(answer, Failure):
                answer.again()
            yield answer

    def _begin(self, requests: Iterable[Any], epoch: int) -> Iterator[Any]:
        assert self._loader is not None
        self._requests.of_epoch = requests
        self._loader.generator.manual_seed(derive_seed("process", self._seed, epoch, self._rank))
        await_first_time()
        loaded = iter(self._loader)
        end_by_kill(loaded)
        return loaded


class Requests(Sampler[Any]):
    """What a DataLoader's processes are asked for, in turn."""

    def __init__(self) -> None:
        self.of_epoch: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.of_epoch)


def _begin(worker: int) -> None:
    # torch has set a handler just before, which ends the process: the rank would fail, when it is asked to stop with
    # a checkpoint. The other signals are ignored as in the rank.
    signal.signal(signal.SIGTERM, outlive)
    cast(Reading, cast(WorkerInfo, get_worker_info()).dataset).begin()


def _as_it_is(answer: Any) -> Any:
    return answer
