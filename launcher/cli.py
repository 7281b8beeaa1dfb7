"""The command line. Each command imports what it needs when it runs, so that `dtrain --help` is immediate."""

from __future__ import annotations

import errno
import gc
import os
import sys

import click

from dtrain import __version__
from dtrain.errors import RanksFailed, UserError
from dtrain.monitoring.screen import say
from dtrain.run.folder import EXIT_INTERRUPTED

from .arguments import LaunchCommand
from .machine.cores import drop_openmp_mistake
from .rank.stdio import open_standard_streams

_GPUS = click.option("--gpus", default="auto", metavar="N", help="Processes, one GPU each; auto: all visible GPUs.")
_WEIGHTS = click.option("--weights", type=click.Choice(["best", "last", "ema"]), default="best", show_default=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dtrain")
def cli() -> None:
    """Train a PyTorch job, described by one YAML file, on any number of GPUs with the same result."""


@cli.command(cls=LaunchCommand)
@click.argument("job")
@click.argument("arguments", nargs=-1)
@_GPUS
@click.option("--nodes", type=click.IntRange(1), metavar="M", help="Machines, the command on each; in Slurm jobs all.")
@click.option("--node-rank", type=int, default=0, metavar="K", help="Which of them this one is, from 0.")
@click.option("--rendezvous", metavar="HOST:PORT", help="Where node 0 is to be found.")
@click.option("--slurm", is_flag=True, help="Submit it to Slurm; --gpus is per node, and may name a type: a100:4.")
@click.option("--wait", is_flag=True, help="With --slurm: follow the job to its end, and exit as the run does.")
@click.option("--slurm-node", is_flag=True, hidden=True)  # the task that Slurm starts on each node
@click.option("--run-dir", metavar="DIR", help="The run's folder; by default a new one under runs/.")
@click.option("--resume", is_flag=True, help="Continue --run-dir, or the newest unfinished run of this name.")
@click.option("--dry-run", is_flag=True, help="Print the job as resolved, and start nothing.")
@click.option("--show-ranks", default="0", metavar="K,K,..", help="Whose output is shown: ranks, or all.")
@click.option("--max-restarts", type=click.IntRange(0), metavar="N", help="Start anew after so many failures.")
@click.option("--wait-mlflow", is_flag=True, help="Come back when MLflow has all of the run, not before.")
@click.option("-m", "--module", is_flag=True, help="JOB is a module, run as python -m does.")
@click.option(
    "--no-preload", is_flag=True, help="A fresh interpreter for each rank: none is forked with torch imported."
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
    wait_mlflow: bool,
    module: bool,
    no_preload: bool,
) -> int:
    """Train JOB, a job.yaml or a torchrun script, on this machine.

    ARGUMENTS are key=value overrides of the job's fields, such as optimizer.lr=0.1; for a script they are its own.
    """
    gc.disable()  # imports are most of what follows, and make no garbage; the agent turns it on again
    from .commands.launch import launch
    from .commands.request import Request

    if wait and not slurm:
        raise UserError("--wait goes with --slurm: a run here is waited for anyway")
    if wait_mlflow and slurm:
        raise UserError("--wait-mlflow is for runs here: a job of Slurm's waits for MLflow as long as its time allows")
    if not slurm:
        check_gpus(gpus)
    request = Request(
        job,
        arguments,
        gpus,
        run_dir,
        resume,
        dry_run,
        show_ranks=show_ranks,
        is_module=module,
        max_restarts=max_restarts,
        preload=not no_preload,
        nodes=nodes or 1,
        node_rank=node_rank,
        rendezvous=rendezvous,
        wait=wait,
        wait_mlflow=wait_mlflow,
    )
    if slurm:
        from dtrain.clusters.cluster import named

        from .commands.submit import submit_run

        return submit_run(request, named("slurm"))
    if slurm_node or ("SLURM_JOB_ID" in os.environ and not node_rank):
        from .commands.allocation import located, nodes_elsewhere, start

        if not (slurm_node or dry_run or rendezvous) and (elsewhere := nodes_elsewhere(nodes)):
            return start(elsewhere)
        request = located(request, nodes, started_by_srun=slurm_node)
    return launch(request)


@cli.command()
@click.argument("job")
@click.argument("overrides", nargs=-1, metavar="[KEY=A,B]...")
@click.option("--gpus", default="auto", metavar="N", help="Processes of each run, one for each GPU; by default all.")
@click.option("--nodes", type=click.IntRange(1), default=1, metavar="M", help="With --slurm: nodes of each run.")
@click.option("--slurm", is_flag=True, help="Submit all runs as one array job.")
@click.option("--max-parallel", type=click.IntRange(1), metavar="N", help="With --slurm: at most N runs at a time.")
@click.option("--wait", is_flag=True, help="With --slurm: wait until all runs are over.")
@click.option("--run-dir", metavar="DIR", help="The folder of the run folders; by default a new one under runs/.")
@click.option("--resume", is_flag=True, help="Continue the sweep in --run-dir: what is not finished.")
@click.option("--dry-run", is_flag=True, help="Print the runs, and with --slurm what would be submitted.")
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
    """Run JOB with each combination of the values of KEY=A,B: a run folder each, side by side in MLflow."""
    from dtrain.clusters.cluster import named

    from .commands.sweep import SweepRequest, sweep

    if not slurm:
        check_gpus(gpus)
    cluster = named("slurm") if slurm else None
    return sweep(SweepRequest(job, overrides, gpus, nodes, run_dir, resume, dry_run, cluster, wait, max_parallel))


def check_gpus(gpus: str) -> None:
    """Raise UserError where it is no number of GPUs of this machine."""
    if gpus != "auto" and not (gpus.isdecimal() and int(gpus) > 0):
        which = ""
        if "," in gpus:
            which = f"; which GPUs, CUDA_VISIBLE_DEVICES says: CUDA_VISIBLE_DEVICES={gpus} dtrain launch ..."
        raise UserError(f"--gpus {gpus}: expected a number above 0, or auto{which}")


@cli.command()
@click.argument("job")
@click.argument("overrides", nargs=-1)
@click.option("--exact", is_flag=True, help="Also train a few steps on 1, 2 and 3 processes, and print what differs.")
@click.option("--slurm", is_flag=True, help="Also ask Slurm and a node about it; --nodes and --gpus as for launch.")
@click.option("--nodes", type=click.IntRange(1), default=1, metavar="M", help="With --slurm: how many.")
@click.option("--gpus", default="auto", metavar="N", help="With --slurm: of each node; by default 1.")
def check(job: str, overrides: tuple[str, ...], exact: bool, slurm: bool, nodes: int, gpus: str) -> int:
    """Find what is wrong with JOB: schema, imports, arguments."""
    from .commands.check import Size, check

    if not slurm and (nodes > 1 or gpus != "auto"):
        raise UserError("--nodes and --gpus go with --slurm: whether a job is right does not depend on them")
    return check(job, overrides, exact, Size("slurm", nodes, gpus) if slurm else None)


@cli.command()
@click.argument("job")
@click.argument("overrides", nargs=-1)
def summary(job: str, overrides: tuple[str, ...]) -> int:
    """Print the layers of JOB's model, with output shapes, parameters and memory."""
    from .commands.evaluate import summary

    return summary(job, overrides)


@cli.command()
@click.argument("run")
@click.argument("overrides", nargs=-1)
@_GPUS
@_WEIGHTS
def evaluate(run: str, overrides: tuple[str, ...], gpus: str, weights: str) -> int:
    """Print loss and metrics of RUN's model on its validation set, as JSON.

    OVERRIDES of its job name another set: data.val.split=test.
    """
    from .commands.evaluate import Trained, evaluate

    check_gpus(gpus)
    return evaluate(Trained(run, overrides, weights), gpus)


@cli.command()
@click.argument("run")
@click.argument("data")
@click.argument("overrides", nargs=-1)
@click.option("-o", "--out", metavar="FILE", help="An .npy or .csv; by default predictions.npy in RUN.")
@_GPUS
@_WEIGHTS
def predict(run: str, data: str, overrides: tuple[str, ...], out: str | None, gpus: str, weights: str) -> int:
    """Write what RUN's model predicts for each sample of DATA, in its order, and print the file's name.

    DATA is train or val, the sets of RUN's job (OVERRIDES may change them: data.val.split=test), or a file of features,
    .npy or .csv, whose rows are the samples.
    """
    from .commands.evaluate import Trained, predict

    check_gpus(gpus)
    return predict(Trained(run, overrides, weights), data, out, gpus)


@cli.command()
@click.argument("run")
@click.option("--format", "form", type=click.Choice(["onnx", "safetensors", "pt"]), required=True)
@click.option("-o", "--out", metavar="FILE", help="By default the job's name with the format's, here.")
@_WEIGHTS
def export(run: str, form: str, out: str | None, weights: str) -> int:
    """Write RUN's model for others: ONNX, compared with PyTorch on real samples, or the weights alone."""
    from .commands.evaluate import Trained, export

    return export(Trained(run, (), weights), form, out)


@cli.command()
def schema() -> int:
    """Print the JSON Schema of job.yaml, for editors."""
    import json

    from dtrain.schema.job import job_json_schema

    print(json.dumps(job_json_schema(), indent=2))
    return 0


@cli.command()
@click.argument("run")
def status(run: str) -> int:
    """Show how RUN, a run folder, stands."""
    from .commands.status import status

    return status(run)


@cli.command()
@click.argument("run")
@click.option("--rank", default=0, metavar="K", help="By default 0.")
@click.option("-f", "--follow", is_flag=True, help="Go on until the run ends.")
def logs(run: str, rank: int, follow: bool) -> int:
    """Print what a rank of RUN, a run folder, has printed."""
    from .commands.logs import logs

    return logs(run, rank, follow)


@cli.command()
@click.argument("folder", required=False, metavar="[DIR]")
def runs(folder: str | None) -> int:
    """List the runs in DIR (by default runs), the newest last."""
    from .commands.runs import runs

    return runs(folder)


@cli.command()
@click.argument("run")
@click.option("--now", is_flag=True, help="End it at once, without a checkpoint.")
def cancel(run: str, now: bool) -> int:
    """Stop RUN, a run folder, at its next step, with a checkpoint."""
    from .commands.cancel import cancel

    return cancel(run, now)


@cli.command()
@click.option("--tracking-uri", metavar="URI", help="By default MLFLOW_TRACKING_URI, else mlflow.db here.")
@click.option("--port", type=click.IntRange(1, 65535), metavar="N", help="By default 5000, or a free one.")
def ui(tracking_uri: str | None, port: int | None) -> int:
    """Show and compare the runs in MLflow's pages."""
    from .commands.ui import ui

    return ui(tracking_uri, port)


def require_working_directory() -> None:
    """Raise UserError where it has been removed: there, no file can be found."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError(
            "the working directory is gone: it was removed since this shell entered it; cd to another"
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
        print(f"{error.strerror}: {error.filename or 'a file could not be written'}; make room", file=sys.stderr)
        code = 1
    if "torch" in sys.modules:
        from .rank.finalize import leave

        gc.freeze()  # nothing of this process is to be taken down
        leave(code, dict(sys.modules))
    sys.exit(code)
