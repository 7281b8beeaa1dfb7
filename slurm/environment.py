"""What Slurm tells a task of where it is, in environment variables (man srun)."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from dtrain.errors import UserError

FIRST_PORT, NUM_PORTS = 20000, 12768  # below those that systems give to outgoing connections


@dataclass(frozen=True)
class Place:
    """This node among the job's, and where node 0 is met."""

    nodes: int
    node_rank: int
    host: str
    port: int


def place(environment: Mapping[str, str]) -> Place:
    """Where this task runs.

    Raises:
        UserError: Slurm has not started this process.
    """
    names = ("SLURM_JOB_ID", "SLURM_NODEID", "SLURM_NNODES")
    wrong = [name for name in names if not environment.get(name, "").isdecimal()]
    wrong += ["SLURM_JOB_NODELIST"] * (not environment.get("SLURM_JOB_NODELIST"))
    if wrong:
        raise UserError(f"this is for srun to start, within a job of Slurm: no {wrong[0]}")
    job_id, node_rank, nodes = (int(environment[name]) for name in names)
    node_list = environment["SLURM_JOB_NODELIST"]
    # srun was started on the first node, and says by which address the others have reached it.
    host = first_host(node_list)
    if not _has_address(host):
        host = environment.get("SLURM_LAUNCH_NODE_IPADDR", host)
    return Place(nodes, node_rank, host, FIRST_PORT + job_id % NUM_PORTS)


def first_host(node_list: str) -> str:
    """The first of `gpu[01-04,7],login`: gpu01. There may be several brackets in a name: `rack[1-2]-n[3,4]`."""
    first = re.match(r"(?:[^,\[]|\[[^]]*\])*", node_list)
    name = first[0] if first else node_list
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", name)


def _has_address(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True
