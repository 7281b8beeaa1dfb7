"""Slurm's commands: submit a job, look it up, end it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.clusters.cluster import QueuedJob
from dtrain.errors import Problem, UserError
from dtrain.schema import sbatch

from .command import ask

_OVER = {  # man squeue; a job in any other state may still run
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
    *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
}
# squeue's reasons in plain words; others are shown as they are.
REASONS = {
    "None": "about to start",
    "Priority": "waiting: jobs of higher priority are ahead",
    "Resources": "waiting for free nodes or GPUs",
    "Dependency": "waiting for the jobs it depends on",
    "DependencyNeverSatisfied": "never: a job it depends on has failed (slurm.dependency)",
    "BeginTime": "waiting for its start time",
    "JobHeldUser": "held by you: scontrol release JOB",
    "JobHeldAdmin": "held by an administrator",
    "ReqNodeNotAvail": "a node it needs is down or reserved",
    "PartitionDown": "its partition is down",
    "PartitionTimeLimit": "never: more time than the partition allows (slurm.time)",
    "PartitionNodeLimit": "never: more nodes than the partition allows (--nodes)",
    "AssocGrpGRES": "your account's share of GPUs is in use",
    "QOSMaxJobsPerUserLimit": "you are running as many jobs as the QOS allows",
    "QOSMaxGRESPerUser": "your jobs use as many GPUs as the QOS allows",
    "AssociationJobLimit": "your account is running as many jobs as allowed",
    "Licenses": "waiting for a license",
    "launch failed requeued held": "held: it could not be started (scontrol release JOB tries again)",
}


@dataclass(frozen=True)
class SlurmJob(QueuedJob):
    """A job as Slurm's queue shows it."""

    job_id: str
    state: str  # such as PENDING, RUNNING, COMPLETING
    reason: str
    nodes: str
    start: str  # expected or true; N/A where Slurm doesn't know

    @property
    def is_running(self) -> bool:
        return self.state == "RUNNING"

    @property
    def is_over(self) -> bool:
        return self.state in _OVER

    def in_words(self) -> str:
        """Its state in plain words."""
        if self.state == "PENDING":
            name = self.reason.strip("()")
            why = REASONS.get(name) or next((REASONS[each] for each in REASONS if name.startswith(f"{each},")), name)
            start = "" if self.start in ("N/A", "Unknown") else f"; expected to start {self.start.replace('T', ' ')}"
            return f"queued: {why.replace('JOB', self.job_id)}{start}"
        return f"{self.state.lower().replace('_', ' ')} on {self.nodes}" if self.nodes else self.state.lower()


def submit(command: Sequence[str], script: Path) -> str:
    """Call sbatch with a script, from that file; the job's number.

    Raises:
        UserError: Slurm is not there, or refuses, in its own words.
    """
    done = ask(*command, str(script))
    if done.returncode != 0:
        version = ask("sbatch", "--version").stdout.split()[-1]  # after a name, which packagers change
        raise _refused(done, sbatch.unknown_to(version, command[1:]))
    return done.stdout.strip().splitlines()[-1].partition(";")[0]  # --parsable: number;cluster


def look_up(job_id: str) -> SlurmJob | None:
    """The job in the queue, or from accounting; None if Slurm no longer knows it.

    Raises:
        UserError: Slurm is not there, or does not answer.
    """
    done = ask("squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T|%r|%N|%S")
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        raise _refused(done)
    if done.returncode != 0 or not done.stdout.strip():  # ended some minutes ago
        return _look_up_in_accounts(job_id)
    state, reason, nodes, start = done.stdout.splitlines()[0].split("|", 3)
    return SlurmJob(job_id, state, reason, nodes, start)


def _look_up_in_accounts(job_id: str) -> SlurmJob | None:
    if shutil.which("sacct") is None:
        return None
    options = ["--noheader", "--allocations", "--parsable2", "--format=State,NodeList"]
    done = ask("sacct", *options, f"--jobs={job_id}")
    if done.returncode != 0 or not done.stdout.strip():  # many clusters keep no accounts
        return None
    state, nodes = done.stdout.splitlines()[-1].split("|", 1)
    return SlurmJob(job_id, state.split()[0], "", nodes, "")  # CANCELLED by 1000


def ask_to_stop(job_id: str) -> None:
    """Ask the agents to stop at the next step with a checkpoint; nothing is started again.

    By SIGINT: the batch script may take a SIGTERM for preemption.

    Raises:
        UserError: Slurm is not there, or refuses.
    """
    done = ask("scancel", "--signal=INT", job_id)
    if done.returncode != 0:
        raise _refused(done)


def end_job(job_id: str) -> None:
    """scancel: the job is not restarted, and what still runs is killed after Slurm's KillWait.

    Raises:
        UserError: Slurm is not there, or refuses.
    """
    done = ask("scancel", job_id)
    if done.returncode != 0:
        raise _refused(done)


def _refused(done: subprocess.CompletedProcess[str], because: Sequence[str] = ()) -> UserError:
    """In Slurm's own words, and ours."""
    lines = [re.sub(r"^(\w+): (error|fatal): ", r"\1: ", line) for line in done.stderr.strip().splitlines()]
    lines = lines or [f"{done.args[0]} ended with {done.returncode}"]
    return UserError([Problem(line) for line in (*because, *lines)])
