"""CPython's private parts, all that are used here. tests/house/test_private_parts.py covers upgrades.

They are what the interpreter itself calls when it begins and ends: a rank forked from a running process needs it in
other places.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import runpy
import sys
import threading
from typing import NoReturn


def run_module_as_main(name: str) -> None:
    """What `python -m` calls. `runpy.run_module`, which is public, takes the module away when it is done: before
    threads, atexit handlers and destructors, which still use it."""
    runpy._run_module_as_main(name)  # type: ignore[attr-defined]  # private: not in the stubs


def name_main_thread() -> None:
    """Give the main thread of a forked process its number, as multiprocessing does: debuggers and py-spy read it."""
    threading.main_thread()._set_native_id()  # type: ignore[attr-defined]  # private: not in the stubs


def await_threads() -> None:
    """Wait for all threads but daemonic ones, and call what libraries have registered for that moment."""
    threading._shutdown()  # type: ignore[attr-defined]  # private: not in the stubs


def call_exit_functions() -> None:
    """Call what is registered with atexit. There is no public way to do so before the end."""
    atexit._run_exitfuncs()


def end_children() -> None:
    """End multiprocessing's daemonic processes, as at exit: a DataLoader's, for one."""
    if util := sys.modules.get("multiprocessing.util"):
        util._exit_function()


def flush_c() -> None:
    """Write what C libraries have in their buffers."""
    ctypes.CDLL(None).fflush(None)


def exit_c(code: int) -> NoReturn:
    """Leave as a C program does, which writes buffers and calls C's own exit functions.

    With the interpreter's lock held, so that no other thread goes on.
    """
    ctypes.PyDLL(None).exit(code)
    os._exit(code)  # not reached
