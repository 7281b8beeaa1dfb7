"""The samples of a batch, in whatever containers: counted, taken, and joined."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .batch_tensors import members_of, merge_members, take_apart, tensors, with_members

Take = Callable[[Sequence[int]], Any]


def num_samples(batch: Any) -> int | None:
    """The first dimension of a batch's first tensor that has one; None if there is none."""
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0])
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else None
    members = members_of(batch)
    return next((count for member in members if (count := num_samples(member)) is not None), None)


def is_by_rows(batch: Any, samples: int) -> bool:
    """Whether there are tensors, each with this many samples in its first dimension."""
    found = list(tensors(batch))
    return bool(found) and all(tensor.ndim and len(tensor) == samples for tensor in found)


def ways_to_take(batch: Any, samples: int) -> list[Take]:
    """The ways in which samples can be taken from a batch: as rows of its tensors, or entries of its lists.

    Empty if it has neither per sample; two if it is ambiguous, as for a list of 3 tensors with 3 rows.
    """
    ways: list[Take] = [functools.partial(take, batch, samples)] if is_by_rows(batch, samples) else []
    if not ways and _is_list_of_samples(batch) and len(batch) == samples:
        return [lambda rows: [batch[row] for row in rows]]
    if any(_holds_entries(part, samples) for part in members_of(batch)):
        taken = functools.partial(_take_entries, batch, samples)
        ways += [taken] * (taken(range(samples)) is not None)
    return ways


def take(batch: Any, samples: int, rows: Sequence[int]) -> Any:
    """These samples of a batch whose tensors begin with the samples; texts and plain numbers are lists of them."""
    if isinstance(batch, Tensor):
        return batch[list(rows)]
    if _is_list(batch) and len(batch) == samples and _is_column(batch):
        return [batch[row] for row in rows]
    return with_members(functools.partial(take, samples=samples, rows=rows), batch)


def _has_entries(value: Any, samples: int) -> bool:
    """Whether a part of a batch is a list with an entry for each sample; a list of lists holds parts of its own."""
    return _is_list(value) and len(value) == samples and len(set(map(_kind, value))) == 1 and not _is_list(value[0])


def _kind(value: Any) -> Hashable:
    return (value.dtype, value.ndim) if isinstance(value, Tensor) else cast(Hashable, type(value))


def _holds_entries(value: Any, samples: int) -> bool:
    """Whether it is, or holds, a list of tensors with an entry for each sample."""
    if _has_entries(value, samples):
        return any(True for _ in tensors(value))
    return any(_holds_entries(part, samples) for part in members_of(value))


def _take_entries(value: Any, samples: int, rows: Sequence[int]) -> Any:
    """These samples of a batch that has a row or an entry for each in all its parts; None otherwise."""
    if isinstance(value, Tensor):
        return value[list(rows)] if value.ndim and len(value) == samples else None
    if isinstance(value, PackedSequence) or (apart := take_apart(value)) is None:
        return None
    members, build = apart
    parts = [
        [part[row] for row in rows] if _has_entries(part, samples) else _take_entries(part, samples, rows)
        for part in members
    ]
    return None if any(part is None for part in parts) else build(parts)


def _is_list(value: Any) -> bool:
    return type(value) in (list, tuple)


def _is_list_of_samples(batch: Any) -> bool:
    """Whether a collate function has left the samples as they are: nestings of a kind, whose members are of several."""
    if not _is_list(batch) or not batch:
        return False
    kinds = [tuple(map(_kind, members_of(each))) for each in batch]
    is_dict = all(isinstance(each, Mapping) and each.keys() == batch[0].keys() for each in batch)
    return len(set(kinds)) == 1 and (is_dict or len(set(kinds[0])) > 1)


def join(batches: Sequence[Any]) -> Any:
    """One batch of all samples of batches of one each. What has no sample is that of the first.

    Raises:
        RuntimeError, ValueError: their samples do not go together.
    """
    if is_by_rows(batches[0], 1):
        return _joined(batches, by_rows=True)
    if _is_list_of_samples(batches[0]):
        return [sample for batch in batches for sample in batch]
    return _joined(batches, by_rows=False)


def _joined(parts: Sequence[Any], *, by_rows: bool) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    if _is_list(parts[0]) and (_is_column(parts[0]) or (not by_rows and _has_entries(parts[0], 1))):
        return [member for part in parts for member in part]
    joined = functools.partial(_joined, by_rows=by_rows)
    return parts[0] if take_apart(parts[0]) is None else merge_members(joined, parts)


def num_collated(batch: Any, asked: int) -> int:
    """How many samples a collate function of the user's own, asked for so many, has put into a batch.

    As many as all its parts hold, tensors or lists with an entry a sample; or as all its tensors begin with; what was
    asked for, where they don't agree.
    """
    if batch is None or (isinstance(batch, Sequence | Mapping) and not batch):
        return 0
    parts = list(
        batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else [batch]
    )
    columns = {_length(part) for part in parts}
    firsts = {len(tensor) for tensor in tensors(batch) if tensor.ndim}
    if _is_list_of_samples(batch) and (len(batch) == asked or firsts != {asked}):
        return len(batch)
    return next((counts.pop() for counts in (columns - {None}, firsts) if len(counts) == 1), asked)


def _length(part: Any) -> Any:
    is_column = isinstance(part, list | tuple) or (isinstance(part, Tensor) and part.ndim)
    return len(part) if is_column else None


def num_rows(batch: Any) -> int | None:
    """How many samples every part of a batch begins with; None if they disagree, or one has no samples."""
    counts = set(_counts(batch))
    return counts.pop() if len(counts) == 1 else None


def _counts(value: Any) -> Iterator[int | None]:
    if isinstance(value, Tensor | np.ndarray):
        yield len(value) if value.ndim else None
    elif _is_column(value):
        yield len(value)
    elif isinstance(value, PackedSequence) or (apart := take_apart(value)) is None:
        yield None
    else:
        for member in apart[0]:
            yield from _counts(member)


def take_rows(batch: Any, rows: slice) -> Any:
    """These samples of a batch that has `num_rows`."""
    if isinstance(batch, Tensor | np.ndarray) or _is_column(batch):
        return batch[rows]
    return with_members(lambda member: take_rows(member, rows), batch)


def _is_column(value: Any) -> bool:
    """Whether it is a list of one plain value a sample, as torch's collate function leaves texts."""
    return isinstance(value, list | tuple) and all(isinstance(each, str | bytes | int | float) for each in value)
