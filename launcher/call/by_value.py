"""Pickles that hold functions and classes of a notebook or of __main__ whole, since no other process can import them.

cloudpickle's, but code keeps the name of its file, for tracebacks: it is left out there, so that a pickle of the same
code is the same from everywhere. Imports cloudpickle.
"""

from __future__ import annotations

import io
from types import CodeType
from typing import IO, Any

import cloudpickle


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, CodeType):
            return _code, (obj.co_filename, *self.dispatch_table[CodeType](obj)[1])
        return super().reducer_override(obj)


def _code(file: str, *parts: Any) -> CodeType:
    return CodeType(*parts).replace(co_filename=file)


def dump(value: Any, file: IO[bytes]) -> None:
    """Pickle it into the file."""
    _Pickler(file).dump(value)


def dumps(value: Any) -> bytes:
    """Pickle it."""
    with io.BytesIO() as file:
        dump(value, file)
        return file.getvalue()
