"""The end of a process that has torch: all that Python does at its own, but for taking down torch.

An interpreter looks through all objects at its end, a million of them, which takes 2 s of computing. What the program
itself has made is taken down as Python does it; what was there before is left to the kernel.
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
    """End this process: threads are awaited, atexit's functions called, modules cleared, C's buffers written.

    Args:
        kept: the modules that are not to be taken down, by their names.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # what the interpreter calls
    atexit._run_exitfuncs()
    take_down(kept)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
            stream.flush()
    ctypes.PyDLL(None).exit(code)  # with the lock held, so that no other thread goes on
    raise AssertionError


def take_down(kept: Mapping[str, ModuleType]) -> None:
    """Clear the modules that are not kept, as `finalize_modules` in CPython's pylifecycle.c does."""
    # A collection closes files in any order, those below a buffer among the first.
    for each in gc.get_objects():  # but for those that were frozen
        if issubclass(type(each), io.TextIOBase | io.BufferedIOBase):
            with contextlib.suppress(Exception):
                each.flush()
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        if callable(handler) and handler is not outlive:
            signal.signal(number, signal.SIG_DFL)
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):
        sys.__dict__.pop(name, None)  # their frames hold all there is
    forgotten = forget(kept)
    gc.collect()
    for reference in reversed(forgotten):
        if (module := reference()) is not None:  # something kept holds it, or a part of it
            names = [name for name in vars(module) if name != "__builtins__"]
            for name in sorted(names, key=lambda name: not name.startswith("_")):
                vars(module)[name] = None
    gc.collect()


def forget(kept: Mapping[str, ModuleType]) -> list[weakref.ref[ModuleType]]:
    """Take the modules that are not kept out of sys.modules; those that something else holds live on."""
    modules = [(name, module) for name, module in sys.modules.items() if kept.get(name) is not module]
    for name, _ in modules:
        del sys.modules[name]
    return [weakref.ref(module) for _, module in modules if isinstance(module, ModuleType)]
