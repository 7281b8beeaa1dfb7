"""Slurm as one of the clusters that runs are submitted to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dtrain.clusters.cluster import Array, Cluster, Findings, QueuedJob, Submission, Submittable
from dtrain.errors import UserError
from dtrain.run.folder import RunDir
from dtrain.schema.sections import Slurm
from dtrain.stderr import say

from .check import check
from .jobs import ask_to_stop, end_job, look_up, submit
from .partition import cpus_beside
from .render import BatchScript, render


class SlurmCluster(Cluster):
    """Jobs by sbatch."""

    name = "slurm"
    title = "Slurm"

    def render(self, wanted: Submittable, run: RunDir, folder: Path, array: Array | None = None) -> Submission:
        """sbatch and its script."""
        batch = self._batch(wanted, run, folder, array)
        return Submission(("sbatch", *batch.arguments), run.sbatch, batch.script)

    def submit(self, submission: Submission) -> str:
        """Submit it, once its file is written; the job's number. Raises UserError if the cluster refuses."""
        return submit(submission.command, submission.file)

    def part(self, job_id: str, number: int) -> str:
        """NUMBER_TASK."""
        return f"{job_id}_{number}"

    def look_up(self, job_id: str) -> QueuedJob | None:
        """In the queue, or in the accounts."""
        return look_up(job_id)

    def ask_to_stop(self, job_id: str) -> None:
        """By a signal to the agents."""
        ask_to_stop(job_id)

    def end(self, job_id: str) -> None:
        """scancel."""
        end_job(job_id)

    def log(self, run: RunDir) -> Path:
        """What the batch script and the agents print."""
        return run.slurm_log

    def check(self, wanted: Submittable, run: RunDir, folder: Path) -> Findings:
        """By sbatch --test-only, scontrol, and srun on a node."""
        slurm = _section(wanted)
        gpus = None if wanted.is_on_cpu else wanted.gpus
        batch = self._batch(wanted, run, folder)
        return check(batch, slurm, folder, wanted.nodes, gpus, dtrain_command(slurm, wanted.dtrain))

    def _batch(self, wanted: Submittable, run: RunDir, folder: Path, array: Array | None = None) -> BatchScript:
        slurm = _section(wanted)
        dtrain = dtrain_command(slurm, wanted.dtrain)
        cpus = None if wanted.is_on_cpu else _cpus(wanted, slurm)
        return render(wanted, slurm, run.path, folder, dtrain=dtrain, array=array, cpus=cpus)


def _section(wanted: Submittable) -> Slurm:
    return Slurm() if wanted.job is None else wanted.job.slurm


def dtrain_command(slurm: Slurm, own: Sequence[str]) -> list[str]:
    """dtrain's command on a node: the same as here, or the one in the container, or which the job names."""
    if slurm.dtrain is not None:
        return [slurm.dtrain]
    return ["dtrain"] if slurm.is_in_container else list(own)


def _cpus(wanted: Submittable, slurm: Slurm) -> int | None:
    try:
        return cpus_beside(wanted.gpus, slurm.options)
    except UserError as error:
        say(f"warning: {error}; the job may get one CPU for all its GPUs; set slurm.cpus-per-gpu")
        return None


cluster = SlurmCluster()
