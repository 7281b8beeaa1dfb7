"""Ranks that do something beside a run, in a run folder that is thrown away."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dtrain.errors import RanksFailed
from dtrain.files import write_text
from dtrain.run.folder import EXIT_INTERRUPTED, RunDir

from ..machine.scratch import held_folder
from ..rank.entry import Task
from .agent import run_ranks


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder that goes again, but after RanksFailed: the screen has named the log in it. (It goes a day later.)"""
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


def run_module(
    run: RunDir,
    module: str,
    arguments: tuple[str, ...],
    num_ranks: int,
    num_threads: int,
    may_end: tuple[int, ...] = (),
) -> int:
    """Run a module of dtrain's on so many ranks, as the worker of the run is; 0, or an exit code of `may_end`.

    Raises:
        RanksFailed: another exit code.
        KeyboardInterrupt: it was interrupted.
    """
    task = Task(str(run), module, arguments, num_threads, is_module=True, is_job=True)
    with run.lock():
        code = run_ranks(task, num_ranks, run, quiet=True)
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if code not in (0, *may_end):
        raise RanksFailed
    return code
