"""`dtrain logs`: a rank's output, byte for byte, so that it can be piped."""

from __future__ import annotations

import errno
import os
import select
import sys

from dtrain.errors import UserError
from dtrain.monitoring.rank_output import Tail
from dtrain.run.folder import EXIT_INTERRUPTED, RunDir

from .status import read_status

LOOK_EVERY_S = 0.1


def logs(path: str, rank: int, follow: bool) -> int:
    """Print the rank's log to stdout, tracebacks included; with `follow`, also what is added until the run has ended.

    Raises:
        UserError: there is no run, or no log of this rank.
    """
    run = RunDir(path)
    status = read_status(run)
    _check_rank(run, rank)
    log = Tail(run.rank_log(rank))
    try:
        while True:
            # Read before the log: to that of a run that has ended nothing is added.
            status = run.status() if follow else status
            has_ended = status.get("state") != "running"
            while new := log.read():
                _write(new)
            if has_ended or not follow:
                break
            _pause()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    if not run.rank_log(rank).exists():
        raise UserError(f"rank {rank} of {run} has printed nothing yet" + ("" if has_ended else "; -f waits for it"))
    failed = (status.get("error") or {}).get("rank", rank)
    if failed != rank:
        print(f"rank {failed} failed first: dtrain logs {run} --rank {failed}", file=sys.stderr)
    return 0


def _check_rank(run: RunDir, rank: int) -> None:
    ranks = run.ranks()
    if rank not in ranks:
        raise UserError(f"{run} has no rank {rank}; it has {', '.join(map(str, ranks)) or 'none yet'}")
    writer = run.last_writer()
    if not run.rank_log(rank).exists() and writer is not None and not writer.is_agent:
        raise UserError(
            f"{run} has no logs: its script was started without dtrain launch, so its output went to that terminal"
        )


def _write(text: bytes) -> None:
    # Straight to the descriptor: nothing must be left in a buffer when the reader goes away.
    left = memoryview(text)
    while left:
        left = left[os.write(sys.stdout.fileno(), left) :]


def _pause() -> None:
    """Wait a moment; raises BrokenPipeError as soon as nobody reads stdout any more."""
    reader = select.poll()
    reader.register(sys.stdout.fileno(), 0)  # errors only
    if reader.poll(LOOK_EVERY_S * 1000):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
