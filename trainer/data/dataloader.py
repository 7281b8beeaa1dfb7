"""A torch DataLoader's settings as a Source's arguments: each one is kept, or refused by name."""

from __future__ import annotations

from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from dtrain.errors import UserError

from .sampler import Sampling, length
from .workers import Processes


def source_arguments(loader: DataLoader[Any]) -> dict[str, Any]:
    """What the loader reads, with its batch_size as the whole batch over all ranks.

    One that iterates in a way of its own is read itself: its batches come ready made.

    Raises:
        UserError: it can't be read this way.
    """
    if _iterates_itself(loader):
        return {"dataset": loader, "batch_size": None, "shuffle": False}
    if loader.timeout and not loader.num_workers:
        raise UserError("the DataLoader's timeout is for loading processes, but its num_workers is 0")
    processes = Processes(
        loader.num_workers,
        loader.timeout,
        loader.worker_init_fn,
        loader.multiprocessing_context,
        loader.prefetch_factor,
        loader.persistent_workers,
    )
    return {
        "dataset": loader.dataset,
        "shuffle": False,
        "processes": processes,
        "collate": loader.collate_fn,
        **_batches(loader),
    }


def _batches(loader: DataLoader[Any]) -> dict[str, Any]:
    batches: Any = loader.batch_sampler
    if isinstance(loader.dataset, IterableDataset):
        sampling = Sampling(generator=loader.generator)
        return {"batch_size": loader.batch_size, "drop_last": loader.drop_last, "sampling": sampling}
    if batches is None:
        return {"batch_size": None, **_order(loader.sampler, loader)}
    if not _is_torchs(batches, BatchSampler):
        return {"batch_size": None, "sampling": Sampling(batch_sampler=batches, generator=loader.generator)}
    order = _order(batches.sampler, loader)
    return {"batch_size": batches.batch_size, "drop_last": batches.drop_last, **order}


def _order(sampler: Any, loader: DataLoader[Any]) -> dict[str, Any]:
    """`shuffle` in place of a sampler of torch's that goes through the whole dataset once; else the sampler."""
    dataset, generator = loader.dataset, loader.generator
    if _is_torchs(sampler, SequentialSampler) and len(sampler) == length(dataset):
        return {"sampling": Sampling(generator=generator)}
    is_shuffle = _is_torchs(sampler, RandomSampler) and not sampler.replacement
    if is_shuffle and sampler.num_samples == len(sampler.data_source) == length(dataset):
        own = sampler.generator
        return {"shuffle": True, "sampling": Sampling(generator=generator if own is None else own)}
    return {"sampling": Sampling(sampler, generator=generator)}


def _iterates_itself(loader: DataLoader[Any]) -> bool:
    kind = type(loader)
    torchs = next(each for each in kind.__mro__ if _is_of_torch(each))
    return any(getattr(kind, name) is not getattr(torchs, name) for name in ("__iter__", "_get_iterator"))


def _is_torchs(value: Any, kind: type) -> bool:
    """Whether it does what this class of torch's does; a subclass of the user's may do something else."""
    return isinstance(value, kind) and _is_of_torch(type(value))


def _is_of_torch(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("torch", "torchdata")
