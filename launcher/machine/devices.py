"""How many processes a launch starts, on which device, and with how many threads each."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Literal

from dtrain import gpus as here
from dtrain.errors import UserError
from dtrain.stderr import say

from .cores import usable_cores

CROWD = 4  # processes per core, above which there is a warning


def choose_processes(gpus: str, device: str) -> tuple[int, Literal["cpu", "cuda"]]:
    """How many processes on which device: never more than there are GPUs, unless there are none at all.

    If ranks are to be forked, call this only after starting the fork server: it looks for a driver.
    """
    asked = None if gpus == "auto" else int(gpus)
    if device == "cpu":
        return _on_cpu(asked or 1)
    import torch

    found = torch.cuda.device_count()
    if found == 0:
        if (problem := here.unusable()) is not None:
            raise UserError(problem)
        why = _why_no_gpu()
        if device == "cuda":
            raise UserError(f"launch.device is cuda, but there is no GPU on {socket.gethostname()}: {why}")
        say(f"warning: {why}; {num_processes(asked or 1, 'CPU')} instead")
        return _on_cpu(asked or 1)
    host, visible = socket.gethostname(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and (named := _num_named(visible)) > found:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible} names {named} GPUs, but a process on {host} sees {found}: "
            "name GPUs that exist (nvidia-smi -L); with MIG, CUDA shows a process one instance only"
        )
    if asked is not None and asked > found:
        raise UserError(f"--gpus {asked}: {host} has {found} visible; ask for at most {found}")
    return asked or found, "cuda"


def _num_named(visible: str) -> int:
    """How many devices a list names; CUDA stops reading at -1."""
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return names.index("-1") if "-1" in names else len(names)


def num_processes(count: int, device: str) -> str:
    """`1 cpu process`, `2 cpu processes`."""
    return f"{count} {device} process{'es' if count > 1 else ''}"


def _on_cpu(num_ranks: int) -> tuple[int, Literal["cpu"]]:
    """That many processes, with a warning if there are far more of them than cores."""
    cores = usable_cores()
    if num_ranks > CROWD * cores:
        many = num_processes(num_ranks, "CPU")
        say(f"warning: {many}, {cores} cores: they will take turns, and even starting them is slow")
    return num_ranks, "cpu"


def _why_no_gpu() -> str:
    import torch

    if os.environ.get("CUDA_VISIBLE_DEVICES") in here.HIDDEN:
        return "CUDA_VISIBLE_DEVICES hides all GPUs"
    if torch.version.cuda is None:
        return "this build of PyTorch has no CUDA"
    if not Path("/proc/driver/nvidia").exists():
        return "no CUDA device found (no NVIDIA driver is loaded)"
    return "no CUDA device found"


def expected_ranks(gpus: str) -> int:
    """How many processes `choose_processes` is likely to choose, without the seconds that importing torch takes."""
    if gpus != "auto":
        return int(gpus)
    return max(1, len(visible_gpus()))


def visible_gpus() -> list[str]:
    """The visible GPUs, by names that CUDA_VISIBLE_DEVICES accepts; found without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name not in here.HIDDEN]
    return [str(number) for number, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


def threads_per_rank(num_ranks: int) -> int:
    """The cores that this process may use, shared among the ranks."""
    return max(1, usable_cores() // num_ranks)
