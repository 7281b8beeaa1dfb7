"""Failures in a user's dataset or collate function: which sample it was, and how the error reaches the rank."""

from __future__ import annotations

import pickle
import traceback
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn

from dtrain.errors import InLoadingProcess, UserError


class reading:
    """An exception in the block says what was read: as a note, so that it stays what it is.

    But for StopIteration, which would end whatever generator it passes through, in silence.
    """

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, frames: TracebackType | None) -> None:
        if isinstance(error, Exception | SystemExit):
            noted(error, self._what)
        if isinstance(error, StopIteration):
            raise RuntimeError(f"{self._what} raised StopIteration{': ' * bool(error.args)}{error}") from error


def noted(error: BaseException, what: str) -> None:
    """What `add_note` does, which Python 3.10 doesn't have."""
    error.__notes__ = [*getattr(error, "__notes__", []), what]  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Failure:
    """An exception on its way from a loading process to its rank."""

    error: bytes  # pickled here: an exception that can't be must not fail in transit
    frames: str

    @classmethod
    def of(cls, error: BaseException, process: int) -> Failure:
        if not isinstance(error, UserError):
            noted(error, f"in loading process {process}")
        frames = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        name = type(error).__name__
        for form in (error, _Rebuilt(type(error), error.args, vars(error)), RuntimeError(f"{name}: {error}")):
            try:
                pickled = pickle.dumps(form)
                pickle.loads(pickled)
                break
            except Exception:  # of the user's class, by its nature
                continue
        return cls(pickled, frames)

    def again(self) -> NoReturn:
        """Raise it in the rank, caused by what it was there."""
        error = pickle.loads(self.error)
        raise (error.whole() if isinstance(error, _Rebuilt) else error) from InLoadingProcess(self.frames)


@dataclass(frozen=True)
class _Rebuilt:
    """An exception that pickle can't rebuild, since its class takes other arguments than it passes on."""

    type: type[BaseException]
    args: tuple[Any, ...]
    state: dict[str, Any]

    def whole(self) -> BaseException:
        error = self.type.__new__(self.type, *self.args)
        vars(error).update(self.state)
        return error
