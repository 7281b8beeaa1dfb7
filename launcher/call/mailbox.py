"""What the process that launches, its agent and its ranks tell each other: a call, and what came of it.

All of it lies in memory of the process that launches (memfd_create). That has no name in any file system, only
processes of the same user can open it (/proc/PID/fd), and it is gone with the process. So no pickle that is read here
can have been written by anyone else.
"""

from __future__ import annotations

import contextlib
import fcntl
import linecache
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]  # the function and its arguments
Sources = Mapping[str, tuple[int, float | None, list[str], str]]  # entries of linecache


@dataclass(frozen=True)
class Surroundings:
    """What the function expects around it.

    Attributes:
        name: of the function, which the ranks have in place of a script's name.
        path: sys.path.
        sources: of cells, which are in no file: tracebacks show their lines, and torch.compile reads them.
    """

    name: str
    path: list[str]
    sources: Sources

    def restore(self) -> None:
        """Have them in this process."""
        sys.argv[:] = [self.name]
        sys.path[:] = self.path
        linecache.cache.update(self.sources)


@dataclass(frozen=True)
class Returned:
    """What the function has returned on a rank, pickled once more: it is read where that was asked for alone."""

    rank: int
    value: bytes


@dataclass(frozen=True)
class Ended:
    """How all of it ended, from the agent; with an error if not well."""

    num_ranks: int = 0
    error: Exception | None = None


@dataclass(frozen=True)
class Mailbox:
    """The memory in which a call lies, what the ranks return, and how it ended; as paths for other processes."""

    call: str
    returned: str
    ended: str

    @classmethod
    @contextlib.contextmanager
    def opened(cls) -> Iterator[Mailbox]:
        """A new one, for the block."""
        with contextlib.ExitStack() as held:
            names = [field.name for field in fields(cls)]
            files = [held.enter_context(open(os.memfd_create(f"dtrain-{name}"), "rb")) for name in names]
            yield cls(*(f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in files))

    def send(self, surroundings: Surroundings, call: Call) -> None:
        """Write the call; raises what pickling it raises."""
        from . import by_value

        with open(self.call, "wb") as file:
            pickle.dump(surroundings, file)  # on its own: what follows can only be read where these are
            by_value.dump(call, file)

    def receive(self) -> Call:
        """The call, in a process that from now on has its surroundings."""
        with open(self.call, "rb") as file:
            surroundings: Surroundings = pickle.load(file)
            surroundings.restore()
            call: Call = pickle.load(file)
        return call

    def give_back(self, returned: Returned) -> None:
        """Add what a rank returns."""
        with open(self.returned, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # large ones are written in several pieces
            pickle.dump(returned, file)

    def all_returned(self) -> Iterator[Returned]:
        """What all ranks have returned, once they have ended well."""
        with open(self.returned, "rb") as file, contextlib.suppress(EOFError):
            while True:
                yield pickle.load(file)

    def end(self, ended: Ended) -> None:
        """Write how it ended."""
        with open(self.ended, "wb") as file:
            pickle.dump(ended, file)

    def end_if_any(self) -> Ended | None:
        """How it ended; None if the agent was killed."""
        with open(self.ended, "rb") as file, contextlib.suppress(EOFError):
            ended: Ended = pickle.load(file)
            return ended
        return None
