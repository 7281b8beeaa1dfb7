"""`dtrain check --slurm`: what Slurm and a node would say of a submission, before it waits in the queue."""

from __future__ import annotations

import getpass
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from dtrain import __version__
from dtrain.errors import Problem
from dtrain.job import Slurm
from dtrain.sbatch import to_arguments

from .jobs import ask
from .render import Gpus, Submission, probe

IMMEDIATE_S = 30  # so long may the look at a node wait for one that is free
# Of the submission's options those that decide where its job may run.
_WHERE = ("account", "partition", "qos", "reservation", "constraint", "exclude", "nodelist", "clusters")


@dataclass(frozen=True)
class Findings:
    """What is as it should be or could not be looked at, and what is wrong."""

    notes: list[str]
    problems: list[Problem]


@dataclass(frozen=True)
class Partition:
    """A partition's limits, and of its nodes the most that one has."""

    name: str
    max_minutes: float | None
    max_nodes: int | None
    gpus: dict[str, int]  # by type; "" for those without one
    cpus: int


def check(submission: Submission, slurm: Slurm, folder: Path, nodes: int, gpus: Gpus | None, dtrain: str) -> Findings:
    """Look at everything.

    Args:
        folder: the working directory, in which runs are made.
        gpus: of each node; None on CPUs.
        dtrain: the command on the nodes.

    Raises:
        UserError: Slurm is not there, or does not answer.
    """
    found, options = Findings([], []), slurm.options
    done = ask("sbatch", "--test-only", *submission.arguments, stdin=submission.script)
    words = " ".join(re.sub(r"^(sbatch|allocation failure): |sbatch: ", "", line) for line in done.stderr.splitlines())
    if done.returncode == 0:
        found.notes.append(f"sbatch: {words}")
    else:
        found.problems.append(Problem(f"sbatch refuses it: {words}"))
    for name in str(options.get("partition") or default_partition()).split(","):
        partition = look_at(name)
        if partition is not None:  # else sbatch has said so
            found.problems.extend(beyond(partition, options, nodes, gpus))
            found.notes.append(describe(partition))
    found.problems.extend(_account(options))
    if not found.problems:  # else there may be no node to look at
        _look_at_node(found, slurm, folder, dtrain)
    return found


def beyond(partition: Partition, options: dict[str, object], nodes: int, gpus: Gpus | None) -> list[Problem]:
    """What is more than the partition allows or one of its nodes has."""
    name, problems = partition.name, []
    asked = minutes(str(options["time"])) if "time" in options else None
    if asked is not None and partition.max_minutes is not None and asked > partition.max_minutes:
        limit = f"{partition.max_minutes:g} minutes"
        problems.append(Problem(f"{asked:g} minutes are more than partition {name} allows, {limit}", "slurm.time"))
    if partition.max_nodes is not None and nodes > partition.max_nodes:
        problems.append(Problem(f"--nodes {nodes}: partition {name} allows at most {partition.max_nodes}"))
    if gpus is not None:
        there = partition.gpus.get(gpus.kind, 0) if gpus.kind else max(partition.gpus.values(), default=0)
        if gpus.kind and not there:
            others = ", ".join(kind or "some without a type" for kind in partition.gpus) or "none at all"
            problems.append(Problem(f"--gpus {gpus}: partition {name} has no GPUs of this type, but {others}"))
        elif gpus.count > there:
            problems.append(Problem(f"--gpus {gpus}: a node of partition {name} has {there} at most"))
    cpus = options.get("cpus-per-task")
    if isinstance(cpus, int) and cpus > partition.cpus:
        problem = f"{cpus} are more than a node of partition {name} has, {partition.cpus}"
        problems.append(Problem(problem, "slurm.cpus-per-task"))
    return problems


def describe(partition: Partition) -> str:
    limit = "no time limit" if partition.max_minutes is None else f"up to {partition.max_minutes:g} minutes"
    gpus = ", ".join(f"{count} GPUs{kind and f' ({kind})'}" for kind, count in partition.gpus.items()) or "no GPUs"
    return f"partition {partition.name}: {limit}, {partition.cpus} CPUs and {gpus} a node"


def default_partition() -> str:
    for line in ask("scontrol", "--oneliner", "show", "partition").stdout.splitlines():
        if "Default=YES" in line.split():
            return _fields(line)["PartitionName"]
    return ""


def look_at(name: str) -> Partition | None:
    """The partition of that name; None where there is none that Slurm would show."""
    done = ask("scontrol", "--oneliner", "show", "partition", name)
    if done.returncode != 0 or not done.stdout.strip():
        return None
    fields = _fields(done.stdout.splitlines()[0])
    max_nodes = fields.get("MaxNodes", "UNLIMITED")
    gpus: dict[str, int] = {}
    cpus = 0
    for line in ask("sinfo", "--noheader", f"--partition={name}", "--format=%c %G").stdout.splitlines():
        number, _, resources = line.partition(" ")
        cpus = max(cpus, int(number.rstrip("+")))
        for kind, count in parse_gpus(resources).items():
            gpus[kind] = max(gpus.get(kind, 0), count)
    return Partition(
        name, minutes(fields.get("MaxTime", "")), int(max_nodes) if max_nodes.isdecimal() else None, gpus, cpus
    )


def _fields(line: str) -> dict[str, str]:
    """The NAME=VALUE words of a line of scontrol's."""
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def parse_gpus(resources: str) -> dict[str, int]:
    """GPUs by type in a node's generic resources: `gpu:a100:4(S:0-1),gpu:2,shard:8`."""
    found: dict[str, int] = {}
    for kind, count in re.findall(r"(?:^|,)gpu(?::([^:,(]+))??:(\d+)", resources):
        found[kind] = found.get(kind, 0) + int(count)
    return found


def minutes(text: str) -> float | None:
    """A time limit as Slurm writes it (man sbatch, --time); None for no limit, and for what is none."""
    match = re.fullmatch(r"(?:(\d+)-(\d+)(?::(\d+))?(?::(\d+))?|(?:(\d+):)?(\d+):(\d+)|(\d+))", text)
    if match is None:
        return None
    days, after_days, minutes_after, seconds_after, hours, number, seconds, alone = (
        int(each or 0) for each in match.groups()
    )
    return (days * 24 + after_days + hours) * 60 + minutes_after + number + alone + (seconds_after + seconds) / 60


def _account(options: dict[str, object]) -> list[Problem]:
    """Whether the account is one of the user's, where there is accounting."""
    asked = options.get("account")
    if asked is None or shutil.which("sacctmgr") is None:
        return []
    user = f"user={getpass.getuser()}"
    done = ask("sacctmgr", "--noheader", "--parsable2", "show", "associations", user, "format=account")
    accounts = sorted(set(done.stdout.split()))
    if done.returncode != 0 or not accounts or str(asked) in accounts:
        return []  # or it can't be known
    return [Problem(f"{asked} is no account of yours; there are {', '.join(accounts)}", "slurm.account")]


def _look_at_node(found: Findings, slurm: Slurm, folder: Path, dtrain: str) -> None:
    """Whether a node sees the working directory, and has this dtrain."""
    token = folder / f".dtrain-check-{secrets.token_hex(4)}"
    where = to_arguments({name: value for name, value in slurm.options.items() if name in _WHERE})
    script = probe(slurm, folder, token, dtrain=dtrain)
    command = ["srun", "--nodes=1", "--ntasks=1", "--time=2", f"--immediate={IMMEDIATE_S}", *where]
    token.touch()
    try:
        done = ask(*command, "bash", "-c", script, timeout_s=IMMEDIATE_S + 120)
    finally:
        token.unlink()
    lines = done.stdout.splitlines()
    says = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    if "sees it" not in lines and done.returncode != 0 and "allocate" in done.stderr:
        found.notes.append(f"no node could be looked at: {says[0]}")
        return
    if "sees it" not in lines:
        found.problems.append(Problem(f"the nodes do not see {folder}: submit from a folder that they share"))
    versions = [line.rpartition(" ")[2] for line in lines if line.startswith("dtrain")]
    if not versions:
        hint = "activate its environment in slurm.setup" if slurm.container is None else "install it in the image"
        found.problems.append(Problem(f"the nodes can't run {dtrain} ({says[0]})", hint=hint))
    elif versions[0] != __version__:
        found.problems.append(Problem(f"the nodes have dtrain {versions[0]}, and here it is {__version__}"))
    else:
        found.notes.append(f"a node sees {folder}, and has this dtrain")
