"""`dtrain launch`: everything that is decided before the ranks start, and what a run folder begins with."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dtrain.errors import Problem, UserError
from dtrain.files import write_json, write_text
from dtrain.provenance import environment, snapshot
from dtrain.run import RunDir

from .agent import EXIT_INTERRUPTED, EXIT_STOPPED, run_ranks, start_fork_server
from .entry import Task

if TYPE_CHECKING:
    from dtrain.job import Job

# What the fork server imports, for all ranks at once: always, and where the job or the script speaks of it. None of
# it touches CUDA. The user's own modules never belong here: they may.
PRELOAD = ("torch.distributed.elastic.multiprocessing.api", "torch._dynamo")  # optimizers import the latter
PRELOAD_FOR = {
    "_target_": ("dtrain.trainer.trainer", "dtrain.loading", "dtrain.target"),
    "dtrain": ("dtrain.trainer.trainer",),
    "torchmetrics": ("dtrain.trainer.metrics",),
    "torchvision": ("torchvision",),
}


@dataclass(frozen=True)
class Request:
    """The command line of `dtrain launch`."""

    target: str  # a job file, or a script that ends in .py
    arguments: tuple[str, ...] = ()  # key=value overrides, or the script's arguments
    gpus: str = "auto"
    run_dir: str | None = None
    resume: bool = False
    dry_run: bool = False


def launch(request: Request) -> int:
    """Launch a job or a script on this machine; the exit code.

    Raises:
        UserError: the request is wrong; nothing was started or written.
    """
    if request.target.endswith(".py"):
        return _launch_script(request)
    return _launch_job(request)


# -- a job ---------------------------------------------------------------------------------------


def _launch_job(request: Request) -> int:
    from dtrain.job import Launch
    from dtrain.loading import dump_job, load_job
    from dtrain.target import check_job

    loaded = load_job(request.target, request.arguments)
    job = loaded.job
    run = _run_dir(request, job.name)
    continues = request.resume and run.job.exists()
    if continues and _is_done(run, job):
        print(f"{run} is finished; nothing to resume", file=sys.stderr)
        return 0
    code = run.code if continues else loaded.path.absolute().parent
    if not request.dry_run:
        start_fork_server(preload_for(dump_job(job)))
    with redirect_stdout(sys.stderr):  # stdout is for results, not for what the user's modules print
        problems = check_job(loaded, code)
    if problems:
        raise UserError(problems)
    num_ranks, device = choose_processes(request.gpus, job.launch.device)
    if job.fit.sync_batchnorm and device == "cpu" and num_ranks > 1:
        problem = Problem("needs CUDA: torch has no SyncBatchNorm on the CPU", "fit.sync_batchnorm")
        raise UserError(loaded.at(problem))
    text = dump_job(job.model_copy(update={"launch": Launch(device=device)}))
    if request.dry_run:
        print(text, end="")
        print(f"would train on {num_ranks} {device} processes, in {run}", file=sys.stderr)
        return 0
    task = Task(str(run), (str(code),), threads_per_rank(num_ranks), module="dtrain.trainer.worker")
    return _start(request, run, task, num_ranks, text, None if continues else code)


def _is_done(run: RunDir, job: Job) -> bool:
    """Whether a run has nothing left to do; raises UserError where `job` is not the job that it began with."""
    from dtrain.loading import differences, load_job

    before = load_job(run.job).job
    if changed := differences(before, job):
        problems = [Problem(change, file=str(run.job)) for change in changed]
        raise UserError([Problem(f"{run} was begun with another job; what differs may not:"), *problems])
    return run.status().get("state") == "finished" and job.fit.epochs <= before.fit.epochs


# -- a script ------------------------------------------------------------------------------------


def _launch_script(request: Request) -> int:
    script = Path(request.target)
    if not script.is_file():
        raise UserError(f"no such file: {script}")
    run = _run_dir(request, script.stem)
    if not request.dry_run:
        start_fork_server(preload_for(script.read_text(errors="replace")))
    num_ranks, device = choose_processes(request.gpus, "auto")
    if request.dry_run:
        print(f"would run {script} on {num_ranks} {device} processes, in {run}", file=sys.stderr)
        return 0
    task = Task(str(run), request.arguments, threads_per_rank(num_ranks), script=str(script))
    origin = None if request.resume else script.absolute().parent
    return _start(request, run, task, num_ranks, None, origin)


# -- both ----------------------------------------------------------------------------------------


def preload_for(text: str) -> list[str]:
    """The modules that the ranks of this job or script will need, of those that may be imported before the fork."""
    return [*PRELOAD, *(module for word, modules in PRELOAD_FOR.items() if word in text for module in modules)]


def _start(request: Request, run: RunDir, task: Task, num_ranks: int, job: str | None, origin: Path | None) -> int:
    """Fill the run folder and run the ranks. Nothing was written before; `origin` is None for a run that goes on."""
    with _usable(run):
        run.create()
    with run.lock():
        if origin is not None:
            left_out = snapshot(origin, run.code)
            write_json(run.env, {**environment(origin), "left_out_of_code": left_out})
        if job is not None:
            write_text(run.job, job)  # last: with it, the run is one that --resume can continue
        print(f"run {run}", file=sys.stderr)
        exit_code = run_ranks(task, num_ranks, run)
    if exit_code in (EXIT_STOPPED, EXIT_INTERRUPTED):
        print(f"continue with: {_continuation(request, run)}", file=sys.stderr)
    return exit_code


def _continuation(request: Request, run: RunDir) -> str:
    """The command that continues the run: the same request, overrides included, since the job must be the same."""
    words = ["dtrain", "launch", "--resume", "--run-dir", str(run)]
    if request.gpus != "auto":
        words += ["--gpus", request.gpus]
    dashes = ["--"] if request.target.endswith(".py") and request.arguments else []
    return shlex.join([*words, request.target, *dashes, *request.arguments])


@contextmanager
def _usable(run: RunDir) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{run} cannot be used: {error.strerror} ({error.filename}); choose another --run-dir"
        ) from None


def _run_dir(request: Request, name: str) -> RunDir:
    """The run's folder, not made yet. A folder that holds anything is only for --resume."""
    if request.run_dir is None:
        return newest_unfinished(name) if request.resume else RunDir.new(name)
    run = RunDir(request.run_dir)
    with _usable(run):
        exists = run.exists()
    if exists and not request.resume:
        raise UserError(f"{run} exists and is not empty; --resume continues the run in it, or choose another --run-dir")
    if request.resume and exists and not run.lock_file.exists():
        raise UserError(f"{run} holds no run to resume")
    if request.resume and not exists:
        raise UserError(f"{run} does not exist, so there is nothing to resume")
    return run


def newest_unfinished(name: str) -> RunDir:
    """The newest run of that name under runs/ that has something left to do."""
    pattern = re.compile(re.escape(name) + r"-\d{8}-\d{6}-[0-9a-f]{4}")
    folders = sorted(path for path in Path("runs").glob("*") if pattern.fullmatch(path.name))
    for folder in reversed(folders):
        if RunDir(folder).status().get("state", "finished") != "finished":
            return RunDir(folder)
    raise UserError(f"no unfinished run of {name} under {Path('runs').absolute()}; name one with --run-dir")


def choose_processes(gpus: str, device: str) -> tuple[int, Literal["cpu", "cuda"]]:
    """How many processes on which device: never more than there are GPUs, unless there are none at all."""
    asked = None if gpus == "auto" else int(gpus)
    if device == "cpu":
        return asked or 1, "cpu"
    import torch

    found = torch.cuda.device_count()
    if found == 0:
        why = _why_no_gpu()
        if device == "cuda":
            raise UserError(f"launch.device is cuda, but there is no GPU: {why}")
        print(f"warning: {why}; {asked or 1} CPU process{'es' if asked and asked > 1 else ''} instead", file=sys.stderr)
        return asked or 1, "cpu"
    if asked is not None and asked > found:
        raise UserError(f"--gpus {asked}: this machine has {found} visible; ask for at most {found}")
    return asked or found, "cuda"


def _why_no_gpu() -> str:
    import torch

    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides all GPUs"
    if torch.version.cuda is None:
        return "this build of PyTorch has no CUDA"
    if not Path("/proc/driver/nvidia").exists():
        return "no CUDA device found (no NVIDIA driver is loaded)"
    return "no CUDA device found"


def threads_per_rank(num_ranks: int) -> int:
    """The cores that this process may use, shared among the ranks."""
    return max(1, len(os.sched_getaffinity(0)) // num_ranks)
