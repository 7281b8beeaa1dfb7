"""`dtrain launch`: a job or a script on this machine, alone or as one of several nodes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain import __version__
from dtrain.errors import UserError
from dtrain.gpus import DEVICE_VARIABLE
from dtrain.monitoring.tracking_uri import hand_on
from dtrain.names import hidden_modules, short
from dtrain.run.folder import EXIT_INTERRUPTED, EXIT_STOPPED, RunDir
from dtrain.run.profiling import Profiling
from dtrain.run.rank_request import Train
from dtrain.schema.packages import require_for
from dtrain.stderr import say

from ..agent.agent import run_ranks
from ..machine.devices import choose_processes, expected_ranks, num_processes, threads_per_rank
from ..rank import flight_recorder
from ..rank.entry import Task
from ..rank.fork_server import start_fork_server
from ..rank.preparation import preload_for, prepare, resolved
from ..rank.program import Program, find_module, find_program, find_script, refuse_other_program
from .request import Request, choose_ranks
from .run_folder import fill, find_run, locked, nothing_left, whole_or_as_before

if TYPE_CHECKING:
    from dtrain.schema.job import LoadedJob, LoadedScript


def launch(request: Request) -> int:
    """Launch a job or a script on this machine; returns the exit code.

    Raises:
        UserError: the request is wrong; nothing was started or written.
    """
    request.nodes.check()
    if request.is_script:
        request.require_no_profile()
        require_for()
        return _launch_script(request)
    from dtrain.schema.job import LoadedScript
    from dtrain.schema.loading import load

    refuse_other_program(request.target)
    loaded = load(request.target, request.arguments)
    require_for(loaded)
    hand_on(loaded.job.mlflow.tracking_uri)
    if isinstance(loaded, LoadedScript):
        request.require_no_profile()
        return _launch_script_job(request, loaded)
    return _launch_job(request, loaded)


# -- a job ---------------------------------------------------------------------------------------


def _launch_job(request: Request, loaded: LoadedJob) -> int:
    job = loaded.job
    run = find_run(request, job.name)
    if nothing_left(request, run, loaded):
        return 0
    continues = request.resume and run.job.exists()
    code = run.code if continues else loaded.folder
    preload = request.ranks.preload and not request.dry_run
    ready = prepare(loaded, code, request.ranks.gpus, preload=preload, begins=not continues)
    if request.profile is not None:
        Profiling.of(request.profile).require_ranks(request.nodes.count * ready.num_ranks)
    if request.dry_run:
        print(ready.job, end="")
        say(f"would train on {ready}, in {run}")
        return 0
    if ready.device == "cuda":
        flight_recorder.record(os.environ)
    train = Train(str(code.absolute()), request.profile)
    task = Task(
        str(run),
        "job",
        train.entrypoint,
        train.arguments,
        ready.num_threads,
        job.launch.hang_timeout_s,
        forked=request.ranks.preload,
    )
    return _start(request, run, task, ready.num_ranks, ready.job, None if continues else code, job.fit.restarts)


# -- a script ------------------------------------------------------------------------------------


def _launch_script(request: Request) -> int:
    program = find_module(request.target, os.getcwd()) if request.is_module else find_script(request.target)
    run = find_run(request, program.name if program.is_module else program.file.stem)
    return _launch_program(request, run, program, request.arguments)


def _launch_script_job(request: Request, loaded: LoadedScript) -> int:
    job = loaded.job
    program = find_program(loaded)
    run = find_run(request, job.name)
    if nothing_left(request, run, loaded):
        return 0
    return _launch_program(request, run, program, job.arguments, loaded)


def _launch_program(
    request: Request, run: RunDir, program: Program, arguments: Sequence[str], loaded: LoadedScript | None = None
) -> int:
    device_asked = loaded.job.launch.device if loaded else "auto"
    if device_asked == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that the program finds none
    preload = request.ranks.preload and not _sets_on_import(program)
    if preload and not request.dry_run:
        modules, threads = preload_for(program.source), threads_per_rank(expected_ranks(request.ranks.gpus))
        folder, file = Path(program.folder), program.file
        preload = start_fork_server(modules, threads, unless=lambda: has_hidden_modules(folder, file))
    num_ranks, device = choose_processes(request.ranks.gpus, device_asked)
    os.environ[DEVICE_VARIABLE] = device  # a job's ranks find it in job.yaml
    text = resolved(loaded.job, device) if loaded else None
    if request.dry_run:
        print(text or "", end="")
        say(f"would run {program.name} on {num_processes(num_ranks, device)}, in {run}")
        return 0
    task = Task(
        str(run),
        "module" if program.is_module else "script",
        program.name,
        tuple(arguments),
        threads_per_rank(num_ranks),
        folder=program.folder,
        forked=preload,
    )
    origin = (loaded.path if loaded else program.file).absolute().parent
    return _start(
        request, run, task, num_ranks, text, None if request.resume else origin, loaded.job.restarts if loaded else 0
    )


def _sets_on_import(program: Program) -> bool:
    if variable := program.sets_on_import:
        _say_fresh(f"{program.name} sets {variable}, which libraries read at import time")
    return variable is not None


def has_hidden_modules(folder: Path, program: Path) -> bool:
    """Whether a module beside the program has the name of a standard library module that is already imported.

    If so, this is said.
    """
    if hidden := hidden_modules(folder, program):
        _say_fresh(f"{short(str(hidden[0]))} has the name of a standard library module that torch has imported")
    return bool(hidden)


def _say_fresh(reason: str) -> None:
    say(f"{reason}: each rank gets a fresh interpreter, as with --no-preload")


# -- both ----------------------------------------------------------------------------------------


def _start(
    request: Request,
    run: RunDir,
    task: Task,
    num_ranks: int,
    job: str | None,
    origin: Path | None,
    restarts: int,
) -> int:
    """Fill the run folder, to which nothing has been written yet, and run the ranks; returns the exit code.

    Args:
        origin: the folder whose code the run gets; None for a run that continues.
        restarts: how often the job wants its ranks restarted.
    """
    restarts = restarts if request.ranks.max_restarts is None else request.ranks.max_restarts
    show_ranks = choose_ranks(request.ranks.show, request.nodes.count * num_ranks)
    nodes = None
    if request.nodes.count > 1:
        from ..agent.nodes import Nodes

        common = {"the job": job or request.target, "--gpus": num_ranks, "dtrain's version": __version__}
        nodes = Nodes(request.nodes.endpoint, common)
    if nodes is not None and nodes.node_rank > 0:
        run, arguments = RunDir(nodes.from_first("run")), json.loads(nodes.from_first("arguments"))
        if not run.lock_file.exists():
            raise UserError(f"node 0 created {run}, which is not visible on this node; use a shared --run-dir")
        task = replace(task, run_dir=str(run), arguments=tuple(arguments) if task.is_job else task.arguments)
        return run_ranks(task, num_ranks, run, nodes=nodes, restarts=restarts)
    with ExitStack() as held:
        is_new = held.enter_context(locked(run))
        with whole_or_as_before(run.path, is_new=is_new):
            fill(run, origin, job)
        say(f"run {run}")
        if nodes is not None:
            nodes.from_first("run", str(run.path.absolute()))
            nodes.from_first("arguments", json.dumps(task.arguments))
        exit_code = run_ranks(
            task, num_ranks, run, show_ranks, nodes, restarts=restarts, wait_mlflow=request.wait_mlflow
        )
    if exit_code in (EXIT_STOPPED, EXIT_INTERRUPTED):
        say(f"continue with: {request.continuation(run)}")
    return exit_code
