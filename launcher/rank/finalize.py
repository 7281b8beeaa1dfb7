"""The exit of a process that has imported torch: everything that Python does, except tearing down torch.

An interpreter scans all objects when it exits, a million of them, which takes 2 s of CPU time. What the program
itself has created is torn down as Python does it; what was there before is left to the kernel.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import io
import signal
import sys
import threading
import weakref
from collections.abc import Mapping
from types import ModuleType
from typing import NoReturn

from dtrain.signals import outlive


def leave(code: int, kept: Mapping[str, ModuleType]) -> NoReturn:
    """End this process: join threads, call atexit's functions, clear modules, flush C's buffers.

    Args:
        kept: modules that are not torn down, by name.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # what the interpreter calls
    atexit._run_exitfuncs()
    take_down(kept)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
            stream.flush()
    ctypes.PyDLL(None).exit(code)  # with the lock held, so that no other thread continues
    raise AssertionError


def take_down(kept: Mapping[str, ModuleType]) -> None:
    """Clear the modules that are not kept, as `finalize_modules` in CPython's pylifecycle.c does."""
    # A collection closes files in any order, perhaps a raw file before its buffer.
    for each in gc.get_objects():  # except those that were frozen
        if issubclass(type(each), io.TextIOBase | io.BufferedIOBase):
            with contextlib.suppress(Exception):
                each.flush()
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
