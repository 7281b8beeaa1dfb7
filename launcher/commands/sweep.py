"""`dtrain sweep`: one job with several values, run here one after the other, or on a cluster as one array job.

All run folders are filled at the start, so that later changes to the code do not reach a sweep that has begun.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.clusters.cluster import Array, Cluster, Submitted, note_submitted, submitted
from dtrain.errors import Problem, UserError
from dtrain.files import write_text
from dtrain.monitoring.tracking_uri import hand_on
from dtrain.run.folder import EXIT_INTERRUPTED, EXIT_STOPPED, RunDir
from dtrain.run.sweep import Sweep, grid
from dtrain.schema.job import Job, LoadedJob
from dtrain.schema.loading import dump_job, load

from ..agent.subcommand import Subcommand, own_command
from .run_folder import fill, is_done, whole_or_as_before
from .runs import print_runs
from .submit import LOOK_EVERY_S, mark_submitted, refuse_second, show, submittable_job


@dataclass(frozen=True)
class ArrayOptions:
    """How the runs are submitted to a cluster, as one array."""

    cluster: Cluster
    nodes: int  # for each run
    max_parallel: int | None
    wait: bool  # until all runs are over


@dataclass(frozen=True)
class SweepRequest:
    """The command line of `dtrain sweep`."""

    job: str
    overrides: tuple[str, ...]
    gpus: str
    run_dir: str | None
    resume: bool
    dry_run: bool
    array: ArrayOptions | None  # None: they run here, one after the other


def sweep(request: SweepRequest) -> int:
    """Run all points, or submit them; returns 0 if all runs have finished, or were submitted.

    Raises:
        UserError: the request is wrong; nothing was started or written.
    """
    common, points = grid(request.overrides)
    loaded = [_load(request.job, [*common, *point]) for point in points]
    found = Sweep(_folder(request, loaded[0].job).absolute(), tuple(points))
    left = _unfinished(found, loaded) if request.resume else found.runs
    for run in left:
        refuse_second(run)
    if request.dry_run:
        print("".join(f"{run.path.name}: {found.point(run)}\n" for run in left), end="")
    if request.array is not None:
        return _submit(request, request.array, found, loaded, left)
    if request.dry_run:
        return 0
    if request.resume:  # each launch checks what may differ from before
        return _run(request, found, [(run, [request.job, *common, *found.points[int(run.path.name)]]) for run in left])
    with whole_or_as_before(found.folder, is_new=not RunDir(found.folder).exists()):
        _fill(found, loaded, left, is_new=True)
    return _run(request, found, [(run, [str(run.job)]) for run in left])


def _load(path: str, overrides: Sequence[str]) -> LoadedJob:
    loaded = load(path, overrides)
    hand_on(loaded.job.mlflow.tracking_uri)
    if not isinstance(loaded, LoadedJob):
        raise UserError(
            loaded.at(Problem("is a script that trains by itself: sweeps are for jobs with a model", "script"))
        )
    return loaded


def _folder(request: SweepRequest, job: Job) -> Path:
    """The sweep's folder; one that is not empty is accepted only with --resume."""
    if request.resume:
        if request.run_dir is None:
            raise UserError("--resume needs --run-dir, the folder of the sweep")
        if Sweep.read(Path(request.run_dir)) is None:
            raise UserError(f"{request.run_dir} holds no sweep to resume")
        return Path(request.run_dir)
    if request.run_dir is None:
        return RunDir.new(f"{job.name}-sweep").path
    if RunDir(request.run_dir).exists():
        raise UserError(f"{request.run_dir} exists and is not empty; --resume continues the sweep in it")
    return Path(request.run_dir)


def _unfinished(asked: Sweep, jobs: Sequence[LoadedJob]) -> list[RunDir]:
    """The runs of the sweep in that folder that have something left to do."""
    before = Sweep.read(asked.folder)
    if before != asked:
        raise UserError(f"{asked.folder} was started with other values; give the same ones to continue it")
    return [run for run, job in zip(asked.runs, jobs, strict=True) if not is_done(run, job)]


def _fill(found: Sweep, loaded: Sequence[LoadedJob], runs: Sequence[RunDir], *, is_new: bool) -> None:
    for run in runs:
        each = loaded[int(run.path.name)]
        run.create()
        with run.lock(is_agent=True):
            fill(run, each.folder if is_new else None, dump_job(each.job))
    found.write()


# -- here ----------------------------------------------------------------------------------------


def _run(request: SweepRequest, found: Sweep, runs: Sequence[tuple[RunDir, list[str]]]) -> int:
    """Launch one run after the other; signals that ask this process to stop are passed on to the launch."""
    failed = False
    with Subcommand.passing_signals_on() as command:
        for count, (run, job) in enumerate(runs, 1):
            print(f"run {run.path.name} ({count} of {len(runs)}): {found.point(run)}", file=sys.stderr)
            words = ["launch", "--nodes", "1", "--gpus", request.gpus, "--resume", "--run-dir", str(run), *job]
            code = command.run([*own_command(), *words])
            if code in (EXIT_STOPPED, EXIT_INTERRUPTED) or (command.asked and count < len(runs)):
                print(f"the sweep has stopped; continue with: {_continuation(request, found)}", file=sys.stderr)
                return code or EXIT_STOPPED
            if code == 2:
                if not any(each.status() for each in found.runs):
                    shutil.rmtree(found.folder)
                raise UserError(f"the sweep stops here: {found.point(run)} could not be started")
            failed |= code != 0
    print_runs(found.runs)
    return int(failed)


def _continuation(request: SweepRequest, found: Sweep) -> str:
    size = ["--gpus", request.gpus] if request.gpus != "auto" else []
    words = ["dtrain", "sweep", *size, "--resume", "--run-dir", str(found.folder), request.job, *request.overrides]
    return shlex.join(words)


# -- on a cluster --------------------------------------------------------------------------------


def _submit(
    request: SweepRequest, options: ArrayOptions, found: Sweep, loaded: Sequence[LoadedJob], runs: Sequence[RunDir]
) -> int:
    """Submit the runs as one array."""
    cluster = options.cluster
    if len({str(getattr(each.job, cluster.name)) + each.job.launch.device for each in loaded}) > 1:
        swept = f"{cluster.name} and launch.device"
        raise UserError(f"{swept} can't be swept with --{cluster.name}: all runs of an array request the same")
    if not runs:
        print(f"{found.folder} is finished; nothing to resume", file=sys.stderr)
        return 0
    wanted = submittable_job(loaded[0], options.nodes, request.gpus)
    array = Array([int(run.path.name) for run in runs], options.max_parallel)
    submission = cluster.render(wanted, RunDir(found.folder), Path.cwd(), array)
    if request.dry_run:
        print()
        show(submission)
        return 0
    files = [file for run in runs for file in (run.job, run.status_file)]
    with whole_or_as_before(found.folder, *files, is_new=not RunDir(found.folder).exists()):
        _fill(found, loaded, runs, is_new=not request.resume)
        for run in runs:
            mark_submitted(run)
        write_text(submission.file, submission.text)
        whole = Submitted(cluster, cluster.submit(submission))
    for run in runs:
        note_submitted(run, cluster, cluster.part(whole.job_id, int(run.path.name)))
    print(f"sweep {found.folder}, {len(runs)} runs\n{whole}", file=sys.stderr)
    if options.wait:
        return _follow(found)
    folder = found.folder
    print(f"monitor with: dtrain status {folder}; dtrain cancel {folder}", file=sys.stderr)
    return 0


def _follow(found: Sweep) -> int:
    """Wait until all runs are over, and say how each ended."""
    left = found.runs
    while left:
        time.sleep(LOOK_EVERY_S)
        for run in list(left):
            job = submitted(run)
            queued = None if job is None else job.look_up()
            if queued is None or queued.is_over:
                left.remove(run)
                print(
                    f"run {run.path.name}, {found.point(run)}: {run.status().get('state', 'not begun')}",
                    file=sys.stderr,
                )
    print_runs(found.runs)
    return int(any(run.status().get("state") != "finished" for run in found.runs))
