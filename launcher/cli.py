"""The command line. Each command imports what it needs when it runs, so that `dtrain --help` is immediate."""

from __future__ import annotations

import errno
import gc
import os
import sys

import click

from dtrain import __version__
from dtrain.errors import RanksFailed, UserError
from dtrain.run.folder import EXIT_INTERRUPTED
from dtrain.run.profiling import Profiling
from dtrain.stderr import say

from .arguments import GPUS, LaunchCommand, check_gpus
from .cli_models import evaluate, export, predict, summary
from .cli_runs import cancel, logs, runs, status, ui
from .machine.cores import drop_openmp_mistake
from .rank.stdio import open_standard_streams


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dtrain")
def cli() -> None:
    """Train a PyTorch job, described by one YAML file, on any number of GPUs, with the same result."""


@cli.command(cls=LaunchCommand)
@click.argument("job")
@click.argument("arguments", nargs=-1)
@GPUS
@click.option(
    "--nodes",
    type=click.IntRange(1),
    metavar="M",
    help="Number of machines; run the command on each. In a Slurm job: all.",
)
@click.option("--node-rank", type=int, default=0, metavar="K", help="This machine's number, from 0.")
@click.option("--rendezvous", metavar="HOST:PORT", help="Address of node 0.")
@click.option("--slurm", is_flag=True, help="Submit to Slurm; --gpus is per node, and may name a type: a100:4.")
@click.option("--wait", is_flag=True, help="With --slurm: wait until the run ends, and exit with its code.")
@click.option("--slurm-node", is_flag=True, hidden=True)  # the task that Slurm starts on each node
@click.option("--run-dir", metavar="DIR", help="Run folder; default: a new one under runs/.")
@click.option("--resume", is_flag=True, help="Continue --run-dir, or the newest unfinished run of this name.")
@click.option("--dry-run", is_flag=True, help="Print the resolved job without starting anything.")
@click.option("--show-ranks", default="0", metavar="K,K,..", help="Ranks whose output is shown, or all.")
@click.option("--max-restarts", type=click.IntRange(0), metavar="N", help="Restart at most N times after failures.")
@click.option("--profile", metavar="steps=A-B[,ranks=K,..]", help="Trace these steps, for Perfetto (of rank 0).")
@click.option("--wait-mlflow", is_flag=True, help="Return only when MLflow has received the whole run.")
@click.option("-m", "--module", is_flag=True, help="JOB is a module, run as by python -m.")
@click.option(
    "--no-preload",
    is_flag=True,
    help="Start each rank in a fresh interpreter instead of forking it from one that has imported torch.",
)
def launch(
    job: str,
    arguments: tuple[str, ...],
    gpus: str,
    nodes: int | None,
    node_rank: int,
    rendezvous: str | None,
    slurm: bool,
    wait: bool,
    slurm_node: bool,
    run_dir: str | None,
    resume: bool,
    dry_run: bool,
    show_ranks: str,
    max_restarts: int | None,
    profile: str | None,
    wait_mlflow: bool,
    module: bool,
    no_preload: bool,
) -> int:
    """Train JOB, a job.yaml or a torchrun script.

    ARGUMENTS are key=value overrides of the job's fields, such as optimizer.lr=0.1, or the script's own arguments.
    """
    gc.disable()  # what follows is mostly imports, which make no garbage; the agent enables it again
    from .commands.launch import launch
    from .commands.request import NodeOptions, RankOptions, Request

    if wait and not slurm:
        raise UserError("--wait needs --slurm: without it, dtrain launch waits for the run anyway")
    if wait_mlflow and slurm:
        raise UserError(
            "--wait-mlflow can't be combined with --slurm: a Slurm job waits as long as its time limit allows"
        )
    if not slurm:
        check_gpus(gpus)
    words = ("-m", job, *arguments) if module else (job, *arguments)
    if profile is not None:
        Profiling.of(profile)
    ranks = RankOptions(gpus, not no_preload, max_restarts, show_ranks)
    request = Request(
        words, ranks, NodeOptions(nodes or 1, node_rank, rendezvous), run_dir, resume, dry_run, wait_mlflow, profile
    )
    if slurm:
        from dtrain.clusters.cluster import named

        from .commands.submit import submit_run

        return submit_run(request, named("slurm"), wait=wait)
    if slurm_node or ("SLURM_JOB_ID" in os.environ and not node_rank):
        from .commands.allocation import located, nodes_elsewhere, start

        if not (slurm_node or dry_run or rendezvous) and (elsewhere := nodes_elsewhere(nodes)):
            return start(elsewhere)
        request = located(request, nodes, started_by_srun=slurm_node)
    return launch(request)


@cli.command()
@click.argument("job")
@click.argument("overrides", nargs=-1, metavar="[KEY=A,B]...")
@click.option("--gpus", default="auto", metavar="N", help="Processes per run, one GPU each; auto: all visible GPUs.")
@click.option("--nodes", type=click.IntRange(1), default=1, metavar="M", help="With --slurm: nodes per run.")
@click.option("--slurm", is_flag=True, help="Submit all runs as one array job.")
@click.option("--max-parallel", type=click.IntRange(1), metavar="N", help="With --slurm: at most N runs at a time.")
@click.option("--wait", is_flag=True, help="With --slurm: wait until all runs have ended.")
@click.option("--run-dir", metavar="DIR", help="Folder for the run folders; default: a new one under runs/.")
@click.option("--resume", is_flag=True, help="Continue the unfinished runs of the sweep in --run-dir.")
@click.option("--dry-run", is_flag=True, help="Print the runs (with --slurm, what would be submitted) and exit.")
def sweep(
    job: str,
    overrides: tuple[str, ...],
    gpus: str,
    nodes: int,
    slurm: bool,
    max_parallel: int | None,
    wait: bool,
    run_dir: str | None,
    resume: bool,
    dry_run: bool,
) -> int:
    """Run JOB once for each combination of the values KEY=A,B, each in its own run folder, side by side in MLflow."""
    from dtrain.clusters.cluster import named

    from .commands.sweep import ArrayOptions, SweepRequest, sweep

    if not slurm:
        check_gpus(gpus)
        if nodes > 1 or wait or max_parallel:
            raise UserError(
                "--nodes, --wait and --max-parallel need --slurm: without it, the runs go one after the other"
            )
    array = ArrayOptions(named("slurm"), nodes, max_parallel, wait) if slurm else None
    return sweep(SweepRequest(job, overrides, gpus, run_dir, resume, dry_run, array))


@cli.command()
@click.argument("job")
@click.argument("overrides", nargs=-1)
@click.option("--exact", is_flag=True, help="Also train a few steps on 1, 2 and 3 processes and compare.")
@click.option("--slurm", is_flag=True, help="Also check it with Slurm and on a node; --nodes and --gpus as in launch.")
@click.option("--nodes", type=click.IntRange(1), default=1, metavar="M", help="With --slurm: number of nodes.")
@click.option("--gpus", default="auto", metavar="N", help="With --slurm: GPUs per node; default: 1.")
def check(job: str, overrides: tuple[str, ...], exact: bool, slurm: bool, nodes: int, gpus: str) -> int:
    """Check JOB without running it: schema, imports, arguments."""
    from .commands.check import Size, check

    if not slurm and (nodes > 1 or gpus != "auto"):
        raise UserError("--nodes and --gpus need --slurm: the other checks do not depend on them")
    return check(job, overrides, exact, Size("slurm", nodes, gpus) if slurm else None)


@cli.command(hidden=True)
@click.argument("request")
def call_function(request: str) -> int:
    """The agent of dtrain.launch."""
    gc.disable()  # as in launch
    from .call.request import FunctionRequest
    from .function_agent import run

    return run(FunctionRequest.read(request))


@cli.command()
def schema() -> int:
    """Print the JSON Schema of job.yaml, for editors."""
    import json

    from dtrain.schema.job import job_json_schema

    print(json.dumps(job_json_schema(), indent=2))
    return 0


for command in (summary, evaluate, predict, export, status, logs, runs, cancel, ui):
    cli.add_command(command)


def require_working_directory() -> None:
    """Raise UserError if it has been removed: no relative path works there."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError(
            "the working directory no longer exists: it was removed after this shell entered it; cd to another one"
        ) from None


def main() -> None:
    """The console script: prints a user's mistakes without a traceback, and exits with the command's code."""
    open_standard_streams()
    drop_openmp_mistake(os.environ)
    try:
        require_working_directory()
        code = cli.main(standalone_mode=False)
    except UserError as error:
        say(str(error))
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = 2
    except (KeyboardInterrupt, click.Abort):
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except RanksFailed:
        code = 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"{error.strerror}: {error.filename or 'a file could not be written'}; free some space", file=sys.stderr)
        code = 1
    if "torch" in sys.modules:
        from .rank.finalize import leave

        gc.freeze()  # nothing of what was imported is looked through
        leave(code)
    sys.exit(code)
