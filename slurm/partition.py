"""A partition according to Slurm: its limits, and its nodes' resources."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from dtrain.clusters.cluster import Gpus
from dtrain.errors import UserError
from dtrain.schema import sbatch

from .command import ask


@dataclass(frozen=True)
class Node:
    """What a node has: CPUs that jobs may have, threads of a core, and GPUs by type ("" for those without one)."""

    cpus: int
    threads: int
    gpus: dict[str, int]


@dataclass(frozen=True)
class Partition:
    """A partition's limits, and its nodes, each kind of node once.

    `gives_cpus`: a job that says nothing of CPUs gets some for each GPU.
    """

    name: str
    max_minutes: float | None
    max_nodes: int | None
    max_cpus: int | None  # of a node
    gives_cpus: bool
    nodes: tuple[Node, ...]

    @property
    def gpus(self) -> dict[str, int]:
        """By type, the most that a node has."""
        kinds = dict.fromkeys(kind for node in self.nodes for kind in node.gpus)
        return {kind: max(node.gpus.get(kind, 0) for node in self.nodes) for kind in kinds}

    @property
    def cpus(self) -> int:
        """The most that a node has."""
        return max((node.cpus for node in self.nodes), default=0)

    def cpus_beside(self, gpus: Gpus, *, whole_cores: bool = False) -> int | None:
        """The share of a node's CPUs that goes with this many GPUs, on each node that has them; None if none has.

        Args:
            whole_cores: one thread of each core counts.
        """
        found = []
        for node in self.nodes:
            there = node.gpus.get(gpus.kind, 0) if gpus.kind else sum(node.gpus.values())
            if there >= gpus.count:
                part = min(node.cpus, self.max_cpus or node.cpus) * gpus.count // sum(node.gpus.values())
                cores = max(1, part // node.threads)
                found.append(cores if whole_cores else cores * node.threads)
        return min(found, default=None)


def default_partition() -> str:
    for line in ask("scontrol", "--oneliner", "show", "partition").stdout.splitlines():
        if "Default=YES" in line.split():
            return _fields(line)["PartitionName"]
    return ""


def look_at(name: str) -> Partition | None:
    """The partition of that name; None if Slurm shows none."""
    done = ask("scontrol", "--oneliner", "show", "partition", name)
    if done.returncode != 0 or not done.stdout.strip():
        return None
    fields = _fields(done.stdout.splitlines()[0])
    of_all = re.search(r"^JobDefaults *= (.*)$", ask("scontrol", "show", "config").stdout, re.MULTILINE)
    defaults = fields.get("JobDefaults", "") + (of_all[1] if of_all else "")
    nodes = ask("scontrol", "--oneliner", "show", "node", fields.get("Nodes", "")).stdout.splitlines()
    kinds: list[Node] = []
    for node in map(_node, filter(None, nodes)):
        if node not in kinds:
            kinds.append(node)
    return Partition(
        name,
        minutes(fields.get("MaxTime", "")),
        _limit(fields.get("MaxNodes", "")),
        _limit(fields.get("MaxCPUsPerNode", "")),
        "DefCpuPerGPU" in defaults,
        tuple(kinds),
    )


def _node(line: str) -> Node:
    """A node as scontrol shows it: since Slurm 22.05 with the CPUs that are not kept for the system."""
    fields = _fields(line)
    cpus = int(fields.get("CPUEfctv") or fields["CPUTot"])
    return Node(cpus, int(fields.get("ThreadsPerCore", 1)), parse_gpus(fields.get("Gres", "")))


def _limit(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _fields(line: str) -> dict[str, str]:
    """The NAME=VALUE words of a line of scontrol's; where a name is there twice, the later is in somebody's comment."""
    return dict(word.split("=", 1) for word in reversed(line.split()) if "=" in word)


def parse_gpus(resources: str) -> dict[str, int]:
    """GPUs by type in a node's generic resources: `gpu:a100:4(S:0-1),gpu:2,shard:8`."""
    found: dict[str, int] = {}
    for kind, count in re.findall(r"(?:^|,)gpu(?::([^:,(]+))??:(\d+)", resources):
        found[kind] = found.get(kind, 0) + int(count)
    return found


def minutes(text: str) -> float | None:
    """A time limit as Slurm writes it (man sbatch, --time); None for no limit, or an invalid one."""
    match = re.fullmatch(r"(?:(\d+)-(\d+)(?::(\d+))?(?::(\d+))?|(?:(\d+):)?(\d+):(\d+)|(\d+))", text)
    if match is None:
        return None
    days, after_days, minutes_after, seconds_after, hours, number, seconds, alone = (
        int(each or 0) for each in match.groups()
    )
    return (days * 24 + after_days + hours) * 60 + minutes_after + number + alone + (seconds_after + seconds) / 60


def cpus_beside(gpus: Gpus, options: Mapping[str, object]) -> int | None:
    """How many of a node's CPUs to request with its GPUs: by default a job gets one, for all of them.

    None if the options set it, or Slurm assigns CPUs with GPUs itself.

    Raises:
        UserError: it can't be known here; the message says why.
    """
    variables = {f"SBATCH_{name.replace('-', '_').upper()}" for name in sbatch.CPUS}
    if sbatch.CPUS & options.keys() or variables & os.environ.keys():
        return None
    if "clusters" in options:
        raise UserError("nodes of other clusters are not checked")
    names = str(options.get("partition") or os.environ.get("SBATCH_PARTITION") or default_partition())
    partitions = [partition for name in names.split(",") if (partition := look_at(name)) is not None]
    if any(partition.gives_cpus for partition in partitions):
        return None
    whole_cores = "threads-per-core" in options or options.get("hint") == "nomultithread"
    found = [partition.cpus_beside(gpus, whole_cores=whole_cores) for partition in partitions]
    cpus = min((cpus for cpus in found if cpus is not None), default=None)
    if cpus is None:
        raise UserError(f"Slurm shows no node of partition {names} with {gpus} GPUs")
    return cpus
