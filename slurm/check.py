"""`dtrain check --slurm`: checks a submission with Slurm and on a node, before it waits in the queue."""

from __future__ import annotations

import getpass
import re
import secrets
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from dtrain import __version__
from dtrain.clusters.cluster import Findings, Gpus
from dtrain.errors import Problem
from dtrain.schema.sbatch import to_arguments
from dtrain.schema.sections import Slurm

from .command import ask
from .partition import Partition, default_partition, look_at, minutes
from .render import BatchScript, in_pyxis, probe

IMMEDIATE_S = 30  # how long the check on a node may wait for a free one
# The submission's options that decide where its job may run.
_WHERE = ("account", "partition", "qos", "reservation", "constraint", "exclude", "nodelist", "clusters")


def check(
    batch: BatchScript, slurm: Slurm, folder: Path, nodes: int, gpus: Gpus | None, dtrain: Sequence[str]
) -> Findings:
    """Check everything.

    Args:
        folder: the working directory, in which runs are made.
        gpus: of each node; None on CPUs.
        dtrain: the command on the nodes.

    Raises:
        UserError: Slurm is not there, or does not answer.
    """
    found, options = Findings([], []), slurm.options
    done = ask("sbatch", "--test-only", *batch.arguments, stdin=batch.script)
    words = " ".join(re.sub(r"^(sbatch|allocation failure): |sbatch: ", "", line) for line in done.stderr.splitlines())
    if done.returncode == 0:
        found.notes.append(f"sbatch: {words}")
    else:
        found.problems.append(Problem(f"sbatch refuses it: {words}"))
    for name in str(options.get("partition") or default_partition()).split(","):
        partition = look_at(name)
        if partition is not None:  # otherwise sbatch has said so
            found.problems.extend(beyond(partition, options, nodes, gpus))
            found.notes.append(_partition_line(partition))
    found.problems.extend(_account(options))
    if not found.problems:  # otherwise there may be no node to check
        _look_at_node(found, slurm, folder, dtrain)
    return found


def beyond(partition: Partition, options: dict[str, object], nodes: int, gpus: Gpus | None) -> list[Problem]:
    """What exceeds the partition's limits or its nodes."""
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
            others = ", ".join(kind or "some without a type" for kind in partition.gpus) or "none"
            problems.append(Problem(f"--gpus {gpus}: partition {name} has no GPUs of this type, but {others}"))
        elif gpus.count > there:
            problems.append(Problem(f"--gpus {gpus}: a node of partition {name} has at most {there}"))
    cpus = options.get("cpus-per-task")
    if isinstance(cpus, int) and cpus > partition.cpus:
        problem = f"{cpus} are more than the {partition.cpus} of a node in partition {name}"
        problems.append(Problem(problem, "slurm.cpus-per-task"))
    return problems


def _partition_line(partition: Partition) -> str:
    limit = "no time limit" if partition.max_minutes is None else f"up to {partition.max_minutes:g} minutes"
    gpus = ", ".join(f"{count} GPUs{kind and f' ({kind})'}" for kind, count in partition.gpus.items()) or "no GPUs"
    return f"partition {partition.name}: {limit}, {partition.cpus} CPUs and {gpus} a node"


def _account(options: dict[str, object]) -> list[Problem]:
    """Whether the account is one of the user's, if there is accounting."""
    asked = options.get("account")
    if asked is None or shutil.which("sacctmgr") is None:
        return []
    user = f"user={getpass.getuser()}"
    done = ask("sacctmgr", "--noheader", "--parsable2", "show", "associations", user, "format=account")
    accounts = sorted(set(done.stdout.split()))
    if done.returncode != 0 or not accounts or str(asked) in accounts:
        return []  # or it can't be known
    return [Problem(f"{asked} is not one of your accounts; you are a member of {', '.join(accounts)}", "slurm.account")]


def _look_at_node(found: Findings, slurm: Slurm, folder: Path, dtrain: Sequence[str]) -> None:
    """Whether a node can access the working directory and has the same dtrain."""
    token = folder / f".dtrain-check-{secrets.token_hex(4)}"
    where = to_arguments({name: value for name, value in slurm.options.items() if name in _WHERE})
    script = probe(slurm, folder, token, dtrain=dtrain)
    command = ["srun", "--nodes=1", "--ntasks=1", "--time=2", f"--immediate={IMMEDIATE_S}", *where]
    command += in_pyxis(slurm, (folder,))
    token.touch()
    try:
        done = ask(*command, "bash", "-c", script, timeout_s=IMMEDIATE_S + 120)
    finally:
        token.unlink()
    lines = done.stdout.splitlines()
    says = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    if "sees it" not in lines and done.returncode != 0 and "allocate" in done.stderr:
        found.notes.append(f"no node could be checked: {says[0]}")
        return
    if "sees it" not in lines:
        found.problems.append(Problem(f"{folder} is not visible on the nodes: submit from a shared folder"))
    versions = [line.rpartition(" ")[2] for line in lines if line.startswith("dtrain")]
    if not versions:
        hint = "activate its environment in slurm.setup" if not slurm.is_in_container else "install it in the image"
        found.problems.append(Problem(f"the nodes can't run {shlex.join(dtrain)} ({says[0]})", hint=hint))
    elif versions[0] != __version__:
        found.problems.append(Problem(f"the nodes have dtrain {versions[0]}, but this machine has {__version__}"))
    else:
        found.notes.append(f"a node sees {folder} and has the same dtrain")
