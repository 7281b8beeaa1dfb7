"""`dtrain check`: what can be known about a job before anything runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.errors import Problem, UserError
from dtrain.run.folder import RunDir
from dtrain.schema.packages import require_for

if TYPE_CHECKING:
    from dtrain.schema.job import LoadedJob, LoadedScript

_IN_CODE = re.compile(r"\S+\.py:\d+: ")  # a message that tells of a line of the user's


@dataclass(frozen=True)
class SlurmSize:
    """--nodes and --gpus, as `dtrain launch --slurm` takes them."""

    nodes: int
    gpus: str


def check(path: str, overrides: Sequence[str], exact: bool, slurm: SlurmSize | None = None) -> int:
    """Check schema, imports and arguments; 0 if the job is right.

    With `exact`, also see its promises kept; with `slurm`, also ask Slurm and a node about a run of that size.

    Raises:
        UserError: all that is wrong, at once.
    """
    from dtrain.schema.job import LoadedScript
    from dtrain.schema.loading import load

    loaded = load(path, overrides)
    require_for(loaded)
    if isinstance(loaded, LoadedScript):
        _check_script(loaded, exact)
        return _check_slurm(loaded, slurm) if slurm else 0
    if exact:
        from .check_exact import prepare

        prepare(loaded)
    require_right(loaded, loaded.folder)
    job = loaded.job
    print(f"{path} is right: schema, imports and arguments; best weights by {job.monitor} ({job.monitor_mode})")
    if slurm is not None:
        _check_slurm(loaded, slurm)
    if not exact:
        return 0
    from .check_exact import check_exact

    return check_exact(loaded)


def _each_once(problems: list[Problem]) -> list[Problem]:
    """Without what is said already: a module that can't be imported is so for each target in it."""
    found: dict[object, Problem] = {}
    for problem in problems:
        found.setdefault(problem.message if _IN_CODE.match(problem.message) else id(problem), problem)
    return list(found.values())


def require_right(loaded: LoadedJob, code: Path) -> None:
    """Raise UserError with all that is wrong with the job's targets; `code` holds its modules, which are imported."""
    from dtrain.schema.instantiate import check_job

    with redirect_stdout(sys.stderr):  # stdout is for results, not for what the user's modules print
        problems = _each_once(check_job(loaded, code))
    if problems:
        raise UserError(problems)


def _check_script(loaded: LoadedScript, exact: bool) -> None:
    from ..rank.program import find_program

    program = find_program(loaded)
    if exact:
        raise UserError(loaded.at(Problem("trains by itself: --exact is for jobs with a model", "script")))
    print(f"{loaded.path} is right: schema and {program.file}")


def _check_slurm(loaded: LoadedJob | LoadedScript, size: SlurmSize) -> int:
    from dtrain.slurm.check import check

    from .submit import Submittable, dtrain_command, parse_gpus

    job, gpus = loaded.job, parse_gpus(size.gpus)
    wanted = Submittable(job.name, job, loaded.folder, size.nodes, gpus)
    on_gpus = None if job.launch.device == "cpu" else gpus
    submission = wanted.render(RunDir.new(job.name).path.absolute())
    found = check(submission, job.slurm, Path.cwd(), size.nodes, on_gpus, dtrain_command(job.slurm))
    for note in found.notes:
        print(note)
    if found.problems:
        raise UserError([loaded.at(problem) if problem.path else problem for problem in found.problems])
    return 0
