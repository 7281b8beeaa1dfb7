"""Resolves dotted names, the job's own modules first; and explains why one does not resolve."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import os
import pkgutil
import shlex
import sys
import sysconfig
import traceback
from importlib.machinery import PathFinder
from pathlib import Path, PurePath
from types import ModuleType

from dtrain.errors import Problem, UserError, did_you_mean

# What a rank has imported before it looks for the job's modules: these names are taken.
OURS = ("click", "dtrain", "numpy", "pydantic", "torch", "torchmetrics", "torchvision", "yaml")

HIDING = ("numpy", "torch")  # of these, those without which nothing can be imported at all

_STDLIB = tuple(sysconfig.get_paths()[key] + os.sep for key in ("stdlib", "platstdlib"))
_NOT_HERE = {"nt", "winreg", "msvcrt", "winsound"}  # Windows'
_CLOSE = 0.8  # how near the name of a module on Python's path must be to be the one that was meant


def job_path(folder: Path) -> None:
    """Put the job's folder first on sys.path, so that a net.py beside the job file takes precedence."""
    entry = str(folder.resolve())
    if sys.path[:1] != [entry]:
        sys.path[:] = [entry, *(each for each in sys.path if each != entry)]
        importlib.invalidate_caches()


def resolve(name: str) -> object:
    """The object that a dotted name refers to, importing modules as needed; raises UserError with one Problem."""
    first, *rest = name.split(".")
    if not all(part.isidentifier() for part in (first, *rest)):
        raise UserError(f"{name!r} is not an importable name such as net.DigitNet")
    if problem := collision(Path(sys.path[0]), first):
        raise UserError(problem)
    try:
        if first not in sys.modules and importlib.util.find_spec(first) is None:
            raise UserError(Problem(f"there is no module {first}", hint=_where_to_look(first)))
        found: object = importlib.import_module(first)
        for i, part in enumerate(rest, start=1):
            found = _member(found, part, ".".join([first, *rest][:i]))
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the user's module runs here and may raise anything
        raise UserError(Problem(format_error(error), hint=_hint(error))) from error
    return found


def _member(owner: object, name: str, owner_name: str) -> object:
    """An attribute, else a submodule not imported yet."""
    try:
        return getattr(owner, name)
    except AttributeError:
        is_package = isinstance(owner, ModuleType) and hasattr(owner, "__path__")
        if is_package and importlib.util.find_spec(f"{owner_name}.{name}"):
            return importlib.import_module(f"{owner_name}.{name}")
    modules = [module.name for module in pkgutil.iter_modules(getattr(owner, "__path__", ()))]
    # Of torch.optim.sgd and torch.optim.SGD, alike but for case, the last is meant.
    attributes = sorted(dir(owner), key=lambda each: not isinstance(vars(owner).get(each), ModuleType))
    hint = did_you_mean(name, [*modules, *attributes]) or _place(owner)
    raise UserError(Problem(f"{owner_name} has no {name}", hint=hint))


def _place(owner: object) -> str | None:
    """Where a module is, if not in the job's folder."""
    file = getattr(owner, "__file__", None) if isinstance(owner, ModuleType) else None
    return f"it is {short(file)}" if file and not Path(file).is_relative_to(sys.path[0]) else None


# -- modules that two have ------------------------------------------------------------------------


def collision(folder: Path, name: str) -> Problem | None:
    """Why a module in the job's folder can't be had by its name, where Python's or another package's is loaded."""
    if name not in OURS and name not in sys.stdlib_module_names:
        return None
    own = own_file(folder, name)
    other = None if own is None else _other_file(folder, name)
    if own is None or other is None:
        return None
    whose = "a package that dtrain needs" if name in OURS else f"Python's own {name}"
    message = f"{name} is {whose}, {other}, so {short(str(own))} cannot be imported under that name"
    return Problem(message, hint=f"rename yours, such as {own.name} to my_{own.name}")


def collisions(folder: Path) -> list[Problem]:
    """Modules in the job's folder that hide what torch itself is made of, whether the job names them or not."""
    return [found for name in HIDING if (found := collision(folder, name))]


def hidden_modules(folder: Path, program: Path) -> list[Path]:
    """The modules beside a program that an import would not find now, since Python's of that name is loaded."""
    found = (own_file(folder, name) for name in sys.modules.keys() & sys.stdlib_module_names)
    own = [file for file in found if file is not None and file.resolve() != program.resolve()]
    return sorted(file for file in own if _other_file(folder, file.stem))


def load_what_ranks_have(folder: Path) -> None:
    """Where the job's folder has modules that are called as Python's: `check` is to find the same ones as a rank.

    A rank has torch loaded before the job's folder is on its path, and with torch a good part of Python's library.
    """
    if any(own_file(folder, name) for name in sys.stdlib_module_names):
        for module in ("torch", "torch._dynamo"):
            with contextlib.suppress(ImportError):  # which the job's targets will say
                importlib.import_module(module)


def own_file(folder: Path, name: str) -> Path | None:
    """The module's file, or the package's folder, in the job's folder."""
    package, module = folder / name, folder / f"{name}.py"
    if (package / "__init__.py").is_file():
        return package
    return module if module.is_file() else None


def _other_file(folder: Path, name: str) -> str | None:
    """Where the module is that this name stands for, if it is not that in the job's folder."""
    if name in sys.modules:
        file = getattr(sys.modules[name], "__file__", None)
        if file is None:
            return "which is built in"
        return None if Path(file).resolve().is_relative_to(folder.resolve()) else file
    if name not in OURS:  # whose modules are loaded in a rank, if not here
        return None
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != folder.resolve()]
    spec = PathFinder.find_spec(name, elsewhere)
    return None if spec is None else spec.origin


# -- hints ---------------------------------------------------------------------------------------


def _where_to_look(name: str) -> str:
    """A remedy for a missing module."""
    folder = Path(sys.path[0])
    if own := did_you_mean(name, [module.name for module in pkgutil.iter_modules([str(folder)])]):
        return own
    for parent in dict.fromkeys([Path.cwd(), *folder.parents[:3]]):
        for near in (parent, parent / "src"):
            if near != folder and holds(near, name):
                path = shlex.quote(short(str(near)))
                return f"not in {folder}, but in {near}: set PYTHONPATH={path}, or install its project: pip install -e"
    known = {module.name for module in pkgutil.iter_modules(sys.path[1:])} | sys.stdlib_module_names - _NOT_HERE
    if close := difflib.get_close_matches(name, known, n=1, cutoff=_CLOSE):
        return f"did you mean {close[0]}?"
    return f"looked in {folder} and on Python's path; for code elsewhere set PYTHONPATH, or install it: pip install -e"


def holds(folder: Path, name: str) -> bool:
    """Whether the folder has that module or package, with an __init__.py or without."""
    package = folder / name
    return (folder / f"{name}.py").is_file() or any(any(package.glob(each)) for each in ("*.py", "*/*.py"))


def _hint(error: BaseException) -> str | None:
    """A hint for an attribute that another module of that name does not have."""
    module = error.name if isinstance(error, ImportError) else getattr(getattr(error, "obj", None), "__name__", None)
    problem = collision(Path(sys.path[0]), module.partition(".")[0]) if isinstance(module, str) else None
    return None if problem is None else str(problem)


# -- errors of the user's code --------------------------------------------------------------------


def format_error(error: BaseException) -> str:
    """An error of the user's code in one line: `net.py:7: NameError: name 'nn' is not defined`."""
    kind = type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{short(error.filename)}:{error.lineno}: {kind}: {error.msg}"
    text = f"{kind}: {error}".removesuffix(": ")
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if is_users(frame.filename)]
    return f"{short(users[-1].filename)}:{users[-1].lineno}: {text}" if users else text


def is_users(filename: str) -> bool:
    """Whether a file is neither Python's, nor an installed package's, nor dtrain's."""
    installed = {"site-packages", "dist-packages"} & set(PurePath(filename).parts)
    return not (installed or filename.startswith(("<", *_STDLIB)) or _is_dtrains(filename))


def _is_dtrains(filename: str) -> bool:
    return Path(__file__).parent in Path(filename).parents


def short(filename: str) -> str:
    """Relative to the working directory, where it is within that."""
    relative = os.path.relpath(filename)
    return filename if relative.startswith(os.pardir) else relative
