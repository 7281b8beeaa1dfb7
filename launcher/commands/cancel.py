"""`dtrain cancel`: ask a run to stop, or end it, and report the result."""

from __future__ import annotations

import re
import shlex
import signal
import sys
import time
from contextlib import ExitStack, suppress

from dtrain.clusters.cluster import QueuedJob, Submitted, submitted, submitted_file
from dtrain.errors import UserError
from dtrain.run.folder import RunDir
from dtrain.run.heartbeat import Heartbeat
from dtrain.run.lock import Writer, has_ended
from dtrain.run.sweep import Sweep

from ..agent.root_cause import headline
from .request import RankOptions, Request
from .status import position, read_status

LOOK_EVERY_S = 0.1
LOOK_AT_QUEUE_EVERY_S = 1.0
SAY_EVERY_S = 30.0
PATIENCE_S = 10.0  # for an agent to end its run at once; then it is killed
TRIES = 20


def cancel(path: str, now: bool) -> int:
    """Stop the run at its next step, or with `now` end it at once; wait until its agent has ended.

    0 if it no longer runs, 1 if it failed instead of stopping.

    Raises:
        UserError: there is no run, or none that can be stopped from here.
    """
    run = RunDir(path)
    if sweep := Sweep.read(run.path):
        # Waiting ones first: otherwise they would start as the others end.
        begun = [each for each in reversed(sweep.runs) if each.status() or submitted_file(each)]
        return max((cancel(str(each), now) for each in begun), default=0)
    read_status(run)
    if (job := submitted(run)) and (queued := job.look_up()) and not queued.is_over:
        return _end_job(run, job, queued, now)
    for _ in range(TRIES):
        writer = run.writer()
        if writer is None:
            print(f"{run} is not running: it is {read_status(run)['state']}")
            return 0
        if not writer.is_here:
            raise UserError(
                f"{run} runs on {writer.host}; stop it there: ssh {writer.host} dtrain cancel {run.path.absolute()}"
            )
        with ExitStack() as stack:
            try:
                process = stack.enter_context(run.process_of(writer))
            except (
                ProcessLookupError
            ):  # another process may just have taken the lock without having written its number yet
                time.sleep(LOOK_EVERY_S)
                continue
            except OSError as error:
                raise UserError(
                    f"process {writer.pid}, which writes to {run}, can't be signalled: {error.strerror}"
                ) from None
            _end(run, writer, process, now)
        return _say_outcome(run)
    raise UserError(
        f"{run} is locked, but not by the process named in its lock; to find which one: fuser {run.lock_file}"
    )


def _end_job(run: RunDir, job: Submitted, queued: QueuedJob, now: bool) -> int:
    """Have its cluster stop it, and wait until it has ended."""
    if now or not queued.is_running:
        job.cluster.end(job.job_id)
    else:
        job.cluster.ask_to_stop(job.job_id)
        print(
            f"{run}: {job} is asked to stop at its next step, with a checkpoint; "
            f"to end it at once: dtrain cancel --now {run}",
            file=sys.stderr,
        )
    while (latest := job.look_up()) is not None and not latest.is_over:
        time.sleep(LOOK_AT_QUEUE_EVERY_S)
    if not run.status():
        print(f"{run} was cancelled before it began")
        return 0
    return _say_outcome(run)


def _end(run: RunDir, writer: Writer, process: int, now: bool) -> None:
    """Ask the run to end, and wait until its writer has ended."""
    asked_at = None
    said_at = time.monotonic()
    while not has_ended(process, LOOK_EVERY_S):
        status = run.status()
        is_running = status.get("state") == "running"  # otherwise it is just starting or ending
        if is_running and asked_at is None:
            asked_at = time.monotonic()
            _ask(run, writer, process, now)
        elif is_running and now and asked_at is not None and time.monotonic() - asked_at > PATIENCE_S:
            _send(process, signal.SIGKILL)
        if time.monotonic() - said_at > SAY_EVERY_S:
            said_at = time.monotonic()
            what = position(status) if is_running else "waiting for the upload to MLflow"
            print(f"{run} is {status.get('state')}: {what}", file=sys.stderr)


def _ask(run: RunDir, writer: Writer, process: int, now: bool) -> None:
    if now:
        _send(process, signal.SIGQUIT if writer.is_agent else signal.SIGINT)
    else:
        if writer.is_agent:
            _send(process, signal.SIGTERM)
        else:  # a script: a signal would end it, but its loop checks here
            Heartbeat(run.heartbeat(0)).stop = signal.SIGTERM
        print(
            f"{run}: process {writer.pid} is asked to stop at its next step, with a checkpoint; "
            f"to end it at once: dtrain cancel --now {run}",
            file=sys.stderr,
        )
    _send(process, signal.SIGCONT)  # Ctrl-Z may have stopped it


def _send(process: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it has ended meanwhile
        signal.pidfd_send_signal(process, number)


def _say_outcome(run: RunDir) -> int:
    status = read_status(run)
    where = f"in {position(status)}"
    if status["state"] == "finished":
        print(f"{run} finished before it could stop")
        return 0
    if status["state"] == "failed":
        print(f"{run} failed {where}")
        if status.get("error"):
            print(headline(status["error"], run))
        return 1
    saved = ", with a checkpoint" if status["state"] == "stopped" else "; nothing after the last checkpoint was saved"
    print(f"{run} was {status['state']} {where}{saved}")
    if run.job.exists():
        print(f"to continue: {_continuation(run)}")
    return 0


def _continuation(run: RunDir) -> str:
    """How to continue the run on as many ranks: a command, or words for a script, whose arguments are unknown."""
    is_job = re.search("^fit:", run.job.read_text(encoding="utf-8"), re.MULTILINE)
    if is_job:
        return Request((str(run.job),), RankOptions(str(run.ranks_of_checkpoint() or "auto"))).continuation(run)
    writer = run.last_writer()
    if writer is not None and writer.is_agent:
        return f"the original command, with --resume {shlex.join(['--run-dir', str(run)])}"
    return f"the script again, with Trainer(..., run_dir={str(run)!r}, resume=True)"
