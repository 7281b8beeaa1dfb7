"""The end of a process that has torch.

An interpreter looks through all objects at its end, a million of them, which takes 2 s of computing. A process whose
program is ours has nothing in it that needs that: it flushes, and is gone. A user's script may have destructors with a
meaning: what it has made itself is taken down as Python does it, what was there before is left to the kernel. That can
be turned off by DTRAIN_FAST_EXIT=1, for a script that breaks by it: then it ends as ours do.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import signal
import sys
import weakref
from collections.abc import Mapping
from types import ModuleType
from typing import NoReturn

from dtrain.signals import outlive

from . import cpython

FAST_EXIT_VARIABLE = "DTRAIN_FAST_EXIT"


def leave(code: int) -> NoReturn:
    """End a process of ours: threads are awaited, atexit's functions called, files written."""
    cpython.await_threads()
    cpython.call_exit_functions()
    drop(code)


def drop(code: int) -> NoReturn:
    """End a process of ours without waiting for anything: files are written."""
    cpython.end_children()
    flush()
    cpython.flush_c()
    os._exit(code)


def leave_script(code: int, kept: Mapping[str, ModuleType]) -> NoReturn:
    """End a process that has run a user's script, as python would: destructors are called, C's exit functions too.

    Args:
        kept: modules that are not torn down, by name.
    """
    if os.environ.get(FAST_EXIT_VARIABLE) == "1":
        leave(code)
    cpython.await_threads()
    cpython.call_exit_functions()
    take_down(kept)
    flush()
    cpython.exit_c(code)


def flush() -> None:
    """Write what open files have in their buffers."""
    for each in gc.get_objects():  # but for those that were frozen
        if issubclass(type(each), io.TextIOBase | io.BufferedIOBase):
            with contextlib.suppress(Exception):
                each.flush()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
            stream.flush()


def take_down(kept: Mapping[str, ModuleType]) -> None:
    """Clear the modules that are not kept, as `finalize_modules` in CPython's pylifecycle.c does."""
    flush()  # a collection closes files in any order, those below a buffer among the first
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        if callable(handler) and handler is not outlive:
            signal.signal(number, signal.SIG_DFL)
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):
        sys.__dict__.pop(name, None)  # their frames keep everything alive
    forgotten = forget(kept)
    gc.collect()
    for reference in reversed(forgotten):
        if (module := reference()) is not None:  # something that is kept refers to it, or to a part of it
            names = [name for name in vars(module) if name != "__builtins__"]
            for name in sorted(names, key=lambda name: not name.startswith("_")):
                vars(module)[name] = None
    gc.collect()


def forget(kept: Mapping[str, ModuleType]) -> list[weakref.ref[ModuleType]]:
    """Remove the modules that are not kept from sys.modules; those still referenced elsewhere live on."""
    modules = [(name, module) for name, module in sys.modules.items() if kept.get(name) is not module]
    for name, _ in modules:
        del sys.modules[name]
    return [weakref.ref(module) for _, module in modules if isinstance(module, ModuleType)]
