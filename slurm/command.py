"""Slurm's commands, called as from outside any job."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

from dtrain.errors import UserError
from dtrain.schema import sbatch

# Slurm's commands read options from variables: those of a job, in a shell within it, and those with which users filter
# the output of squeue and others.
_OPTIONS = ("SLURM", "SRUN_", "SQUEUE_", "SCANCEL_", "SINFO_", "SACCT_")
# How Slurm is reached, and which cluster is meant.
_KEPT = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_SACK_KEY", "SLURM_SACK_SOCKET", "SLURM_CLUSTERS"}
# sbatch's for what dtrain sets itself; others (SBATCH_ACCOUNT, SBATCH_EXPORT) are the user's or the site's defaults.
_TAKEN = {"SBATCH_ARRAY_INX", *(f"SBATCH_{name.replace('-', '_').upper()}" for name in sbatch.TAKEN)}


def outside_a_job(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without a job's variables and those that would change what dtrain asks of Slurm."""
    return {
        name: value
        for name, value in environment.items()
        if name in _KEPT or not (name.startswith(_OPTIONS) or name in _TAKEN)
    }


def ask(*command: str, stdin: str = "", timeout_s: float = 30.0) -> subprocess.CompletedProcess[str]:
    """The output of a Slurm command.

    Raises:
        UserError: it is not there, or does not answer.
    """
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
            input=stdin,
            env=outside_a_job(os.environ),
        )
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not found: Slurm is not installed here, or not on PATH; without --slurm the job runs here"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{command[0]} did not answer within {timeout_s:.0f} s; is Slurm's controller up? (scontrol ping)"
        ) from None
