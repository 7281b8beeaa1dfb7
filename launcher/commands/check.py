"""`dtrain check`: what can be known about a job before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.errors import Problem, UserError
from dtrain.run.folder import RunDir
from dtrain.schema.packages import require_for

from ..rank.preparation import preload_job, require_right

if TYPE_CHECKING:
    from dtrain.schema.job import LoadedJob, LoadedScript


@dataclass(frozen=True)
class Size:
    """A cluster, --nodes and --gpus, as `dtrain launch --slurm` takes them."""

    cluster: str
    nodes: int
    gpus: str


def check(path: str, overrides: Sequence[str], exact: bool, size: Size | None = None) -> int:
    """Check schema, imports and arguments; 0 if the job is right.

    With `exact`, also verify its exactness; with `size`, also ask a cluster and a node about such a run.

    Raises:
        UserError: all that is wrong, at once.
    """
    from dtrain.schema.job import LoadedScript
    from dtrain.schema.loading import load

    loaded = load(path, overrides)
    require_for(loaded)
    if isinstance(loaded, LoadedScript):
        _check_script(loaded, exact)
        return _check_cluster(loaded, size) if size else 0
    if exact:
        from .check_exact import SIZES

        preload_job(loaded.job, max(SIZES))
    require_right(loaded, loaded.folder)
    job = loaded.job
    print(f"{path} is right: schema, imports and arguments; best weights by {job.monitor} ({job.stopping.mode})")
    if size is not None:
        _check_cluster(loaded, size)
    if not exact:
        return 0
    from .check_exact import check_exact

    return check_exact(loaded)


def _check_script(loaded: LoadedScript, exact: bool) -> None:
    from ..rank.program import find_program

    program = find_program(loaded)
    if exact:
        raise UserError(
            loaded.at(Problem("is a script that trains by itself: --exact is for jobs with a model", "script"))
        )
    print(f"{loaded.path} is right: schema and {program.file}")


def _check_cluster(loaded: LoadedJob | LoadedScript, size: Size) -> int:
    from dtrain.clusters.cluster import named

    from .submit import submittable_job

    wanted = submittable_job(loaded, size.nodes, size.gpus)
    found = named(size.cluster).check(wanted, RunDir.new(loaded.job.name).absolute(), Path.cwd())
    for note in found.notes:
        print(note)
    if found.problems:
        raise UserError([loaded.at(problem) if problem.path else problem for problem in found.problems])
    return 0
