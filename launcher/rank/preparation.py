"""What is done once for all ranks before they start: importing modules, checking the job, choosing the device."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dtrain.errors import Problem, UserError

from ..machine.devices import choose_processes, expected_ranks, num_processes, threads_per_rank
from .fork_server import start_fork_server

if TYPE_CHECKING:
    from dtrain.schema.job import Job, LoadedJob, ScriptJob

# What the fork server imports for all ranks: always, or if the job or the script mentions it. None of
# it touches CUDA. The user's own modules never belong here: they may touch it.
PRELOAD = ("torch", "torch._dynamo")  # optimizers import the latter
TRAINER = ("dtrain.trainer.trainer", "dtrain.trainer.strategies.ddp", "dtrain.trainer.checkpoint.storage")
PRELOAD_FOR = {
    "_target_": (*TRAINER, "dtrain.schema.loading", "dtrain.schema.instantiate"),
    "dtrain": TRAINER,
    "torchmetrics": ("dtrain.trainer.metrics.metric_set",),
    "torchvision": ("torchvision",),
}

_IN_CODE = re.compile(r"\S+\.py:\d+: ")  # a message with a line of the user's code


@dataclass(frozen=True)
class Prepared:
    """Ranks that can be started on this machine.

    Attributes:
        job: as the run folder's job.yaml holds it, with defaults, overrides and the device.
    """

    num_ranks: int
    device: Literal["cpu", "cuda"]
    job: str

    @property
    def num_threads(self) -> int:
        """Of each rank."""
        return threads_per_rank(self.num_ranks)

    def __str__(self) -> str:
        return num_processes(self.num_ranks, self.device)


def prepare(loaded: LoadedJob, code: Path, gpus: str, *, preload: bool = True, begins: bool = True) -> Prepared:
    """Check a job and choose its ranks, while their modules are being imported.

    Args:
        code: the folder of the job's own modules.
        gpus: as given to `dtrain launch`.
        preload: whether the ranks will be forked from the server that this starts.
        begins: whether a run begins with them, rather than continue or answer.

    Raises:
        UserError: all mistakes in the job, or what these devices can't do.
    """
    if preload:  # before the job's modules are imported, which may use CUDA
        preload_job(loaded.job, expected_ranks(gpus))
    require_right(loaded, code, begins=begins)
    num_ranks, device = choose_processes(gpus, loaded.job.launch.device)
    if device == "cpu" and (problems := list(only_for_gpus(loaded.job, num_ranks))):
        raise UserError([loaded.at(problem) for problem in problems])
    return Prepared(num_ranks, device, resolved(loaded.job, device))


def preload_job(job: Job, num_ranks: int) -> None:
    """Start the fork server for a job. Before its modules are imported: see `start_fork_server`."""
    from dtrain.schema.loading import dump_job

    start_fork_server(preload_for(dump_job(job)), threads_per_rank(num_ranks))


def preload_for(text: str) -> list[str]:
    """The modules that this job's or script's ranks will need and that may be imported before the fork."""
    return [*PRELOAD, *(module for word, modules in PRELOAD_FOR.items() if word in text for module in modules)]


def require_right(loaded: LoadedJob, code: Path, *, begins: bool = True) -> None:
    """Raise UserError with all that is wrong with the job's targets; `code` holds its modules, which are imported."""
    from dtrain.schema.instantiate import check_job

    with redirect_stdout(sys.stderr):  # stdout is for results, not for what the user's modules print
        problems = _each_once(check_job(loaded, code, begins=begins))
    if problems:
        raise UserError(problems)


def _each_once(problems: list[Problem]) -> list[Problem]:
    """Without repetitions: a module that can't be imported is reported for each target in it."""
    found: dict[object, Problem] = {}
    for problem in problems:
        found.setdefault(problem.message if _IN_CODE.match(problem.message) else id(problem), problem)
    return list(found.values())


def only_for_gpus(job: Job, num_ranks: int) -> Iterator[Problem]:
    """What the job asks for that CPU processes can't do."""
    if job.fit.sync_batchnorm and num_ranks > 1:
        yield Problem("needs CUDA: torch has no SyncBatchNorm on the CPU", "fit.sync_batchnorm")
    if job.fit.precision == "fp16":
        yield Problem("fp16 needs a GPU; on the CPU use bf16", "fit.precision")
    if job.fsdp.offload:
        yield Problem("moves GPU state to CPU memory, but there is no GPU here", "fsdp.offload")


def resolved(job: Job | ScriptJob, device: Literal["cpu", "cuda"]) -> str:
    """What the run folder's job.yaml holds: defaults and overrides included."""
    from dtrain.schema.loading import dump_job

    return dump_job(job.model_copy(update={"launch": job.launch.model_copy(update={"device": device})}))
