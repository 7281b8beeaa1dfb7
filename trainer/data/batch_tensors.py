"""The tensors of a batch, in any container: found, and replaced.

A batch may be a tensor, or any nesting of mappings, sequences, dataclasses, attrs classes and what is registered as a
pytree, subclasses included.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import UserList, deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from dtrain.errors import UserError, first_line

from ..distributed.torch_private import tree_flatten, tree_unflatten

Build = Callable[[Sequence[Any]], Any]


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of a batch, in its order."""
    if isinstance(value, Tensor):
        yield value
    elif (apart := take_apart(value)) is not None:
        for member in apart[0]:
            yield from tensors(member)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nesting with other tensors. What contains none is returned as it is."""
    if isinstance(value, Tensor):
        return function(value)
    return with_members(functools.partial(map_tensors, function), value)


def with_members(function: Callable[[Any], Any], value: Any) -> Any:
    """The value with what the function makes of its members; itself where that changes none."""
    if (apart := take_apart(value)) is None:
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


def merge_members(function: Callable[[tuple[Any, ...]], Any], values: Sequence[Any]) -> Any:
    """The like of several nestings, of what the function makes of each member's values; None where they hold none."""
    if (apart := take_apart(values[0])) is None:
        return None
    members = [members_of(value) for value in values]
    return apart[1]([function(each) for each in zip(*members, strict=True)])


def members_of(value: Any) -> list[Any]:
    """What a container holds; nothing of anything else."""
    return [] if (apart := take_apart(value)) is None else apart[0]


def take_apart(value: Any) -> tuple[list[Any], Build] | None:
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
