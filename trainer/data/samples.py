"""Samples by index: read with their own random draws, and collated into a micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset, StackDataset, Subset, default_collate

from dtrain.errors import UserError, first_line

from ..distributed.seeds import seed_loading
from .loading_failures import noted, reading
from .sharding import Indices
from .workers import Reading


class SampleReading(Reading):
    """Answers a micro-batch's indices with the micro-batch.

    Random draws (torch, numpy, random) of a sample depend on (seed, epoch, position in the order) alone. So neither
    ranks nor loading processes, neither micro-batches nor stops change them.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        collate: Callable[[list[Any]], Any] | None,
        worker_init_fn: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__(dataset, worker_init_fn)
        self._collate = collate

    def answer(self, request: Indices) -> Any:
        return collated(read_samples(self.dataset, request), self._collate, self.dataset, request)


def read_samples(dataset: Any, indices: Indices) -> list[Any]:
    """The samples, each with draws of its own; of a dataset that reads in blocks, see `Seeding`."""
    name = type(dataset).__name__
    if reads_blocks(dataset):
        with reading(f"samples {_listed(indices)} of {name}"):
            seed_loading(indices.seeds[0])
            return cast("list[Any]", dataset.__getitems__(Seeding(indices)))
    samples = []
    for index, seed in zip(indices, indices.seeds, strict=True):
        seed_loading(seed)
        with reading(f"sample {index!r} of {name}"):
            samples.append(dataset[index])
    return samples


def reads_blocks(dataset: Any) -> bool:
    """Whether the dataset itself reads many samples at once; torch's Subset and StackDataset only hand them on."""
    if type(dataset) is Subset:
        return reads_blocks(dataset.dataset)
    if type(dataset) is StackDataset:
        parts = dataset.datasets
        return any(map(reads_blocks, parts.values() if isinstance(parts, dict) else parts))
    return callable(getattr(dataset, "__getitems__", None))


class Seeding(list[Any]):
    """Indices for a dataset that reads in blocks. Who goes through them draws for each sample as if read alone.

    A `__getitems__` that reads one sample after the other, as torch's documentation has it, so depends on no split. One
    that draws for all its samples at once depends on where the block begins.
    """

    def __init__(self, indices: Indices) -> None:
        super().__init__(indices)
        self._seeds = indices.seeds

    def __iter__(self) -> Iterator[Any]:
        for index, seed in zip(super().__iter__(), self._seeds, strict=True):
            seed_loading(seed)
            yield index


def collated(
    samples: list[Any], collate: Callable[[list[Any]], Any] | None, dataset: Any, indices: list[Any] | None = None
) -> Any:
    """The samples as one batch.

    Raises:
        UserError: torch's own function can't put them together.
    """
    name = type(dataset).__name__
    which = f" {_listed(indices)}" if indices else ""
    if collate is not None and collate is not default_collate:
        with reading(f"collate of samples{which} of {name}"):
            return _collated_by(collate, samples)
    try:
        return default_collate(samples)
    except (TypeError, RuntimeError, KeyError, ValueError) as error:
        raise UserError(
            f"{name}: samples{which} cannot be collated into one batch: "
            f"{_difference(samples, indices) or first_line(error)}; "
            "make them alike, or provide a collate function: `collate` in a job, collate_fn of a loader"
        ) from error


def _collated_by(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    """What the user's function makes of the samples.

    If it drops samples, it may drop a rank's whole share, though others of the batch would remain.
    """
    try:
        return collate(samples)
    except Exception as error:
        if _raises_for_none(collate, error):
            noted(error, "as for an empty list: if it drops all samples of a rank's share, let it return None")
        raise


def _raises_for_none(collate: Callable[[list[Any]], Any], error: Exception) -> bool:
    try:
        collate([])
    except Exception as other:
        return (type(other), str(other)) == (type(error), str(error))
    return False


def _difference(samples: list[Any], indices: list[Any] | None) -> str:
    forms = [form(sample) for sample in samples]
    names = indices or range(len(samples))
    other = next((i for i, each in enumerate(forms) if each != forms[0]), None)
    if other is None:
        return f"each is {forms[0]}, which torch can't collate" if forms else ""
    return f"sample {names[0]!r} is {forms[0]}, sample {names[other]!r} is {forms[other]}"


def form(value: Any) -> str:
    """What a sample is made of, in a few words."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {form(each)}" for key, each in value.items()) + "}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(form, value))})"
    return "None" if value is None else type(value).__name__


def _listed(indices: list[Any]) -> str:
    return ", ".join([repr(index) for index in indices[:4]] + ["..."] * (len(indices) > 4))
