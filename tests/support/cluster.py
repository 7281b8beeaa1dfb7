"""A Slurm cluster of two nodes on this machine, for tests: see slurm/devcluster."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from command import DTRAIN, PATIENCE_S, RANK_VARIABLES, Done, Project
from training import timeless

PROGRAM = Path(__file__).parents[2] / "slurm" / "devcluster" / "cluster.py"
UNAVAILABLE = 3  # the program's exit code where Slurm can't run
SIZE = ("--nodes", "2", "--gpus", "2")
# A job that is requeued is in none of these.
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}


class Unavailable(Exception):
    """Why this machine can't run Slurm."""


def control(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What a developer would type for the cluster in that folder."""
    command = [sys.executable, str(PROGRAM), *arguments, "--folder", str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


class Cluster:
    """A running cluster: nodes `node0` and `node1`, of 4 CPUs and 2 GPUs each.

    Attributes:
        environment: For processes that are to find the cluster; nothing in it is of a job.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        foreign = ("SLURM", "SBATCH_", "SRUN_", "SQUEUE_", "SINFO_", "SCANCEL_", "CUDA_VISIBLE_DEVICES")
        self.environment = {
            key: value for key, value in os.environ.items() if not key.startswith(foreign) and key not in RANK_VARIABLES
        }
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")

    def run(self, *command: str, cwd: Path | None = None, stdin: str = "") -> str:
        """What a command prints."""
        done = subprocess.run(command, env=self.environment, cwd=cwd, input=stdin, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def sbatch(self, script: str, *options: str, cwd: Path) -> str:
        """The number of a new job that runs these lines of bash there."""
        return self.run("sbatch", "--parsable", *options, cwd=cwd, stdin=f"#!/bin/bash\n{script}\n").strip()

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job, also for minutes after its end: JobState, Reason, Restarts, ExitCode ..."""
        fields = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def wait(self, job: str, *states: str) -> dict[str, str]:
        """`job`, as soon as it is in one of these states. Fails at once if it ends in another."""
        self.until(lambda: self.state(job) in ENDED.union(states), lambda: f"{self.job(job)}\n{self.run('sinfo')}")
        found = self.job(job)
        assert found["JobState"] in states, found
        return found

    def until(self, condition: Callable[[], object], what: Callable[[], str] = str) -> None:
        """Wait for something that a job brings about; `what` is said when it does not."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain: {what()}"
            time.sleep(0.1)

    def cancel(self, job: str) -> None:
        self.run("scancel", job)

    def near_limit(self, job: str) -> None:
        """What Slurm does ahead of the time limit, for `--signal=B:USR2@...`."""
        self.run("scancel", "--batch", "--signal=USR2", job)

    def kill_node(self, node: str) -> None:
        self._control("kill-node", node)

    def start_node(self, node: str) -> None:
        self._control("start-node", node)

    def _control(self, *arguments: str) -> None:
        done = control(self.folder, *arguments)
        assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def running() -> Iterator[Cluster]:
    """A new cluster.

    Raises:
        Unavailable: This machine can't run one.
    """
    # Not pytest's temporary folder: Slurm's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="dtrain-slurm-") as parent:
        folder = Path(parent) / "cluster"
        try:
            done = control(folder, "up")
            if done.returncode == UNAVAILABLE:
                raise Unavailable(done.stderr.strip())
            assert done.returncode == 0, done.stderr
            yield Cluster(folder)
        finally:
            done = control(folder, "down")
            assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Site:
    """A project on the cluster's login node. Jobs are no children of the commands that submit them."""

    project: Project
    cluster: Cluster

    def run(self, *arguments: str, within: tuple[str, ...] = (), **variables: str) -> Done:
        """A command of dtrain's, started by another one if `within` is that."""
        environment = {**self.project.environment, **self.cluster.environment, **variables}
        command = [*within, DTRAIN, *arguments]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        return Done(done.returncode, done.stdout, done.stderr)

    def submit(self, *overrides: str, size: tuple[str, ...] = SIZE, name: str = "run") -> str:
        """The number of the job of a new run."""
        done = self.run("launch", "--slurm", *size, "--run-dir", name, "job.yaml", *overrides)
        assert done.code == 0, done.err
        return done.err.split("Slurm job ")[1].split()[0]

    @property
    def folder(self) -> Path:
        return self.project.folder

    def log(self, name: str = "run") -> str:
        file = self.project.run_dir(name).logs / "slurm.log"
        return file.read_text() if file.exists() else ""

    def until_waiting(self) -> None:
        self.cluster.until((self.folder / "waiting").exists, self.log)

    def go_on(self) -> None:
        """Let the waiting ranks go on, and those that come after them."""
        (self.folder / "go").touch()

    def history(self, name: str = "run") -> list[dict[str, float]]:
        """The run's rows, without how fast it was."""
        rows = self.project.run_dir(name).rows()
        return [timeless(row) for row in rows]
