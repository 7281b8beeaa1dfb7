"""The run folder: every path of a run, its status, its history, and the lock of its one writer."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dtrain.files import read_json, write_json, write_text
from dtrain.run import node_disk
from dtrain.run.lock import Locked

RUN_DIR_VARIABLE = "DTRAIN_RUN_DIR"  # tells a rank, and a script's Trainer, which run it belongs to
# In a rank's log: what follows is for the log's reader, not for the screen.
END_OF_OUTPUT = "dtrain: the run has failed, because of the following"
STACKS, END_OF_STACKS = "dtrain: where this rank stands", "dtrain: it goes on"  # and so is everything between these two
CHECKPOINT_PART = "rank-{}.bin"  # what a rank has written of a checkpoint
EXIT_STOPPED = 75  # at a step boundary, with a checkpoint saved (sysexits.h: EX_TEMPFAIL)
EXIT_INTERRUPTED = 130  # by Ctrl-C, as shells have it: 128 + SIGINT

# Of one moment: phase ("train", "val" or "train+val"), epoch, step, time, lr, samples_per_s, train_loss, train_*,
# val_loss, val_*. The epoch is a fraction within one.
Row = dict[str, Any]


class RunDir(Locked):
    """A run's folder. Constructing it touches nothing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.job = self.path / "job.yaml"
        self.code = self.path / "code"
        self.status_file = self.path / "status.json"
        self.metrics = self.path / "metrics.jsonl"
        self.logs = self.path / "logs"
        self.heartbeats = self.path / "heartbeat"  # a link to a folder on each node's own disk
        self.best_weights = self.path / "weights" / "best.pt"
        self.last_weights = self.path / "weights" / "last.pt"
        self.ema_weights = self.path / "weights" / "ema.pt"
        self.swa_weights = self.path / "weights" / "swa.pt"
        self.pictures = self.path / "pictures"
        self.profile = self.path / "profile"
        self.test = self.path / "test.json"  # the best weights' results on the test set, by their names
        self.plots = self.path / "plots"
        self.answer = self.path / "answer.txt"  # from ranks that serve a command rather than train
        self.checkpoints = self.path / "checkpoints"
        self.latest = self.checkpoints / "latest"  # the name of the newest one
        self.env = self.path / "env.json"
        self.sbatch = self.path / "job.sbatch"
        self.slurm_log = self.logs / "slurm.log"
        self.fits_file = self.path / "fits.json"
        self.lock_file = self.path / "lock"

    @classmethod
    def new(cls, name: str) -> RunDir:
        """An unused name under runs/ in the working directory: NAME-YYYYMMDD-HHMMSS-xxxx."""
        return cls(Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")

    def __str__(self) -> str:
        return str(self.path)

    def absolute(self) -> RunDir:
        """The same folder, whatever becomes of the working directory."""
        return RunDir(self.path.absolute())

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def rank_error(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.error.json"

    def last_word(self, rank: int) -> Path:
        """Where a rank leaves what becomes its `rank_error`, for its node's agent, which polls it."""
        return self.heartbeats / f"rank-{rank}.error.json"

    def record_request(self, rank: int) -> Path:
        """The pipe by which a rank is asked for its `flight_record`."""
        return self.heartbeats / f"rank-{rank}.pipe"

    def flight_record(self, rank: int) -> Path:
        """A rank's last collectives, where it hung."""
        return self.logs / f"rank-{rank}.collectives.json"

    def submitted(self, cluster: str) -> Path:
        """Tells which job of that cluster the run is: `slurm.json`."""
        return self.path / f"{cluster}.json"

    def agent_log(self, node: int) -> Path:
        return self.logs / f"agent-{node}.log"

    def heartbeat(self, rank: int) -> Path:
        return self.heartbeats / f"rank-{rank}"

    def ranks(self) -> list[int]:
        """The ranks that this run has had, in order."""
        files = [*self.heartbeats.glob("rank-*"), *self.logs.glob("rank-*.log")]  # the former while it is running here
        names = {file.name.removeprefix("rank-").removesuffix(".log") for file in files}
        return sorted(int(name) for name in names if name.isdecimal())

    def ranks_of_checkpoint(self) -> int:
        """The number of ranks that wrote the newest checkpoint; 0 where there is none."""
        if not self.latest.exists():
            return 0
        return len(list(self.checkpoints.glob(f"{self.latest.read_text().strip()}/{CHECKPOINT_PART.format('*')}")))

    def exists(self) -> bool:
        """Whether it contains anything that a new run must not overwrite."""
        return self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))

    def create(self) -> None:
        """Create the folders; existing ones are left as they are.

        The run and everything in it belong to its owner and their group (or as the umask says): others can't
        enter its folder.
        """
        self.path.mkdir(mode=0o750, parents=True, exist_ok=True)
        for folder in (self.logs, self.best_weights.parent, self.checkpoints):
            if folder.is_symlink() and not folder.exists():  # a fit's, of a script's run that is gone
                folder.unlink()
            folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        node_disk.link(self.heartbeats)

    # -- the later fits of a script that was launched --------------------------------------------

    def fit(self, number: int) -> RunDir:
        """The folder of this script's fit number `number`, where it is given none."""
        return RunDir(self.path / f"fit-{number}")

    def fits(self) -> list[RunDir]:
        """The run folders of this script's fits except the one in this folder, in order."""
        names = (read_json(self.fits_file) or {}).get("fits", [])
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            warn_of_damage(self.fits_file)
            return []
        return [RunDir(os.path.normpath(self.path / name)) for name in names]

    def add_fit(self, fit: RunDir) -> None:
        """Record that a fit of this script has its folder there."""
        fits = [*self.fits(), fit]
        names = dict.fromkeys(os.path.relpath(each.path.absolute(), self.path.absolute()) for each in fits)
        write_json(self.fits_file, {"fits": list(names)})

    def take_heartbeats(self, script: RunDir | None) -> None:
        """Have the ranks' heartbeats be those of the script's run, where its agent looks; of its own without one.

        So are their logs.
        """
        if script is None:
            node_disk.link(self.heartbeats)
        else:
            if self.heartbeats.is_symlink():
                self.heartbeats.unlink()
            shutil.rmtree(self.heartbeats, ignore_errors=True)
            _link(self.heartbeats, script.heartbeats)
            with contextlib.suppress(OSError):  # it has logs, as a run by itself
                self.logs.rmdir()
                _link(self.logs, script.logs)

    # -- history ---------------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """The rows of metrics.jsonl; a damaged line is reported once and skipped."""
        return RowReader(self).new()

    def last_row(self) -> Row | None:
        """The last of `rows`; the others are read only if the file's end is damaged."""
        with contextlib.suppress(OSError):
            row = _parse_row(self.metrics.read_bytes().rstrip().rpartition(b"\n")[2])
            if row is not None:
                return row
        return next(reversed(self.rows()), None)

    def write_rows(self, rows: Sequence[Row]) -> None:
        """Replace metrics.jsonl."""
        write_text(self.metrics, _lines(rows))

    def append_rows(self, rows: Sequence[Row]) -> None:
        """Add rows to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(_lines(rows))
            file.flush()
            os.fsync(file.fileno())

    def test_values(self) -> dict[str, Any]:
        """The results on the test set; empty where there are none."""
        return read_json(self.test) or {}

    # -- status ----------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """status.json, corrected: "running" without a live writer reads as "killed".

        Empty if there is no run. If the file is damaged, which is reported once, the history gives the position.
        """
        status = self._read_status()
        if status.get("state") == "running" and self.writer() is None:
            # The writer may have finished between the two checks.
            status = self._read_status()
            if status.get("state") == "running":
                status["state"] = "killed"
        return status

    def _read_status(self) -> dict[str, Any]:
        status = read_json(self.status_file) or {}
        if self.has_damaged_status():
            warn_of_damage(self.status_file)
            last = self.last_row() or {}
            return {"state": "running", "epoch": int(last.get("epoch", 0)), "step": last.get("step", 0)}
        return status

    def has_damaged_status(self) -> bool:
        """Whether there is a status.json, and not what is written there."""
        return self.status_file.exists() and not _is_status(read_json(self.status_file) or {})


def _link(own: Path, other: Path) -> None:
    own.symlink_to(os.path.relpath(other.absolute(), own.parent.absolute()))


class RowReader:
    """Reads a run's rows as they are added, each line once."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._file: tuple[int, int] | None = None  # which one was read
        self._read = 0  # bytes
        self._lines = 0

    def new(self) -> list[Row]:
        """The rows since the last call: all, if the file was written anew. Damaged lines are skipped."""
        try:
            with self._run.metrics.open("rb") as file:
                stat = os.fstat(file.fileno())
                if self._file != (which := (stat.st_dev, stat.st_ino)) or stat.st_size < self._read:
                    self._file, self._read, self._lines = which, 0, 0
                file.seek(self._read)
                added = file.read()
        except FileNotFoundError:
            return []
        whole = added[: added.rfind(b"\n") + 1]
        if whole != added and self._run.writer() is None:  # a row that nobody is about to finish
            whole = added
        self._read += len(whole)
        return list(self._parse(whole))

    def _parse(self, lines: bytes) -> Iterator[Row]:
        for line in lines.splitlines():
            self._lines += 1
            row = _parse_row(line)
            if row is None:
                warn_of_damage(f"{self._run.metrics}:{self._lines}")
            else:
                yield row


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _parse_row(line: bytes) -> Row | None:
    """A line of metrics.jsonl; None where it is no row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and isinstance(row.get("epoch"), int | float) and isinstance(row.get("step"), int)
    return row if is_row else None


def _is_status(value: dict[str, Any]) -> bool:
    """Whether it has what status.json always has."""
    numbers = (value.get("epoch"), value.get("step"), value.get("fit", 1), value.get("restarts", 0))
    error = value.get("error") or dict.fromkeys(("rank", "type", "message", "traceback"))
    is_error = isinstance(error, dict) and {"rank", "type", "message", "traceback"} <= error.keys()
    return isinstance(value.get("state"), str) and all(isinstance(each, int) for each in numbers) and is_error


_damaged: set[str] = set()  # what this process has reported


def warn_of_damage(place: str | Path) -> None:
    """Warn, once, that what is there is skipped."""
    if str(place) not in _damaged:
        _damaged.add(str(place))
        with contextlib.suppress(OSError):
            print(f"warning: {place}: damaged, so it is skipped", file=sys.stderr)
