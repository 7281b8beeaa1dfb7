"""torch's private parts, all that are used here. tests/house/test_private_parts.py covers upgrades.

Those of torch.utils.data are in ../data/torch_data_private.py, those of torch's elastic agent in the launcher.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ChainedScheduler, SequentialLR

# Nested dicts, lists, tuples and what is registered as such: no public name of torch's leads there.
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = [
    "BATCH_NORMS",
    "RUNNING_NORMS",
    "add_",
    "clamp_",
    "dump_memory",
    "milestones_of",
    "multiply_",
    "own_buffers",
    "record_memory",
    "remove_buffer",
    "require_reduced",
    "schedulers_in",
    "sparse_parts",
    "stop_recording_memory",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
]

# The bases: models bring classes of their own, derived from these.
BATCH_NORMS = (_BatchNorm,)
RUNNING_NORMS = (_NormBase,)  # batch norms, and instance norms


# One call for all tensors, as torch's own optimizers make it: tensor by tensor, a step of a large model would start
# thousands of kernels. The public names are of single tensors.


def multiply_(tensors: list[Tensor], factor: float | Tensor) -> None:
    """Multiply each in place."""
    torch._foreach_mul_(tensors, factor)


def add_(tensors: list[Tensor], others: list[Tensor], alpha: float) -> None:
    """Add alpha times the other to each in place."""
    torch._foreach_add_(tensors, others, alpha=alpha)


def clamp_(tensors: list[Tensor], limit: float) -> None:
    """Limit each number to [-limit, limit] in place."""
    torch._foreach_clamp_min_(tensors, -limit)
    torch._foreach_clamp_max_(tensors, limit)


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own by name, those without a value yet too, which `named_buffers` leaves out."""
    return module._buffers


def remove_buffer(module: nn.Module, name: str) -> None:
    """Take out a buffer, whatever the module's class has under that name."""
    module._buffers.pop(name, None)


def sparse_parts(tensor: Tensor) -> dict[str, Tensor]:
    """Indices and values as they are. The public ones are of coalesced tensors, which sums in another order."""
    return {"indices": tensor._indices(), "values": tensor._values()}


def require_reduced(wrapped: DistributedDataParallel) -> None:
    """Raise RuntimeError where DDP still waits for gradients. It looks itself only before its next forward pass."""
    wrapped.reducer._check_reducer_finalized()


def schedulers_in(scheduler: Any) -> list[Any]:
    """Those that a chained or a sequential one is made of; nothing of any other."""
    return list(scheduler._schedulers) if isinstance(scheduler, ChainedScheduler | SequentialLR) else []


def milestones_of(scheduler: SequentialLR) -> list[int]:
    """The steps at which the next one in a sequence begins."""
    return list(scheduler._milestones)


# What pytorch.org/memory_viz reads, as torch's own guide to memory has it made.

MOST_ALLOCATIONS = 100_000  # the newest; all of a long run would fill the host's memory


def record_memory(out_of_memory: Path) -> None:
    """Have this process note what it allocates on its GPU, and write that to the file if memory runs out."""
    torch.cuda.memory._record_memory_history(max_entries=MOST_ALLOCATIONS)
    # In a torch that is built for CUDA, which its stubs leave out.
    torch._C._cuda_attach_out_of_memory_observer(lambda *_: dump_memory(out_of_memory))  # type: ignore[attr-defined]


def stop_recording_memory() -> None:
    """Note nothing any more, which costs time at each allocation."""
    torch.cuda.memory._record_memory_history(None)


def dump_memory(file: Path) -> None:
    """Write what has been noted."""
    torch.cuda.memory._dump_snapshot(str(file))
