"""`dtrain check --exact`: verifies dtrain's promises on a job's own first steps."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.errors import UserError
from dtrain.run.folder import EXIT_STOPPED, RunDir
from dtrain.run.rank_request import Rehearse
from dtrain.schema.job import Job, LoadedJob

from ..agent.scratch_run import new_run, run_request, scratch_folder
from ..machine.devices import choose_processes, threads_per_rank

SIZES = (1, 2, 3)
STOP_AFTER = 3  # steps, of 6 in an epoch


@dataclass(frozen=True)
class Difference:
    """The largest difference between two rehearsals: of a weight, relative to its tensor's largest, or of a value."""

    size: float
    where: str

    def __str__(self) -> str:
        return f"{self.size:.1e} ({self.where})" if self.size else "none"


def check_exact(loaded: LoadedJob) -> int:
    """Rehearse a valid job on 1, 2 and 3 processes and with a stop, and print what differs.

    After `preload_job` for that many processes.

    0 if everything was as promised, 1 if the stop changed the result on the CPU.

    Raises:
        RanksFailed: a rehearsal failed.
    """
    from dtrain.schema.loading import dump_job

    job = _on_enough_devices(loaded.job)
    with scratch_folder() as scratch:
        return _compare(loaded, job, _Rehearsals(scratch, dump_job(job), str(loaded.folder.absolute())))


def _compare(loaded: LoadedJob, job: Job, rehearsals: _Rehearsals) -> int:
    print(f"{loaded.path}: two epochs of its first batches, on {job.launch.device}")
    runs = [rehearsals.run(f"{size}-ranks", size) for size in SIZES]
    for size, run in zip(SIZES[1:], runs[1:], strict=True):
        weights, values = _difference(_weights(runs[0]), _weights(run)), _difference(_values(runs[0]), _values(run))
        print(f"{size} processes against 1: largest difference in weights {weights}, in reported values {values}")
    stopped = rehearsals.run("stopped", 2, stop_after=STOP_AFTER)
    trace = max(
        _difference(_weights(runs[1]), _weights(stopped)),
        _difference(_values(runs[1]), _values(stopped)),
        key=lambda difference: difference.size,
    )
    what = f"largest difference {trace}" if trace.size else "bit-identical"
    print(f"2 processes, stopped after {STOP_AFTER} steps and continued: {what}")
    if apart := json.loads(runs[0].answer.read_text(encoding="utf-8")):
        print(
            f"each process has its own {' and '.join(apart)}: on other numbers of processes runs are similar, not equal"
        )
    return int(trace.size > 0 and job.launch.device == "cpu")


def _on_enough_devices(job: Job) -> Job:
    """The job on GPUs if there is one per process, otherwise on the CPU."""
    try:
        _, device = choose_processes(str(max(SIZES)), job.launch.device)
    except UserError as error:
        print(f"on the CPU instead: {error}", file=sys.stderr)
        device = "cpu"
    # torch has no SyncBatchNorm on the CPU.
    fit = job.fit if device == "cuda" else job.fit.model_copy(update={"sync_batchnorm": False})
    return job.model_copy(update={"launch": job.launch.model_copy(update={"device": device}), "fit": fit})


class _Rehearsals:
    """Rehearsals, in a temporary folder."""

    def __init__(self, folder: Path, job: str, code: str) -> None:
        self._folder = folder
        self._job = job
        self._code = code

    def run(self, name: str, num_ranks: int, stop_after: int = 0) -> RunDir:
        """Rehearse to the end, with a stop if asked for."""
        run = new_run(self._folder / name, self._job)
        if not stop_after or self._start(run, num_ranks, stop_after) == EXIT_STOPPED:
            self._start(run, num_ranks, 0)
        return run

    def _start(self, run: RunDir, num_ranks: int, stop_after: int) -> int:
        request = Rehearse(self._code, stop_after)
        # The same number of threads for any number of ranks: torch's sums depend on it.
        num_threads = threads_per_rank(max(SIZES))
        code = run_request(run, request, num_ranks, num_threads, (EXIT_STOPPED,))
        if code == EXIT_STOPPED and not stop_after:
            raise KeyboardInterrupt
        return code


def _weights(run: RunDir) -> dict[str, Any]:
    import torch

    weights: dict[str, Any] = torch.load(run.last_weights, weights_only=True)
    return {name: value.double() for name, value in weights.items() if value.numel()}


def _values(run: RunDir) -> dict[str, Any]:
    """The values in the rows, except for the speed."""
    import torch

    return {
        f"{name} of row {number}": torch.tensor(value, dtype=torch.float64)
        for number, row in enumerate(run.rows(), 1)
        for name, value in row.items()
        if name != "samples_per_s" and value is not None and not isinstance(value, str)
    }


def _difference(ones: Mapping[str, Any], others: Mapping[str, Any]) -> Difference:
    found = [Difference(0.0, "")]
    for name, one in ones.items():
        apart = (one - others[name]).abs().max()
        if apart > 0 or apart.isnan() != one.isnan().any():
            found.append(Difference(float(apart / one.abs().max().clamp(min=1e-12)), name))
    return max(found, key=lambda difference: difference.size)
