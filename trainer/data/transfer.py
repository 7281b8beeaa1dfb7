"""Batches moved to a device.

An object with a method `to` of its own moves itself; of anything else each tensor is moved.
"""

from __future__ import annotations

import functools
import inspect
from collections import UserList
from collections.abc import Hashable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from dtrain.errors import UserError

from .batch_tensors import map_tensors, members_of, take_apart, tensors, with_members


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
    return all(map(_is_open, members_of(value)))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if not isinstance(value, type) and callable(getattr(value, "to", None)):
        kind = cast(Hashable, type(value))  # as mypy would have it
        moved = value.to(device, non_blocking=True) if _takes_non_blocking(kind) else value.to(device)
        return value if moved is None else moved  # it may move its tensors in place
    if take_apart(value) is None and _hides_tensors(value):
        raise UserError(
            f"a batch holds a {type(value).__name__}, whose tensors can't be moved to {device}: give it a method "
            "to(device), make it a dataclass, or let the collate function return tensors, dicts, lists and tuples"
        )
    return with_members(lambda member: _moved(member, device), value)


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


def bound_on(function: Any, device: torch.device) -> Any:
    """The function; of one that functools.partial has bound arguments to, tensors among these are on the device."""
    if not isinstance(function, functools.partial):
        return function
    move = functools.partial(_unless_trained, device=device)
    args, kwargs = map_tensors(move, (function.args, function.keywords))
    return functools.partial(function.func, *args, **kwargs)


def _unless_trained(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if tensor.requires_grad else tensor.to(device)
