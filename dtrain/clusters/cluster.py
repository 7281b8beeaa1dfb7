"""The cluster interface behind `dtrain launch`, `sweep`, `status`, `cancel` and `check`; each cluster is a module."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dtrain.errors import Problem
from dtrain.files import read_json, write_json
from dtrain.run.folder import RunDir

if TYPE_CHECKING:
    from dtrain.schema.job import Job, ScriptJob

# Section name in job.yaml: module, whose `cluster` is the Cluster.
TABLE = {"slurm": "dtrain.slurm.cluster"}


@dataclass(frozen=True)
class Gpus:
    """GPUs of each node: how many, and of which type, such as `a100`."""

    count: int
    kind: str | None = None

    @classmethod
    def parse(cls, text: str) -> Gpus | None:
        """Parse `4` or `a100:4`; None if it is neither."""
        kind, _, count = text.rpartition(":")
        if not (count.isdecimal() and int(count) > 0) or (":" in text and not re.fullmatch(r"[\w.-]+", kind)):
            return None
        return cls(int(count), kind or None)

    def __str__(self) -> str:
        return f"{self.kind}:{self.count}" if self.kind else str(self.count)


@dataclass(frozen=True)
class Array:
    """Several runs in one submission, in the folders with these numbers in one folder."""

    numbers: Sequence[int]
    max_parallel: int | None = None


@dataclass(frozen=True)
class Submittable:
    """What to submit: a job or a script, and the nodes and GPUs that it requests.

    Attributes:
        origin: the folder whose code the run folder gets.
        dtrain: the command line that starts dtrain here.
        options: further options for each node's `dtrain launch`.
        target: what each node launches, with its arguments; None: the job.yaml of the run folder.
    """

    name: str
    job: Job | ScriptJob | None
    origin: Path
    nodes: int
    gpus: Gpus
    dtrain: Sequence[str]
    options: Sequence[str] = ()
    target: Sequence[str] | None = None

    @property
    def is_on_cpu(self) -> bool:
        """Whether it requests CPUs and no GPUs."""
        return self.job is not None and self.job.launch.device == "cpu"


@dataclass(frozen=True)
class Submission:
    """A rendered submission: a file in the run folder, and the command that takes it."""

    command: Sequence[str]
    file: Path
    text: str


class QueuedJob(ABC):
    """A job as the cluster reports it."""

    @property
    @abstractmethod
    def is_running(self) -> bool: ...

    @property
    @abstractmethod
    def is_over(self) -> bool: ...

    @abstractmethod
    def in_words(self) -> str:
        """Its state in plain words."""


@dataclass(frozen=True)
class Findings:
    """What is in order or could not be checked, and what is wrong."""

    notes: list[str]
    problems: list[Problem]


class Cluster(ABC):
    """Something that runs jobs on its nodes. Each method raises UserError if it is missing or does not answer.

    Attributes:
        name: of its section in job.yaml.
        title: its name in messages.
    """

    name: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def render(self, wanted: Submittable, run: RunDir, folder: Path, array: Array | None = None) -> Submission:
        """What to submit from `folder`, the working directory, for a run folder. Both are absolute; nothing is written.

        Args:
            run: with `array`, the folder of its run folders.
        """

    @abstractmethod
    def submit(self, submission: Submission) -> str:
        """Submit it, once its file is written; the job's number. Raises UserError if the cluster refuses."""

    @abstractmethod
    def part(self, job_id: str, number: int) -> str:
        """The number of the job that an array's run has."""

    @abstractmethod
    def look_up(self, job_id: str) -> QueuedJob | None:
        """The job's current or recorded state; None if the cluster no longer knows it."""

    @abstractmethod
    def ask_to_stop(self, job_id: str) -> None:
        """Ask the agents to stop at the next step with a checkpoint; the job is not restarted."""

    @abstractmethod
    def end(self, job_id: str) -> None:
        """End the job at once; it is not restarted."""

    @abstractmethod
    def log(self, run: RunDir) -> Path:
        """Where the job's output goes."""

    @abstractmethod
    def check(self, wanted: Submittable, run: RunDir, folder: Path) -> Findings:
        """What the cluster and a node find wrong with a rendered submission, before it waits in a queue."""


def named(name: str) -> Cluster:
    """The cluster of that section."""
    found = import_module(TABLE[name]).cluster
    assert isinstance(found, Cluster)
    return found


@dataclass(frozen=True)
class Submitted:
    """The job that a run was submitted as."""

    cluster: Cluster
    job_id: str

    def __str__(self) -> str:
        return f"{self.cluster.title} job {self.job_id}"

    def look_up(self) -> QueuedJob | None:
        """As `Cluster.look_up`."""
        return self.cluster.look_up(self.job_id)


def submitted(run: RunDir) -> Submitted | None:
    """The job that this run was submitted as; None if it was not submitted."""
    for name in TABLE:
        job_id = (read_json(run.submitted(name)) or {}).get("job_id")
        if isinstance(job_id, str):
            return Submitted(named(name), job_id)
    return None


def submitted_file(run: RunDir) -> Path | None:
    """The file that tells which job the run was submitted as, if it was."""
    return next((file for name in TABLE if (file := run.submitted(name)).exists()), None)


def note_submitted(run: RunDir, cluster: Cluster, job_id: str) -> None:
    """Note the job that the run was submitted as."""
    write_json(run.submitted(cluster.name), {"job_id": job_id})
