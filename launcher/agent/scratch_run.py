"""Ranks that serve a command other than training, in a temporary run folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dtrain.errors import RanksFailed
from dtrain.files import write_text
from dtrain.run.folder import EXIT_INTERRUPTED, RunDir
from dtrain.run.rank_request import RankRequest

from ..machine.scratch import held_folder
from ..rank.entry import Task
from .agent import run_ranks


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder, kept for a day after RanksFailed, since the screen has named the log in it."""
    with held_folder("aside") as folder:
        try:
            yield folder
        except RanksFailed:
            raise
        except BaseException:
            shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def new_run(folder: Path, job: str) -> RunDir:
    """A run folder with that job."""
    run = RunDir(folder)
    run.create()
    write_text(run.job, job)
    return run


def run_request(
    run: RunDir, request: RankRequest, num_ranks: int, num_threads: int, may_end: tuple[int, ...] = ()
) -> int:
    """Run it on this many ranks for the job of the run; 0, or an exit code in `may_end`.

    Raises:
        RanksFailed: another exit code.
        KeyboardInterrupt: it was interrupted.
    """
    task = Task(str(run), "job", request.entrypoint, request.arguments, num_threads)
    with run.lock():
        code = run_ranks(task, num_ranks, run, quiet=True)
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if code not in (0, *may_end):
        raise RanksFailed
    return code
