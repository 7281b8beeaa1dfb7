"""Optional packages: the message if a needed one is missing, before anything starts."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from dtrain.errors import Problem, UserError

if TYPE_CHECKING:
    from dtrain.schema.job import Job, LoadedJob, LoadedScript, ScriptJob
    from dtrain.schema.sections import Fit

OLDEST_TORCH = (2, 11)  # as in pyproject.toml; a cluster's torch or `pip install --no-deps` may not meet it


def missing(*names: str) -> str | None:
    """Which of these packages are missing, as the end of a sentence; None if none is."""
    lacking = [name for name in names if importlib.util.find_spec(name) is None]
    if not lacking:
        return None
    plural = "s" if len(lacking) > 1 else ""
    return f"needs the package{plural} {', '.join(lacking)}: {sys.executable} -m pip install {' '.join(lacking)}"


def require(what: str, *names: str) -> None:
    """Raise UserError if a package that something needs is missing."""
    if lacking := missing(*names):
        raise UserError(f"{what} {lacking}")


def require_for(loaded: LoadedJob | LoadedScript | None = None) -> None:
    """Raise UserError if a package that a run needs is missing; None: a script, which names none."""
    require("dtrain", "torch", "torchmetrics")
    try:
        found = version("torch")
    except PackageNotFoundError:  # of a build that was never installed
        found = ""
    if found and tuple(map(int, found.split(".")[:2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise UserError(f"dtrain needs torch {oldest} or newer, and {sys.executable} has {found}")
    if loaded is not None and (problems := list(_asked_for(loaded.job))):
        raise UserError([loaded.at(problem) for problem in problems])


def _asked_for(job: Job | ScriptJob) -> Iterator[Problem]:
    if job.mlflow.tracking_uri is not None and (lacking := missing("mlflow")):
        yield Problem(lacking, "mlflow.tracking_uri")
    from dtrain.schema.strategies import STRATEGIES

    fit: Fit | None = getattr(job, "fit", None)  # a script has none
    package = fit and STRATEGIES[fit.strategy].package
    if package and (lacking := missing(package)):
        yield Problem(f"{package} {lacking}", "fit.strategy")
