"""The folder of a run that begins or continues: which one it is, what it gets, and what a failure leaves of it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.errors import Problem, UserError
from dtrain.files import write_json, write_text
from dtrain.run.folder import RunDir
from dtrain.run.provenance import environment
from dtrain.run.snapshot import TOO_LARGE, CodeSnapshot
from dtrain.stderr import say

from .request import Request

if TYPE_CHECKING:
    from dtrain.schema.job import LoadedJob, LoadedScript
    from dtrain.schema.sections import Fit


def find_run(request: Request, name: str) -> RunDir:
    """The run's folder, which need not exist yet. One that is not empty is accepted only with --resume."""
    if request.nodes.rank > 0:  # node 0 decides which it is, and checks it
        return RunDir(request.run_dir) if request.resume and request.run_dir else RunDir.new(name)
    if request.run_dir is None:
        return newest_unfinished(name) if request.resume else RunDir.new(name)
    run = RunDir(request.run_dir)
    with usable(run.path):
        exists = run.exists()
    if exists and not request.resume:
        raise UserError(f"{run} exists and is not empty; --resume continues the run in it, or choose another --run-dir")
    if request.resume and exists and not run.lock_file.exists():
        raise UserError(f"{run} holds no run to resume")
    if request.resume and not exists:
        raise UserError(f"{run} does not exist, so there is nothing to resume")
    script = RunDir(run.path.absolute().parent)
    if run.path.absolute() in [fit.path.absolute() for fit in script.fits()]:
        raise UserError(f"{run} is one fit of the run in {script}; --resume that run")
    return run


def newest_unfinished(name: str) -> RunDir:
    """The newest run of that name under runs/ that has something left to do."""
    pattern = re.compile(re.escape(name) + r"-\d{8}-\d{6}-[0-9a-f]{4}")
    folders = sorted(path for path in Path("runs").glob("*") if pattern.fullmatch(path.name))
    for folder in reversed(folders):
        if RunDir(folder).status().get("state", "finished") != "finished":
            return RunDir(folder)
    raise UserError(f"no unfinished run of {name} under {Path('runs').absolute()}; name one with --run-dir")


def is_done(run: RunDir, loaded: LoadedJob | LoadedScript) -> bool:
    """Whether a run has nothing left to do; raises UserError if that is not the job that it began with."""
    from dtrain.schema.job import ScriptJob
    from dtrain.schema.loading import changes, load

    before, job = load(run.job).job, loaded.job
    if changed := changes(before, loaded):
        problems = [Problem(change, file=str(run.job)) for change in changed]
        raise UserError([Problem(f"{run} belongs to another job; these fields cannot change on resume:"), *problems])
    if run.status().get("state") != "finished":
        return False
    return isinstance(before, ScriptJob) or isinstance(job, ScriptJob) or not _is_longer(job.fit, before.fit)


def _is_longer(fit: Fit, before: Fit) -> bool:
    """Whether more epochs or steps are asked for than before."""

    def is_more(now: int | None, then: int | None) -> bool:
        return then is not None and (now is None or now > then)

    return is_more(fit.epochs, before.epochs) or is_more(fit.steps, before.steps)


def nothing_left(request: Request, run: RunDir, loaded: LoadedJob | LoadedScript) -> bool:
    """Whether the request is to resume a run that `is_done`; if so, the user is told."""
    if not (request.resume and run.job.exists() and is_done(run, loaded)):
        return False
    say(f"{run} is finished; nothing to resume")
    return True


def fill(run: RunDir, origin: Path | None, job: str | None) -> None:
    """Write what a run begins with: the code in the folder `origin`, its environment, and the job if there is one."""
    if origin is not None:
        copy = CodeSnapshot(run.code)
        copy.add(origin)
        copy.add_modules()
        write_json(run.env, {**environment(origin), "left_out_of_code": list(copy.left_out)})
        if kept_out := [f"{name} ({why})" for name, why in copy.left_out.items() if why != TOO_LARGE]:
            say(f"{run.code} does not contain {', '.join(kept_out)}")
    if job is not None:
        write_text(run.job, job)  # last: --resume continues a run that has it


@contextmanager
def usable(folder: Path) -> Iterator[None]:
    """Raise UserError if the file system refuses what the block does with the folder."""
    try:
        yield
    except OSError as error:
        file = f" ({error.filename})" if error.filename else ""
        raise UserError(f"{folder} cannot be used: {error.strerror}{file}; choose another --run-dir") from None


@contextmanager
def locked(run: RunDir) -> Iterator[bool]:
    """Create the run's folder if there is none, and be its only writer in the block; yields whether it is new.

    Raises:
        UserError: another process writes to it; or it can't be created, and nothing is left of it.
    """
    with ExitStack() as held:
        with usable(run.path):
            is_new = not run.exists()
            try:
                run.create()
                held.enter_context(run.lock(is_agent=True))
            except OSError:
                if is_new:
                    shutil.rmtree(run.path, ignore_errors=True)
                raise
        yield is_new


@contextmanager
def whole_or_as_before(folder: Path, *files: Path, is_new: bool) -> Iterator[None]:
    """If the block fails, remove the folder if it is new, and restore the files to what they were."""
    before = {file: file.read_text(encoding="utf-8") for file in files if file.exists()}
    try:
        with usable(folder):
            yield
    except (UserError, KeyboardInterrupt):
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        for file, text in before.items():
            write_text(file, text)
        raise
