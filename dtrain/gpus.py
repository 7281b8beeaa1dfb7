"""GPUs that torch can't use: a reason to stop, rather than to train on the CPU for a week."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from .errors import first_line

DEVICE_VARIABLE = "DTRAIN_DEVICE"  # cpu or cuda: what `dtrain launch` has chosen for a script's ranks
HIDDEN = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that mean none; the last is Slurm's
_OF_SLURM = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS")  # which of the node's GPUs are this process's
_DEV = Path("/dev")


def unusable() -> str | None:
    """Why torch sees no GPU on a node that has some for this process; None if there are none.

    Imports torch and looks for a driver, so don't call it before forking.
    """
    if (found := _found()) is None:
        return None
    host = socket.gethostname()
    elsewhere = f", sbatch --exclude={host} keeps a run off this node" if "SLURM_JOB_ID" in os.environ else ""
    return (
        f"{host} has GPUs ({found}), but torch can't use any of them: {refusal()}; nvidia-smi may tell "
        f"more{elsewhere}; to use the CPU instead: launch.device=cpu, or for a script CUDA_VISIBLE_DEVICES= (empty)"
    )


def refusal() -> str:
    """Why torch can't use a GPU, in its words."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # the latter where it is built without CUDA
        return first_line(error) + shown
    return f"it finds {torch.cuda.device_count()}{shown}"


def _found() -> str | None:
    """The evidence that there are GPUs for this process."""
    import torch

    if os.environ.get("CUDA_VISIBLE_DEVICES") in HIDDEN:
        return None
    if os.environ.get(DEVICE_VARIABLE) == "cuda":
        return "dtrain launch has found them"
    if given := [f"{name}={os.environ[name]}" for name in _OF_SLURM if os.environ.get(name)]:
        return given[0]
    if devices := [path for path in sorted(_DEV.glob("nvidia[0-9]*")) if os.access(path, os.R_OK | os.W_OK)]:
        return ", ".join(map(str, devices))
    return f"NVML counts {count}" if (count := torch.cuda.device_count()) else None
