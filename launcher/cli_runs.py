"""The commands that look at runs, and stop them."""

from __future__ import annotations

import click


@click.command()
@click.argument("run")
def status(run: str) -> int:
    """Show the status of RUN, a run folder."""
    from .commands.status import status

    return status(run)


@click.command()
@click.argument("run")
@click.option("--rank", default=0, metavar="K", help="Which rank; default: 0.")
@click.option("-f", "--follow", is_flag=True, help="Keep printing until the run ends.")
def logs(run: str, rank: int, follow: bool) -> int:
    """Print the output of one rank of RUN, a run folder."""
    from .commands.logs import logs

    return logs(run, rank, follow)


@click.command()
@click.argument("folder", required=False, metavar="[DIR]")
def runs(folder: str | None) -> int:
    """List the runs in DIR (default: runs), newest last."""
    from .commands.runs import runs

    return runs(folder)


@click.command()
@click.argument("run")
@click.option("--now", is_flag=True, help="End it at once, without a checkpoint.")
def cancel(run: str, now: bool) -> int:
    """Stop RUN, a run folder, at its next step, with a checkpoint."""
    from .commands.cancel import cancel

    return cancel(run, now)


@click.command()
@click.option("--tracking-uri", metavar="URI", help="Store to show; default: MLFLOW_TRACKING_URI, or mlflow.db here.")
@click.option("--port", type=click.IntRange(1, 65535), metavar="N", help="Default: 5000, or a free port.")
def ui(tracking_uri: str | None, port: int | None) -> int:
    """Open MLflow's pages to show and compare runs."""
    from .commands.ui import ui

    return ui(tracking_uri, port)
