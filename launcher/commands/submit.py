"""`dtrain launch --slurm`: a run folder filled here, its job submitted, and, with --wait, followed to its end.

Needs no torch: whether the model can be built, say, the node finds out (or `dtrain check`).
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dtrain.errors import UserError
from dtrain.files import read_json, write_json, write_text
from dtrain.monitoring.screen import say
from dtrain.monitoring.tracking_uri import hand_on
from dtrain.run.folder import RunDir
from dtrain.schema.job import Job, LoadedScript, ScriptJob
from dtrain.schema.loading import dump_job, load
from dtrain.schema.sections import Slurm
from dtrain.slurm.jobs import job_of, look_up, set_job, submit
from dtrain.slurm.partition import cpus_beside
from dtrain.slurm.render import Array, Gpus, Submission, render

from ..agent.subcommand import own_command
from ..rank.program import find_module, find_program, find_script
from .launch import Request, fill, find_run, is_done

LOOK_EVERY_S = 2.0


@dataclass(frozen=True)
class Submittable:
    """What is to be submitted: a job or a script, and the nodes and GPUs that it asks for."""

    name: str
    job: Job | ScriptJob | None
    origin: Path  # the folder whose code the run folder gets
    nodes: int
    gpus: Gpus
    options: Sequence[str] = ()
    target: Sequence[str] | None = None  # as `render` takes it

    def render(self, run: Path, array: Array | None = None) -> Submission:
        """Its submission from this working directory, with that run folder."""
        slurm = Slurm() if self.job is None else self.job.slurm
        on_cpu = self.job is not None and self.job.launch.device == "cpu"
        return render(
            self.name,
            slurm,
            run,
            Path.cwd(),
            self.nodes,
            self.gpus,
            dtrain=dtrain_command(slurm),
            options=self.options,
            target=self.target,
            array=array,
            on_cpu=on_cpu,
            cpus=None if on_cpu else self._cpus(slurm),
        )

    def _cpus(self, slurm: Slurm) -> int | None:
        try:
            return cpus_beside(self.gpus, slurm.options)
        except UserError as error:
            say(f"warning: {error}; the job may get one CPU for its GPUs: slurm.cpus-per-gpu says how many")
            return None


def dtrain_command(slurm: Slurm) -> list[str]:
    """This command on a node: the same, or the one in the container, or which the job names."""
    if slurm.dtrain is not None:
        return [slurm.dtrain]
    return ["dtrain"] if slurm.is_in_container else own_command()


def submit_run(request: Request) -> int:
    """Submit the job or script, or with --dry-run print what would be submitted; the exit code.

    Raises:
        UserError: the request is wrong, or Slurm refuses it; nothing was submitted, and no new folder is left.
    """
    wanted = submittable(request)
    job = wanted.job
    run = find_run(request, wanted.name)
    refuse_second(run)
    run = RunDir(run.path.absolute())
    if request.resume and run.job.exists() and job is not None and is_done(run, job):
        print(f"{run} is finished; nothing to resume", file=sys.stderr)
        return 0
    submission = wanted.render(run.path)
    if request.dry_run:
        print(f"{submission.command} {run.sbatch}\n\n{submission.script}", end="")
        return 0
    with whole_or_as_before(run.path, run.job, run.status_file):
        run.create()
        with run.lock(is_agent=True):
            fill(run, None if request.resume else wanted.origin, None if job is None else dump_job(job))
            mark_submitted(run)
            write_text(run.sbatch, submission.script)
            job_id = submit(submission, run.sbatch)
    set_job(run, job_id)
    print(f"run {run}\nSlurm job {job_id}", file=sys.stderr)
    if request.wait:
        return follow(run, job_id)
    print(f"monitor with: dtrain status {run}; dtrain logs -f {run}; dtrain cancel {run}", file=sys.stderr)
    return 0


def submittable(request: Request) -> Submittable:
    """What the command line asks for; raises UserError where that can't be."""
    gpus = parse_gpus(request.gpus)
    options = ["--show-ranks", request.show_ranks, *(["--no-preload"] * (not request.preload))]
    if request.max_restarts is not None:
        options += ["--max-restarts", str(request.max_restarts)]
    if not request.is_script:
        loaded = load(request.target, request.arguments)
        hand_on(loaded.job.mlflow.tracking_uri)  # sbatch takes the environment along
        folder, target = loaded.folder, None
        if isinstance(loaded, LoadedScript):
            find_program(loaded)
            target = [str(loaded.path.absolute()), *request.arguments]
        return Submittable(loaded.job.name, loaded.job, folder, request.nodes, gpus, options, target)
    program = find_module(request.target, os.getcwd()) if request.is_module else find_script(request.target)
    target = ["-m", program.name] if program.is_module else [str(program.file.absolute())]
    target += ["--", *request.arguments] if request.arguments else []
    name, folder = Path(program.name).stem, program.file.absolute().parent
    return Submittable(name, None, folder, request.nodes, gpus, options, target)


def parse_gpus(text: str) -> Gpus:
    """--gpus; raises UserError where it is no number of GPUs."""
    gpus = Gpus.parse("1" if text == "auto" else text)
    if gpus is None:
        raise UserError(f"--gpus {text}: expected a number above 0, or with a type, such as a100:4")
    return gpus


def refuse_second(run: RunDir) -> None:
    """Raise UserError where the run has a job that is queued or runs."""
    if (job_id := job_of(run)) and (queued := look_up(job_id)) and not queued.is_over:
        raise UserError(f"{run} is Slurm job {job_id} already, {queued.describe()}; to stop it: dtrain cancel {run}")


def mark_submitted(run: RunDir) -> None:
    """A run that goes on has not ended any more."""
    if status := read_json(run.status_file):
        write_json(run.status_file, {**status, "state": "submitted", "exit_code": None, "error": None})


@contextmanager
def whole_or_as_before(folder: Path, *files: Path) -> Iterator[None]:
    """Where something fails within, a folder that was made is gone again, and the files are as they were."""
    is_new = not RunDir(folder).exists()
    before = {file: file.read_text(encoding="utf-8") for file in files if file.exists()}
    try:
        yield
    except (OSError, UserError) as error:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        for file, text in before.items():
            write_text(file, text)
        if isinstance(error, UserError):
            raise
        file_name = f" ({error.filename})" if error.filename else ""
        raise UserError(f"{folder} cannot be used: {error.strerror}{file_name}; choose another --run-dir") from None


def follow(run: RunDir, job_id: str) -> int:
    """Show what the run prints until its job is over; the run's exit code."""
    log, position, shown = run.logs / "slurm.log", 0, ""
    while True:
        queued = look_up(job_id)
        with suppress(FileNotFoundError), log.open("rb") as file:
            file.seek(position)
            while piece := file.read(1 << 16):
                position += len(piece)
                sys.stderr.buffer.write(piece)
                sys.stderr.flush()
        if queued is None or queued.is_over:
            break
        if queued.state != "RUNNING" and queued.describe() != shown:
            shown = queued.describe()
            print(f"job {job_id}: {shown}", file=sys.stderr)
        time.sleep(LOOK_EVERY_S)
    status = run.status()
    if status.get("exit_code") is None:
        ended = queued.describe() if queued is not None else "gone from Slurm's queue"
        print(f"job {job_id} is over ({ended}), and the run did not end by itself: {log}", file=sys.stderr)
        return 1
    return int(status["exit_code"])
