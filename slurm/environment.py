"""What Slurm's environment variables tell a process about its place (man srun)."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from dtrain.errors import UserError

from .command import ask

FIRST_PORT, NUM_PORTS = 20000, 12768  # below those that systems give to outgoing connections
_STEP_APART = 1009  # between the ports of a job's steps, which may run at the same time


@dataclass(frozen=True)
class Place:
    """This task among those of its step, and the address of the first. Each is a node of the run.

    `hosts` are those of the step, in order; `local_rank` is this one's among the `local_size` tasks on its host.
    """

    tasks: int
    rank: int
    host: str
    port: int
    hosts: tuple[str, ...]
    local_rank: int = 0
    local_size: int = 1


def is_task(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of several tasks that srun has started, or comes from one.

    A job that was submitted from within a step has that step's variables besides its own.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    node_list = environment.get("SLURM_STEP_NODELIST")
    return tasks.isdecimal() and int(tasks) > 1 and node_list == environment.get("SLURM_NODELIST")


def place(environment: Mapping[str, str]) -> Place:
    """Where this task runs.

    Raises:
        UserError: srun has not started this process.
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NODEID", "SLURM_LOCALID")
    wrong = [name for name in names if not environment.get(name, "").isdecimal()]
    wrong += [name for name in ("SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE") if not environment.get(name)]
    if wrong:
        raise UserError(f"only srun may start this, within a Slurm job: no {wrong[0]}")
    job_id, step_id, rank, tasks, node, local_rank = (int(environment[name]) for name in names)
    hosts = expand(environment["SLURM_STEP_NODELIST"])
    port = FIRST_PORT + (job_id + _STEP_APART * step_id) % NUM_PORTS
    local_size = _tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[node]
    return Place(tasks, rank, _address(hosts[0], environment), port, hosts, local_rank, local_size)


def cpus(environment: Mapping[str, str]) -> int | None:
    """A task's share of the CPUs that its step or job has on this node, if Slurm says so.

    Many clusters bind a task to its CPUs, others only count them.
    """
    here, tasks = environment.get("SLURM_CPUS_ON_NODE", ""), 1
    if not here.isdecimal():
        return None
    if is_task(environment):
        tasks = _tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[int(environment["SLURM_NODEID"])]
    return max(1, int(here) // tasks)


def expand(node_list: str) -> tuple[str, ...]:
    """The hosts of `gpu[01-04,7],login`. There may be several brackets in a name: `rack[1-2]-n[3,4]`."""
    return tuple(host for name in re.findall(r"(?:[^,\[]|\[[^]]*\])+", node_list) for host in _expand_name(name))


def _expand_name(name: str) -> list[str]:
    before, bracket, rest = name.partition("[")
    if not bracket:
        return [name]
    inside, _, after = rest.partition("]")
    numbers = []
    for part in inside.split(","):
        first, _, last = part.partition("-")
        numbers += [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]
    return [f"{before}{number}{end}" for number in numbers for end in _expand_name(after)]


def _tasks_per_node(text: str) -> list[int]:
    """By node: `2(x3),1` is 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def _address(host: str, environment: Mapping[str, str]) -> str:
    """The address by which the others reach that host: its name may be known to Slurm only."""
    with suppress(OSError):
        socket.getaddrinfo(host, None)
        return host
    with suppress(UserError):  # in a container there may be no scontrol
        if found := re.search(r"\bNodeAddr=(\S+)", ask("scontrol", "--oneliner", "show", "node", host).stdout):
            return found[1]
    return environment.get("SLURM_LAUNCH_NODE_IPADDR", host)  # of the host where srun was started, mostly the first
