"""This process's rank, the world size, its device, and the process groups."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from dtrain import gpus
from dtrain.errors import UserError, first_line
from dtrain.run.folder import RUN_DIR_VARIABLE, RunDir
from dtrain.run.heartbeat import HANG_TIMEOUT_S, HANG_TIMEOUT_VARIABLE, Heartbeat, Phase

from .torch_versions import pin_exactly

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all.

    `control` is a gloo group of all ranks for small messages on the CPU (reports, agreements on a stop). It is a
    group of its own, so that its messages never mix with the gradients' collectives. None in a world of one.
    """

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes what is the same on all ranks."""
        return self.rank == 0

    def from_main(self, value: T) -> T:
        """Rank 0's value, on all ranks. All ranks take part."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Each rank's value in the order of the ranks, on all ranks. All ranks take part."""
        values = [value] * self.world_size
        if self.control is not None:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The tensor summed over all ranks, on all of them. All ranks take part."""
        return self.begin_sum(value)()

    def begin_sum(self, value: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin `sum`, and go on; what is returned waits for it and gives it. All ranks take part."""
        if self.world_size == 1:
            return lambda: value
        value = value.clone()
        work = dist.all_reduce(value, async_op=True)

        def end() -> torch.Tensor:
            work.wait()
            return value

        return end

    def await_device(self) -> None:
        """Wait until the device has finished everything, including copies to CPU memory. No collective."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def barrier(self) -> None:
        """Wait for all ranks. All ranks take part."""
        if self.control is not None:
            dist.barrier(group=self.control)


def ensure_group(world: World) -> None:
    """A process group also for a world of one: some engines want one."""
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]  # not in its __all__
        dist.init_process_group(_backend(world.device), store=store, rank=0, world_size=1)
        atexit.register(_leave)


def require_cpu_backend(what: str) -> None:
    """Raise UserError if the script's own process group can't exchange tensors in CPU memory."""
    if "cpu:" not in (made := dist.get_backend_config()):
        raise UserError(
            f"{what} exchanges tensors in the CPU's memory too, which this script's process group ({made}) can't: "
            'init_process_group("cpu:gloo,cuda:nccl"), or leave it to dtrain'
        )


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def join_world(device: str = "auto") -> World:
    """Join the processes that torchrun's variables (RANK, WORLD_SIZE, MASTER_ADDR ...) describe; alone without them.

    All ranks take part. A process group that the caller's script made is used as it is.

    Args:
        device: "cuda", "cpu", or "auto": the GPU of this local rank where there is one.
    """
    chosen = own_device(device)
    if not dist.is_initialized():
        if _number("WORLD_SIZE", 1) == 1:
            return World(0, 1, chosen)
        # With a device, NCCL connects at once instead of at the first collective.
        device_id = chosen if chosen.type == "cuda" else None
        _say_joining()
        dist.init_process_group(_backend(chosen), device_id=device_id, timeout=collective_timeout())
        atexit.register(_leave)
    if dist.get_world_size() == 1:
        return World(0, 1, chosen)
    control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=collective_timeout()))
    return World(dist.get_rank(), dist.get_world_size(), chosen, control)


def _say_joining() -> None:
    """Tell the agent of `dtrain launch` that this rank is joining: one that exits before it joins is missed by all."""
    if (run := os.environ.get(RUN_DIR_VARIABLE)) is not None:
        with contextlib.suppress(OSError):
            Heartbeat(RunDir(run).heartbeat(_number("RANK", 0))).enter(Phase.JOINING)


def own_device(name: str) -> torch.device:
    """This rank's device, which CUDA takes from now on where none is named.

    Args:
        name: "cuda", "cpu", or "auto": what `dtrain launch` has chosen, else a GPU where there is one.

    Raises:
        UserError: there is none, where there should be one.
    """
    chosen = os.environ.get(gpus.DEVICE_VARIABLE) if name == "auto" else name
    if chosen == "cpu":
        return torch.device("cpu")
    host = socket.gethostname()
    if not torch.cuda.is_available():
        if (problem := gpus.unusable()) is not None or name == "cuda":
            raise UserError(problem or f"there is no GPU on {host}: {gpus.refusal()}")
        return torch.device("cpu")
    index, found = _number("LOCAL_RANK", 0), torch.cuda.device_count()
    if found == 1 and os.environ.get("SLURM_LOCALID") == str(index):
        index = 0  # a task of srun for each rank, each of which sees its own alone (--gpus-per-task)
    if index >= found:
        raise UserError(f"local rank {index} has no GPU: {found} found on {host}")
    pin_exactly()
    try:
        torch.cuda.set_device(index)
    except RuntimeError as error:
        raise UserError(
            f"GPU {index} of {host} can't be used: {first_line(error)}; nvidia-smi may tell more"
        ) from error
    return torch.device("cuda", index)


def _number(variable: str, default: int) -> int:
    """One of torchrun's variables."""
    value = os.environ.get(variable, str(default))
    if not value.isdecimal():
        raise UserError(f"the environment has {variable}={value!r}: expected a number, as torchrun sets it")
    return int(value)


def collective_timeout() -> timedelta:
    """Long enough for the agent's watchdog to see a hang first: it names the rank that causes it."""
    return timedelta(seconds=2 * float(os.environ.get(HANG_TIMEOUT_VARIABLE, HANG_TIMEOUT_S)))


def _leave() -> None:
    # After an uncaught exception the other ranks may be in a collective: to leave the group would wait for them.
    if dist.is_initialized() and not hasattr(sys, "last_value"):
        dist.destroy_process_group()
