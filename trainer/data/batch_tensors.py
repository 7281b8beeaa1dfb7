"""The tensors of a batch, in any container: found, replaced, counted, split, and moved to a device.

A batch may be a tensor, or any nesting of mappings, sequences, dataclasses, attrs classes and what is registered as a
pytree, subclasses included. An object with a method `to` of its own moves itself.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections import UserList, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from dtrain.errors import UserError, first_line

from ..distributed.torch_private import tree_flatten, tree_unflatten

Build = Callable[[Sequence[Any]], Any]


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of a batch, in its order."""
    if isinstance(value, Tensor):
        yield value
    elif (apart := _apart(value)) is not None:
        for member in apart[0]:
            yield from tensors(member)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nesting with other tensors. What contains none is returned as it is."""
    if isinstance(value, Tensor):
        return function(value)
    return _with_members(functools.partial(map_tensors, function), value)


def merge_members(function: Callable[[tuple[Any, ...]], Any], values: Sequence[Any]) -> Any:
    """The like of several nestings, of what the function makes of each member's values; None where they hold none."""
    if (apart := _apart(values[0])) is None:
        return None
    members = [(_apart(value) or ([], None))[0] for value in values]
    return apart[1]([function(each) for each in zip(*members, strict=True)])


def num_samples(batch: Any) -> int | None:
    """The first dimension of a batch's first tensor that has one; None if there is none."""
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0])
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else None
    members = (_apart(batch) or ([], None))[0]
    return next((count for member in members if (count := num_samples(member)) is not None), None)


def is_by_rows(batch: Any, samples: int) -> bool:
    """Whether there are tensors, each with this many samples in its first dimension."""
    found = list(tensors(batch))
    return bool(found) and all(tensor.ndim and len(tensor) == samples for tensor in found)


def take(batch: Any, samples: int, rows: Sequence[int]) -> Any:
    """These samples of a batch whose tensors begin with the samples; texts and plain numbers are lists of them."""
    if isinstance(batch, Tensor):
        return batch[list(rows)]
    if _is_list(batch) and len(batch) == samples and _is_column(batch):
        return [batch[row] for row in rows]
    return _with_members(functools.partial(take, samples=samples, rows=rows), batch)


Take = Callable[[Sequence[int]], Any]


def ways_to_take(batch: Any, samples: int) -> list[Take]:
    """The ways in which samples can be taken from a batch: as rows of its tensors, or entries of its lists.

    Empty if it has neither per sample; two if it is ambiguous, as for a list of 3 tensors with 3 rows.
    """
    ways: list[Take] = [functools.partial(take, batch, samples)] if is_by_rows(batch, samples) else []
    if not ways and _is_list_of_samples(batch) and len(batch) == samples:
        return [lambda rows: [batch[row] for row in rows]]
    if any(_holds_entries(part, samples) for part in _parts(batch)):
        taken = functools.partial(_take_entries, batch, samples)
        ways += [taken] * (taken(range(samples)) is not None)
    return ways


def _parts(batch: Any) -> list[Any]:
    return (_apart(batch) or ([], None))[0]


def _has_entries(value: Any, samples: int) -> bool:
    """Whether a part of a batch is a list with an entry for each sample; a list of lists holds parts of its own."""
    return _is_list(value) and len(value) == samples and len(set(map(_kind, value))) == 1 and not _is_list(value[0])


def _kind(value: Any) -> Hashable:
    return (value.dtype, value.ndim) if isinstance(value, Tensor) else cast(Hashable, type(value))


def _holds_entries(value: Any, samples: int) -> bool:
    """Whether it is, or holds, a list of tensors with an entry for each sample."""
    if _has_entries(value, samples):
        return any(True for _ in tensors(value))
    return any(_holds_entries(part, samples) for part in _parts(value))


def _take_entries(value: Any, samples: int, rows: Sequence[int]) -> Any:
    """These samples of a batch that has a row or an entry for each in all its parts; None otherwise."""
    if isinstance(value, Tensor):
        return value[list(rows)] if value.ndim and len(value) == samples else None
    if isinstance(value, PackedSequence) or (apart := _apart(value)) is None:
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
    kinds = [tuple(map(_kind, _parts(each))) for each in batch]
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
    return parts[0] if _apart(parts[0]) is None else merge_members(joined, parts)


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
    elif isinstance(value, PackedSequence) or (apart := _apart(value)) is None:
        yield None
    else:
        for member in apart[0]:
            yield from _counts(member)


def take_rows(batch: Any, rows: slice) -> Any:
    """These samples of a batch that has `num_rows`."""
    if isinstance(batch, Tensor | np.ndarray) or _is_column(batch):
        return batch[rows]
    return _with_members(lambda member: take_rows(member, rows), batch)


def _is_column(value: Any) -> bool:
    """Whether it is a list of one plain value a sample, as torch's collate function leaves texts."""
    return isinstance(value, list | tuple) and all(isinstance(each, str | bytes | int | float) for each in value)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device.

    Raises:
        UserError: an object that holds tensors but can't be moved.
    """
    if device.type == "cpu":
        return batch
    if device.type != "cuda" or not _is_open(batch):
        return _moved(batch, device)
    own, beside = torch.cuda.current_stream(device), _stream_of_copies(device)
    with torch.cuda.stream(beside):  # no need to wait for the previous step's kernels
        moved = _moved(batch, device)
    own.wait_stream(beside)
    for tensor in tensors(moved):
        tensor.record_stream(own)  # whose kernels read memory allocated on the other stream
    return moved


@functools.cache
def _stream_of_copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _is_open(value: Any) -> bool:
    """Whether all its tensors can be seen: not of an object that moves itself, but for dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return True
    if callable(getattr(value, "to", None)) and not isinstance(value, Mapping | tuple | list | UserList):
        return False
    return all(map(_is_open, _parts(value)))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if not isinstance(value, type) and callable(getattr(value, "to", None)):
        kind = cast(Hashable, type(value))  # as mypy would have it
        moved = value.to(device, non_blocking=True) if _takes_non_blocking(kind) else value.to(device)
        return value if moved is None else moved  # it may move its tensors in place
    if _apart(value) is None and _hides_tensors(value):
        raise UserError(
            f"a batch holds a {type(value).__name__}, whose tensors can't be moved to {device}: give it a method "
            "to(device), make it a dataclass, or let the collate function return tensors, dicts, lists and tuples"
        )
    return _with_members(lambda member: _moved(member, device), value)


def bound_on(function: Any, device: torch.device) -> Any:
    """The function; of one that functools.partial has bound arguments to, tensors among these are on the device."""
    if not isinstance(function, functools.partial):
        return function
    move = functools.partial(_unless_trained, device=device)
    args, kwargs = map_tensors(move, (function.args, function.keywords))
    return functools.partial(function.func, *args, **kwargs)


def _unless_trained(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if tensor.requires_grad else tensor.to(device)


@functools.lru_cache
def _takes_non_blocking(kind: Any) -> bool:
    try:
        parameters = inspect.signature(kind.to).parameters.values()
    except (TypeError, ValueError):  # not written in Python
        return False
    return any(each.name == "non_blocking" or each.kind is each.VAR_KEYWORD for each in parameters)


def _hides_tensors(value: Any) -> bool:
    """Whether an object's own attributes, or the members of a set, are tensors."""
    slots = [name for kind in type(value).__mro__ for name in _names(vars(kind).get("__slots__", ()))]
    members = [getattr(value, name, None) for name in slots] + list(getattr(value, "__dict__", {}).values())
    if isinstance(value, set | frozenset):
        members += value
    return any(True for member in members for _ in tensors(member))


def _names(slots: Any) -> list[str]:
    return [slots] if isinstance(slots, str) else list(slots)


def _with_members(function: Callable[[Any], Any], value: Any) -> Any:
    """The value with what the function makes of its members; itself where that changes none."""
    if (apart := _apart(value)) is None:
        return value
    members, build = apart
    others = [function(member) for member in members]
    if all(other is member for other, member in zip(others, members, strict=True)):
        return value
    try:
        return build(others)
    except Exception as error:  # the user's class, whose constructor or methods may raise anything
        raise UserError(
            f"a {type(value).__name__} can't be rebuilt with other tensors: {type(error).__name__}: "
            f"{first_line(error)}; use a dict, a tuple or a dataclass"
        ) from error


def _apart(value: Any) -> tuple[list[Any], Build] | None:
    """The members of what holds others, and how to make its like of other members; None of anything else."""
    if isinstance(value, str | bytes | int | float | None):
        return None
    if isinstance(value, Mapping):
        return list(value.values()), functools.partial(_mapping, value)
    if isinstance(value, tuple):
        return list(value), getattr(type(value), "_make", type(value))
    if isinstance(value, list | deque | UserList):
        return list(value), functools.partial(_sequence, value)
    names = _fields(value)
    if names is not None:
        return [getattr(value, name) for name in names], functools.partial(_record, value, names)
    members, spec = tree_flatten(value, is_leaf=lambda node: node is not value)
    is_leaf = len(members) == 1 and members[0] is value
    return None if is_leaf else (members, lambda others: tree_unflatten(others, spec))


def _fields(value: Any) -> list[str] | None:
    """The names of what a dataclass or an attrs class declares."""
    if isinstance(value, type):
        return None
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
    elif (declared := getattr(type(value), "__attrs_attrs__", None)) is not None:
        names = [field.name for field in declared]
    else:
        return None
    return [name for name in names if hasattr(value, name)]


def _mapping(value: Any, members: Sequence[Any]) -> Any:
    if not isinstance(value, MutableMapping):
        return type(value)(dict(zip(value, members, strict=True)))
    made = copy.copy(value)  # a subclass may have more than its items
    attributes = getattr(made, "__dict__", {})
    for (key, before), member in zip(value.items(), members, strict=True):
        made[key] = member
        if attributes.get(key) is before:  # dicts whose items are attributes too
            attributes[key] = member
    return made


def _sequence(value: Any, members: Sequence[Any]) -> Any:
    made = copy.copy(value)
    for i, member in enumerate(members):
        made[i] = member
    return made


def _record(value: Any, names: Sequence[str], members: Sequence[Any]) -> Any:
    made = copy.copy(value)
    for name, member in zip(names, members, strict=True):
        object.__setattr__(made, name, member)  # frozen or not
    return made
