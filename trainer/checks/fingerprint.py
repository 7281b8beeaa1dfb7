"""A fingerprint of an object's content, in a few bytes, to see whether several processes have the same one.

It covers the data in the object: lists of files, indices, arrays. No sample is read, since a dataset may open what
its loading processes must not share, and all is bounded: of what is long, every nth item. Left out is what may well
differ between processes that mean the same: single values (a rank, a device, a folder), caches, generators, open files,
and the folder that all files of a list lie in.
"""

from __future__ import annotations

import contextlib
import hashlib
import marshal
import os
from collections import deque
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import PurePath
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

Trait = tuple[str, str]  # as it is shown, and as it is compared
Traits = dict[str, Trait]

_MOST_TRAITS = 200
_DEEPEST = 6
_MOST_PLAIN = 1 << 20  # items of a sequence of plain values, of which millions take a tenth of a second
_MOST_OBJECTS = 1 << 12
_MOST_BYTES = 1 << 26
_SINGLE = (str, bytes, bool, int, float, complex, type(None), PurePath, Enum)


def traits_of(value: Any, path: str = "") -> Traits:
    """An object's content, by the attributes that lead to it."""
    found: Traits = {}
    _add_object(found, path or type(value).__name__, value, {id(value)}, 0)
    return found


def plain(value: Any) -> Trait:
    """A value that may be shown as it is."""
    return _shortened(repr(value)), _digest(_canonical(value))


def tensor_trait(tensor: Tensor) -> Trait:
    """A tensor, with its first values where it is a list."""
    return _shown_array(tensor), tensor_digest(tensor)


def tensor_digest(tensor: Tensor, most: int = _MOST_BYTES) -> str:
    """A digest of a tensor's shape, type and values (every nth if there are many)."""
    about = f"{tuple(tensor.shape)} {tensor.dtype}"
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return about
    flat = tensor.detach().reshape(-1)
    flat = flat[:: max(1, flat.nbytes // most)].resolve_conj().resolve_neg().cpu().contiguous()
    return _digest(about, flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")


def _add_object(found: Traits, path: str, value: Any, seen: set[int], depth: int) -> None:
    found[path] = (type(value).__name__, type(value).__qualname__)
    if _is_known(value):
        return
    for name, each in list(getattr(value, "__dict__", {}).items()):
        if not any(word in name.lower() for word in ("rank", "cache")):
            _add(found, f"{path}.{name}", each, seen, depth + 1)


_known: WeakValueDictionary[int, Any] = WeakValueDictionary()


def _is_known(value: Any) -> bool:
    """Whether an object was looked at before: what ranks have read of it since then, each its share, it may keep."""
    if _known.get(id(value)) is value:
        return True
    with contextlib.suppress(TypeError):  # of a class with slots
        _known[id(value)] = value
    return False


def _add(found: Traits, path: str, value: Any, seen: set[int], depth: int) -> None:
    if isinstance(value, _SINGLE) or id(value) in seen or len(found) >= _MOST_TRAITS or depth > _DEEPEST:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        found[path] = tensor_trait(value)
    elif isinstance(value, np.ndarray):
        found[path] = _shown_array(value), _array_digest(value)
    elif type(value).__module__.partition(".")[0] == "pandas" and hasattr(value, "to_numpy"):
        rows = value[:: max(1, len(value) // _MOST_OBJECTS)]
        columns = [str(each) for each in getattr(value, "columns", ())]
        found[path] = f"{type(value).__name__} of {len(value)}", _digest(columns, _canonical(rows.to_numpy().tolist()))
    elif isinstance(value, dict):
        _add_dict(found, path, value, seen, depth)
    elif isinstance(value, set | frozenset):
        found[path] = f"a set of {len(value)}", _digest(sorted(map(repr, value)) if len(value) <= _MOST_PLAIN else "")
    elif isinstance(value, list | tuple | range | deque):
        if len(value) <= _MOST_OBJECTS and any(_is_data(each) for each in value):
            found[path] = f"{len(value)} items", str(len(value))
            for i, each in enumerate(value):
                _add(found, f"{path}[{i}]", each, seen, depth + 1)
        else:
            items = list(value) if isinstance(value, deque) else value
            found[path] = _shown(items), _sequence_digest(items)
    elif _is_data(value):
        _add_object(found, path, value, seen, depth)


def _is_data(value: Any) -> bool:
    """Whether an object holds samples, or chooses them; a model or a transform does not."""
    if isinstance(value, nn.Module | Tensor | np.ndarray | str | bytes | Mapping | list | tuple | range):
        return False
    return isinstance(value, Dataset) or (hasattr(type(value), "__getitem__") and hasattr(value, "__dict__"))


def _add_dict(found: Traits, path: str, value: dict[Any, Any], seen: set[int], depth: int) -> None:
    if len(value) <= 64 and all(isinstance(key, str) for key in value):  # settings rather than an index
        for key, each in value.items():
            if not any(word in key.lower() for word in ("rank", "cache")):
                _add(found, f"{path}[{key!r}]", each, seen, depth + 1)
        return
    try:
        keys = sorted(value) if len(value) <= _MOST_PLAIN else []
    except TypeError:  # keys of several types
        keys = sorted(value, key=repr)
    shown = f"a dict of {len(value)}"
    found[path] = shown, _digest(len(value), _sequence_digest(keys), _sequence_digest([value[key] for key in keys]))


def _sequence_digest(items: Sequence[Any]) -> str:
    some = list(items[:: max(1, len(items) // _MOST_PLAIN)])
    if some and isinstance(some[0], str):
        try:
            folder = os.path.commonpath([os.path.dirname(min(some)), os.path.dirname(max(some))])
            joined = "\0".join(["", *some])
        except (TypeError, ValueError):  # not all of them are texts, or some are from the root
            pass
        else:
            return _digest(len(items), joined.replace(f"\0{folder}/", "\0") if folder else joined)
    if some and isinstance(some[0], tuple):  # (file, label) and such, column by column
        with contextlib.suppress(TypeError, IndexError):  # not all of them are
            columns = [[each[i] for each in some] for i in range(len(some[0]))]
            return _digest(len(items), *map(_sequence_digest, columns))
    try:
        return _digest(len(items), marshal.dumps(some, 0))  # the version that knows nothing of shared objects
    except ValueError:
        return _digest(len(items), _canonical(some[:: max(1, len(some) // _MOST_OBJECTS)]))


def _array_digest(array: np.ndarray[Any, Any]) -> str:
    about = f"{array.shape} {array.dtype}"
    if isinstance(array, np.memmap):
        return about  # on a disk
    if array.dtype.hasobject:
        return _digest(about, _sequence_digest(array.reshape(-1).tolist()))
    step = max(1, array.nbytes // _MOST_BYTES)
    return _digest(about, (array.reshape(-1)[::step] if array.flags.c_contiguous else array[::step]).tobytes())


def _canonical(value: Any, depth: int = 0) -> Any:
    """The value in types whose texts are equal where they are; of others their class."""
    if isinstance(value, np.generic):
        return repr(value.item())
    if isinstance(value, PurePath):
        return value.name
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, _SINGLE):
        return repr(value)
    if isinstance(value, Tensor):
        return tensor_digest(value, 1 << 16)
    if isinstance(value, np.ndarray):
        return _array_digest(value)
    if depth < _DEEPEST and isinstance(value, list | tuple):
        return [_canonical(each, depth + 1) for each in value]
    if depth < _DEEPEST and isinstance(value, dict):
        return sorted((repr(key), repr(_canonical(each, depth + 1))) for key, each in value.items())
    return type(value).__qualname__


def _digest(*parts: Any) -> str:
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = part if isinstance(part, bytes | str) else repr(part)
        found.update(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
        found.update(b"|")
    return found.hexdigest()


def _shown(items: Sequence[Any]) -> str:
    first = ", ".join(_shortened(repr(each), 40) for each in items[:3])
    return f"[{first}{', ...' if len(items) > 3 else ''}] of {len(items)}"


def _shown_array(array: Tensor | np.ndarray[Any, Any]) -> str:
    first = ""
    if array.ndim == 1 and len(array) and not (isinstance(array, Tensor) and array.is_meta):
        first = f" [{', '.join(str(each) for each in array[:3].tolist())}, ...]"
    return f"{type(array).__name__} {list(array.shape)}{first}"


def _shortened(text: str, most: int = 100) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
