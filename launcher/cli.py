"""The command line. Each command imports what it needs when it runs, so that `dtrain --help` is immediate."""

from __future__ import annotations

import sys

import click

from dtrain import __version__
from dtrain.errors import UserError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dtrain")
def cli() -> None:
    """Train a PyTorch job, described by one YAML file, on any number of GPUs with the same result."""


@cli.command()
@click.argument("job")
@click.argument("arguments", nargs=-1)
@click.option("--gpus", default="auto", metavar="N", help="Processes, one GPU each; auto: all visible GPUs.")
@click.option("--run-dir", metavar="DIR", help="The run's folder; by default a new one under runs/.")
@click.option("--resume", is_flag=True, help="Continue --run-dir, or the newest unfinished run of this name.")
@click.option("--dry-run", is_flag=True, help="Print the job as resolved, and start nothing.")
def launch(job: str, arguments: tuple[str, ...], gpus: str, run_dir: str | None, resume: bool, dry_run: bool) -> int:
    """Train JOB, a job.yaml or a torchrun script, on this machine.

    ARGUMENTS are key=value overrides of the job's fields, such as optimizer.lr=0.1; for a script they are its own,
    after --.
    """
    from .launch import Request, launch

    if gpus != "auto" and not (gpus.isdecimal() and int(gpus) > 0):
        raise UserError(f"--gpus {gpus}: expected a number above 0, or auto")
    return launch(Request(job, arguments, gpus, run_dir, resume, dry_run))


@cli.command()
@click.argument("job")
@click.argument("overrides", nargs=-1)
@click.option("--exact", is_flag=True, help="Also train a few steps on 1, 2 and 3 processes, and print what differs.")
def check(job: str, overrides: tuple[str, ...], exact: bool) -> int:
    """Find what is wrong with JOB: schema, imports, arguments."""
    from .check import check

    return check(job, overrides, exact)


@cli.command()
def schema() -> int:
    """Print the JSON Schema of job.yaml, for editors."""
    import json

    from dtrain.job import job_json_schema

    print(json.dumps(job_json_schema(), indent=2))
    return 0


@cli.command()
@click.argument("run")
def status(run: str) -> int:
    """Show how RUN, a run folder, stands."""
    from .status import status

    return status(run)


@cli.command()
@click.option("--tracking-uri", metavar="URI", help="By default MLFLOW_TRACKING_URI, else mlflow.db here.")
@click.option("--port", type=click.IntRange(1, 65535), metavar="N", help="By default 5000, or a free one.")
def ui(tracking_uri: str | None, port: int | None) -> int:
    """Show and compare the runs in MLflow's pages."""
    from .ui import ui

    return ui(tracking_uri, port)


def main() -> None:
    """The console script: prints a user's mistakes without a traceback, and exits with the command's code."""
    try:
        code = cli.main(standalone_mode=False)
    except UserError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = 2
    except (KeyboardInterrupt, click.Abort):
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        code = 1
    sys.exit(code)
