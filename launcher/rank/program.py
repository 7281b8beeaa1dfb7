"""A user's program, a script or a module as for `python -m`: found and compiled before anything starts."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.errors import Problem, UserError, did_you_mean

if TYPE_CHECKING:
    from dtrain.schema.job import LoadedScript

# If the program itself sets these, it is too late once torch, numpy or matplotlib has been imported.
_READ_ON_IMPORT = r"""["']?((?:TORCH|PYTORCH|OMP|MKL|KMP|GOMP|OPENBLAS|NUMEXPR|NPY|NUMPY|MPL|TRITON)\w*)["']?\s*"""
_SETS = re.compile(r"environ(?:\[|\.setdefault\(|\.update\(\s*\{?)\s*" + _READ_ON_IMPORT + r"(?:\]\s*=[^=]|[,:=])")


@dataclass(frozen=True)
class Program:
    """What the ranks will run, and what is known about it beforehand."""

    name: str  # the script's path, or the module's dotted name
    is_module: bool
    file: Path
    folder: str  # first on sys.path
    source: str

    @property
    def sets_on_import(self) -> str | None:
        """A variable that the program sets for libraries that read it at import time."""
        found = _SETS.search(self.source)
        return found and found[1]


def find_script(name: str) -> Program:
    """The script with that path.

    Raises:
        UserError: it is missing, unreadable, or not Python.
    """
    path = Path(name)
    try:
        source = path.read_bytes()
    except IsADirectoryError:
        raise UserError(Problem("is a folder; name the script in it", file=name)) from None
    except FileNotFoundError:
        beside = [each.name for each in path.parent.glob("*.py")]
        raise UserError(Problem("no such file", file=name, hint=did_you_mean(path.name, beside))) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(Problem(f"cannot be read: {reason}", file=name)) from None
    folder = os.path.dirname(os.path.realpath(path))  # as in python: the file's own folder, not a link's
    return Program(name, False, path, folder, _compiled(source, name))


def refuse_other_program(name: str) -> None:
    """Raise UserError if the supposed job file is a program that is not a Python script."""
    try:
        with open(name, "rb") as file:
            begin = file.read(64).partition(b"\n")[0]
    except (OSError, ValueError):
        return
    if b"python" in begin and begin.startswith(b"#!"):
        raise UserError(Problem("is a Python script, so its name must end in .py", file=name))
    if begin.startswith((b"#!", b"\x7fELF")):
        hint = f"start it from one: subprocess.run([{os.path.join('.', os.path.normpath(name))!r}], check=True)"
        raise UserError(Problem("is a program, but each rank runs a Python script", file=name, hint=hint))


def find_module(name: str, folder: str) -> Program:
    """The module with that name, looked up in `folder` first; for a package, its __main__.

    Raises:
        UserError: there is none, or it is not Python.
    """
    if not all(name.split(".")):
        raise UserError(f"-m {name}: expected a module's name, such as package.module")
    with _first_on_path(folder):
        spec = _find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = _find_spec(f"{name}.__main__")
            if spec is None:
                raise UserError(f"{name} is a package without __main__.py; name a module in it")
    if spec is None or spec.origin is None:
        hint = f"to run a script, omit -m: {name}" if name.endswith(".py") else f"looked for in {folder} first"
        raise UserError(Problem(f"there is no module {name}", hint=hint))
    file = Path(spec.origin)
    has_source = file.suffix == ".py" and file.is_file()  # not in an archive
    source = _compiled(file.read_bytes(), os.path.relpath(file)) if has_source else ""
    return Program(name, True, file, folder, source)


def find_program(loaded: LoadedScript) -> Program:
    """The program that a job names, looked up in the job's folder.

    Raises:
        UserError: it can't be run; with the place in the job file.
    """
    job, folder = loaded.job, loaded.path.parent
    try:
        if job.is_module:
            return find_module(job.program, str(folder.absolute()))
        return find_script(str(folder / job.program))
    except UserError as error:
        raise UserError(loaded.at(Problem(str(error), "script"))) from None


def _compiled(source: bytes, name: str) -> str:
    """The file's text, which is valid Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the ranks will report it
            compile(source, name, "exec", dont_inherit=True)
    except SyntaxError as error:
        raise UserError(Problem(f"{type(error).__name__}: {error.msg}", file=name, line=error.lineno)) from None
    except ValueError as error:
        raise UserError(Problem(f"is no Python: {error}", file=name)) from None
    return source.decode(errors="replace")


@contextlib.contextmanager
def _first_on_path(folder: str) -> Iterator[None]:
    before = sys.path[:]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[:1] = [folder]
    try:
        yield
    finally:
        sys.path[:] = before


def _find_spec(name: str) -> ModuleSpec | None:
    """Find it as an import would; a parent package is imported only if the module can't be found otherwise.

    Packages are the user's code: here it would run in the agent, before the ranks.
    """
    spec: ModuleSpec | None = None
    path: Sequence[str] | None = None
    parts = name.split(".")
    with contextlib.suppress(Exception):  # such as a package without __init__.py in another, which must be imported
        for end in range(1, len(parts) + 1):
            full_name = ".".join(parts[:end])
            found = (finder.find_spec(full_name, path) for finder in sys.meta_path)
            spec = next((each for each in found if each is not None), None)
            if spec is None:
                break
            path = spec.submodule_search_locations
            if path is None and end < len(parts):
                return None  # a module has no modules in it
        else:
            return spec
    try:
        return importlib.util.find_spec(name) if len(parts) > 1 else None
    except (Exception, SystemExit):  # of whatever the package does
        return None
