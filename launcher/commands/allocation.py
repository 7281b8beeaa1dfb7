"""`dtrain launch` in the user's own Slurm allocation: salloc, sbatch with their own script, srun.

A task that srun started takes its place among the others. Elsewhere, in a shell on the first node or on the machine
where salloc was called, this command starts itself by srun, one task on each node.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace

from dtrain.errors import UserError
from dtrain.slurm.command import ask, outside_a_job
from dtrain.slurm.environment import Place, is_task, place
from dtrain.slurm.partition import parse_gpus

from ..agent.subcommand import Subcommand, own_command
from ..machine.devices import visible_gpus
from .request import NodeOptions, Request

# srun kills at SIGTERM; this signal it passes on unchanged, and the ranks save a checkpoint.
_FOR_SRUN: Mapping[int, int] = {signal.SIGTERM: signal.SIGUSR2, signal.SIGHUP: signal.SIGUSR2}


def located(request: Request, nodes: int | None, *, started_by_srun: bool) -> Request:
    """The request for this process's part of the run, if srun has started it as one of several tasks.

    Args:
        nodes: as the user gave it.
        started_by_srun: known to be so: a job that dtrain has submitted.

    Raises:
        UserError: the request does not match the tasks.
    """
    if not started_by_srun and not _is_part(nodes):
        return replace(request, nodes=replace(request.nodes, count=nodes or 1))
    here = place(os.environ)
    if nodes is not None and nodes != len(here.hosts):
        raise UserError(f"--nodes {nodes}: srun started this on {len(here.hosts)} nodes; omit it, or use --nodes 1")
    if here.local_size > 1:
        request = _share(request, here)
    return replace(request, nodes=NodeOptions(here.tasks, here.rank, request.nodes.rendezvous, here))


def _is_part(nodes: int | None) -> bool:
    """Whether this process is one of several tasks that form one run; --nodes 1 says that it is not.

    `srun --pty bash` on several nodes has tasks too, but only its shell is interactive.
    """
    return nodes != 1 and is_task(os.environ) and not sys.stdin.isatty()


def nodes_elsewhere(nodes: int | None) -> int | None:
    """On how many nodes of the allocation this command should run; None if only here.

    Raises:
        UserError: there are fewer than were asked for.
    """
    there = os.environ.get("SLURM_NNODES", "")
    if "SLURM_JOB_ID" not in os.environ or not there.isdecimal() or _is_part(nodes):
        return None
    wanted = nodes or int(there)
    if wanted > int(there):
        raise UserError(f"--nodes {wanted}: Slurm job {os.environ['SLURM_JOB_ID']} has {there}")
    is_on_a_node = "SLURMD_NODENAME" in os.environ  # salloc leaves its shell where it was called
    return None if wanted == 1 and is_on_a_node else wanted


def start(nodes: int) -> int:
    """Run this command on this many nodes of the allocation; the exit code.

    Raises:
        UserError: Slurm does not answer.
    """
    job = os.environ["SLURM_JOB_ID"]
    # None of the job's own options (tasks, CPUs or GPUs per task) may apply to this step.
    command = ["srun", f"--jobid={job}", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--overlap"]
    if gpus := _gpus_per_node(job):
        command.append(f"--gres=gpu:{gpus}")
    # The agents end by themselves, and get Ctrl-C at once.
    command += ["--kill-on-bad-exit=0", "--wait=120", "--unbuffered", "--input=none", "--export=ALL"]
    command += ["--disable-status", *own_command(), *sys.argv[1:]]
    with Subcommand.passing_signals_on(_FOR_SRUN) as srun:
        return srun.run(command, outside_a_job(os.environ), end_by=signal.SIGTERM)


def _gpus_per_node(job: str) -> int:
    """How many GPUs the job has on each of its nodes, or on the one with the fewest."""
    shown = ask("scontrol", "--oneliner", "--details", "show", "job", job).stdout
    resources = re.findall(r" CPU_IDs=\S+ Mem=\S+ GRES=(\S*)", shown)
    return min((sum(parse_gpus(each).values()) for each in resources), default=0)


def _share(request: Request, here: Place) -> Request:
    """This task's share of its node's processes and GPUs."""
    count, asked = here.local_size, request.ranks.gpus
    if asked != "auto":
        if int(asked) % count:
            raise UserError(
                f"--gpus {asked} is per node, but srun started {count} tasks on this one: omit it, "
                f"use --gpus {count}, or start one task per node"
            )
        request = replace(request, ranks=replace(request.ranks, gpus=str(int(asked) // count)))
    gpus, given = visible_gpus(), os.environ.get("SLURM_GPUS_ON_NODE")
    if given is not None and len(gpus) != int(given):  # Slurm shows each task its own
        return request
    if given is not None and len(gpus) < count:
        raise UserError(f"srun started {count} tasks on a node with {given} GPUs: start one per GPU, or one per node")
    if each := len(gpus) // count:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[here.local_rank * each :][:each])
    return request
