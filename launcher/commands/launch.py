"""`dtrain launch`: everything that is decided before the ranks start, and what a run folder begins with."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dtrain import __version__
from dtrain.errors import Problem, UserError
from dtrain.files import write_json, write_text
from dtrain.gpus import DEVICE_VARIABLE
from dtrain.monitoring.screen import say
from dtrain.monitoring.tracking_uri import hand_on
from dtrain.names import hidden_modules, short
from dtrain.redact import hide_in_command
from dtrain.run.folder import EXIT_INTERRUPTED, EXIT_STOPPED, RunDir
from dtrain.run.provenance import environment
from dtrain.run.snapshot import TOO_LARGE, Snapshot
from dtrain.schema.packages import require_for

from ..agent.agent import run_ranks
from ..machine.devices import choose_processes, expected_ranks, num_processes, threads_per_rank
from ..rank.entry import Task
from ..rank.fork_server import start_fork_server
from ..rank.program import Program, find_module, find_program, find_script, refuse_other_program
from .check import require_right

if TYPE_CHECKING:
    from dtrain.schema.job import Job, LoadedJob, LoadedScript, ScriptJob
    from dtrain.slurm.environment import Place

    from ..agent.nodes import Endpoint

# What the fork server imports, for all ranks at once: always, and where the job or the script speaks of it. None of
# it touches CUDA. The user's own modules never belong here: they may.
PRELOAD = ("torch", "torch._dynamo")  # optimizers import the latter
PRELOAD_FOR = {
    "_target_": ("dtrain.trainer.trainer", "dtrain.schema.loading", "dtrain.schema.instantiate"),
    "dtrain": ("dtrain.trainer.trainer",),
    "torchmetrics": ("dtrain.trainer.metrics.metric_set",),
    "torchvision": ("torchvision",),
}


@dataclass(frozen=True)
class Request:
    """The command line of `dtrain launch`."""

    target: str  # a job file, a script that ends in .py, or a module
    arguments: tuple[str, ...] = ()  # key=value overrides, or the script's arguments
    gpus: str = "auto"
    run_dir: str | None = None
    resume: bool = False
    dry_run: bool = False
    show_ranks: str = "0"  # "all", or some with commas between
    is_module: bool = False
    max_restarts: int | None = None  # after failures; None: as the job says
    preload: bool = True  # ranks forked from one server; else a fresh interpreter for each
    nodes: int = 1
    node_rank: int = 0
    rendezvous: str | None = None  # host:port of node 0
    place: Place | None = None  # where Slurm says the nodes
    wait: bool = False  # with Slurm: follow the job to its end
    wait_mlflow: bool = False  # until it has all of the run

    @property
    def is_script(self) -> bool:
        return self.is_module or self.target.endswith(".py")


def launch(request: Request) -> int:
    """Launch a job or a script on this machine; the exit code.

    Raises:
        UserError: the request is wrong; nothing was started or written.
    """
    check_nodes(request)
    if request.is_script:
        require_for()
        return _launch_script(request)
    from dtrain.schema.job import LoadedScript
    from dtrain.schema.loading import load

    refuse_other_program(request.target)
    loaded = load(request.target, request.arguments)
    require_for(loaded)
    hand_on(loaded.job.mlflow.tracking_uri)
    return _launch_script_job(request, loaded) if isinstance(loaded, LoadedScript) else _launch_job(request, loaded)


# -- a job ---------------------------------------------------------------------------------------


def _launch_job(request: Request, loaded: LoadedJob) -> int:
    from dtrain.schema.loading import dump_job

    job = loaded.job
    run = find_run(request, job.name)
    continues = request.resume and run.job.exists()
    if continues and is_done(run, job):
        say(f"{run} is finished; nothing to resume")
        return 0
    code = run.code if continues else loaded.folder
    if request.preload and not request.dry_run:
        start_fork_server(preload_for(dump_job(job)), threads_per_rank(expected_ranks(request.gpus)))
    num_ranks, device = check_and_choose(loaded, code, request.gpus)
    text = resolved(job, device)
    if request.dry_run:
        print(text, end="")
        say(f"would train on {num_processes(num_ranks, device)}, in {run}")
        return 0
    task = Task(
        str(run),
        "dtrain.trainer.entrypoints.train",
        (str(code),),
        threads_per_rank(num_ranks),
        job.launch.hang_timeout_s,
        is_module=True,
        is_job=True,
        forked=request.preload,
    )
    return _start(request, run, task, num_ranks, text, None if continues else code, job.fit.restarts)


def check_and_choose(loaded: LoadedJob, code: Path, gpus: str) -> tuple[int, Literal["cpu", "cuda"]]:
    """`choose_processes` for a job that is right; raises UserError where it is not, or these devices can't do it."""
    require_right(loaded, code)
    num_ranks, device = choose_processes(gpus, loaded.job.launch.device)
    if device == "cpu" and (problems := list(only_for_gpus(loaded.job, num_ranks))):
        raise UserError([loaded.at(problem) for problem in problems])
    return num_ranks, device


def only_for_gpus(job: Job, num_ranks: int) -> Iterator[Problem]:
    """What a job asks for that CPU processes can't do."""
    if job.fit.sync_batchnorm and num_ranks > 1:
        yield Problem("needs CUDA: torch has no SyncBatchNorm on the CPU", "fit.sync_batchnorm")
    if job.fit.precision == "fp16":
        yield Problem("fp16 is for GPUs; on a CPU bf16 needs no scaler", "fit.precision")
    if job.fsdp.offload:
        yield Problem("keeps in the CPU's memory what a GPU has no room for, and there is no GPU here", "fsdp.offload")


def is_done(run: RunDir, job: Job | ScriptJob) -> bool:
    """Whether a run has nothing left to do; raises UserError where `job` is not the job that it began with."""
    from dtrain.schema.job import ScriptJob
    from dtrain.schema.loading import differences, load

    before = load(run.job).job
    if changed := differences(before, job):
        problems = [Problem(change, file=str(run.job)) for change in changed]
        raise UserError([Problem(f"{run} belongs to another job; these fields cannot change on resume:"), *problems])
    if run.status().get("state") != "finished":
        return False
    return isinstance(before, ScriptJob) or isinstance(job, ScriptJob) or job.fit.epochs <= before.fit.epochs


# -- a script ------------------------------------------------------------------------------------


def _launch_script(request: Request) -> int:
    program = find_module(request.target, os.getcwd()) if request.is_module else find_script(request.target)
    run = find_run(request, program.name if program.is_module else program.file.stem)
    return _launch_program(request, run, program, request.arguments)


def _launch_script_job(request: Request, loaded: LoadedScript) -> int:
    job = loaded.job
    program = find_program(loaded)
    run = find_run(request, job.name)
    if request.resume and run.job.exists() and is_done(run, job):
        say(f"{run} is finished; nothing to resume")
        return 0
    return _launch_program(request, run, program, job.arguments, loaded)


def _launch_program(
    request: Request, run: RunDir, program: Program, arguments: Sequence[str], loaded: LoadedScript | None = None
) -> int:
    device_asked = loaded.job.launch.device if loaded else "auto"
    if device_asked == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the program goes by what it finds
    preload = request.preload and not _sets_on_import(program)
    if preload and not request.dry_run:
        modules, threads = preload_for(program.source), threads_per_rank(expected_ranks(request.gpus))
        preload = start_fork_server(modules, threads, unless=lambda: _is_hidden(program))
    num_ranks, device = choose_processes(request.gpus, device_asked)
    os.environ[DEVICE_VARIABLE] = device  # a job's ranks find it in job.yaml
    text = resolved(loaded.job, device) if loaded else None
    if request.dry_run:
        print(text or "", end="")
        say(f"would run {program.name} on {num_processes(num_ranks, device)}, in {run}")
        return 0
    task = Task(
        str(run),
        program.name,
        tuple(arguments),
        threads_per_rank(num_ranks),
        is_module=program.is_module,
        folder=program.folder,
        forked=preload,
    )
    origin = (loaded.path if loaded else program.file).absolute().parent
    return _start(
        request, run, task, num_ranks, text, None if request.resume else origin, loaded.job.restarts if loaded else 0
    )


def _sets_on_import(program: Program) -> bool:
    if variable := program.sets_on_import:
        _say_fresh(f"{program.name} sets {variable}, which libraries read when they are imported")
    return variable is not None


def _is_hidden(program: Program) -> bool:
    """Whether a module beside the program has the name of one of Python's that is loaded by now."""
    if hidden := hidden_modules(Path(program.folder), program.file):
        _say_fresh(f"{short(str(hidden[0]))} has the name of a module of Python's, which torch has loaded")
    return bool(hidden)


def _say_fresh(reason: str) -> None:
    say(f"{reason}: each rank gets a fresh interpreter, as with --no-preload")


# -- both ----------------------------------------------------------------------------------------


def preload_for(text: str) -> list[str]:
    """The modules that the ranks of this job or script will need, of those that may be imported before the fork."""
    return [*PRELOAD, *(module for word, modules in PRELOAD_FOR.items() if word in text for module in modules)]


def resolved(job: Job | ScriptJob, device: Literal["cpu", "cuda"]) -> str:
    """What the run folder's job.yaml holds: defaults and overrides included."""
    from dtrain.schema.loading import dump_job

    return dump_job(job.model_copy(update={"launch": job.launch.model_copy(update={"device": device})}))


def _start(
    request: Request,
    run: RunDir,
    task: Task,
    num_ranks: int,
    job: str | None,
    origin: Path | None,
    restarts: int,
) -> int:
    """Fill the run folder and run the ranks. Nothing was written before; `origin` is None for a run that goes on.

    Args:
        restarts: what the job says of them.
    """
    restarts = restarts if request.max_restarts is None else request.max_restarts
    show_ranks = choose_ranks(request.show_ranks, request.nodes * num_ranks)
    nodes = None
    if request.nodes > 1:
        from ..agent.nodes import Nodes

        common = {"the job": job or request.target, "--gpus": num_ranks, "dtrain's version": __version__}
        nodes = Nodes(_endpoint(request), common)
    if nodes is not None and nodes.node_rank > 0:
        run, code = RunDir(nodes.from_first("run")), nodes.from_first("code")
        if not run.lock_file.exists():
            raise UserError(f"node 0 has made {run}, not visible on this node: use a shared --run-dir")
        task = replace(task, run_dir=str(run), arguments=(code,) if task.is_job else task.arguments)
        return run_ranks(task, num_ranks, run, nodes=nodes, restarts=restarts)
    with ExitStack() as held:
        with _usable(run):
            is_new = not run.exists()
            run.create()
            with _whole_or_gone(run) if is_new else nullcontext():
                held.enter_context(run.lock(is_agent=True))
                fill(run, origin, job)
        say(f"run {run}")
        if nodes is not None:
            nodes.from_first("run", str(run.path.absolute()))
            nodes.from_first("code", str(Path(task.arguments[0]).absolute()) if task.is_job else "")
        exit_code = run_ranks(
            task, num_ranks, run, show_ranks, nodes, restarts=restarts, wait_mlflow=request.wait_mlflow
        )
    if exit_code in (EXIT_STOPPED, EXIT_INTERRUPTED):
        say(f"continue with: {_continuation(request, run)}")
    return exit_code


def fill(run: RunDir, origin: Path | None, job: str | None) -> None:
    """Write what a run begins with: the code of the folder `origin`, where all comes from, and the job, if any."""
    if origin is not None:
        copy = Snapshot(run.code)
        copy.add(origin)
        copy.add_modules()
        write_json(run.env, {**environment(origin), "left_out_of_code": list(copy.left_out)})
        if kept_out := [f"{name} ({why})" for name, why in copy.left_out.items() if why != TOO_LARGE]:
            say(f"{run.code} is without {', '.join(kept_out)}")
    if job is not None:
        write_text(run.job, job)  # last: with it, the run is one that --resume can continue


def _continuation(request: Request, run: RunDir) -> str:
    """The command that continues the run: the same request, overrides included, since the job must be the same."""
    words = ["dtrain", "launch", "--resume", "--run-dir", str(run)]
    place = request.place
    if request.gpus != "auto":
        words += ["--gpus", str(int(request.gpus) * (1 if place is None else place.local_size))]
    if request.max_restarts is not None:
        words += ["--max-restarts", str(request.max_restarts)]
    words += ["--no-preload"] * (not request.preload) + ["--wait-mlflow"] * request.wait_mlflow
    words += ["-m"] * request.is_module
    if request.nodes > 1 and place is None:
        words += ["--nodes", str(request.nodes), "--node-rank", "0", "--rendezvous", str(request.rendezvous)]
    if request.show_ranks != "0":
        words += ["--show-ranks", request.show_ranks]
    dashes = ["--"] if request.is_script and request.arguments else []
    return shlex.join(hide_in_command([*words, request.target, *dashes, *request.arguments]))


def check_nodes(request: Request) -> None:
    """Raise UserError where the nodes can't find each other by what was said of them."""
    if request.nodes == 1:
        if request.node_rank or request.rendezvous:
            raise UserError("--node-rank and --rendezvous are for runs on several nodes: say how many with --nodes")
        return
    if not 0 <= request.node_rank < request.nodes:
        raise UserError(f"--node-rank {request.node_rank}: with --nodes {request.nodes} it is 0 to {request.nodes - 1}")
    if request.rendezvous is None and request.place is not None:
        return
    if request.rendezvous is None:
        raise UserError(
            f"--nodes {request.nodes} needs --rendezvous HOST:PORT, a port of the node that is started with "
            "--node-rank 0; the same command runs on each node, with a --node-rank of its own"
        )
    host, _, port = request.rendezvous.rpartition(":")
    if not host or not (port.isdecimal() and 0 < int(port) < 65536):
        raise UserError(f"--rendezvous {request.rendezvous}: expected HOST:PORT, such as node1:29500")


def _endpoint(request: Request) -> Endpoint:
    from ..agent.nodes import Endpoint

    place = request.place
    hosts = place.hosts if place is not None and len(place.hosts) == place.tasks else ()
    if place is not None and request.rendezvous is None:
        return Endpoint(request.nodes, request.node_rank, place.host, place.port, hosts)
    host, _, port = str(request.rendezvous).rpartition(":")
    return Endpoint(request.nodes, request.node_rank, host.strip("[]"), int(port), hosts)


@contextmanager
def _usable(run: RunDir) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        file = f" ({error.filename})" if error.filename else ""
        raise UserError(f"{run} cannot be used: {error.strerror}{file}; choose another --run-dir") from None


@contextmanager
def _whole_or_gone(run: RunDir) -> Iterator[None]:
    """Where what a new run begins with can't be written, or not to its end, nothing of it stays."""
    try:
        yield
    except (OSError, KeyboardInterrupt):
        shutil.rmtree(run.path, ignore_errors=True)
        raise


def find_run(request: Request, name: str) -> RunDir:
    """The run's folder, not made yet. A folder that holds anything is only for --resume."""
    if request.node_rank > 0:  # node 0 says which it is, and looks after it
        return RunDir(request.run_dir) if request.resume and request.run_dir else RunDir.new(name)
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
    script = RunDir(run.path.absolute().parent)
    if run.path.absolute() in [fit.path.absolute() for fit in script.fits()]:
        raise UserError(f"{run} is one fit of the run in {script}, which --resume can continue")
    return run


def newest_unfinished(name: str) -> RunDir:
    """The newest run of that name under runs/ that has something left to do."""
    pattern = re.compile(re.escape(name) + r"-\d{8}-\d{6}-[0-9a-f]{4}")
    folders = sorted(path for path in Path("runs").glob("*") if pattern.fullmatch(path.name))
    for folder in reversed(folders):
        if RunDir(folder).status().get("state", "finished") != "finished":
            return RunDir(folder)
    raise UserError(f"no unfinished run of {name} under {Path('runs').absolute()}; name one with --run-dir")


def choose_ranks(asked: str, num_ranks: int) -> list[int]:
    """The ranks whose output is shown; raises UserError where there is no such rank."""
    if asked == "all":
        return list(range(num_ranks))
    words = [word.strip() for word in asked.split(",")]
    if not all(word.isdecimal() for word in words):
        raise UserError(f"--show-ranks {asked}: expected ranks, such as 0,2, or all")
    ranks = sorted({int(word) for word in words})
    if ranks[-1] >= num_ranks:
        raise UserError(f"--show-ranks {asked}: there is no rank {ranks[-1]}; the last is {num_ranks - 1}")
    return ranks
