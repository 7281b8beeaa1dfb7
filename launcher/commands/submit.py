"""`dtrain launch --slurm`: fill a run folder here, submit its job, and with --wait follow it to its end.

Needs no torch: whether the model can be built, for example, is found out on the node (or by `dtrain check`).
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dtrain.clusters.cluster import Cluster, Gpus, Submission, Submittable, Submitted, note_submitted, submitted
from dtrain.errors import UserError
from dtrain.files import read_json, write_json, write_text
from dtrain.monitoring.tracking_uri import hand_on
from dtrain.run.folder import RunDir
from dtrain.schema.job import LoadedJob, LoadedScript
from dtrain.schema.loading import dump_job, load

from ..agent.subcommand import own_command
from ..rank.program import find_module, find_program, find_script
from .request import Request
from .run_folder import fill, find_run, locked, nothing_left, whole_or_as_before

LOOK_EVERY_S = 2.0


def submit_run(request: Request, cluster: Cluster, *, wait: bool) -> int:
    """Submit the job or script, or with --dry-run print what would be submitted; returns the exit code.

    Raises:
        UserError: the request is wrong, or the cluster refuses it; nothing was submitted, and no new folder is left.
    """
    loaded = None if request.is_script else load(request.target, request.arguments)
    if not isinstance(loaded, LoadedJob):
        request.require_no_profile()
    wanted = submittable(request, loaded)
    job = wanted.job
    run = find_run(request, wanted.name)
    refuse_second(run)
    run = run.absolute()
    if loaded is not None and nothing_left(request, run, loaded):
        return 0
    submission = cluster.render(wanted, run, Path.cwd())
    if request.dry_run:
        show(submission)
        return 0
    with locked(run) as is_new, whole_or_as_before(run.path, run.job, run.status_file, is_new=is_new):
        fill(run, None if request.resume else wanted.origin, None if job is None else dump_job(job))
        mark_submitted(run)
        write_text(submission.file, submission.text)
        submitted_as = Submitted(cluster, cluster.submit(submission))
    note_submitted(run, cluster, submitted_as.job_id)
    print(f"run {run}\n{submitted_as}", file=sys.stderr)
    if wait:
        return follow(run, submitted_as)
    print(f"monitor with: dtrain status {run}; dtrain logs -f {run}; dtrain cancel {run}", file=sys.stderr)
    return 0


def show(submission: Submission) -> None:
    """Print what would be submitted, and how."""
    print(f"{shlex.join(submission.command)} {submission.file}\n\n{submission.text}", end="")


def submittable(request: Request, loaded: LoadedJob | LoadedScript | None) -> Submittable:
    """What the command line asks to submit; raises UserError if that is not possible.

    Args:
        loaded: the job file, if it names one.
    """
    nodes, ranks = request.nodes.count, request.ranks
    options = ["--show-ranks", ranks.show, *(["--no-preload"] * (not ranks.preload))]
    if request.profile is not None:
        options += ["--profile", request.profile]
    if ranks.max_restarts is not None:
        options += ["--max-restarts", str(ranks.max_restarts)]
    if loaded is not None:
        hand_on(loaded.job.mlflow.tracking_uri)  # a submitted job inherits the environment
        target = None
        if isinstance(loaded, LoadedScript):
            find_program(loaded)
            target = [str(loaded.path.absolute()), *request.arguments]
        return submittable_job(loaded, nodes, ranks.gpus, options, target)
    gpus = parse_gpus(ranks.gpus)
    program = find_module(request.target, os.getcwd()) if request.is_module else find_script(request.target)
    target = ["-m", program.name] if program.is_module else [str(program.file.absolute())]
    target += ["--", *request.arguments] if request.arguments else []
    name, folder = Path(program.name).stem, program.file.absolute().parent
    return Submittable(name, None, folder, nodes, gpus, own_command(), options, target)


def submittable_job(
    loaded: LoadedJob | LoadedScript,
    nodes: int,
    gpus: str,
    options: Sequence[str] = (),
    target: Sequence[str] | None = None,
) -> Submittable:
    """A job file as something to submit; for the other arguments see `Submittable`."""
    job = loaded.job
    return Submittable(job.name, job, loaded.folder, nodes, parse_gpus(gpus), own_command(), options, target)


def parse_gpus(text: str) -> Gpus:
    """Parse --gpus; raises UserError if it is not a number of GPUs."""
    gpus = Gpus.parse("1" if text == "auto" else text)
    if gpus is None:
        raise UserError(f"--gpus {text}: expected a number above 0, optionally with a type, such as a100:4")
    return gpus


def refuse_second(run: RunDir) -> None:
    """Raise UserError if the run already has a job that is queued or running."""
    if (job := submitted(run)) and (queued := job.look_up()) and not queued.is_over:
        raise UserError(f"{run} already is {job}, {queued.in_words()}; to stop it: dtrain cancel {run}")


def mark_submitted(run: RunDir) -> None:
    """In the status of a run that continues, replace how it ended before."""
    if status := read_json(run.status_file):
        write_json(run.status_file, {**status, "state": "submitted", "exit_code": None, "error": None})


def follow(run: RunDir, job: Submitted) -> int:
    """Show what the run prints until its job is over; returns the run's exit code."""
    log, position, shown = job.cluster.log(run), 0, ""
    while True:
        queued = job.look_up()
        with suppress(FileNotFoundError), log.open("rb") as file:
            file.seek(position)
            while piece := file.read(1 << 16):
                position += len(piece)
                sys.stderr.buffer.write(piece)
                sys.stderr.flush()
        if queued is None or queued.is_over:
            break
        if not queued.is_running and queued.in_words() != shown:
            shown = queued.in_words()
            print(f"job {job.job_id}: {shown}", file=sys.stderr)
        time.sleep(LOOK_EVERY_S)
    status = run.status()
    if status.get("exit_code") is None:
        ended = queued.in_words() if queued is not None else f"no longer in {job.cluster.title}'s queue"
        print(f"job {job.job_id} ended ({ended}) before the run did: {log}", file=sys.stderr)
        return 1
    return int(status["exit_code"])
